"""Round-to-nearest: what weights become when stored with few bits. Simulated: nothing is packed or written.

Two grids, both with a step of its own for each group of 64 neighbours along the inputs. `even`: levels between the
extremes of a group, which suits 2 and 3 bits, 4.5 bits a weight at 4; `coterie analyze` tries it expert by expert.
`symmetric`: 4 bits on both sides of zero with one scale, 4.25 bits a weight; `coterie report` holds every compressed
model against the original with its experts on this one. Importing this module imports torch.
Axes: E expert, O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from coterie.errors import CoterieError
from coterie.model.experts import expert_shapes, expert_storage
from coterie.model.layer import Model
from coterie.model.moe import WEIGHTS, Expert, experts_modules
from coterie.storage.checkpoint import FLOATS

BITS = (8, 4, 3, 2)  # of even levels
GROUP, SCALE_BYTES = 64, 2  # consecutive inputs that share numbers (a step and a lowest value, or a scale) of 16 bits
REFERENCE_BITS = 4
MOST = 2 ** (REFERENCE_BITS - 1) - 1  # 7: codes go from -8 to 7
LEVELS = f"even levels from the lowest to the highest weight of each group of {GROUP}"
DESCRIPTION = (
    f"plain rounding of the experts to {REFERENCE_BITS} bits, symmetric, one scale per group of {GROUP}, simulated"
)


def even(weights: torch.Tensor, bits: int, group: int = GROUP) -> torch.Tensor:
    """Weights (..., I) on 2^bits even levels from the lowest to the highest of each group of inputs, in float32.

    w' = lo + step round((w - lo) / step), step = (hi - lo) / (2^bits - 1).
    """

    def nearest(groups: torch.Tensor) -> torch.Tensor:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        return low + step * ((groups - low) / torch.where(step > 0, step, 1.0)).round()

    return _by_group(weights.float(), group, nearest)


def symmetric(weights: torch.Tensor) -> torch.Tensor:
    """Weights (..., I) after rounding to 4 bits and back: w' = s clamp(round(w / s), -8, 7), in their own dtype.

    s = max |w| / 7 over each group of 64 neighbours along the last axis, as a float16.
    """

    def nearest(groups: torch.Tensor) -> torch.Tensor:
        scale = (groups.abs().amax(-1, keepdim=True) / MOST).half().float()
        return scale * (groups / torch.where(scale > 0, scale, 1.0)).round().clamp(-MOST - 1, MOST)

    return _by_group(weights.float(), GROUP, nearest).to(weights.dtype)


def _by_group(weights: torch.Tensor, group: int, nearest: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Weights (..., I), each group of neighbours along the last axis replaced; the last one of a row may be shorter."""
    parts = weights.split(group * max(1, weights.shape[-1] // group), dim=-1)
    grouped = [part.unflatten(-1, (-1, min(group, part.shape[-1]))) for part in parts]
    return torch.cat([nearest(groups).flatten(-2) for groups in grouped], dim=-1)


# --- of single experts, with even levels --------------------------------------------------------------------------


def rounded_expert(expert: Expert, bits: int) -> tuple[Expert, float, float]:
    """(the expert with rounded matrices, squared change of its weights, their squares); biases stay."""
    first, second = (even(m, bits) for m in (expert.gate_up, expert.down))
    pairs = ((expert.gate_up, first), (expert.down, second))
    change = sum(float((m.float() - r).double().square().sum()) for m, r in pairs)
    whole = sum(float(m.double().square().sum()) for m, _ in pairs)
    dtype = expert.down.dtype
    less = Expert(first.to(dtype), second.to(dtype), expert.has_gate, expert.gate_up_bias, expert.down_bias)
    return less, change, whole


# --- of a whole model, symmetric ----------------------------------------------------------------------------------


@torch.no_grad()
def round_experts(model: Any, num_blocks: int) -> Any:
    """The model itself, with the routed experts of its `num_blocks` MoE blocks rounded.

    Raises: CoterieError where it has not so many experts modules with plain weights.
    """
    modules = [m for m in experts_modules(model) if _weights(m)]
    if len(modules) != num_blocks:
        raise CoterieError(f"found {len(modules)} experts modules with plain weights, expected {num_blocks}")
    for module in modules:
        for weight in _weights(module):
            for e in range(len(weight)):  # one at a time: float32 copies are large
                matrix = weight[e].T if module.is_transposed else weight[e]
                matrix.copy_(symmetric(matrix))
    return model


def _weights(module: Any) -> list[torch.Tensor]:
    found = [getattr(module, name, None) for name in WEIGHTS]
    return [w for w in found if isinstance(w, torch.Tensor) and w.is_floating_point()]


def rounded_bytes(source: Model) -> int:
    """Bytes of the checkpoint if its experts' matrices took 4 bits a weight and 2 bytes a group of 64 in a row.

    Raises: CoterieError for matrices that are stored in anything but plain floats.
    """
    total = source.checkpoint.num_bytes
    for block in source.main:
        held = [m for e in range(len(block.experts) or 1) for m in expert_storage(source.checkpoint, block, e)]
        stored = [source.checkpoint.tensors[part] for matrix in held for part in matrix.parts]
        if other := sorted({t.dtype for t in stored} - set(FLOATS[1:])):
            raise CoterieError(f"{block.name}: its experts are stored as {', '.join(other)}, expected plain floats")
        shapes = expert_shapes(source.checkpoint, block).values()
        expert_bytes = sum(rows * _row_bytes(columns) for rows, columns in shapes)
        total += block.num_experts * expert_bytes - sum(t.num_bytes for t in stored)
    return total


def _row_bytes(num_columns: int) -> int:
    return math.ceil(num_columns * REFERENCE_BITS / 8) + SCALE_BYTES * math.ceil(num_columns / GROUP)
