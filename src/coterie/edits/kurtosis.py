"""Kurtosis of weights that never are in memory together, from their power sums.

K = E[((w - mu) / sigma)^4], of the weights that are left: zeros do not count. STUN argues with it: pruning experts
leaves it where it was, zeroing small weights lowers it, so that experts should go first. A normal distribution has 3.
Source: Lee et al., STUN, arXiv 2409.06211, section on robustness.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from coterie.model.experts import expert_matrices
from coterie.model.layer import Model

CHUNK = 1 << 16  # weights at a time: they stay in cache, and sums of so many float32 are still exact enough


@dataclass
class Moments:
    """Sums of w^0 to w^4."""

    sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    def add(self, weights: np.ndarray, num_left: int | None = None) -> None:
        """Adds float32 weights of any shape; of pruned ones, only the `num_left` that are not zero count."""
        flat = weights.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            w = flat[start : start + CHUNK]
            square = w * w
            found = (w.size, w.sum(), w @ w, square @ w, square @ square)
            self.sums = [total + float(value) for total, value in zip(self.sums, found, strict=True)]
        if num_left is not None:
            self.sums[0] -= weights.size - num_left

    def __add__(self, other: Moments) -> Moments:
        return Moments([a + b for a, b in zip(self.sums, other.sums, strict=True)])

    @property
    def kurtosis(self) -> float | None:
        """K, or nothing for weights that are all alike."""
        n, *powers = self.sums
        if not n:
            return None
        mean, m2, m3, m4 = (p / n for p in powers)
        variance = m2 - mean**2
        fourth = m4 - 4 * mean * m3 + 6 * mean**2 * m2 - 3 * mean**4
        return fourth / variance**2 if variance > 0 else None


def of_experts(model: Model) -> float | None:
    """K of all weights in the ordinary layers' experts that are not zero, one expert after the other."""
    found = Moments()
    for block in model.main:
        for e in range(block.num_experts):
            for matrix in expert_matrices(model.checkpoint, block, e):
                if matrix is not None:
                    found.add(np.ascontiguousarray(matrix), int(np.count_nonzero(matrix)))
    return found.kurtosis
