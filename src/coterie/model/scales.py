"""Quantised weights times their scales: which tensor beside a weight multiplies it, and what its numbers mean.

Whatever leaves room for doubt is refused: weights without their scale, or with another, are numbers like any others,
and nothing after this would notice.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from coterie.errors import CoterieError
from coterie.model.family import lookup
from coterie.model.layer import MoE
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.numerics import decode, dequantise

SCALE = re.compile(r"(weight_)?scale(_inv)?|qscale_weight")  # all of them multiply, `inv` or not
OF_INPUTS = re.compile(r"(^|_)(input|activation|act|output)(_|$)")  # for arithmetic in 8 bits, which is not ours
SCALE_LIKE = re.compile(r"scale|zero")
FLOATS = ("F64", "F32", "F16", "BF16")


def stored_weight(checkpoint: Checkpoint, block: MoE, e: int, key: str) -> np.ndarray:
    """Expert e's matrix of a tensor, as float32 in the stored orientation, times its scale, whatever the layout.

    key: the tensor's name below the expert's ("gate_proj.weight"), or below the layer's ("mlp.experts.down_proj").
    Raises: CoterieError for scales, and for weights without one, of whose meaning there is any doubt.
    """
    name = _names(block, e)[key]
    shape = checkpoint.tensors[name].shape
    if not block.experts and len(shape) != 2 and not (len(shape) == 3 and shape[0] == block.num_experts):
        raise CoterieError(f"tensor {name!r}: shape {list(shape)}; expected one matrix per expert")
    scale = weight_scale(block, e, key)
    _check_dtypes(checkpoint, name, scale)
    values = _share(checkpoint, block, e, name, len(shape) == 3).astype(np.float32, copy=False)
    if scale is None:
        return values
    factors = _factors(checkpoint, scale, _share(checkpoint, block, e, scale, len(shape) == 3))
    if factors.ndim == 1:  # one per output
        factors = factors[None] if block.layout.transposed and not block.experts else factors[:, None]
    size = block_size(checkpoint)
    if checkpoint.tensors[name].dtype == "I8" and not size and factors.shape[1:] not in ((), (1,)):
        raise CoterieError(f"tensor {name!r}: packed integers with scales {factors.shape}; dequantise first")
    if not (_holds_gate_and_up(block, key) and _are_apart(len(values), factors.shape, size, name)):
        return dequantise(values, factors, name, size)
    pairs = zip(np.split(values, 2), np.split(factors, 2), strict=True)
    return np.concatenate([dequantise(v, f, name, size) for v, f in pairs])


def weight_scale(block: MoE, e: int, key: str) -> str | None:
    """The tensor whose values multiply the weight `key` (see `stored_weight`); None where there is none.

    Raises: CoterieError for several, and for a tensor that may be one but is not known.
    """
    layout, names = block.layout, _names(block, e)
    parts = (layout.gate, layout.up, layout.down) if block.experts else layout.fused
    stems = [part.removesuffix(".weight") for part in parts if part]
    found, unknown = [], []
    for beside, name in names.items():
        owner = next((stem for stem in stems if beside.startswith((stem + ".", stem + "_"))), None)
        if owner not in (None, key.removesuffix(".weight")):
            continue
        kind = beside.removeprefix(owner or "").lstrip("._")
        if owner and SCALE.fullmatch(kind):
            found.append(name)
        elif SCALE_LIKE.search(kind) and not OF_INPUTS.search(kind):
            unknown.append(name)
    if unknown or len(found) > 1:
        raise CoterieError(
            f"tensor {names[key]!r}: beside it stands {', '.join(unknown or found)}; expected one weight_scale_inv, "
            "weight_scale, scale or qscale_weight; dequantise the checkpoint first"
        )
    return found[0] if found else None


def block_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the config says. Raises: CoterieError for anything but two counts."""
    found = _settings(checkpoint).get("weight_block_size")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int and n > 0 for n in found):
        raise CoterieError(f"config.json: weight_block_size must be two positive integers, found {found!r:.80}")
    return found[0], found[1]


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the config says of the quantisation; empty where it says nothing."""
    found: Any = next((v for _, _, v in lookup(checkpoint.config, ("quantization_config",)) if v is not None), {})
    if not isinstance(found, dict):
        raise CoterieError(f"config.json: quantization_config must be an object, found {found!r:.80}")
    return found


def _names(block: MoE, e: int) -> dict[str, str]:
    """The tensors among which an expert's weights and their scales stand, by key."""
    return block.experts[e] if block.experts else {name.removeprefix(block.prefix): name for name in block.fused}


def _check_dtypes(checkpoint: Checkpoint, name: str, scale: str | None) -> None:
    """Raises: CoterieError for packed integers, and for small floats whose scale is not where we look for it."""
    dtype = checkpoint.tensors[name].dtype
    if dtype.startswith("F8"):
        if scale is None and _settings(checkpoint):
            raise CoterieError(
                f"tensor {name!r}: {dtype} without a scale beside it, but config.json has a quantization_config; "
                "expected a weight_scale_inv or weight_scale; dequantise the checkpoint first"
            )
    elif dtype.startswith(("U", "I", "BOOL")) and not (
        dtype == "I8" and scale and checkpoint.tensors[scale].dtype in FLOATS
    ):
        raise CoterieError(f"tensor {name!r}: packed integers without a scale we know; dequantise first")


def _share(checkpoint: Checkpoint, block: MoE, e: int, name: str, stacked: bool) -> np.ndarray:
    """What expert e has of a tensor, decoded: all of a numbered one; of a fused one its rows, or its entry where the
    weights are stacked (E, rows, columns)."""
    if block.experts:
        return checkpoint.read(name)
    shape = checkpoint.tensors[name].shape
    rows = shape[0] // block.num_experts
    if stacked and rows != 1:
        raise CoterieError(f"tensor {name!r}: shape {list(shape)}; expected one entry for each expert")
    values = checkpoint.read_rows(name, e * rows, (e + 1) * rows)
    return values[0] if stacked else values


def _factors(checkpoint: Checkpoint, name: str, values: np.ndarray) -> np.ndarray:
    """Stored scales as floats; bytes are the exponents of E8M0, 2^(u - 127), where the config says so."""
    if values.dtype == np.uint8 and _settings(checkpoint).get("scale_fmt") == "ue8m0":
        return decode(values.tobytes(), "F8_E8M0", name).reshape(values.shape)
    if values.dtype.kind != "f":
        raise CoterieError(
            f"tensor {name!r}: scales as {checkpoint.tensors[name].dtype}; expected floats, or U8 where config.json "
            'says "scale_fmt": "ue8m0"; dequantise the checkpoint first'
        )
    return values


def _holds_gate_and_up(block: MoE, key: str) -> bool:
    """Whether a tensor holds gate above up."""
    layout = block.layout
    plain = layout.gate and not layout.transposed and not layout.interleaved and len(layout.fused) == 2
    return bool(not block.experts and plain and key == layout.fused[0])


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
