"""Unstructured pruning inside the kept experts: one streaming forward that prunes each expert while it is in memory.

Sequential (the default, as published): a layer is scored on the activations that the already pruned layers before it
produce, pruned, and its pruned output feeds the next. One-pass scores every layer on the dense model's activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import torch

from coterie import moe
from coterie.calibrate import Batch, Routed, Stream
from coterie.checkpoint import Checkpoint
from coterie.errors import CoterieError
from coterie.experts import expert_matrices, store_expert
from coterie.layer import Model, MoE
from coterie.methods.sparsify import magnitude, owl
from coterie.methods.sparsify.select import lowest_per_group, lowest_per_row
from coterie.report import Progress

PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class Norms:
    """What one expert's rules see: ||X_j|| of gate and up's inputs (D,) and of down's (F,), and its token count."""

    inputs: np.ndarray
    hidden: np.ndarray
    num_tokens: int
    hessians: tuple[np.ndarray, np.ndarray] | None = None  # sum x x^T of the same inputs, where a rule needs it

    def of(self, part: str) -> np.ndarray:
        return self.hidden if part == "down" else self.inputs

    def hessian(self, part: str) -> np.ndarray:
        assert self.hessians is not None
        return self.hessians[part == "down"]


def measure(
    routed: Routed, expert: moe.Expert, rows: torch.Tensor, weights: torch.Tensor, needs: str = "norms"
) -> tuple[Norms, torch.Tensor]:
    """One expert's norms over its tokens, and its (dense) output.

    needs: "norms", "gated norms" (tokens times the router's weight), or "hessian" (norms and sum x x^T).
    """
    x = routed.x[rows]
    hidden, y = moe.expert_forward(routed.module, expert, x)
    scale = weights[:, None].float() if needs == "gated norms" else 1.0
    norms = [(t.float() * scale).square().sum(0, dtype=torch.float64).sqrt().numpy() for t in (x, hidden)]
    hessians = None
    if needs == "hessian":
        hessians = tuple((t.double().T @ t.double()).numpy() for t in (x, hidden))
    return Norms(norms[0], norms[1], len(rows), hessians), y  # type: ignore[arg-type]


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


def zero_mask(scores: np.ndarray, num_zeros: int, pattern: tuple[int, int] | None) -> np.ndarray:
    if pattern:
        return lowest_per_group(scores, *pattern)
    return lowest_per_row(scores, row_zeros(len(scores), num_zeros))


@dataclass
class Pruner:
    """Prunes the experts of every layer by one rule, and remembers what it did."""

    checkpoint: Checkpoint
    method: ModuleType
    zeros: dict[tuple[str, int, str], int]  # (layer, expert, part) -> zeros
    put: Callable[[str, int, bytes], None]  # (tensor, offset, bytes)
    dtype: torch.dtype
    pattern: tuple[int, int] | None = None
    min_tokens: int = 64
    sequential: bool = True
    cold: list[list[Any]] = field(default_factory=list)  # [layer, expert, tokens]
    num_zeros: int = 0

    def walk(self, routed: Routed) -> torch.Tensor:
        """Prunes all experts of a block, chosen or not; returns the weighted sum of the pruned ones (sequential),
        or of the dense ones."""
        total = torch.zeros_like(routed.x)
        chosen = {e: (rows, weights) for e, rows, weights in routed.by_expert()}
        none = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        for e in range(routed.block.num_experts):
            rows, weights = chosen.get(e, none)
            expert = moe.read_expert(self.checkpoint, routed.block, e, self.dtype)
            norms, y = None, torch.zeros(0, total.shape[1])
            if len(rows):
                norms, y = measure(routed, expert, rows, weights, self.method.NEEDS)
                _check_finite(norms, f"{routed.block.name}, expert {e}")
            if len(rows) < self.min_tokens:
                norms = None
                self.cold.append([routed.block.key, e, len(rows)])
            self.prune(routed.block, e, norms, expert)
            if len(rows):
                y = moe.expert_forward(routed.module, expert, routed.x[rows])[1] if self.sequential else y
                total.index_add_(0, rows, (y * weights[:, None]).to(total.dtype))
        return total

    def prune(self, block: MoE, e: int, norms: Norms | None, expert: moe.Expert | None = None) -> None:
        """Zeroes one expert's weights on disk, and in `expert` if it still has to compute; no norms: by magnitude."""
        pruned: list[np.ndarray | None] = []
        for part, weight in zip(PARTS, expert_matrices(self.checkpoint, block, e), strict=True):
            if weight is None:
                pruned.append(None)
                continue
            if not np.isfinite(weight).all():
                raise CoterieError(f"{block.name}, expert {e}, {part}: weights are NaN or infinite; expected finite")
            kept = self._prune_matrix(weight, self.zeros[block.key, e, part], norms, part)
            pruned.append(kept)
            self.num_zeros += kept.size - int(np.count_nonzero(kept))
            if expert:
                expert.matrices[part].copy_(torch.from_numpy(kept))
        assert pruned[1] is not None and pruned[2] is not None
        for name, offset, raw in store_expert(self.checkpoint, block, e, (pruned[0], pruned[1], pruned[2])):
            self.put(name, offset, raw)

    def _prune_matrix(self, weight: np.ndarray, num_zeros: int, norms: Norms | None, part: str) -> np.ndarray:
        """The matrix with its zeros; by magnitude where too few tokens came to say more."""
        if norms and self.method.NEEDS == "hessian":
            return self.method.prune(weight, norms.hessian(part), num_zeros, pattern=self.pattern).astype(np.float32)
        scores = self.method.score(weight, norms.of(part)) if norms else magnitude.score(weight)
        return np.where(zero_mask(scores, num_zeros, self.pattern), np.float32(0), weight)

    def prune_all(self, model: Model, on_progress: Progress) -> None:
        """Every expert of every block, without data."""
        blocks = model.main
        for done, block in enumerate(blocks):
            for e in range(block.num_experts):
                self.prune(block, e, None)
            on_progress("pruning layers", done + 1, len(blocks))


