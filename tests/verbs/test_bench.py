"""`coterie bench`: what it measures and how it counts; never how fast this machine is."""

import json

import numpy as np
import pytest
import torch

import coterie
import tiny
from coterie.cli import main
from coterie.codecs.bits import decode, encode
from coterie.codecs.open import coded, opened
from coterie.errors import CoterieError
from coterie.judge import speed
from coterie.judge.speed import bytes_per_token, kernel_rows, quantiles, read_bandwidth, subject
from coterie.kernels import cases
from coterie.kernels import run as kernels
from coterie.model import family
from coterie.storage.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Little memory and few rounds: these tests are not about speed."""
    for name, value in {"PROMPT": 8, "STEPS": 2, "ROUNDS": 2, "KERNEL_ROUNDS": 2, "BIG": 1 << 16}.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(cases, "RING", 1 << 17)


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory):
    """(dense, packed), half of the expert weights zero."""
    home = tmp_path_factory.mktemp("bench")
    coterie.sparsify(tiny_checkpoint("qwen3_moe"), home / "dense", method="magnitude", sparsity=0.5)
    coterie.pack(home / "dense", home / "packed")
    return home / "dense", home / "packed"


def test_two_models_are_measured_for_every_batch(folders):
    """Each has quantiles in order for prefill and decode, its bytes, and its share of the measured bandwidth."""
    found = coterie.bench(folders[1], against=folders[0], threads=1, batch="1,3")
    assert [m["path"] for m in found["models"]] == [str(folders[1]), str(folders[0])]
    assert found["machine"]["threads"] == 1 and found["machine"]["kernels"] == list(kernels.available())
    for model, folder in zip(found["models"], (folders[1], folders[0]), strict=True):
        assert model["bytes"] == Checkpoint.open(folder).num_bytes
        for kind in ("prefill", "decode"):
            assert list(model[kind]) == ["1", "3"]
            assert all(0 < speed["10"] <= speed["50"] <= speed["90"] for speed in model[kind].values())
        if found["bandwidth"]:
            share = model["bytes_per_token"] * model["decode"]["1"]["50"] / found["bandwidth"]
            assert model["bandwidth_share"] == pytest.approx(share)
    packed, dense = (m["bytes_per_token"] for m in found["models"])
    assert packed < dense


def test_threads_are_those_of_before_afterwards(folders):
    """Also where the measurement fails."""
    before = torch.get_num_threads()
    coterie.bench(folders[0], threads=1, batch=[1])
    assert torch.get_num_threads() == before


def test_bytes_per_token_counts_what_one_token_reads(tiny_checkpoint):
    """All but 6 of 8 experts and the input embedding, whose one row is nothing; tied to the head, it is read whole."""
    folder = tiny_checkpoint("qwen3_moe")
    arrays, _ = tiny.read(folder)
    experts = sum(a.nbytes for n, a in arrays.items() if ".experts." in n)
    rest = sum(a.nbytes for n, a in arrays.items() if ".experts." not in n)
    embedding = arrays["model.embed_tokens.weight"].nbytes
    assert bytes_per_token(Checkpoint.open(folder)) == experts * 2 // 8 + rest - embedding


def test_bytes_of_a_tied_head_are_read(tiny_checkpoint, tmp_path):
    """Without a head of its own the embedding is the head."""
    arrays, config = tiny.read(tiny_checkpoint("qwen3_moe"))
    arrays.pop("lm_head.weight")
    whole = bytes_per_token(Checkpoint.open(tiny_checkpoint("qwen3_moe")))
    tiny.write(tmp_path / "tied", arrays, config | {"tie_word_embeddings": True})
    assert bytes_per_token(Checkpoint.open(tmp_path / "tied")) == whole  # the embedding in place of the head


def test_bytes_of_packed_experts_are_those_stored(folders):
    """A quarter of the packed experts, and everything else as it is."""
    view, dense = opened(Checkpoint.open(folders[1])), opened(Checkpoint.open(folders[0]))
    saved = sum(dense.tensors[n].num_bytes - entry.num_bytes for n, entry in coded(view).items())
    assert bytes_per_token(dense) - bytes_per_token(view) == saved * 2 // 8


def test_what_one_token_reads_is_unknown_where_the_experts_are(folders, monkeypatch, capsys):
    """Of a family that is not known: no number that counts all experts as read, and a note."""
    monkeypatch.setattr(family, "registry", dict)
    found = coterie.bench(folders[0], threads=1, batch=[1])
    (model,) = found["models"]
    assert model["bytes_per_token"] is None and model["bandwidth_share"] is None and found["kernels"] is None
    kernels_note, read_note = found["notes"]
    assert kernels_note.startswith("no kernels measured: config.json: 'qwen3_moe' is not a family we know")
    assert "bytes read per token are unknown" in read_note and "not a family we know" in read_note
    with pytest.raises(SystemExit) as stop:
        main(["bench", str(folders[0]), "--batch", "1"])
    assert not stop.value.code and "bytes read per token  unknown" in capsys.readouterr().out


def test_a_model_without_experts_is_read_whole(tmp_path):
    """But for its input embedding."""
    arrays = {"model.embed_tokens.weight": np.ones((8, 4), np.float32), "lm_head.weight": np.ones((8, 4), np.float32)}
    tiny.write(tmp_path / "dense", arrays, {"model_type": "qwen3_moe"})
    assert bytes_per_token(Checkpoint.open(tmp_path / "dense")) == 8 * 4 * 4


def test_quantiles_are_of_single_calls():
    """4 tokens in 1, 2 and 4 seconds: 4, 2 and 1 tokens per second."""
    found = quantiles(4, [1.0, 2.0, 4.0])
    assert found["50"] == 2.0 and found["10"] == pytest.approx(1.2) and found["90"] == pytest.approx(3.6)


def test_kernels_are_measured_on_a_matrix_of_the_checkpoint(folders):
    """Its own zeros and bytes, beside every rival; a small matrix is said to be one."""
    view, notes = opened(Checkpoint.open(folders[1])), []
    found = kernel_rows(view, 1, notes)
    assert found["zeros"] == pytest.approx(0.5, abs=0.05) and found["tensor"] in coded(view)
    rows = {row["name"]: row for row in found["rows"]}
    assert {"torch F.linear f32", "torch.mv f32"} <= set(rows) and any("outweighs" in note for note in notes)
    for level in kernels.available()[:-1]:
        sparse = rows[f"sparse {level}"]
        assert sparse["bytes"] < rows["torch.mv f32"]["bytes"]
        ratio = rows["torch.mv f32"]["seconds"] / sparse["seconds"]
        assert sparse["times_faster_than"]["torch.mv f32"] == pytest.approx(ratio)


@pytest.mark.parametrize("values", ["as stored", "int8"])
def test_the_dense_rivals_multiply_the_same_matrix(folders, tmp_path, values):
    """The bits are those that the packed matrix stands for; rounded ones as bf16."""
    coterie.pack(folders[0], tmp_path / "out", values=values)
    found = subject(opened(Checkpoint.open(tmp_path / "out")))
    if values == "as stored":
        assert found.bits.tobytes() == decode(found.packed) and found.dtype == "F32"
        return
    dense = Checkpoint.open(folders[0]).read(found.name)
    bits = torch.from_numpy(found.bits.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    assert found.dtype == "BF16" and np.allclose(bits, dense, atol=0.01 * np.abs(dense).max())


def test_a_dense_checkpoint_is_measured_too(tiny_checkpoint):
    """Its expert matrix is packed for the comparison; there is nothing to gain."""
    found = subject(Checkpoint.open(tiny_checkpoint("olmoe", fused=True)))
    assert found.packed.density == 1.0 and found.bits.ndim == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_every_kernel_computes_what_it_is_timed_for(threads):
    """What the measured calls of our kernels write is the product, whatever the number of threads."""
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((64, 256)) * (rng.random((64, 256)) < 0.5)).astype(np.float32)
    x = torch.from_numpy(rng.standard_normal(256).astype(np.float32))
    packed = encode(matrix, "F32", matrix.shape)
    found = cases.dense_cases(matrix.view(np.uint32), "F32", x, threads)
    for level in cases.levels():
        found |= cases.sparse_case(f"sparse {level}", level, packed, x, threads)
    for name, (call, copies, _) in found.items():
        kept = call.__defaults__[0] if call.__defaults__ else ()
        if name.startswith(("sparse", "own dense f32")):
            kept[-1][:] = 0
            call(copies - 1)
            assert np.allclose(kept[-1], matrix @ x.numpy(), atol=1e-4), name


@pytest.mark.skipif("avx512" not in kernels.available(), reason="measured by an AVX-512 kernel")
def test_bandwidth_is_bytes_over_seconds():
    """A positive number, by one thread and by two."""
    assert read_bandwidth(1) > 0 and read_bandwidth(2) > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": "0"}, "--batch"),
        ({"batch": "1,x"}, "--batch"),
        ({"batch": "2,2"}, "--batch"),
        ({"batch": []}, "--batch"),
        ({"threads": 0}, "--threads"),
        ({"threads": 4096}, "--threads"),
    ],
)
def test_options_out_of_range_are_refused(folders, options, says):
    """By name, before anything is loaded."""
    with pytest.raises(CoterieError, match=says):
        coterie.bench(folders[0], **options)


def test_the_program_prints_tables_or_one_object(folders, capsys):
    """The machine is named; ratios stand below the sparse kernels."""
    with pytest.raises(SystemExit) as stop:
        main(["bench", str(folders[1]), "--batch", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not stop.value.code and set(found) >= {"machine", "bandwidth", "models", "kernels", "notes"}
    with pytest.raises(SystemExit) as stop:
        main(["bench", str(folders[1]), "--batch", "1", "--against", str(folders[0])])
    out = capsys.readouterr().out
    assert not stop.value.code and found["machine"]["processor"] in out and "bytes read per token" in out
    if len(kernels.available()) > 1:
        assert "of torch F.linear f32" in out
