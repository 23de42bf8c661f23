"""STUN's expert stage: distances, dendrograms, budgets, representatives, and the published program's own rules."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.spatial.distance import squareform

from coterie.errors import CoterieError
from coterie.methods.prune import stun

INF = np.inf


def symmetric(pairs, n):
    """The symmetric matrix with these values above its diagonal, row by row."""
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n, 1)] = pairs
    return matrix + matrix.T


@st.composite
def matrices(draw, low=1, high=9):
    """Distance matrices without ties: the pairs are numbered in random order."""
    n = draw(st.integers(low, high))
    num_pairs = n * (n - 1) // 2
    return symmetric(np.array(draw(st.permutations(range(1, num_pairs + 1)))) / 4, n)


# --- distances ---------------------------------------------------------------------------------------------

ROUTER = np.array([[0, 0], [3, 4], [0, 8]], np.float32)  # ||W||_F = sqrt(25 + 64)


def test_distances_by_hand():
    """Three experts in two dimensions: 5, 8 and 5 apart; divided by ||W||_F unless raw."""
    expected = np.array([[0, 5, 8], [5, 0, 5], [8, 5, 0]])
    assert np.array_equal(stun.distances(ROUTER, normalise=False), expected)
    assert np.allclose(stun.distances(ROUTER), expected / np.sqrt(89), rtol=1e-15)


def test_coactivation_by_hand():
    """lambda2 subtracts counts over the absolute mean of all nine, zero diagonal included; lambda1 = 0 leaves that."""
    counts = np.array([[0, 3, 0], [3, 0, 6], [0, 6, 0]])  # mean 18 / 9 = 2
    alone = stun.distances(ROUTER, counts, lambda1=0, lambda2=1)
    assert np.array_equal(alone, [[0, -1.5, 0], [-1.5, 0, -3], [0, -3, 0]])
    both = stun.distances(ROUTER, counts, lambda1=2, lambda2=0.5, normalise=False)
    assert np.array_equal(both, [[0, 9.25, 16], [9.25, 0, 8.5], [16, 8.5, 0]])


@pytest.mark.parametrize("counts", [None, np.ones((2, 2))])
def test_missing_coactivation_is_refused(counts):
    """lambda2 without counts, or with counts of other experts, is refused."""
    with pytest.raises(CoterieError, match=r"lambda2 needs co-activation counts of shape \(3, 3\)"):
        stun.distances(ROUTER, counts, lambda2=1)


def test_coactivation_flips_a_merge():
    """Rows at 0, 3 and 5: 1 and 2 are nearest; but 0 and 1 are chosen together, and 3 - 2.25 < 2 (mean 4 / 9)."""
    router = np.array([[0], [3], [5]], np.float32)
    counts = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert stun.dendrogram(stun.distances(router, normalise=False)).cut(2) == [[0], [1, 2]]
    same = stun.distances(router, counts, lambda2=1, normalise=False)  # both pairs alike: nothing changes
    assert stun.dendrogram(same).cut(2) == [[0], [1, 2]]
    counts[1, 2] = counts[2, 1] = 0  # mean 2 / 9: 1 counts 4.5
    flipped = stun.distances(router, counts, lambda2=0.5, normalise=False)
    assert flipped[0, 1] == 3 - 0.5 * 4.5 and flipped[1, 2] == 2
    assert stun.dendrogram(flipped).cut(2) == [[0, 1], [2]]


def test_coactivation_keeps_clones_together():
    """Clones are chosen for the same tokens, so both parts of the distance say the same."""
    router = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    counts = np.array([[0, 1, 9, 1], [1, 0, 1, 9], [9, 1, 0, 1], [1, 9, 1, 0]])
    for lambdas in ((1, 0), (0, 1), (1, 1), (0.1, 2)):
        d = stun.distances(router, counts, lambda1=lambdas[0], lambda2=lambdas[1])
        assert stun.dendrogram(d).cut(2) == [[0, 2], [1, 3]]


def test_counts_without_any_token_say_nothing():
    """All zero: their mean divides nothing by zero."""
    assert np.array_equal(stun.distances(ROUTER, np.zeros((3, 3)), lambda2=1), stun.distances(ROUTER))


@pytest.mark.parametrize("lambdas", [{"lambda1": 1e308}, {"lambda2": 1e308}])
def test_distances_out_of_range_are_refused(lambdas):
    """A weight that makes distances infinite is refused, not clustered."""
    with pytest.raises(CoterieError, match="distances overflow"):
        stun.distances(ROUTER * 10, np.ones((3, 3)) * [1, 1, 1e10], normalise=False, **lambdas)


@given(st.integers(2, 8), st.integers(1, 5), st.integers(0, 2**32 - 1), st.booleans())
def test_distances_are_symmetric_and_clones_are_at_zero(n, width, seed, normalise):
    """d_ij = d_ji exactly, d_ii = 0, nothing is negative, and a cloned row is at exactly 0 from its original."""
    router = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    router[n - 1] = router[0]
    d = stun.distances(router, normalise=normalise)
    assert np.array_equal(d, d.T) and not d.diagonal().any() and (d >= 0).all()
    assert d[0, n - 1] == 0
    slow = [
        [np.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True))) for y in router] for x in router
    ]
    assert np.allclose(stun.distances(router, normalise=False), slow)


def test_a_router_of_zeros_has_no_distances():
    """The norm of a zero router divides nothing by zero."""
    assert not stun.distances(np.zeros((3, 2), np.float32)).any()


# --- dendrograms -------------------------------------------------------------------------------------------


def slow_agglomeration(d, farthest):
    """Merges the two nearest clusters again and again; yields the clusters before and after each merge."""
    clusters = [[e] for e in range(len(d))]
    yield sorted(clusters), None
    while len(clusters) > 1:
        gaps = {
            (i, j): farthest(d[a, b] for a in clusters[i] for b in clusters[j])
            for i, j in combinations(range(len(clusters)), 2)
        }
        i, j = min(gaps, key=gaps.get)
        clusters[i] = sorted(clusters[i] + clusters.pop(j))
        yield sorted(clusters), gaps[i, j]


@pytest.mark.parametrize(("linkage", "farthest"), [("complete", max), ("single", min)])
@given(matrices())
def test_every_cut_agrees_with_a_slow_agglomeration(linkage, farthest, d):
    """At every number of clusters, the partition and the height of its last merge are those of the definition."""
    tree = stun.dendrogram(d, linkage)
    for merges, (clusters, height) in enumerate(slow_agglomeration(d, farthest)):
        assert tree.cut(len(d) - merges) == clusters
        if merges:
            assert tree.heights[merges - 1] == height
    assert list(tree.heights) == sorted(tree.heights)


@given(matrices(), st.integers(1, 9))
def test_no_cluster_is_wider_than_its_height(d, num_clusters):
    """Complete linkage: members of a cluster are at most the last height apart, and each expert is in one cluster."""
    tree = stun.dendrogram(d)
    num_clusters = min(num_clusters, len(d))
    clusters = tree.cut(num_clusters)
    assert len(clusters) == num_clusters and sorted(e for c in clusters for e in c) == list(range(len(d)))
    last = ([0.0, *tree.heights])[len(d) - num_clusters]
    assert all(d[np.ix_(c, c)].max() <= last for c in clusters)


@given(matrices(low=2), st.floats(-3, 3))
def test_negative_distances_shift_the_heights_and_change_no_merge(d, shift):
    """Co-activation makes distances negative: the merges are those of the shifted matrix."""
    moved = d + shift * (1 - np.eye(len(d)))
    assert stun.dendrogram(moved).joins == stun.dendrogram(d).joins
    assert np.allclose(stun.dendrogram(moved).heights, np.array(stun.dendrogram(d).heights) + shift)


@given(st.data(), matrices(low=2))
def test_permuted_experts_give_permuted_clusters(data, d):
    """Numbering the experts otherwise changes names, not clusters, for ours and for the published rule."""
    order = data.draw(st.permutations(range(len(d))))
    shuffled = d[np.ix_(order, order)]  # the new expert i is the old order[i]

    def renamed(clusters):
        return sorted(sorted(order[e] for e in c) for c in clusters)

    for n in range(1, len(d) + 1):
        assert renamed(stun.dendrogram(shuffled).cut(n)) == stun.dendrogram(d).cut(n)
    threshold = data.draw(st.sampled_from([INF, *d.ravel()]))
    expected = stun.official_clusters(d, threshold, len(d) - 1)
    assert renamed(stun.official_clusters(shuffled, threshold, len(d) - 1)) == expected


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_duplicated_experts_cluster_first(n, seed):
    """Every expert cloned once: cut to half, each cluster is an expert and its clone, at height 0."""
    router = np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)
    tree = stun.dendrogram(stun.distances(np.concatenate([router, router])))
    assert tree.cut(n) == [[e, e + n] for e in range(n)]
    assert tree.heights[:n] == (0.0,) * n and tree.heights[n] > 0


def test_one_expert_and_none():
    """Nothing to merge gives nothing to cut."""
    assert stun.dendrogram(np.zeros((1, 1))).cut(1) == [[0]]
    assert stun.dendrogram(np.zeros((0, 0))).cut(0) == []


# --- a global budget ---------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.permutations(range(sum(sizes))), st.data())
    )
)
def test_one_height_cuts_all_layers(case):
    """Without ties, `cut_globally` is the threshold below which, floors respected, exactly so many merges lie."""
    sizes, numbers, data = case
    ends = np.cumsum(sizes)
    heights = [sorted(numbers[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    limits = [data.draw(st.integers(0, size)) for size in sizes]
    num_merges = data.draw(st.integers(0, sum(limits)))
    found = stun.cut_globally(heights, num_merges, limits)
    by_threshold = [
        [min(limit, sum(h < t for h in hs)) for hs, limit in zip(heights, limits, strict=True)]
        for t in range(sum(sizes) + 1)
    ]
    assert sum(found) == num_merges and found in by_threshold


def test_ties_of_a_global_cut_go_to_the_earlier_layer():
    """Equal heights: the first layer gives up an expert first."""
    assert stun.cut_globally([[1, 2], [1, 2]], 1, [2, 2]) == [1, 0]
    assert stun.cut_globally([[1, 2], [1, 2]], 3, [2, 2]) == [2, 1]


def test_floors_that_leave_too_little_are_refused():
    """More merges than the floors allow are refused with both numbers."""
    with pytest.raises(CoterieError, match=r"removes 4 experts in all, but .* allow 3"):
        stun.cut_globally([[1, 2], [1, 2]], 4, [1, 2])


# --- the published program ---------------------------------------------------------------------------------


def slow_official(d, threshold, max_merges):
    """The published rule, pair by pair: join when u's and v's own links to the other's cluster are all below."""
    n = len(d)
    link = {(i, j): float(d[i, j]) if i != j else INF for i in range(n) for j in range(n)}
    of = [frozenset([e]) for e in range(n)]
    while len(set(of)) > n - max_merges:
        u, v = min(link, key=link.get)
        if not link[u, v] < threshold:
            break
        tested = [(c, v) for c in of[u]] + [(c, u) for c in of[v]]
        if all(link[pair] < threshold for pair in tested):  # inside one cluster the diagonal, infinite, is tested
            for e in (union := of[u] | of[v]):
                of[e] = union
            forgotten = tested
        else:
            forgotten = [(u, v)]
        for i, j in forgotten:
            link[i, j] = link[j, i] = INF
    return sorted(sorted(c) for c in set(of))


