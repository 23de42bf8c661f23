"""CD-MoE's own choice: gates from the router, experts by the divergence of hidden states right after the layer, or, of
the last layer, after the final norm.

Source: Cao et al., Condense, Don't Just Prune, arXiv 2412.00069, and the program published with it.
Deviates: divergences are computed in float64, so that equal candidates tie, and the lower id wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

NEEDS = "divergences"
SAMPLES = 100
EPSILON = 1e-10  # added to both probabilities of a logarithm
DIGITS = 12  # of a divergence that count: less is rounding, not preference


def fixed_gates(gate_sums: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """(E,) the mean routing weight of each expert over the tokens that chose it; NaN where none did.

    w_i = sum_t g_i(x_t) / n_i over the n_i tokens t routed to i: conditional on selection, and not renormalised.
    """
    return np.divide(gate_sums, num_tokens, out=np.full(len(num_tokens), np.nan), where=num_tokens > 0)


def candidates(gates: np.ndarray) -> list[int]:
    """The experts that have a gate: one that no token chose cannot be kept."""
    return [int(e) for e in np.flatnonzero(np.isfinite(gates))]


def jensen_shannon(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """(T,) float64: the divergence of softmaxes over hidden features, token by token, of two (T, D).

    JS = KL(p || m)/2 + KL(q || m)/2, m = (p + q)/2, KL(a || b) = sum a ln(a/b) with 1e-10 added to a and b.
    """
    p, q = (states.double().softmax(-1) for states in (expected, found))
    logarithm = ((p + q) / 2 + EPSILON).log()
    p, q = p + EPSILON, q + EPSILON
    return ((p * (p.log() - logarithm)).sum(-1) + (q * (q.log() - logarithm)).sum(-1)) / 2


def choose(
    candidates: Sequence[int], count: int, divergences: Callable[[list[int], list[int]], Sequence[float]]
) -> list[int]:
    """Experts in the order chosen: each round adds the one whose set diverges least; ties go to the lower id.

    divergences: (chosen so far, candidates) -> the divergence of the layer with each candidate added.
    Fewer than `count` come back where there are fewer candidates.
    """
    chosen: list[int] = []
    for _ in range(min(count, len(candidates))):
        left = sorted(set(candidates) - set(chosen))
        found = divergences(chosen, left)
        chosen.append(min(zip(np.round(found, DIGITS).tolist(), left, strict=True))[1])
    return chosen
