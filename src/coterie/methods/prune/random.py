"""Baseline: experts drawn at random (seeded). What any criterion has to beat."""

import numpy as np

from coterie.model.experts import Layer

NEEDS = "router"
SEEDED = True
COMPARED = False  # draws are what `compare` holds the others against


def score(layer: Layer, generator: np.random.Generator) -> np.ndarray:
    """A random permutation of 0..E-1."""
    return generator.permutation(layer.num_experts)
