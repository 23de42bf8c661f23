"""Experts and gates for condensed layers, measured in the streaming forward and chosen by `methods/condense`.

Moments and routing need one pass of the model as it is; the published search measures gates on whole samples and then
tries every expert on their beginnings. Fitted in order, each condensed layer follows what its original computes on the
activations that the condensed layers before it produce.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from coterie.decide.always_on import Blocks, Routing, Work, leave, moments, observe, routing_walk
from coterie.edits.folding import shared_names
from coterie.edits.plan import Condensed
from coterie.errors import CoterieError
from coterie.forward.activations import Batch
from coterie.forward.stream import advance
from coterie.methods.condense import official
from coterie.storage.record import Progress

ROWS = 4096  # tokens whose divergence is computed at once
CACHE = 2**31  # bytes of experts' outputs kept between the rounds of the published search

Divergences = Callable[[list[int], list[int]], list[float]]  # (experts chosen, candidates) -> one a candidate


@dataclass
class Fits:
    """What each layer would be condensed to, and the share of its output's square that is lost thereby."""

    condensed: dict[int, Condensed] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Chooser:
    """A selection (a module of `methods/condense`) at work on a model: `keep` experts of each layer and their gates."""

    blocks: Blocks
    method: ModuleType
    keep: int
    work: Work
    on_progress: Progress

    def by_moments(self, batches: list[Batch], indices: list[int], *, in_order: bool) -> Fits:
        """Each layer fitted to what its block computes on what reaches it.

        in_order: layers are condensed as the pass goes on; else all are measured in the model as it is.
        """
        result = Fits()

        def fit(go: Any, index: int) -> None:
            x, y = observe(self.blocks, go, index, batches, leave if in_order else advance)
            found, num_experts = moments(self.blocks, index, x, y), self.blocks.by_index[index].num_experts
            num_shared = len(found.target) - num_experts
            chosen, gates = self.method.choose(found.gram, found.target, self.keep, num_shared)
            shared = float(gates[-1]) if num_shared else 1.0
            condensed = Condensed(tuple(chosen), tuple(map(float, gates[: len(chosen)])), shared)
            result.condensed[index] = condensed
            result.errors[index] = found.error([*chosen, *range(num_experts, num_experts + num_shared)], gates)
            if in_order:
                self.blocks.run(go, index, batches, condensed, self.work)

        self._each("fitting layers" if in_order else "measuring layers", batches, indices, fit)
        return result

    def by_routing(self, batches: list[Batch], indices: list[int]) -> Fits:
        """Experts by the router's weights in the model as it is, under the published gates."""
        result = Fits()

        def choose(index: int, found: Routing, x: torch.Tensor, y: torch.Tensor) -> None:
            self._add(result, index, self.method.choose(found.sums, self.keep), found, x, y)

        self._routings(batches, indices, choose)
        return result

    def gates(self, batches: list[Batch], indices: list[int]) -> dict[int, Routing]:
        """The routing weights of those layers in the model as it is."""
        return self._routings(batches, indices, lambda *_: None)

    def by_divergence(self, batches: list[Batch], gates: dict[int, Routing]) -> Fits:
        """The published search: experts whose layer alone, condensed, leaves hidden states that diverge least."""
        result, weights = Fits(), text_weights(batches)

        def search(go: Any, index: int) -> None:
            parts = list[Around]()
            surroundings(self.blocks, go, index, batches, parts.append)
            around = Around(*map(torch.cat, zip(*parts, strict=True)))
            tried = _divergences(self.blocks, index, around, weights, gates[index])

            def divergences(chosen: list[int], left: list[int]) -> list[float]:
                self.work.add(batches, len(left))
                return tried(chosen, left)

            chosen = self.method.choose(official.candidates(gates[index].gates), self.keep, divergences)
            self._add(result, index, chosen, gates[index], around.x, around.y)

        self._each("searching experts", batches, list(gates), search)
        return result

    def _each(self, stage: str, batches: list[Batch], indices: list[int], run: Callable[[Any, int], None]) -> None:
        """One pass: `run(go, index)` runs each of those layers, loaded; the others run as they are."""
        last = max(indices)
        for index in range(last + 1):
            with self.blocks.stream.loaded(index) as go:
                if index in indices:
                    self.work.add(batches)
                    run(go, index)
                else:
                    self.blocks.run(go, index, batches, None, self.work)
            self.on_progress(stage, index + 1, last + 1)

    def _routings(
        self,
        batches: list[Batch],
        indices: list[int],
        use: Callable[[int, Routing, torch.Tensor, torch.Tensor], None],
    ) -> dict[int, Routing]:
        """Routing weights of those layers; `use` is given each, with some inputs and outputs (T, D) of its block."""
        found: dict[int, Routing] = {}
        walk = routing_walk(self.blocks, found)

        def measure(go: Any, index: int) -> None:
            x, y = observe(self.blocks, go, index, batches, walk=walk)
            use(index, found[index], x, y)

        self._each("measuring gates", batches, indices, measure)
        return found

    def _add(
        self, result: Fits, index: int, chosen: list[int], found: Routing, x: torch.Tensor, y: torch.Tensor
    ) -> None:
        """Those experts under the published gates, and the share of |y|^2 that they lose on inputs x (T, D)."""
        condensed = Condensed(tuple(chosen), tuple(float(found.gates[e]) for e in chosen), found.shared)
        gates = [*condensed.gates, *([found.shared] if shared_names(self.blocks.by_index[index]) else [])]
        sums = moments(self.blocks, index, x, y, chosen)
        result.condensed[index] = condensed
        result.errors[index] = sums.error(list(range(len(gates))), np.array(gates))


