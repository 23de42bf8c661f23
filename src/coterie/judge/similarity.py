"""How alike the experts of one layer are by their weights and their router rows, without a forward pass.

Weights are compared as they are stored: flattened, neuron beside neuron. Neurons may stand in any order, which
`alignment.py` undoes. Source: A Closer Look into Mixture-of-Experts, arXiv 2406.18219, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coterie.judge.numbers import cosine, cosine_of_products, r_squared
from coterie.model.experts import Experts, Layer, expert_shapes

MOST_BYTES = 2**28  # of experts held at a time, against which the others pass one by one


@dataclass(frozen=True)
class Weights:
    """cosines: by "weights" (all of an expert's), "gate", "up", "down", each (E, E).

    means: of an expert's neurons by part, (E, D) each: the mean row of gate and of up, the mean column of down.
    """

    cosines: dict[str, np.ndarray]
    means: dict[str, np.ndarray]


def compare_weights(experts: Experts, most_bytes: int = MOST_BYTES) -> Weights:
    """Cosines of the experts' flattened matrices.

    Each expert is scaled by its largest weight, which changes no cosine, and multiplied in float32.
    Raises: CoterieError for weights that are NaN or infinite.
    """
    shapes = expert_shapes(experts.checkpoint, experts.block)
    parts = _places(shapes)
    count, size = len(experts), 4 * sum(rows * columns for rows, columns in shapes.values())
    products = {part: np.zeros((count, count)) for part in parts}
    means = {part: np.zeros((count, shapes["up"][1]), np.float32) for part in parts}
    held = max(1, most_bytes // max(1, size))
    for start in range(0, count, held):
        stop = min(start + held, count)
        block = np.stack([_scaled(experts.flat(e)) for e in range(start, stop)])
        for e in range(start, count):
            flat = block[e - start] if e < stop else _scaled(experts.flat(e))
            for part, place in parts.items():
                found = block[:, place] @ flat[place]
                products[part][start:stop, e] = products[part][e, start:stop] = found
            if e < stop:
                _add_means(means, e, flat, parts, shapes)
    cosines = {"weights": cosine_of_products(np.sum(list(products.values()), axis=0))}
    cosines |= {part: cosine_of_products(values) for part, values in products.items()}
    return Weights(cosines, means)


def _places(shapes: dict[str, tuple[int, int]]) -> dict[str, slice]:
    """Where each part stands in `Experts.flat`."""
    found: dict[str, slice] = {}
    end = 0
    for part in ("gate", "up", "down"):
        if part in shapes:
            start, end = end, end + shapes[part][0] * shapes[part][1]
            found[part] = slice(start, end)
    return found


def _scaled(flat: np.ndarray) -> np.ndarray:
    return flat / (np.abs(flat).max(initial=0.0) or 1.0)


def _add_means(
    means: dict[str, np.ndarray], e: int, flat: np.ndarray, parts: dict[str, slice], shapes: dict[str, tuple[int, int]]
) -> None:
    for part, place in parts.items():
        means[part][e] = flat[place].reshape(shapes[part]).mean(axis=1 if part == "down" else 0)


def compare_router(layer: Layer, means: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, float | None]]:
    """(cosines (E, E) of router rows, R^2 by part): how well mean neurons predict which router rows are alike.

    R^2 is that of a line through the pairs i < j: cos(row_i, row_j) on cos(mean_i, mean_j). Where rows are
    r = m + n, with m of length 1 and n random of length s in D dimensions, it is V / (V + (2 s^2 + s^4) / D),
    V being the variance of cos(m_i, m_j) over pairs.
    """
    rows = cosine(layer.router)
    return rows, {part: r_squared(rows, cosine(values)) for part, values in means.items()}
