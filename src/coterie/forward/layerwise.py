"""What changes weights layer by layer, on calibration data: the samples, and how a killed run goes on after a layer.

Importing this module does not import torch, so that commands which use it start quickly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import CoterieError
from coterie.forward.samples import Calibration, compute_dtype, counted, dtype_name, read_samples
from coterie.model.layer import Model
from coterie.storage.folders import existing
from coterie.storage.resumable import Resumable

if TYPE_CHECKING:
    from coterie.forward.activations import Batch
    from coterie.forward.stream import Stream

Samples = Sequence[tuple[int, ...]]


class Calibrated:
    """What a calibrated run needs before it writes: token sequences, and the model to stream them through."""

    def __init__(
        self, model: Model, calibration: Calibration, dtype: str, spill: Path, begun: Path | None = None
    ) -> None:
        """spill: the folder for activations that are too large for memory. begun: as in `compute_dtype`.

        Raises: CoterieError for data or a model that cannot be streamed.
        """
        from coterie.forward.stream import Stream

        self.model, self.dtype = model, compute_dtype(model, dtype, begun)
        self.by_domain, self.notes = read_samples(model, calibration)
        self.samples: Samples = [sample for found in self.by_domain.values() for sample in found]
        self.stream: Stream = Stream(model, self.dtype)
        self._spill = existing(spill)
        self._embedded: list[Batch] | None = self.embed(self.samples)  # now, since it refuses what cannot be streamed

    @property
    def measured(self) -> dict[str, object]:
        """On what, and in which dtype, for the record."""
        return {"calibration": counted(self.by_domain), "dtype": dtype_name(self.dtype)}

    def embed(self, samples: Samples) -> list[Batch]:
        return self.stream.embed(samples, spill=self._spill)

    def batches(self) -> list[Batch]:
        """The samples as the first layer's inputs."""
        found, self._embedded = self._embedded or self.embed(self.samples), None
        return found

    def use(self, samples: Samples) -> None:
        """Goes on with other samples."""
        self.samples, self._embedded = samples, None


class Layerwise:
    """A pass over layers that notes each in the journal, with the hidden states that come out of it beside.

    notes: on the layers that an earlier run finished in the pass of that name, in order.
    """

    def __init__(self, run: Resumable | None, samples: Samples, name: str = "") -> None:
        """run: None where there is no place to keep anything.

        Raises: CoterieError where the earlier run was begun on other samples.
        """
        self._run, self._name, self._stem = run, name, "-".join(["hidden", *name.split()])
        self._digest = hashlib.sha256(repr(samples).encode()).hexdigest()
        self.notes: list[Mapping[str, Any]] = [u for u in run.units if u.get("pass") == name] if run else []
        if run and self.notes and self.notes[-1]["samples"] != self._digest:
            raise CoterieError(f"{run.partial}: was begun on other data; give the same, or start anew with --overwrite")

    @property
    def done(self) -> Mapping[str, Any] | None:
        """The last of the notes; None where there is none."""
        return self.notes[-1] if self.notes else None

    def first(self, batches: list[Batch], num_layers: int) -> int:
        """The layer to begin with; the batches become its inputs."""
        from coterie.forward.activations import restore

        first = len(self.notes)
        if 0 < first < num_layers:
            restore(batches, self._hidden(first - 1))
        return first

    def run(
        self,
        batches: list[Batch],
        layers: Iterable[int],
        num_layers: int,
        state: Callable[[int], Mapping[str, object]],
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Takes the layers' numbers as each is through, and notes it with its state.

        state: what a resumed run has to know, once it has the layer behind it.
        """
        from coterie.forward.activations import save

        for index in layers:
            if self._run:
                save(batches, self._hidden(index))
                dtype = dtype_name(batches[0].hidden.dtype)
                note = {"pass": self._name, "layer": index, "samples": self._digest, "dtype": dtype, **state(index)}
                self._run.unit(note, num_layers)
                self._hidden(index - 1).unlink(missing_ok=True)
            on_progress(index + 1, num_layers)
        for path in self._run.partial.glob(f"{self._stem}-*.safetensors") if self._run else ():
            path.unlink()

    def kept(self, layer: int) -> Path:
        """Where a layer's results may be kept, before it is noted."""
        assert self._run
        return self._run.partial / f"layer-{layer}"

    def _hidden(self, layer: int) -> Path:
        assert self._run
        return self._run.partial / f"{self._stem}-{layer}.safetensors"
