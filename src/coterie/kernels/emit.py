"""The kernels as LLVM IR: a sparse row's dot product with 1 to 8 vectors, and its expansion.

Every function takes one job, a record of 64-bit fields (`JOB`): pointers into one packed matrix, the rows to do, and
where input and output are. Per 32 columns a kernel loads one word of the mask and as many values as it has bits,
spreads the values to their columns (`vpexpandw`, `vpexpandd`, or a byte shuffle by a table under AVX2) and multiplies.
It reads up to 64 bytes beyond a row's last value: buffers have slack (`memory.Arena`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir

from coterie.kernels.jobs import JOB

UNROLL = 4  # mask words per turn of the main loop: 128 columns, the group of int8 scales
AHEAD = 4096  # bytes that values are prefetched ahead; without it the kernels are 1.5 to 1.9 times slower
DENSE_AHEAD = 2048
MASK_AHEAD = 2048


class _BFloat(ir.types.Type):
    """llvmlite has no name for it."""

    def _to_string(self) -> str:
        return "bfloat"


I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F32, BF16, POINTER, VOID = ir.FloatType(), _BFloat(), ir.PointerType(), ir.VoidType()


@dataclass(frozen=True)
class Kernel:
    """What is compiled: `level` avx512 (with vbmi2, bf16), avx512f or avx2; `values` a stored dtype; `x` BF16 or F32.

    dense: the matrix has no mask and all its values, in rows of whole words.
    """

    level: str
    values: str
    x: str
    batch: int = 1
    dense: bool = False

    @property
    def size(self) -> int:
        """Bytes per value."""
        return {"I8": 1, "BF16": 2, "F16": 2, "F32": 4}[self.values]

    @property
    def lanes(self) -> int:
        """float32 lanes per vector."""
        return 8 if self.level == "avx2" else 16

    @property
    def pairs(self) -> bool:
        """Whether products are taken by `vdpbf16ps`: both sides bf16, sums in float32."""
        return self.x == "BF16"

    @property
    def width(self) -> int:
        """Columns that one expansion covers."""
        if self.level == "avx2":
            return 8
        return 32 if self.level == "avx512" and self.size < 4 else 16

    @property
    def name(self) -> str:
        return f"{'dense' if self.dense else 'sparse'}_{self.level}_{self.values}_{self.x}_{self.batch}"


class Emitter:
    """Builds one function `void name(job*)`, of vectors with so many float32 lanes."""

    def __init__(self, name: str, lanes: int) -> None:
        self.lanes = lanes
        self.module = ir.Module(name)
        self.function = ir.Function(self.module, ir.FunctionType(VOID, [POINTER]), name)
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))

    def call(self, name: str, result: Any, *arguments: Any, fastmath: Sequence[str] = ()) -> Any:
        found = self.module.globals.get(name)
        if found is None:
            found = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.b.call(found, arguments, fastmath=fastmath)

    def at(self, pointer: Any, index: Any, type_: Any) -> Any:
        index = I64(index) if isinstance(index, int) else index
        return self.b.gep(pointer, [index], source_etype=type_)

    def load(self, pointer: Any, type_: Any, align: int = 1) -> Any:
        return self.b.load(pointer, typ=type_, align=align)

    def fields(self, *names: str) -> list[Any]:
        """The job's fields, pointers as pointers."""
        whole = ("first", "last", "words", "stride")
        job = self.function.args[0]
        return [self.load(self.at(job, JOB.index(n), I64), I64 if n in whole else POINTER, 8) for n in names]

    def prefetch(self, pointer: Any, distance: int) -> None:
        target = self.at(pointer, distance, I8)
        self.call("llvm.prefetch.p0", VOID, target, I32(0), I32(3), I32(1))

    def loop(
        self, start: Any, stop: Any, step: int, carried: Sequence[Any], body: Callable[[Any, list[Any]], list[Any]]
    ) -> list[Any]:
        """for i = start; i < stop; i += step: carried = body(i, carried). Returns what is carried out."""
        before = self.b.block
        head, inside, after = (self.function.append_basic_block(n) for n in ("head", "body", "after"))
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(I64)
        index.add_incoming(start, before)
        kept = []
        for value in carried:
            kept.append(self.b.phi(value.type))
            kept[-1].add_incoming(value, before)
        self.b.cbranch(self.b.icmp_signed("<", index, stop), inside, after)
        self.b.position_at_end(inside)
        results = body(index, kept)
        index.add_incoming(self.b.add(index, I64(step)), self.b.block)
        for phi, result in zip(kept, results, strict=True):
            phi.add_incoming(result, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        return list(kept)

    def multiplied(self, a: Any, b: Any, total: Any) -> Any:
        """total + a * b of float32 lanes, rounded once."""
        return self.call(f"llvm.fma.v{self.lanes}f32", total.type, a, b, total)

    def every_lane(self, value: Any) -> Any:
        """A float32 in all lanes."""
        one = self.b.insert_element(ir.VectorType(F32, self.lanes)(ir.Undefined), value, I32(0))
        return self.b.shuffle_vector(one, one, ir.VectorType(I32, self.lanes)(None))

    def zeros(self) -> Any:
        return ir.VectorType(F32, self.lanes)(None)

    def summed(self, vector: Any) -> Any:
        """The sum over lanes, in an order that the width fixes."""
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f32"
        return self.call(name, F32, F32(0.0), vector, fastmath=("reassoc",))


class _Rows(Emitter):
    """A kernel on rows of packed or dense values."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        super().__init__(name, kernel.lanes)
        self.kernel = kernel
        self.bits = ir.IntType(8 * kernel.size)

    def text(self) -> str:
        """The module's IR. Loads of values to be expanded are marked volatile, or LLVM merges the two into the memory
        form of `vpexpandw`, which AMD processors run in microcode."""
        return re.sub(r"= load (<32 x i(?:8|16)>)", r"= load volatile \1", str(self.module))

    # --- expansion -----------------------------------------------------------------------------------------------

    def expanded(self, mask: Any, k: Any, values: Any) -> tuple[list[Any], Any]:
        """The 32 columns of mask word k as vectors of `width` bit patterns, and where the next word's values begin."""
        width, found = self.kernel.width, []
        if self.kernel.dense:
            vector = ir.VectorType(self.bits, width)
            found = [self.load(self.at(values, first, self.bits), vector) for first in range(0, 32, width)]
            return found, self.at(values, 32, self.bits)
        word, start = self.load(self.at(mask, k, I32), I32, 4), values
        for first in range(0, 32, width):
            bits = self.b.lshr(word, I32(first)) if first else word
            found.append(self.spread(bits, start))
            below = word if first + width == 32 else self.b.and_(word, I32(2 ** (first + width) - 1))
            count = self.call("llvm.ctpop.i32", I32, below)  # values of the columns so far
            start = self.at(values, self.b.zext(count, I64), self.bits)
        return found, start

    def row_start(self, offsets: Any, r: Any, length: Any) -> Any:
        """Where row r's values begin: from a table, or, of a dense matrix, after r whole rows."""
        if self.kernel.dense:
            return self.b.mul(r, length)
        return self.b.zext(self.load(self.at(offsets, r, I32), I32, 4), I64)

    def spread(self, bits: Any, values: Any) -> Any:
        """`width` columns: the next values where the low bits of `bits` are set, zero elsewhere."""
        if self.kernel.level == "avx2":
            return self.shuffled(bits, values)
        width = self.kernel.width
        mask = self.b.bitcast(bits if width == 32 else self.b.trunc(bits, I16), ir.VectorType(I1, width))
        packed = self.load(values, ir.VectorType(self.bits, width))
        lane = self.bits if width == 32 else I32
        if lane is not self.bits and self.kernel.size < 4:
            packed = self.b.zext(packed, ir.VectorType(I32, width))
        vector = ir.VectorType(lane, width)
        name = f"llvm.x86.avx512.mask.expand.v{width}i{lane.width}"
        found = self.call(name, vector, packed, vector(None), mask)
        return self.b.trunc(found, ir.VectorType(self.bits, width)) if lane is not self.bits else found

    def shuffled(self, bits: Any, values: Any) -> Any:
        """8 columns by a table of 256 shuffles, one per byte of the mask."""
        size = self.kernel.size
        byte = self.b.zext(self.b.and_(bits, I32(255)), I64)
        packed = self.load(values, ir.VectorType(self.bits, 8))
        if size == 4:
            order = self.load(self.at(self.table(), byte, ir.VectorType(I8, 8)), ir.VectorType(I8, 8))
            index = self.b.sext(order, ir.VectorType(I32, 8))
            moved = self.call("llvm.x86.avx2.permd", packed.type, packed, index)
            empty = self.b.icmp_signed("<", index, index.type(None))
            return self.b.select(empty, packed.type(None), moved)
        wide, entry = ir.VectorType(I8, 16), ir.VectorType(I8, 8 * size)
        order = self.load(self.at(self.table(), byte, entry), entry)
        if size == 1:
            packed, order = self.doubled(packed), self.doubled(order)
        moved = self.call("llvm.x86.ssse3.pshuf.b.128", wide, self.b.bitcast(packed, wide), order)
        if size == 1:
            return self.b.shuffle_vector(moved, moved, ir.VectorType(I32, 8)(list(range(8))))
        return self.b.bitcast(moved, ir.VectorType(self.bits, 8))

    def doubled(self, vector: Any) -> Any:
        """8 bytes in a register of 16."""
        return self.b.shuffle_vector(vector, vector, ir.VectorType(I32, 16)(list(range(16))))

    def table(self) -> Any:
        """For every byte of a mask, where each of 8 columns takes its value from: byte positions (for 4-byte values,
        value positions), 0x80 where the column is empty."""
        if "shuffles" in self.module.globals:
            return self.module.globals["shuffles"]
        size = self.kernel.size
        table = np.full((256, 8, size if size < 4 else 1), 0x80, np.uint8)
        for byte in range(256):
            columns = [c for c in range(8) if byte >> c & 1]
            for place, column in enumerate(columns):
                table[byte, column] = place if size == 4 else size * place + np.arange(size)
        kind = ir.ArrayType(I8, table.size)
        found = ir.GlobalVariable(self.module, kind, "shuffles")
        found.initializer, found.global_constant, found.linkage = kind(bytearray(table.tobytes())), True, "internal"
        found.align = 64
        return found

    def widened(self, bits: Any) -> list[Any]:
        """Bit patterns as float32 vectors of `lanes` (or, for `vdpbf16ps`, as they are)."""
        if self.kernel.pairs:
            return [self.b.bitcast(bits, ir.VectorType(BF16, 32))]
        lanes = self.kernel.lanes
        if self.kernel.width == lanes:
            return [self.as_float(bits)]
        orders = [ir.VectorType(I32, lanes)(list(range(i, i + lanes))) for i in range(0, self.kernel.width, lanes)]
        return [self.as_float(self.b.shuffle_vector(bits, bits, order)) for order in orders]

    def as_float(self, bits: Any) -> Any:
        floats, integers = ir.VectorType(F32, self.kernel.lanes), ir.VectorType(I32, self.kernel.lanes)
        if self.kernel.values == "I8":
            return self.b.sitofp(bits, floats)
        if self.kernel.values == "F16":
            return self.b.fpext(self.b.bitcast(bits, ir.VectorType(ir.HalfType(), self.kernel.lanes)), floats)
        if self.kernel.values == "BF16":
            high = ir.Constant(integers, [16] * self.kernel.lanes)
            return self.b.bitcast(self.b.shl(self.b.zext(bits, integers), high), floats)
        return self.b.bitcast(bits, floats)

    # --- products ------------------------------------------------------------------------------------------------

    def product(self, total: Any, weights: Any, x: Any, column: Any) -> Any:
        """total + weights * x[column:], lane by lane."""
        if self.kernel.pairs:
            other = self.load(self.at(x, column, I16), weights.type)
            return self.call("llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, weights, other)
        return self.multiplied(weights, self.load(self.at(x, column, F32), weights.type), total)

    def word(self, mask: Any, k: Any, values: Any, totals: list[Any], xs: list[Any], turn: int) -> tuple[Any, list]:
        """Adds the products of one mask word's 32 columns. With a batch of one, sums take turns over `UNROLL`
        accumulators, so that no product waits for the one before it."""
        batch, totals = self.kernel.batch, list(totals)
        spread, after = self.expanded(mask, k, values)
        column = self.b.shl(k, I64(5))
        offset, turns = 0, len(totals) // batch
        for bits in spread:
            for weights in self.widened(bits):
                place = self.b.add(column, I64(offset))
                for i, x in enumerate(xs):
                    slot = i * turns + turn % turns
                    totals[slot] = self.product(totals[slot], weights, x, place)
                offset, turn = offset + (32 if self.kernel.pairs else self.kernel.lanes), turn + 1
        return after, totals


def gemv(kernel: Kernel, name: str) -> str:
    """y[b, r] = sum_c w[r, c] x[b, c] for rows first:last; x (batch, 32 words) in a row, y rows `stride` apart."""
    e = _Rows(kernel, name)
    mask, values, offsets, x, y, first, last, words, stride = e.fields(
        "mask", "values", "offsets", "x", "y", "first", "last", "words", "stride"
    )
    scales = e.fields("scales")[0] if kernel.values == "I8" else None
    length = e.b.shl(words, I64(5))
    xs = [e.at(x, e.b.mul(length, I64(i)), I16 if kernel.pairs else F32) for i in range(kernel.batch)]
    whole = e.b.and_(words, I64(-UNROLL))
    groups = e.b.lshr(e.b.add(words, I64(UNROLL - 1)), I64(2))
    turns = max(1, 4 // kernel.batch)

    def row(r: Any, _: list[Any]) -> list[Any]:
        here = e.at(mask, e.b.mul(r, words), I32)
        start = e.at(values, e.row_start(offsets, r, length), e.bits)
        factors = e.at(scales, e.b.mul(r, groups), F32) if scales is not None else None
        totals = [e.zeros()] * (kernel.batch * turns)
        turn = _turn(e, here, xs, factors)
        found = e.loop(I64(0), whole, UNROLL, [start, *totals], lambda k, kept: turn(k, kept, UNROLL))
        found = e.loop(whole, words, 1, found, lambda k, kept: turn(k, kept, 1))
        for i in range(kernel.batch):
            total, *others = found[1 + i * turns : 1 + (i + 1) * turns]
            for other in others:
                total = e.b.fadd(total, other)
            e.b.store(e.summed(total), e.at(y, e.b.add(e.b.mul(stride, I64(i)), r), F32), align=4)
        return []

    e.loop(first, last, 1, [], row)
    e.b.ret_void()
    return e.text()


def _turn(e: _Rows, mask: Any, xs: list[Any], factors: Any) -> Callable[[Any, list[Any], int], list[Any]]:
    """One turn of a row's loop: `count` mask words. int8 sums each group apart and scales it once."""
    lines = max(1, e.kernel.size // 2)  # of 64 bytes that a word's values fill, at most

    def turn(k: Any, kept: list[Any], count: int) -> list[Any]:
        values, totals = kept[0], list(kept[1:])
        for line in range(count * lines if count > 1 else 0):
            e.prefetch(values, (DENSE_AHEAD if e.kernel.dense else AHEAD) + 64 * line)
        if count > 1 and not e.kernel.dense:
            e.prefetch(e.at(mask, k, I32), MASK_AHEAD)
        sums = totals if factors is None else [e.zeros()] * len(totals)
        per_word = 1 if e.kernel.pairs else 32 // e.kernel.lanes
        for j in range(count):
            values, sums = e.word(mask, e.b.add(k, I64(j)), values, sums, xs, j * per_word)
        if factors is not None:
            scale = e.every_lane(e.load(e.at(factors, e.b.lshr(k, I64(2)), F32), F32, 4))
            sums = [e.multiplied(s, scale, t) for s, t in zip(sums, totals, strict=True)]
        return [values, *sums]

    return turn


def expand(kernel: Kernel, name: str) -> str:
    """y[r - first, :32 words] = the row's bit patterns, for rows first:last; y rows `stride` values apart."""
    e = _Rows(kernel, name)
    mask, values, offsets, y, first, last, words, stride = e.fields(
        "mask", "values", "offsets", "y", "first", "last", "words", "stride"
    )

    def row(r: Any, _: list[Any]) -> list[Any]:
        here = e.at(mask, e.b.mul(r, words), I32)
        start = e.at(values, e.row_start(offsets, r, words), e.bits)
        target = e.at(y, e.b.mul(e.b.sub(r, first), stride), e.bits)

        def word(k: Any, kept: list[Any]) -> list[Any]:
            e.prefetch(kept[0], AHEAD)
            spread, after = e.expanded(here, k, kept[0])
            for i, bits in enumerate(spread):
                column = e.b.add(e.b.shl(k, I64(5)), I64(i * kernel.width))
                e.b.store(bits, e.at(target, column, e.bits), align=1)
            return [after]

        e.loop(I64(0), words, 1, [start], word)
        return []

    e.loop(first, last, 1, [], row)
    e.b.ret_void()
    return e.text()


def runner(name: str) -> str:
    """void name(jobs*, count, counter*): takes jobs by number from a shared counter until none is left."""
    return f"""
define void @{name}(ptr %jobs, i64 %count, ptr %counter) {{
entry:
  br label %take
take:
  %number = atomicrmw add ptr %counter, i64 1 monotonic
  %more = icmp slt i64 %number, %count
  br i1 %more, label %do, label %done
do:
  %job = getelementptr [{len(JOB)} x i64], ptr %jobs, i64 %number
  %kernel = load ptr, ptr %job, align 8
  call void %kernel(ptr %job)
  br label %take
done:
  ret void
}}
"""
