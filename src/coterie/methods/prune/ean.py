"""Keep the experts whose outputs are largest in all (expert activation norm), whatever their routing weights.

S_e = sum over x in X_e of ||f_e(x)||_2, X_e the tokens whose top-k holds expert e.

Source: the sum form of EAN, as compared with in Lasby et al., REAP, arXiv 2510.13999.
"""

import numpy as np

NEEDS = "stats"
SUMS = ("output_norms",)


def score(output_norms: np.ndarray) -> np.ndarray:
    """The sum of ||f_e(x)||, (E,)."""
    return output_norms
