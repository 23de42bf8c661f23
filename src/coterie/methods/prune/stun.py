"""STUN's expert stage: cluster experts that behave alike, keep one of each cluster, without a forward pass.

Two experts whose router rows W_i, W_j are close are chosen for the same tokens, so one can stand for both:

    d_ij = lambda1 * ||W_i - W_j||_2 [/ ||W||_F] - lambda2 * a_ij / |mean(a)|

with a the co-activation counts. Complete linkage makes a cluster only of experts that are all close to each
other; each layer's dendrogram is computed once, and any budget is a cut through it, because the heights of
complete linkage never fall. `official_*` repeat the published program's rules instead, for comparison.

Source: Lee et al., STUN, arXiv 2409.06211, equation 7 and section 4.
Deviates: clusters of two, where "nearest to the mean" is a tie, keep the expert that is used more (`pair_winner`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from coterie.errors import CoterieError
from coterie.model.experts import Experts

NEEDS = "clusters"  # of router rows, weights for those of three or more, and statistics where they are given
SUMS = ("tokens", "coactivation")
Clusters = list[list[int]]
CANCELS = 1e-3  # of the squares' sum: above it, the expanded square is exact to a dozen digits
MERGE_BELOW = 3  # kappa


def distances(
    router: np.ndarray,
    coactivation: np.ndarray | None = None,
    *,
    lambda1: float = 1.0,
    lambda2: float = 0.0,
    normalise: bool = True,
) -> np.ndarray:
    """Behavioural distance d (E, E) in float64, symmetric, zero on the diagonal.

    router (E, D); coactivation (E, E) counts of tokens that chose both, needed when lambda2 is not 0.
    normalise divides the router's part by ||W||_F, which makes layers comparable.
    Raises: CoterieError when counts are missing or of another shape, and for distances out of range.
    """
    rows = router.astype(np.float64)
    result = np.zeros((len(rows), len(rows)))
    with np.errstate(over="ignore", invalid="ignore"):
        if lambda1:
            gap = pairwise(rows)
            norm = np.linalg.norm(rows) if normalise else 1.0
            result += lambda1 * gap / (norm or 1.0)
        if lambda2:
            result -= lambda2 * _shares(coactivation, len(rows))
    if not np.isfinite(result).all():
        raise CoterieError("--lambda1, --lambda2: distances overflow; give smaller numbers")
    np.fill_diagonal(result, 0.0)
    return result


def _shares(coactivation: np.ndarray | None, num_experts: int) -> np.ndarray:
    """Counts (E, E) over the absolute mean of them all, zero diagonal included."""
    shape = (num_experts, num_experts)
    if coactivation is None or coactivation.shape != shape:
        found = "none" if coactivation is None else f"shape {coactivation.shape}"
        raise CoterieError(f"lambda2 needs co-activation counts of shape {shape}; found {found}")
    return coactivation.astype(np.float64) / (np.abs(coactivation.mean()) or 1.0)


@dataclass(frozen=True)
class Dendrogram:
    """The merges of one set of experts in order: `joins[t]` = the two members' ids of step t, at `heights[t]`."""

    num_experts: int
    joins: tuple[tuple[int, int], ...]  # scipy's numbering: E + t is the cluster made at step t
    heights: tuple[float, ...]

    def cut(self, num_clusters: int) -> Clusters:
        """The clusters left after the first E - num_clusters merges, each ascending, ordered by first member."""
        clusters: dict[int, list[int]] = {e: [e] for e in range(self.num_experts)}
        for step, (a, b) in enumerate(self.joins[: self.num_experts - num_clusters]):
            clusters[self.num_experts + step] = sorted(clusters.pop(a) + clusters.pop(b))
        return sorted(clusters.values())


