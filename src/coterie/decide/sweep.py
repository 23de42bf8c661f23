"""Scores of sets of condensed layers, by running the model with them condensed.

All candidates of a round go through the model together, layer by layer: up to its own layer a candidate is the base,
so what lies before the first candidate is kept from round to round and not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from coterie.decide.always_on import Blocks, Work, copies
from coterie.decide.choosing import divergence, text_weights
from coterie.edits.plan import Condensed
from coterie.forward.activations import Batch
from coterie.storage.record import Progress
from coterie.storage.resumable import Resumable

BESIDE = 4  # sets of hidden states, beside one of each candidate: embedded, before the first, base and original
ROWS = 256  # tokens whose logits are compared at once, in float64

Metric = Callable[[list[Batch], list[Batch]], float]  # last layer's outputs: (of the original, found) -> how far


@dataclass
class Sweep:
    """The model on some samples, with any of its layers condensed; `score` is what `methods/layer_search.py` wants."""

    blocks: Blocks
    embedded: list[Batch]
    condensed: dict[int, Condensed]
    metric: Metric
    work: Work
    run: Resumable
    on_progress: Progress

    def __post_init__(self) -> None:
        # Batches at a layer's entrance, and which layers before it are condensed in them; None: known to an earlier
        # process.
        self._prefix: tuple[int, frozenset[int], list[Batch] | None] = (0, frozenset(), self.embedded)
        self.original = self._advanced(copies(self.embedded), 0, self.blocks.num_layers, ())

    def score(self, chosen: tuple[int, ...], left: list[int]) -> list[float]:
        """How far the model is from the original with each candidate condensed on top of those chosen."""
        before = frozenset(c for c in chosen if c < min(left))
        made: list[list[Batch]] = []

        def make() -> list[Any]:
            made.append(self._reached(chosen, min(left)))
            return [self._scores(made[0], chosen, left), self.work.token_layers]

        scores, self.work.token_layers = self.run.step(f"with {chosen} condensed", make)
        self._prefix = (min(left), before, made[0] if made else None)
        return list(scores)

    def _reached(self, chosen: tuple[int, ...], first: int) -> list[Batch]:
        """The batches at the entrance of layer `first`."""
        known, condensed, batches = self._prefix
        if known > first or condensed != frozenset(c for c in chosen if c < known):
            known, batches = 0, self.embedded
        if batches is None:
            counted = self.work.token_layers
            batches = self._advanced(copies(self.embedded), 0, known, chosen)
            self.work.token_layers = counted
        return self._advanced(copies(batches), known, first, chosen)

    def _scores(self, batches: list[Batch], chosen: tuple[int, ...], left: list[int]) -> list[float]:
        first, total = min(left), self.blocks.num_layers
        base = copies(batches)
        running: dict[int, list[Batch]] = {}
        for index in range(first, total):
            with self.blocks.stream.loaded(index) as go:
                if index in left:
                    running[index] = copies(base)
                    self.blocks.run(go, index, running[index], self.condensed[index], self.work)
                others = [batch for candidate, own in running.items() if candidate != index for batch in own]
                others += base if index < max(left) else []
                if others:
                    self.blocks.run(go, index, others, self.condensed[index] if index in chosen else None, self.work)
            self.on_progress(f"searching layers, round {len(chosen) + 1}", index + 1 - first, total - first)
        return [self.metric(self.original, running[candidate]) for candidate in left]

    def _advanced(self, batches: list[Batch], first: int, last: int, chosen: tuple[int, ...]) -> list[Batch]:
        for index in range(first, last):
            with self.blocks.stream.loaded(index) as go:
                self.blocks.run(go, index, batches, self.condensed[index] if index in chosen else None, self.work)
        return batches


def hidden_divergence(blocks: Blocks) -> Metric:
    """The published metric: of the last hidden states after the final norm, as right after a layer."""

    def metric(expected: list[Batch], found: list[Batch]) -> float:
        return divergence(_normed(blocks, expected), _normed(blocks, found), text_weights(expected))

    return metric


def _normed(blocks: Blocks, batches: list[Batch]) -> Iterator[torch.Tensor]:
    """What the head reads: (T, D) of each batch."""
    return (blocks.normed(batch).flatten(0, -2) for batch in batches)


def logit_divergence(blocks: Blocks) -> Metric:
    """The mean over tokens of KL(original || found) between next-token distributions, in nats."""

    def metric(expected: list[Batch], found: list[Batch]) -> float:
        total, num_tokens = 0.0, 0
        for one, other in zip(expected, found, strict=True):
            pairs = zip(*(blocks.stream.logits(b).flatten(0, -2).split(ROWS) for b in (one, other)), strict=True)
            for p, q in pairs:
                left, right = (logits.double().log_softmax(-1) for logits in (p, q))
                total += float(F.kl_div(right, left, reduction="sum", log_target=True))
            num_tokens += one.num_tokens
        return total / num_tokens

    return metric
