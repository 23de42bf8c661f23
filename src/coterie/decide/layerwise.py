"""What changes weights layer by layer, on calibration data: the samples, and how a killed run goes on after a layer.

Importing this module does not import torch, so that commands which use it start quickly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import CoterieError
from coterie.forward.samples import Calibration, compute_dtype, read_samples
from coterie.model.layer import Model
from coterie.storage.folders import existing
from coterie.storage.writer import Writer

if TYPE_CHECKING:
    from coterie.forward.activations import Batch
    from coterie.forward.stream import Stream

Samples = Sequence[tuple[int, ...]]


class Calibrated:
    """What a calibrated run needs before it writes: token sequences, and the model to stream them through."""

    def __init__(self, model: Model, calibration: Calibration, dtype: str, spill: Path) -> None:
        """spill: the folder for activations that are too large for memory.

        Raises: CoterieError for data or a model that cannot be streamed.
        """
        from coterie.forward.stream import Stream

        self.model, self.dtype = model, compute_dtype(model, dtype)
        self.by_domain, self.notes = read_samples(model, calibration)
        self.samples: Samples = [sample for found in self.by_domain.values() for sample in found]
        self.stream: Stream = Stream(model, self.dtype)
        self._spill = existing(spill)
        self._embedded: list[Batch] | None = self.embed(self.samples)  # now, since it refuses what cannot be streamed

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
    """A run over layers that notes each in the journal, with the hidden states that come out of it beside.

    done: the note on the last layer that an earlier run finished; None where there is none.
    """

    def __init__(self, writer: Writer, samples: Samples) -> None:
        """Raises: CoterieError where the earlier run was begun on other samples."""
        self._writer, self._digest = writer, hashlib.sha256(repr(samples).encode()).hexdigest()
        self.done: Mapping[str, Any] | None = writer.units[-1] if writer.units else None
        if self.done and self.done["samples"] != self._digest:
            raise CoterieError(
                f"{writer.partial}: was begun on other data; give the same, or start anew with --overwrite"
            )

    def first(self, batches: list[Batch]) -> int:
        """The layer to begin with; the batches become its inputs."""
        from coterie.forward.activations import restore

        if self.done is None:
            return 0
        restore(batches, self._hidden(self.done["layer"]))
        return int(self.done["layer"]) + 1

    def run(
        self,
        batches: list[Batch],
        layers: Iterable[int],
        num_layers: int,
        state: Callable[[], Mapping[str, object]],
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Takes the layers' numbers as each is through, and notes it with its state.

        state: what a resumed run has to know of the layers done.
        """
        from coterie.forward.activations import save

        for index in layers:
            save(batches, self._hidden(index))
            self._writer.unit({"layer": index, "samples": self._digest, **state()}, num_layers)
            self._hidden(index - 1).unlink(missing_ok=True)
            on_progress(index + 1, num_layers)
        for path in self._writer.partial.glob("hidden-*.safetensors"):
            path.unlink()

    def _hidden(self, layer: int) -> Path:
        return self._writer.partial / f"hidden-{layer}.safetensors"
