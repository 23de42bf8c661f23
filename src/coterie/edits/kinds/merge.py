"""Experts that become the mean of their cluster, their neurons lined up before where the plan says so.

    plan: {"layers": {"0": {"kept": [1], "clusters": [[0, 1]], "merged": true, "shares": [[0.25, 0.75]],
                            "aligned": true}}}                                  (shares: equal where they are left out)

Of a cluster's members, every tensor is averaged, one tensor and one member at a time, and so are their router rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from coterie.edits.plan import MERGED, Choice, Keys, Kind, Outcome, Outputs, Plan
from coterie.errors import CoterieError
from coterie.methods import align
from coterie.methods.prune.stun import mean_of
from coterie.model.experts import expert_biases, expert_matrices, read_rows
from coterie.model.layer import Model, MoE, expert_names, is_columns, shared_by, stacked
from coterie.storage.checkpoint import FLOATS, Checkpoint
from coterie.storage.numerics import decode, encode
from coterie.storage.shards import Made, Output, computed


def read(at: str, value: Any) -> dict[str, object]:
    """Whether experts are averaged, with which shares, and whether their neurons are aligned."""
    clusters, merged = value.get("clusters", []), value.get("merged", False)
    shares, aligned = value.get("shares", []), value.get("aligned", False)
    if not isinstance(merged, bool):
        raise CoterieError(f"{at}: `clusters` must be lists of expert ids and `merged` a boolean")
    if merged and not clusters:
        raise CoterieError(f"{at}: merged experts need their clusters")
    if not isinstance(aligned, bool) or ((shares or aligned) and not merged):
        raise CoterieError(f"{at}: `shares` and `aligned` (a boolean) are of merged experts")
    sizes = [len(s) if isinstance(s, list) else -1 for s in shares] if isinstance(shares, list) else [-1]
    if sizes not in ([], [len(c) for c in clusters]):
        raise CoterieError(f"{at}: `shares` must give one number for every member of every cluster")
    numbers = [n for s in shares for n in s]
    if not all(type(n) in (int, float) and 0 <= n <= 1 for n in numbers) or any(abs(sum(s) - 1) > 1e-6 for s in shares):
        raise CoterieError(f"{at}: `shares` must be numbers from 0 to 1 that sum to 1 in every cluster")
    return {"merged": merged, "shares": tuple(tuple(map(float, s)) for s in shares), "aligned": aligned}


def check(model: Model, plan: Plan) -> None:
    """Raises: CoterieError for weights that are not plain floats."""
    check_plain(model.checkpoint, [block for block, choice in plan.chosen(model) if choice.merged])


def check_plain(checkpoint: Checkpoint, blocks: Iterable[MoE]) -> None:
    """Raises: CoterieError where these blocks' experts are not plain floats."""
    for name in (name for block in blocks for name in (*expert_names(block), block.router)):
        if (dtype := checkpoint.tensors[name].dtype) not in FLOATS:
            raise CoterieError(
                f"tensor {name!r}: {dtype} weights cannot be averaged; dequantise the checkpoint first, or average "
                "none (prune: --kappa 0)"
            )


def averaged(choice: Choice) -> list[int]:
    """The new indices of the experts that are averages."""
    return [i for i, cluster in enumerate(choice.clusters) if choice.merged and len(cluster) > 1]


def outputs(model: Model, plan: Plan, made: Outputs) -> Outputs:
    """What was copied of the experts in `averaged`, computed instead."""
    result: Outputs = {}
    for block, choice in plan.chosen(model):
        members, indices = Members(model.checkpoint, block, choice), averaged(choice)
        for i in indices if block.experts else ():
            for key, name in block.experts[choice.kept[i]].items():
                result[name] = (_averaged(made[name], name, choice, {i: partial(members.numbered, i, key)}, first=i),)
        for name in stacked(model.checkpoint, block) if indices else ():
            result[name] = (_averaged(made[name], name, choice, {i: partial(members.fused, i, name) for i in indices}),)
        for name in (block.router, *block.rows) if indices else ():
            result[name] = (_rows(members, result.get(name, made[name]), name),)
    return result


Values = Callable[[], Iterable[np.ndarray]]


def _averaged(made: tuple[Output, ...], name: str, choice: Choice, values: dict[int, Values], first: int = 0) -> Output:
    """What is made of tensor `name`, with means in place of these experts' parts; the first part is that of `first`."""
    (output,) = made

    def mean_bytes(i: int) -> bytes:
        """Accumulated in float64 and rounded once, when it is written."""
        return encode(mean(values[i](), choice.shares[i] if choice.shares else ()), output.dtype, name)

    parts = [
        Made(part.num_bytes, partial(mean_bytes, i)) if i in values else part
        for i, part in enumerate(output.parts, first)
    ]
    return replace(output, parts=tuple(parts))


