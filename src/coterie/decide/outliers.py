"""OWL's first pass: on the dense model, the share of each layer's Wanda scores that are outliers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from coterie.decide import linears
from coterie.decide.pruner import InputSums, Visitors, as_expert, read_finite, run_expert
from coterie.edits import beside
from coterie.edits.budget import PARTS
from coterie.forward.activations import Batch, Routed
from coterie.forward.stream import Stream, advance
from coterie.methods.sparsify import owl
from coterie.model.experts import expert_matrices
from coterie.model.layer import MoE
from coterie.storage.record import Progress


def outlier_shares(
    stream: Stream, batches: list[Batch], m: float, also: tuple[str, ...], on_progress: Progress
) -> dict[str, float]:
    """D by layer: 100 x the share of scores above m x their mean, over its experts (and linears of the kinds `also`).

    Experts that no token reached have no scores, and do not count.
    """
    others, found = beside.by_layer(stream.source, also), dict[str, float]()
    for index, layer in enumerate(stream.layers):
        scores = Scores(stream)
        with stream.loaded(index) as go:
            wanted = linears.parameters(stream, index, layer, others.get(index, {}))
            with linears.watched(layer, wanted) as norms:
                go(batches, scores.walk, advance)
        scores.add_others(norms)
        if scores.count:
            found[str(index)] = owl.outlier_share(scores, scores.sum / scores.count, m)
        on_progress("measuring outliers", index + 1, len(stream.layers))
    return found


class Scores:
    """Wanda's scores of one layer, matrix by matrix, and their sum, for which no matrix of scores is made."""

    def __init__(self, stream: Stream) -> None:
        self.checkpoint, self.dtype = stream.checkpoint, stream.dtype
        self.sum, self.count = 0.0, 0
        self._seen: list[tuple[MoE, int, InputSums]] = []
        self._others: dict[str, np.ndarray] = {}  # norms by tensor

    def walk(self, routed: Routed) -> torch.Tensor:
        """The experts as they are; remembers what entered them."""
        total, block = routed.zeros(), routed.block
        for e, rows, gates in routed.by_expert():
            matrices, seen = read_finite(self.checkpoint, block, e), InputSums(owl.NEEDS)
            expert = as_expert(self.checkpoint, block, e, matrices, self.dtype)
            run_expert(routed, expert, Visitors(e, rows, gates), total, seen.add)
            self._seen.append((block, e, seen.checked(block, e)))
            for part, weight in zip(PARTS, matrices, strict=True):
                if weight is not None:
                    self._add(weight, seen.norms(part))
        return total

    def add_others(self, norms: dict[str, np.ndarray]) -> None:
        """Matrices beside the experts, by tensor."""
        self._others = norms
        for name, norm in norms.items():
            self._add(self._read(name), norm)

    def _add(self, weight: np.ndarray, norms: np.ndarray) -> None:
        self.sum += float(np.abs(weight).sum(0, dtype=np.float64) @ norms)
        self.count += weight.size

    def __iter__(self) -> Iterator[np.ndarray]:
        for block, e, seen in self._seen:
            for part, weight in zip(PARTS, expert_matrices(self.checkpoint, block, e), strict=True):
                if weight is not None:
                    yield owl.score(weight, seen.norms(part))
        for name, norm in self._others.items():
            yield owl.score(self._read(name), norm)

    def _read(self, name: str) -> np.ndarray:
        return self.checkpoint.read(name).astype(np.float32, copy=False)
