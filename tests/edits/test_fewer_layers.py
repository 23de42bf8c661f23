"""Fewer decoder layers in the words of each config: lists, patterns, numbers from 0 or 1; the unknown is refused."""

import json

import pytest

import tiny
from coterie.edits.kinds.drop import patch
from coterie.edits.plan import Plan
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.verbs.apply import apply
from coterie.verbs.drop import drop
from coterie.verbs.verify import verify
from handmade import qwen


def respelled(source, folder, *gone, **changes):
    """A copy of a checkpoint whose config says things in other words: `gone` keys go, `changes` come."""
    tensors, config = tiny.read(source)
    left = {key: value for key, value in config.items() if key not in gone}
    return tiny.write(folder, tensors, left | changes)


def after(folder, dropped, tmp_path):
    """The config of a checkpoint without some layers, which loads and computes as the original without them."""
    apply(folder, {"layers": {}, "dropped": dropped}, tmp_path / "out")
    result = verify(tmp_path / "out", against=folder)
    assert result["ok"], result
    assert "layers skipped" in result["checks"][-1]["detail"]
    return json.loads((tmp_path / "out" / "config.json").read_text())


def patched(tmp_path, dropped, **config):
    """What a config says of four layers of which some go."""
    model = Model.open(qwen(tmp_path / "model", layers=4, **config))
    found = json.loads(json.dumps(model.checkpoint.config))
    patch(found, model, Plan({}, dropped=dropped))
    return found


def test_a_pattern_loses_the_letters_of_layers_that_go(tiny_checkpoint, tmp_path):
    """Nemotron-H as published: one letter for each layer, M mamba, E experts, * attention."""
    words = {"hybrid_override_pattern": "ME*E", "num_hidden_layers": 4}
    source = respelled(tiny_checkpoint("nemotron_h"), tmp_path / "source", "layers_block_type", **words)
    config = after(source, [0, 1], tmp_path)
    assert (config["hybrid_override_pattern"], config["num_hidden_layers"]) == ("*E", 2)


def test_a_list_of_kinds_may_stand_in_the_place_of_the_count(tiny_checkpoint, tmp_path):
    """Nemotron-H as transformers writes it has no number of layers."""
    config = after(tiny_checkpoint("nemotron_h"), [0, 3], tmp_path)
    assert config["layers_block_type"] == ["moe", "full_attention"] and "num_hidden_layers" not in config


def test_nested_numbers_from_one(tiny_checkpoint, tmp_path):
    """Kimi Linear as published: which layers are of which attention, and how many of the first are dense."""
    kinds = {"full_attn_layers": [], "kda_layers": [1, 2, 3, 4], "head_dim": 8, "num_heads": 4}
    said = {"linear_attn_config": kinds, "first_k_dense_replace": 1}
    source = respelled(tiny_checkpoint("kimi_linear"), tmp_path / "source", "layer_types", "mlp_layer_types", **said)
    config = after(source, [0, 3], tmp_path)
    assert config["linear_attn_config"] == kinds | {"kda_layers": [1, 2]}
    assert (config["first_k_dense_replace"], config["num_hidden_layers"]) == (0, 2)


def test_numbers_of_layers_from_zero(tiny_checkpoint, tmp_path):
    """Llama 4's layers with experts, and its list of layers without rotary positions."""
    config = after(tiny_checkpoint("llama4_text"), [1], tmp_path)
    assert (config["moe_layers"], config["no_rope_layers"]) == ([0, 1, 2], [1, 1, 0])


def test_settings_under_a_layers_number(tiny_checkpoint, tmp_path):
    """Gemma 4's `per_layer_config`."""
    before = json.loads((tiny_checkpoint("gemma4_text") / "config.json").read_text())["per_layer_config"]
    found = after(tiny_checkpoint("gemma4_text"), [1], tmp_path)["per_layer_config"]
    assert found == {str(int(key) - (int(key) > 1)): value for key, value in before.items() if key != "1"}


