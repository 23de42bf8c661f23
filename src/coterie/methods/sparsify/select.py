"""From scores to zeros: the lowest of each row, exactly as many as asked.

Selection is by partition (O(n)), not by sorting. Ties go to the lower column, so that equal inputs give equal masks.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from coterie.errors import CoterieError


def row_counts(rows: int, columns: int, sparsity: float | Fraction, *, exact: bool) -> np.ndarray:
    """Zeros per row (rows,): `floor(S * C)` each, as published; exact spreads the remainder over the first rows so
    that the matrix has round(S * R * C) zeros."""
    share = Fraction(str(sparsity)) if isinstance(sparsity, float) else sparsity
    counts = np.full(rows, int(share * columns), dtype=np.int64)
    if exact:
        missing = round(share * rows * columns) - int(counts.sum())
        counts[:missing] += 1
    return counts


def lowest_per_row(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mask (R, C), True at the `counts[r]` lowest scores of row r; ties go to the lower column."""
    mask = np.zeros(scores.shape, dtype=bool)
    for count in np.unique(counts):
        if count == 0:
            continue
        rows = np.flatnonzero(counts == count)
        part = scores[rows]
        limit = np.partition(part, count - 1, axis=1)[:, count - 1 : count]
        below = part < limit
        ties = part == limit
        room = count - below.sum(axis=1, keepdims=True)
        mask[rows] = below | (ties & (np.cumsum(ties, axis=1) <= room))
    return mask


def lowest_per_group(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """N:M pattern: mask (R, C), True at the n lowest of every m consecutive scores of a row.

    Raises: CoterieError where m does not divide C.
    """
    rows, columns = scores.shape
    check_pattern(columns, n, m)
    grouped = scores.reshape(rows * columns // m, m)
    return lowest_per_row(grouped, np.full(len(grouped), n)).reshape(rows, columns)


def check_pattern(columns: int, n: int, m: int) -> None:
    """Raises: CoterieError unless n of every m consecutive columns can become zero."""
    if not 0 <= n <= m or m < 1:
        raise CoterieError(f"pattern {n}:{m}: expected N zeros in every M weights with 0 <= N <= M")
    if columns % m:
        raise CoterieError(f"pattern {n}:{m}: rows of {columns} weights do not divide into groups of {m}")
