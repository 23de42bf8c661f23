"""STUN end to end on tiny models: the exact total, both presets, the search of the split, refusals."""

from fractions import Fraction

import numpy as np
import pytest

import tiny
from coterie.edits.counts import count
from coterie.edits.kurtosis import Moments
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.apply import apply
from coterie.verbs.stun import stun


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 samples of 64 token ids."""
    return tiny.id_lines(tmp_path_factory.mktemp("data") / "ids.jsonl", 24)


def expert_weights(path):
    model = Model.open(path)
    return count(list(model.checkpoint.tensors.values()), model.roles)["experts"]


def expert_zeros(path):
    model = Model.open(path)
    return sum(int((model.checkpoint.read(n) == 0).sum()) for n, r in model.roles.items() if r == "expert")


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "dbrx", "llama4", "llama4_text"]
)
@pytest.mark.parametrize("sparsity", [0.4, 0.613])
def test_removed_and_zero_weights_are_exactly_the_share_asked_for(
    tiny_checkpoint, tmp_path, data, model_type, sparsity
):
    """removed + zero = round(S x all expert weights), read back from the disk and as reported."""
    source, out = tiny_checkpoint(model_type), tmp_path / "out"
    report = stun(source, out, sparsity=sparsity, data=data, min_tokens=8).report
    before, after = expert_weights(source), expert_weights(out)
    already = expert_zeros(source) if model_type == "gpt_oss" else 0  # its biases begin as zeros
    assert before - after + expert_zeros(out) - already * after // before == pytest.approx(sparsity * before, abs=1)
    assert report["sparsity"]["experts"] == pytest.approx(sparsity, abs=1 / before)


def test_the_default_removes_half_of_the_total_with_experts(tiny_checkpoint, tmp_path, data):
    """8 experts at 50 %: floor(0.25 x 8) = 2 experts go, and (0.5 - 0.25) / (1 - 0.25) of the rest becomes zero."""
    plan = stun(tiny_checkpoint("qwen3_moe"), tmp_path / "out", sparsity=0.5, second="wanda", data=data).plan
    num_experts = Model.open(tiny_checkpoint("qwen3_moe")).moe[0].num_experts
    kept = num_experts - num_experts // 4
    assert {len(layer["kept"]) for layer in plan["layers"].values()} == {kept}
    share = (0.5 - (1 - kept / num_experts)) / (kept / num_experts)
    assert plan["budget"]["zeros"] == pytest.approx(share)
    assert [layer["sparsity"]["expert"] for layer in plan["layers"].values()] == pytest.approx(
        [share] * len(plan["layers"]), abs=1e-3
    )


def test_the_published_preset_prunes_every_linear_map(tiny_checkpoint, tmp_path, data):
    """Attention, shared experts and routers get floor(S x inputs) zeros in each row too; norms and embeddings none."""
    source, out = tiny_checkpoint("qwen2_moe"), tmp_path / "out"
    report = stun(source, out, sparsity=0.5, second="wanda", preset="paper", data=data)
    share = Fraction(report.plan["budget"]["zeros"]).limit_denominator(10**9)
    model = Model.open(out)
    for name, tensor in model.checkpoint.tensors.items():
        values = model.checkpoint.read(name)
        linear = ".layers." in name and len(tensor.shape) == 2 and "norm" not in name
        expected = int(share * tensor.shape[-1]) if linear else 0
        if linear:
            assert ((values == 0).sum(axis=-1) == expected).all(), name
        elif not name.endswith("bias"):
            assert (values != 0).all(), name
    assert {"expert", "attention", "shared", "router"} <= set(report.plan["layers"]["0"]["sparsity"])


def test_unpruned_tensors_keep_their_bytes(tiny_checkpoint, tmp_path, data):
    """Under the recommended preset only expert matrices and routers (which lose rows) differ."""
    source, out = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    stun(source, out, sparsity=0.5, data=data, min_tokens=8)
    before, after = Model.open(source), Checkpoint.open(out)
    for name, role in before.roles.items():
        if role in ("other", "shared"):
            assert before.checkpoint.raw(name) == after.raw(name), name


def test_the_best_split_on_held_out_samples_is_kept(tiny_checkpoint, tmp_path, data):
    """`auto` reports a curve of splits at one total, and writes the one with the least loss."""
    report = stun(
        tiny_checkpoint("qwen3_moe"), tmp_path / "out", sparsity=0.5, expert_ratio="auto", data=data, min_tokens=8
    )
    splits = report.plan["budget"]["splits"]
    assert len(splits) > 2 and splits[0]["removed"] == 0
    best = min(splits, key=lambda s: s["loss"])["experts"]
    assert {len(layer.get("kept", [])) or 8 for layer in report.plan["layers"].values()} == {best}
    assert report.report["sparsity"]["experts"] == pytest.approx(0.5, abs=1e-4)


def test_a_killed_run_resumes_to_the_same_bytes(tiny_checkpoint, tmp_path, data):
    """Interrupted after the first layer and resumed, weights and record are those of an undisturbed run."""
    source = tiny_checkpoint("qwen2_moe")
    whole = stun(source, tmp_path / "whole", sparsity=0.5, preset="paper", data=data)

    def stop(stage, done, total):
        if (stage, done) == ("pruning layers", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stun(source, tmp_path / "out", sparsity=0.5, preset="paper", data=data, on_progress=stop)
    again = stun(source, tmp_path / "out", sparsity=0.5, preset="paper", data=data, resume=True)
    for path in (tmp_path / "whole").iterdir():
        if path.name not in ("coterie.json", "coterie.log", "README.md"):
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert again.plan == whole.plan
    assert {k: again.report[k] for k in ("kurtosis", "sparsity")} == {
        k: whole.report[k] for k in ("kurtosis", "sparsity")
    }
    finished = stun(source, tmp_path / "out", sparsity=0.5, preset="paper", data=data, resume=True)
    assert finished.plan == whole.plan


def test_a_run_is_not_resumed_on_other_data(tiny_checkpoint, tmp_path, data):
    """The same file name with other tokens in it is noticed."""
    mine = tmp_path / "mine.jsonl"
    mine.write_text(data["a"].read_text())

    def stop(stage, done, total):
        if (stage, done) == ("pruning layers", 1):
            raise KeyboardInterrupt

    source, options = tiny_checkpoint("qwen3_moe"), {"second": "wanda", "data": {"a": mine}}
    with pytest.raises(KeyboardInterrupt):
        stun(source, tmp_path / "out", on_progress=stop, **options)
    mine.write_text("".join(reversed(mine.read_text().splitlines(keepends=True))))
    with pytest.raises(CoterieError, match="other data"):
        stun(source, tmp_path / "out", resume=True, **options)


def test_kurtosis_is_that_of_all_weights_together(tiny_checkpoint, tmp_path, data):
    """Before, between and after agree with the fourth moment of the concatenated weights on disk, without zeros."""
    source, out = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    report = stun(source, out, sparsity=0.5, second="magnitude").report

    def kurtosis(path):
        model = Model.open(path)
        weights = np.concatenate(
            [model.checkpoint.read(n).astype(np.float64).ravel() for n, r in model.roles.items() if r == "expert"]
        )
        weights = weights[weights != 0]
        return float((((weights - weights.mean()) / weights.std()) ** 4).mean())

    assert report["kurtosis"]["before"] == pytest.approx(kurtosis(source), rel=1e-4)
    assert report["kurtosis"]["after"] == pytest.approx(kurtosis(out), rel=1e-4)
    assert report["kurtosis"]["between"] != report["kurtosis"]["before"]


def test_moments_of_parts_add_up():
    """K of 1, 2, 3, 10 given in two pieces is that of the four: 2.2304 by hand."""
    one, two = Moments(), Moments()
    one.add(np.array([1, 2], np.float32))
    two.add(np.array([[3], [10]], np.float32))
    assert (one + two).kurtosis == pytest.approx(2.2304, abs=1e-4)
    assert Moments().kurtosis is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": 0.2, "expert_ratio": 0.5}, "remove fewer experts"),
        ({"expert_ratio": "some"}, "or auto"),
        ({"preset": "best"}, "recommended, paper"),
        ({"preset": "paper", "also": "router"}, "ignored"),
        ({"expert_ratio": "auto", "also": "router"}, "drop --also"),
        ({"second": "astrology"}, "expected one of"),
        ({"second": "magnitude"}, "ignored"),
    ],
)
def test_bad_options_are_refused(tiny_checkpoint, tmp_path, data, options, says):
    """Values out of range and contradictions; nothing is written."""
    with pytest.raises(CoterieError, match=says):
        stun(tiny_checkpoint("qwen3_moe"), tmp_path / "out", data=data, **options)
    assert not list(tmp_path.iterdir())


def test_a_plan_with_zeros_is_not_half_applied(tiny_checkpoint, tmp_path, data):
    """`apply` cannot make zeros again, and says so instead of leaving them out."""
    source = tiny_checkpoint("qwen3_moe")
    stun(source, tmp_path / "out", sparsity=0.5, second="magnitude")
    with pytest.raises(CoterieError, match="delete the `sparsity` entries"):
        apply(source, tmp_path / "out", tmp_path / "again")


def test_a_dry_run_writes_nothing_and_says_what_would_be(tiny_checkpoint, tmp_path, data):
    """The plan and its exact shares, from headers and routers."""
    report = stun(tiny_checkpoint("qwen3_moe"), tmp_path / "out", sparsity=0.5, data=data, dry_run=True)
    assert report.report["dry_run"] and report.plan["budget"]["zeros"] > 0
    assert report.report["sparsity"]["experts"] == pytest.approx(0.5, abs=1e-4)
    assert not list(tmp_path.iterdir())