@settings(max_examples=200)
@given(st.data(), matrices(high=8))
def test_official_clusters_agree_with_a_slow_transcription(data, d):
    """The same partition for every threshold and every allowance of merges."""
    threshold = data.draw(st.sampled_from([0.0, INF, *sorted(set(d.ravel()))]))
    max_merges = data.draw(st.integers(0, len(d) - 1))
    assert stun.official_clusters(d, threshold, max_merges) == slow_official(d, threshold, max_merges)


def test_the_relaxed_rule_differs_from_complete_linkage():
    """By hand: 0-1, 2-3, then 1-2 join below 10, as 1 is near {2, 3} and 2 near {0, 1}; yet 0 and 3 are 20 apart."""
    d = symmetric([1, 4, 20, 3, 5, 2], 4)  # 01 02 03 12 13 23
    assert stun.official_clusters(d, 10, 3) == [[0, 1, 2, 3]]
    assert stun.official_clusters(d, 4.5, 3) == [[0, 1], [2, 3]]  # d(1, 3) = 5 is tested and blocks
    tree = stun.dendrogram(d)
    assert tree.heights == (1, 2, 20) and tree.cut(2) == [[0, 1], [2, 3]]


def test_a_pair_at_the_threshold_does_not_join():
    """Below means below; and an allowance of none merges none."""
    d = symmetric([1.0], 2)
    assert stun.official_clusters(d, 1.0, 1) == [[0], [1]]
    assert stun.official_clusters(d, 1.0 + 1e-9, 1) == [[0, 1]]
    assert stun.official_clusters(d, INF, 0) == [[0], [1]]


