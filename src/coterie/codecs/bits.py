"""The sparse format: one bit per weight and the kept values, row after row. numpy only.

A matrix (O, I) of `NAME` becomes tensors that stand side by side in the same file:

    NAME.layout  I64 (2 + E,)     columns I, group of the scales (0: none), and the checksum of each of E matrices
    NAME.mask    U32 (O, W)       W = ceil(I / 32) words per row; bit c % 32 of word c // 32: column c is kept
    NAME.scales  F32 (O, G)       only of I8 values: one factor per row and group of columns, G = ceil(I / group)
    NAME.rows    U8|U16|U32 (R,)  kept values per row; row offsets are their running sum
    NAME.values  (N,)             kept values in the matrix's own dtype

Rows and values are flat, and each is padded with zeros until a multiple of 8 bytes is full: whatever follows in the
file stays aligned. A tensor of E matrices (E, O, I) has that axis before mask and
scales; rows and values of its matrices follow each other. What is kept is every value whose bits are not all zero:
minus zero too, so that unpacking restores every byte.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from coterie.errors import CoterieError
from coterie.storage.checkpoint import BITS

FORMAT = 1
METHOD = "coterie"  # quant_method in config.json
PARTS = ("layout", "mask", "scales", "rows", "values")  # in the order in which they stand in a file
CODES: dict[str, np.dtype] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<u2"),
    "F32": np.dtype("<u4"),
    "I8": np.dtype("u1"),
}
GROUP = 128  # columns that share a scale
ALIGNED = 8  # bytes
WORD = 32  # columns per word of the mask
MAX_LENGTH = 2**31  # rows or columns of a matrix


@dataclass(frozen=True, eq=False)
class Packed:
    """One matrix: `mask` (O, W) uint32, `rows` (O,) kept values per row, `values` (N,) as bit patterns, and of int8
    values `scales` (O, G) float32."""

    dtype: str
    shape: tuple[int, int]
    mask: np.ndarray
    rows: np.ndarray
    values: np.ndarray
    scales: np.ndarray | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of mask, row counts, values and scales."""
        parts = (self.mask, self.rows, self.values, self.scales)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def density(self) -> float:
        return len(self.values) / max(1, math.prod(self.shape))


def encode(raw: bytes | np.ndarray, dtype: str, shape: tuple[int, int], scales: np.ndarray | None = None) -> Packed:
    """A dense matrix's bytes, packed. `scales` (O, G) belong to I8 values and are kept beside them."""
    assert dtype in CODES and (scales is None or dtype == "I8")
    codes = np.frombuffer(raw, CODES[dtype]).reshape(shape)
    kept = codes != 0
    bits = np.packbits(kept, axis=1, bitorder="little")
    padded = np.zeros((shape[0], 4 * words(shape[1])), np.uint8)
    padded[:, : bits.shape[1]] = bits
    rows = kept.sum(1, dtype=np.int64).astype(row_type(shape[1]))
    return Packed(dtype, shape, padded.view("<u4"), rows, codes[kept], scales)


def quantise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes (O, I) int8, scales (O, G) float32) with values = codes * scales to half a scale, and zeros exact.

    A group's scale is its largest magnitude over 127.
    """
    rows, columns = values.shape
    padded = np.zeros((rows, -(-columns // GROUP) * GROUP), np.float32)
    padded[:, :columns] = values
    grouped = padded.reshape(rows, -1, GROUP)
    scales = (np.abs(grouped).max(-1) / 127).astype(np.float32)
    codes = np.rint(grouped / np.where(scales == 0, 1, scales)[..., None]).astype(np.int8)
    return np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns]), scales


def decode(packed: Packed) -> bytes:
    """The dense matrix's bytes: the exact inverse of `encode` (scales stay beside it)."""
    bits = np.unpackbits(packed.mask.view(np.uint8), axis=1, bitorder="little", count=packed.shape[1])
    dense = np.zeros(packed.shape, CODES[packed.dtype])
    dense[bits.view(bool)] = packed.values
    return dense.tobytes()


