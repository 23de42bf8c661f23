"""Bytes to numbers and back, in numpy: what planning and rewriting need, without torch."""

from __future__ import annotations

import numpy as np

from coterie.errors import CoterieError

PLAIN = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
BEYOND = {"F16": 65520.0, "BF16": (2 - 2**-8) * 2.0**127, "F32": (2 - 2**-24) * 2.0**127}  # from there: infinity
CHUNK = 1 << 15  # values rounded at a time: their intermediate results stay in the processor's cache


def decode(raw: bytes, dtype: str, name: str) -> np.ndarray:
    """Values of a stored tensor, flat: f64 and integers as they are, every other float exactly as float32."""
    if dtype == "BF16":
        bits = np.frombuffer(raw, "<u2").astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0"):
        return _float8_values(dtype)[np.frombuffer(raw, np.uint8)]
    if dtype not in PLAIN:
        raise CoterieError(f"tensor {name!r}: cannot read values of dtype {dtype}; dequantise the checkpoint first")
    values = np.frombuffer(raw, PLAIN[dtype])
    return values.astype(np.float32) if dtype == "F16" else values


def encode(values: np.ndarray, dtype: str, name: str) -> bytes:
    """Stored bytes of `values`, rounded once, to nearest even.

    Raises: CoterieError where a finite value would be stored as an infinity, or a float as an integer.
    """
    stored = np.dtype(PLAIN.get(dtype, "<f4"))
    if (dtype not in PLAIN and dtype != "BF16") or (stored.kind != "f" and values.dtype.kind == "f"):
        raise CoterieError(f"tensor {name!r}: cannot write values of dtype {dtype}; dequantise the checkpoint first")
    _check_range(values, dtype, name)
    return (round_to_bf16(values) if dtype == "BF16" else values.astype(stored, copy=False)).tobytes()


def _check_range(values: np.ndarray, dtype: str, name: str) -> None:
    """Raises: CoterieError for a finite value that rounds to an infinity. Two passes, no copy where all is well."""
    limit = BEYOND.get(dtype, np.inf)
    narrow = values.dtype.kind == "f" and float(np.finfo(values.dtype).max) < limit
    if narrow or not values.size or (values.max() < limit and values.min() > -limit):
        return
    beyond = np.isfinite(values) & ((values >= limit) | (values <= -limit))
    if beyond.any():
        raise CoterieError(
            f"tensor {name!r}: {values[beyond].flat[0]:.6g} is beyond the range of {dtype}; expected a number that it "
            "can hold: convert the checkpoint to BF16 or F32 first"
        )


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bf16 bit patterns (uint16) nearest to `values`, ties to even; NaN stays NaN."""
    flat = values.reshape(-1)
    rounded = np.empty(flat.shape, np.uint16)
    for start in range(0, len(flat), CHUNK):
        rounded[start : start + CHUNK] = _rounded(flat[start : start + CHUNK])
    return rounded.reshape(values.shape)


def _rounded(values: np.ndarray) -> np.ndarray:
    """The patterns of a few values, as uint32."""
    single = values if values.dtype == np.float32 else _odd_float32(values)
    bits = single.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits  # only a NaN's bits can run over
    rounded >>= 16
    nan = np.isnan(single)
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded


def _odd_float32(values: np.ndarray) -> np.ndarray:
    """Values as float32, cut short with an odd last bit where that is inexact: rounding again is then rounding once."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    bits = single.view(np.uint32)
    bits -= np.abs(single) > np.abs(values)
    bits |= single != values
    return single


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


def unpacked(words: np.ndarray, num_bits: int, count: int) -> np.ndarray:
    """Numbers below 2^num_bits (R, count), uint8, of rows of 32-bit words (R, W): end to end from the lowest bit on."""
    raw = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if num_bits == 8:
        return raw[:, :count]
    if num_bits == 4:
        return np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)[:, :count]
    bits = np.unpackbits(raw, axis=1, bitorder="little", count=num_bits * count)
    return np.packbits(bits.reshape(len(raw), count, num_bits), axis=-1, bitorder="little")[..., 0]


def packed(numbers: np.ndarray, num_bits: int) -> np.ndarray:
    """The inverse of `unpacked`: 32-bit words (R, W), the last of each row filled up with zero bits."""
    rows, count = numbers.shape
    bits = np.unpackbits(numbers.astype(np.uint8)[..., None], axis=-1, bitorder="little", count=num_bits)
    padded = np.zeros((rows, -(-count * num_bits // 32) * 32), np.uint8)
    padded[:, : count * num_bits] = bits.reshape(rows, -1)
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")
