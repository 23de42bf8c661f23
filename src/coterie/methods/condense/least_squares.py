"""The experts and gates that reproduce a layer's output best, from the Gram matrix of all experts' outputs.

With outputs E_i(x) of every expert on every token and the layer's own output y(x): G_ij = sum_x <E_i, E_j>,
b_i = sum_x <E_i, y>. The squared error of a set S with gates w is |y|^2 - 2 w b_S + w G_SS w, smallest at
w = G_SS^-1 b_S, where it is |y|^2 - w b_S. The shared expert is a regressor that is always in the set.
Source: Pati et al., Orthogonal Matching Pursuit, Asilomar 1993.
Deviates: each step adds the expert that lowers the error most after all gates are solved again, which sees how
experts overlap; matching pursuit as published adds the one most correlated with what is left.
"""

from __future__ import annotations

import numpy as np

NEEDS = "moments"
DIGITS = 12  # of an explained share that count: less is rounding, not preference
CUTOFF = 1e-10  # singular values below this share of the largest are zero: an expert that repeats others


def choose(gram: np.ndarray, target: np.ndarray, count: int, fixed: int = 0) -> tuple[list[int], np.ndarray]:
    """(experts in the order chosen, gates): `count` of the first regressors; the last `fixed` are in from the start.

    gram (n, n) and target (n,) in float64; gates (count + fixed,), those of the fixed regressors last.
    Ties go to the lower id. Fewer come back where there are fewer.
    """
    num_free = len(target) - fixed
    always, chosen = list(range(num_free, len(target))), list[int]()
    for _ in range(min(count, num_free)):
        left = [e for e in range(num_free) if e not in chosen]
        gains = np.array([explained(gram, target, [*chosen, e, *always]) for e in left])
        scale = np.abs(gains).max() or 1.0
        chosen.append(left[int(np.argmax(np.round(gains / scale, DIGITS)))])
    return chosen, solve(gram, target, [*chosen, *always])


def solve(gram: np.ndarray, target: np.ndarray, members: list[int]) -> np.ndarray:
    """The gates of least squared error for a set: w = G_SS^-1 b_S, the shortest where several are as good.

    Regressors are scaled to length 1 first, so that large and small experts are told apart equally well.
    """
    if not members:
        return np.zeros(0)
    lengths = np.sqrt(np.diag(gram)[members])
    scale = np.where(lengths > 0, lengths, 1.0)
    scaled = gram[np.ix_(members, members)] / np.outer(scale, scale)
    return np.linalg.lstsq(scaled, target[members] / scale, rcond=CUTOFF)[0] / scale


def explained(gram: np.ndarray, target: np.ndarray, members: list[int]) -> float:
    """How much of |y|^2 the set explains with its best gates: w b_S."""
    return float(solve(gram, target, members) @ target[members])
