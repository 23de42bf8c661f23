"""Unstructured pruning proved: streamed, expert by expert, it zeroes what a slow model in memory zeroes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slow_pruning
import tiny
from coterie.methods.sparsify import sparsegpt
from coterie.verbs.sparsify import sparsify

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
SPARSITY = "0.371"  # of 40 and 13 columns: 14.84 and 4.823
NUM_EXPERTS, NUM_LAYERS, MIN_TOKENS = 6, 3, 24
LENGTHS = (24, 7, 24, 13, 1, 24, 17, 30)


def save(model_type, folder, *, width=13, fused=False):
    """A tiny checkpoint of 3 layers and 6 experts, hidden 40, experts `width` wide."""
    sizes = {
        "hidden_size": 40,
        **dict.fromkeys(("moe_intermediate_size", "intermediate_size"), width),
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), NUM_EXPERTS),
        "num_hidden_layers": NUM_LAYERS,
        "sliding_window": 8,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SIZES", tiny.SIZES | sizes)
        return tiny.save(model_type, folder, fused=fused)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """`cases(model_type, **sizes)`: a checkpoint and the slow model of it, built once."""
    home, built = tmp_path_factory.mktemp("reference"), {}

    def get(model_type, width=13):
        if (model_type, width) not in built:
            name, _, fused = model_type.partition(" ")
            folder = save(name, home / f"{model_type}-{width}", width=width, fused=bool(fused))
            built[model_type, width] = folder, slow_pruning.SlowModel(folder, model_type, NUM_EXPERTS)
        return built[model_type, width]

    return get


@pytest.fixture(scope="module")
def samples():
    """Eight samples of 1 to 30 token ids."""
    draw = np.random.default_rng(2)
    return [draw.integers(3, tiny.VOCABULARY, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def data(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("data") / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in samples))
    return {"a": path}


def sparsified(folder, out, data, method, **options):
    """The report's numbers."""
    given = {} if method == "magnitude" else {"data": data, "min_tokens": MIN_TOKENS}
    share = {} if options.get("pattern") else {"sparsity": float(SPARSITY)}
    return sparsify(folder, out, method=method, **share, **given, **options).report


def check(case, model_type, out, samples, data, method, *, one_pass=False, pattern=None, tolerance=1e-4, **options):
    """Prunes fast and slowly: the same zeros, matrix by matrix; what stays keeps its bits (what sparsegpt corrects: to
    1e-4 of the matrix's largest weight); the same cold experts. Returns the report and the slow layer sparsities."""
    folder, slow = case
    spelled = f"{pattern[0]}:{pattern[1]}" if pattern else None
    report = sparsified(folder, out, data, method, one_pass=one_pass, pattern=spelled, **options)
    found = slow_pruning.read_experts(out, model_type, NUM_LAYERS, NUM_EXPERTS)
    expected, cold, shares = slow_pruning.prune(
        slow, samples, method, SPARSITY, found, one_pass=one_pass, pattern=pattern, min_tokens=MIN_TOKENS
    )
    for key, values in expected.items():
        is_cold = [str(key[0]), key[1]] in [entry[:2] for entry in cold]
        if method == "sparsegpt" and key[2] in slow_pruning.PARTS and not is_cold:
            assert np.array_equal(found[key] == 0, values == 0), key
            assert np.abs(found[key] - values).max() <= tolerance * np.abs(values).max(), key
        else:
            assert np.array_equal(found[key], values), key
    assert report["cold_experts"] == cold
    matrices = [values for key, values in found.items() if key[2] in slow_pruning.PARTS]
    assert report["expert_zeros"] == sum(int((m == 0).sum()) for m in matrices)
    return report, shares


