"""Stored tensors as torch has them, activations on disk, and experts read and run in pieces."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

import tiny
from coterie import condense, drop, merge, prune, sparsify
from coterie.errors import CoterieError
from coterie.forward import activations
from coterie.forward.activations import Batch, Routed, plain_walk, shared, weighted_sums
from coterie.forward.stream import Stream
from coterie.kernels.products import padded
from coterie.model import moe
from coterie.model.experts import expert_biases, expert_matrices
from coterie.model.layer import Model
from coterie.storage import tensors
from coterie.storage.checkpoint import Checkpoint

SPELLINGS = tiny.spellings()


class Swiglu:
    """As much of transformers' experts modules as a computation needs."""

    is_concatenated, has_gate, has_post_expert_norm, act_fn = True, True, False, staticmethod(silu)

    def _apply_gate(self, both):
        gate, up = both.chunk(2, dim=-1)
        return silu(gate) * up


def routed(tiny_checkpoint, num_tokens=50, maps=None, dtype=torch.float32):
    """One block of a tiny model that is asked for the experts of random tokens."""
    block = Model.open(tiny_checkpoint("mixtral")).moe[0]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, tiny.HIDDEN, generator=draw).to(dtype)
    if maps:
        x = maps.zeros(x.shape, dtype).copy_(x)
    chosen = torch.rand(num_tokens, tiny.NUM_EXPERTS, generator=draw).topk(2).indices
    return Routed(block, Swiglu(), x, chosen, torch.rand(num_tokens, 2, generator=draw), maps)


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "fused"), SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_those_of_the_reader_of_all_layouts(tiny_checkpoint, model_type, fused, dtype):
    """Read straight into torch's memory or decoded by numpy: the same matrices and biases, cast once."""
    model = Model.open(tiny_checkpoint(model_type, fused))
    for block in model.moe:
        for e in (0, block.num_experts - 1):
            expert = moe.read_expert(model.checkpoint, block, e, dtype)
            matrices = dict(zip(("gate", "up", "down"), expert_matrices(model.checkpoint, block, e), strict=True))
            expected = {part: torch.tensor(m).to(dtype) for part, m in matrices.items() if m is not None}
            assert expert.matrices.keys() == expected.keys()
            assert all(torch.equal(m, expected[part]) for part, m in expert.matrices.items())
            assert expert.gate_up.is_contiguous() and expert.down.is_contiguous()
            for found, bias in zip(
                (expert.gate_up_bias, expert.down_bias), expert_biases(model.checkpoint, block, e), strict=True
            ):
                assert (found is None) == (bias is None)
                assert found is None or torch.equal(found, torch.tensor(bias).to(dtype))


def test_scaled_experts_are_dequantised(tiny_checkpoint, tmp_path):
    """FP8 weights have scales beside them, which the short way leaves to the one that multiplies."""
    from safetensors.torch import save_file

    values, _ = tiny.read(tiny_checkpoint("mixtral"))
    folder = tmp_path / "m"
    shutil.copytree(tiny_checkpoint("mixtral"), folder)
    stored = {}
    for name, value in values.items():
        stored[name] = torch.from_numpy(value)
        if ".experts." in name:
            stored[name] = stored[name].to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = torch.full((1, 1), 4.0)
    save_file(stored, folder / "model.safetensors")
    model = Model.open(folder)
    found = moe.read_expert(model.checkpoint, model.moe[1], 3, torch.float32)
    gate, _, _ = expert_matrices(model.checkpoint, model.moe[1], 3)
    assert gate is not None and np.abs(gate).max() > 4 * 0.2
    assert torch.equal(found.matrices["gate"], torch.tensor(gate))


def test_the_next_expert_is_read_while_one_is_in_use(tiny_checkpoint, monkeypatch):
    """In the order asked for, and never more than one ahead."""
    model, begun = Model.open(tiny_checkpoint("mixtral")), []
    monkeypatch.setattr(moe, "read_expert", lambda checkpoint, block, e, dtype: begun.append(e) or e)
    for count, e in enumerate(moe.read_experts(model.checkpoint, model.moe[0], [5, 2, 7, 1], torch.float32), start=1):
        assert e == [5, 2, 7, 1][count - 1]
        assert len(begun) <= count + 1
    assert begun == [5, 2, 7, 1]


