"""Small statistics that the measurements share, and their form in JSON: finite numbers, None where there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coterie.methods.merge.m_smoe import cosines

DIGITS = 4  # of matrices: an E x E matrix is most of what is written

Found = Mapping[str, object]  # what was measured of a layer, as it becomes JSON: read with `at`
Layers = Sequence[Found]


def listed(values: Any, digits: int = DIGITS) -> list[Any]:
    """An array as nested lists, rounded."""
    found: list[Any] = np.round(np.asarray(values, dtype=np.float64), digits).tolist()
    return found


def number(value: Any, digits: int = 6) -> float | None:
    """A float with so many significant digits; None for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{digits}g}")


def at(found: Found, path: str) -> Any:
    """The value under names separated by spaces, one inside the other; None where there is none on the way."""
    value: Any = found
    for name in path.split():
        value = None if value is None else value.get(name)
    return value


def mean_at(layers: Layers, path: str) -> float | None:
    """The mean over layers of a number; those that lack it are left out."""
    known = [value for layer in layers if (value := at(layer, path)) is not None]
    return number(sum(known) / len(known)) if known else None


def ratio(part: float, whole: float) -> float:
    """part / whole; 0 where there is nothing to share."""
    return float(part) / float(whole) if whole else 0.0


def cosine(rows: np.ndarray) -> np.ndarray:
    """<a, b> / (|a| |b|) of all pairs of rows (E, C): (E, E) float64. Rows of zeros have 0 with everything."""
    wide = rows.astype(np.float64)
    largest = np.abs(wide).max(axis=1, keepdims=True, initial=0.0)  # first to this scale: squares must not overflow
    wide = np.divide(wide, largest, out=np.zeros_like(wide), where=largest > 0)
    return cosine_of_products(wide @ wide.T)


def cosine_of_products(products: np.ndarray) -> np.ndarray:
    """Cosines (E, E) from inner products (E, E) in float64; 0 beside a row of zeros."""
    return np.clip(cosines(products), -1.0, 1.0)


def pairs(matrix: np.ndarray) -> np.ndarray:
    """The values of all pairs i < j of a symmetric matrix."""
    return matrix[np.triu_indices(len(matrix), 1)]


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's r; None for fewer than three values, and where one of the two does not vary."""
    if len(a) < 3:
        return None
    x, y = (v - v.mean() for v in (np.asarray(a, np.float64), np.asarray(b, np.float64)))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return max(-1.0, min(1.0, float(x @ y) / scale)) if scale > 1e-12 * len(x) else None


def r_squared(a: np.ndarray, b: np.ndarray) -> float | None:
    """The share of the variance over pairs i < j of one similarity (E, E) that a line through another explains."""
    r = correlation(pairs(a), pairs(b))
    return None if r is None else r * r
