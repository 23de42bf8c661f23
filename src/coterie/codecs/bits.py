"""Zeros as bits: one bit per weight and the values that are not zero, row after row. numpy only.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from coterie.codecs import Codec, Coded, Place
from coterie.errors import CoterieError
from coterie.storage.checkpoint import BITS, Checkpoint
from coterie.storage.numerics import decode as values_of
from coterie.storage.shards import Hole, Made, Output

FORMAT = 1
FORMATS = (FORMAT, 2)  # that we read: the second has integers too (`integers.py`)
METHOD = "coterie"
# The entry quantization_config of config.json has no `quant_method`: stock transformers refuses that, and would skip a
# method that it does not know, warn, and load random weights.
NOTICE = {METHOD: "packed: pip install coterie, and import coterie before this is loaded"}
SETTINGS = {**NOTICE, "format": FORMAT}
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
CLOSED = "is not open to other implementations of its experts"  # said of models that cannot be loaded packed
DAMAGED = "the file is damaged: pack the dense checkpoint again, or download this one again"


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


def products(packed: Packed) -> np.ndarray:
    """int8 values times their scales (O, I), float32."""
    assert packed.scales is not None
    codes: np.ndarray = np.frombuffer(decode(packed), np.int8).reshape(packed.shape)
    return np.multiply(codes, np.repeat(packed.scales, GROUP, 1)[:, : packed.shape[1]], dtype=np.float32)


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


def parts(name: str, dtype: str, shape: tuple[int, ...], num_values: int, groups: int | None = None) -> list[Output]:
    """What the file holds for a dense tensor (O, I) or (E, O, I) of which `num_values` are kept, still empty.

    groups: scales per row; int8 values have one for every 128 columns unless it is given.
    """
    if groups is None:
        groups = -(-shape[-1] // GROUP) if dtype == "I8" else 0
    num_matrices = shape[0] if len(shape) == 3 else 1
    lead, columns = shape[:-1], shape[-1]
    counts, value = row_type(columns), CODES[dtype]
    found = [_part(f"{name}.layout", "I64", 2 + num_matrices), _part(f"{name}.mask", "U32", *lead, words(columns))]
    if groups:
        found.append(_part(f"{name}.scales", "F32", *lead, groups))
    before = sum(p.num_bytes for p in found)
    num_rows = math.prod(lead) + -(before + math.prod(lead) * counts.itemsize) % ALIGNED // counts.itemsize
    num_padded = num_values + -num_values * value.itemsize % ALIGNED // value.itemsize
    return [
        *found,
        _part(f"{name}.rows", f"U{8 * counts.itemsize}", num_rows),
        _part(f"{name}.values", dtype, num_padded),
    ]


def _part(name: str, dtype: str, *shape: int) -> Output:
    return Output(name, dtype, shape, (Hole(math.prod(shape) * BITS[dtype] // 8),))


def num_bytes(dtype: str, shape: tuple[int, ...], num_values: int) -> int:
    """Bytes of all parts."""
    return sum(p.num_bytes for p in parts("", dtype, shape, num_values))


def shrinks(dtype: str, shape: tuple[int, ...], num_values: int) -> bool:
    """Whether the packed form takes fewer bytes than the dense one of the same dtype."""
    return num_bytes(dtype, shape, num_values) < math.prod(shape) * CODES[dtype].itemsize


def joined(matrices: Sequence[Packed], num_axes: int) -> dict[str, np.ndarray]:
    """The parts of a tensor of packed matrices as its file holds them, by what they add to its name.

    num_axes: 3 where matrices stand along an axis of their own, else 2.
    """
    first = matrices[0]
    groups = 0 if first.scales is None else first.scales.shape[1]
    shape = (*((len(matrices),) if num_axes == 3 else ()), *first.shape)
    found = {}
    for part in parts("", first.dtype, shape, sum(len(m.values) for m in matrices), groups):
        if part.name == ".layout":
            found[part.name] = np.array([shape[-1], GROUP if groups else 0, *map(checksum, matrices)], np.int64)
            continue
        arrays = [getattr(m, part.name[1:]).reshape(-1) for m in matrices]
        padded = np.zeros(math.prod(part.shape), arrays[0].dtype)
        np.concatenate(arrays, out=padded[: sum(map(len, arrays))])
        found[part.name] = padded.reshape(part.shape)
    return found


def encode_tensor(name: str, dtype: str, shape: tuple[int, ...], raw: bytes) -> list[Output]:
    """The parts of a dense tensor (O, I) or (E, O, I), in which nothing but zeros is left out."""
    rows, columns = shape[-2:]
    size = rows * columns * CODES[dtype].itemsize
    matrices = [encode(raw[at : at + size], dtype, (rows, columns)) for at in range(0, len(raw), size)]
    arrays = joined(matrices, len(shape))
    outputs = parts(name, dtype, shape, sum(len(m.values) for m in matrices))
    return [replace(o, parts=(Made(o.num_bytes, arrays[o.name.removeprefix(name)].tobytes),)) for o in outputs]


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A packed tensor: its dense name, dtype and shape, and where its parts are. Matrices are read one at a time.

    Every part is checked against the others, and against its checksum, before anything is decoded or multiplied.
    """

    checkpoint: Checkpoint = field(repr=False)
    name: str
    dtype: str
    shape: tuple[int, ...]
    num_groups: int
    crcs: tuple[int, ...]

    def part(self, part: str) -> str:
        return f"{self.name}.{part}"

    @cached_property
    def counts(self) -> np.ndarray:
        """Kept values of every row, (E, O), checked to account for all values. Raises: CoterieError."""
        counts = self.checkpoint.read(self.part("rows"))
        num_rows = math.prod(self.shape[:-1])
        rows = counts[:num_rows].reshape(len(self.crcs), -1)
        total = int(rows.sum(dtype=np.int64))
        wanted = parts(self.name, self.dtype, self.shape, total, self.num_groups)
        found = self.checkpoint.tensors[self.part("values")]
        if wanted[-1].shape != found.shape or counts[num_rows:].any():
            raise CoterieError(
                f"tensor {self.name!r}: its rows keep {total} values, {found.shape[0]} are stored; {DAMAGED}"
            )
        return rows

    @cached_property
    def starts(self) -> np.ndarray:
        """The first value of every matrix, and the end, (E + 1,)."""
        return np.concatenate([[0], self.counts.sum(1, dtype=np.int64).cumsum()])

    def matrix(self, e: int = 0) -> Packed:
        """Matrix e, checked. Raises: CoterieError when its parts contradict each other or their checksum."""
        rows, columns = self.shape[-2:]
        first, last = (int(n) for n in self.starts[e : e + 2])
        codes = CODES[self.dtype]
        size = codes.itemsize
        values = np.frombuffer(self.checkpoint.raw(self.part("values"), first * size, (last - first) * size), codes)
        scales = self._slice("scales", e, "<f4").reshape(rows, -1) if self.num_groups else None
        mask = self._slice("mask", e, "<u4").reshape(rows, -1)
        counts = self.counts[e].astype(row_type(columns))
        packed = Packed(self.dtype, (rows, columns), mask, counts, values, scales)
        check(packed, self.crcs[e], f"{self.name}[{e}]" if len(self.shape) == 3 else self.name)
        return packed

    def _slice(self, part: str, e: int, dtype: str) -> np.ndarray:
        """The share of matrix e in a part that has equal shares."""
        name = self.part(part)
        size = self.checkpoint.tensors[name].num_bytes // len(self.crcs)
        return np.frombuffer(self.checkpoint.raw(name, e * size, size), dtype)

    def coded(self) -> Coded:
        """What it stands for: the dense tensor; of int8 values with scales their products, as F32."""
        rounded, shape = self.num_groups > 0, self.shape[-2:]
        dtype = "F32" if rounded else self.dtype
        parts = tuple(name for part in PARTS if (name := self.part(part)) in self.checkpoint.tensors)
        num_bytes = sum(self.checkpoint.tensors[name].num_bytes for name in parts)

        def dense(e: int) -> bytes:
            return products(self.matrix(e)).tobytes() if rounded else decode(self.matrix(e))

        def rows(e: int) -> np.ndarray:
            return values_of(dense(e), dtype, self.name).reshape(shape)

        return Coded(
            self.name, dtype, self.shape, parts, num_bytes, rows,
            exact=not rounded, stored=self.dtype, dense=dense, packed=self.matrix,
        )  # fmt: skip


