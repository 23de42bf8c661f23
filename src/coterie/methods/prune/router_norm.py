"""Baseline: keep the experts whose router rows are longest."""

import numpy as np

from coterie.model.experts import Layer

NEEDS = "router"


def score(layer: Layer, generator: np.random.Generator) -> np.ndarray:
    """||W_e||_2 of each router row, (E,)."""
    return norms(layer)


def norms(layer: Layer) -> np.ndarray:
    """||W_e||_2 in float64, (E,)."""
    return np.linalg.norm(layer.router.astype(np.float64), axis=1)
