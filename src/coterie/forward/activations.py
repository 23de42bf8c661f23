"""What the streaming forward (`stream.py`) keeps between two layers, and what a layer asks of its experts.

Both are ordinary tensors, in memory or, where they are large, mapped to files; then whoever reads or writes many rows
does it through the methods here, which give the pages back as they go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from coterie.errors import CoterieError
from coterie.kernels.products import padded
from coterie.model import moe
from coterie.model.layer import MoE
from coterie.storage.files import write_whole
from coterie.storage.tensors import Maps

if TYPE_CHECKING:
    from coterie.storage.checkpoint import Checkpoint

Arguments = list[tuple[tuple, dict[str, object]]]  # per layer: what it is given beside the hidden states
ROWS = 256  # that sums in float32 see at a time: they stay in the processor's caches
MOST_ROWS = 1024  # of a map between two releases: the kernel makes the pages around each row resident as well


class Batch:
    """Samples of one length between two layers: hidden states (B, T, D), and the layers' other arguments.

    samples: which of the samples given to `Stream.embed` its rows are. Assigning to `hidden` advances the batch.
    """

    def __init__(self, hidden: torch.Tensor, arguments: Arguments, samples: tuple[int, ...] = ()) -> None:
        self._hidden, self.arguments, self.samples = hidden, arguments, samples
        self.maps: Maps | None = None

    @property
    def hidden(self) -> torch.Tensor:
        return self._hidden

    @hidden.setter
    def hidden(self, values: torch.Tensor) -> None:
        if self.maps is None:
            self._hidden = values
            return
        if (values.shape, values.dtype) != (self._hidden.shape, self._hidden.dtype):
            self._hidden = self.maps.zeros(values.shape, values.dtype)
        self.maps.put(self._hidden, values)
        self.passed()

    def passed(self) -> None:
        """Notes in its maps, if it has any, that the batch is through a layer."""
        if self.maps:
            self.maps.passed(self._hidden.nbytes)

    @property
    def num_tokens(self) -> int:
        return self._hidden.shape[0] * self._hidden.shape[1]

    def move(self, maps: Maps, place: torch.Tensor) -> None:
        """From now on the hidden states are the first rows of `place`, one of the maps."""
        hidden = self._hidden
        self.maps, self._hidden = maps, place[: self.num_tokens].view(hidden.shape)
        self.hidden = hidden

    def loaded(self) -> torch.Tensor:
        """The hidden states in memory of torch's own: the last bits of products depend on its alignment."""
        return self._hidden if self.maps is None else self.maps.get(self._hidden)


def shared(arguments: Arguments, earlier: Arguments) -> Arguments:
    """The arguments, with an earlier batch's tensors where they are equal: masks and rotations are large."""
    leaves, form = tree_flatten(arguments)
    others = tree_flatten(earlier)[0]
    if len(leaves) != len(others):
        return arguments
    same: dict[tuple[int, int], bool] = {}  # one mask is an argument of many layers
    for i, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
        if isinstance(leaf, torch.Tensor) and isinstance(other, torch.Tensor):
            pair = id(leaf), id(other)
            if pair not in same:
                same[pair] = leaf.dtype == other.dtype and torch.equal(leaf, other)
            leaves[i] = other if same[pair] else leaf
    return tree_unflatten(leaves, form)


class Piece(NamedTuple):
    """Some of an expert's tokens: rows and weights (T,), inputs x (T, D), hidden (T, F) and outputs y (T, D).

    The expert's share of the sum is weights * y. gates: the router's weights (T,), which are these weights, or where
    they scale what experts see (llama4), are in x already, and the weights are 1.
    """

    rows: torch.Tensor
    gates: torch.Tensor
    weights: torch.Tensor
    x: torch.Tensor
    hidden: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True)
