"""Rounding with searched scales: those that change a layer's outputs least, were its inputs independent.

With E[x_j^2] = h_j, and inputs independent and of mean zero, an output's mean squared change is
sum_j h_j (w_j - w'_j)^2.
"""

import numpy as np

from coterie.methods.levels import Levels, Quantised, best_scales, quantised, unbiased

NEEDS = "squares"


def quantise(weight: np.ndarray, levels: Levels, seen: np.ndarray | None = None) -> Quantised:
    """The scales of `levels.best_scales`, weighted by `seen` (I,), or alike without data; the nearest levels; then
    scales that make up for what outputs shrank by (`levels.unbiased`)."""
    importance = np.ones(weight.shape[1], np.float32) if seen is None else seen
    scales = best_scales(levels, levels.grouped(weight), importance.reshape(-1, levels.group))
    return unbiased(quantised(levels, weight, scales), weight, weight * importance)
