"""How many weights of each expert matrix become zero: a share of every row, or an exact share of the whole."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from coterie.model.experts import expert_shapes
from coterie.model.layer import Model, MoE
from coterie.storage.checkpoint import Checkpoint

PARTS = ("gate", "up", "down")
Counts = dict[tuple[str, int, str], int]  # (layer, expert, part) -> zeros


def num_weights(checkpoint: Checkpoint, block: MoE) -> int:
    """Weights of all experts of a block."""
    return block.num_experts * sum(rows * columns for rows, columns in expert_shapes(checkpoint, block).values())


def zeros_per_row(model: Model, shares: dict[str, Fraction]) -> Counts:
    """floor(S * I) zeros in each row, as published; S by layer."""
    return {
        (b.key, e, part): rows * int(shares[b.key] * columns)
        for b in model.main
        for part, (rows, columns) in expert_shapes(model.checkpoint, b).items()
        for e in range(b.num_experts)
    }


def zeros_in_all(model: Model, shares: dict[str, Fraction], total: int) -> Counts:
    """Exactly `total` zeros, shared out as S by layer says: each running sum is the rounded running target."""
    keys, sizes, wanted = [], [], []
    for block in model.main:
        shapes = expert_shapes(model.checkpoint, block)
        for e in range(block.num_experts):
            for part, (rows, columns) in shapes.items():
                keys.append((block.key, e, part))
                sizes.append(rows * columns)
                wanted.append(shares[block.key])
    # OWL's shares are rounded numbers, whose mean misses the target by their last digits.
    asked = sum(s * n for s, n in zip(wanted, sizes, strict=True))
    scale = Fraction(total) / asked if asked else Fraction(0)
    counts = spread_zeros(sizes, [s * scale for s in wanted])
    assert sum(counts) == total
    return dict(zip(keys, counts, strict=True))


def zeros_of(model: Model, shares: dict[str, Fraction], total: int | None) -> Counts:
    """Zeros of every expert matrix: exactly `total`, or a share of each row."""
    return zeros_per_row(model, shares) if total is None else zeros_in_all(model, shares, total)


def spread_zeros(sizes: list[int], sparsities: list[Fraction]) -> list[int]:
    """Zeros per matrix so that the running total is always the rounded running target: exact over any number."""
    counts, wanted, done = [], Fraction(0), 0
    for size, sparsity in zip(sizes, sparsities, strict=True):
        wanted += sparsity * size
        counts.append(min(size, round(wanted) - done))
        done += counts[-1]
    return counts


def row_zeros(rows: int, num_zeros: int) -> np.ndarray:
    """`num_zeros` over the rows as evenly as can be: the first rows take one more."""
    base, rest = divmod(num_zeros, rows)
    return base + (np.arange(rows) < rest)