@pytest.mark.parametrize("model_type", [*FAMILIES, "mixtral fused"])
def test_the_slow_model_computes_what_stock_does(cases, samples, model_type):
    """Un-fused experts, read by hand-written names, give stock's logits: to 1e-5 of the largest."""
    folder, slow = cases(model_type)
    _, logits = slow.run(slow.dense, samples)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        for ids, found in zip(samples, logits, strict=True):
            expected = stock(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_sparsegpt_by_hand():
    """Tokens (1, 0) and (1, 1): H = [[2, 1], [1, 1]], damped by .015. The loss of .1 in the first column puts .1/1.015
    on the second, where a loss costs nothing more."""
    weight, x, nothing = np.array([[0.1, 1], [1, 0.1]]), np.array([[1.0, 0], [1, 1]]), np.ones((2, 2))
    expected = [[0, 1 + 0.1 / 1.015], [1, 0]]
    np.testing.assert_allclose(slow_pruning.sparsegpt(weight, x, 2, None, nothing), expected, rtol=1e-12)
    np.testing.assert_allclose(sparsegpt.prune(weight, x.T @ x, 2), expected, rtol=1e-12)


@pytest.mark.parametrize("one_pass", [False, True], ids=["sequential", "one-pass"])
@pytest.mark.parametrize("method", ["wanda", "owl", "moe-pruner", "sparsegpt"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_zeros_are_the_slow_models(cases, tmp_path, samples, data, model_type, method, one_pass):
    """Every mask, with some experts cold; where two scores differ by less than 1e-5 of their size, either may go."""
    case = cases(model_type)
    report, shares = check(case, model_type, tmp_path / "out", samples, data, method, one_pass=one_pass)
    assert 0 < len(report["cold_experts"]) < len(shares) * NUM_EXPERTS / 2
    assert report["layer_sparsity"] == pytest.approx({str(k): float(v) for k, v in shares.items()}, abs=1e-12)


@pytest.mark.parametrize("model_type", [*FAMILIES, "mixtral fused"])
def test_magnitudes_zeros_are_the_slow_models(cases, tmp_path, samples, data, model_type):
    """Without data, no expert is cold."""
    report, _ = check(cases(model_type), model_type, tmp_path / "out", samples, data, "magnitude")
    assert report["cold_experts"] == []


@pytest.mark.parametrize("one_pass", [False, True], ids=["sequential", "one-pass"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_patterns_are_the_slow_models(cases, tmp_path, samples, data, model_type, one_pass):
    """2:4 in experts 20 wide."""
    case = cases(model_type, width=20)
    check(case, model_type, tmp_path / "out", samples, data, "wanda", one_pass=one_pass, pattern=(2, 4))
    found = slow_pruning.read_experts(tmp_path / "out", model_type, NUM_LAYERS, NUM_EXPERTS)
    for key, values in found.items():
        if key[2] in slow_pruning.PARTS:
            assert ((values.reshape(-1, 4) == 0).sum(1) == 2).all(), key


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_sparsegpts_patterns_are_the_slow_models(cases, tmp_path, samples, data, model_type):
    """2:4, each group chosen on the weights as corrected so far."""
    check(cases(model_type, width=20), model_type, tmp_path / "out", samples, data, "sparsegpt", pattern=(2, 4))


def test_sparsegpt_over_the_edge_of_a_block(cases, tmp_path, samples, data):
    """Down projections of 131 columns: two blocks, which share the zeros."""
    check(cases("mixtral", width=131), "mixtral", tmp_path / "out", samples, data, "sparsegpt")


@pytest.mark.parametrize("method", ["wanda", "moe-pruner", "sparsegpt"])
def test_an_experts_tokens_may_come_in_pieces(cases, tmp_path, samples, data, monkeypatch, method):
    """Seven at a time, with a smaller piece at the end."""
    monkeypatch.setattr("coterie.model.moe.MOST_TOKENS", 7)
    check(cases("qwen2_moe"), "qwen2_moe", tmp_path / "out", samples, data, method)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_fused_experts_get_the_zeros_of_numbered_ones(cases, tmp_path, samples, data, method):
    """Gate above up in one tensor of all experts."""
    check(cases("mixtral fused"), "mixtral fused", tmp_path / "out", samples, data, method)


def rewritten(folder, source, change):
    """A copy of a checkpoint, its tensors changed."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    changed = {name: change(t) for name, t in load_file(source / "model.safetensors").items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_of_equal_magnitudes_the_lower_column_goes(cases, tmp_path, samples, data, model_type):
    """Weights in steps of 1/32, of which every row holds many alike."""
    folder = rewritten(tmp_path / "m", cases(model_type)[0], lambda t: t.sign() * ((32 * t).abs().floor() + 1) / 32)
    case = folder, slow_pruning.SlowModel(folder, model_type, NUM_EXPERTS)
    check(case, model_type, tmp_path / "out", samples, data, "magnitude")
    matrix = slow_pruning.read_experts(folder, model_type, NUM_LAYERS, NUM_EXPERTS)[1, 0, "gate"]
    assert len(np.unique(np.abs(matrix))) < 20


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_computed_wider_than_stored(cases, tmp_path, samples, data, method):
    """Experts stored in bfloat16, computed in float32."""
    folder = rewritten(tmp_path / "m", cases("mixtral")[0], lambda t: t.bfloat16())
    case = folder, slow_pruning.SlowModel(folder, "mixtral", NUM_EXPERTS)
    check(case, "mixtral", tmp_path / "out", samples, data, method, dtype="float32", tolerance=2**-7)
