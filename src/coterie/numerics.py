"""Bytes to numbers and back, in numpy: what planning and rewriting need, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coterie.errors import CoterieError

if TYPE_CHECKING:
    from coterie.checkpoint import Checkpoint
    from coterie.layer import MoE

PLAIN = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


def decode(raw: bytes, dtype: str, name: str) -> np.ndarray:
    """Values of a stored tensor, flat: f64 and integers as they are, every other float exactly as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0"):
        return _float8_values(dtype)[np.frombuffer(raw, np.uint8)]
    if dtype not in PLAIN:
        raise CoterieError(f"tensor {name!r}: cannot read values of dtype {dtype}; dequantise the checkpoint first")
    values = np.frombuffer(raw, PLAIN[dtype])
    return values.astype(np.float32) if dtype == "F16" else values


def encode(values: np.ndarray, dtype: str, name: str) -> bytes:
    """Stored bytes of `values`, rounded once, to nearest even."""
    if dtype == "BF16":
        return round_to_bf16(values).tobytes()
    if dtype not in PLAIN:
        raise CoterieError(f"tensor {name!r}: cannot write values of dtype {dtype}; dequantise the checkpoint first")
    return np.ascontiguousarray(values).astype(PLAIN[dtype]).tobytes()


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bf16 bit patterns (uint16) nearest to `values`, ties to even; NaN stays NaN."""
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    if values.dtype == np.float64:
        # Through float32, cut short with an odd last bit where inexact: rounding that again is rounding once.
        bits = bits - (np.abs(single) > np.abs(values))
        bits = bits | (bits.view(np.float32) != values)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _float8_values(dtype: str) -> np.ndarray:
    """The 256 values of an 8-bit float. E4M3: bias 7, no infinity; E5M2: IEEE, bias 15; E8M0: 2^(b-127)."""
    codes = np.arange(256)
    if dtype == "F8_E8M0":
        return np.where(codes == 255, np.nan, 2.0 ** (codes - 127)).astype(np.float32)
    mantissa_bits, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes & 0x7F) >> mantissa_bits
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = 2.0 ** (exponent - bias) * (1 + mantissa)
    values = sign * np.where(exponent == 0, 2.0 ** (1 - bias) * mantissa, normal)
    if dtype == "F8_E4M3":
        return np.where((codes & 0x7F) == 0x7F, np.nan, values).astype(np.float32)
    special = np.where(mantissa == 0, sign * np.inf, np.nan)
    return np.where(exponent == 31, special, values).astype(np.float32)


def expert_matrices(checkpoint: Checkpoint, block: MoE, e: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """(gate, up, down) of expert e as float32 (out, in) matrices, whatever the layout on disk."""
    layout = block.layout
    if block.experts:
        names = block.experts[e]
        up, down = (_matrix(checkpoint, names, part) for part in (layout.up, layout.down))
        return (_matrix(checkpoint, names, layout.gate) if layout.gate else None), up, down
    first, *rest = (_fused_slice(checkpoint, block, name, e) for name in _fused_weights(checkpoint, block))
    if len(rest) == 2:  # dbrx: gate (F, D), up (F, D), down stored (F, D)
        return first, rest[0], rest[1].T
    down = rest[0]
    if layout.transposed:
        first, down = first.T, down.T
    if layout.gate is None:
        return None, first, down
    if len(first) % 2:
        raise CoterieError(f"{block.name}: {len(first)} fused rows per expert; expected gate and up, an even number")
    if layout.interleaved:
        return first[0::2], first[1::2], down
    gate, up = np.split(first, 2)
    return gate, up, down


def _matrix(checkpoint: Checkpoint, names: dict[str, str], part: str) -> np.ndarray:
    """A matrix stored under a number: `part.weight` or `part`, dequantised by the scale beside it."""
    key = next((k for k in (f"{part}.weight", part) if k in names), None)
    if key is None:
        known = ", ".join(sorted(names))
        raise CoterieError(f"expert tensors {known}: no plain {part!r} weight to read; dequantise the checkpoint first")
    values = checkpoint.read(names[key]).astype(np.float32, copy=False)
    scale = next((names[k] for k in (f"{key}_scale_inv", f"{key}_scale") if k in names), None)
    if scale is None:
        if checkpoint.tensors[names[key]].dtype in ("U8", "I8", "I32", "U32"):
            raise CoterieError(f"tensor {names[key]!r}: packed integers without a scale we know; dequantise first")
        return values
    return dequantise(values, checkpoint.read(scale))


def dequantise(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """values (O, I) times their scale: one number, one per row (O, 1), or one per equal block (O/r, I/c)."""
    if scale.size == 1:
        return values * scale.reshape(()).astype(np.float32)
    if scale.ndim == 1:
        scale = scale[:, None]
    if values.ndim != scale.ndim or any(s == 0 or n % s for n, s in zip(values.shape, scale.shape, strict=True)):
        raise CoterieError(f"scale of shape {scale.shape} does not divide weights {values.shape}; dequantise first")
    rows, columns = (n // s for n, s in zip(values.shape, scale.shape, strict=True))
    return values * np.repeat(np.repeat(scale.astype(np.float32), rows, 0), columns, 1)


def _fused_weights(checkpoint: Checkpoint, block: MoE) -> list[str]:
    """The weight tensors among the fused ones, in the layout's order."""
    found = []
    for name in block.layout.fused:
        full = block.prefix + name
        if full in checkpoint.tensors or f"{full}_blocks" in checkpoint.tensors:
            found.append(full)
    if len(found) != len(block.layout.fused):
        raise CoterieError(f"{block.name}: expected fused weights {', '.join(block.layout.fused)}; dequantise first")
    return found


