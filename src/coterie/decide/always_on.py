"""MoE blocks in the streaming forward, beside what would stand in for them: always-on experts with constant gates.

The measurements that `condense` decides by: routing weights, the Gram matrix of all experts' outputs on all
tokens, and what reaches and leaves a block. Importing this module imports torch.
Axes: T token, D hidden, E expert, n regressors (E, and one more where there is a shared expert).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coterie.edits.folding import DOWN, GATE, UP, folded, natural_width, parts, shared_names, weights
from coterie.edits.plan import Condensed
from coterie.errors import CoterieError
from coterie.forward.activations import Batch, Routed, plain_walk
from coterie.forward.stream import Keep, Stream, advance
from coterie.forward.suspended import instead
from coterie.methods.condense.official import fixed_gates
from coterie.model import moe
from coterie.model.layer import Model
from coterie.model.standin import block_of
from coterie.storage.numerics import decode, encode
from coterie.storage.planned import scale_of

MOST_OUTPUTS = 2**25  # numbers of all experts' outputs in memory at once
MOST_TOKENS = 2**14  # of a layer that its Gram matrix is made from, spread evenly over the data
ALIKE = 1e-2  # of a block's output: how far shared expert and routed sum may be from it, by rounding

Forward = Callable[[torch.Tensor], torch.Tensor]  # a block's: (T, D) -> (T, D)


@dataclass
class Work:
    """How much was run, in passes of the whole model over the calibration set; a part counts as a fraction."""

    num_tokens: int
    num_layers: int
    token_layers: int = 0

    def add(self, batches: list[Batch], times: int = 1) -> None:
        """One layer over these batches."""
        self.token_layers += times * sum(batch.num_tokens for batch in batches)

    @property
    def passes(self) -> float:
        return self.token_layers / (self.num_tokens * self.num_layers)


class Blocks:
    """The MoE blocks of a model that streams, each as itself or replaced by a function of its input."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        """Raises: CoterieError for a model that cannot be streamed."""
        self.model, self.checkpoint, self.dtype = model, model.checkpoint, dtype
        self.stream = Stream(model, dtype)
        self.by_index = {int(block.key): block for block in model.main}
        self.walk = plain_walk(self.checkpoint, dtype)

    @property
    def num_layers(self) -> int:
        return len(self.stream.layers)

    def module(self, index: int) -> tuple[torch.nn.Module, torch.nn.Module]:
        """(what computes a layer's MoE block, its experts). Raises: CoterieError where no module of its own does."""
        parent, attribute, experts = block_of(self.stream.layers[index], f"layer {index}")
        return getattr(parent, attribute), experts

    def normed(self, batch: Batch) -> torch.Tensor:
        """What the head reads of the last layer's outputs: (B, T, D) after the final norm."""
        seen: list[torch.Tensor] = []

        def head(x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x[..., :1]  # in place of logits, which nobody asks for

        with instead({self.stream.model.get_output_embeddings(): head}):
            self.stream.logits(batch)
        return seen.pop()

    def compared(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """What the published search compares of a layer's outputs (T, D): of the last layer, after the final norm."""
        return states if index < self.num_layers - 1 else self.normed(Batch(states[:, None], []))[:, 0]

    @contextmanager
    def replaced(self, index: int, forward: Forward) -> Iterator[None]:
        """While entered, the layer's MoE block computes `forward` of its input, token by token."""
        module, _ = self.module(index)
        module.forward = lambda x, *_, **__: forward(x.reshape(-1, x.shape[-1])).view_as(x)  # type: ignore[assignment]
        try:
            with self.stream.without_experts(index):
                yield
        finally:
            del module.forward

    def run(
        self, go: Any, index: int, batches: list[Batch], condensed: Condensed | None, work: Work | None = None
    ) -> None:
        """One layer (loaded: `go`) over the batches, in place, its block as it is or condensed."""
        if work:
            work.add(batches)
        with self.replaced(index, self.folded(index, condensed)) if condensed else nullcontext():
            go(batches, self.walk, advance)

    def folded(self, index: int, condensed: Condensed) -> Forward:
        """The condensed block as it will be stored: one dense MLP, rounded once."""
        block, (_, experts) = self.by_index[index], self.module(index)
        width = natural_width(self.checkpoint, block, condensed)
        mlp = self._expert(folded(self.checkpoint, block, condensed, width, which) for which in (GATE, UP, DOWN))
        return lambda x: moe.expert_forward(experts, mlp, x)[1]

    def explicit(self, index: int, condensed: Condensed) -> Forward:
        """The condensed block as it is meant: each part on its own, one after the other, its gate in its down matrix
        as the file's dtype rounds it."""
        block, (_, experts) = self.by_index[index], self.module(index)
        dtype = self.checkpoint.tensors[weights(block)[-1]].dtype

        def stored(values: np.ndarray) -> np.ndarray:
            return decode(encode(values, dtype, block.name), dtype, block.name).reshape(values.shape)

        def forward(x: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(x)
            for constant, (gate, up, down) in parts(self.checkpoint, block, condensed):
                expert = self._expert(map(stored, (gate, up, np.float32(constant) * down)))
                total += moe.expert_forward(experts, expert, x)[1]
            return total

        return forward

    def shared_output(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """S(x) as in the files, without the gate it may have; None where the block has no shared expert."""
        names = shared_names(self.by_index[index])
        if names is None:
            return None
        shared = self._expert(map(self.checkpoint.read, names[0]))
        return moe.expert_forward(self.module(index)[1], shared, x)[1] * scale_of(self.checkpoint)

    def _expert(self, matrices: Iterable[np.ndarray]) -> moe.Expert:
        gate, up, down = (torch.tensor(matrix, dtype=self.dtype) for matrix in matrices)
        return moe.Expert(torch.cat([gate, up]), down, has_gate=True)

    def shared_gates(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """(T,) what the shared expert is multiplied by, token by token, in terms of the files: 1, or sigmoid(v x)."""
        names = shared_names(self.by_index[index])
        if names is None or names[1] is None:
            return torch.ones(len(x))
        vector = torch.tensor(self.checkpoint.read(names[1])).float()  # (1, D)
        return (x.float() @ vector.T).sigmoid()[:, 0] / scale_of(self.checkpoint)

    def outputs(self, index: int, x: torch.Tensor, members: list[int]) -> Iterator[torch.Tensor]:
        """(T, D) of each expert named, then of the shared one if there is one, on all tokens x."""
        _, experts = self.module(index)
        for expert in moe.read_experts(self.checkpoint, self.by_index[index], members, self.dtype):
            yield moe.expert_forward(experts, expert, x)[1]
        shared = self.shared_output(index, x)
        if shared is not None:
            yield shared


# --- what a layer is seen to do --------------------------------------------------------------------------------


@dataclass
class Routing:
    """A layer's routing weights: their sum and count per expert (E,), and the mean gate of the shared expert."""

    sums: np.ndarray
    counts: np.ndarray
    shared: float = 1.0

    def noted(self) -> list[Any]:
        """As the journal has it."""
        return [self.sums.tolist(), self.counts.tolist(), self.shared]

    @classmethod
    def of(cls, noted: list[Any]) -> Routing:
        sums, counts, shared = noted
        return cls(np.array(sums), np.array(counts), shared)

    @property
    def gates(self) -> np.ndarray:
        """(E,) the published gates; NaN for experts that no token chose."""
        return fixed_gates(self.sums, self.counts)


@dataclass(frozen=True)
class OutputSums:
    """Sums over tokens: G_ij = <E_i, E_j> (n, n), b_i = <E_i, y> (n,), |y|^2; the shared expert, if any, is last."""

    gram: np.ndarray
    target: np.ndarray
    total: float

    def error(self, members: list[int], gates: np.ndarray) -> float:
        """|y - sum w_i E_i|^2 / |y|^2 of some regressors with these gates."""
        chosen = np.ix_(members, members)
        left = self.total - 2 * gates @ self.target[members] + gates @ self.gram[chosen] @ gates
        return float(max(left, 0.0) / self.total) if self.total else 0.0


def moments(
    blocks: Blocks, index: int, x: torch.Tensor, y: torch.Tensor, members: list[int] | None = None
) -> OutputSums:
    """The sums for inputs x (T, D) and the output y (T, D) to reproduce, of all experts or of some.

    Every expert runs on every token. One expert is in memory at a time, and the outputs of all for as many tokens as
    `MOST_OUTPUTS` allows; sums are in float64.
    """
    experts = list(range(blocks.by_index[index].num_experts)) if members is None else members
    n = len(experts) + (shared_names(blocks.by_index[index]) is not None)
    gram, target, total = np.zeros((n, n)), np.zeros(n), 0.0
    size = max(1, MOST_OUTPUTS // (max(n, 1) * x.shape[1]))
    for some, wanted in zip(x.split(size), y.split(size), strict=True):
        outputs = torch.stack([wanted.float(), *(o.float() for o in blocks.outputs(index, some, experts))])
        for part in outputs.split(64, dim=1):
            flat = part.flatten(1).double()
            products = (flat @ flat.T).numpy()
            gram += products[1:, 1:]
            target += products[1:, 0]
            total += products[0, 0]
    if not np.isfinite(gram).all() or not np.isfinite(total):
        raise CoterieError(
            f"layer {index}: the experts' outputs are NaN or infinite; expected finite (--dtype float32)"
        )
    return OutputSums(gram, target, total)


def check_sum(blocks: Blocks, index: int, x: torch.Tensor, y: torch.Tensor, routed: torch.Tensor) -> None:
    """Raises: CoterieError unless the block's output y is its shared expert plus the routed sum: what is folded."""
    expected, shared = routed.float(), blocks.shared_output(index, x)
    if shared is not None:
        expected = expected + blocks.shared_gates(index, x)[:, None] * shared.float()
    gap = float((y.float() - expected).norm() / y.float().norm().clamp(min=1e-30))
    if gap > ALIKE:
        raise CoterieError(
            f"layer {index}: its block does more than add its shared expert to the experts' weighted sum (off by "
            f"{gap:.1%}), so no dense MLP can stand for it"
        )


def copies(batches: list[Batch]) -> list[Batch]:
    """The same hidden states, to be advanced apart; where they are in maps, in one more of those."""
    maps = batches[0].maps
    if maps is None:
        return [Batch(batch.hidden.clone(), batch.arguments, batch.samples) for batch in batches]
    sizes, hidden = [batch.num_tokens for batch in batches], batches[0].hidden
    places = maps.zeros((sum(sizes), *hidden.shape[2:]), hidden.dtype).split(sizes)
    found = []
    for batch, place in zip(batches, places, strict=True):
        found.append(Batch(batch.loaded(), batch.arguments, batch.samples))
        found[-1].move(maps, place)
    return found


def observe(
    blocks: Blocks, go: Any, index: int, batches: list[Batch], keep: Keep = advance
) -> tuple[Routing, torch.Tensor, torch.Tensor]:
    """Runs a layer as it is: its routing weights, and what entered and left its block, (T, D) each, on some rows.

    keep: what becomes of the layer's outputs.
    Raises: CoterieError for a block that is more than shared expert and routed sum.
    """
    module, _ = blocks.module(index)
    num_tokens = sum(batch.num_tokens for batch in batches)
    rows = torch.arange(min(MOST_TOKENS, num_tokens)) * num_tokens // min(MOST_TOKENS, num_tokens)  # spread evenly
    entered, left, seen = list[torch.Tensor](), list[torch.Tensor](), 0
    routings, sums = list[Routing](), list[torch.Tensor]()

    def tap(module: torch.nn.Module, args: tuple, output: Any) -> None:
        nonlocal seen
        if not isinstance(output, torch.Tensor):
            raise CoterieError(f"{type(module).__name__} returns {type(output).__name__}; expected hidden states alone")
        x, y = (t.reshape(-1, t.shape[-1]) for t in (args[0], output))
        some = rows[(rows >= seen) & (rows < seen + len(x))] - seen
        entered.append(x[some])
        left.append(y[some])
        seen += len(x)

    def walk(routed: Routed) -> torch.Tensor:
        routings.append(routing(blocks, index, routed))
        total = blocks.walk(routed)
        sums.append(total[rows])
        return total

    with module.register_forward_hook(tap):
        go(batches, walk, keep)
    x, y = torch.cat(entered), torch.cat(left)
    check_sum(blocks, index, x, y, sums[0])
    return routings[0], x, y


def routing(blocks: Blocks, index: int, routed: Routed) -> Routing:
    """The routing weights of a layer, counted."""
    num_experts, flat, weights = routed.block.num_experts, routed.chosen.flatten(), routed.weights.flatten().double()
    flat, weights = flat[flat < num_experts], weights[flat < num_experts]  # ids beyond stand for none
    sums = torch.zeros(num_experts, dtype=torch.float64).index_add_(0, flat, weights)
    counts = torch.bincount(flat, minlength=num_experts)
    shared = sum(blocks.shared_gates(index, x).double().sum() for x in routed.x.split(MOST_TOKENS))
    return Routing(sums.numpy(), counts.numpy(), float(shared) / len(routed.x))
