"""Kernels for codes of 2, 3, 4 or 8 bits as LLVM IR: a row's dot product with 1 to 8 float32 vectors.

Jobs are those of `emit.py`, with codes as the values. `inputs.py` says what a chunk of codes is and how the input is
arranged for it: a kernel masks the codes of a chunk, makes floats of them and multiplies; the scales, one for every
group of columns, are multiplied with the sums of the lanes. It reads up to 64 bytes beyond a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from coterie.kernels.emit import F32, I8, I16, I32, I64, Emitter
from coterie.kernels.inputs import CODES, is_topmost, lanes_of, place

AHEAD = 4096  # bytes that codes are prefetched ahead


@dataclass(frozen=True)
class IntegerKernel:
    """What is compiled. scales: their dtype. tail: lanes of a row's last chunk if it is not full, else 0."""

    level: str
    bits: int
    group: int
    scales: str
    tail: int = 0
    batch: int = 1

    @property
    def columns(self) -> int:
        """Of a full chunk."""
        return CODES * lanes_of(self.level)

    @property
    def name(self) -> str:
        return f"int{self.bits}_{self.group}_{self.scales}_{self.level}_{self.tail}_{self.batch}"


class _Chunks(Emitter):
    """A kernel on rows of codes."""

    def __init__(self, kernel: IntegerKernel, name: str) -> None:
        super().__init__(name, lanes_of(kernel.level))
        self.kernel = kernel
        self.floats, self.integers = (ir.VectorType(kind, self.lanes) for kind in (F32, I32))
        self.scale = F32 if kernel.scales == "F32" else I16

    def weights(self, start: Any) -> list[Any]:
        """A chunk's codes k of every lane, as float32, times the power of two of their place."""
        bits, words, found = self.kernel.bits, self.words(start), []
        for k in range(CODES):
            number, low = place(bits, k)
            if is_topmost(bits, k):
                code = self.b.lshr(words[number], self.every(low))
            else:
                code = self.b.and_(words[number], self.every(((1 << bits) - 1) << low))
            found.append(self.b.sitofp(code, self.floats))
        return found

    def every(self, number: int) -> Any:
        return ir.Constant(self.integers, [number] * self.lanes)

    def words(self, start: Any) -> list[Any]:
        """What holds the codes of every lane: one word, or two of 8-bit codes."""
        bits = self.kernel.bits
        if bits == 2:
            return [self.b.zext(self.load(start, ir.VectorType(I16, self.lanes)), self.integers)]
        if bits == 3:
            return [self.threes(start)]
        if bits == 4:
            return [self.load(start, self.integers)]
        both = [self.load(self.at(start, 4 * self.lanes * i, I8), self.integers) for i in (0, 1)]
        return [self.picked(both[0], both[1], range(i, 2 * self.lanes, 2)) for i in (0, 1)]

    def threes(self, start: Any) -> Any:
        """3 bytes of the row in every lane, and above them whatever."""
        at_once = 4 * self.lanes if self.kernel.level == "avx512" else 16  # bytes that one instruction moves anywhere
        order = [min(3 * (i // 4) + i % 4, at_once - 1) for i in range(at_once)]
        parts = []
        for first in range(0, self.lanes, at_once // 4):
            source = self.load(self.at(start, 3 * first, I8), ir.VectorType(I8, at_once))
            parts.append(self.b.bitcast(self.picked(source, source, order), ir.VectorType(I32, at_once // 4)))
        while len(parts) > 1:
            parts = [self.picked(a, b, range(2 * a.type.count)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def picked(self, a: Any, b: Any, order: Sequence[int]) -> Any:
        """The elements of a and b with these numbers."""
        return self.b.shuffle_vector(a, b, ir.VectorType(I32, len(order))(list(order)))

    def factors(self, scales: Any, c: Any, lanes: int) -> Any:
        """The scale of every lane of chunk c, of which so many belong to the row, as float32."""
        group, columns = self.kernel.group, self.kernel.columns
        number = self.b.udiv(self.b.mul(c, I64(columns)), I64(group))
        count = max(1, CODES * lanes // group)
        stored = self.load(self.at(scales, number, self.scale), ir.VectorType(self.scale, count), 2)
        found = self.widened(stored)
        return self.picked(found, found, [min(CODES * j // group, count - 1) for j in range(self.lanes)])

    def widened(self, stored: Any) -> Any:
        """Stored scales as float32."""
        floats, integers = (ir.VectorType(kind, stored.type.count) for kind in (F32, I32))
        if self.kernel.scales == "F32":
            return stored
        if self.kernel.scales == "F16":
            return self.b.fpext(self.b.bitcast(stored, ir.VectorType(ir.HalfType(), stored.type.count)), floats)
        high = ir.Constant(integers, [16] * stored.type.count)
        return self.b.bitcast(self.b.shl(self.b.zext(stored, integers), high), floats)


def gemv(kernel: IntegerKernel, name: str) -> str:
    """y[b, r] = sum_c w[r, c] x[b, c] for rows first:last; x as `inputs.arranged` has it, y rows `stride` apart."""
    e = _Chunks(kernel, name)
    codes, scales, x, y, first, last, words, stride = e.fields(
        "values", "scales", "x", "y", "first", "last", "words", "stride"
    )
    columns = e.b.shl(words, I64(5))
    num_chunks, num_scales = e.b.udiv(columns, I64(kernel.columns)), e.b.udiv(columns, I64(kernel.group))
    num_inputs = e.b.add(num_chunks, I64(1 if kernel.tail else 0))
    length = e.b.mul(num_inputs, I64((1 + CODES) * e.lanes))
    xs = [e.at(x, e.b.mul(length, I64(i)), F32) for i in range(kernel.batch)]

    def row(r: Any, _: list[Any]) -> list[Any]:
        first_code = e.at(codes, e.b.mul(e.b.mul(r, words), I64(4 * kernel.bits)), I8)
        here = first_code, e.at(scales, e.b.mul(r, num_scales), e.scale)
        totals = e.loop(
            I64(0), num_chunks, 1, [e.zeros()] * kernel.batch, lambda c, sums: _added(e, here, xs, c, sums, e.lanes)
        )
        if kernel.tail:
            totals = _added(e, here, xs, num_chunks, totals, kernel.tail)
        for i, total in enumerate(totals):
            e.b.store(e.summed(total), e.at(y, e.b.add(e.b.mul(stride, I64(i)), r), F32), align=4)
        return []

    e.loop(first, last, 1, [], row)
    e.b.ret_void()
    return str(e.module)


def _added(e: _Chunks, row: tuple[Any, Any], xs: list[Any], c: Any, totals: list[Any], lanes: int) -> list[Any]:
    """totals plus the products of a row's chunk c, of which so many lanes belong to the row: its codes and scales."""
    codes, scales = row
    size = e.lanes * e.kernel.bits
    start = e.at(codes, e.b.mul(c, I64(size)), I8)
    for line in range(0, size, 64):
        e.prefetch(start, AHEAD + line)
    inputs = [e.at(x, e.b.mul(c, I64((1 + CODES) * e.lanes)), F32) for x in xs]
    sums = [e.load(x, e.floats) for x in inputs]
    for k, weights in enumerate(e.weights(start)):
        others = [e.load(e.at(x, (1 + k) * e.lanes, F32), e.floats) for x in inputs]
        sums = [e.multiplied(weights, x, s) for x, s in zip(others, sums, strict=True)]
    factors = e.factors(scales, c, lanes)
    return [e.multiplied(s, factors, total) for s, total in zip(sums, totals, strict=True)]
