"""How `condense` decides: experts and gates, then layers, then (least squares) the gates again, in order.

Importing this module imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.decide.always_on import Blocks, Work
from coterie.decide.choosing import Choice, by_divergence, by_least_squares, by_routing
from coterie.decide.sweep import BESIDE, Sweep, hidden_divergence, logit_divergence
from coterie.edits.plan import Condensed
from coterie.forward.samples import compute_dtype
from coterie.forward.stream import Batch
from coterie.methods.condense import layers as layer_search
from coterie.model.layer import Model
from coterie.storage.folders import existing
from coterie.storage.record import Progress

if TYPE_CHECKING:
    from coterie.decide.condense import Condensing

Samples = list[tuple[int, ...]]

SEARCHED_TOKENS = 256  # of each sample that the published searches read
HELD_OUT, MOST_HELD_OUT = 4, 16  # every 4th sample judges layers instead of fitting gates; so many at most


class Condenser:
    """One run's decisions about one model, and what they cost."""

    def __init__(
        self, model: Model, options: Condensing, keep: int, samples: Samples, spill: Path, on_progress: Progress
    ) -> None:
        """spill: the folder for activations that are too large for memory."""
        self.options, self.keep, self.spill, self.on_progress = options, keep, spill, on_progress
        self.blocks = Blocks(model, compute_dtype(model, options.dtype))
        self.indices = sorted(options.layer_ids or [int(block.key) for block in model.main])
        self.notes: list[str] = []
        self.fitting, self.judging = self._split(samples)
        tokens = sum(map(len, samples))
        self.work = {kind: Work(tokens, self.blocks.num_layers) for kind in ("experts", "layers")}
        self.seconds = {"experts": 0.0, "layers": 0.0}

    @property
    def is_official(self) -> bool:
        return self.options.select == "official"

    def _split(self, samples: Samples) -> tuple[Samples, Samples]:
        """Samples that fit gates, and those that judge layers: as published, the beginnings of the same."""
        if self.is_official:
            return samples, [sample[:SEARCHED_TOKENS] for sample in samples]
        if self.options.layer_ids is not None:
            return samples, []
        held_out = samples[HELD_OUT - 1 :: HELD_OUT][:MOST_HELD_OUT]
        if not held_out:
            self.notes.append(f"{len(samples)} samples are too few to hold some out: layers are judged on the same")
            return samples, samples
        taken = set(range(HELD_OUT - 1, len(samples), HELD_OUT)[:MOST_HELD_OUT])
        return [sample for i, sample in enumerate(samples) if i not in taken], held_out

    def make(self) -> tuple[dict[int, Condensed], dict[str, Any]]:
        """What each chosen layer is condensed to, and the findings for the report."""
        named, refits = self.options.layer_ids is not None, self.options.select == "least-squares"
        choice = Choice() if named and refits else self._timed("experts", self._choose)
        order, scores = list(self.options.layer_ids or []), []
        if not named:
            order, scores = self._timed("layers", lambda: self._search(choice))
        findings = self._findings(choice, order, scores)
        if refits:
            choice = self._timed("experts", lambda: self._fit(order, in_order=True))
            findings |= {"refit_error": {str(i): choice.errors[i] for i in order}}
        findings |= self._costs()
        return {i: choice.condensed[i] for i in order}, findings

    def _timed(self, kind: str, step: Callable[[], Any]) -> Any:
        began = time.monotonic()
        try:
            return step()
        finally:
            self.seconds[kind] += time.monotonic() - began

    def _embed(self, samples: Samples, copies: int = 1) -> list[Batch]:
        return self.blocks.stream.embed(samples, spill=existing(self.spill), copies=copies)

    def _choose(self) -> Choice:
        """Experts and gates of every candidate layer, in the model as it is."""
        if self.options.select == "least-squares":
            return self._fit(self.indices, in_order=False)
        work = self.work["experts"]
        choice, gates = by_routing(
            self.blocks, self._embed(self.fitting), self.indices, self.keep, work, self.on_progress
        )
        if self.is_official:
            choice = by_divergence(self.blocks, self._embed(self.judging), gates, self.keep, work, self.on_progress)
        short = [i for i in self.indices if len(choice.condensed[i].experts) < self.keep]
        if short:
            self.notes.append(f"layers {', '.join(map(str, short))} keep fewer experts: no token chose the others")
        return choice

    def _fit(self, indices: list[int], *, in_order: bool) -> Choice:
        return by_least_squares(
            self.blocks, self._embed(self.fitting), sorted(indices), self.keep, self.work["experts"], self.on_progress,
            in_order=in_order,
        )  # fmt: skip

    def _search(self, choice: Choice) -> tuple[list[int], list[float]]:
        assert self.options.layers is not None
        metric = hidden_divergence(self.blocks) if self.is_official else logit_divergence(self.blocks)
        embedded = self._embed(self.judging, len(self.indices) + BESIDE)
        sweep = Sweep(self.blocks, embedded, choice.condensed, metric, self.work["layers"], self.on_progress)
        kind = self.options.layer_search or "greedy"
        return layer_search.search(kind, self.indices, self.options.layers, sweep.score)

    def _findings(self, choice: Choice, order: list[int], scores: list[float]) -> dict[str, Any]:
        return {
            "layer_order": order,
            "layer_scores": scores,
            "layer_error": {str(i): error for i, error in choice.errors.items()},
            "notes": self.notes,
        }

    def _costs(self) -> dict[str, Any]:
        return {
            "passes": {kind: round(work.passes, 4) for kind, work in self.work.items()},
            "search_seconds": {kind: round(seconds, 3) for kind, seconds in self.seconds.items()},
        }
