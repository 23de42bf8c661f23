"""Packed matrices in memory, where the kernels read them, and what they multiply.

A `Stack` holds the matrices of one role over a layer's experts (or the one of a linear layer) in one mapping of huge
pages. A matrix that is hardly sparse is held dense there: below break-even the dense kernel is faster.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coterie.codecs.bits import CODES, GROUP, Packed, decode, encode, row_type, words
from coterie.kernels import run as kernels
from coterie.kernels.jobs import JOB, Pairs

PAGE = 2 << 20  # bytes of a huge page
CHUNK = 64 << 20  # bytes mapped at once
LINE = 64
BREAK_EVEN = 0.93  # packed bytes over dense ones, above which a matrix is held dense
TILE = 4 << 20  # bytes of a matrix that are expanded at a time: each costs a call of torch
KERNEL, X, Y, FIRST, LAST, WORDS, STRIDE = map(JOB.index, ("kernel", "x", "y", "first", "last", "words", "stride"))
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I8": torch.int8}


class Arena:
    """Anonymous mappings, on huge pages where the system has them: reading is up to a fifth faster."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)
        self._used = 0

    def put(self, array: np.ndarray) -> np.ndarray:
        """A copy of the array in here, at the beginning of a cache line, with slack behind it."""
        num_bytes = array.nbytes + kernels.SLACK
        if self._used + num_bytes > len(self._bytes):  # pages of a mapping that are never written take no memory
            mapped = mmap.mmap(-1, max(CHUNK, -(-num_bytes // PAGE) * PAGE))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                mapped.madvise(mmap.MADV_HUGEPAGE)
            self._bytes, self._used = np.frombuffer(mapped, np.uint8), 0
        place = self._bytes[self._used : self._used + array.nbytes].view(array.dtype).reshape(array.shape)
        place[...] = array
        self._used += -(-array.nbytes // LINE) * LINE
        return place


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix where the kernels read it. `mask` and `offsets` are None if it is held dense, (O, 32 W) values."""

    dtype: str
    shape: tuple[int, int]
    values: np.ndarray
    mask: np.ndarray | None
    offsets: np.ndarray | None
    scales: np.ndarray | None

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes for a in (self.values, self.mask, self.offsets, self.scales) if a is not None)

    def packed(self) -> Packed:
        """The matrix as the format stores it."""
        columns = self.shape[1]
        if self.mask is None or self.offsets is None:
            return encode(np.ascontiguousarray(self.values[:, :columns]), self.dtype, self.shape, self.scales)
        rows = np.diff(self.offsets.astype(np.int64), append=len(self.values)).astype(row_type(columns))
        return Packed(self.dtype, self.shape, self.mask, rows, self.values, self.scales)

    def rows(self, first: int, last: int, dtype: torch.dtype, device: Any = "cpu") -> torch.Tensor:
        """Rows first:last, expanded, (last - first, I)."""
        which = kernels.level()
        if self.mask is None:
            bits = torch.from_numpy(self.values[first:last]).view(TORCH[self.dtype]).to(device)
        elif which == "torch" or torch.device(device).type != "cpu":
            bits = self._scattered(first, last, device)
        else:
            bits = self._expanded(first, last, which)
        found = bits[:, : self.shape[1]].to(dtype)
        if self.scales is not None:
            scales = torch.from_numpy(self.scales[first:last]).to(device=device, dtype=dtype)
            found = found * scales.repeat_interleave(GROUP, 1)[:, : self.shape[1]]
        return found

    def _expanded(self, first: int, last: int, which: str) -> torch.Tensor:
        """The bit patterns of rows, expanded by the kernel in about the time that reading takes."""
        num_words = words(self.shape[1])
        out = np.empty((last - first, 32 * num_words), CODES[self.dtype])
        assert self.mask is not None and self.offsets is not None
        rows = [first, last, num_words, out.shape[1]]
        job = [kernels.expand(which, self.dtype), *self.pointers(), 0, out.ctypes.data, *rows]
        kernels.run(which, np.array([job], np.int64))
        return torch.from_numpy(out).view(TORCH[self.dtype])

    def _scattered(self, first: int, last: int, device: Any) -> torch.Tensor:
        """The bit patterns of rows, expanded by torch operations: only the packed bytes travel to the device."""
        assert self.mask is not None and self.offsets is not None
        end = self.offsets[last] if last < len(self.offsets) else len(self.values)
        values = torch.from_numpy(self.values[int(self.offsets[first]) : int(end)]).view(TORCH[self.dtype]).to(device)
        mask = torch.from_numpy(self.mask[first:last].view(np.uint8)).to(device)
        bits = (mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
        kept = bits.view(last - first, -1).bool()
        return torch.zeros(kept.shape, dtype=values.dtype, device=device).masked_scatter_(kept, values)

    def pointers(self) -> list[int]:
        """mask, values, offsets, scales: the job's first addresses."""
        parts = (self.mask, self.values, self.offsets, self.scales)
        return [0 if part is None else part.ctypes.data for part in parts]


class Stack:
    """Equal matrices (O, I) of one role, of all experts."""

    def __init__(self, matrices: list[Matrix]) -> None:
        self.matrices = matrices
        self.dtype, self.shape = matrices[0].dtype, matrices[0].shape
        assert all((m.dtype, m.shape) == (self.dtype, self.shape) for m in matrices)
        self.num_words = words(self.shape[1])
        self.num_bytes = sum(m.num_bytes for m in matrices)
        self._jobs: dict[kernels.Variant, np.ndarray] = {}

    def __deepcopy__(self, _: Any) -> Stack:
        return self  # nothing changes it, and copies of arrays would be elsewhere than the addresses say

    def __reduce__(self) -> Any:
        return (load, ([m.packed() for m in self.matrices],))

    def jobs(
        self, variant: kernels.Variant, pairs: Pairs, x: np.ndarray, y: np.ndarray, stride: int, num_blocks: int
    ) -> np.ndarray:
        """Jobs (groups * blocks, fields): group g's expert times its vectors at address x[g], into y[g]."""
        one = self._prepared(variant)[pairs.ids]
        one[:, X], one[:, Y], one[:, STRIDE] = x, y, stride
        if pairs.counts.max() > 1:
            one[:, KERNEL] = [self._kernel(variant, e, count) for e, _, count in pairs.each()]
        if num_blocks == 1:
            return one
        edges = np.linspace(0, self.shape[0], num_blocks + 1).astype(np.int64)
        many = np.repeat(one, num_blocks, 0)
        many[:, FIRST], many[:, LAST] = np.tile(edges[:-1], len(one)), np.tile(edges[1:], len(one))
        return many

    def _prepared(self, variant: kernels.Variant) -> np.ndarray:
        """Jobs (E, fields) for one vector each, but for where input and output are: made once, copied at each call.

        While decoding, weights stream through the caches and leave the interpreter cold, so every operation counts.
        """
        if variant not in self._jobs:
            found = np.zeros((len(self.matrices), len(JOB)), np.int64)
            for e, (job, matrix) in enumerate(zip(found, self.matrices, strict=True)):
                job[:X] = [self._kernel(variant, e, 1), *matrix.pointers()]
            found[:, LAST], found[:, WORDS] = self.shape[0], self.num_words
            self._jobs[variant] = found
        return self._jobs[variant]

    def _kernel(self, variant: kernels.Variant, e: int, batch: int) -> int:
        return kernels.gemv(variant.level, self.dtype, variant.x, batch, self.matrices[e].mask is None)


def load(matrices: Iterable[Packed], arena: Arena | None = None) -> Stack:
    """A stack of packed matrices, which must have been checked, one in memory at a time beside the arena."""
    arena = arena or Arena()
    return Stack([place(packed, arena) for packed in matrices])


def place(packed: Packed, arena: Arena) -> Matrix:
    """A checked matrix, copied into the arena with its row offsets, or dense where that is better."""
    scales = None if packed.scales is None else arena.put(packed.scales)
    num_bytes = math.prod(packed.shape) * CODES[packed.dtype].itemsize
    if packed.num_bytes > BREAK_EVEN * num_bytes or len(packed.values) >= 2**32:
        dense = np.zeros((packed.shape[0], 32 * words(packed.shape[1])), CODES[packed.dtype])
        dense[:, : packed.shape[1]] = np.frombuffer(decode(packed), dense.dtype).reshape(packed.shape)
        return Matrix(packed.dtype, packed.shape, arena.put(dense), None, None, scales)
    offsets = packed.rows.astype(np.int64).cumsum() - packed.rows
    mask, places = arena.put(packed.mask), arena.put(offsets.astype(np.uint32))
    return Matrix(packed.dtype, packed.shape, arena.put(packed.values), mask, places, scales)
