"""Models under another type: the same numbers, read by stock classes, or refused."""

import json

import numpy as np
import pytest
import torch

import slow_condense
import slow_deepseek
import tiny
from coterie.edits.kinds.convert import CONVERSIONS, converted
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.model.loading import load_stock
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.apply import apply
from coterie.verbs.condense import condense
from coterie.verbs.verify import verify

TEXTS = [np.random.default_rng(i).integers(3, 128, n).tolist() for i, n in enumerate((20, 9))]


def stock_logits(folder, dtype="float32"):
    model, faults = load_stock(folder, dtype, experts_implementation="eager")
    assert not faults, faults
    with torch.no_grad():
        return [model(input_ids=torch.tensor([t]), use_cache=False).logits[0] for t in TEXTS]


def assert_close(found, expected):
    top = max(float(e.abs().max()) for e in expected)
    assert max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) <= 3e-6 * top


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"input_ids": t}) for t in TEXTS * 2))
    return [f"texts={file}"]


@pytest.fixture
def mixtral(tiny_checkpoint, tmp_path):
    """Without the sliding window that the tiny one has."""
    tensors, config = tiny.read(tiny_checkpoint("mixtral"))
    return tiny.write(tmp_path / "mixtral", tensors, config | {"sliding_window": None})


# --- DeepSeekMoE-16B v1 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"norm_topk_prob": True}, {"n_shared_experts": None}, {"first_k_dense_replace": 2}]
)
def test_deepseek_v1_is_a_stock_qwen2_moe(tmp_path, changes):
    """`condense --layers 0` repackages it: stock classes compute what our plain float32 forward does."""
    folder, out = slow_deepseek.save(tmp_path / "v1", **changes), tmp_path / "out"
    report = condense(folder, out, layers=0)
    assert report.report["converted"] == {"from": "deepseek", "to": "qwen2_moe"}
    assert_close(stock_logits(out), [slow_deepseek.logits(folder, t) for t in TEXTS])
    assert verify(out, against=folder)["ok"]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen2_moe" and "auto_map" not in config


@pytest.mark.parametrize("select", ["official", "least-squares"])
@pytest.mark.parametrize("keep", [0, 2])
def test_deepseek_v1_condensed(tmp_path, data, select, keep):
    """Any layers, any choice: the plan's gates are in terms of the original's own, undoubled shared experts."""
    folder, out = slow_deepseek.save(tmp_path / "v1"), tmp_path / "out"
    report = condense(folder, out, layers=2, keep=keep, select=select, data=data)
    plan = {int(k): tuple(v["condensed"].values()) for k, v in report.plan["layers"].items()}
    if select == "official":
        assert all(shared == pytest.approx(1.0) for _, _, shared in plan.values())
    assert_close(stock_logits(out), [slow_deepseek.logits(folder, t, plan) for t in TEXTS])
    assert verify(out, against=folder)["ok"]


def test_deepseek_v1_selection_equals_that_of_its_repackaged_form(tmp_path, data):
    """Against the slow published search on the qwen2_moe checkpoint written before."""
    folder = slow_deepseek.save(tmp_path / "v1")
    condense(folder, tmp_path / "qwen", layers=0)
    report = condense(folder, tmp_path / "out", layers=2, select="official", data=data)
    expected, order = slow_condense.official(tmp_path / "qwen", TEXTS * 2, 3, 2, searched=256)
    assert report.report["layer_order"] == order
    assert {int(k): v["condensed"]["experts"] for k, v in report.plan["layers"].items()} == {
        i: expected[i][0] for i in order
    }


def test_doubling_is_exact_in_bfloat16(tmp_path):
    """The stored shared down matrix is twice the original, bit for bit one exponent more."""
    from safetensors.torch import load_file, save_file

    folder = slow_deepseek.save(tmp_path / "v1")
    tensors = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    condense(folder, tmp_path / "out", layers=0)
    out = load_file(tmp_path / "out/model.safetensors")
    for layer in (1, 2, 3):
        doubled = out[f"model.layers.{layer}.mlp.shared_expert.down_proj.weight"]
        assert torch.equal(doubled, 2 * tensors[f"model.layers.{layer}.mlp.shared_experts.down_proj.weight"])
        assert not out[f"model.layers.{layer}.mlp.shared_expert_gate.weight"].any()
        assert not out[f"model.layers.{layer}.self_attn.k_proj.bias"].any()


