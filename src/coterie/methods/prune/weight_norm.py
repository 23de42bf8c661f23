"""Baseline: keep the experts with the largest weights."""

import numpy as np

from coterie.model.experts import Layer

NEEDS = "weights"


def score(layer: Layer, generator: np.random.Generator) -> np.ndarray:
    """The Frobenius norm over gate, up and down together, (E,); reads every expert once, one at a time."""
    return np.array([np.linalg.norm(layer.experts.flat(e).astype(np.float64)) for e in range(layer.num_experts)])
