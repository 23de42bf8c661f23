"""Super experts: the few whose outputs hold extreme values, without which a model collapses, and which none may remove.

Their outliers become the massive activations between layers that attention needs; removing 3 of 6,144 in one model
takes an average of 69.4 to 4.0. Known from `output_max` of the statistics, so that guarding costs no pass of its own.

    a_e = max over tokens and channels of |f_e(x)|;  super if a_e > P99.5 of all, a_e > a_max / 10, and
    a_e > 10 x the median of its layer

Source: Su et al., arXiv 2507.23279, equation 6.
Deviates: the last condition replaces "in a layer where massive activations form", which takes a pass to know. Without
one or the other, half a percent of any model's experts would be called super, however ordinary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERCENTILE, OF_LARGEST, TIMES_MEDIAN = 99.5, 0.1, 10.0


def super_experts(largest: Sequence[np.ndarray]) -> list[list[int]]:
    """Ids per layer, of the layers' a_e (E,) each."""
    if not largest:
        return []
    everyone = np.concatenate(largest)
    threshold = max(np.percentile(everyone, PERCENTILE), OF_LARGEST * everyone.max())
    return [np.flatnonzero((a > threshold) & (a > TIMES_MEDIAN * np.median(a))).tolist() for a in largest]
