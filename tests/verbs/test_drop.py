"""`drop`, the baselines: which layers go, what is left of them, and that the rest computes the same."""

import json

import numpy as np
import pytest
import torch

import slow_condense
import tiny
from coterie.decide.drop import spare
from coterie.errors import CoterieError
from coterie.model.loading import is_ours, load
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.apply import apply
from coterie.verbs.drop import drop
from coterie.verbs.verify import verify

TEXTS = [np.random.default_rng(i).integers(3, tiny.VOCABULARY, n).tolist() for i, n in enumerate((20, 9, 14))]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"input_ids": t}) for t in TEXTS))
    return [f"texts={file}"]


def slow_similarities(whole, unit):
    """Layer -> mean over all tokens of the cosine before and after the block, or the whole layer."""
    found = {}
    for i in whole.blocks:
        before, after = [], []
        layer = whole.layers[i]
        module = layer if unit == "block" else layer.post_attention_layernorm
        handles = [
            module.register_forward_pre_hook(lambda m, args, before=before: before.append(args[0][0])),
            layer.register_forward_hook(lambda m, args, out, after=after: after.append(out[0])),
        ]
        whole.logits(TEXTS)
        for handle in handles:
            handle.remove()
        pairs = torch.nn.functional.cosine_similarity(torch.cat(before).double(), torch.cat(after).double(), dim=-1)
        found[i] = float(pairs.mean())
    return found


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_the_layers_that_change_least_go(tiny_checkpoint, tmp_path, data, unit):
    """Ranked by the cosine of what comes before and after, measured one text at a time in the whole model."""
    folder = tiny_checkpoint("qwen2_moe")
    report = drop(folder, tmp_path / "out", unit=unit, count=2, data=data).report
    expected = slow_similarities(slow_condense.Whole(folder), unit)
    assert report["similarity"] == pytest.approx({str(i): v for i, v in expected.items()}, rel=1e-5)
    assert report["layer_order"] == sorted(expected, key=lambda i: -expected[i])[:2]
    assert report["passes"] == {"experts": 0.0, "layers": 1.0}


@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_next", "deepseek_v3", "deepseek_v2", "olmoe"])
def test_similarities_are_the_same_bit_for_bit_outside_memory(
    tiny_checkpoint, tmp_path, data, monkeypatch, model_type, unit
):
    """With a budget of no bytes for activations."""
    folder = tiny_checkpoint(model_type)
    inside = drop(folder, tmp_path / "inside", unit=unit, data=data).report
    monkeypatch.setattr("coterie.forward.stream.IN_MEMORY", 0)
    outside = drop(folder, tmp_path / "outside", unit=unit, data=data).report
    assert outside["similarity"] == inside["similarity"] and outside["layer_order"] == inside["layer_order"]


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "deepseek_v3", "deepseek_v2", "olmoe"])
def test_a_dropped_block_gives_zero(tiny_checkpoint, tmp_path, data, model_type):
    """Its dense MLP is one neuron wide, or as wide as those there are; logits are those of the original without it."""
    folder, out = tiny_checkpoint(model_type), tmp_path / "out"
    report = drop(folder, out, count=1, data=data)
    [gone] = report.report["layer_order"]
    assert report.plan["layers"] == {str(gone): {"condensed": {"experts": [], "gates": [], "shared_gate": 0.0}}}
    whole = slow_condense.Whole(folder)
    whole.blocks[gone].forward = lambda x: torch.zeros_like(x)
    model = load(out, dtype="float32")
    for text, expected in zip(TEXTS, whole.logits(TEXTS), strict=True):
        with torch.no_grad():
            found = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
        assert float((found - expected).abs().max()) <= 3e-6 * float(expected.abs().max())
    width = 48 if model_type == "deepseek_v3" else 1
    up = next(t for n, t in Checkpoint.open(out).tensors.items() if n.endswith(f"layers.{gone}.mlp.up_proj.weight"))
    assert up.shape == (width, tiny.HIDDEN)
    assert verify(out, against=folder)["ok"]


@pytest.mark.parametrize(
    "model_type", ["qwen2_moe", "qwen3_next", "exaone_moe", "deepseek_v2", "gpt_oss", "granitemoe"]
)
@pytest.mark.parametrize("gone", [(1,), (0, 2)])
def test_dropped_layers_are_skipped(tiny_checkpoint, tmp_path, model_type, gone):
    """Those behind move up, lists in the config are cut, and nothing is written in our own layout."""
    folder, out = tiny_checkpoint(model_type), tmp_path / "out"
    apply(folder, {"layers": {}, "dropped": list(gone)}, out)
    result = verify(out, against=folder)
    assert result["ok"] and not is_ours(out), result
    assert "layers skipped" in result["checks"][-1]["detail"]
    config = tiny.read(out)[1]
    assert config["num_hidden_layers"] == 4 - len(gone)
    if "layer_types" in config:
        assert len(config["layer_types"]) == 4 - len(gone)
    if model_type == "deepseek_v2":
        assert config["first_k_dense_replace"] == int(0 not in gone)


def test_layers_with_experts_are_never_all_dropped():
    """Of 0 to 3, where 2 and 3 have experts: the last of the two is passed over."""
    assert spare([3, 2, 0, 1], 2, [2, 3]) == [3, 0]
    assert spare([3, 2, 0, 1], 3, [2, 3]) == [3, 0, 1]


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("qwen2_moe", {"unit": "head"}, "--unit 'head': unknown; expected one of layer, block"),
        ("qwen2_moe", {"count": 0}, "--count 0"),
        ("qwen2_moe", {"count": 5}, "--count 5: .* can do without 4 at most"),
        ("qwen2_moe", {"count": 4, "unit": "block"}, "can do without 3 at most"),
        ("jamba", {"unit": "block"}, "expert_layer_period is 2"),
        ("gpt_oss", {}, "its experts have biases"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tiny_checkpoint, tmp_path, model_type, options, message):
    """Without reading data, and with nothing written."""
    with pytest.raises(CoterieError, match=message):
        drop(tiny_checkpoint(model_type), tmp_path / "out", data=["x=hub:nobody/nothing"], **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model_type", ["beam", "minimax"])
def test_layers_that_know_their_number_cannot_move_up(tiny_checkpoint, tmp_path, data, model_type):
    """Their slopes or residuals would be those of another layer."""
    with pytest.raises(CoterieError, match="under a lower number"):
        drop(tiny_checkpoint(model_type), tmp_path / "out", unit="block", count=2, data=data)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"dropped": [4]}, "drops layer 4, but the model's 4 end at 3"),
        ({"dropped": [2, 1]}, "ascending layer numbers"),
        ({"dropped": [0, 1, 2, 3]}, "keep at least one"),
        ({"dropped": [1], "drop_mtp": True}, "exclude other changes"),
    ],
)
def test_plans_that_do_not_fit_are_refused(tiny_checkpoint, tmp_path, plan, message):
    """Whatever a hand-edited plan says."""
    with pytest.raises(CoterieError, match=message):
        apply(tiny_checkpoint("qwen2_moe"), {"layers": {}, **plan}, tmp_path / "out")


def test_a_dry_run_gives_the_size(tiny_checkpoint, tmp_path, data):
    """The same parameters as the real run, with nothing written."""
    folder = tiny_checkpoint("qwen2_moe")
    for unit in ("layer", "block"):
        planned = drop(folder, tmp_path / unit, unit=unit, count=2, data=data, dry_run=True)
        assert not (tmp_path / unit).exists()
        assert planned.report["after"] == drop(folder, tmp_path / unit, unit=unit, count=2, data=data).report["after"]
