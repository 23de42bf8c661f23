"""NVFP4: 4-bit floats in blocks of 16 with an FP8 scale, and one float for all of a matrix.

compressed-tensors            ModelOpt
NAME_packed                   NAME           U8 (O, I / 2)        E2M1 values, the low half of a byte first
NAME_scale                    NAME_scale     F8_E4M3 (O, I / 16)
NAME_global_scale             NAME_scale_2   F32 (1,) or ()

The value is E2M1 * scale / global scale, and E2M1 * scale * scale_2.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from coterie.codecs import Codec, Coded, Place, found_parts, in_groups, in_parts, refusal
from coterie.codecs.mxfp4 import e2m1
from coterie.storage.checkpoint import Checkpoint, Tensor

DIVIDING, MULTIPLYING = ("_packed", "_scale", "_global_scale"), ("", "_scale", "_scale_2")
BLOCK = 16


def read(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """A matrix of its own, in bytes; others have the same names."""
    for names in (DIVIDING, MULTIPLYING):
        parts = found_parts(checkpoint, place.name, names)
        if len(parts) == len(names) and parts[names[0]].dtype == "U8" and not place.num_matrices:
            return _coded(checkpoint, place, tuple(parts.values()), divides=names is DIVIDING)
    return None


def _coded(checkpoint: Checkpoint, place: Place, parts: tuple[Tensor, ...], *, divides: bool) -> Coded:
    rows, half = parts[0].shape if len(parts[0].shape) == 2 else (0, 0)
    values = partial(_rows, checkpoint, parts, divides=divides)
    return in_parts(place, (rows, 2 * half), parts, values, partial(_check, *parts))


def _check(blocks: Tensor, scales: Tensor, whole: Tensor) -> None:
    rows, half = blocks.shape if len(blocks.shape) == 2 else (0, 0)
    wanted = ("F8_E4M3", (rows, 2 * half // BLOCK)), ("F32", 1)
    found = (scales.dtype, scales.shape), (whole.dtype, whole.num_parameters)
    if found != wanted or 2 * half % BLOCK or not half:
        raise refusal(blocks.name, found, f"scales and a global scale {wanted}")


def _rows(checkpoint: Checkpoint, parts: tuple[Tensor, ...], *, divides: bool) -> np.ndarray:
    _check(*parts)
    codes, scales, whole = (checkpoint.read(part.name) for part in parts)
    factor = whole.reshape(-1)[0]
    return in_groups(e2m1(codes), scales / factor if divides else scales * factor)


CODEC = Codec(parts=DIVIDING, read=read)
