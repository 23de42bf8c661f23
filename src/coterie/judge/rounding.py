"""Plain rounding of a loaded model's experts to 4 bits: the reference that every compressed model is held against.

Nothing is written: weights are rounded and restored in memory, and the bytes that they would take are counted. Used by
`coterie report`. Importing this module imports torch. Axes: E expert, O out, I in.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from coterie.errors import CoterieError
from coterie.model.experts import expert_shapes, expert_weights
from coterie.model.layer import Model
from coterie.model.moe import experts_modules
from coterie.storage.checkpoint import FLOATS

BITS, GROUP, SCALE_BYTES = 4, 64, 2
MOST = 2 ** (BITS - 1) - 1  # 7: codes go from -8 to 7
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
DESCRIPTION = f"plain rounding of the experts to {BITS} bits, symmetric, one scale per group of {GROUP}, simulated"


def rounded(weights: torch.Tensor) -> torch.Tensor:
    """Weights (..., I) after rounding to 4 bits and back: w' = s clamp(round(w / s), -8, 7), in their own dtype.

    s = max |w| / 7 over each group of 64 neighbours along the last axis, as a float16; the last group may be shorter.
    """
    num_columns = weights.shape[-1]
    padded = torch.nn.functional.pad(weights.float(), (0, -num_columns % GROUP))
    groups = padded.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / MOST).half().float()
    codes = (groups / scale.where(scale > 0, torch.ones_like(scale))).round().clamp(-MOST - 1, MOST)
    return (codes * scale).flatten(-2)[..., :num_columns].to(weights.dtype)


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
                matrix.copy_(rounded(matrix))
    return model


def rounded_bytes(source: Model) -> int:
    """Bytes of the checkpoint if its experts' matrices took 4 bits a weight and 2 bytes a group of 64 in a row.

    Raises: CoterieError for matrices that are stored in anything but plain floats.
    """
    total = source.checkpoint.num_bytes
    for block in source.main:
        stored = [source.checkpoint.tensors[name] for name in expert_weights(source.checkpoint, block)]
        if any(t.dtype not in FLOATS[1:] for t in stored):
            raise CoterieError(f"{block.name}: its experts are stored as {stored[0].dtype}, expected plain floats")
        shapes = expert_shapes(source.checkpoint, block).values()
        expert_bytes = sum(rows * _row_bytes(columns) for rows, columns in shapes)
        total += block.num_experts * expert_bytes - sum(t.num_bytes for t in stored)
    return total


def _row_bytes(num_columns: int) -> int:
    return math.ceil(num_columns * BITS / 8) + SCALE_BYTES * math.ceil(num_columns / GROUP)


def _weights(module: Any) -> list[torch.Tensor]:
    found = [getattr(module, name, None) for name in WEIGHTS]
    return [w for w in found if isinstance(w, torch.Tensor) and w.is_floating_point()]
