"""Packed matrices in memory, where the kernels read them, and what they multiply.

A `Stack` holds the matrices of one role over a layer's experts (or the one of a linear layer) in one mapping of huge
pages: zeros as bits, or integers (`integers.py`), of as many bits as each has. A matrix that is hardly sparse is held
dense there: below break-even the dense kernel is faster.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from coterie.codecs import Codes
from coterie.codecs.bits import CODES, GROUP, Packed, decode, encode, row_type, words
from coterie.kernels import run as kernels
from coterie.kernels.inputs import Inputs, Order
from coterie.kernels.integers import IntegerMatrix
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

    def kernel(self, variant: kernels.Variant, batch: int) -> int:
        """The address of the code that multiplies so many vectors."""
        return kernels.gemv(variant.level, self.dtype, self.order(variant).x, batch, self.mask is None)

    def order(self, variant: kernels.Variant) -> Order:
        """How that wants its inputs."""
        return Order(kernels.input_type(variant.level, self.dtype, variant.bf16))

    def pointers(self) -> list[int]:
        """mask, values, offsets, scales: the job's first addresses."""
        parts = (self.mask, self.values, self.offsets, self.scales)
        return [0 if part is None else part.ctypes.data for part in parts]


class Stack:
    """Matrices (O, I) of one role, of all experts."""

    def __init__(self, matrices: Sequence[Matrix | IntegerMatrix]) -> None:
        self.matrices = matrices
        self.shape = matrices[0].shape
        assert all(m.shape == self.shape for m in matrices)
        self.num_words = words(self.shape[1])
        self.num_bytes = sum(m.num_bytes for m in matrices)
        self.has_empty = not all(m.num_bytes for m in matrices)  # stored in no bits: no job writes their product
        self._jobs: dict[kernels.Variant, Prepared] = {}

    def __deepcopy__(self, _: Any) -> Stack:
        return self  # nothing changes it, and copies of arrays would be elsewhere than the addresses say

    def __reduce__(self) -> Any:
        return (load, ([m.packed() for m in self.matrices],))

    def jobs(
        self, variant: kernels.Variant, pairs: Pairs, inputs: Inputs, y: np.ndarray, stride: int, num_blocks: int
    ) -> np.ndarray:
        """Jobs (groups * blocks, fields): group g's expert times its vectors, into address y[g]."""
        prepared = self._prepared(variant)
        one = prepared.jobs[pairs.ids]
        one[:, X] = inputs.addresses(prepared.orders, prepared.order_of[pairs.ids], pairs.starts)
        one[:, Y], one[:, STRIDE] = y, stride
        if pairs.counts.max() > 1:
            one[:, KERNEL] = [self.matrices[e].kernel(variant, count) for e, _, count in pairs.each()]
        if self.has_empty:
            one = one[one[:, KERNEL] != 0]
        if num_blocks == 1:
            return one
        edges = np.linspace(0, self.shape[0], num_blocks + 1).astype(np.int64)
        many = np.repeat(one, num_blocks, 0)
        many[:, FIRST], many[:, LAST] = np.tile(edges[:-1], len(one)), np.tile(edges[1:], len(one))
        return many

    def most_tokens(self, variant: kernels.Variant) -> int:
        """Tokens of one expert up to which kernels are the fastest way."""
        return min(kernels.most_tokens(variant.level, order) for order in self._prepared(variant).orders)

    def _prepared(self, variant: kernels.Variant) -> Prepared:
        """Jobs for one vector each, but for where input and output are: made once, copied at each call.

        While decoding, weights stream through the caches and leave the interpreter cold, so every operation counts.
        """
        if variant not in self._jobs:
            found = np.zeros((len(self.matrices), len(JOB)), np.int64)
            for job, matrix in zip(found, self.matrices, strict=True):
                job[:X] = [matrix.kernel(variant, 1), *matrix.pointers()]
            found[:, LAST], found[:, WORDS] = self.shape[0], self.num_words
            each = [matrix.order(variant) for matrix in self.matrices]
            orders = tuple(dict.fromkeys(each))
            self._jobs[variant] = Prepared(found, orders, np.array([orders.index(order) for order in each]))
        return self._jobs[variant]


class Prepared(NamedTuple):
    """Of a stack's matrices: jobs (E, fields), in which orders they want their inputs, and which of them each does."""

    jobs: np.ndarray
    orders: tuple[Order, ...]
    order_of: np.ndarray


def load(matrices: Iterable[Packed | Codes], arena: Arena | None = None) -> Stack:
    """A stack of packed matrices, which must have been checked, one in memory at a time beside the arena."""
    arena = arena or Arena()
    return Stack([place(packed, arena) for packed in matrices])


def place(packed: Packed | Codes, arena: Arena) -> Matrix | IntegerMatrix:
    """A checked matrix, copied into the arena: zeros as bits with their row offsets, or dense where that is better."""
    if isinstance(packed, Codes):
        codes = arena.put(packed.codes) if packed.bits else packed.codes
        factors = arena.put(packed.scales) if packed.bits else packed.scales
        return IntegerMatrix(packed.bits, packed.shape, codes, factors, packed.scale_type)
    scales = None if packed.scales is None else arena.put(packed.scales)
    num_bytes = math.prod(packed.shape) * CODES[packed.dtype].itemsize
    if packed.num_bytes > BREAK_EVEN * num_bytes or len(packed.values) >= 2**32:
        dense = np.zeros((packed.shape[0], 32 * words(packed.shape[1])), CODES[packed.dtype])
        dense[:, : packed.shape[1]] = np.frombuffer(decode(packed), dense.dtype).reshape(packed.shape)
        return Matrix(packed.dtype, packed.shape, arena.put(dense), None, None, scales)
    offsets = packed.rows.astype(np.int64).cumsum() - packed.rows
    mask, places = arena.put(packed.mask), arena.put(offsets.astype(np.uint32))
    return Matrix(packed.dtype, packed.shape, arena.put(packed.values), mask, places, scales)
