"""Keep the experts whose outputs are largest on average (mean activation norm), whatever their routing weights.

S_e = 1/|X_e| * sum over x in X_e of ||f_e(x)||_2, X_e the tokens whose top-k holds expert e.

Source: arXiv 2606.15716, whose gate-free means did best where the task is not known beforehand.
"""

import numpy as np

from coterie.model.stats import mean

NEEDS = "stats"
SUMS = ("tokens", "output_norms")


def score(tokens: np.ndarray, output_norms: np.ndarray) -> np.ndarray:
    """The mean of ||f||, (E,); 0, the lowest, for an expert that no token chose."""
    return mean(output_norms, tokens)
