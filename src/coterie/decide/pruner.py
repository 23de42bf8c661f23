"""Unstructured pruning inside the kept experts: one streaming forward that prunes each expert while it is in memory.

Sequential (the default, as published): a layer is scored on the activations that the already pruned layers before it
produce, pruned, and its pruned output feeds the next. One-pass scores every layer on the dense model's activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from coterie.edits.budget import PARTS, Counts, row_zeros
from coterie.edits.kurtosis import Moments
from coterie.errors import CoterieError
from coterie.forward.activations import Piece, Routed, weighted_sums
from coterie.methods.masks import choose, zero
from coterie.methods.sparsify import magnitude
from coterie.model import moe
from coterie.model.experts import Matrices, expert_biases, expert_matrices, expert_weights, store_expert, zero_expert
from coterie.model.layer import Model, MoE
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.numerics import decode, encode
from coterie.storage.record import Progress

Put = Callable[[str, int, bytes], None]  # (tensor, offset in it, bytes)


class InputSums:
    """What entered one expert's matrices, summed over its tokens, which are given in pieces.

    needs: what the rule wants to know, as `methods/sparsify/__init__.py` has it.
    """

    def __init__(self, needs: str) -> None:
        self.needs, self.num_tokens = needs, 0
        self._squares: list[Any] = [0.0, 0.0]  # of gate and up's inputs (D,), and of down's (F,)
        self._hessians: list[Any] = [0.0, 0.0]

    def add(self, piece: Piece) -> None:
        self.num_tokens += len(piece.rows)
        gated = self.needs == "gated norms"
        weights = piece.weights.float()[None].square() if gated else torch.ones(1, len(piece.rows))
        for i, values in enumerate((piece.x, piece.hidden)):
            self._squares[i] = self._squares[i] + weighted_sums(weights, values, squared=True)[0]
            if self.needs == "hessian":
                self._hessians[i] = self._hessians[i] + values.double().T @ values.double()

    def checked(self, block: MoE, e: int) -> InputSums:
        """Raises: CoterieError for NaN or infinite activations."""
        if not all(squares.isfinite().all() for squares in self._squares):
            raise CoterieError(
                f"{block.name}, expert {e}: activations are NaN or infinite; the weights are damaged, or need float32"
            )
        return self

    def norms(self, part: str) -> np.ndarray:
        """||X_j|| of each input of gate, up or down."""
        return self._squares[part == "down"].sqrt().numpy()

    def hessian(self, part: str) -> np.ndarray:
        """sum x x^T of the same inputs, where the rule needs it."""
        return self._hessians[part == "down"].numpy()


class Visitors(NamedTuple):
    """The tokens that chose an expert: their rows, and the weights that its output is multiplied by, (T,) each."""

    expert: int
    rows: torch.Tensor
    gates: torch.Tensor


@dataclass
class Pruner:
    """Prunes the experts of every layer by one rule, and remembers what it did."""

    checkpoint: Checkpoint
    method: ModuleType
    zeros: Counts
    put: Put
    dtype: torch.dtype = torch.float32
    pattern: tuple[int, int] | None = None
    min_tokens: int = 64
    sequential: bool = True
    cold: list[list[Any]] = field(default_factory=list)  # [layer, expert, tokens]
    num_zeros: Counter[str] = field(default_factory=Counter)  # by layer, counted in what was written
    before: Moments = field(default_factory=Moments)
    after: Moments = field(default_factory=Moments)
    num_judged: int | None = None  # only the first so many tokens are measured; the rest pass through
    _measured: dict[int, InputSums] | None = None  # of the experts of a rehearsed layer

    def state(self) -> dict[str, object]:
        """What a resumed run has to know of the layers done."""
        moments = [self.before.sums, self.after.sums]
        return {"cold": self.cold, "zeros": dict(self.num_zeros), "moments": moments}

    def absorb(self, state: Mapping[str, Any]) -> None:
        """Adds what another pruner did, or an earlier run, by its `state`."""
        self.cold += state["cold"]
        self.num_zeros.update(state["zeros"])
        before, after = (Moments(sums) for sums in state["moments"])
        self.before, self.after = self.before + before, self.after + after

    @property
    def corrects(self) -> bool:
        """Whether the rule also changes the weights that stay."""
        return bool(self.method.NEEDS == "hessian")

    def walk(self, routed: Routed) -> torch.Tensor:
        """Prunes all experts of a block, chosen or not; returns the weighted sum of the pruned ones (sequential),
        or of the dense ones."""
        total = routed.zeros()
        for visitors in every_expert(routed):
            self.visit(routed, visitors, total)
        self._measured = None
        return total

    def visit(self, routed: Routed, visitors: Visitors, total: torch.Tensor) -> None:
        """Prunes one expert, and adds its weighted outputs to `total`."""
        block, e, dense = routed.block, visitors.expert, None if self.sequential else total
        matrices, expert = self._read(block, e)
        if self._measured is None:
            seen = self._see(routed, expert, visitors, dense)
        else:
            seen = self._measured.get(e) if len(visitors.rows) else None
            run_expert(routed, expert, visitors, dense)
        if seen is None or seen.num_tokens < self.min_tokens:
            self.cold.append([block.key, e, seen.num_tokens if seen else 0])
            seen = None
        pruned = self.prune(block, e, matrices, seen)
        if self.sequential:
            for part, matrix in zip(PARTS, pruned, strict=True):
                if matrix is not None:
                    expert.matrices[part].copy_(torch.from_numpy(matrix))
            run_expert(routed, expert, visitors, total)

    def rehearse(self, routed: Routed) -> torch.Tensor:
        """Measures the experts on the dense layer's activations, for the next `walk`; returns the dense sum."""
        total, self._measured = routed.zeros(), {}
        for visitors in every_expert(routed):
            if len(visitors.rows):
                _, expert = self._read(routed.block, visitors.expert)
                seen = self._see(routed, expert, visitors, total)
                self._measured |= {visitors.expert: seen} if seen else {}
        return total

    def _read(self, block: MoE, e: int) -> tuple[Matrices, moe.Expert]:
        matrices = read_finite(self.checkpoint, block, e)
        return matrices, as_expert(self.checkpoint, block, e, matrices, self.dtype)

    def _see(
        self, routed: Routed, expert: moe.Expert, visitors: Visitors, total: torch.Tensor | None
    ) -> InputSums | None:
        """What entered of those tokens that are to be judged by; adds the expert's outputs to `total`, if given."""
        (e, rows, gates), seen = visitors, InputSums(self.method.NEEDS)
        judged = len(rows) if self.num_judged is None else int((rows < self.num_judged).sum())  # rows ascend
        run_expert(routed, expert, Visitors(e, rows[:judged], gates[:judged]), total, seen.add)
        run_expert(routed, expert, Visitors(e, rows[judged:], gates[judged:]), total)
        return seen.checked(routed.block, e) if judged else None

    def prune(self, block: MoE, e: int, matrices: Matrices, seen: InputSums | None) -> Matrices:
        """Writes one expert with its zeros, and returns it so. Not seen: by magnitude, or a rule that needs no data."""
        pruned: list[Any] = [None, None, None]
        masks: list[Any] = [None, None, None]
        before, after = Moments(), Moments()  # of this expert: sums do not depend on who pruned the others
        for i, (part, weight) in enumerate(zip(PARTS, matrices, strict=True)):
            if weight is not None:
                pruned[i], masks[i] = self._prune_matrix(block, e, part, weight, seen)
                left = int(np.count_nonzero(pruned[i]))
                self.num_zeros[block.key] += weight.size - left
                before.add(weight)
                after.add(pruned[i], left)
        self.before, self.after = self.before + before, self.after + after
        gate, up, down = pruned
        if seen and self.corrects:
            stored = store_expert(self.checkpoint, block, e, (gate, up, down))
        else:
            stored = zero_expert(self.checkpoint, block, e, (masks[0], masks[1], masks[2]))
        for name, offset, raw in stored:
            self.put(name, offset, raw)
        return gate, up, down

    def _prune_matrix(
        self, block: MoE, e: int, part: str, weight: np.ndarray, seen: InputSums | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The matrix with its zeros, and where they are; by magnitude where too few tokens came to say more."""
        num_zeros = self.zeros[block.key, e, part]
        if seen and self.corrects:
            kept = self.method.prune(weight, seen.hessian(part), num_zeros, pattern=self.pattern)
            name = expert_weights(self.checkpoint, block)[0]
            dtype = self.checkpoint.tensors[name].dtype  # what computes from here on is what is written
            return decode(encode(kept, dtype, name), dtype, name).astype(np.float32).reshape(kept.shape), None
        rule = self.method if seen or self.method.NEEDS == "nothing" else magnitude
        score = partial(rule.score, norms=seen.norms(part) if seen else None)
        mask = choose(weight, score, row_zeros(len(weight), num_zeros), self.pattern)
        kept = weight.copy()
        zero(kept, mask)
        return kept, mask

    def prune_all(self, model: Model, on_progress: Progress) -> None:
        """Every expert of every block, without data."""
        blocks = model.main
        for done, block in enumerate(blocks):
            for e in range(block.num_experts):
                self.prune(block, e, read_finite(self.checkpoint, block, e), None)
            on_progress("pruning layers", done + 1, len(blocks))


def as_expert(checkpoint: Checkpoint, block: MoE, e: int, matrices: Matrices, dtype: torch.dtype) -> moe.Expert:
    """Matrices that were read already, in the dtype to compute in, with the biases beside them."""
    gate, up, down = (None if m is None else torch.tensor(m, dtype=dtype) for m in matrices)
    assert up is not None and down is not None
    biases = (None if b is None else torch.tensor(b, dtype=dtype) for b in expert_biases(checkpoint, block, e))
    gate_up = up.contiguous() if gate is None else torch.cat([gate, up])
    return moe.Expert(gate_up, down.contiguous(), gate is not None, *biases)


def run_expert(
    routed: Routed,
    expert: moe.Expert,
    visitors: Visitors,
    total: torch.Tensor | None,
    see: Callable[[Piece], None] | None = None,
) -> None:
    """Adds the expert's weighted outputs to `total`, if there is one, and shows `see` what passed, in pieces."""
    if total is None and see is None:
        return
    for piece in routed.pieces(expert, visitors.rows, visitors.gates) if len(visitors.rows) else ():
        if see:
            see(piece)
        if total is not None:
            routed.add(total, piece)


def every_expert(routed: Routed) -> Iterator[Visitors]:
    """Each expert's tokens, ascending, also of experts that no token chose."""
    chosen = {e: Visitors(e, rows, gates) for e, rows, gates in routed.by_expert()}
    for e in range(routed.block.num_experts):
        yield chosen.get(e) or Visitors(e, torch.zeros(0, dtype=torch.long), torch.zeros(0))


def read_finite(checkpoint: Checkpoint, block: MoE, e: int) -> Matrices:
    """An expert's matrices. Raises: CoterieError for NaN or infinite weights."""
    matrices = expert_matrices(checkpoint, block, e)
    for part, weight in zip(PARTS, matrices, strict=True):
        if weight is not None and not np.isfinite(weight).all():
            raise CoterieError(f"{block.name}, expert {e}, {part}: weights are NaN or infinite; expected finite")
    return matrices