def test_an_error_while_reading_ahead_comes_out(tiny_checkpoint, tmp_path):
    """In its turn, as it is: a shard that was cut after it was opened."""
    shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "m")
    model = Model.open(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[: max(t.end for t in model.checkpoint.tensors.values()) // 2])
    with pytest.raises(CoterieError, match=r"model\.safetensors: ended while reading .*experts"):
        for block in model.moe:
            list(moe.read_experts(model.checkpoint, block, range(8), torch.float32))


def test_tensors_are_read_and_mapped_alike(tiny_checkpoint):
    """Values, dtypes and shapes; what is read is aligned as torch aligns, what is mapped is read-only."""
    checkpoint, maps = Checkpoint.open(tiny_checkpoint("qwen2_moe")), tensors.Maps()
    for name in checkpoint.tensors:
        read, mapped = tensors.read(checkpoint, name), maps.stored(checkpoint, name)
        assert torch.equal(read, torch.tensor(checkpoint.read(name))) and torch.equal(read, mapped)
        assert read.data_ptr() % 64 == 0
    maps.release()
    assert torch.equal(read, mapped)


@pytest.mark.parametrize("how", [tensors.read, lambda checkpoint, name: tensors.Maps().stored(checkpoint, name)])
def test_files_that_changed_are_refused(tiny_checkpoint, tmp_path, how):
    """Cut short, or gone, since the checkpoint was opened."""
    shutil.copytree(tiny_checkpoint("qwen2_moe"), tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    path, last = tmp_path / "m" / "model.safetensors", max(checkpoint.tensors.values(), key=lambda t: t.end)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CoterieError, match=rf"model\.safetensors: ended while reading '{last.name}'"):
        how(checkpoint, last.name)
    path.unlink()
    with pytest.raises(CoterieError, match=r"model\.safetensors: cannot be read \(No such file"):
        how(checkpoint, last.name)


# --- maps ---------------------------------------------------------------------------------------------------------


def test_released_maps_keep_what_was_written(tmp_path):
    """Zeros at first; without a name in the folder; gone with their last tensor."""
    maps = tensors.Maps(tmp_path)
    a, b = maps.zeros((3, 5), torch.float32), maps.zeros((2,), torch.bfloat16)
    assert not a.any() and not list(tmp_path.iterdir())
    a[1:] = torch.arange(5.0)
    b += 1
    maps.release()
    assert a.tolist() == [[0.0] * 5, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]] and b.tolist() == [1, 1]
    row = a[2]
    del a, b
    assert len(maps._open) == 1
    maps.release()
    assert row.tolist() == [0, 1, 2, 3, 4]
    del row
    assert len(maps._open) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_goes_through_the_file_is_what_stands_in_the_map(tmp_path, dtype):
    """Stretches, scattered columns, values of another dtype, and tensors that are no maps; both ways, in any order."""
    maps = tensors.Maps(tmp_path)
    others = [maps.zeros((4,), torch.float32) for _ in range(3)]
    a = maps.zeros((5, 3), dtype)
    maps.put(a[1:3], torch.arange(6).view(2, 3))
    assert a.tolist() == [[0, 0, 0], [0, 1, 2], [3, 4, 5], [0, 0, 0], [0, 0, 0]]
    a[4] = 7
    maps.put(a[:, 0], torch.full((5,), 9))  # not one stretch
    assert maps.get(a).tolist() == [[9, 0, 0], [9, 1, 2], [9, 4, 5], [9, 0, 0], [9, 7, 7]]
    found, ordinary = maps.get(a[4:]), torch.zeros(2)
    a[4] = 1
    maps.put(ordinary, torch.ones(2))
    assert found.tolist() == [[9, 7, 7]] and maps.get(ordinary).tolist() == [1, 1]
    assert not any(other.any() for other in others) and maps.get(a[:0]).shape == (0, 3)


def test_rows_are_counted_up_to_their_map(tmp_path, monkeypatch):
    """A small map can be touched for ever; many large ones cannot."""
    monkeypatch.setattr(tensors, "LEAST_RESIDENT", 3 * 4096)
    maps, released = tensors.Maps(tmp_path, 0), []
    monkeypatch.setattr(maps, "release", lambda: (released.append(1), maps._touched.clear()))
    a, b = maps.zeros((2, 1024), torch.float32), maps.zeros((2, 1024), torch.float32)
    for _ in range(9):
        maps.touched(a[1:], 1)
    assert not released
    maps.touched(b, 1)
    assert released == [1]


def test_room_is_taken_where_the_system_cannot_promise_it(tmp_path, monkeypatch):
    """By writing the zeros."""
    monkeypatch.delattr(tensors.os, "posix_fallocate")
    monkeypatch.setattr(tensors, "BLOCK", 7)
    values = tensors.Maps(tmp_path).zeros((5, 4), torch.int16)
    assert values.shape == (5, 4) and not values.any()


def test_equal_arguments_are_shared():
    """Tensors of the same values and dtype are an earlier batch's; others, and what is no tensor, stay."""
    earlier = [((), {"mask": torch.ones(2, 2), "ids": torch.tensor([1]), "n": 3})]
    own = [((), {"mask": torch.ones(2, 2), "ids": torch.tensor([2]), "n": 4})]
    (_, found), *_ = shared(own, earlier)
    assert found["mask"] is earlier[0][1]["mask"] and found["ids"] is own[0][1]["ids"] and found["n"] == 4
    assert shared(own, []) is own
    half = [((), {"mask": torch.ones(2, 2).half(), "ids": torch.tensor([1]), "n": 3})]
    assert shared(half, earlier)[0][1]["mask"].dtype == torch.half


def test_a_moved_batch_stays_where_it_is(tmp_path):
    """Its hidden states are the place's first rows, and assigning to them writes there."""
    maps, values = tensors.Maps(tmp_path), torch.randn(2, 3, 4)
    place, batch = maps.zeros((10, 4), torch.float32), Batch(values, [], (0, 1))
    batch.move(maps, place)
    assert torch.equal(batch.hidden, values) and torch.equal(place[:6].view(2, 3, 4), values) and not place[6:].any()
    batch.hidden = values + 1
    assert torch.equal(place[:6].view(2, 3, 4), values + 1)
    assert batch.num_tokens == 6 and torch.equal(batch.loaded(), values + 1)


# --- running ------------------------------------------------------------------------------------------------------


def test_token_counts_are_padded_to_few():
    """For 16-bit products: powers of two to 32, then its multiples; not in float32."""
    counts = (1, 2, 3, 5, 9, 31, 32, 33, 64, 65, 1000)
    assert [padded(n, torch.bfloat16) for n in counts] == [1, 2, 4, 8, 16, 32, 32, 64, 64, 96, 1024]
    assert [padded(n, torch.float32) for n in counts] == list(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_pieces_make_up_an_expert(tiny_checkpoint, tmp_path, monkeypatch, dtype, is_mapped):
    """At most so many tokens each, in order, with inputs, hidden and outputs as of all at once."""
    monkeypatch.setattr(moe, "MOST_TOKENS", 4)
    monkeypatch.setattr(activations, "MOST_ROWS", 3)
    asked = routed(tiny_checkpoint, maps=tensors.Maps(tmp_path) if is_mapped else None, dtype=dtype)
    checkpoint = Model.open(tiny_checkpoint("mixtral")).checkpoint
    by_expert = list(asked.by_expert())
    assert max(len(rows) for _, rows, _ in by_expert) > 8
    for (e, rows, weights), (number, expert, *same) in zip(by_expert, asked.experts(checkpoint, dtype), strict=True):
        assert number == e and torch.equal(same[0], rows) and torch.equal(same[1], weights)
        pieces = list(asked.pieces(expert, rows, weights))
        assert all(len(p.rows) <= 4 for p in pieces)
        found = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        hidden, y = moe.expert_forward(asked.module, expert, asked.x[rows])
        expected = (rows, weights, weights, asked.x[rows], hidden, y)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        for piece, other in zip(pieces, asked.pieces(expert, rows, weights, outputs=False), strict=True):
            assert torch.equal(piece.hidden, other.hidden) and other.y.shape == (0, tiny.HIDDEN)


@pytest.mark.parametrize("is_mapped", [False, True])
def test_the_weighted_sum(tiny_checkpoint, tmp_path, monkeypatch, is_mapped):
    """sum_k w_k expert_k(x), by a loop over tokens; kept where the inputs are."""
    monkeypatch.setattr(moe, "MOST_TOKENS", 7)
    maps = tensors.Maps(tmp_path) if is_mapped else None
    asked, checkpoint = routed(tiny_checkpoint, maps=maps), Model.open(tiny_checkpoint("mixtral")).checkpoint
    found = plain_walk(checkpoint, torch.float32)(asked)
    for x, ids, weights, total in zip(asked.x, asked.chosen, asked.weights, found, strict=True):
        expected = torch.zeros(tiny.HIDDEN)
        for e, w in zip(ids.tolist(), weights, strict=True):
            gate, up, down = (torch.tensor(m) for m in expert_matrices(checkpoint, asked.block, e))
            expected += w * (down @ (silu(gate @ x) * (up @ x)))
        torch.testing.assert_close(total, expected)
    assert len(maps._open) == 2 if maps else found.untyped_storage().resizable()


@pytest.mark.parametrize("squared", [False, True])
def test_weighted_sums_of_many_rows(monkeypatch, squared):
    """Against float64, in pieces of a few rows; bfloat16 values too."""
    monkeypatch.setattr(activations, "ROWS", 16)
    draw = torch.Generator().manual_seed(0)
    values, weights = torch.randn(100, 6, generator=draw), torch.rand(3, 100, generator=draw)
    for given in (values, values.bfloat16()):
        wide = given.double().square() if squared else given.double()
        torch.testing.assert_close(
            weighted_sums(weights, given, squared=squared), weights.double() @ wide, rtol=1e-5, atol=1e-5
        )


def test_weighted_sums_beyond_float32():
    """1e30 squared is no float32: such sums are computed in float64, and stay NaN where values are."""
    values = torch.tensor([[1e30, 2.0], [3e30, 4.0]])
    found = weighted_sums(torch.tensor([[1.0, 0.5]]), values, squared=True)
    torch.testing.assert_close(found, torch.tensor([[5.5e60, 12.0]], dtype=torch.float64), rtol=1e-6, atol=0)
    assert weighted_sums(torch.ones(1, 2), torch.tensor([[1.0], [np.nan]])).isnan().all()


def test_layers_take_what_pieces_give(tiny_checkpoint, monkeypatch):
    """A whole model with experts in pieces of three tokens: equal to rounding."""
    stream = Stream(Model.open(tiny_checkpoint("qwen2_moe")), torch.float32)
    given = torch.randint(3, tiny.VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0)).tolist()

    def run():
        batches = stream.embed(given)
        list(stream.run(batches, plain_walk(stream.checkpoint, stream.dtype)))
        return stream.logits(batches[0])

    whole = run()
    monkeypatch.setattr(moe, "MOST_TOKENS", 3)
    torch.testing.assert_close(run(), whole)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        (condense, {"layers": 1}),
        (drop, {}),
        (merge, {"method": "m-smoe"}),
        (prune, {"method": "naee-greedy"}),
        (sparsify, {"method": "wanda"}),
    ],
    ids=["condense", "drop", "merge", "prune", "sparsify"],
)
def test_verbs_put_large_activations_beside_out(tiny_checkpoint, tmp_path, monkeypatch, verb, options):
    """Into the nearest folder that is there: OUT's own parent only where a journal beside OUT made it. They decide as
    they do in memory."""
    file, folders, zeros = tmp_path / "texts.jsonl", set(), tensors.Maps.zeros
    draw = np.random.default_rng(0)
    given = [draw.integers(3, tiny.VOCABULARY, length).tolist() for length in (20, 9, 14, 11)]
    file.write_text("\n".join(json.dumps({"input_ids": ids}) for ids in given))
    inside = verb(tiny_checkpoint("qwen2_moe"), tmp_path / "inside", data=[f"x={file}"], **options)
    monkeypatch.setattr("coterie.forward.stream.IN_MEMORY", 0)
    monkeypatch.setattr(tensors.Maps, "zeros", lambda self, *args: folders.add(self.folder) or zeros(self, *args))
    outside = verb(tiny_checkpoint("qwen2_moe"), tmp_path / "a" / "b" / "out", data=[f"x={file}"], **options)
    assert folders == {tmp_path / "a" / "b" if verb is condense else tmp_path}
    assert outside.plan == inside.plan