@given(st.data(), matrices(low=2))
def test_an_infinite_threshold_is_single_linkage(data, d):
    """A fixed count of merges without a threshold gives scipy's single-linkage partition."""
    merges = data.draw(st.integers(0, len(d) - 1))
    labels = fcluster(scipy_linkage(squareform(d), "single"), len(d) - merges, "maxclust")
    expected = sorted([e for e in range(len(d)) if labels[e] == label] for label in set(labels))
    assert stun.official_clusters(d, INF, merges) == expected


def test_official_clusters_leave_their_input_alone():
    """The caller's matrix is not edited, whatever its diagonal holds."""
    d = symmetric([1, 4, 20, 3, 5, 2], 4)
    before = d.copy()
    stun.official_clusters(d, 10, 3)
    assert np.array_equal(d, before)


def test_official_distances_by_hand():
    """Float32, diagonal infinite; the norm is rounded to the checkpoint's dtype: sqrt(89) = 9.434 is 9.4375 in bf16."""
    raw = stun.official_distances(ROUTER, "BF16", normalise=False)
    assert raw.dtype == np.float32 and np.array_equal(raw, [[INF, 5, 8], [5, INF, 5], [8, 5, INF]])
    rounded = stun.official_distances(ROUTER, "BF16", normalise=True)
    assert rounded[0, 1] == np.float32(5) / np.float32(9.4375)
    exact = stun.official_distances(ROUTER, "F32", normalise=True)
    assert exact[0, 1] == np.float32(5) / np.float32(np.sqrt(89))


