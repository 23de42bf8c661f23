"""AWQ (gemm): integers of 4 bits along the outputs, eight to a 32-bit word, with scales and zeros in groups of inputs.

MODULE.qweight  I32 (I, O / 8)     w; the word's numbers, from the lowest bits on, are outputs 0 2 4 6 1 3 5 7
MODULE.qzeros   I32 (G, O / 8)     z, likewise
MODULE.scales   float (G, O)

The value is (w - z) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from coterie.codecs import Codec, Coded, Place, check_scales, found_parts, in_groups, in_parts, refusal
from coterie.codecs.gptq import packing, turned
from coterie.storage.checkpoint import Checkpoint, Tensor
from coterie.storage.numerics import unpacked

PARTS = (".qweight", ".qzeros", ".scales")
BITS, IN_WORD = 4, 8
NUMBER_OF = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])  # output of eight -> which of the word's numbers it is


def read(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """A linear layer's matrix, where config.json says that it is packed so."""
    parts = found_parts(checkpoint, place.name.removesuffix(".weight"), PARTS)
    if ".qweight" not in parts or place.num_matrices or packing(place) != "awq":
        return None
    weight = parts[".qweight"]
    inputs, words = weight.shape if len(weight.shape) == 2 else (0, 0)
    shape = IN_WORD * words, inputs
    rows, check = partial(_rows, checkpoint, place, parts, shape), partial(_check, place, parts, shape)
    return in_parts(place, shape, parts.values(), rows, check)


def _check(place: Place, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
    weight, zeros, scales = (parts.get(part) for part in PARTS)
    version = str(place.said.get("version") or "gemm").lower()
    if not weight or weight.dtype != "I32" or not weight.num_bytes or version != "gemm":
        raise refusal(
            place.name, f"qweight {weight and weight.dtype}, version {version!r}", "I32 words, version 'gemm'"
        )
    check_scales(place.name, turned(scales), *shape)
    if not zeros or not scales or (zeros.dtype, zeros.shape) != ("I32", (scales.shape[0], shape[0] // IN_WORD)):
        raise refusal(weight.name, f"zeros {zeros and zeros.shape}", "I32 for all outputs, as many groups as scales")


def _rows(checkpoint: Checkpoint, place: Place, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> np.ndarray:
    _check(place, parts, shape)
    numbers, zeros = (_in_order(checkpoint.read(parts[part].name), shape[0]) for part in PARTS[:2])
    scales = checkpoint.read(parts[".scales"].name).T
    spread = np.repeat(zeros, shape[1] // len(zeros), axis=0)
    return in_groups((numbers - spread).T, scales)


def _in_order(words: np.ndarray, outputs: int) -> np.ndarray:
    """Words (R, O / 8) as numbers (R, O)."""
    numbers = unpacked(words, BITS, outputs).reshape(len(words), -1, IN_WORD)
    return numbers[..., NUMBER_OF].reshape(len(words), outputs).astype(np.int8)


CODEC = Codec(parts=PARTS, read=read)
