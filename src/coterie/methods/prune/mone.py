"""Keep the experts that a constant could replace worst: chosen often, with outputs that vary (novices for the rest).

S_e = |X_e| * mean over x in X_e of ||f_e(x) - c_e||^2 = sum of ||f_e||^2 - |X_e| ||c_e||^2,  c_e the mean of f_e,

which is what the constant c_e gets wrong over all of its tokens.

A token that chooses an expert that went gets c_e, times the weight that the router gives it (`--removed constant`, the
default here). No stock layout holds constants: `--removed remove` writes this choice as a stock checkpoint.

Source: MoNE, arXiv 2507.00390: usage times the variance of outputs, over all channels together.
Deviates: the program multiplies the mean routing weight by the root of that variance, which the paper calls access
frequency times variance; tokens times variance is what the constant gets wrong. It can also rank all layers together.
"""

import numpy as np

from coterie.model.stats import mean

NEEDS = "stats"
REMOVED = "constant"
SUMS = ("tokens", "output_norms_squared", "outputs")


def score(tokens: np.ndarray, output_norms_squared: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The sum of squared distances from the mean output, (E,), of sums (E,), (E,) and (E, D)."""
    return np.maximum(output_norms_squared - mean(np.square(outputs).sum(axis=1), tokens), 0.0)
