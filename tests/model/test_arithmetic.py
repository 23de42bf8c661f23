"""What `--dtype auto` computes in."""

import json
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import coterie
import tiny
from coterie.errors import CoterieError
from coterie.forward.samples import begun_in, compute_dtype
from coterie.model import arithmetic
from coterie.model.layer import Model
from coterie.model.loading import load
from coterie.model.stats import Stats


@pytest.fixture(params=["slow", "fast"])
def processor(request, monkeypatch):
    """One without arithmetic for bfloat16, and one with."""
    monkeypatch.setattr(arithmetic, "_computes", lambda name: request.param == "fast")
    return request.param


@pytest.fixture
def halves(tiny_checkpoint, tmp_path):
    """A checkpoint in bfloat16."""
    folder = tmp_path / "bf16"
    shutil.copytree(tiny_checkpoint("qwen2_moe"), folder)
    tensors, config = tiny.read(folder)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    stored = {name: torch.from_numpy(values).to(torch.bfloat16) for name, values in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    return folder


def test_auto_is_float32_only_where_halves_are_slow(processor, halves):
    expected = torch.float32 if processor == "slow" else torch.bfloat16
    assert compute_dtype(Model.open(halves)) == expected
    assert load(halves).dtype == expected
    assert compute_dtype(Model.open(halves), "bfloat16") == load(halves, dtype="bfloat16").dtype == torch.bfloat16


def test_float32_is_never_left(processor, tiny_checkpoint):
    folder = tiny_checkpoint("qwen2_moe")
    assert compute_dtype(Model.open(folder)) == load(folder).dtype == torch.float32


def test_where_memory_is_short_the_stored_type_stays_and_this_is_said(halves, monkeypatch, caplog):
    monkeypatch.setattr(arithmetic, "_computes", lambda name: False)
    monkeypatch.setattr("coterie.model.loading.available_memory", lambda: 1000)
    assert load(halves).dtype == torch.bfloat16
    assert "computed in bfloat16, which is slow here" in caplog.text


@pytest.mark.parametrize(("instructions", "times", "expected"), [
    (False, 0.1, "float32"), (True, 0.3, "bfloat16"), (True, 1.3, "bfloat16"), (True, 5.4, "float32"),
])  # fmt: skip
def test_instructions_decide_and_a_measurement_confirms(monkeypatch, instructions, times, expected):
    monkeypatch.setattr(arithmetic, "has_instructions", lambda name: instructions)
    monkeypatch.setattr(arithmetic, "slowdown", lambda dtype: times)
    arithmetic._computes.cache_clear()
    try:
        assert arithmetic.fast("bfloat16") == expected
        assert arithmetic.fast("float32") == "float32"
    finally:
        arithmetic._computes.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="limits what oneDNN uses of an x86 processor")
def test_a_processor_of_avx2_computes_in_float32():
    """Emulated by the library's own limit."""
    program = "from coterie.model.arithmetic import fast; print(fast('bfloat16'))"
    limited = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], env=limited, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "float32"


def collected(halves, out, **options):
    texts = {"prose": out.parent / "ids.jsonl"}
    texts["prose"].write_text("\n".join(json.dumps({"input_ids": [1, 5, 9, 3 + i, 7, 2]}) for i in range(4)))
    return coterie.collect(halves, out, data=texts, samples=4, seq_len=6, **options)


def test_a_resumed_run_goes_on_in_the_type_it_began_in(halves, tmp_path, monkeypatch):
    """Whatever the processor that resumes it is fast at."""
    monkeypatch.setattr(arithmetic, "_computes", lambda name: False)
    whole = collected(halves, tmp_path / "whole")
    assert whole["options"]["dtype"] == "float32"

    def stop(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(halves, tmp_path / "stats", on_progress=stop)
    assert begun_in(tmp_path / "stats") == "float32"
    monkeypatch.setattr(arithmetic, "_computes", lambda name: True)
    assert collected(halves, tmp_path / "stats", resume=True)["options"]["dtype"] == "float32"
    one, other = (Stats.load(tmp_path / name) for name in ("whole", "stats"))
    assert one.sums.keys() == other.sums.keys()
    assert all(np.array_equal(values, other.sums[key]) for key, values in one.sums.items())


def test_a_run_that_is_resumed_in_another_type_is_refused(halves, tmp_path):
    def stop(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(halves, tmp_path / "stats", on_progress=stop, dtype="float32")
    with pytest.raises(CoterieError, match="another source, plan or option"):
        collected(halves, tmp_path / "stats", resume=True, dtype="bfloat16")


def test_packed_weights_follow_like_plain_ones(tiny_checkpoint, tmp_path, monkeypatch):
    """What stays packed in memory is multiplied in float32 where the stored type is slow; the packed bytes stay."""
    source = tiny_checkpoint("qwen3_moe")
    coterie.sparsify(source, tmp_path / "zeros", method="magnitude", sparsity=0.5)
    coterie.pack(tmp_path / "zeros", tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    for computed in ("float32", "bfloat16"):
        monkeypatch.setattr("coterie.model.loading.fast", lambda name, computed=computed: computed)
        assert next(coterie.load(tmp_path / "packed").parameters()).dtype == getattr(torch, computed)