class Routed:
    """What a layer asks of its experts, over all batches: inputs (T, D), chosen ids and weights (T, K)."""

    block: MoE
    module: torch.nn.Module
    x: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    maps: Maps | None = None  # where x is, if not in memory

    @property
    def scales_inputs(self) -> bool:
        """Whether the sum is that of f_k(w_k x), not of w_k f_k(x)."""
        return getattr(self.module, "scales_inputs", False)

    def check_linear(self) -> None:
        """Raises: CoterieError where single outputs and weights do not tell the sum of a set of experts."""
        if self.scales_inputs:
            raise CoterieError(
                f"{self.block.name}: the router's weights scale what its experts see, so that single outputs do not "
                "tell what a set of experts would give; criteria of statistics, such as reap, do without"
            )

    def by_expert(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(expert, its tokens' rows, their weights), ascending, for experts that were chosen at all."""
        flat = self.chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.block.num_experts)[: self.block.num_experts]
        weights, top_k = self.weights.flatten(), self.chosen.shape[1]
        for e, places in enumerate(order[: int(counts.sum())].split(counts.tolist())):
            if len(places):
                yield e, places // top_k, weights[places]

    def experts(
        self, checkpoint: Checkpoint, dtype: torch.dtype
    ) -> Iterator[tuple[int, moe.Expert, torch.Tensor, torch.Tensor]]:
        """(number, expert, rows, weights) as `by_expert`; each is read from disk while the one before computes."""
        chosen = list(self.by_expert())
        experts = moe.read_experts(checkpoint, self.block, (e for e, _, _ in chosen), dtype)
        for (e, rows, weights), expert in zip(chosen, experts, strict=True):
            yield e, expert, rows, weights

    def pieces(
        self, expert: moe.Expert, rows: torch.Tensor, weights: torch.Tensor, *, outputs: bool = True
    ) -> Iterator[Piece]:
        """Runs an expert over its tokens, a bounded number of them at a time; without outputs, y is (0, D)."""
        for some, theirs in zip(rows.split(moe.MOST_TOKENS), weights.split(moe.MOST_TOKENS), strict=True):
            x = self.gather(some)
            counted = theirs
            if self.scales_inputs:
                x[: len(some)] *= theirs[:, None]
                counted = torch.ones_like(theirs)
            if outputs:
                hidden, y = moe.expert_forward(self.module, expert, x)
            else:
                hidden, y = moe.expert_hidden(self.module, expert, x), x[:0]
            yield Piece(some, theirs, counted, x[: len(some)], hidden[: len(some)], y[: len(some)])

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Inputs of the rows, with as many zeros below as their number is padded by for the products."""
        found = self.x.new_zeros(padded(len(rows), self.x.dtype), self.x.shape[1])
        size = MOST_ROWS if self.maps else max(1, len(rows))
        for place, some in zip(found[: len(rows)].split(size), rows.split(size), strict=True):
            torch.index_select(self.x, 0, some, out=place)
            self._touched(self.x, some)
        return found

    def zeros(self) -> torch.Tensor:
        """Where to `add` the experts' weighted outputs: (T, D), kept where x is."""
        return self.maps.zeros(self.x.shape, self.x.dtype) if self.maps else torch.zeros_like(self.x)

    def add(self, total: torch.Tensor, piece: Piece) -> None:
        """total[rows] += weights * y."""
        self.add_rows(total, piece.rows, (piece.y * piece.weights[:, None]).to(total.dtype))

    def add_rows(self, total: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
        """total[rows] += values (T, D)."""
        size = MOST_ROWS if self.maps else max(1, len(values))
        for some, theirs in zip(values.split(size), rows.split(size), strict=True):
            total.index_add_(0, theirs, some)
            self._touched(total, theirs)

    def _touched(self, tensor: torch.Tensor, rows: torch.Tensor) -> None:
        if self.maps:
            self.maps.touched(tensor, len(rows))


def samples_of(batches: list[Batch]) -> torch.Tensor:
    """The sample (T,) of every row that a layer routes, in the order of `Routed.x`."""
    return torch.cat([torch.tensor(b.samples).repeat_interleave(b.hidden.shape[1]) for b in batches])


def dense_weights(chosen: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Weights (T, E) in float32 of ids and weights (T, K); ids beyond the experts stand for none."""
    width = max(num_experts, int(chosen.max()) + 1)
    return torch.zeros(len(chosen), width).scatter_add_(1, chosen, weights.float())[:, :num_experts]


def weighted_sums(weights: torch.Tensor, values: torch.Tensor, *, squared: bool = False) -> torch.Tensor:
    """Sums over tokens: weights (G, T) times values (T, C), or times their squares, in float64.

    In float32 within some rows and in float64 beyond them; all in float64 where float32 is too narrow.
    """
    total = torch.zeros(len(weights), values.shape[1], dtype=torch.float64)
    for some, theirs in zip(values.split(ROWS), weights.split(ROWS, dim=1), strict=True):
        wide = some.float()
        total += theirs @ (wide * wide if squared else wide)
    if total.isfinite().all():
        return total
    exact = values.double()
    return weights.double() @ (exact.square() if squared else exact)


Walk = Callable[[Routed], torch.Tensor]  # -> the experts' weighted sum (T, D)


def plain_walk(checkpoint: Checkpoint, dtype: torch.dtype) -> Walk:
    """The experts as they are: sum_k w_k expert_k(x)."""

    def walk(routed: Routed) -> torch.Tensor:
        total = routed.zeros()
        for _, expert, rows, weights in routed.experts(checkpoint, dtype):
            for piece in routed.pieces(expert, rows, weights):
                routed.add(total, piece)
        return total

    return walk


def save(batches: list[Batch], path: Path, *, sync: bool = True) -> None:
    """Writes the batches' hidden states as a safetensors file, one after the other; the name is absent or complete.

    sync: whether they outlive the machine. Raises: CoterieError when they cannot be written.
    """
    from safetensors.torch import _TYPES

    names: Any = {dtype: name for name, dtype in _TYPES.items()}
    header, end = {}, 0
    for i, batch in enumerate(batches):
        hidden = batch.hidden
        start, end = end, end + hidden.nbytes
        header[str(i)] = {"dtype": names[hidden.dtype], "shape": list(hidden.shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for batch in batches:
                file.write(batch.hidden.contiguous().view(-1).view(torch.uint8).numpy().data)
                if batch.maps:
                    batch.maps.release()

    write_whole(path, write, sync=sync, hint="; free some space and add --resume")


def restore(batches: list[Batch], path: Path) -> None:
    """Reads what `save` wrote into as many batches of the same shapes."""
    from safetensors import safe_open

    for i, batch in enumerate(batches):
        with safe_open(path, "pt") as file:  # opened each time: what it maps is given back
            values = file.get_tensor(str(i))
        assert values.shape == batch.hidden.shape
        batch.hidden = values if batch.maps else values.clone()
