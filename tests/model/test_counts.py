"""Counts in a config are what is stored, or the model is refused before anything rests on them."""

import json

import numpy as np
import pytest

from coterie import apply, prune
from coterie.errors import CoterieError
from coterie.model.layer import Model
from handmade import qwen, read_all, save


def changed(folder, **config):
    """The checkpoint with another config."""
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 10**12}, r"counts 1,000,000,000,000 layers, but model\.layers\.2 is not stored"),
        ({"num_hidden_layers": 3}, r"counts 3 layers, but model\.layers\.2 is not stored"),
        ({"num_hidden_layers": 1}, r"counts 1 layers, but model\.layers\.1 is stored, and none of num_nextn_predict"),
        ({"num_experts_per_tok": 9}, r"9 experts a token .*; routers have 8"),
        ({"num_experts": 9}, "the config counts 9 experts|expert 8 differs"),
        ({"num_experts": 7}, "the config counts 7 experts"),
        ({"vocab_size": 6}, r"vocab_size is 6, but 'model\.embed_tokens\.weight' has shape \[5, 4\]"),
        ({"hidden_size": 8}, r"hidden_size is 8, but 'model\.embed_tokens\.weight' has shape \[5, 4\]"),
        ({"moe_intermediate_size": 7}, r"moe_intermediate_size is 7, but .*experts\.0\..* has shape"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\], so layer 1 is dense, but it has experts"),
    ],
)
def test_a_count_that_is_not_what_is_stored(tmp_path, config, message):
    """Two layers of eight experts: every other claim is refused by all that open the model, and nothing is written."""
    model = changed(qwen(tmp_path / "model"), **config)
    with pytest.raises(CoterieError, match=message):
        prune(model, tmp_path / "out", experts=4)
    (tmp_path / "plan.json").write_text('{"layers": {"0": {"kept": [0, 1]}, "1": {"kept": [0, 1]}}}')
    with pytest.raises(CoterieError, match=message):
        apply(model, tmp_path / "plan.json", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "plan.json"]


@pytest.mark.parametrize("dense", [{"first_k_dense_replace": 1}, {"mlp_layer_types": ["sparse", "dense"]}])
def test_layers_that_are_dense_by_the_config(tmp_path, dense):
    """Whichever way a family says it."""
    model_type = {"first_k_dense_replace": "deepseek_v2", "mlp_layer_types": "glm4_moe_lite"}[next(iter(dense))]
    model = qwen(tmp_path / "model", model_type=model_type)
    assert len(Model.open(model).main) == 2
    with pytest.raises(CoterieError, match="is dense, but it has experts"):
        Model.open(changed(model, **dense))


def test_a_layer_that_is_missing_from_the_middle(tmp_path):
    """The files of layer 1 of three are not there."""
    model = qwen(tmp_path / "model", layers=3)
    tensors = {name: array for name, array in read_all(model).items() if ".layers.1." not in name}
    save(model, json.loads((model / "config.json").read_text()), [tensors])
    with pytest.raises(CoterieError, match=r"counts 3 layers, but model\.layers\.1 is not stored \(of 2 .* is 2\)"):
        Model.open(model)


@pytest.mark.parametrize("config", [{"num_nextn_predict_layers": 1}, {}], ids=["counted", "by name"])
def test_layers_of_prediction_stand_beyond_the_count(tmp_path, config):
    """The config counts them, or they have what only such layers have."""
    model = qwen(tmp_path / "model", layers=3)
    tensors = read_all(model) | {"model.layers.2.eh_proj.weight": np.ones((4, 8), np.float32)}
    save(model, json.loads((model / "config.json").read_text()), [tensors])
    opened = Model.open(changed(model, num_hidden_layers=2, **config))
    assert [block.mtp for block in opened.moe] == [False, False, True]


def test_what_a_config_does_not_say_is_not_asked_for(tmp_path):
    """Some leave a size to the class's default."""
    model = qwen(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for key in ("num_hidden_layers", "hidden_size", "vocab_size"):
        del config[key]
    (model / "config.json").write_text(json.dumps(config))
    assert len(Model.open(model).main) == 2