def _check_finite(norms: Norms, where: str) -> None:
    if not (np.isfinite(norms.inputs).all() and np.isfinite(norms.hidden).all()):
        raise CoterieError(f"{where}: activations are NaN or infinite; the weights are damaged, or need float32")


def zero_budget(model: Model, sparsities: dict[str, Fraction]) -> dict[tuple[str, int, str], int]:
    """Zeros of every expert matrix, exact in total; sparsities by layer."""
    keys, sizes, shares = [], [], []
    for block in model.main:
        shapes = matrix_shapes(model.checkpoint, block)
        for e in range(block.num_experts):
            for part, (rows, columns) in shapes.items():
                keys.append((block.key, e, part))
                sizes.append(rows * columns)
                shares.append(sparsities[block.key])
    return dict(zip(keys, spread_zeros(sizes, shares), strict=True))


def matrix_shapes(checkpoint: Checkpoint, block: MoE) -> dict[str, tuple[int, int]]:
    """(out, in) of a block's matrices by part, from one of its experts: all are alike."""
    found = zip(PARTS, expert_matrices(checkpoint, block, 0), strict=True)
    return {part: (m.shape[0], m.shape[1]) for part, m in found if m is not None}


def outlier_shares(stream: Stream, batches: list[Batch], m: float, on_progress: Progress) -> dict[str, float]:
    """OWL's first pass, on the dense model: the share of outliers in each MoE layer's experts."""
    shares: dict[str, float] = {}
    checkpoint = stream.checkpoint

    def walk(routed: Routed) -> torch.Tensor:
        total = torch.zeros_like(routed.x)
        norms: dict[int, Norms] = {}
        sums, count = 0.0, 0
        for e, rows, weights in routed.by_expert():
            expert = moe.read_expert(checkpoint, routed.block, e, stream.dtype)
            norms[e], y = measure(routed, expert, rows, weights)
            total.index_add_(0, rows, (y * weights[:, None]).to(total.dtype))
            for part, weight in zip(PARTS, expert_matrices(checkpoint, routed.block, e), strict=True):
                if weight is not None:
                    # The sum of |W| * norm over the matrix, without the matrix of scores.
                    sums += float(np.abs(weight).sum(0, dtype=np.float64) @ norms[e].of(part))
                    count += weight.size
        mean = sums / max(count, 1)
        scores = (
            owl.score(weight, n.of(part))
            for e, n in norms.items()
            for part, weight in zip(PARTS, expert_matrices(checkpoint, routed.block, e), strict=True)
            if weight is not None
        )
        shares[routed.block.key] = owl.outlier_share(scores, mean, m)
        return total

    for index in stream.run(batches, walk):
        on_progress("measuring outliers", index + 1, len(stream.layers))
    return shares