def test_official_coactivation_by_hand():
    """Over the absolute mean (18 / 9 = 2): alone -a / 2; mixed, m times that is added to the raw router distance."""
    counts = np.array([[0, 3, 0], [3, 0, 6], [0, 6, 0]])
    alone = stun.official_distances(ROUTER, "BF16", counts, lambda1=0, lambda2=1, normalise=True)
    assert alone.dtype == np.float32 and np.array_equal(alone, [[INF, -1.5, 0], [-1.5, INF, -3], [0, -3, INF]])
    mixed = stun.official_distances(ROUTER, "BF16", counts, lambda2=0.5, normalise=False)
    assert np.array_equal(mixed, [[INF, 4.25, 8], [4.25, INF, 3.5], [8, 3.5, INF]])
    with pytest.raises(CoterieError, match="needs co-activation counts"):
        stun.official_distances(ROUTER, "BF16", lambda2=0.5, normalise=False)


@pytest.mark.parametrize(
    ("lambda1", "lambda2", "normalise", "known"),
    [(1, 0, True, True), (1, 0, False, True), (0, 1, True, True), (1, 2, False, True), (1, 2, True, False),
     (0, 2, True, False), (2, 1, False, False), (2, 0, True, False), (0, 0, True, False)],
)  # fmt: skip
def test_the_published_program_has_three_distances(lambda1, lambda2, normalise, known):
    """Router alone, co-activation alone, or co-activation added to the router's undivided distance."""
    assert stun.is_official(lambda1, lambda2, normalise=normalise) is known


def test_official_distances_of_extreme_routers():
    """Zeros divide by nothing; a norm that half precision cannot hold is refused, not turned into zeros."""
    assert not stun.official_distances(np.zeros((2, 2), np.float32), "F32", normalise=True)[0, 1]
    large = np.array([[60000, 0], [0, 60000]], np.float32)
    assert stun.official_distances(large, "F32", normalise=True)[0, 1] == 1
    with pytest.raises(CoterieError, match="overflow"):
        stun.official_distances(large, "F16", normalise=True)
    with pytest.raises(CoterieError, match="overflow"):
        stun.official_distances(large * np.float32(1e30), "F32", normalise=False)


@given(st.lists(matrices(low=2, high=6), min_size=1, max_size=3), st.data())
@settings(max_examples=50)
def test_the_official_search_hits_its_target_or_says_so(layers, data):
    """The clusters of all layers number exactly the target, and belong to one threshold; or the search gives up."""
    target = data.draw(st.integers(len(layers), sum(map(len, layers))))
    try:
        found = stun.official_global(layers, target, 0.5)
    except CoterieError as error:
        assert "--linkage official" in str(error)
        return
    assert sum(map(len, found)) == target
    thresholds = sorted({float(v) for d in layers for v in d.ravel()} | {INF})
    assert found in [[slow_official(d, t, len(d) - 1) for d in layers] for t in thresholds]


