"""Integers of 2, 3, 4 or 8 bits with scales in groups, each matrix of a width of its own; of none: zeros. numpy only.

A matrix (O, I), or a tensor of matrices (E, O, I), called NAME becomes

    NAME.codes   U32 (N,)         of each matrix, O rows of I b / 32 words: w + 2^(b-1), lowest bits first
    NAME.scales  float (K, O, G)  of the K matrices of more than 0 bits, one for every I / G columns
    NAME.widths  I64 (3 + 2E,)    columns I, columns of a scale, the number of matrices E (0: one of its own), the width
                                  b of each, and the checksum of each

and stands for w * scale in float32, or zeros where b is 0. Rows fill whole words: 32 divides I. Matrices follow one
another without a gap.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from coterie.codecs import Codec, Coded, Codes, Place, found_parts, in_groups
from coterie.codecs.bits import DAMAGED, MAX_LENGTH, METHOD, NOTICE
from coterie.errors import CoterieError
from coterie.storage.checkpoint import BITS, Checkpoint, Tensor
from coterie.storage.numerics import decode, unpacked

FORMAT = 2  # of the entry in config.json: the first that has these
WIDTHS = (0, 2, 3, 4, 8)
WORD = 32  # bits
SCALES: dict[str, np.dtype] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<u2"), "F32": np.dtype("<f4")}
PARTS = (".widths", ".codes", ".scales")


def values(found: Codes) -> np.ndarray:
    """What a matrix stands for, (O, I) float32."""
    if not found.bits:
        return np.zeros(found.shape, np.float32)
    numbers = unpacked(found.codes, found.bits, found.shape[1]).astype(np.int16) - (1 << (found.bits - 1))
    return in_groups(numbers, decode(found.scales.tobytes(), found.scale_type, "").reshape(found.scales.shape))


def checksum(codes: bytes, scales: bytes) -> int:
    """CRC-32 of a matrix's codes, then its scales, as they are stored."""
    return zlib.crc32(scales, zlib.crc32(codes))


@dataclass(frozen=True)
class Arrangement:
    """What a tensor's header says: its dense shape, columns of a scale, dtype of scales, and each matrix's width."""

    shape: tuple[int, ...]
    group: int
    scale_type: str
    widths: tuple[int, ...]

    @property
    def parts(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of the tensors in the file, by what they add to its name."""
        rows, columns = self.shape[-2:]
        stored = sum(bits > 0 for bits in self.widths)
        return {
            ".widths": ("I64", (3 + 2 * len(self.widths),)),
            ".codes": ("U32", (self.words(len(self.widths)),)),
            ".scales": (self.scale_type, (stored, rows, columns // self.group)),
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(math.prod(shape) * BITS[dtype] // 8 for dtype, shape in self.parts.values())

    def words(self, e: int) -> int:
        """Words of codes of the matrices before matrix e."""
        return math.prod(self.shape[-2:]) * sum(self.widths[:e]) // WORD

    def header(self, checksums: Sequence[int]) -> bytes:
        """Bytes of NAME.widths."""
        num_matrices = len(self.widths) if len(self.shape) == 3 else 0
        return np.array([self.shape[-1], self.group, num_matrices, *self.widths, *checksums], "<i8").tobytes()


@dataclass(frozen=True, eq=False)
class IntegerTensor:
    """A tensor of such matrices, read one at a time, each held against its checksum before it is used."""

    checkpoint: Checkpoint = field(repr=False)
    name: str
    layout: Arrangement
    checksums: tuple[int, ...]

    def matrix(self, e: int = 0) -> Codes:
        """Matrix e. Raises: CoterieError where its bytes are not those that were written."""
        layout, bits = self.layout, self.layout.widths[e]
        (rows, columns), dtype = layout.shape[-2:], SCALES[layout.scale_type]
        first, last = layout.words(e), layout.words(e + 1)
        size = rows * (columns // layout.group) * dtype.itemsize if bits else 0
        before = size * sum(b > 0 for b in layout.widths[:e])
        codes = self.checkpoint.raw(f"{self.name}.codes", 4 * first, 4 * (last - first))
        scales = self.checkpoint.raw(f"{self.name}.scales", before, size)
        found = checksum(codes, scales)
        if found != self.checksums[e]:
            where = f"{self.name}[{e}]" if len(layout.shape) == 3 else self.name
            raise CoterieError(f"tensor {where!r}: checksum {found:08x}, expected {self.checksums[e]:08x}; {DAMAGED}")
        words = np.frombuffer(codes, "<u4").reshape(rows, columns * bits // WORD)
        factors = np.frombuffer(scales, dtype).reshape(rows, size // (rows * dtype.itemsize))
        return Codes(bits, (rows, columns), words, factors, layout.scale_type)

    def coded(self) -> Coded:
        """What it stands for: a dense tensor of float32, which holds every product of a code and a scale."""
        names = tuple(self.name + part for part in PARTS)
        return Coded(
            self.name, "F32", self.layout.shape, names, self.layout.num_bytes, lambda e: values(self.matrix(e)),
            exact=False, stored=self.layout.scale_type, packed=self.matrix,
        )  # fmt: skip


def read(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """One such tensor, its parts checked against the sizes that they themselves imply."""
    name, parts = place.name, found_parts(checkpoint, place.name, PARTS)
    if ".widths" not in parts:
        return None
    where = f"{checkpoint.path}: packed tensor {name!r}"
    if len(parts) != len(PARTS) or parts[".widths"].dtype != "I64" or name in checkpoint.tensors:
        raise CoterieError(f"{where}: expected {', '.join(PARTS)}, the first I64, and none without them; {DAMAGED}")
    layout, checksums = _layout(where, checkpoint.read(f"{name}.widths"), parts[".scales"])
    for part, kind in layout.parts.items():
        if (parts[part].dtype, parts[part].shape) != kind:
            found = f"{parts[part].dtype} {list(parts[part].shape)}"
            raise CoterieError(f"{where}: {part} is {found}, should be {kind[0]} {list(kind[1])}; {DAMAGED}")
    return IntegerTensor(checkpoint, name, layout, checksums).coded()


def _layout(where: str, header: np.ndarray, scales: Tensor) -> tuple[Arrangement, tuple[int, ...]]:
    """The layout and the checksums. Raises: CoterieError for numbers that cannot be."""
    numbers = header.reshape(-1).tolist()
    columns, group, num_matrices, *rest = numbers if len(numbers) > 3 else [0, 0, 0]
    widths, checksums = tuple(rest[: len(rest) // 2]), tuple(rest[len(rest) // 2 :])
    rows = scales.shape[1] if len(scales.shape) == 3 else 0
    sized = 0 < columns < MAX_LENGTH and not columns % WORD and group > 0 and not columns % group
    counted = rest and len(widths) == len(checksums) == max(1, num_matrices) and num_matrices >= 0
    known = scales.dtype in SCALES and set(widths) <= set(WIDTHS) and all(0 <= n < 2**32 for n in checksums)
    if not (sized and counted and known and 0 < rows < MAX_LENGTH):
        said = f"{str(numbers)[:120]} beside scales {scales.dtype} {list(scales.shape)}"
        raise CoterieError(
            f"{where}: .widths is {said}; expected whole words in whole groups, and widths among "
            f"{', '.join(map(str, WIDTHS))} with their checksums; {DAMAGED}"
        )
    shape = (num_matrices, rows, columns) if num_matrices else (rows, columns)
    return Arrangement(shape, group, scales.dtype, widths), checksums


CODEC = Codec(parts=PARTS, read=read, method=METHOD, settings={**NOTICE, "format": FORMAT})
