"""MXFP4: 4-bit floats in blocks of 32 that share an exponent, two to a byte.

NAME_blocks  U8 (E, out, in / 32, 16)   E2M1 values, the low half of a byte first
NAME_scales  U8 (E, out, in / 32)       exponents: times 2^(scale - 127)

or, of a matrix of its own as compressed-tensors stores it, NAME_packed U8 (out, in / 2), NAME_scale U8 (out, in / 32).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from coterie.codecs import Codec, Coded, Place, found_parts, in_parts, refusal
from coterie.errors import CoterieError
from coterie.storage.checkpoint import Checkpoint, Tensor

PARTS, ALONE = ("_blocks", "_scales"), ("_packed", "_scale")
BLOCK = 32
POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([POSITIVE, -POSITIVE])  # of E2M1's 16 codes


def read(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """Either of the two."""
    return _fused(checkpoint, place) or _alone(checkpoint, place)


def _alone(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """A matrix of its own (out, in); others of other dtypes have the same names."""
    parts = tuple(found_parts(checkpoint, place.name, ALONE).values())
    if [t.dtype for t in parts] != ["U8", "U8"] or place.num_matrices:
        return None
    blocks, scales = parts
    rows, half = blocks.shape if len(blocks.shape) == 2 else (0, 0)

    def check() -> None:
        if not half or 2 * half % BLOCK or scales.shape != (rows, 2 * half // BLOCK):
            raise refusal(blocks.name, f"scales {list(scales.shape)}", f"one for {BLOCK} of {2 * half} columns")

    def values() -> np.ndarray:
        check()
        return mxfp4(checkpoint.read(blocks.name).reshape(*scales.shape, BLOCK // 2), checkpoint.read(scales.name))

    return in_parts(place, (rows, 2 * half), parts, values, check)


def _fused(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """A fused tensor (E, in, out): the layouts that have such experts call them transposed, the blocks are not."""
    blocks, scales = (checkpoint.tensors.get(place.name + part) for part in PARTS)
    if blocks is None:
        return None

    def rows(e: int) -> np.ndarray:
        _check(place, blocks, scales)
        found = (checkpoint.read_rows(place.name + part, e, e + 1)[0] for part in PARTS)
        return mxfp4(*found).T

    num_experts, out, groups = blocks.shape[:3] if len(blocks.shape) == 4 else (place.num_matrices, 0, 0)
    size = blocks.num_bytes + (scales.num_bytes if scales else 0)
    names = tuple(place.name + part for part in PARTS)
    check = partial(_check, place, blocks, scales)
    return Coded(place.name, "F32", (num_experts, 32 * groups, out), names, size, rows, check=check)


def _check(place: Place, *found: Tensor | None) -> None:
    kinds = [(t.dtype, t.shape) if t else None for t in found]
    rows: tuple[int, ...] = found[1].shape if found[1] else ()
    if len(rows) != 3 or rows[0] != place.num_matrices or kinds != [("U8", (*rows, 16)), ("U8", rows)]:
        raise CoterieError(
            f"tensor {place.name + '_blocks'!r}: found blocks and scales {kinds}; "
            "expected U8 (expert, out, group, 16) and U8 (expert, out, group)"
        )


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(O, G, 16) bytes of two 4-bit floats and (O, G) exponents, as float32 (O, 32 G)."""
    return (e2m1(blocks) * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(scales.shape[0], -1)


def e2m1(codes: np.ndarray) -> np.ndarray:
    """Bytes (..., n) of two 4-bit floats, the low half first, as float32 (..., 2n)."""
    return np.stack([VALUES[codes & 15], VALUES[codes >> 4]], axis=-1).reshape(*codes.shape[:-1], -1)


CODEC = Codec(parts=PARTS, read=read)