def test_sizes_before_are_the_originals(tmp_path):
    """What the conversion adds counts as after, not as before."""
    folder = slow_deepseek.save(tmp_path / "v1")
    report = condense(folder, tmp_path / "out", layers=0, keep=1).report
    assert "--keep had no effect: --layers 0 condenses none, it repackages" in report["warnings"]
    assert report["before"]["parameters"] == Checkpoint.open(folder).num_parameters
    added = 3 * 32 + 4 * (32 + 16 + 16)  # gates of shared experts, biases of queries, keys and values
    assert report["after"]["parameters"] == report["before"]["parameters"] + added


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "biases on all projections"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "its rope_scaling is"),
        ({"scoring_func": "sigmoid"}, "its scoring_func is 'sigmoid'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantised"),
    ],
)
def test_deepseek_v1_variants_that_qwen2_moe_cannot_say(tmp_path, changes, message):
    """Refused, naming what differs."""
    folder = slow_deepseek.save(tmp_path / "v1", **changes)
    with pytest.raises(CoterieError, match=message):
        condense(folder, tmp_path / "out", layers=1)


# --- mixtral, deepseek_v3 -----------------------------------------------------------------------------------------


def test_mixtral_becomes_qwen2_moe(mixtral, tmp_path, data):
    """Converted so that stock configs can list its dense layers; the others compute the same."""
    out = tmp_path / "out"
    report = condense(mixtral, out, layers=2, data=data)
    assert report.report["converted"]["to"] == "qwen2_moe"
    plan = {int(k): tuple(v["condensed"].values()) for k, v in report.plan["layers"].items()}
    assert_close(stock_logits(out), slow_condense.Whole(mixtral).logits(TEXTS, plan))
    assert verify(out, against=mixtral)["ok"]


@pytest.mark.parametrize("fused", [False, True])
def test_mixtral_converted_alone_is_bit_exact(tiny_checkpoint, tmp_path, fused):
    """From either spelling on disk."""
    tensors, config = tiny.read(tiny_checkpoint("mixtral", fused))
    folder = tiny.write(tmp_path / "m", tensors, config | {"sliding_window": None})
    apply(folder, {"layers": {}, "converted": "qwen2_moe"}, tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(stock_logits(tmp_path / "out"), stock_logits(folder), strict=True))


def test_quantised_mixtral_stays_itself(tiny_checkpoint, tmp_path):
    """The names that its settings speak of would be others, and the biases that are added have no scales."""
    tensors, config = tiny.read(tiny_checkpoint("mixtral"))
    said = {"sliding_window": None, "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(CoterieError, match="its weights are quantised"):
        converted(Model.open(tiny.write(tmp_path / "m", tensors, config | said)), "qwen2_moe")


def test_mixtral_with_a_window_stays_itself(tiny_checkpoint, tmp_path):
    """qwen2_moe has no such window: condensed layers go into our own layout."""
    with pytest.raises(CoterieError, match="sliding window of 64"):
        converted(Model.open(tiny_checkpoint("mixtral")), "qwen2_moe")


def test_deepseek_v3_becomes_glm4_moe_lite(tiny_checkpoint, tmp_path):
    """Keys only: every tensor keeps its bytes, and groups of experts their meaning."""
    folder = tiny_checkpoint("deepseek_v3")
    apply(folder, {"layers": {}, "converted": "glm4_moe_lite"}, tmp_path / "out")
    assert tiny.read(folder)[0].keys() == tiny.read(tmp_path / "out")[0].keys()
    assert_close(stock_logits(tmp_path / "out"), stock_logits(folder))


def test_what_a_config_leaves_out_keeps_the_source_types_meaning(tiny_checkpoint, tmp_path):
    """deepseek_v3 assumes other values than glm4_moe_lite where its config is silent."""
    tensors, config = tiny.read(tiny_checkpoint("deepseek_v3"))
    for key in ("rms_norm_eps", "routed_scaling_factor", "rope_parameters", "topk_group"):
        config.pop(key, None)
    folder = tiny.write(tmp_path / "v3", tensors, config | {"topk_group": 2})
    apply(folder, {"layers": {}, "converted": "glm4_moe_lite"}, tmp_path / "out")
    assert_close(stock_logits(tmp_path / "out"), stock_logits(folder))


def test_unknown_conversions_are_refused(tiny_checkpoint, tmp_path):
    """Whatever a plan says."""
    with pytest.raises(CoterieError, match="cannot be repackaged as 'llama'"):
        apply(tiny_checkpoint("mixtral"), {"layers": {}, "converted": "llama"}, tmp_path / "out")
    assert set(CONVERSIONS) == {"mixtral", "deepseek", "deepseek_v3"}
