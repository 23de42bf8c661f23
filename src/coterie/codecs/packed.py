"""A sparse checkpoint seen as the dense one it was packed from: same tensors, same bytes, decoded on demand.

Also the only reader of packed tensors: every part is checked against the others, and against its checksum, before
anything is decoded or multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from coterie.codecs.bits import (
    CODES,
    DAMAGED,
    GROUP,
    MAX_LENGTH,
    METHOD,
    PARTS,
    Packed,
    check,
    check_settings,
    decode,
    parts,
    row_type,
)
from coterie.errors import CoterieError
from coterie.storage.checkpoint import Checkpoint, Tensor

CLOSED = "is not open to other implementations of its experts"  # said of models that cannot be loaded packed


@dataclass(frozen=True, eq=False)
class Entry:
    """A packed tensor: its dense name, dtype and shape, and where its parts are. Matrices are read one at a time."""

    checkpoint: Checkpoint = field(repr=False)
    name: str
    dtype: str
    shape: tuple[int, ...]
    num_groups: int
    crcs: tuple[int, ...]

    @property
    def num_matrices(self) -> int:
        return len(self.crcs)

    @property
    def num_bytes(self) -> int:
        """Of all parts, as stored."""
        tensors = self.checkpoint.tensors
        return sum(tensors[n].num_bytes for n in map(self.part, PARTS) if n in tensors)

    def part(self, part: str) -> str:
        return f"{self.name}.{part}"

    @cached_property
    def rows(self) -> np.ndarray:
        """Kept values of every row, (E, O), checked to account for all values. Raises: CoterieError."""
        counts = self.checkpoint.read(self.part("rows"))
        num_rows = math.prod(self.shape[:-1])
        rows = counts[:num_rows].reshape(self.num_matrices, -1)
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
        return np.concatenate([[0], self.rows.sum(1, dtype=np.int64).cumsum()])

    def matrix(self, e: int = 0) -> Packed:
        """Matrix e, checked. Raises: CoterieError when its parts contradict each other or their checksum."""
        rows, columns = self.shape[-2:]
        first, last = (int(n) for n in self.starts[e : e + 2])
        codes = CODES[self.dtype]
        size = codes.itemsize
        values = np.frombuffer(self.checkpoint.raw(self.part("values"), first * size, (last - first) * size), codes)
        scales = self._slice("scales", e, "<f4").reshape(rows, -1) if self.num_groups else None
        mask = self._slice("mask", e, "<u4").reshape(rows, -1)
        counts = self.rows[e].astype(row_type(columns))
        packed = Packed(self.dtype, (rows, columns), mask, counts, values, scales)
        check(packed, self.crcs[e], f"{self.name}[{e}]" if len(self.shape) == 3 else self.name)
        return packed

    def _slice(self, part: str, e: int, dtype: str) -> np.ndarray:
        """The share of matrix e in a part that has equal shares."""
        name = self.part(part)
        size = self.checkpoint.tensors[name].num_bytes // self.num_matrices
        return np.frombuffer(self.checkpoint.raw(name, e * size, size), dtype)


def is_sparse(checkpoint: Checkpoint) -> bool:
    """Whether config.json says that tensors are packed by us."""
    found = checkpoint.config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def entries(checkpoint: Checkpoint) -> dict[str, Entry]:
    """The packed tensors of a sparse checkpoint by dense name, in file order.

    Raises: CoterieError for another format version, for parts that are missing, of the wrong dtype or shape, and for
    packed tensors in a checkpoint that does not say it has some.
    """
    check_settings(checkpoint.config.get("quantization_config"), f"{checkpoint.path / 'config.json'}")
    names = [n.removesuffix(".layout") for n in checkpoint.tensors if n.endswith(".layout")]
    found = {name: _entry(checkpoint, name) for name in names}
    for name in checkpoint.tensors:
        stem, _, part = name.rpartition(".")
        if part in PARTS and stem not in found:
            raise CoterieError(f"{checkpoint.path}: tensor {name!r} has no {stem + '.layout'!r} beside it; {DAMAGED}")
    return found


def _entry(checkpoint: Checkpoint, name: str) -> Entry:
    """One packed tensor, its parts checked against the shape that they themselves imply."""
    tensors = checkpoint.tensors
    layout, mask, values = (tensors.get(f"{name}.{part}") for part in ("layout", "mask", "values"))
    where = f"{checkpoint.path}: packed tensor {name!r}"
    if not layout or not mask or not values or values.dtype not in CODES or len(mask.shape) not in (2, 3):
        raise CoterieError(f"{where}: expected layout, mask (2 or 3 axes), rows and values; {DAMAGED}")
    num_matrices = mask.shape[0] if len(mask.shape) == 3 else 1
    if layout.dtype != "I64" or layout.shape != (2 + num_matrices,):
        raise CoterieError(f"{where}: layout is {layout.dtype} {layout.shape} for {num_matrices} matrices; {DAMAGED}")
    columns, group, *crcs = (int(n) for n in checkpoint.read(layout.name))
    num_groups = -(-columns // GROUP) if group else 0
    if not 0 < columns < MAX_LENGTH or group not in (0, GROUP) or min(crcs, default=0) < 0:
        raise CoterieError(
            f"{where}: {columns} columns in groups of {group}; expected groups of 0 or {GROUP}; {DAMAGED}"
        )
    shape = (*mask.shape[:-1], columns)
    if max(shape) >= MAX_LENGTH or bool(group) > (values.dtype == "I8"):
        raise CoterieError(f"{where}: shape {shape} of {values.dtype}; {DAMAGED}")
    for part in parts(name, values.dtype, shape, 0, num_groups)[:-1]:
        found = tensors.get(part.name)
        if found is None or (found.dtype, found.shape) != (part.dtype, part.shape):
            raise CoterieError(f"{where}: {part.name!r} should be {part.dtype} {part.shape}; {DAMAGED}")
    if (f"{name}.scales" in tensors) != bool(group) or name in tensors or len(values.shape) != 1:
        raise CoterieError(f"{where}: stored twice, or with parts that do not belong to it; {DAMAGED}")
    return Entry(checkpoint, name, values.dtype, shape, num_groups, tuple(crcs))


@dataclass(frozen=True)
class DenseView(Checkpoint):
    """A sparse checkpoint with the tensors of the dense one: `raw` decodes what is packed, one matrix at a time."""

    source: Checkpoint = field(kw_only=True)
    packed: dict[str, Entry] = field(kw_only=True, repr=False)
    latest: dict[tuple[str, int], bytes] = field(default_factory=dict, kw_only=True, repr=False)  # decoded, one at most

    @property
    def rounded(self) -> set[str]:
        """Tensors that were packed as int8: they have no dense original."""
        return {name for name, entry in self.packed.items() if entry.num_groups}

    def check(self, on_progress: Callable[[str, int, int], None]) -> None:
        """Reads every packed matrix once. Raises: CoterieError for one whose parts or checksum do not agree."""
        for done, entry in enumerate(self.packed.values()):
            for e in range(entry.num_matrices):
                entry.matrix(e)
            on_progress("checking packed tensors", done + 1, len(self.packed))

    def raw(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        entry = self.packed.get(name)
        if entry is None:
            return self.source.raw(name, start, length)
        if entry.num_groups:
            raise CoterieError(f"{self.path}: {name!r} holds int8 values with scales: there is no dense original")
        length = self.tensors[name].num_bytes - start if length is None else length
        if length == 0:
            return b""
        size = self.tensors[name].num_bytes // entry.num_matrices
        first, last = start // size, (start + length - 1) // size
        whole = b"".join(self._decoded(entry, e) for e in range(first, last + 1))
        return whole[start - first * size :][:length]

    def _decoded(self, entry: Entry, e: int) -> bytes:
        """A matrix's dense bytes, kept until the next one is asked for: readers come piece by piece."""
        key = (entry.name, e)
        if key not in self.latest:
            self.latest.clear()
            self.latest[key] = decode(entry.matrix(e))
        return self.latest[key]


def dense_view(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself if it is dense, else the dense one it stands for: its tensors in their order, its config.

    Raises: CoterieError for a damaged sparse checkpoint; reading I8 values that have scales, too: they have no dense
    original.
    """
    if not is_sparse(checkpoint):
        return checkpoint
    packed = entries(checkpoint)
    tensors = {t.name: t for t in _dense_tensors(checkpoint, packed)}
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return DenseView(
        checkpoint.path, config, checkpoint.shards, tensors, checkpoint.metadata, checkpoint.indexed,
        source=checkpoint, packed=packed,
    )  # fmt: skip


def _dense_tensors(checkpoint: Checkpoint, packed: dict[str, Entry]) -> Iterator[Tensor]:
    """The tensors of the dense checkpoint; each packed one stands where its layout stands."""
    for tensor in checkpoint.tensors.values():
        stem, _, part = tensor.name.rpartition(".")
        if stem not in packed or part not in PARTS:
            yield tensor
        elif part == "layout":
            entry = packed[stem]
            size = math.prod(entry.shape) * CODES[entry.dtype].itemsize
            yield Tensor(stem, entry.dtype, entry.shape, tensor.file, 0, size)
