"""compressed-tensors' NVFP4: 4-bit floats in blocks of 16 with an FP8 scale, and one float for all of a matrix.

NAME_packed        U8 (O, I / 2)        E2M1 values, the low half of a byte first
NAME_scale         F8_E4M3 (O, I / 16)
NAME_global_scale  F32 (1,)

The value is E2M1 * scale / global scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from coterie.codecs import Codec, Coded, Place, found_parts, in_groups, refusal
from coterie.codecs.mxfp4 import VALUES
from coterie.storage.checkpoint import Checkpoint, Tensor

PARTS = ("_packed", "_scale", "_global_scale")
BLOCK = 16


def read(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """A matrix of its own, in bytes; integers in words have the same name."""
    parts = found_parts(checkpoint, place.name, PARTS)
    if len(parts) < len(PARTS) or parts["_packed"].dtype != "U8" or place.num_matrices:
        return None
    rows, half = parts["_packed"].shape if len(parts["_packed"].shape) == 2 else (0, 0)
    return Coded(
        place.name, "F32", (rows, 2 * half), tuple(t.name for t in parts.values()),
        sum(t.num_bytes for t in parts.values()), lambda e: _rows(checkpoint, parts), check=partial(_check, parts),
    )  # fmt: skip


def _check(parts: Mapping[str, Tensor]) -> None:
    blocks, scales, whole = (parts[part] for part in PARTS)
    rows, half = blocks.shape if len(blocks.shape) == 2 else (0, 0)
    wanted = ("F8_E4M3", (rows, 2 * half // BLOCK)), ("F32", 1)
    found = (scales.dtype, scales.shape), (whole.dtype, whole.num_parameters)
    if found != wanted or 2 * half % BLOCK or not half:
        raise refusal(blocks.name, found, f"scales and a global scale {wanted}")


def _rows(checkpoint: Checkpoint, parts: Mapping[str, Tensor]) -> np.ndarray:
    _check(parts)
    codes, scales, whole = (checkpoint.read(parts[part].name) for part in PARTS)
    values = np.stack([VALUES[codes & 15], VALUES[codes >> 4]], axis=-1).reshape(len(codes), -1)
    return in_groups(values, scales / whole.reshape(-1)[0])


CODEC = Codec(parts=PARTS, read=read)
