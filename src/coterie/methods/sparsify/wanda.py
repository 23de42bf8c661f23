"""Wanda: weights times the norm of what they multiply.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695, equation 1.
"""

import numpy as np

NEEDS = "norms"


def score(weight: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """|W_ij| * ||X_j||_2, (O, I) in float32; norms (I,) over the tokens that reach the matrix."""
    return np.abs(weight) * norms.astype(np.float32)
