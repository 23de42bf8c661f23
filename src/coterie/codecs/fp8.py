"""Small numbers times a scale beside them: FP8 and I8 with one scale per tensor, row or block, under any known name.

Whatever leaves room for doubt is refused: weights without their scale, or with another one, would be read as numbers
like any others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import numpy as np

from coterie.codecs import Codec, Coded, Place
from coterie.codecs.plain import check_shape, share
from coterie.errors import CoterieError
from coterie.storage.checkpoint import FLOATS, Checkpoint
from coterie.storage.numerics import decode

SCALE = re.compile(r"(weight_)?scale(_inv)?|qscale_weight")  # all of them multiply, `inv` or not
# For arithmetic in 8 bits, which is not ours: of what enters and leaves, and of cached keys and values.
OF_INPUTS = re.compile(r"(^|_)(input|activation|act|output)(_|$)|^[qkv]_scale$")
SCALE_LIKE = re.compile(r"scale|zero")
PARTS = ("", "_scale_inv", "_scale", ".scale", ".qscale_weight")  # a matrix has the first and one of the others


def read(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """A tensor with a scale beside it, or of a dtype that should have one. Raises where it is read, not here."""
    tensor = checkpoint.tensors.get(place.name)
    scales, unknown = _beside(place)
    if tensor is None or (tensor.dtype in FLOATS and not scales and not unknown):
        return None
    names = (tensor.name, *scales)
    num_bytes = sum(checkpoint.tensors[name].num_bytes for name in names)
    rows, check = partial(_rows, checkpoint, place), partial(_check, checkpoint, place)
    return Coded(tensor.name, "F32", tensor.shape, names, num_bytes, rows, check=check)


def _rows(checkpoint: Checkpoint, place: Place, e: int) -> np.ndarray:
    """Matrix e times its scale, as float32, as it is oriented in the file.

    Raises: CoterieError for scales, and for weights without one, of whose meaning there is any doubt.
    """
    name, tensor, scale = place.name, checkpoint.tensors[place.name], _check(checkpoint, place)
    stacked = len(tensor.shape) == 3
    values = share(checkpoint, place, name, e, stacked).astype(np.float32, copy=False)
    if scale is None:
        return values
    factors = _factors(checkpoint, place, scale, share(checkpoint, place, scale, e, stacked))
    if factors.ndim == 1:  # one per output
        factors = factors[None] if place.transposed else factors[:, None]
    size = _block_size(place)
    if tensor.dtype == "I8" and not size and factors.shape[1:] not in ((), (1,)):
        raise CoterieError(f"tensor {name!r}: packed integers with scales {factors.shape}; dequantise first")
    if not (place.gate_above_up and _are_apart(len(values), factors.shape, size, name)):
        return dequantise(values, factors, name, size)
    pairs = zip(np.split(values, 2), np.split(factors, 2), strict=True)
    return np.concatenate([dequantise(v, f, name, size) for v, f in pairs])


def _check(checkpoint: Checkpoint, place: Place) -> str | None:
    """The scale, of a tensor that the headers leave no doubt about."""
    check_shape(place, checkpoint.tensors[place.name].shape)
    scale = weight_scale(place)
    _check_dtypes(checkpoint, place, scale)
    return scale


def weight_scale(place: Place) -> str | None:
    """The tensor whose values multiply the weights; None where there is none.

    Raises: CoterieError for several, and for a tensor that may be one but is not known.
    """
    found, unknown = _beside(place)
    if unknown or len(found) > 1:
        raise CoterieError(
            f"tensor {place.name!r}: beside it stands {', '.join(unknown or found)}; expected one weight_scale_inv, "
            "weight_scale, scale or qscale_weight; dequantise the checkpoint first"
        )
    return found[0] if found else None


def _beside(place: Place) -> tuple[list[str], list[str]]:
    """The tensors beside the weights that multiply them, and those that may, but are not known."""
    found, unknown = [], []
    for beside, name in place.beside.items():
        owner = next((stem for stem in place.weights if beside.startswith((stem + ".", stem + "_"))), None)
        if owner not in (None, place.key.removesuffix(".weight")):
            continue
        kind = beside.removeprefix(owner or "").lstrip("._")
        if owner and SCALE.fullmatch(kind):
            found.append(name)
        elif SCALE_LIKE.search(kind) and not OF_INPUTS.search(kind):
            unknown.append(name)
    return found, unknown


def _block_size(place: Place) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the config says. Raises: CoterieError for anything but two counts."""
    found = _settings(place).get("weight_block_size")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int and n > 0 for n in found):
        raise CoterieError(f"config.json: weight_block_size must be two positive integers, found {found!r:.80}")
    return found[0], found[1]


