"""Plain rounding: each group's scale covers its largest magnitude, and each weight takes the nearest level."""

import numpy as np

from coterie.methods.levels import Levels, Quantised, quantised

NEEDS = "nothing"


def quantise(weight: np.ndarray, levels: Levels, seen: np.ndarray | None = None) -> Quantised:
    """s = max |w| / (2^(b-1) - 1/2), rounded as scales are stored; the zero group has scale 0."""
    return quantised(levels, weight, levels.stored(levels.covering(levels.grouped(weight))))