def _fused_slice(checkpoint: Checkpoint, block: MoE, name: str, e: int) -> np.ndarray:
    """Expert e's rows of a fused tensor, as float32."""
    if f"{name}_blocks" in checkpoint.tensors:
        _check_mxfp4(checkpoint, block, name)
        blocks = checkpoint.read_rows(f"{name}_blocks", e, e + 1)[0]
        scales = checkpoint.read_rows(f"{name}_scales", e, e + 1)[0]
        return _mxfp4(blocks, scales).T  # stored (out, in); the layout says transposed
    shape = checkpoint.tensors[name].shape
    if len(shape) != 2 and not (len(shape) == 3 and shape[0] == block.num_experts):
        raise CoterieError(f"tensor {name!r}: shape {list(shape)}; expected one matrix per expert")
    rows = checkpoint.tensors[name].shape[0] // block.num_experts
    values = checkpoint.read_rows(name, e * rows, (e + 1) * rows).astype(np.float32, copy=False)
    return values[0] if values.ndim == 3 else values


def _check_mxfp4(checkpoint, block, name: str) -> None:
    found = [checkpoint.tensors.get(f"{name}_{part}") for part in ("blocks", "scales")]
    kinds = [(t.dtype, t.shape) if t else None for t in found]
    rows: tuple[int, ...] = found[1].shape if found[1] else ()
    if len(rows) != 3 or rows[0] != block.num_experts or kinds != [("U8", (*rows, 16)), ("U8", rows)]:
        raise CoterieError(
            f"tensor {name + '_blocks'!r}: found blocks and scales {kinds}; "
            "expected U8 (expert, out, group, 16) and U8 (expert, out, group)"
        )


def _mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(O, G, 16) bytes of two 4-bit floats (low nibble first) and (O, G) exponents, as float32 (O, 32 G).

    E2M1 values 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, times 2^(scale - 127).
    """
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    table = np.concatenate([positive, -positive])
    values = np.stack([table[blocks & 15], table[blocks >> 4]], -1).reshape(*scales.shape, 32)
    return (values * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(scales.shape[0], -1)


def expert_biases(checkpoint: Checkpoint, block: MoE, e: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Biases of expert e as float32: of gate above up (2F,), and of down (D,); None where there are none."""
    layout = block.layout
    if block.experts:
        names = block.experts[e]
        parts = [p for p in (layout.gate, layout.up) if p and f"{p}.bias" in names]
        first = [checkpoint.read(names[f"{p}.bias"]).astype(np.float32) for p in parts]
        down = names.get(f"{layout.down}.bias")
        return (np.concatenate(first) if first else None), (checkpoint.read(down).astype(np.float32) if down else None)
    found = [f"{block.prefix}{name}_bias" for name in layout.fused]
    rows = [checkpoint.read_rows(n, e, e + 1)[0].astype(np.float32) if n in checkpoint.tensors else None for n in found]
    first_row = rows[0]
    if first_row is not None and layout.interleaved:
        first_row = np.concatenate([first_row[0::2], first_row[1::2]])
    return first_row, rows[-1]


def store_expert(
    checkpoint: Checkpoint, block: MoE, e: int, matrices: tuple[np.ndarray | None, np.ndarray, np.ndarray]
) -> list[tuple[str, int, bytes]]:
    """(tensor name, offset in it, bytes) of expert e's changed (gate, up, down): the inverse of `expert_matrices`."""
    layout, (gate, up, down) = block.layout, matrices
    if block.experts:
        pairs = [(layout.gate, gate), (layout.up, up), (layout.down, down)]
        names = [
            (block.experts[e].get(f"{p}.weight") or block.experts[e][str(p)], m) for p, m in pairs if m is not None
        ]
        return [(n, 0, encode(m, checkpoint.tensors[n].dtype, n)) for n, m in names]
    stored = [f"{block.prefix}{name}" for name in layout.fused]
    if len(stored) == 3:  # dbrx
        parts = [gate, up, down.T]
    elif gate is None:
        parts = [up, down]
    elif layout.interleaved:
        parts = [np.stack([gate, up], 1).reshape(-1, gate.shape[1]), down]
    else:
        parts = [np.concatenate([gate, up]), down]
    if layout.transposed:
        parts = [p.T for p in parts if p is not None]
    found = [
        (n, encode(p, checkpoint.tensors[n].dtype, n)) for n, p in zip(stored, parts, strict=True) if p is not None
    ]
    return [(n, e * len(raw), raw) for n, raw in found]