# --- the divergences of the published search ---------------------------------------------------------------------


class Around(NamedTuple):
    """On some tokens, four (T, D): what a block is added to, what enters it, what leaves it, what leaves the layer."""

    before: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    after: torch.Tensor


def text_weights(batches: list[Batch]) -> torch.Tensor:
    """(T,) each token's weight in a mean over tokens of a text, then over texts, in the order of the batches."""
    num_texts = sum(len(batch.hidden) for batch in batches)
    parts = [torch.full((b.num_tokens,), 1 / (num_texts * b.hidden.shape[1]), dtype=torch.float64) for b in batches]
    return torch.cat(parts)


def divergence(expected: Iterator[torch.Tensor], found: Iterator[torch.Tensor], weights: torch.Tensor) -> float:
    """The weighted sum of token-wise divergences; hidden states (T, D) come in pieces."""
    total, position = 0.0, 0
    for p, q in zip(expected, found, strict=True):
        part = weights[position : position + len(p)]
        total += float(official.jensen_shannon(p, q) @ part)
        position += len(p)
    return total


def _divergences(blocks: Blocks, index: int, around: Around, weights: torch.Tensor, found: Routing) -> Divergences:
    """How far the layer's output is from its own with each candidate added to the experts chosen."""
    outputs, gates = _cached(blocks, index, around.x), found.gates
    shared = blocks.shared(index)
    base = torch.zeros_like(around.x)
    if shared:
        base += found.shared * blocks.shared_output(blocks.module(index)[1], shared, around.x)

    def divergences(chosen: list[int], left: list[int]) -> list[float]:
        fixed = base.clone()
        for e, y in outputs(chosen):
            fixed += gates[e] * y
        scores = {}
        for e, y in outputs(left):
            states = around.before + (fixed + gates[e] * y)
            scores[e] = divergence(iter(around.after.split(ROWS)), iter(states.split(ROWS)), weights)
        return [scores[e] for e in left]

    return divergences


def _cached(blocks: Blocks, index: int, x: torch.Tensor) -> Callable[[list[int]], Iterator[tuple[int, torch.Tensor]]]:
    """Experts' outputs on x by number, computed once where they fit into memory."""
    fits = blocks.by_index[index].num_experts * x.nbytes <= CACHE
    kept: dict[int, torch.Tensor] = {}

    def outputs(members: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        missing = [e for e in members if e not in kept]
        computed = blocks.outputs(index, x, missing)
        for e in members:
            y = kept[e] if e in kept else next(computed)
            if fits:
                kept[e] = y
            yield e, y

    return outputs


def surroundings(blocks: Blocks, go: Any, index: int, batches: list[Batch], keep: Callable[[Around], None]) -> None:
    """Advances the batches through a layer as it is; `keep` is given what surrounds its block, one batch at a time.

    Raises: CoterieError for a layer that does not add its block's output to the hidden states that the block's norm
    read, as the published search supposes.
    """
    module, _ = blocks.module(index)
    entered, left = deque[tuple[torch.Tensor | None, torch.Tensor]](), deque[torch.Tensor]()

    def through(batch: Batch, output: torch.Tensor) -> None:
        before, x = entered.popleft()
        y, after = left.popleft().flatten(0, -2), output.flatten(0, -2)
        if before is None or not torch.equal(before.flatten(0, -2) + y, after):
            raise CoterieError(
                f"layer {index} does not simply add its MoE block's output to the hidden states before it, which the "
                "published searches need; `condense --select least-squares` does not"
            )
        keep(Around(before.flatten(0, -2), x.flatten(0, -2), y, after))
        advance(batch, output)

    with (
        _inputs_of_norms(blocks.stream.layers[index]) as norms,
        module.register_forward_pre_hook(lambda _, args: entered.append((norms.get(args[0].data_ptr()), args[0]))),
        module.register_forward_hook(lambda _, args, output: left.append(output)),
    ):
        go(batches, blocks.walk, through)


@contextmanager
def _inputs_of_norms(layer: torch.nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """Where an output of one of the layer's parts lies -> the input that it was made of, in the batch that runs.

    Hooks of the parts themselves would not do: a layer that runs twice (`forward/suspended.py`) calls them in the first
    run, and its block's in the second, in which norms give out copies of what they computed.
    """
    found: dict[int, torch.Tensor] = {}
    parts = set(layer.children())

    def begin(module: torch.nn.Module, _: Any) -> None:
        if module is layer:
            found.clear()

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        if module in parts and isinstance(output, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            found[output.data_ptr()] = args[0]

    with register_module_forward_pre_hook(begin), register_module_forward_hook(note):
        yield found
