"""Unstructured pruning end to end on tiny models: exact sparsity, untouched rest, resume, refusals."""

import json

import numpy as np
import pytest

from coterie.checkpoint import Checkpoint
from coterie.errors import CoterieError
from coterie.layer import Model
from coterie.sparsify import sparsify

METHODS = ("magnitude", "wanda", "owl", "moe-pruner", "sparsegpt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 samples of 64 token ids."""
    path = tmp_path_factory.mktemp("data") / "ids.jsonl"
    ids = np.random.default_rng(0).integers(3, 120, (24, 64)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return {"a": path}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_zeros_are_exact_and_nothing_else_changes(tiny_checkpoint, tmp_path, data, method, model_type):
    """round(S x weights) expert weights are zero on disk; every other tensor keeps its bytes."""
    source, out = tiny_checkpoint(model_type), tmp_path / "out"
    report = sparsify(source, out, method=method, sparsity=0.37, data={} if method == "magnitude" else data).report
    before, after = Model.open(source), Checkpoint.open(out)
    zeros = total = 0
    for name, role in before.roles.items():
        values = after.read(name)
        if role == "expert" and not name.endswith("bias"):
            zeros, total = zeros + int((values == 0).sum()), total + values.size
        else:
            assert after.raw(name) == before.checkpoint.raw(name), name
    assert zeros == round(0.37 * total) == report["expert_zeros"]


def test_a_killed_run_resumes_to_the_same_bytes(tiny_checkpoint, tmp_path, data):
    """Interrupted after any layer and resumed, the weights are those of an undisturbed run."""
    source = tiny_checkpoint("qwen3_moe")
    sparsify(source, tmp_path / "whole", method="owl", sparsity=0.5, data=data)
    for layer in (1, 2, 3):
        out = tmp_path / f"out{layer}"

        def stop(stage, done, total, layer=layer):
            if (stage, done) == ("pruning layers", layer):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sparsify(source, out, method="owl", sparsity=0.5, data=data, on_progress=stop)
        sparsify(source, out, method="owl", sparsity=0.5, data=data, resume=True)
        for name in ("model.safetensors", "config.json"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "astrology"}, "expected one of"),
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"method": "magnitude", "one_pass": True}, "ignored"),
        ({"method": "owl", "pattern": "2:4"}, "wanda"),
        ({"pattern": "4:2"}, "n:m"),
        ({"dtype": "int3"}, "expected one of"),
    ],
)
def test_bad_options_are_refused(tiny_checkpoint, tmp_path, data, options, says):
    """Values out of range, and options that contradict or would be ignored."""
    given = {} if options.get("method") == "magnitude" else {"data": data}
    with pytest.raises(CoterieError, match=says):
        sparsify(tiny_checkpoint("qwen3_moe"), tmp_path / "out", **options, **given)
    assert not (tmp_path / "out").exists()


def test_attention_experts_keep_their_weights(tiny_checkpoint, tmp_path):
    """Only the layers' own experts are zeroed: attention experts (jetmoe) are written as they were."""
    source, out = tiny_checkpoint("jetmoe"), tmp_path / "out"
    sparsify(source, out, method="magnitude", sparsity=0.5)
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    attention = [name for name in before.tensors if "self_attention" in name]
    assert attention and all(after.raw(name) == before.raw(name) for name in attention)
