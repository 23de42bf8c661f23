"""Magnitude: the smallest weights go. Needs no data; the baseline, and what cold experts fall back to."""

import numpy as np

NEEDS = "nothing"


def score(weight: np.ndarray, norms: np.ndarray | None = None) -> np.ndarray:
    """|W_ij|, (O, I)."""
    return np.abs(weight)
