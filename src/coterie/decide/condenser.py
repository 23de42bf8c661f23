"""How `condense` decides: experts and gates, then layers, then (by moments) the gates again, in order.

Importing this module imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from coterie.decide.always_on import Blocks, Work
from coterie.decide.choosing import Chooser, Fits
from coterie.decide.condensing import Condensing
from coterie.decide.sweep import BESIDE, Sweep, hidden_divergence, logit_divergence
from coterie.edits.plan import Decision, Plan
from coterie.forward.activations import Batch
from coterie.forward.layerwise import Layerwise
from coterie.forward.samples import compute_dtype, dtype_name
from coterie.methods import condense as methods
from coterie.methods import layer_search
from coterie.model.layer import Model
from coterie.storage.folders import existing
from coterie.storage.record import Progress
from coterie.storage.resumable import Resumable

Samples = list[tuple[int, ...]]

SEARCHED_TOKENS = 256  # of each sample that the published searches read
HELD_OUT, MOST_HELD_OUT = 4, 16  # every 4th sample judges layers instead of fitting gates; so many at most


class Condenser:
    """One run's search for experts, gates and layers of one model, and what it costs."""

    def __init__(
        self,
        model: Model,
        options: Condensing,
        keep: int,
        by_domain: dict[str, Samples],
        run: Resumable,
        on_progress: Progress,
    ) -> None:
        """keep: experts of each layer. run: where what is found is kept, to go on from."""
        self.options, self.by_domain, self.run, self.on_progress = options, by_domain, run, on_progress
        self.spill = existing(run.out.parent)  # for activations that are too large for memory
        self.blocks = Blocks(model, compute_dtype(model, options.dtype))
        self.indices = sorted(options.layer_ids or self.blocks.by_index)
        samples = [s for given in by_domain.values() for s in given]
        self.work = {kind: Work(sum(map(len, samples)), self.blocks.num_layers) for kind in ("experts", "layers")}
        self.seconds = {"experts": 0.0, "layers": 0.0}
        self.notes: list[str] = []
        method = methods.load(options.select)
        self.needs: str = method.NEEDS
        passes = partial(Layerwise, run, samples)
        self.chooser = Chooser(self.blocks, method, keep, self.work["experts"], passes, self.on_progress)
        self.fitting, self.judging = self._split(samples)

    def _split(self, samples: Samples) -> tuple[Samples, Samples]:
        """Samples that fit gates, and those that judge layers: as published, the beginnings of the same."""
        if self.needs == "divergences":
            return samples, [sample[:SEARCHED_TOKENS] for sample in samples]
        if self.options.layer_ids is not None:
            return samples, []
        taken = range(HELD_OUT - 1, len(samples), HELD_OUT)[:MOST_HELD_OUT]
        if not taken:
            self.notes.append(f"{len(samples)} samples are too few to hold some out: layers are judged on the same")
            return samples, samples
        return [sample for i, sample in enumerate(samples) if i not in taken], [samples[i] for i in taken]

    def decision(self, target: str | None) -> Decision:
        """The layers, experts and gates that the data speak for, and what was measured on the way.

        target: the model type that the result is to be of, if another.
        """
        named, refits = self.options.layer_ids, self.needs == "moments"
        with self._timed("experts"):
            fits = {} if named is not None and refits else self._choose()
        with self._timed("layers"):
            order, scores = (named, []) if named is not None else self._search(fits)
        findings: dict[str, object] = {
            "layer_order": order,
            "layer_scores": scores,
            "layer_error": {str(i): fit.error for i, fit in fits.items()},
        }
        if refits:
            with self._timed("experts"):
                fits = self._fit(sorted(order), in_order=True)
            findings["refit_error"] = {str(i): fits[i].error for i in order}
        findings |= {
            "passes": {kind: round(work.passes, 4) for kind, work in self.work.items()},
            "search_seconds": {kind: round(seconds, 3) for kind, seconds in self.seconds.items()},
            "dtype": dtype_name(self.blocks.dtype),
            "calibration": {"samples": {name: len(given) for name, given in self.by_domain.items()}},
        }
        plan = Plan({}, condensed={str(i): fits[i].condensed for i in sorted(order)}, converted=target)
        return Decision(plan, tuple(self.notes), findings, begun=True)

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[kind] += time.monotonic() - began

    def _embed(self, samples: Samples, copies: int = 1) -> list[Batch]:
        return self.blocks.stream.embed(samples, spill=self.spill, copies=copies)

    def _fit(self, indices: list[int], *, in_order: bool) -> Fits:
        return self.chooser.by_moments(self._embed(self.fitting), indices, in_order=in_order)

    def _choose(self) -> Fits:
        """Experts and gates of every candidate layer, in the model as it is."""
        if self.needs == "moments":
            return self._fit(self.indices, in_order=False)
        if self.needs == "routing":
            found = self.chooser.by_routing(self._embed(self.fitting), self.indices)
        else:
            gates = self.chooser.gates(self._embed(self.fitting), self.indices)
            found = self.chooser.by_divergence(self._embed(self.judging), gates)
        short = [str(i) for i in self.indices if len(found[i].condensed.experts) < self.chooser.keep]
        if short:
            self.notes.append(f"layers {', '.join(short)} keep fewer experts: no token chose the others")
        return found

    def _search(self, fits: Fits) -> tuple[list[int], list[float]]:
        """The layers in the order chosen, and their scores."""
        assert self.options.layers is not None
        metric = (hidden_divergence if self.needs == "divergences" else logit_divergence)(self.blocks)
        condensed = {index: fit.condensed for index, fit in fits.items()}
        embedded = self._embed(self.judging, len(self.indices) + BESIDE)
        sweep = Sweep(self.blocks, embedded, condensed, metric, self.work["layers"], self.run, self.on_progress)
        kind = self.options.layer_search or "greedy"
        return layer_search.search(kind, self.indices, self.options.layers, sweep.score)
