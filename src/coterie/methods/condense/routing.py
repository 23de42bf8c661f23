"""Baseline: keep the experts that the router gives the most weight to.

Experts rank by sum_t g_i(x_t); their gates are the published ones (`official.fixed_gates`).
"""

from __future__ import annotations

import numpy as np

NEEDS = "routing"


def choose(gate_sums: np.ndarray, count: int) -> list[int]:
    """The `count` experts of largest routing mass (E,), largest first; ties go to the lower id.

    Experts that no token chose stay out: they have no gate.
    """
    order = np.argsort(-gate_sums, kind="stable")[:count]
    return [int(e) for e in order if gate_sums[e] > 0]
