"""compressed-tensors' `pack-quantized`: integers of 1 to 8 bits, end to end in 32-bit words, with scales in groups.

NAME_packed      I32 (O, ceil(b I / 32))   w + 2^(b-1), lowest bits first
NAME_scale       float (O, G)              one for every I / G columns
NAME_shape       I64 (2,)                  O, I
NAME_zero_point  I32 (ceil(b O / 32), G)   z + 2^(b-1), packed down the rows; only of asymmetric weights
NAME_g_idx       I32 (I,)                  the group of every column, where they do not stand in order

The value is (w - z) * scale. How many bits a number has stands in config.json, for groups of modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from coterie.codecs import (
    MULTIPLIED,
    Codec,
    Coded,
    Codes,
    Place,
    check_scales,
    found_parts,
    in_groups,
    in_parts,
    refusal,
)
from coterie.storage.checkpoint import FLOATS, Checkpoint, Tensor
from coterie.storage.numerics import unpacked

PARTS = ("_packed", "_scale", "_shape", "_zero_point", "_g_idx")


def read(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """A matrix of its own, in integers; bytes of small floats have the same name, and are not ours."""
    parts = found_parts(checkpoint, place.name, PARTS)
    if "_packed" not in parts or parts["_packed"].dtype != "I32" or place.num_matrices:
        return None
    shape = _shape(checkpoint, place, parts)
    rows, check = partial(_rows, checkpoint, place, parts, shape), partial(_check, place, parts, shape)
    found = in_parts(place, shape, parts.values(), rows, check)
    return replace(found, packed=partial(_codes, checkpoint, place, parts, shape)) if _plain(parts, shape) else found


def _shape(checkpoint: Checkpoint, place: Place, parts: Mapping[str, Tensor]) -> tuple[int, int]:
    """(O, I), as stored beside the numbers, or else as their count says."""
    found, told = parts["_packed"], parts.get("_shape")
    if len(found.shape) != 2:
        raise refusal(found.name, list(found.shape), "rows of packed integers")
    if told is None or told.shape != (2,) or told.dtype not in ("I64", "I32"):
        bits = _widths(place)
        if len(bits) != 1:
            raise refusal(found.name, f"{sorted(bits)} bits in config.json, and no shape beside it", "one or the other")
        return found.shape[0], 32 * found.shape[1] // bits.pop()
    rows, columns = (int(n) for n in checkpoint.read(told.name))
    if rows != found.shape[0] or not 0 < columns <= 32 * found.shape[1]:
        raise refusal(told.name, (rows, columns), f"{found.shape[0]} rows, and columns for {list(found.shape)} words")
    return rows, columns


def _widths(place: Place) -> set[int]:
    """The bits that config.json gives integers, in any of its groups."""
    groups = place.said.get("config_groups")
    schemes = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    found = {s.get("num_bits") for s in schemes if isinstance(s, dict) and s.get("type", "int") == "int"}
    return {bits for bits in found if type(bits) is int and 1 <= bits <= 8}


def _bits(place: Place, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> int:
    """How many bits a number has. Raises: CoterieError unless config.json and the shapes agree on one count."""
    words = parts["_packed"].shape[1]
    fits = [bits for bits in sorted(_widths(place)) if -(-bits * shape[1] // 32) == words]
    if len(fits) != 1:
        said = f"{words} words for {shape[1]} columns, and {sorted(_widths(place))} bits in config.json"
        raise refusal(parts["_packed"].name, said, "one count of bits that fits")
    return fits[0]


def _check(place: Place, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
    rows, columns = shape
    bits, scales, zeros = _bits(place, parts, shape), parts.get("_scale"), parts.get("_zero_point")
    index = parts.get("_g_idx")
    if index is not None and (index.shape != (columns,) or index.dtype not in ("I32", "I64")):
        raise refusal(index.name, f"{index.dtype} {list(index.shape)}", f"the group of each of {columns} columns")
    if scales is None or scales.shape not in ((), (1,)) or scales.dtype not in FLOATS:
        check_scales(place.name, scales, rows, columns)
    groups = scales.shape[-1] if scales and scales.shape else 1
    if zeros is not None and (zeros.dtype, zeros.shape) != ("I32", (-(-bits * rows // 32), groups)):
        wanted = f"I32 for {rows} rows and {groups} groups"
        raise refusal(zeros.name, f"{zeros.dtype} {list(zeros.shape)}", wanted)


def _rows(checkpoint: Checkpoint, place: Place, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> np.ndarray:
    _check(place, parts, shape)
    (rows, columns), bits = shape, _bits(place, parts, shape)
    numbers = unpacked(checkpoint.read(parts["_packed"].name), bits, columns).astype(np.int16)
    scales = checkpoint.read(parts["_scale"].name)
    scales = scales if scales.ndim == 2 else scales.reshape(1, 1)
    group_of = _group_of(checkpoint, parts.get("_g_idx"), scales.shape[1])
    if "_zero_point" not in parts:
        return in_groups(numbers - (1 << (bits - 1)), scales, group_of)
    zeros = unpacked(checkpoint.read(parts["_zero_point"].name).T, bits, rows).T.astype(np.int16)
    spread = zeros[:, group_of] if group_of is not None else np.repeat(zeros, columns // zeros.shape[1], axis=1)
    return in_groups(numbers - spread, scales, group_of)


def _plain(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> bool:
    """Whether kernels can multiply the numbers as they stand: symmetric, and in groups of columns in order."""
    scales, (widths, groups, types) = parts.get("_scale"), MULTIPLIED
    if not scales or scales.dtype not in types or len(scales.shape) != 2 or "_zero_point" in parts or "_g_idx" in parts:
        return False
    bits, rest = divmod(32 * parts["_packed"].shape[1], shape[1])
    return not rest and bits in widths and shape[1] in [scales.shape[1] * group for group in groups]


def _codes(
    checkpoint: Checkpoint, place: Place, parts: Mapping[str, Tensor], shape: tuple[int, int], number: int
) -> Codes:
    """The numbers as they stand."""
    _check(place, parts, shape)
    stored = parts["_scale"]
    codes = checkpoint.read(parts["_packed"].name).view("<u4")
    scales = np.frombuffer(checkpoint.raw(stored.name), "<f4" if stored.dtype == "F32" else "<u2")
    return Codes(_bits(place, parts, shape), shape, codes, scales.reshape(stored.shape), stored.dtype)


def _group_of(checkpoint: Checkpoint, index: Tensor | None, num_groups: int) -> np.ndarray | None:
    """The group of every column; None where they stand in order, which is written as -1 too."""
    found = None if index is None else checkpoint.read(index.name)
    if found is None or (found == -1).all():
        return None
    if found.min() < 0 or found.max() >= num_groups:
        assert index
        raise refusal(index.name, f"groups {found.min()} to {found.max()}", f"0 to {num_groups - 1}")
    return found


CODEC = Codec(parts=PARTS, read=read)
