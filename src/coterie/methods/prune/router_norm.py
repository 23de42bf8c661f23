"""Baseline: keep the experts whose router rows are longest."""

import numpy as np

from coterie.model.experts import Layer

NEEDS = "router"


def score(layer: Layer, generator: np.random.Generator) -> np.ndarray:
    """||W_e||_2 of each router row, (E,)."""
    return layer.norms