def words(num_columns: int) -> int:
    """32-bit mask words per row."""
    return -(-num_columns // WORD)


def row_type(num_columns: int) -> np.dtype:
    """The smallest unsigned integers that can count a row's values."""
    return np.dtype("u1" if num_columns < 2**8 else "<u2" if num_columns < 2**16 else "<u4")


def checksum(packed: Packed) -> int:
    """CRC-32 of mask, scales, row counts and values, in this order."""
    crc = zlib.crc32(f"{packed.dtype} {packed.shape}".encode())
    for part in (packed.mask, packed.scales, packed.rows, packed.values):
        if part is not None:
            crc = zlib.crc32(np.ascontiguousarray(part).data, crc)
    return crc


def check(packed: Packed, crc: int, name: str) -> None:
    """Refuses a matrix whose parts contradict each other, before anything computes an address from them.

    Raises: CoterieError naming the tensor and the first fault.
    """
    columns = packed.shape[1]
    counted = np.bitwise_count(packed.mask).sum(1, dtype=np.int64)
    wrong = np.flatnonzero(counted != packed.rows)
    if len(wrong):
        r = wrong[0]
        raise CoterieError(
            f"tensor {name!r}: the mask of row {r} keeps {counted[r]} values, "
            f"its count says {packed.rows[r]}; {DAMAGED}"
        )
    if columns % WORD and (packed.mask[:, -1] >> np.uint32(columns % WORD)).any():
        raise CoterieError(f"tensor {name!r}: the mask keeps columns beyond the {columns} there are; {DAMAGED}")
    if counted.sum() != len(packed.values):
        raise CoterieError(
            f"tensor {name!r}: the mask keeps {counted.sum()} values, {len(packed.values)} are stored; {DAMAGED}"
        )
    if checksum(packed) != crc:
        raise CoterieError(f"tensor {name!r}: checksum {checksum(packed):08x}, expected {crc:08x}; {DAMAGED}")


DAMAGED = "the file is damaged: pack the dense checkpoint again, or download this one again"


@dataclass(frozen=True)
class Part:
    """A tensor of the format as a file holds it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


def parts(name: str, dtype: str, shape: tuple[int, ...], num_values: int, groups: int = 0) -> list[Part]:
    """What the file holds for a dense tensor (O, I) or (E, O, I) of which `num_values` are kept."""
    num_matrices = shape[0] if len(shape) == 3 else 1
    lead, columns = shape[:-1], shape[-1]
    counts, value = row_type(columns), CODES[dtype]
    found = [Part(f"{name}.layout", "I64", (2 + num_matrices,)), Part(f"{name}.mask", "U32", (*lead, words(columns)))]
    if groups:
        found.append(Part(f"{name}.scales", "F32", (*lead, groups)))
    before = sum(p.num_bytes for p in found)
    num_rows = math.prod(lead) + -(before + math.prod(lead) * counts.itemsize) % ALIGNED // counts.itemsize
    found.append(Part(f"{name}.rows", f"U{8 * counts.itemsize}", (num_rows,)))
    return [
        *found,
        Part(f"{name}.values", dtype, (num_values + -num_values * value.itemsize % ALIGNED // value.itemsize,)),
    ]


def num_groups(dtype: str, num_columns: int) -> int:
    """Scales per row: of int8 values only."""
    return -(-num_columns // GROUP) if dtype == "I8" else 0


def num_bytes(dtype: str, shape: tuple[int, ...], num_values: int) -> int:
    """Bytes of all parts."""
    return sum(p.num_bytes for p in parts("", dtype, shape, num_values, num_groups(dtype, shape[-1])))


def shrinks(dtype: str, shape: tuple[int, ...], num_values: int) -> bool:
    """Whether the packed form takes fewer bytes than the dense one of the same dtype."""
    return num_bytes(dtype, shape, num_values) < math.prod(shape) * CODES[dtype].itemsize


def settings() -> dict[str, object]:
    """The entry `quantization_config` of config.json."""
    return {"quant_method": METHOD, "format": FORMAT}


def check_settings(found: object, where: str) -> None:
    """Raises: CoterieError for settings of a version that we cannot read."""
    version = found.get("format") if isinstance(found, dict) else None
    if type(version) is not int or version != FORMAT:
        raise CoterieError(
            f"{where}: sparse format {version!r:.40}, expected {FORMAT}; "
            "it was written by another version of coterie: use that one, or pack the dense checkpoint again"
        )
