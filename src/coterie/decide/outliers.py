"""OWL's first pass: on the dense model, the share of each layer's Wanda scores that are outliers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from coterie.decide import linears
from coterie.decide.pruner import InputSums, Norms, Visitors, as_expert, read_finite, run_expert
from coterie.edits import beside
from coterie.edits.budget import PARTS
from coterie.forward.activations import Batch, Routed, Walk
from coterie.forward.stream import Stream
from coterie.methods.sparsify import owl
from coterie.model.experts import expert_matrices
from coterie.model.layer import MoE
from coterie.storage.record import Progress


class Outliers:
    """D by layer: 100 x the share of scores above m x their mean, over its experts (and linears of the kinds `also`).

    Experts that no token reached have no scores, and do not count.
    """

    def __init__(self, stream: Stream, m: float, also: tuple[str, ...] = ()) -> None:
        self.stream, self.checkpoint, self.m = stream, stream.checkpoint, m
        self._linears = beside.by_layer(stream.source, also)
        self._forget()

    def _forget(self) -> None:
        self._block: MoE | None = None
        self._norms: dict[int, Norms] = {}  # by expert
        self._sum, self._count = 0.0, 0  # of all scores

    def shares(self, batches: list[Batch], on_progress: Progress) -> dict[str, float]:
        found: dict[str, float] = {}
        for index in self.stream.run(batches, self.walk, rehearse=self._watch):
            self._watching.stop()
            norms = self._watching.norms()
            matrices = {name: norms[parameter] for parameter, name in self._watching.wanted.items()}
            if self._norms or matrices:
                found[str(index)] = self._share(matrices)
            self._forget()
            on_progress("measuring outliers", index + 1, len(self.stream.layers))
        return found

    def _watch(self, index: int, layer: torch.nn.Module, _: Callable[[Walk], None]) -> None:
        wanted = linears.parameters(self.stream, index, layer, self._linears.get(index, {}))
        self._watching = linears.Watch(layer, wanted)

    def walk(self, routed: Routed) -> torch.Tensor:
        """The experts as they are; remembers their norms and the sum of their scores."""
        total, self._block = routed.zeros(), routed.block
        for e, rows, gates in routed.by_expert():
            matrices = read_finite(self.checkpoint, routed.block, e)
            seen = InputSums(owl.NEEDS)
            expert = as_expert(self.checkpoint, routed.block, e, matrices, self.stream.dtype)
            run_expert(routed, expert, Visitors(e, rows, gates), total, seen.add)
            self._norms[e] = seen.norms(f"{routed.block.name}, expert {e}")
            for part, weight in zip(PARTS, matrices, strict=True):
                if weight is not None:
                    self._add(weight, self._norms[e].of(part))
        return total

    def _add(self, weight: np.ndarray, norms: np.ndarray) -> None:
        """Adds the sum of |W| * norm over a matrix, without making the matrix of scores."""
        self._sum += float(np.abs(weight).sum(0, dtype=np.float64) @ norms)
        self._count += weight.size

    def _share(self, matrices: dict[str, np.ndarray]) -> float:
        for name, norms in matrices.items():
            self._add(self._read(name), norms)
        return owl.outlier_share(self._scores(matrices), self._sum / self._count, self.m)

    def _scores(self, matrices: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
        for e, norms in self._norms.items():
            assert self._block is not None
            for part, weight in zip(PARTS, expert_matrices(self.checkpoint, self._block, e), strict=True):
                if weight is not None:
                    yield owl.score(weight, norms.of(part))
        for name, norm in matrices.items():
            yield owl.score(self._read(name), norm)

    def _read(self, name: str) -> np.ndarray:
        return self.checkpoint.read(name).astype(np.float32, copy=False)
