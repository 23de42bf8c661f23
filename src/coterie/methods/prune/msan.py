"""Keep the experts whose squared outputs are largest on average (mean squared activation norm).

S_e = 1/|X_e| * sum over x in X_e of ||f_e(x)||_2^2, X_e the tokens whose top-k holds expert e.

Source: arXiv 2606.15716.
"""

import numpy as np

from coterie.model.stats import mean

NEEDS = "stats"
SUMS = ("tokens", "output_norms_squared")


def score(tokens: np.ndarray, output_norms_squared: np.ndarray) -> np.ndarray:
    """The mean of ||f||^2, (E,); 0, the lowest, for an expert that no token chose."""
    return mean(output_norms_squared, tokens)
