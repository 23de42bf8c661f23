"""Keep the experts that a constant could replace worst: chosen often, with outputs that vary (novices for the rest).

S_e = |X_e| * mean over x in X_e of ||f_e(x) - c_e||^2 = sum of ||f_e||^2 - |X_e| ||c_e||^2,  c_e the mean of f_e,

which is what the constant c_e gets wrong over all of its tokens.

Source: MoNE, arXiv 2507.00390: usage times the variance of outputs, over all channels together.
Deviates: experts that go are removed from the router too, not replaced by c_e: no stock layout holds constants.
"""

import numpy as np

from coterie.stats import mean

NEEDS = "stats"
SUMS = ("tokens", "output_norms_squared", "outputs")


def score(tokens: np.ndarray, output_norms_squared: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The sum of squared distances from the mean output, (E,), of sums (E,), (E,) and (E, D)."""
    return np.maximum(output_norms_squared - mean(np.square(outputs).sum(axis=1), tokens), 0.0)
