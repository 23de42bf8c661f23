"""OWL: layers with more outliers keep more weights; inside a layer, Wanda.

D_l = 100 x share of the layer's Wanda scores above M x their mean; sparsities spread linearly in D_l over 2 lambda
around the target, the layer with most outliers keeping most.

Source: Yin et al., Outlier Weighed Layerwise Sparsity, arXiv 2310.05175.
Deviates: ratios are shifted so that the parameter-weighted mean, not the plain mean over layers, meets the target;
`weighted=False` is the published rule.
"""

from collections.abc import Iterable

import numpy as np

from coterie.methods.sparsify.wanda import NEEDS, score

PER_ROW = False
M = 3.0  # the published program's default
LAMBDA = 0.08
FLOOR = 0.01  # what the published program makes of a sparsity of zero or less

__all__ = ["NEEDS", "PER_ROW", "layer_sparsities", "outlier_share", "score"]


def outlier_share(scores: Iterable[np.ndarray], mean: float, m: float = M) -> float:
    """D = 100 x share of scores above m x mean; `scores` comes matrix by matrix, `mean` is over all of them."""
    above = total = 0
    for part in scores:
        above += int((part > m * mean).sum())
        total += part.size
    return 100.0 * above / total if total else 0.0


def layer_sparsities(
    outliers: np.ndarray, sparsity: float, sizes: np.ndarray, *, spread: float = LAMBDA, weighted: bool = True
) -> np.ndarray:
    """Sparsity of each layer (L,) from D (L,) and the layers' prunable weights (L,).

    s_l = S - (r_l - mean r), r_l = 2 lambda (D_l - min D)/(max D - min D). As published, s_l <= 0 becomes 0.01;
    weighted, s_l is clipped to [0, 1] and shifted until the weighted mean is S again.
    """
    gap = outliers.max() - outliers.min()
    r = 2 * spread * (outliers - outliers.min()) / gap if gap > 0 else np.zeros_like(outliers, dtype=float)
    if not weighted:
        s = sparsity - (r - r.mean())
        return np.where(s <= 0, FLOOR, np.minimum(s, 1.0))
    share = sizes / sizes.sum()
    low, high = sparsity - 2 * spread - 1, sparsity + 2 * spread + 1
    for _ in range(200):  # the clipped mean rises with the shift: bisection
        shift = (low + high) / 2
        if (share * np.clip(shift - r, 0, 1)).sum() < sparsity:
            low = shift
        else:
            high = shift
    return np.clip((low + high) / 2 - r, 0, 1)
