"""MoE-Pruner: Wanda with each token weighted by the router's weight for the expert it visits.

Source: Xie et al., MoE-Pruner, arXiv 2410.12013. The weight enters the inputs of all three projections.
"""

import numpy as np

NEEDS = "gated norms"


def score(weight: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """|W_ij| * ||X_j . g||_2, (O, I) in float32; norms (I,) of the router-weighted tokens."""
    return np.abs(weight) * norms.astype(np.float32)
