"""Experts and gates for condensed layers, measured in the streaming forward and chosen by `methods/condense`.

Moments and routing need one pass of the model as it is; the published search measures gates on whole samples and then
tries every expert on their beginnings. Fitted in order, each condensed layer follows what its original computes on the
activations that the condensed layers before it produce.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from coterie.decide.always_on import Blocks, Routing, Work, moments, observe
from coterie.edits.folding import shared_names
from coterie.edits.plan import Condensed
from coterie.errors import CoterieError
from coterie.forward.activations import Batch
from coterie.forward.layerwise import Layerwise
from coterie.forward.stream import advance
from coterie.methods.condense import official
from coterie.storage.record import Progress

ROWS = 4096  # tokens whose divergence is computed at once
CACHE = 2**31  # bytes of experts' outputs kept between the rounds of the published search

Found = TypeVar("Found", "Fit", Routing)


class Fit(NamedTuple):
    """What a layer would be condensed to, and the share of its output's square that is lost thereby."""

    condensed: Condensed
    error: float

    def noted(self) -> list[Any]:
        """As the journal has it."""
        return [*map(list, (self.condensed.experts, self.condensed.gates)), self.condensed.shared_gate, self.error]

    @classmethod
    def of(cls, noted: list[Any]) -> Fit:
        experts, gates, shared, error = noted
        return cls(Condensed(tuple(experts), tuple(gates), shared), error)


Fits = dict[int, Fit]


@dataclass(frozen=True)
class Chooser:
    """A selection (a module of `methods/condense`) at work on a model: `keep` experts of each layer and their gates."""

    blocks: Blocks
    method: ModuleType
    keep: int
    work: Work
    passes: Callable[[str], Layerwise]  # by their names
    on_progress: Progress

    def by_moments(self, batches: list[Batch], indices: list[int], *, in_order: bool) -> Fits:
        """Each layer fitted to what its block computes on what reaches it.

        in_order: layers are condensed as the pass goes on; else all are measured in the model as it is.
        """

        def fit(go: Any, index: int) -> Fit:
            _, x, y = observe(self.blocks, go, index, batches, (lambda *_: None) if in_order else advance)
            found, num_experts = moments(self.blocks, index, x, y), self.blocks.by_index[index].num_experts
            num_shared = len(found.target) - num_experts
            chosen, gates = self.method.choose(found.gram, found.target, self.keep, num_shared)
            shared = float(gates[-1]) if num_shared else 1.0
            condensed = Condensed(tuple(chosen), tuple(map(float, gates[: len(chosen)])), shared)
            if in_order:
                self.blocks.run(go, index, batches, condensed, self.work)
            return Fit(condensed, found.error([*chosen, *range(num_experts, num_experts + num_shared)], gates))

        return self._each("fitting layers" if in_order else "measuring layers", batches, indices, fit, Fit)

    def by_routing(self, batches: list[Batch], indices: list[int]) -> Fits:
        """Experts by the router's weights in the model as it is, under the published gates."""

        def fit(go: Any, index: int) -> Fit:
            found, x, y = observe(self.blocks, go, index, batches)
            return self._fit(index, self.method.choose(found.sums, self.keep), found, x, y)

        return self._each("measuring gates", batches, indices, fit, Fit)

    def gates(self, batches: list[Batch], indices: list[int]) -> dict[int, Routing]:
        """The routing weights of those layers in the model as it is."""

        def seen(go: Any, index: int) -> Routing:
            return observe(self.blocks, go, index, batches)[0]

        return self._each("measuring gates", batches, indices, seen, Routing)

    def by_divergence(self, batches: list[Batch], gates: dict[int, Routing]) -> Fits:
        """The published search: experts whose layer alone, condensed, leaves hidden states that diverge least."""
        weights = text_weights(batches)

        def fit(go: Any, index: int) -> Fit:
            parts, found = list[Around](), gates[index]
            surroundings(self.blocks, go, index, batches, parts.append)
            around = Around(*map(torch.cat, zip(*parts, strict=True)))
            tried, after = Tried(self.blocks, index, around, found), self.blocks.compared(index, around.after)

            def divergences(chosen: list[int], left: list[int]) -> list[float]:
                self.work.add(batches, len(left))
                states = (self.blocks.compared(index, state) for state in tried.states(chosen, left))
                return [divergence(after.split(ROWS), state.split(ROWS), weights) for state in states]

            chosen = self.method.choose(official.candidates(found.gates), self.keep, divergences)
            return self._fit(index, chosen, found, around.x, around.y)

        return self._each("searching experts", batches, list(gates), fit, Fit)

    def _each(
        self, stage: str, batches: list[Batch], indices: list[int], run: Callable[[Any, int], Found], kind: type[Found]
    ) -> dict[int, Found]:
        """One pass: what `run(go, index)`, which runs a loaded layer, says of each of those; others run as they are."""
        layerwise, num_layers = self.passes(stage), max(indices) + 1
        found = {note["layer"]: kind.of(note["found"]) for note in layerwise.notes if note["found"]}
        self.work.token_layers = layerwise.done["work"] if layerwise.done else self.work.token_layers

        def layers() -> Iterator[int]:
            for index in range(layerwise.first(batches, num_layers), num_layers):
                with self.blocks.stream.loaded(index) as go:
                    if index in indices:
                        self.work.add(batches)
                        found[index] = run(go, index)
                    else:
                        self.blocks.run(go, index, batches, None, self.work)
                yield index

        def state(index: int) -> dict[str, object]:
            return {"found": found[index].noted() if index in found else None, "work": self.work.token_layers}

        layerwise.run(batches, layers(), num_layers, state, partial(self.on_progress, stage))
        return found

    def _fit(self, index: int, chosen: list[int], found: Routing, x: torch.Tensor, y: torch.Tensor) -> Fit:
        """Those experts under the published gates, and the share of |y|^2 that they lose on inputs x (T, D)."""
        condensed = Condensed(tuple(chosen), tuple(float(found.gates[e]) for e in chosen), found.shared)
        gates = [*condensed.gates, *([found.shared] if shared_names(self.blocks.by_index[index]) else [])]
        sums = moments(self.blocks, index, x, y, chosen)
        return Fit(condensed, sums.error(list(range(len(gates))), np.array(gates)))


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


