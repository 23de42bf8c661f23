"""GPTQ: integers of 2, 3, 4 or 8 bits, end to end down the inputs in 32-bit words, with scales and zeros in groups.

MODULE.qweight  I32 (b I / 32, O)   w, lowest bits first
MODULE.qzeros   I32 (G, b O / 32)   z - 1 (z where config.json says "checkpoint_format": "gptq_v2"), along the outputs
MODULE.scales   float (G, O)
MODULE.g_idx    I32 (I,)            the group of every input; in order where it is left out

The value is (w - z) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from coterie.codecs import Codec, Coded, Place, check_scales, found_parts, in_groups, in_parts, refusal
from coterie.storage.checkpoint import Checkpoint, Tensor
from coterie.storage.numerics import unpacked

PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
BITS = (2, 3, 4, 8)
FIRST_ZERO = {"gptq": 1, "gptq_v2": 0}  # what is added to stored zeros, by checkpoint_format


def read(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """A linear layer's matrix, where config.json says that it is packed so."""
    parts = found_parts(checkpoint, place.name.removesuffix(".weight"), PARTS)
    if ".qweight" not in parts or place.num_matrices or packing(place) != "gptq":
        return None
    shape, bits = _sizes(parts)
    rows, check = partial(_rows, checkpoint, place, parts), partial(_check, place, parts, shape, bits)
    return in_parts(place, shape, parts.values(), rows, check)


def packing(place: Place) -> str:
    """Which of the two ways that share their names config.json means: "gptq" or "awq"; "" for neither."""
    settings = place.said
    if settings.get("quant_method") == "auto-round":
        return str(settings.get("packing_format")).removeprefix("auto_round:auto_")
    return str(settings.get("quant_method", ""))


def _sizes(parts: Mapping[str, Tensor]) -> tuple[tuple[int, int], int]:
    """(O, I) and the bits of a number, of which the zeros of a row tell how many there are."""
    weight, zeros = parts[".qweight"], parts.get(".qzeros")
    if len(weight.shape) != 2 or zeros is None or len(zeros.shape) != 2 or not weight.num_bytes:
        raise refusal(weight.name, [list(t.shape) for t in parts.values()], "packed integers, and zeros beside them")
    bits, rest = divmod(32 * zeros.shape[1], weight.shape[1])
    if bits not in BITS or rest or 32 * weight.shape[0] % bits:
        raise refusal(weight.name, f"{weight.shape[1]} outputs and {zeros.shape[1]} words of zeros", f"bits {BITS}")
    return (weight.shape[1], 32 * weight.shape[0] // bits), bits


def _check(place: Place, parts: Mapping[str, Tensor], shape: tuple[int, int], bits: int) -> None:
    (rows, columns), zeros, scales, index = shape, parts[".qzeros"], parts.get(".scales"), parts.get(".g_idx")
    _first_zero(place)
    if {parts[".qweight"].dtype, zeros.dtype} != {"I32"}:
        raise refusal(parts[".qweight"].name, f"{parts['.qweight'].dtype} and {zeros.dtype}", "I32 words")
    check_scales(place.name, turned(scales), rows, columns if index is None else scales.shape[0] if scales else 0)
    if scales and scales.shape[0] != zeros.shape[0]:
        raise refusal(zeros.name, f"{zeros.shape[0]} groups of zeros", f"{scales.shape[0]}, as of scales")
    if index is not None and (index.dtype != "I32" or index.shape != (columns,)):
        raise refusal(index.name, f"{index.dtype} {list(index.shape)}", f"the group of each of {columns} inputs")


def _first_zero(place: Place) -> int:
    said = str(place.said.get("checkpoint_format") or "gptq")
    if said not in FIRST_ZERO:
        raise refusal(place.name, f"checkpoint_format {said!r} in config.json", f"one of {', '.join(FIRST_ZERO)}")
    return FIRST_ZERO[said]


def turned(scales: Tensor | None) -> Tensor | None:
    """The header of scales as if they stood (O, G)."""
    if scales is None:
        return None
    return Tensor(scales.name, scales.dtype, scales.shape[::-1], scales.file, scales.start, scales.end)


def _rows(checkpoint: Checkpoint, place: Place, parts: Mapping[str, Tensor]) -> np.ndarray:
    shape, bits = _sizes(parts)
    _check(place, parts, shape, bits)
    numbers = unpacked(checkpoint.read(parts[".qweight"].name).T, bits, shape[1])
    zeros = unpacked(checkpoint.read(parts[".qzeros"].name), bits, shape[0]).T.astype(np.int16) + _first_zero(place)
    num_groups = zeros.shape[1]
    group_of = np.arange(shape[1]) * num_groups // shape[1]
    if ".g_idx" in parts:
        group_of = checkpoint.read(parts[".g_idx"].name)
        if group_of.min() < 0 or group_of.max() >= num_groups:
            found = f"groups {group_of.min()} to {group_of.max()}"
            raise refusal(parts[".g_idx"].name, found, f"0 to {num_groups - 1}")
    return in_groups(numbers - zeros[:, group_of], checkpoint.read(parts[".scales"].name).T, group_of)


CODEC = Codec(parts=PARTS, read=read)