def _settings(place: Place) -> Mapping[str, object]:
    """What the config says of the quantisation; empty where it says nothing."""
    if not isinstance(place.settings, dict):
        raise CoterieError(f"config.json: quantization_config must be an object, found {place.settings!r:.80}")
    return place.settings


def _check_dtypes(checkpoint: Checkpoint, place: Place, scale: str | None) -> None:
    """Raises: CoterieError for packed integers, and for small floats whose scale is not where we look for it."""
    dtype = checkpoint.tensors[place.name].dtype
    if dtype.startswith("F8"):
        if scale is None and _settings(place):
            raise CoterieError(
                f"tensor {place.name!r}: {dtype} without a scale beside it, but config.json has a quantization_config; "
                "expected a weight_scale_inv or weight_scale; dequantise the checkpoint first"
            )
    elif dtype.startswith(("U", "I", "BOOL")) and not (
        dtype == "I8" and scale and checkpoint.tensors[scale].dtype in FLOATS
    ):
        raise CoterieError(f"tensor {place.name!r}: packed integers without a scale we know; dequantise first")


def _factors(checkpoint: Checkpoint, place: Place, name: str, values: np.ndarray) -> np.ndarray:
    """Stored scales as floats; bytes are the exponents of E8M0, 2^(u - 127), where the config says so."""
    if values.dtype == np.uint8 and _settings(place).get("scale_fmt") == "ue8m0":
        return decode(values.tobytes(), "F8_E8M0", name).reshape(values.shape)
    if values.dtype.kind != "f":
        raise CoterieError(
            f"tensor {name!r}: scales as {checkpoint.tensors[name].dtype}; expected floats, or U8 where config.json "
            'says "scale_fmt": "ue8m0"; dequantise the checkpoint first'
        )
    return values


def _are_apart(rows: int, shape: tuple[int, ...], size: tuple[int, int] | None, name: str) -> bool:
    """Whether gate and up have scales of their own, as two matrices: then no block reaches from one into the other.

    Raises: CoterieError where the number of scales does not say.
    """
    half, rest = divmod(rows, 2)
    if rest or len(shape) != 2:
        return False
    if size is None:
        return shape == (2, 1)
    apart, together = 2 * -(-half // size[0]), -(-rows // size[0])
    if shape[0] == apart == together and half % size[0]:
        raise CoterieError(
            f"tensor {name!r}: {apart} rows of scales fit {rows} rows in blocks of {size[0]} both as one matrix and as "
            "gate and up apart; dequantise the checkpoint first"
        )
    return shape[0] == apart != together


def dequantise(values: np.ndarray, scale: np.ndarray, name: str, block: tuple[int, int] | None = None) -> np.ndarray:
    """values (O, I) times their scale: one number, one per row (O, 1), or one per block (ceil(O/r), ceil(I/c)).

    block: (r, c), where it is known; blocks at the end may be cut short. Where it is not, only sizes that are powers of
    two are taken. Raises: CoterieError for scales that do not fit, or fit blocks of several sizes.
    """
    scale = scale.reshape(1, 1) if scale.size == 1 else scale[:, None] if scale.ndim == 1 else scale
    sizes = [0]
    if values.ndim == scale.ndim == 2:
        sizes = list(map(_block_length, values.shape, scale.shape, block or (None, None)))
    if not all(sizes):
        expected = f"blocks of {block[0]} x {block[1]}" if block else "rows, or blocks of one size, a power of two"
        raise CoterieError(
            f"tensor {name!r}: scale of shape {scale.shape} does not divide weights {values.shape} into {expected}; "
            "dequantise the checkpoint first"
        )
    factors = scale.astype(np.float32, copy=False)
    for axis, size in enumerate(sizes):
        if factors.shape[axis] > 1:
            factors = np.repeat(factors, size, axis)
    return values * factors[: values.shape[0], : values.shape[1]]


def _block_length(length: int, count: int, known: int | None) -> int:
    """How many weights along an axis share one of `count` scales; 0 where that is not certain."""
    if known:
        return known if -(-length // known) == count else 0
    if count < 2:
        return length * count
    size = 1 << (-(-length // count) - 1).bit_length()
    even, rest = divmod(length, count)
    return size if -(-length // size) == count and (rest or even == size) else 0


CODEC = Codec(parts=PARTS, read=read)