def _rows(members: Members, made: tuple[Output, ...], name: str) -> Output:
    """The router, or one of `rows`, with means in place of what was copied."""
    block, choice, (output,) = members.block, members.choice, made
    values: dict[int, Values] = {i: partial(members.rows, i, name) for i in averaged(choice)}
    if not is_columns(block, name):
        above = len(choice.kept) * block.layout.segment[0] if shared_by(block, name) > 1 else 0
        return _averaged(made, name, choice, values, first=-above)

    def columns() -> bytes:
        rows, shares = read_rows(members.checkpoint, block, name), choice.shares or [()] * len(choice.kept)
        found = [mean(values[i](), shares[i]) if i in values else rows[e] for i, e in enumerate(choice.kept)]
        return encode(np.stack(found, axis=1), output.dtype, name)

    return computed(name, output.dtype, output.shape, columns)


def mean(values: Iterable[np.ndarray], shares: tuple[float, ...]) -> np.ndarray:
    """sum of share_m * value_m, accumulated in float64; the plain mean where there are no shares."""
    if not shares:
        return mean_of(values)
    total = np.zeros(())
    for share, value in zip(shares, values, strict=True):
        total = total + share * value.astype(np.float64)
    return total


@dataclass
class Members:
    """Of one block's merged clusters, the members' values as they enter the mean.

    A permutation comes from both experts' weights the first time a tensor asks for it, and is kept: two bytes a neuron.
    """

    checkpoint: Checkpoint
    block: MoE
    choice: Choice
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def numbered(self, i: int, key: str) -> Iterator[np.ndarray]:
        """Every member's tensor `key` of cluster i ("gate_proj.weight")."""
        for e in self.choice.clusters[i]:
            values = self.checkpoint.read(self.block.experts[e][key])
            yield self._arranged(i, e, values, *_numbered_axis(self.block, key))

    def fused(self, i: int, name: str) -> Iterator[np.ndarray]:
        """Every member's part of a fused tensor, of cluster i."""
        rows = self.checkpoint.tensors[name].shape[0] // self.block.num_experts
        for e in self.choice.clusters[i]:
            values = self.checkpoint.read_rows(name, e * rows, (e + 1) * rows)
            yield self._arranged(i, e, values[0] if rows == 1 else values, *_fused_axis(self.block, name))

    def rows(self, i: int, name: str) -> Iterator[np.ndarray]:
        """Every member's row of the router, or of what stands beside it, of cluster i."""
        tensor, stacks = self.checkpoint.tensors[name], shared_by(self.block, name)
        if is_columns(self.block, name):
            yield from read_rows(self.checkpoint, self.block, name)[list(self.choice.clusters[i])]
            return
        first, size = (self.block.first if stacks > 1 else 0), tensor.num_bytes // (stacks * self.block.zero_rows.stop)
        for e in self.choice.clusters[i]:
            yield decode(self.checkpoint.raw(name, (first + e) * size, size), tensor.dtype, name)

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


def _numbered_axis(block: MoE, key: str) -> tuple[int | None, str]:
    """Along which axis of an expert's tensor its neurons are, and how they are laid out there."""
    part, layout = key.removesuffix(".weight").removesuffix(".bias"), block.layout
    if part in (layout.gate, layout.up):
        return 0, "alone"
    if part in layout.lists[:1]:
        return 0, "alternating" if layout.interleaved else "gate above up"
    return (1, "alone") if part in (layout.down, *layout.lists[1:]) and not key.endswith(".bias") else (None, "")


def _fused_axis(block: MoE, name: str) -> tuple[int | None, str]:
    """The same of one expert's part of a fused tensor: (out, in), or (in, out) where the layout is transposed."""
    layout, bias = block.layout, name.endswith("_bias")
    place = next(j for j, known in enumerate(layout.fused) if name.startswith(block.prefix + known))
    if len(layout.fused) == 3:  # gate (F, D), up (F, D), down
        return (0 if place < 2 or layout.transposed_down else 1), "alone"
    if place == 1:
        return (None, "") if bias else (0 if layout.transposed else 1, "alone")
    kind = "alone" if layout.gate is None else "alternating" if layout.interleaved else "gate above up"
    return (1 if layout.transposed and not bias else 0), kind


def _stored_order(order: np.ndarray, kind: str) -> np.ndarray:
    """Which stored index belongs in each place, of neurons (F,): once, or twice where gate and up share the axis."""
    if kind == "alternating":
        return np.stack([2 * order, 2 * order + 1], axis=1).ravel()
    return np.concatenate([order, len(order) + order]) if kind == "gate above up" else order


def trace(plan: Plan, before: Outcome) -> Outcome:
    choice = plan.layers.get(before.key)
    means = dict.fromkeys((choice.kept[i] for i in averaged(choice)), MERGED) if choice else {}
    return replace(before, levels={**before.levels, **means})


def unlike(plan: Plan) -> str:
    merged = any(choice.merged for choice in plan.choices.values())
    return "experts were averaged, so the original has no such experts to leave on" if merged else ""


KIND = Kind(
    order=1, block=Keys(("merged", "shares", "aligned"), read), check=check, outputs=outputs, trace=trace,
    unlike=unlike,
)  # fmt: skip
