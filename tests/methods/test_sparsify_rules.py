"""Which weights inside an expert become zero: selection, each rule by hand, OWL's ratios, SparseGPT against loops."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.edits.budget import row_zeros
from coterie.errors import CoterieError
from coterie.methods import masks, sparsify
from coterie.methods.masks import choose, lowest_per_group, lowest_per_row, zero
from coterie.methods.sparsify import magnitude, moe_pruner, owl, sparsegpt, wanda

# --- rules by name ------------------------------------------------------------------------------------------------


def test_every_rule_is_a_file():
    """The names are those of the files; each loads and says what it needs."""
    assert sparsify.names() == ["magnitude", "moe-pruner", "owl", "sparsegpt", "wanda"]
    needs = {name: sparsify.load(name).NEEDS for name in sparsify.names()}
    assert needs == {
        "magnitude": "nothing", "moe-pruner": "gated norms", "owl": "norms", "sparsegpt": "hessian", "wanda": "norms",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["select", "moe_pruner", "Wanda", "", "../prune/stun"])
def test_other_names_are_refused(name):
    """Whatever is no rule is refused with the list of rules."""
    with pytest.raises(CoterieError, match="expected one of magnitude, moe-pruner, owl, sparsegpt, wanda"):
        sparsify.load(name)


# --- selection ----------------------------------------------------------------------------------------------------


def slow_lowest(row, count):
    """The columns of the `count` lowest scores: a stable sort puts the lower column of equal scores first."""
    chosen = sorted(range(len(row)), key=lambda j: row[j])[:count]
    return [j in chosen for j in range(len(row))]


matrices = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 9).flatmap(
        lambda columns: st.tuples(
            # few values, so that ties are many
            st.lists(st.lists(st.integers(0, 3), min_size=columns, max_size=columns), min_size=rows, max_size=rows),
            st.lists(st.integers(0, columns), min_size=rows, max_size=rows),
        )
    )
)


@given(matrices)
def test_the_lowest_of_each_row_are_those_of_a_stable_sort(case):
    """Exactly as many as asked of each row, and of equal scores the lower column."""
    scores, counts = np.array(case[0], np.float32), np.array(case[1])
    mask = lowest_per_row(scores, counts)
    assert mask.tolist() == [slow_lowest(row, n) for row, n in zip(case[0], case[1], strict=True)]
    assert (mask.sum(1) == counts).all()


def test_equal_scores_go_from_the_left():
    """All equal, as where no token came: the first columns go, none twice."""
    mask = lowest_per_row(np.zeros((2, 4), np.float32), np.array([3, 1]))
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False]]


@st.composite
def hard_scores(draw):
    """Scores with many ties, zeros, infinities and NaN, in any float, and how many of each row to take."""
    rows, columns, kinds = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 50))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = np.concatenate([random.exponential(size=kinds), [0, np.inf, np.nan]])
    scores = random.choice(values, (rows, columns)).astype(draw(st.sampled_from(["f2", "f4", "f8"])))
    counts = random.integers(0, columns + 1, rows)
    return scores, np.sort(counts)[::-1] if draw(st.booleans()) else counts


@given(hard_scores(), st.sampled_from([1, 30, 200, 1 << 16]))
def test_the_same_whatever_the_scores_and_however_the_rows_are_taken(case, chunk):
    """Equal to a stable sort, which puts NaN last, whichever rows share a chunk of the work."""
    scores, counts = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "CHUNK", chunk)
        mask = lowest_per_row(scores, counts)
    places = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1, kind="stable")
    assert np.array_equal(mask, places < counts[:, None])


def test_a_negative_score_is_a_defect():
    """Scores are compared by their bits, where a negative one would come out on the wrong side."""
    for score in (-1.0, -0.0):
        with pytest.raises(AssertionError, match="never negative"):
            lowest_per_row(np.array([[1.0, score]]), np.array([1]))


@given(hard_scores(), st.sampled_from([7, 100, 1 << 16]), st.sampled_from([None, (1, 2), (2, 4), (3, 4)]))
def test_choosing_scores_and_selects_a_few_rows_at_a_time(case, chunk, pattern):
    """The mask is that of all scores at once, by row or by pattern; no call of the rule sees more than a chunk."""
    scores, counts = case
    weight = np.resize(np.nan_to_num(scores, posinf=9), (len(scores), 4 * scores.shape[1])).astype(np.float32)
    seen = []

    def score(part):
        seen.append(part.shape)
        return magnitude.score(part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "CHUNK", chunk)
        found = choose(-weight, score, counts, pattern)
    assert np.array_equal(found, lowest_per_group(weight, *pattern) if pattern else lowest_per_row(weight, counts))
    assert sum(rows for rows, _ in seen) == len(weight)
    assert all(rows == 1 or rows * columns <= chunk for rows, columns in seen)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "u1", "u2"])
def test_zeroing_sets_the_bits_to_zero(dtype):
    """Masked values become 0 and not -0, whatever stood there; the others keep every bit."""
    values = np.array([[-1.5, np.inf, np.nan, 1e-40], [-np.inf, 2, -0.0, -3]], "f4").view("u1").view(dtype)
    mask = np.random.default_rng(0).random(values.shape) < 0.5
    found = values.copy()
    zero(found, mask)
    bits = f"u{values.itemsize}"
    assert np.array_equal(found.view(bits), np.where(mask, 0, values.view(bits)))


def test_zeroing_a_view_leaves_the_rest():
    """Rows, columns and transposed views are zeroed where they are."""
    values = np.ones((4, 6), np.float32)
    zero(values[1:3, ::2].T, np.array([[True, False], [False, False], [False, True]]))
    assert np.argwhere(values == 0).tolist() == [[1, 0], [2, 4]]


@given(matrices, st.integers(1, 3), st.integers(0, 3))
def test_a_pattern_takes_the_lowest_of_each_group(case, groups, n):
    """n of every three consecutive scores, each group as if it were a row."""
    scores = np.resize(np.array(case[0], np.float32), (len(case[0]), 3 * groups))
    mask = lowest_per_group(scores, n, 3)
    for row, found in zip(scores, mask, strict=True):
        for g in range(0, len(row), 3):
            assert found[g : g + 3].tolist() == slow_lowest(row[g : g + 3], n)


def test_a_pattern_must_divide_the_rows():
    """Groups never run over the end of a row, even where the matrix as a whole would divide."""
    with pytest.raises(CoterieError, match="pattern 2:4: rows of 6 weights do not divide into groups of 4"):
        lowest_per_group(np.zeros((2, 6)), 2, 4)
    for n, m in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(CoterieError, match="expected N zeros in every M"):
            lowest_per_group(np.zeros((2, 4)), n, m)


def test_groups_may_be_long():
    """Of 300 equal scores the first 280 go, as in a row."""
    assert lowest_per_group(np.ones((2, 300), np.float32), 280, 300).tolist() == [[True] * 280 + [False] * 20] * 2


@given(st.integers(1, 50), st.integers(1, 50), st.decimals(0, 1, places=3))
def test_counts_per_row(rows, columns, sparsity):
    """All zeros of a matrix over its rows as evenly as can be: the first rows take one more."""
    num_zeros = round(Fraction(str(sparsity)) * rows * columns)
    counts = row_zeros(rows, num_zeros)
    assert counts.sum() == num_zeros and counts.max() - counts.min() <= 1 and counts.max() <= columns
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)


def test_none_and_all():
    """No zeros take nothing and six of six weights take all."""
    scores = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert not lowest_per_row(scores, row_zeros(2, 0)).any()
    assert lowest_per_row(scores, row_zeros(2, 6)).all()


# --- scores -------------------------------------------------------------------------------------------------------

WEIGHT = np.array([[4, -1, 0.5], [-2, 3, 1]], np.float32)


def test_magnitude_by_hand():
    """|W|, whatever is known of the tokens."""
    expected = [[4, 1, 0.5], [2, 3, 1]]
    assert magnitude.score(WEIGHT).tolist() == expected
    assert magnitude.score(WEIGHT, np.array([9.0, 9, 9])).tolist() == expected


def test_wanda_by_hand():
    """Tokens (3, 0, 1) and (4, 1, 0): channel norms 5, 1, 1, by which each column is multiplied."""
    x = np.array([[3, 0, 1], [4, 1, 0]], np.float64)
    found = wanda.score(WEIGHT, np.sqrt((x**2).sum(0)))
    assert found.dtype == np.float32
    assert found.tolist() == [[20, 1, 0.5], [10, 3, 1]]
    assert owl.score is wanda.score


def test_moe_pruner_by_hand():
    """Gates 1 and 1/2: tokens (3, 0, 1) and (2, .5, 0), so that the norms are sqrt(13), 1/2 and 1."""
    x, gates = np.array([[3, 0, 1], [4, 1, 0]]), np.array([1, 0.5])
    found = moe_pruner.score(WEIGHT, np.sqrt(((x * gates[:, None]) ** 2).sum(0)))
    np.testing.assert_allclose(found, np.abs(WEIGHT) * [13**0.5, 0.5, 1], rtol=1e-7)
    assert lowest_per_row(found, np.array([2, 1])).tolist() == [[False, True, True], [False, False, True]]


def test_scores_leave_the_weights_alone():
    """Nothing is edited in place."""
    before = WEIGHT.copy()
    for rule in (magnitude, wanda, moe_pruner):
        rule.score(WEIGHT, np.ones(3))[:] = 0
    assert np.array_equal(WEIGHT, before)


# --- OWL ----------------------------------------------------------------------------------------------------------


def test_outlier_share_by_hand():
    """Eight scores of mean 2: above 3 x 2 there is one, above 1 x 2 two, and equal to the limit is not above."""
    parts = [np.array([[7.0, 0, 0], [6, 1, 1]]), np.array([[1.0, 0]])]
    assert owl.outlier_share(parts, 2.0) == 100 / 8
    assert owl.outlier_share(parts, 2.0, m=1) == 100 * 2 / 8
    assert owl.outlier_share(iter(parts), 2.0, m=3.5) == 0
    assert owl.outlier_share([], 0.0) == 0


def test_published_ratios_by_hand():
    """Outliers 0, 1, 4: r = 0, .04, .16 of mean 1/15; the layer with most outliers keeps most."""
    found = owl.layer_sparsities(np.array([0.0, 1, 4]), 0.5, np.ones(3), weighted=False)
    np.testing.assert_allclose(found, [0.5 + 0.2 / 3, 0.46 + 0.2 / 3, 0.34 + 0.2 / 3], rtol=1e-12)


# Shares in percent, to the ninth decimal: the quotient of gaps of 1e-300 would be zero.
ratios = st.lists(st.integers(0, 10**11).map(lambda n: n / 10**9), min_size=2, max_size=12).map(np.array)
seeds = st.integers(0, 2**32 - 1)


@given(ratios, st.floats(0.2, 0.8), st.floats(0.01, 0.1))
def test_published_ratios_spread_over_twice_lambda(outliers, sparsity, spread):
    """Far from 0 and 1 the plain mean is S and the spread exactly 2 lambda; sizes do not matter."""
    found = owl.layer_sparsities(outliers, sparsity, np.arange(1, len(outliers) + 1), spread=spread, weighted=False)
    assert found.mean() == pytest.approx(sparsity, abs=1e-12)
    width = 2 * spread if outliers.max() > outliers.min() else 0
    assert found.max() - found.min() == pytest.approx(width, abs=1e-12)


def test_a_published_ratio_of_zero_or_less_becomes_a_hundredth():
    """At S = .08 with outliers 0 and 1, s = .16 and 0: the published program writes .01; above 1 stays 1."""
    assert owl.layer_sparsities(np.array([0.0, 1]), 0.08, np.ones(2), weighted=False).tolist() == [0.16, 0.01]
    assert owl.layer_sparsities(np.array([0.0, 1]), 0.02, np.ones(2), weighted=False)[1] == 0.01
    assert owl.layer_sparsities(np.array([0.0, 1]), 0.99, np.ones(2), weighted=False)[0] == 1.0
    assert owl.layer_sparsities(np.array([2.0, 2]), 0.3, np.ones(2), weighted=False).tolist() == [0.3, 0.3]


@given(ratios, st.floats(0, 1), st.floats(0, 0.6), seeds)
def test_weighted_ratios_meet_the_sparsity_by_parameters(outliers, sparsity, spread, seed):
    """Whatever is clipped, the mean over parameters is S to 1e-12, in [0, 1], and falls as outliers rise."""
    sizes = np.random.default_rng(seed).integers(1, 10**9, len(outliers))
    found = owl.layer_sparsities(outliers, sparsity, sizes, spread=spread)
    assert (found * (sizes / sizes.sum())).sum() == pytest.approx(sparsity, abs=1e-12)
    assert found.min() >= 0 and found.max() <= 1
    assert found.max() - found.min() <= 2 * spread + 1e-12
    assert (np.diff(found[np.argsort(outliers)]) <= 1e-12).all()


def test_weighted_equals_published_for_layers_alike():
    """Where all layers have as many weights and nothing is clipped, the two rules are one."""
    outliers, sizes = np.array([1.0, 5, 2, 2]), np.full(4, 7)
    published = owl.layer_sparsities(outliers, 0.6, sizes, weighted=False)
    np.testing.assert_allclose(owl.layer_sparsities(outliers, 0.6, sizes), published, atol=1e-12)


# --- SparseGPT ----------------------------------------------------------------------------------------------------


def tokens(seed, num_tokens, columns, *, dead=()):
    """Correlated inputs (T, I), so that columns can make up for one another; `dead` channels never fire."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(num_tokens, columns)) @ (np.eye(columns) + 0.1 * draw.normal(size=(columns, columns)))
    x[:, list(dead)] = 0
    return x


