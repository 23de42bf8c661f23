"""What a merged expert is made of: its members' stored values, their neurons lined up where the plan says so.

Serves `edits/`, one tensor and one member at a time. A permutation comes from both experts' weights the first time
a tensor asks for it, and kept: two bytes a neuron.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from coterie.edits.plan import Choice
from coterie.methods import align
from coterie.methods.prune.stun import mean_of
from coterie.model.experts import expert_biases, expert_matrices
from coterie.model.layer import MoE
from coterie.storage.checkpoint import Checkpoint


@dataclass
class Members:
    """Of one block's merged clusters, the members' values as they enter the mean."""

    checkpoint: Checkpoint
    block: MoE
    choice: Choice
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def numbered(self, i: int, key: str) -> Iterator[np.ndarray]:
        """Of cluster i, every member's tensor `key` ("gate_proj.weight")."""
        for e in self.choice.clusters[i]:
            values = self.checkpoint.read(self.block.experts[e][key])
            yield self._arranged(i, e, values, *_numbered_axis(self.block, key))

    def fused(self, i: int, name: str) -> Iterator[np.ndarray]:
        """Of cluster i, every member's part of a fused tensor."""
        rows = self.checkpoint.tensors[name].shape[0] // self.block.num_experts
        for e in self.choice.clusters[i]:
            values = self.checkpoint.read_rows(name, e * rows, (e + 1) * rows)
            yield self._arranged(i, e, values[0] if rows == 1 else values, *_fused_axis(self.block, name))

    def _arranged(self, i: int, e: int, values: np.ndarray, axis: int | None, kind: str) -> np.ndarray:
        """The values with expert e's neurons in the order of the cluster's kept expert."""
        if not self.choice.aligned or e == self.choice.kept[i] or axis is None:
            return values
        return np.take(values, _stored_order(self._order(i, e), kind), axis)

    def _order(self, i: int, e: int) -> np.ndarray:
        if e not in self._orders:
            found = align.order(self._neurons(self.choice.kept[i]), self._neurons(e))
            self._orders[e] = found.astype(np.uint16 if len(found) <= 1 << 16 else np.uint32)
        return self._orders[e].astype(np.intp)

    def _neurons(self, e: int) -> np.ndarray:
        matrices = expert_matrices(self.checkpoint, self.block, e)
        return align.neurons(matrices, expert_biases(self.checkpoint, self.block, e)[0])


def mean(values: Iterable[np.ndarray], shares: tuple[float, ...]) -> np.ndarray:
    """sum of share_m * value_m, accumulated in float64; the plain mean where there are no shares."""
    if not shares:
        return mean_of(values)
    total = np.zeros(())
    for share, value in zip(shares, values, strict=True):
        total = total + share * value.astype(np.float64)
    return total


def _numbered_axis(block: MoE, key: str) -> tuple[int | None, str]:
    """Along which axis of an expert's tensor its neurons are, and how they are laid out there."""
    part, layout = key.removesuffix(".weight").removesuffix(".bias"), block.layout
    if part in (layout.gate, layout.up):
        return 0, "alone"
    return (1, "alone") if part == layout.down and not key.endswith(".bias") else (None, "")


def _fused_axis(block: MoE, name: str) -> tuple[int | None, str]:
    """The same of one expert's part of a fused tensor: (out, in), or (in, out) where the layout is transposed."""
    layout, bias = block.layout, name.endswith("_bias")
    place = next(j for j, known in enumerate(layout.fused) if name.startswith(block.prefix + known))
    if len(layout.fused) == 3:  # all (F, D)
        return 0, "alone"
    if place == 1:
        return (None, "") if bias else (0 if layout.transposed else 1, "alone")
    kind = "alone" if layout.gate is None else "alternating" if layout.interleaved else "gate above up"
    return (1 if layout.transposed and not bias else 0), kind


def _stored_order(order: np.ndarray, kind: str) -> np.ndarray:
    """Which stored index belongs in each place, of neurons (F,): once, or twice where gate and up share the axis."""
    if kind == "alternating":
        return np.stack([2 * order, 2 * order + 1], axis=1).ravel()
    return np.concatenate([order, len(order) + order]) if kind == "gate above up" else order