def divergence(expected: Iterable[torch.Tensor], found: Iterable[torch.Tensor], weights: torch.Tensor) -> float:
    """The weighted sum of token-wise divergences; hidden states (T, D) come in pieces."""
    total, position = 0.0, 0
    for p, q in zip(expected, found, strict=True):
        total += float(official.jensen_shannon(p, q) @ weights[position : position + len(p)])
        position += len(p)
    return total


class Tried:
    """What leaves a layer with some of its experts; their outputs are computed once where they fit into memory."""

    def __init__(self, blocks: Blocks, index: int, around: Around, routing: Routing) -> None:
        self.blocks, self.index, self.around, self.gates = blocks, index, around, routing.gates
        self.fits = blocks.by_index[index].num_experts * around.x.nbytes <= CACHE
        self.kept: dict[int, torch.Tensor] = {}
        self.base, shared = torch.zeros_like(around.x), blocks.shared_output(index, around.x)
        if shared is not None:
            self.base += routing.shared * shared

    def states(self, chosen: list[int], left: list[int]) -> Iterator[torch.Tensor]:
        """(T, D) with each candidate added to the experts chosen."""
        fixed = self.base.clone()
        for part in self._weighted(chosen):
            fixed += part
        for part in self._weighted(left):
            yield self.around.before + (fixed + part)

    def _weighted(self, members: list[int]) -> Iterator[torch.Tensor]:
        computed = self.blocks.outputs(self.index, self.around.x, [e for e in members if e not in self.kept])
        for e in members:
            y = self.kept[e] if e in self.kept else next(computed)
            if self.fits:
                self.kept[e] = y
            yield self.gates[e] * y


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