def inverse_block(hessian, j):
    """[H_j:]^-1, by which the paper's equation 3 corrects the columns from j on."""
    return np.linalg.inv(hessian[j:, j:])


def slow_sparsegpt(weight, x, num_zeros, *, pattern=None, size=128):
    """Column by column from the paper's text, with the inverse of what is left of H instead of a factor.

    The error of column j is w_j / [H_j:]^-1_00, its score w_j^2 / [H_j:]^-1_00, and the columns after take
    -error x the first row of [H_j:]^-1. Returns the weights and the mask.
    """
    w = weight.astype(np.float64)
    rows, columns = w.shape
    hessian = np.zeros((columns, columns))
    for token in x:
        hessian += 2 / len(x) * np.outer(token, token)
    fired = [j for j in range(columns) if hessian[j, j] > 0]
    mean = sum(hessian[j, j] for j in fired) / len(fired)
    for j in range(columns):
        hessian[j, j] += 0.01 * mean if j in fired else 1.01 * mean
    mask = np.zeros(w.shape, dtype=bool)
    cost = [inverse_block(hessian, j)[0, 0] for j in range(columns)]

    def score(r, j):
        return w[r, j] ** 2 / cost[j] if j in fired else 0.0

    done = 0
    for j in range(columns):
        if pattern is None and j % size == 0:
            block = range(j, min(j + size, columns))
            wanted = num_zeros * block.stop // columns - done
            done += wanted
            places = sorted((score(r, c), r, c) for r in range(rows) for c in block)
            for _, r, c in places[:wanted]:
                mask[r, c] = True
        if pattern and j % pattern[1] == 0:
            for r in range(rows):
                for _, c in sorted((score(r, c), c) for c in range(j, j + pattern[1]))[: pattern[0]]:
                    mask[r, c] = True
        inverse = inverse_block(hessian, j)
        for r in range(rows):
            if mask[r, j]:
                error = w[r, j] / inverse[0, 0]
                for k in range(j, columns):
                    w[r, k] -= error * inverse[0, k - j]
                w[r, j] = 0.0
    return w, mask