def test_the_official_search_by_hand():
    """Two layers of two experts at distances 1 and 3: three clusters lie between the heights, five nowhere."""
    layers = [symmetric([1.0], 2), symmetric([3.0], 2)]
    assert stun.official_global(layers, 3, 0.5) == [[[0, 1]], [[0], [1]]]
    assert stun.official_global(layers, 2, 0.5) == [[[0, 1]], [[0, 1]]]
    assert stun.official_global(layers, 4, 5.0) == [[[0], [1]], [[0], [1]]]
    for out_of_reach in (1, 5):
        with pytest.raises(CoterieError, match="stopped at"):
            stun.official_global(layers, out_of_reach, 0.5)


# --- who stays ---------------------------------------------------------------------------------------------


class Vectors:
    """Experts as given vectors, counting how often each is read."""

    def __init__(self, *vectors):
        self.vectors = [np.array(v, np.float32) for v in vectors]
        self.reads = []

    def flat(self, e):
        self.reads.append(e)
        return self.vectors[e]


def test_the_representative_is_nearest_to_the_mean():
    """Members (0, 0), (2, 1) and (4, 5): the mean is (2, 2), and the second member is nearest."""
    experts = Vectors((9, 9), (0, 0), (2, 1), (4, 5))
    assert stun.representative([1, 2, 3], experts, np.zeros(4)) == 2
    assert sorted(experts.reads) == [1, 1, 2, 2, 3, 3]


def test_members_equally_near_leave_the_lower_id():
    """A square's corners are equally near to its middle."""
    experts = Vectors((1, 1), (1, -1), (-1, 1), (-1, -1))
    assert stun.representative([0, 1, 2, 3], experts, np.zeros(4)) == 0
    assert stun.representative([3, 2, 1], Vectors(*experts.vectors[:1], (0, 0), (0, 0), (0, 0)), np.zeros(4)) == 1


@given(st.integers(3, 6), st.integers(0, 2**32 - 1))
def test_the_representative_against_a_slow_definition(n, seed):
    """argmin of the distance to the mean, over stacked vectors in float64."""
    vectors = np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32)
    mean = vectors.astype(np.float64).mean(0)
    expected = int(np.argmin([np.sqrt(((v - mean) ** 2).sum()) for v in vectors]))
    assert stun.representative(range(n), Vectors(*vectors), np.zeros(n)) == expected


def test_one_and_two_members_need_no_weights():
    """Alone, an expert stands for itself; of two, the tie rule decides, and no weight is read."""
    experts = Vectors((0, 0), (1, 1))
    assert stun.representative([1], experts, np.array([1, 2])) == 1
    assert stun.representative([0, 1], experts, np.array([1, 2])) == 1
    assert experts.reads == []


def test_of_a_pair_stays_the_one_more_used_then_longer_then_lower():
    """More routed tokens first; else the longer router row; else the lower id."""
    norms = np.array([5, 4, 5])
    assert stun.pair_winner([0, 1], norms, np.array([1, 2, 2])) == 1
    assert stun.pair_winner([1, 2], norms, np.array([1, 2, 2])) == 2
    assert stun.pair_winner([1, 0], norms) == 0
    assert stun.pair_winner([2, 0], norms) == 0
    assert stun.representative([0, 1], Vectors(), norms, np.array([1, 2, 2])) == 1


def test_means_accumulate_in_float64():
    """One beside a hundred million survives, where float32 would lose it."""
    vectors = [np.array([1e8], np.float32), np.array([1], np.float32), np.array([-1e8], np.float32)]
    assert stun.mean_of(vectors)[0] == 1 / 3


def test_pairwise_distances_are_the_slow_ones():
    """All pairs at once agree with one difference after the other; near pairs to full precision, clones exactly."""
    rows = np.random.default_rng(0).normal(size=(7, 50))
    rows[3], rows[5] = rows[1], rows[1] * (1 + 1e-9)
    slow = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in rows] for a in rows])
    found = stun.pairwise(rows)
    assert found[1, 3] == 0 and (found == found.T).all()
    np.testing.assert_allclose(found, slow, rtol=1e-12)