def dendrogram(distance: np.ndarray, linkage: str = "complete") -> Dendrogram:
    """Agglomerates (E, E) distances; the distance of two clusters is the largest (complete), mean
    (average) or smallest (single) between their members. Ties go to scipy's order, which is deterministic."""
    from scipy.cluster.hierarchy import linkage as agglomerate
    from scipy.spatial.distance import squareform

    if len(distance) < 2:
        return Dendrogram(len(distance), (), ())
    # scipy wants non-negative distances; a shift of all pairs changes no merge.
    shift = min(0.0, distance.min())
    condensed = squareform(distance - shift + shift * np.eye(len(distance)), checks=False)
    merges = agglomerate(condensed, method=linkage)
    joins = tuple((int(a), int(b)) for a, b in merges[:, :2])
    return Dendrogram(len(distance), joins, tuple(float(h) + shift for h in merges[:, 2]))


def cut_globally(heights: Sequence[Sequence[float]], num_merges: int, max_merges: Sequence[int]) -> list[int]:
    """How many merges each layer makes when all are cut at one height: the `num_merges` lowest of all layers.

    heights[l] ascend; max_merges[l] is the layer's floor on experts, as merges. Ties go to the earlier layer.
    Raises: CoterieError when the floors leave fewer merges than asked.
    """
    allowed = [(h, layer) for layer, hs in enumerate(heights) for h in hs[: max_merges[layer]]]
    if num_merges > len(allowed):
        raise CoterieError(
            f"the budget removes {num_merges} experts in all, but the layers' floors allow {len(allowed)}; "
            "lower --ratio or --min-experts"
        )
    counts = [0] * len(heights)
    for _, layer in sorted(allowed, key=lambda item: (item[0], item[1]))[:num_merges]:
        counts[layer] += 1
    return counts


def pairwise(rows: np.ndarray) -> np.ndarray:
    """||a - b||_2 of all pairs of rows (E, D), in float64: (E, E).

    By ||a||^2 + ||b||^2 - 2ab, which one product gives for all; where that cancels, so that its rounding would show,
    by differences: clones come out at exactly 0.
    """
    squares = (rows * rows).sum(axis=1)
    total = squares[:, None] + squares
    gaps = total - 2 * (rows @ rows.T)
    close = gaps < CANCELS * total
    for i, j in zip(*np.nonzero(np.triu(close, 1)), strict=True):
        gaps[i, j] = gaps[j, i] = ((rows[i] - rows[j]) ** 2).sum()
    np.fill_diagonal(gaps, 0.0)
    return np.sqrt(np.minimum(gaps, gaps.T))


def pair_winner(members: Sequence[int], norms: np.ndarray, tokens: np.ndarray | None = None) -> int:
    """Who stays of experts that tie: more routed tokens if counted, else the longer router row, else the lower id.

    norms: lengths of the router's rows (E,).
    """
    usage = np.zeros(len(norms)) if tokens is None else tokens
    return min(members, key=lambda e: (-usage[e], -norms[e], e))


def representative(
    members: Sequence[int], experts: Experts, norms: np.ndarray, tokens: np.ndarray | None = None
) -> int:
    """The member nearest to the mean of the members' weights: argmin_e ||theta_e - mean||_2.

    Streams: one expert and one mean in memory. Two members are equally near by construction: see `pair_winner`.
    """
    if len(members) < 3:
        return pair_winner(members, norms, tokens)
    mean = mean_of(experts.flat(e) for e in members)
    return min((float(np.linalg.norm(experts.flat(e) - mean)), e) for e in members)[1]


def mean_of(vectors: Iterable[np.ndarray]) -> np.ndarray:
    """The mean, accumulated in float64."""
    total, count = None, 0
    for vector in vectors:
        total = vector.astype(np.float64) if total is None else total + vector
        count += 1
    assert total is not None
    return total / count


# --- the published program ---------------------------------------------------------------------------------