def case(seed, rows, columns, *, num_tokens=None, dead=()):
    x = tokens(seed, num_tokens or 3 * columns, columns, dead=dead)
    return np.random.default_rng(seed + 1).normal(size=(rows, columns)).astype(np.float32), x


def check_against_loops(weight, x, num_zeros, pattern=None):
    found = sparsegpt.prune(weight, x.T @ x, num_zeros, pattern=pattern)
    slow, mask = slow_sparsegpt(weight, x, num_zeros, pattern=pattern)
    assert np.array_equal(found == 0, mask)
    np.testing.assert_allclose(found, slow, rtol=1e-8, atol=1e-9)
    return found


@pytest.mark.parametrize("dead", [(), (0, 5)], ids=["alive", "dead"])
@pytest.mark.parametrize("num_zeros", [0, 1, 30, 59, 60])
def test_sparsegpt_equals_slow_loops(num_zeros, dead):
    """The factor's rows are those of the shrinking inverse: weights agree to 1e-8, zeros exactly."""
    check_against_loops(*case(num_zeros, 5, 12, dead=dead), num_zeros)


@pytest.mark.parametrize("dead", [(), (1, 2, 3)], ids=["alive", "dead"])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (0, 4), (4, 4)])
def test_sparsegpt_with_a_pattern_equals_slow_loops(pattern, dead):
    """Each group is chosen at its first column, on the weights as corrected so far."""
    found = check_against_loops(*case(3, 4, 16, dead=dead), 0, pattern)
    assert ((found == 0).reshape(4, -1, pattern[1]).sum(2) == pattern[0]).all()


