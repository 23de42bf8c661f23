"""Few bits for the experts from what they see: one streaming forward that quantises each expert while it is in memory.

Sequential: a layer's rule sees the activations that the quantised layers before it produce. Importing this module
imports torch. Axes: T token, D hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch

from coterie.decide.pruner import Put, Visitors, as_expert, every_expert, run_expert
from coterie.edits.kinds.bits import Bits, Scheme, check_finite, checksum, encoder, levels_of, width_of
from coterie.errors import CoterieError
from coterie.forward.activations import Piece, Routed
from coterie.methods.quantize import search
from coterie.model.experts import expert_storage
from coterie.storage.checkpoint import Checkpoint

SEEN = 256  # tokens of a layer that every expert is shown, chosen or not
PRIOR = 64.0  # how many of its own tokens those weigh as much as


class Means:
    """Sums of x_j^2, or of x x^T, over tokens: of what gate and up multiply ("up"), and of what down does ("down")."""

    def __init__(self, whole: bool) -> None:
        self.whole, self.num_tokens = whole, 0
        self._sums: dict[str, Any] = {"up": 0.0, "down": 0.0}

    def add(self, piece: Piece) -> None:
        self.num_tokens += len(piece.rows)
        for part, values in (("up", piece.x.float()), ("down", piece.hidden.float())):
            found = values.T @ values if self.whole else values.square().sum(0)
            self._sums[part] = self._sums[part] + found.double()

    def mean(self, part: str) -> torch.Tensor:
        return self._sums[part] / self.num_tokens


def shrunk(own: Means, prior: Means, part: str) -> np.ndarray:
    """The mean over an expert's own tokens, drawn to that over the layer's where they are few: as if PRIOR of those
    had come as well."""
    if not own.num_tokens:
        return prior.mean(part).numpy()
    return ((own.num_tokens * own.mean(part) + PRIOR * prior.mean(part)) / (own.num_tokens + PRIOR)).numpy()


@dataclass
class Quantizer:
    """Quantises the experts of every layer by one rule, and remembers what it wrote."""

    checkpoint: Checkpoint
    method: ModuleType
    bits: Mapping[str, Bits]  # by layer
    scheme: Scheme
    put: Put
    dtype: torch.dtype
    cold: list[list[Any]] = field(default_factory=list)  # [layer, expert, 0] of those that no token chose
    checksums: dict[str, list[int]] = field(default_factory=dict)  # by layer, of each expert

    def state(self) -> dict[str, object]:
        """What a resumed run has to know of the layers done, as the report has it."""
        return {"cold_experts": self.cold, "checksums": self.checksums}

    def absorb(self, state: Mapping[str, Any]) -> None:
        """Takes over what an earlier run did."""
        self.cold, self.checksums = list(state["cold_experts"]), dict(state["checksums"])

    def walk(self, routed: Routed) -> torch.Tensor:
        """Quantises all experts of a block, chosen or not; returns the weighted sum of the quantised ones."""
        total, key = routed.zeros(), routed.block.key
        rows = torch.linspace(0, len(routed.x) - 1, min(SEEN, len(routed.x))).long()
        self.checksums[key] = []
        for visitors in every_expert(routed):
            shown = Visitors(visitors.expert, rows, torch.ones(len(rows), dtype=routed.weights.dtype))
            self.checksums[key].append(self._visit(routed, visitors, shown, total))
        return total

    def _visit(self, routed: Routed, visitors: Visitors, shown: Visitors, total: torch.Tensor) -> int:
        """Writes one expert, and adds its weighted outputs to `total`; returns its checksum."""
        block, e = routed.block, visitors.expert
        raw, width = list[bytes](), width_of(self.bits[block.key], e)
        if not width:  # it gives nothing, to this layer's sum as to whoever reads it
            return checksum(raw)
        stored = dict(zip(("up", "down", "gate"), expert_storage(self.checkpoint, block, e), strict=False))
        weights = {part: matrix.rows(0) for part, matrix in stored.items()}
        matrices = weights.get("gate"), weights["up"], weights["down"]
        expert = as_expert(self.checkpoint, block, e, matrices, self.dtype)
        own, prior = (Means(self.method.NEEDS == "hessian") for _ in range(2))
        run_expert(routed, expert, visitors, None, own.add)
        run_expert(routed, expert, shown, None, prior.add)
        if not own.num_tokens:
            self.cold.append([block.key, e, 0])
        for part, matrix in stored.items():
            weight, levels = weights[part], levels_of(matrix, width, self.scheme.group_size)
            check_finite(matrix.name, weight)
            seen = shrunk(own, prior, "down" if part == "down" else "up")
            if not np.isfinite(seen).all():
                raise CoterieError(
                    f"{block.name}, expert {e}: activations are NaN or infinite; the weights are damaged, or need "
                    "--dtype float32"
                )
            rule = self.method if own.num_tokens or self.method.NEEDS != "hessian" else search
            found = rule.quantise(weight, levels, seen if rule is self.method else np.diag(seen))
            written = dict(encoder(self.scheme)(found, matrix.name))
            for name, part_raw in written.items():
                self.put(name, 0, part_raw)
            raw += [*written.values()][:2]
            expert.matrices[part].copy_(torch.from_numpy(found.values))
        run_expert(routed, expert, visitors, total)
        return checksum(raw)
