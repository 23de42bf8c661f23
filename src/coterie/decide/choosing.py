"""Experts and gates for condensed layers, measured in the streaming forward and chosen by `methods/condense`.

Least squares and routing need one pass of the model as it is; the published search measures gates on whole samples and
then tries every expert on their beginnings. Fitted in order, each condensed layer follows what its original computes
on the activations that the condensed layers before it produce.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from coterie.decide.always_on import Blocks, Moments, Routing, Work, leave, moments, observe, routing_walk
from coterie.edits.folding import shared_names
from coterie.edits.plan import Condensed
from coterie.errors import CoterieError
from coterie.forward.stream import Batch, advance
from coterie.methods.condense import least_squares, official, routing
from coterie.storage.record import Progress

ROWS = 4096  # tokens whose divergence is computed at once
CACHE = 2**31  # bytes of experts' outputs kept between the rounds of the published search


@dataclass
class Choice:
    """What each layer would be condensed to, and the share of its output's square that is lost thereby."""

    condensed: dict[int, Condensed] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)


# --- least squares ---------------------------------------------------------------------------------------------


def by_least_squares(
    blocks: Blocks,
    batches: list[Batch],
    indices: list[int],
    keep: int,
    work: Work,
    on_progress: Progress,
    *,
    in_order: bool,
) -> Choice:
    """One pass, each layer fitted to what its block computes on what reaches it.

    in_order: layers are condensed as the pass goes on; else all are measured in the model as it is.
    """
    result, last = Choice(), max(indices)
    for index in range(last + 1):
        with blocks.stream.loaded(index) as go:
            if index in indices:
                work.add(batches)
                x, y = observe(blocks, go, index, batches, leave if in_order else advance)
                found = moments(blocks, index, x, y)
                result.condensed[index], result.errors[index] = fit(found, blocks.by_index[index].num_experts, keep)
            if in_order or index not in indices:
                blocks.run(go, index, batches, result.condensed.get(index), work)
        on_progress("fitting layers" if in_order else "measuring layers", index + 1, last + 1)
    return result


def fit(found: Moments, num_experts: int, keep: int) -> tuple[Condensed, float]:
    """The least-squares choice from a layer's sums, and its error."""
    num_shared = len(found.target) - num_experts
    chosen, gates = least_squares.pursue(found.gram, found.target, keep, num_shared)
    error = found.error([*chosen, *range(num_experts, num_experts + num_shared)], gates)
    shared = float(gates[-1]) if num_shared else 1.0
    return Condensed(tuple(chosen), tuple(map(float, gates[: len(chosen)])), shared), error


# --- by the router's weights -----------------------------------------------------------------------------------


def by_routing(
    blocks: Blocks, batches: list[Batch], indices: list[int], keep: int, work: Work, on_progress: Progress
) -> tuple[Choice, dict[int, Routing]]:
    """One pass of the model as it is: the experts with most routing mass, under the published gates; and all gates."""
    result, found = Choice(), dict[int, Routing]()
    walk, last = routing_walk(blocks, found), max(indices)
    for index in range(last + 1):
        with blocks.stream.loaded(index) as go:
            work.add(batches)
            if index in indices:
                x, y = observe(blocks, go, index, batches, walk=walk)
                chosen = routing.choose(found[index].sums, keep)
                result.condensed[index] = with_fixed_gates(found[index], chosen)
                result.errors[index] = error_of(blocks, index, result.condensed[index], x, y)
            else:
                go(batches, blocks.walk, advance)
        on_progress("measuring gates", index + 1, last + 1)
    return result, found


def with_fixed_gates(found: Routing, chosen: list[int]) -> Condensed:
    gates = official.fixed_gates(found.sums, found.counts)
    return Condensed(tuple(chosen), tuple(float(gates[e]) for e in chosen), found.shared)


def error_of(blocks: Blocks, index: int, condensed: Condensed, x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of |y|^2 that a condensed block loses on inputs x (T, D)."""
    found = moments(blocks, index, x, y, list(condensed.experts))
    gates = [*condensed.gates, *([condensed.shared_gate] if shared_names(blocks.by_index[index]) else [])]
    return found.error(list(range(len(gates))), np.array(gates))


# --- as published ----------------------------------------------------------------------------------------------


class Around(NamedTuple):
    """On some tokens, four (T, D): what a block is added to, what enters it, what leaves it, what leaves the layer."""

    before: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    after: torch.Tensor


def by_divergence(
    blocks: Blocks,
    batches: list[Batch],
    gates: dict[int, Routing],
    keep: int,
    work: Work,
    on_progress: Progress,
) -> Choice:
    """The published search: experts whose layer alone, condensed, leaves hidden states that diverge least."""
    result, last = Choice(), max(gates)
    weights = text_weights(batches)
    for index in range(last + 1):
        with blocks.stream.loaded(index) as go:
            if index in gates:
                work.add(batches)
                parts = list[Around]()
                surroundings(blocks, go, index, batches, parts.append)
                around = Around(*map(torch.cat, zip(*parts, strict=True)))
                chosen = _search(blocks, index, around, weights, gates[index], keep, partial(work.add, batches))
                result.condensed[index] = with_fixed_gates(gates[index], chosen)
                result.errors[index] = error_of(blocks, index, result.condensed[index], around.x, around.y)
            else:
                blocks.run(go, index, batches, None, work)
        on_progress("searching experts", index + 1, last + 1)
    return result


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


def _search(
    blocks: Blocks,
    index: int,
    around: Around,
    weights: torch.Tensor,
    found: Routing,
    keep: int,
    count: Callable[[int], None],
) -> list[int]:
    """Greedy over the experts that have a gate; `count` is told how often the layer was tried."""
    gates = official.fixed_gates(found.sums, found.counts)
    outputs = _cached(blocks, index, around.x)
    shared = blocks.shared(index)
    base = torch.zeros_like(around.x)
    if shared:
        base += found.shared * blocks.shared_output(blocks.module(index)[1], shared, around.x)

    def divergences(chosen: list[int], left: list[int]) -> list[float]:
        count(len(left))
        fixed = base.clone()
        for e, y in outputs(chosen):
            fixed += gates[e] * y
        scores = {}
        for e, y in outputs(left):
            states = around.before + (fixed + gates[e] * y)
            scores[e] = divergence(iter(around.after.split(ROWS)), iter(states.split(ROWS)), weights)
        return [scores[e] for e in left]

    return official.greedy(official.candidates(gates), keep, divergences)


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

    with _inputs_of_norms(blocks.stream.layers[index]) as norms:
        handles = [
            module.register_forward_pre_hook(lambda _, args: entered.append((norms.get(args[0].data_ptr()), args[0]))),
            module.register_forward_hook(lambda _, args, output: left.append(output)),
        ]
        try:
            go(batches, blocks.walk, through)
        finally:
            for handle in handles:
                handle.remove()


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

    handles = [register_module_forward_pre_hook(begin), register_module_forward_hook(note)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
