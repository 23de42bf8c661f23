"""Which width each expert gets, where their mean is given: what each width would cost is measured on data.

    D(l, e, b) = sum over the tokens t of expert e of  g_t^2 |f_e(x_t) - f_e^b(x_t)|^2

with g the gate weight, f_e^b the expert at b bits by searched scales (of whose error gptq leaves a known share), and
f_e^0 = 0: dropped, its router row kept. One multiplier then decides for all (`methods/allocation.py`). Measured on the
activations of the model as it is, while each expert is in memory; that dropping re-routes nothing and that errors add
up are approximations. Importing this module imports torch. Axes: E experts, W widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType

import numpy as np
import torch

from coterie.decide.pruner import as_expert, every_expert, run_expert
from coterie.decide.quantizer import Means
from coterie.edits.kinds.bits import Bits, check_finite, levels_of, quantised_blocks
from coterie.forward.activations import Piece, Routed
from coterie.forward.layerwise import Calibrated, Layerwise
from coterie.methods.allocation import allocate, grouped, spread
from coterie.methods.quantize import search
from coterie.model.experts import expert_shapes, expert_storage
from coterie.model.layer import Model
from coterie.storage.record import Progress

PARTS = ("up", "down", "gate")  # as `expert_storage` has them
LEFT = {
    "hessian": 0.6
}  # share of the error of searched scales that is left by rules that need so much (docs/results.md)


class Costs:
    """D of every layer (E, W), and how many tokens chose each expert (E,), by the layer's key."""

    def __init__(self, calibrated: Calibrated, widths: Sequence[int], group_size: int, left: float = 1.0) -> None:
        """left: the share of these errors that the rule to come leaves; of dropped experts all is."""
        self.left = left
        self.checkpoint, self.dtype = calibrated.model.checkpoint, calibrated.dtype
        self.widths, self.group_size = widths, group_size
        self.errors: dict[str, np.ndarray] = {}
        self.tokens: dict[str, np.ndarray] = {}

    def walk(self, routed: Routed) -> torch.Tensor:
        """Adds the layer's costs; returns the sum that the experts give as they are."""
        block, total = routed.block, routed.zeros()
        errors = self.errors[block.key] = np.zeros((block.num_experts, len(self.widths)))
        tokens = self.tokens[block.key] = np.zeros(block.num_experts)
        for visitors in every_expert(routed):
            e, seen, squares = visitors.expert, list[Piece](), Means(whole=False)
            stored = dict(zip(PARTS, expert_storage(self.checkpoint, block, e), strict=False))
            weights = {part: matrix.rows(0) for part, matrix in stored.items()}
            for part, weight in weights.items():
                check_finite(stored[part].name, weight)
            tokens[e] = len(visitors.rows)
            if not len(visitors.rows):
                continue
            expert = as_expert(self.checkpoint, block, e, _in_order(weights), self.dtype)

            def see(piece: Piece, seen: list[Piece] = seen, squares: Means = squares) -> None:
                squares.add(piece)
                seen.append(piece)

            run_expert(routed, expert, visitors, total, see)
            for i, bits in enumerate(self.widths):
                if not bits:
                    errors[e, i] = sum(_energy(piece.weights, piece.y) for piece in seen)
                    continue
                low = {
                    part: search.quantise(
                        weight,
                        levels_of(stored[part], bits, self.group_size),
                        squares.mean("down" if part == "down" else "up").numpy(),
                    ).values
                    for part, weight in weights.items()
                }
                worse = as_expert(self.checkpoint, block, e, _in_order(low), self.dtype)
                found = routed.pieces(worse, visitors.rows, visitors.gates)
                pairs = zip(seen, found, strict=True)
                errors[e, i] = self.left * sum(_energy(piece.weights, piece.y - other.y) for piece, other in pairs)
        return total


def _in_order(weights: dict[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    return weights.get("gate"), weights["up"], weights["down"]


def _energy(weights: torch.Tensor, outputs: torch.Tensor) -> float:
    """sum_t g_t^2 |y_t|^2."""
    return float((weights.double().square() * outputs.double().square().sum(1)).sum())


def measured(
    calibrated: Calibrated, widths: Sequence[int], group_size: int, rule: ModuleType, on_progress: Progress
) -> Costs:
    """The costs of every layer, where the rule will round: one pass over the data."""
    costs, stream = Costs(calibrated, widths, group_size, LEFT.get(rule.NEEDS, 1.0)), calibrated.stream
    batches = calibrated.batches()
    layers = stream.run(batches, costs.walk, 0)
    run = Layerwise(None, calibrated.samples)
    run.run(batches, layers, len(stream.layers), lambda _: {}, partial(on_progress, "measuring widths"))
    return costs


def chosen(
    model: Model, costs: Costs, average: float, *, per: str, allocation: str, seed: int
) -> tuple[dict[str, Bits], float]:
    """Bits of every layer, for a mean of so many over all experts' weights; and the sum of D that they cost.

    allocation: measured, or the controls: frequency (errors as if every bit left a quarter of them, times how often an
    expert is chosen), random (times a random number). Layers without data, those of prediction, get the width nearest
    to the mean.
    """
    blocks = [block for block in quantised_blocks(model) if block.key in costs.errors]
    numbers = {
        b.key: sum(rows * columns for rows, columns in expert_shapes(model.checkpoint, b).values()) for b in blocks
    }
    sizes = np.concatenate([np.full(b.num_experts, numbers[b.key], float) for b in blocks])
    real = np.concatenate([costs.errors[b.key] for b in blocks])
    tokens = np.concatenate([costs.tokens[b.key] for b in blocks])
    draw = np.random.default_rng(seed)
    errors = {
        "measured": lambda: real,
        "frequency": lambda: spread(tokens, tuple(costs.widths)),
        "random": lambda: spread(np.exp(2 * draw.standard_normal(len(sizes))), tuple(costs.widths)),
    }[allocation]()
    layer_of = np.repeat(np.arange(len(blocks)), [b.num_experts for b in blocks])
    items = np.arange(len(sizes)) if per == "expert" else layer_of
    item_sizes = np.bincount(items, sizes)
    bits = allocate(grouped(errors, items), tuple(costs.widths), item_sizes, average * float(sizes.sum()))
    of_expert = np.array(bits)[items]
    cost = float(real[np.arange(len(sizes)), [costs.widths.index(int(b)) for b in of_expert]].sum())
    found: dict[str, Bits] = {}
    for number, block in enumerate(blocks):
        mine = of_expert[layer_of == number].tolist()
        found[block.key] = mine if per == "expert" else int(mine[0])
    nearest = min((w for w in costs.widths if w), key=lambda w: abs(w - average))
    rest = {block.key: nearest for block in quantised_blocks(model) if block.key not in found}
    return found | rest, cost
