"""bitsandbytes: 4-bit codes of a table of 16 values (NF4, FP4), two to a byte, with a largest magnitude per block.

NAME                                   (n / 2 bytes)  codes of the n weights, row after row, the high half first
NAME.quant_state.bitsandbytes__nf4     U8             JSON: shape (O, I), blocksize, nested_blocksize, nested_offset
NAME.quant_map                         F32 (16,)      the values
NAME.absmax                            F32 (n / blocksize,)   times the value; or
                                       U8, with double quantisation: nested_quant_map[code] * nested_absmax + offset
NAME.nested_absmax, .nested_quant_map  F32 (one per nested_blocksize blocks), F32 (256,)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from coterie.codecs import Codec, Coded, Place, found_parts, in_parts, refusal
from coterie.storage.checkpoint import Checkpoint, Tensor, parse_json

STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
NESTED = (".nested_absmax", ".nested_quant_map")
PARTS = ("", ".absmax", ".quant_map", *NESTED, *STATES)
MAX_STATE = 1 << 16  # bytes of JSON


@dataclass(frozen=True)
class QuantState:
    """What the JSON says: the shape, and how many weights, and how many blocks, share a factor."""

    shape: tuple[int, int]
    block: int
    nested_block: int
    offset: float

    @property
    def num_blocks(self) -> int:
        return -(-math.prod(self.shape) // self.block)


def read(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """A matrix of its own, in 4 bits."""
    parts = found_parts(checkpoint, place.name, PARTS)
    told = next((parts[part] for part in STATES if part in parts), None)
    if "" not in parts or told is None or place.num_matrices:
        return None
    state = _state(checkpoint, told)
    rows, check = partial(_rows, checkpoint, place, parts, state), partial(_check, place, parts, state)
    return in_parts(place, state.shape, parts.values(), rows, check)


def _state(checkpoint: Checkpoint, told: Tensor) -> QuantState:
    if told.dtype != "U8" or told.num_bytes > MAX_STATE:
        raise refusal(told.name, f"{told.num_bytes:,} bytes of {told.dtype}", f"at most {MAX_STATE} of JSON, as U8")
    found: dict[str, Any] = parse_json(checkpoint.raw(told.name), f"tensor {told.name!r}")
    shape, block, nested = found.get("shape"), found.get("blocksize"), found.get("nested_blocksize", 1)
    offset = found.get("nested_offset", 0.0)
    counts = [*shape, block, nested] if isinstance(shape, list) and len(shape) == 2 else []
    if not counts or not all(type(n) is int and 0 < n < 2**31 for n in counts) or type(offset) not in (int, float):
        raise refusal(told.name, found, "a shape of two axes, a blocksize, and whole numbers above 0")
    return QuantState((counts[0], counts[1]), counts[2], counts[3], float(offset))


def _check(place: Place, parts: Mapping[str, Tensor], state: QuantState) -> None:
    sizes = {"": -(-math.prod(state.shape) // 2), ".absmax": state.num_blocks, ".quant_map": 16}
    found = {
        part: parts[part].num_bytes if part == "" else parts[part].num_parameters for part in sizes if part in parts
    }
    nested = parts[".absmax"].dtype == "U8" if ".absmax" in parts else False
    if nested:
        sizes |= {NESTED[0]: -(-state.num_blocks // state.nested_block), NESTED[1]: 256}
        found |= {part: parts[part].num_parameters for part in NESTED if part in parts}
    floats = {parts[part].dtype for part in found if part not in ("", *((".absmax",) if nested else ()))}
    if found != sizes or floats != {"F32"}:
        raise refusal(place.name, found, f"for weights {list(state.shape)} {sizes}, factors and tables as F32")


def _rows(checkpoint: Checkpoint, place: Place, parts: Mapping[str, Tensor], state: QuantState) -> np.ndarray:
    _check(place, parts, state)
    values, absmax = checkpoint.read(parts[".quant_map"].name), checkpoint.read(parts[".absmax"].name)
    if absmax.dtype == np.uint8:
        outer, table = (checkpoint.read(parts[part].name) for part in NESTED)
        outer = np.repeat(outer, state.nested_block)[: len(absmax)]
        absmax = table[absmax] * outer + np.float32(state.offset)
    codes: np.ndarray = np.frombuffer(checkpoint.raw(place.name), np.uint8)
    pairs = np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)[: math.prod(state.shape)]
    factors = np.repeat(absmax, state.block)[: len(pairs)]
    return (values[pairs] * factors).reshape(state.shape)


CODEC = Codec(parts=PARTS, read=read)