@pytest.mark.parametrize(("columns", "pattern"), [(128, None), (130, None), (132, (2, 4)), (129, (1, 3))])
def test_sparsegpt_over_the_edge_of_a_block(columns, pattern):
    """Blocks of 128 columns share the zeros by their size; corrections cross the edge, groups of a pattern do not."""
    found = check_against_loops(*case(columns, 3, columns, num_tokens=200), 3 * columns // 2, pattern)
    if columns == 130:
        assert (found[:, :128] == 0).sum() == 195 * 128 // 130 and (found == 0).sum() == 195


def test_the_scale_of_the_hessian_does_not_matter():
    """The sum over tokens and the published mean times two give the same weights, dead channels or not."""
    weight, x = case(7, 4, 10, dead=(2,))
    found = sparsegpt.prune(weight, x.T @ x, 20)
    np.testing.assert_allclose(sparsegpt.prune(weight, 2 / len(x) * x.T @ x, 20), found, rtol=1e-9, atol=1e-12)


def test_no_zeros_change_nothing():
    """Nothing asked, nothing changed, dead channels included; all asked, nothing left."""
    weight, x = case(1, 3, 8, dead=(0, 1))
    assert np.array_equal(sparsegpt.prune(weight, x.T @ x, 0), weight)
    assert not sparsegpt.prune(weight, x.T @ x, weight.size).any()


def test_dead_channels_go_first_and_no_more_than_asked():
    """Of weights no token ever met, exactly as many go as asked, and the others stay as they were."""
    weight, x = case(1, 3, 8, dead=(2, 6))
    found = sparsegpt.prune(weight, x.T @ x, 4)
    assert np.flatnonzero(found == 0).tolist() == [2, 6, 8 + 2, 8 + 6]
    assert np.array_equal(found[found != 0], weight[found != 0])
    nothing = sparsegpt.prune(weight, np.zeros((8, 8)), 5)
    assert (nothing == 0).sum() == 5


def test_few_tokens_are_enough():
    """Fewer tokens than channels leave H singular; damping makes it invertible and the count is still exact."""
    weight, x = case(2, 6, 40, num_tokens=3)
    found = sparsegpt.prune(weight, x.T @ x, 100)
    assert np.isfinite(found).all() and (found == 0).sum() == 100


@given(seeds, st.integers(1, 7))
def test_sparsegpt_loses_no_more_than_magnitude(seed, tenths):
    """At the same number of zeros, ||W x - W' x|| over the tokens is not above magnitude's.

    No theorem (the rule is greedy, and on inputs all of one scale magnitude can win by a few percent), but the
    claim on channels as unequal as activations are; nor does it lose more than zeroing the same weights would.
    """
    weight, x = case(seed, 8, 20, num_tokens=80)
    x = x * np.exp(np.random.default_rng(seed + 2).normal(size=20))
    num_zeros = weight.size * tenths // 10
    mask = lowest_per_row(magnitude.score(weight).reshape(1, -1), np.array([num_zeros])).reshape(weight.shape)
    found = sparsegpt.prune(weight, x.T @ x, num_zeros)
    assert (found == 0).sum() == num_zeros
    lost = np.linalg.norm(x @ (weight - found).T)
    assert lost <= np.linalg.norm(x @ np.where(mask, weight, 0).T)
    assert lost <= np.linalg.norm(x @ np.where(found == 0, weight, 0).T)