def read(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """One packed tensor, its parts checked against the shape that they themselves imply."""
    name, tensors = place.name, checkpoint.tensors
    if f"{name}.layout" not in tensors:
        return None
    layout, mask, values = (tensors.get(f"{name}.{part}") for part in ("layout", "mask", "values"))
    where = f"{checkpoint.path}: packed tensor {name!r}"
    if not layout or not mask or not values or values.dtype not in CODES or len(mask.shape) not in (2, 3):
        raise CoterieError(f"{where}: expected layout, mask (2 or 3 axes), rows and values; {DAMAGED}")
    num_matrices = mask.shape[0] if len(mask.shape) == 3 else 1
    if layout.dtype != "I64" or layout.shape != (2 + num_matrices,):
        raise CoterieError(f"{where}: layout is {layout.dtype} {layout.shape} for {num_matrices} matrices; {DAMAGED}")
    columns, group, *crcs = (int(n) for n in checkpoint.read(layout.name))
    groups = -(-columns // GROUP) if group else 0
    if not 0 < columns < MAX_LENGTH or group not in (0, GROUP) or min(crcs, default=0) < 0:
        raise CoterieError(
            f"{where}: {columns} columns in groups of {group}; expected groups of 0 or {GROUP}; {DAMAGED}"
        )
    shape = (*mask.shape[:-1], columns)
    if max(shape) >= MAX_LENGTH or bool(group) > (values.dtype == "I8"):
        raise CoterieError(f"{where}: shape {shape} of {values.dtype}; {DAMAGED}")
    for part in parts(name, values.dtype, shape, 0, groups)[:-1]:
        found = tensors.get(part.name)
        if found is None or (found.dtype, found.shape) != (part.dtype, part.shape):
            raise CoterieError(f"{where}: {part.name!r} should be {part.dtype} {part.shape}; {DAMAGED}")
    if (f"{name}.scales" in tensors) != bool(group) or name in tensors or len(values.shape) != 1:
        raise CoterieError(f"{where}: stored twice, or with parts that do not belong to it; {DAMAGED}")
    return PackedTensor(checkpoint, name, values.dtype, shape, groups, tuple(crcs)).coded()


def is_named(settings: object, method: str = METHOD) -> bool:
    """Whether an entry quantization_config names a format: by a key, as ours is written now, or by `quant_method`."""
    return isinstance(settings, Mapping) and (method in settings or settings.get("quant_method") == method)


def check_all(checkpoint: Checkpoint) -> None:
    """Raises: CoterieError for another version of the format."""
    check_settings(checkpoint.config.get("quantization_config"), f"{checkpoint.path / 'config.json'}")


def check_settings(found: object, where: str) -> None:
    """Raises: CoterieError for settings of a version that we cannot read."""
    version = found.get("format") if isinstance(found, dict) else None
    if type(version) is not int or version not in FORMATS:
        raise CoterieError(
            f"{where}: packed format {version!r:.40}, expected {' or '.join(map(str, FORMATS))}; "
            "it was written by another version of coterie: use that one, or pack the dense checkpoint again"
        )


CODEC = Codec(
    parts=tuple(f".{part}" for part in PARTS),
    read=read,
    encode=encode_tensor,
    method=METHOD,
    settings=SETTINGS,
    check=check_all,
)
