"""The kernels against float64, at every level this machine has: shapes, sparsities, batches, threads, fallbacks."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.codecs.bits import GROUP, encode
from coterie.errors import CoterieError
from coterie.kernels import run as kernels
from coterie.kernels.jobs import Pairs
from coterie.kernels.memory import TORCH, Stack, load
from coterie.kernels.multiply import multiply
from coterie.model.sparse import SparseLinear

LEVELS = kernels.available()
DTYPES = ("BF16", "F16", "F32", "I8")


def weights(rng, dtype, shape, sparsity):
    """Random weights (…, O, I) in a stored dtype, with an empty and a full row, and scales of int8 ones."""
    values = rng.standard_normal(shape).astype(np.float32)
    values[rng.random(shape) < sparsity] = 0
    if shape[-2] > 2:
        values[..., 0, :], values[..., 1, :] = 0, 1
    if dtype == "I8":
        scales = rng.uniform(0.5, 2, (*shape[:-1], -(-shape[-1] // GROUP))).astype(np.float32)
        return torch.from_numpy(np.clip(np.rint(40 * values), -127, 127).astype(np.int8)), scales
    return torch.from_numpy(values).to(TORCH[dtype]), None


def stack_of(stored, dtype, scales=None):
    """The weights (E, O, I) in memory, packed."""
    raws = [m.contiguous().view(torch.uint8).numpy() for m in stored]
    return load(
        encode(raw, dtype, tuple(m.shape), None if scales is None else scales[e])
        for e, (raw, m) in enumerate(zip(raws, stored, strict=True))
    )


def dense64(stored, scales=None):
    values = stored.double().numpy()
    return values if scales is None else values * np.repeat(scales.astype(float), GROUP, -1)[..., : values.shape[-1]]


def assert_close(found, x, dense):
    """|y - y64| <= (I / 8 + 16) 2^-24 sum |w x|: a float32 sum in 8 or 16 lanes, each rounded to nearest."""
    x64 = x.double().numpy()
    bound = (dense.shape[-1] / 8 + 16) * 2.0**-24 * (np.abs(x64) @ np.abs(dense).T) + 1e-30
    assert (np.abs(found.double().numpy() - x64 @ dense.T) <= bound).all()


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("COTERIE_KERNELS", request.param)
    return request.param


def one_matrix(x):
    return Pairs.of(np.zeros(len(x), np.int64))


@pytest.mark.parametrize("batch", range(1, kernels.MAX_BATCH + 1))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_batch_and_dtype_equals_float64(level, dtype, batch):
    """77 rows of 333 columns (not a multiple of 32), half of them zero, float32 inputs."""
    rng = np.random.default_rng(batch)
    stored, scales = weights(rng, dtype, (1, 77, 333), 0.5)
    x = torch.from_numpy(rng.standard_normal((batch, 333)).astype(np.float32))
    assert_close(multiply([stack_of(stored, dtype, scales)], one_matrix(x), x), x, dense64(stored, scales)[0])


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_bf16_inputs_equal_float64(monkeypatch, batch):
    """Products of two bf16 numbers are exact in float32, so the bound is the same; float64 sees the rounded inputs."""
    monkeypatch.setenv("COTERIE_KERNELS", LEVELS[0])
    rng = np.random.default_rng(batch)
    stored, _ = weights(rng, "BF16", (1, 50, 700), 0.5)
    x = torch.from_numpy(rng.standard_normal((batch, 700)).astype(np.float32)).bfloat16()
    found = multiply([stack_of(stored, "BF16")], one_matrix(x), x)
    if LEVELS[0] == "torch":  # its own kernels round results to bf16
        assert torch.allclose(found.double(), x.double() @ stored[0].double().T, rtol=2**-6, atol=0.1)
    else:
        assert_close(found, x, dense64(stored)[0])


@pytest.mark.parametrize("which", LEVELS)
@settings(max_examples=40)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.integers(1, 500),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.1, 0.5, 0.97, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_random_shapes_and_sparsities_equal_float64(which, dtype, rows, columns, batch, sparsity, seed):
    """Dense, empty and everything between; above 8 vectors the matrix is expanded in tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_KERNELS", which)
        rng = np.random.default_rng(seed)
        stored, scales = weights(rng, dtype, (1, rows, columns), sparsity)
        x = torch.from_numpy(rng.standard_normal((batch, columns)).astype(np.float32))
        assert_close(multiply([stack_of(stored, dtype, scales)], one_matrix(x), x), x, dense64(stored, scales)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_expanded_rows_are_the_stored_ones_exactly(level, dtype, sparsity):
    """Any range of rows, at every level; a matrix without zeros is held dense."""
    rng = np.random.default_rng(0)
    stored, scales = weights(rng, dtype, (1, 30, 100), sparsity)
    matrix = stack_of(stored, dtype, scales).matrices[0]
    assert (matrix.mask is None) == (sparsity == 0.0)
    wanted = torch.from_numpy(dense64(stored, scales)[0]).float()
    for first, last in ((0, 30), (7, 9), (29, 30)):
        assert torch.equal(matrix.rows(first, last, torch.float32), wanted[first:last])
    packed = matrix.packed()
    assert np.array_equal(packed.values, encode(stored[0].view(torch.uint8).numpy(), dtype, (30, 100)).values)


def pairs(rng, counts):
    """Pairs with so many rows of each expert, and their inputs."""
    experts = np.repeat(np.arange(len(counts)), counts)
    return Pairs.of(experts), experts, torch.from_numpy(rng.standard_normal((len(experts), 96)).astype(np.float32))


def test_experts_with_few_and_with_many_tokens_in_one_call(level):
    """Pairs of 0, 1, 8, 9 and 40 rows meet their own expert's matrices, one stack beside the other."""
    rng = np.random.default_rng(3)
    stored = [weights(rng, "F32", (5, rows, 96), 0.6)[0] for rows in (40, 24)]
    groups, experts, x = pairs(rng, [1, 8, 9, 40, 0])
    found = multiply([stack_of(s, "F32") for s in stored], groups, x)
    assert found.shape == (58, 64)
    for row, e in enumerate(experts):
        assert_close(found[row : row + 1], x[row : row + 1], dense64(torch.cat([stored[0][e], stored[1][e]])))


def test_sparse_and_dense_matrices_share_a_stack(level):
    """Below break-even a matrix is held dense, and the dense kernel serves it."""
    rng = np.random.default_rng(4)
    half, full = weights(rng, "BF16", (1, 33, 96), 0.5)[0], weights(rng, "BF16", (1, 33, 96), 0.02)[0]
    stored = torch.cat([half, full])
    stack = stack_of(stored, "BF16")
    assert [m.mask is None for m in stack.matrices] == [False, True]
    groups, experts, x = pairs(rng, [2, 3])
    found = multiply([stack], groups, x)
    for row, e in enumerate(experts):
        assert_close(found[row : row + 1], x[row : row + 1], dense64(stored[e]))


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    """Every row is one thread's: two threads, many blocks, the same bits."""
    monkeypatch.setattr(kernels, "MIN_SHARE", 1)
    rng = np.random.default_rng(5)
    stack = stack_of(weights(rng, "BF16", (6, 200, 160), 0.5)[0], "BF16")
    x = torch.from_numpy(rng.standard_normal((12, 160)).astype(np.float32))
    groups, before, results = Pairs.of(np.repeat(np.arange(6), 2)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(multiply([stack], groups, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_one_token_for_several_experts_is_read_once():
    """A single row of inputs serves every group."""
    rng = np.random.default_rng(6)
    stored = weights(rng, "F32", (4, 20, 64), 0.5)[0]
    x = torch.from_numpy(rng.standard_normal((1, 64)).astype(np.float32))
    found = multiply([stack_of(stored, "F32")], Pairs.of(np.array([0, 2, 3])), x)
    for row, e in zip(found, (0, 2, 3), strict=True):
        assert_close(row[None], x, dense64(stored[e]))


def test_a_linear_layer_with_a_bias(level):
    """Any leading axes, none included; no rows at all too."""
    rng = np.random.default_rng(7)
    stored = weights(rng, "F32", (1, 24, 40), 0.5)[0]
    bias = torch.nn.Parameter(torch.arange(24.0), requires_grad=False)
    layer = SparseLinear(40, 24, bias)
    layer.coterie = stack_of(stored, "F32")
    for shape in ((40,), (3, 40), (2, 7, 40), (0, 40)):
        x = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        wanted = torch.nn.functional.linear(x, stored[0], bias)
        assert torch.allclose(layer(x), wanted, atol=1e-5) and layer(x).shape == wanted.shape


def test_stacks_survive_copies_and_pickles():
    """A deep copy shares what nothing changes; a pickle is packed anew, at other addresses."""
    rng = np.random.default_rng(8)
    stored = weights(rng, "BF16", (2, 20, 64), 0.5)[0]
    stack = stack_of(stored, "BF16")
    x = torch.from_numpy(rng.standard_normal((2, 64)).astype(np.float32))
    wanted = multiply([stack], Pairs.of(np.array([0, 1])), x)
    assert copy.deepcopy(stack) is stack
    other = pickle.loads(pickle.dumps(stack))
    assert isinstance(other, Stack) and torch.equal(multiply([other], Pairs.of(np.array([0, 1])), x), wanted)


def test_an_unknown_level_is_refused_and_names_those_there_are(monkeypatch):
    """COTERIE_KERNELS is an option like any other."""
    monkeypatch.setenv("COTERIE_KERNELS", "mmx")
    with pytest.raises(CoterieError, match=r"this machine has .*torch"):
        kernels.level()


@pytest.mark.parametrize(
    "lacking", ["import platform; platform.machine = lambda: 'aarch64'", "import sys; sys.modules['llvmlite'] = None"]
)
def test_other_processors_fall_back_to_torch(lacking):
    """Without x86-64, or without llvmlite, the only level is torch."""
    code = f"{lacking}\nfrom coterie.kernels import run; print(run.level())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["torch"]
