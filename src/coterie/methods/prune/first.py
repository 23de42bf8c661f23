"""Baseline: keep the experts with the lowest ids. Nothing to decide, so it measures the rewriting alone."""

import numpy as np

from coterie.model.experts import Layer

NEEDS = "router"
COMPARED = False


def score(layer: Layer, generator: np.random.Generator) -> np.ndarray:
    """Minus the expert's id."""
    return -np.arange(layer.num_experts)
