"""Unstructured pruning inside the kept experts: one streaming forward that prunes each expert while it is in memory.

Sequential (the default, as published): a layer is scored on the activations that the already pruned layers before it
produce, pruned, and its pruned output feeds the next. One-pass scores every layer on the dense model's activations.
"""

from __future__ import annotations

import importlib
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
from coterie.layer import MoE
from coterie.methods.sparsify import magnitude, owl
from coterie.methods.sparsify.select import lowest_per_group, lowest_per_row

Matrices = tuple[np.ndarray | None, np.ndarray, np.ndarray]  # gate, up, down
PARTS = ("gate", "up", "down")
METHODS = ("magnitude", "wanda", "owl", "sparsegpt", "moe-pruner")


def load_method(name: str) -> ModuleType:
    """The rule's module. Raises: CoterieError for an unknown name."""
    if name not in METHODS:
        raise CoterieError(f"--method {name!r}: unknown; expected one of {', '.join(METHODS)}")
    return importlib.import_module(f"coterie.methods.sparsify.{name.replace('-', '_')}")


@dataclass(frozen=True)
class Norms:
    """What one expert's rules see: ||X_j|| of gate and up's inputs (D,) and of down's (F,), and its token count."""

    inputs: np.ndarray
    hidden: np.ndarray
    num_tokens: int

    def of(self, part: str) -> np.ndarray:
        return self.hidden if part == "down" else self.inputs


def measure(
    routed: Routed, expert: moe.Expert, rows: torch.Tensor, weights: torch.Tensor, *, gated: bool
) -> tuple[Norms, torch.Tensor]:
    """One expert's norms over its tokens, and its (dense) output; gated multiplies tokens by the router's weight."""
    x = routed.x[rows]
    hidden, y = moe.expert_forward(routed.module, expert, x)
    scale = weights[:, None].float() if gated else 1.0
    norms = [(t.float() * scale).square().sum(0, dtype=torch.float64).sqrt().numpy() for t in (x, hidden)]
    return Norms(norms[0], norms[1], len(rows)), y


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
    zeros: Callable[[MoE, int, str, tuple[int, int]], int]  # (block, expert, part, shape) -> zeros
    put: Callable[[str, int, bytes], None]  # (tensor, offset, bytes)
    dtype: torch.dtype
    pattern: tuple[int, int] | None = None
    min_tokens: int = 64
    gated: bool = False
    cold: list[list[Any]] = field(default_factory=list)  # [layer, expert, tokens]

    def walk(self, routed: Routed) -> torch.Tensor:
        """Prunes all experts of a block, chosen or not, and returns the weighted sum of the pruned ones."""
        total = torch.zeros_like(routed.x)
        chosen = {e: (rows, weights) for e, rows, weights in routed.by_expert()}
        none = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        for e in range(routed.block.num_experts):
            rows, weights = chosen.get(e, none)
            pruned = self._prune(routed, e, rows, weights)
            if len(rows):
                _, y = moe.expert_forward(routed.module, pruned, routed.x[rows])
                total.index_add_(0, rows, (y * weights[:, None]).to(total.dtype))
        return total

    def _prune(self, routed: Routed, e: int, rows: torch.Tensor, weights: torch.Tensor) -> moe.Expert:
        block = routed.block
        expert = moe.read_expert(self.checkpoint, block, e, self.dtype)
        dense = expert_matrices(self.checkpoint, block, e)
        norms = None
        if len(rows) >= self.min_tokens:
            norms, _ = measure(routed, expert, rows, weights, gated=self.gated)
            if not (np.isfinite(norms.inputs).all() and np.isfinite(norms.hidden).all()):
                raise CoterieError(f"{block.name}, expert {e}: activations are NaN or infinite; use --dtype float32")
        else:
            self.cold.append([block.key, e, len(rows)])
        self.change(block, e, dense, norms, expert)
        return expert

    def change(self, block: MoE, e: int, dense: Matrices, norms: Norms | None, expert: moe.Expert | None) -> None:
        """Zeroes one expert's weights on disk, and in `expert` if it is still needed."""
        pruned: list[np.ndarray | None] = []
        for part, weight in zip(PARTS, dense, strict=True):
            if weight is None:
                pruned.append(None)
                continue
            if not np.isfinite(weight).all():
                raise CoterieError(f"{block.name}, expert {e}, {part}: weights are NaN or infinite; expected finite")
            scores = self.method.score(weight, norms.of(part)) if norms else magnitude.score(weight)
            mask = zero_mask(scores, self.zeros(block, e, part, weight.shape), self.pattern)
            pruned.append(np.where(mask, np.float32(0), weight))
            if expert:
                expert.matrices[part].masked_fill_(torch.from_numpy(mask), 0)
        for name, offset, raw in store_expert(self.checkpoint, block, e, (pruned[0], pruned[1], pruned[2])):  # type: ignore[arg-type]
            self.put(name, offset, raw)


def outlier_shares(stream: Stream, batches: list[Batch], m: float) -> dict[str, float]:
    """OWL's first pass, on the dense model: the share of outliers in each MoE layer's experts."""
    shares: dict[str, float] = {}
    checkpoint = stream.checkpoint

    def walk(routed: Routed) -> torch.Tensor:
        total = torch.zeros_like(routed.x)
        norms: dict[int, Norms] = {}
        sums, count = 0.0, 0
        for e, rows, weights in routed.by_expert():
            expert = moe.read_expert(checkpoint, routed.block, e, stream.dtype)
            norms[e], y = measure(routed, expert, rows, weights, gated=False)
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

    for _ in stream.run(batches, walk):
        pass
    return shares