@pytest.mark.parametrize(
    ("key", "before", "expected"),
    [
        ("moe_layer_freq", [0, 1, 1, 1], [0, 1]),
        ("moe_layer_freq", 1, 1),
        ("hybrid_layer_pattern", [0, 1, 1, 0], [0, 0]),
        ("attn_type_list", [0, 1, 2, 3], [0, 3]),
        ("compress_ratios", [0, 4, 128, 4, 7], [0, 4, 7]),  # the last of a prediction layer
        ("moe_topk", [1, 1, 1, 1], [1, 1]),
        ("num_experts", [8] * 4, [8] * 2),
        ("mlp_only_layers", [], []),
        ("moe_layers_enum", "1,2,3", "1"),
        ("full_attn_idxs", [0, 2, 3, 4], [0, 1, 2]),
        ("linear_attn_config", {"full_attn_layers": [1, 3], "n": 4}, {"full_attn_layers": [1], "n": 4}),
        ("linear_attn_config", {"kda_layers": [2, 4, 5]}, {"kda_layers": [2, 3]}),
        ("num_dense_layers", 2, 1),
        ("num_hash_layers", 4, 2),
        ("moe_layer_start_index", 3, 1),
        ("moe_layer_end_index", 3, 1),
        ("moe_layer_end_index", 1, 0),
        ("moe_layer_end_index", -1, -1),
        ("eos_token_id", [1, 2, 3, 4], [1, 2, 3, 4]),
        ("rope_scaling", {"factors": [1, 2, 3]}, {"factors": [1, 2, 3]}),
        ("mtp_layers_block_type", ["a", "b", "c", "d"], ["a", "b", "c", "d"]),
        ("layer_types", None, None),
    ],
)
def test_every_way_to_speak_of_layers(tmp_path, key, before, expected):
    """Layers 1 and 2 of four go."""
    found = patched(tmp_path, (1, 2), **{key: before})
    assert found[key] == expected and found["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"window_sizes": [1, 2, 3, 4]}, r"window_sizes has 4 entries, as many as there are layers"),
        ({"deep": {"windows": [1, 2, 3, 4]}}, r"deep\.windows has 4 entries"),
        ({"other_pattern": "LLLG"}, r"other_pattern has 4 entries"),
        ({"layer_types": ["a", "b"]}, r"layer_types has 2 entries, for 4 layers"),
        ({"hybrid_override_pattern": "ME"}, r"hybrid_override_pattern has 2 entries, for 4 layers"),
        ({"mlp_only_layers": [-1]}, r"mlp_only_layers is \[-1\]; expected layer numbers from 0 on"),
        ({"moe_layers_enum": "1" * 5000}, r"moe_layers_enum is .*; expected layer numbers"),
        ({"per_layer_config": {"1" * 5000: {}}}, r"per_layer_config has a key .*; expected layer numbers"),
        ({"per_layer_config": {"all": {}}}, r"per_layer_config has a key 'all'; expected layer numbers"),
        ({"moe_layers_enum": "1-3"}, r"moe_layers_enum is '1-3'; expected layer numbers"),
        ({"linear_attn_config": {"kda_layers": [0, 1]}}, r"linear_attn_config\.kda_layers is .*numbers from 1 on"),
    ],
)
def test_what_may_speak_of_layers_in_an_unknown_way_is_refused(tmp_path, config, message):
    """Nothing is cut by a guess from its name, and nothing written."""
    source = qwen(tmp_path / "source", layers=4, **config)
    with pytest.raises(CoterieError, match=f"config.json: {message}"):
        apply(source, {"layers": {}, "dropped": [1]}, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("model_type", ["beam", "minimax"])
def test_layers_that_know_their_number_are_refused_by_apply_and_before_any_data(tiny_checkpoint, tmp_path, model_type):
    """As they are by `drop`, which compares what transformers would build before it reads what it calibrates on."""
    source = tiny_checkpoint(model_type)
    with pytest.raises(CoterieError, match="would become another one under a lower number"):
        apply(source, {"layers": {}, "dropped": [1]}, tmp_path / "out")
    with pytest.raises(CoterieError, match="would become another one under a lower number"):
        drop(source, tmp_path / "out", unit="block", data=["x=hub:nobody/nothing"])
    assert not list(tmp_path.iterdir())


def test_layers_go_from_a_model_in_our_own_layout(tiny_checkpoint, tmp_path):
    """Its kinds are those of the stock model that it is made of."""
    kept = {str(i): {"kept": list(range(4 + i))} for i in range(4)}
    plan = {"layers": kept, "budget": {"layout": "coterie"}}
    apply(tiny_checkpoint("qwen2_moe"), plan, tmp_path / "unequal")
    apply(tmp_path / "unequal", {"layers": {}, "dropped": [1]}, tmp_path / "out")
    assert [block.num_experts for block in Model.open(tmp_path / "out").moe] == [4, 6, 7]
    assert verify(tmp_path / "out", against=tmp_path / "unequal")["ok"]
