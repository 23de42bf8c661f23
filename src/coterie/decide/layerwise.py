"""A model's decoder layers one after the other over calibration samples, resumable after each.

What comes out of a layer is saved beside the files being written, so that a killed run goes on with the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError
from coterie.forward.activations import Batch, Walk, restore, save
from coterie.forward.samples import Calibration, compute_dtype, read_samples
from coterie.forward.stream import Stream
from coterie.model.layer import Model
from coterie.storage.folders import existing
from coterie.storage.record import Progress
from coterie.storage.writer import Writer


@dataclass
class Layerwise:
    """Samples by domain, what to say of them, and the model that they stream through."""

    by_domain: dict[str, list[tuple[int, ...]]]
    notes: list[str]
    stream: Stream
    batches: list[Batch] = field(repr=False)

    @classmethod
    def of(cls, model: Model, calibration: Calibration, dtype: str, spill: Path) -> Layerwise:
        """spill: the folder for activations that are too large for memory.

        Raises: CoterieError for data or a model that cannot be streamed: before anything is written.
        """
        by_domain, notes = read_samples(model, calibration)
        stream = Stream(model, compute_dtype(model, dtype))
        samples = [sample for found in by_domain.values() for sample in found]
        return cls(by_domain, notes, stream, stream.embed(samples, spill=existing(spill)))

    @property
    def digest(self) -> str:
        """Of the samples: what a resumed run must have been begun with."""
        samples = [sample for found in self.by_domain.values() for sample in found]
        return hashlib.sha256(repr(samples).encode()).hexdigest()

    def run(self, writer: Writer, job: Job, stage: str, on_progress: Progress) -> None:
        """Passes all layers through the job's walk, from where an earlier run stopped.

        Raises: CoterieError where that was begun on other data.
        """
        done = writer.units[-1] if writer.units else None
        first, num_layers = 0, len(self.stream.layers)
        if done:
            if done["samples"] != self.digest:
                raise CoterieError(
                    f"{writer.partial}: was begun on other data; give the same, or start anew with --overwrite"
                )
            first = done["layer"] + 1
            job.absorb(done)
            restore(self.batches, _saved(writer, done["layer"]))
        for index in self.stream.run(self.batches, job.walk, first):
            save(self.batches, _saved(writer, index))
            writer.unit({"layer": index, "samples": self.digest, **job.state()}, num_layers)
            _saved(writer, index - 1).unlink(missing_ok=True)
            on_progress(stage, index + 1, num_layers)
        _saved(writer, num_layers - 1).unlink(missing_ok=True)


@dataclass(frozen=True)
class Job:
    """What is done to the experts of each layer; and what a resumed run has to know of the layers done."""

    walk: Walk
    state: Callable[[], Mapping[str, object]]
    absorb: Callable[[Mapping[str, Any]], None]


def _saved(writer: Writer, layer: int) -> Path:
    return writer.partial / f"hidden-{layer}.safetensors"
