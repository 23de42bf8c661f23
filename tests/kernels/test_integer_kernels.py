"""Kernels on codes of few bits against float64, at every level this machine has: widths, groups, shapes, batches."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.codecs import Codes
from coterie.kernels import run as kernels
from coterie.kernels.integers import SCALES
from coterie.kernels.jobs import Pairs
from coterie.kernels.memory import load
from coterie.kernels.multiply import multiply
from coterie.storage.numerics import packed

LEVELS = kernels.available()
BITS = (2, 3, 4, 8)


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("COTERIE_KERNELS", request.param)
    return request.param


def matrix(rng, bits, shape, group=32, scale_type="BF16"):
    """(as it is stored, its values in float64): random codes, and scales of either sign."""
    rows, columns = shape
    if not bits:
        return Codes(0, shape, np.zeros((rows, 0), "u4"), np.zeros((rows, 0), "u2"), "BF16"), np.zeros(shape)
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    scales = torch.from_numpy(0.1 * rng.standard_normal((rows, columns // group))).to(SCALES[scale_type])
    values = (codes - 2.0 ** (bits - 1)) * np.repeat(scales.double().numpy(), group, 1)
    stored = scales.view(torch.int32 if scale_type == "F32" else torch.int16).numpy()
    return Codes(bits, shape, packed(codes, bits).view(np.uint32), stored, scale_type), values


def group_of(m):
    return m.shape[1] // m.scales.shape[1]


def assert_close(found, x, m, values):
    """|y - y64| <= (I / 8 + 16) 2^-24 2^bits sum |s x|: a float32 sum of codes and of inputs times the middle code."""
    scales = torch.from_numpy(m.scales).view(SCALES[m.scale_type]).double().abs().numpy()
    x64 = x.double().numpy()
    sizes = np.abs(x64) @ np.repeat(scales, group_of(m), 1).T if m.bits else 0
    bound = (values.shape[1] / 8 + 16) * 2.0**-24 * 2**m.bits * sizes + 1e-30
    assert (np.abs(found.double().numpy() - x64 @ values.T) <= bound).all()


def inputs(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape, np.float32))


def of_one(count):
    return Pairs.of(np.zeros(count, np.int64))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("batch", range(1, kernels.MAX_BATCH + 1))
def test_every_batch_width_and_group_equals_float64(level, batch, bits, group):
    """13 rows of 384 columns: whole chunks at every level."""
    rng = np.random.default_rng(batch)
    m, values = matrix(rng, bits, (13, 384), group)
    x = inputs(rng, batch, 384)
    assert_close(multiply([load([m])], of_one(batch), x), x, m, values)


@pytest.mark.parametrize("which", LEVELS)
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BITS),
    st.sampled_from([32, 64, 128]),
    st.sampled_from(list(SCALES)),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(0, 2**32 - 1),
)
def test_random_shapes_equal_float64(which, bits, group, scale_type, rows, groups, batch, seed):
    """Rows that end inside a chunk, one group alone, every dtype of scales; above the kernels' batch, in tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_KERNELS", which)
        rng = np.random.default_rng(seed)
        m, values = matrix(rng, bits, (rows, groups * group), group, scale_type)
        x = inputs(rng, batch, groups * group)
        assert_close(multiply([load([m])], of_one(batch), x), x, m, values)


@pytest.mark.parametrize("bits", BITS)
def test_expanded_rows_are_codes_times_scales_rounded_once(level, bits):
    """In float32 and in bf16, any range of rows."""
    rng = np.random.default_rng(0)
    m, values = matrix(rng, bits, (30, 96))
    held = load([m]).matrices[0]
    for dtype in (torch.float32, torch.bfloat16):
        wanted = torch.from_numpy(values).float().to(dtype)
        for first, last in ((0, 30), (7, 9), (29, 30)):
            assert torch.equal(held.rows(first, last, dtype), wanted[first:last])


def test_widths_may_differ_between_experts_and_between_matrices(level):
    """0, 2, 3, 4 and 8 bits side by side, with 1 to 40 rows each; an expert in no bits gives zeros."""
    rng = np.random.default_rng(1)
    first = [matrix(rng, bits, (24, 96)) for bits in (0, 2, 3, 4, 8)]
    second = [matrix(rng, bits, (16, 96)) for bits in (4, 0, 4, 2, 3)]
    experts = np.repeat(np.arange(5), [2, 1, 9, 40, 3])
    x = inputs(rng, len(experts), 96)
    found = multiply([load([m for m, _ in first]), load([m for m, _ in second])], Pairs.of(experts), x)
    for row, e in enumerate(experts):
        assert_close(found[row : row + 1, :24], x[row : row + 1], *first[e])
        assert_close(found[row : row + 1, 24:], x[row : row + 1], *second[e])
        assert found[row, :24].any() == (e != 0) and found[row, 24:].any() == (e != 1)


def test_all_experts_in_no_bits_give_zeros(level):
    """Nothing is left to do, for one token and for many."""
    stack = load([matrix(np.random.default_rng(0), 0, (8, 32))[0]] * 2)
    for count in (1, 30):
        assert not multiply([stack], of_one(count), torch.ones(count, 32)).any()


def test_one_token_for_several_experts_is_read_once(level):
    """A single row of inputs serves every group, whatever their widths."""
    rng = np.random.default_rng(6)
    made = [matrix(rng, bits, (20, 160)) for bits in (4, 4, 2, 3)]
    x = inputs(rng, 1, 160)
    found = multiply([load([m for m, _ in made])], Pairs.of(np.array([0, 2, 3])), x)
    for row, e in zip(found, (0, 2, 3), strict=True):
        assert_close(row[None], x, *made[e])


def test_bf16_inputs_are_widened(level):
    """The same sums as of their values in float32, as long as kernels do them."""
    rng = np.random.default_rng(2)
    for bits in BITS:
        m, values = matrix(rng, bits, (20, 256))
        x = inputs(rng, 3, 256).bfloat16()
        found = multiply([load([m])], of_one(3), x)
        if level == "torch":  # its own kernels round weights and results to bf16
            wanted, sizes = (a(x.double()) @ a(torch.from_numpy(values)).T for a in (torch.clone, torch.abs))
            assert ((found - wanted).abs() <= 2**-7 * sizes).all()
        else:
            assert_close(found, x, m, values)


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    """Every row is one thread's: two threads, many blocks, the same bits."""
    monkeypatch.setattr(kernels, "MIN_SHARE", 1)
    rng = np.random.default_rng(5)
    stack = load([matrix(rng, bits, (200, 160))[0] for bits in (0, 2, 3, 4, 8, 4)])
    x, groups = inputs(rng, 12, 160), Pairs.of(np.repeat(np.arange(6), 2))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(multiply([stack], groups, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_stacks_of_codes_survive_copies_and_pickles():
    """A deep copy shares what nothing changes; a pickle is at other addresses."""
    rng = np.random.default_rng(8)
    stack = load([matrix(rng, bits, (20, 64))[0] for bits in (4, 0)])
    x, groups = inputs(rng, 2, 64), Pairs.of(np.array([0, 1]))
    assert copy.deepcopy(stack) is stack
    assert torch.equal(multiply([pickle.loads(pickle.dumps(stack))], groups, x), multiply([stack], groups, x))


def test_codes_take_the_bytes_that_they_are_stored_in():
    """4 bits a weight, and 16 for each 64 of them: nothing is widened in memory."""
    m, _ = matrix(np.random.default_rng(0), 4, (64, 256), 64)
    assert load([m]).num_bytes == 64 * 256 // 2 + 64 * 4 * 2
