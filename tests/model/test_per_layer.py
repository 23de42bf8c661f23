"""Counts that a config lists layer by layer: one number where all are equal, each layer's where the family says so."""

import json

import numpy as np
import pytest

import tiny
from coterie.errors import CoterieError
from coterie.model.family import registry
from coterie.model.layer import Model
from coterie.verbs.apply import apply
from coterie.verbs.prune import prune
from coterie.verbs.verify import verify
from handmade import block, qwen, read_all

HUNYUAN = registry()["hunyuan_v1_moe"]


def unequal(folder, counts=(4, 8, 4), top_k=(1, 2, 1)):
    """Hunyuan's names; every layer has its own number of experts."""
    draw = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": np.ones((5, 4), np.float32)}
    for layer, num_experts in enumerate(counts):
        tensors |= block(f"model.layers.{layer}.", draw.normal(size=(num_experts, 4)), draw)
    tensors = {name.replace("mlp.gate.weight", "mlp.gate.wg.weight"): values for name, values in tensors.items()}
    config = {"model_type": "hunyuan_v1_moe", "num_hidden_layers": len(counts), "hidden_size": 4, "vocab_size": 5}
    return tiny.write(folder, tensors, config | {"num_experts": list(counts), "moe_topk": list(top_k)})


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_equal_entries_count_as_one_number():
    """For every family, and whatever layer is asked for."""
    for family in (HUNYUAN, registry()["qwen3_moe"]):
        config = {"num_experts": [16] * 3, "num_experts_per_tok": [4] * 3, "num_hidden_layers": 3}
        assert family.num_experts(config) == family.num_experts(config, 2) == 16
        assert family.num_experts_per_token(config) == family.num_experts_per_token(config, 0) == 4


def test_unequal_entries_are_read_layer_by_layer_where_the_family_says_so():
    """Without a layer, the largest: as many as any layer needs."""
    config = {"num_experts": [4, 8, 0], "moe_topk": [1, 2, 1], "num_hidden_layers": 3}
    assert [HUNYUAN.num_experts(config, i) for i in (0, 1)] == [4, 8]
    assert (HUNYUAN.num_experts(config), HUNYUAN.num_experts_per_token(config)) == (8, 2)
    with pytest.raises(CoterieError, match=r"one positive integer for each layer, found .*\[4, 8, 0\]"):
        HUNYUAN.num_experts(config, 2)
    with pytest.raises(CoterieError, match="expected one positive integer for each layer"):
        HUNYUAN.num_experts(config, 3)
    with pytest.raises(CoterieError, match="expected one positive integer, found"):
        registry()["qwen3_moe"].num_experts(config)


@pytest.mark.parametrize("value", [[], [4, "4"], [True, True], [[4], [4]], [2.0, 2.0], [0, 0], [-1, -1], {"0": 4}])
def test_lists_of_anything_else_are_refused(value):
    """Fail closed."""
    with pytest.raises(CoterieError, match="expected one positive integer"):
        HUNYUAN.num_experts({"num_experts": value}, 0)


def test_a_list_is_written_back_as_a_list(tmp_path):
    """The config says it in the words that it had."""
    source = qwen(tmp_path / "source", num_experts=[8, 8], num_experts_per_tok=[2, 2])
    prune(source, tmp_path / "out", ratio=0.25)
    assert config_of(tmp_path / "out")["num_experts"] == [6, 6]
    assert config_of(tmp_path / "out")["num_experts_per_tok"] == [2, 2]


def test_a_model_with_a_list_of_top_k_loads_and_computes_as_the_original_does(tmp_path):
    """As Hunyuan-A13B was released."""
    source = tmp_path / "source"
    tiny.save("hunyuan_v1_moe", source)
    said = config_of(source)
    said |= {"moe_topk": [said["moe_topk"]] * said["num_hidden_layers"]}
    (source / "config.json").write_text(json.dumps(said))
    prune(source, tmp_path / "out", ratio=0.25)
    assert verify(tmp_path / "out", against=source)["ok"]


def test_layers_that_differ_stay_apart(tmp_path):
    """Each keeps its own number of experts, and the config's list says so, in its own layout."""
    source = unequal(tmp_path / "source")
    assert [b.num_experts for b in Model.open(source).moe] == [4, 8, 4]
    plan = {"layers": {"0": {"kept": [1, 3]}, "1": {"kept": [0, 1, 2, 3, 4, 7]}}}
    apply(source, plan, tmp_path / "out")
    assert config_of(tmp_path / "out")["num_experts"] == [2, 6, 4]
    assert config_of(tmp_path / "out")["model_type"] == "hunyuan_v1_moe"
    found, old = read_all(tmp_path / "out"), read_all(source)
    name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    assert np.array_equal(found[name.format(1, 5)], old[name.format(1, 7)])
    assert [len(found[f"model.layers.{i}.mlp.gate.wg.weight"]) for i in range(3)] == [2, 6, 4]
    assert [b.num_experts for b in Model.open(tmp_path / "out").moe] == [2, 6, 4]


def test_every_layer_needs_as_many_experts_as_it_chooses(tmp_path):
    """Top-k is the layer's own."""
    source = unequal(tmp_path / "source", top_k=(1, 3, 1))
    apply(source, {"layers": {"0": {"kept": [1]}}}, tmp_path / "out")
    with pytest.raises(CoterieError, match="layer 1: keeps 2 experts, but 3 are chosen"):
        apply(source, {"layers": {"1": {"kept": [1, 2]}}}, tmp_path / "other")
