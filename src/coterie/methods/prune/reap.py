"""Keep the experts that add most to the layer's output where they are chosen (router-weighted expert activation).

S_e = 1/|X_e| * sum over x in X_e of g_e(x) ||f_e(x)||_2, X_e the tokens whose top-k holds expert e.

g is the weight that the model multiplies the output by: normalised over the top-k, scaled, softmax or sigmoid, as the
model does. A mean over its own tokens: a specialist that is rarely chosen and then decisive stays.

Source: Lasby et al., REAP, arXiv 2510.13999; its program normalises the weights since March 2026 too.
"""

import numpy as np

from coterie.model.stats import mean

NEEDS = "stats"
SUMS = ("tokens", "gated_output_norms")


def score(tokens: np.ndarray, gated_output_norms: np.ndarray) -> np.ndarray:
    """The mean of g ||f||, (E,); 0, the lowest, for an expert that no token chose."""
    return mean(gated_output_norms, tokens)
