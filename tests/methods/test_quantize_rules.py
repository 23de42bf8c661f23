"""Few bits: what levels and scales are, that rules do what their formulas say, and how they rank."""

import numpy as np
import pytest

from coterie.errors import CoterieError
from coterie.methods import quantize as methods
from coterie.methods.levels import Levels, Quantised, best_scales, quantised, unbiased
from coterie.storage.numerics import packed, unpacked


def drawn(rows=16, columns=64, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def correlated(columns=64, seed=1):
    """Inputs (T, I) whose channels differ in size and go together; their mean square (I, I)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1024, columns)) @ (
        rng.standard_normal((columns, columns)) * np.exp(rng.normal(size=columns))
    )
    return x, x.T @ x / len(x)


def test_rounding_by_hand():
    """Two bits: levels -2, -1, 0 and 1 times the largest magnitude over 1.5, ties to even."""
    weight = np.array([[-3.0, -1.0, 0.9, 3.0]], np.float32)
    found = methods.load("round").quantise(weight, Levels(2, 4, scale_dtype="F32"))
    assert found.scales.tolist() == [[2.0]] and found.codes.tolist() == [[-2, 0, 0, 1]]
    assert found.values.tolist() == [[-4.0, 0.0, 0.0, 2.0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_nearest_levels(bits):
    """Of all levels, by trying every one; a group of zeros has scale 0 and codes 0."""
    weight, grid = drawn(4, 32), Levels(bits, 16, scale_dtype="F32")
    weight[1, :16] = 0
    found = quantised(grid, weight, grid.covering(grid.grouped(weight)))
    levels = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    for r, row in enumerate(weight):
        for c, value in enumerate(row):
            distances = np.abs(levels * found.scales[r, c // 16] - value)
            assert distances[levels == found.codes[r, c]] <= distances.min() * (1 + 1e-5) + 1e-7
    assert not found.codes[1, :16].any() and found.scales[1, 0] == 0


def test_scales_are_those_that_are_stored():
    """What a rule gives is what its bytes give back: scales are rounded before codes are chosen."""
    for name in methods.names():
        _, hessian = correlated()
        seen = {"hessian": hessian, "squares": np.diag(hessian), "nothing": None}[methods.load(name).NEEDS]
        found = methods.load(name).quantise(drawn(), Levels(3, 32), seen)
        assert np.array_equal(found.levels.stored(found.scales), found.scales), name
        assert found.codes.dtype == np.int8 and found.codes.min() >= -4 and found.codes.max() <= 3


def test_searched_scales_are_as_good_as_trying_thousands():
    """Within a percent of the least weighted squared error over a fine range of scales of both signs."""
    weight, grid = drawn(8, 32), Levels(2, 32, scale_dtype="F32")
    importance = np.exp(drawn(1, 32, seed=3))
    found = best_scales(grid, grid.grouped(weight), importance)

    def error(scales):
        return (np.square(weight - quantised(grid, weight, scales).values) * importance).sum(1)

    tried = np.linspace(-1.2, 1.2, 4001, dtype=np.float32)[:, None, None] * grid.covering(grid.grouped(weight))
    least = np.min([error(scales) for scales in tried], axis=0)
    assert (error(found) <= 1.01 * least).all()


def test_unbiased_scales_keep_the_size_of_the_output():
    """The inner product of what is stored with the right output is that of the weights with it, row by row."""
    weight, (_, hessian) = drawn(), correlated()
    grid = Levels(2, 32, scale_dtype="F32")
    before = quantised(grid, weight, best_scales(grid, grid.grouped(weight), np.ones((2, 32), np.float32)))
    found, pull = unbiased(before, weight, weight @ hessian), weight @ hessian
    assert np.allclose((pull * found.values).sum(1), (pull * weight).sum(1), rtol=1e-5)
    assert np.array_equal(found.codes, before.codes)
    lost = Quantised(grid, np.zeros_like(before.codes), before.scales)
    assert np.array_equal(unbiased(lost, weight, pull).scales, lost.scales), "nothing is left that could grow"


def slow_gptq(weight, grid, hessian):
    """Column by column, the textbook way: one more inverse of what is left of H for each."""
    w, left, values = weight.astype(np.float64), list(range(weight.shape[1])), np.zeros(weight.shape)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    for j in range(weight.shape[1]):
        if j % grid.group == 0:
            part = slice(j, j + grid.group)
            scales = best_scales(grid, w[:, None, part].astype(np.float32), np.diag(hessian)[None, part])
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        column = w[:, j].copy()
        q = np.clip(np.rint(column / scales[:, 0].astype(np.float64)), grid.lowest, -grid.lowest - 1)
        values[:, j] = q * scales[:, 0]
        w[:, left] -= np.outer((column - values[:, j]) / inverse[0, 0], inverse[0])
        left.remove(j)
    return values


def test_gptq_is_the_textbook_s():
    """Before its scales are made unbiased, which keeps codes."""
    weight, (_, hessian) = drawn(8, 32), correlated(32)
    grid = Levels(3, 16, scale_dtype="F32")
    found = methods.load("gptq").quantise(weight, grid, hessian)
    slow = slow_gptq(weight, grid, hessian)
    growth = np.abs(found.values).sum(1) / np.abs(slow).sum(1)
    assert np.allclose(found.values, slow * growth[:, None], rtol=1e-4)


def test_rules_rank_as_they_should():
    """By the error of the output: the more a rule knows, the less it loses; zeros stay zeros under gptq."""
    weight, (x, hessian) = drawn(), correlated()
    weight[:, 5] = 0
    errors = {}
    for name, seen in (("round", None), ("search", None), ("search+", np.diag(hessian)), ("gptq", hessian)):
        found = methods.load(name.rstrip("+")).quantise(weight, Levels(3, 32), seen)
        errors[name] = float(np.square(x @ (weight - found.values).T).sum())
    assert errors["gptq"] < errors["search+"] < errors["search"] < errors["round"]
    assert not found.codes[:, 5].any()


def test_groups_have_to_divide_the_row():
    with pytest.raises(CoterieError, match="rows of 48 weights do not divide into groups of 32"):
        methods.load("round").quantise(drawn(2, 48), Levels(4, 32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_hold_numbers_from_the_lowest_bit_on(bits):
    """Number i of a row stands in bits i b to i b + b - 1 of the row's stream."""
    numbers = np.random.default_rng(0).integers(0, 2**bits, (3, 40))
    words = packed(numbers, bits)
    stream = [sum(int(n) << (i * bits) for i, n in enumerate(row)) for row in numbers]
    assert [[int(w) & 0xFFFFFFFF for w in row] for row in words] == [
        [(value >> (32 * i)) & 0xFFFFFFFF for i in range(words.shape[1])] for value in stream
    ]
    assert np.array_equal(unpacked(words, bits, 40), numbers)