def official_distances(
    router: np.ndarray,
    dtype: str,
    coactivation: np.ndarray | None = None,
    *,
    lambda1: float = 1.0,
    lambda2: float = 0.0,
    normalise: bool,
) -> np.ndarray:
    """Distances (E, E) in float32 as the program computes them: ||W||_F is rounded to the checkpoint's dtype.

    It has three modes (`is_official`). The diagonal is +inf, by which it rejects pairs already in one cluster.
    Raises: CoterieError for distances or a norm beyond the range of these types.
    """
    rows = router.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        gap = np.stack([np.linalg.norm(rows - row, axis=1) for row in rows]).astype(np.float32)
        norm = _rounded(np.float32(np.linalg.norm(rows)), dtype) if normalise and lambda1 else np.float32(1)
        result = np.float32(lambda1) * gap / (norm or np.float32(1))
        if lambda2:
            result -= np.float32(lambda2) * _shares(coactivation, len(rows)).astype(np.float32)
    if not np.isfinite(result).all() or not np.isfinite(norm):
        raise CoterieError("--linkage official: distances overflow the program's precision; use complete")
    np.fill_diagonal(result, np.inf)
    return result


def is_official(lambda1: float, lambda2: float, *, normalise: bool) -> bool:
    """Whether the program has such a distance: the router's alone (1, 0), normalised or not; -a / |mean(a)| alone
    (0, 1); or lambda2 of that added to the router's distance (1, any), which is not normalised then."""
    if lambda1 and lambda2:
        return lambda1 == 1 and not normalise
    return (lambda1, lambda2) in ((1, 0), (0, 1))


def _rounded(value: np.float32, dtype: str) -> np.float32:
    from coterie.storage.numerics import decode, encode

    try:
        raw = encode(np.array([value]), dtype, "router")
    except CoterieError:  # beyond the type's range
        return np.float32(np.inf)
    return decode(raw, dtype, "router").astype(np.float32)[0]


def official_clusters(distance: np.ndarray, threshold: float, max_merges: int) -> Clusters:
    """The program's relaxed complete linkage. Takes the closest pair (u, v) below the threshold while merges
    remain; joins their clusters if v is near all of u's cluster and u near all of v's (other pairs are not
    tested), else forgets the pair. With an infinite threshold the test always passes: single linkage.
    """
    d = distance.astype(distance.dtype, copy=True)
    np.fill_diagonal(d, np.inf)
    cluster = {e: [e] for e in range(len(d))}  # members, by any member; lists are shared
    merges = 0
    while merges < max_merges:
        u, v = np.unravel_index(np.argmin(d), d.shape)
        if not d[u, v] < threshold:
            break
        us, vs = cluster[int(u)], cluster[int(v)]
        if us is not vs and max(d[us, v].max(), d[vs, u].max()) < threshold:
            d[us, v] = d[v, us] = d[vs, u] = d[u, vs] = np.inf
            union = us + vs
            for e in union:
                cluster[e] = union
            merges += 1
        else:
            d[u, v] = d[v, u] = np.inf
    return sorted(sorted(c) for c in {id(c): c for c in cluster.values()}.values())


def official_global(matrices: Sequence[np.ndarray], target: int, threshold: float, step: float = 0.1) -> list[Clusters]:
    """The program's search for one threshold at which the clusters of all layers number exactly `target`.

    The step doubles before each use until the direction first turns, then halves.
    Raises: CoterieError where the program gives up: ten equal counts in a row (its count is not monotone in
    the threshold, so a target can be out of reach).
    """
    counts: list[int] = []
    direction, turned = 0, False
    while True:
        found = [official_clusters(d, threshold, len(d) - 1) for d in matrices]
        counts.append(sum(len(c) for c in found))
        if counts[-1] == target:
            return found
        if len(counts) >= 10 and len(set(counts[-10:])) == 1:
            raise CoterieError(
                f"--linkage official: the search for {target} experts in all stopped at {counts[-1]} ten times; "
                "try another --ratio, or --linkage complete, which reaches every count"
            )
        if len(counts) >= 1000:
            raise CoterieError(f"--linkage official: no threshold gives {target} experts in all after 1000 trials")
        now = 1 if counts[-1] > target else -1
        turned = turned or (direction != 0 and now != direction)
        step = step / 2 if turned else step * 2
        direction = now
        threshold += now * step
