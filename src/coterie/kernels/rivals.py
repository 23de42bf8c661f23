"""What sparse kernels are measured against: reading alone, and dense int4.

Only `coterie bench` and the benchmarks run these. The dense bf16 kernel is `kernels.gemv(..., dense=True)`, which
also serves matrices below break-even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from coterie.codecs.bits import GROUP
from coterie.kernels.emit import DENSE_AHEAD, F32, I8, I16, I32, I64, Emitter

LINE = ir.VectorType(I64, 8)


def reader(name: str) -> str:
    """Reads `stride` bytes (a multiple of 256) from `values` and does nothing with them."""
    e = Emitter(name, 16)
    values, y, stride = e.fields("values", "y", "stride")

    def lines(i: Any, kept: list[Any]) -> list[Any]:
        e.prefetch(e.at(values, i, I8), DENSE_AHEAD)
        places = [e.at(values, e.b.add(i, I64(64 * j)), I8) for j in range(4)]
        return [e.b.or_(k, e.load(p, LINE)) for k, p in zip(kept, places, strict=True)]

    a, b, c, d = e.loop(I64(0), stride, 256, [LINE(None)] * 4, lines)
    e.b.store(e.b.or_(e.b.or_(a, b), e.b.or_(c, d)), y, align=1)
    e.b.ret_void()
    return str(e.module)


def int4(name: str) -> str:
    """Dense int4, weights (O, I / 2) bytes with float32 scales per group, inputs as int8 per group:

    y[r] = sum_g s[r, g] t[g] (sum_c u[r, c] q[c] - 8 sum_c q[c]), weights u 0..15 standing for -8..7.

    Fields: `mask` holds t (G,) float32, `offsets` a start (G, 16) int32 of the group's sum, `x` the inputs q (I,) int8.
    A group's 64 bytes hold its columns 0..63 in the low halves and 64..127 in the high ones.
    """
    e = Emitter(name, 16)
    fields = e.fields("mask", "values", "offsets", "scales", "x", "y", "first", "last", "words")
    factors, values, begin, scales, x, y, first, last, words = fields
    groups = e.b.lshr(words, I64(2))
    bytes64, ints, floats = ir.VectorType(I8, 64), ir.VectorType(I32, 16), ir.VectorType(F32, 16)
    low, halves = ir.Constant(bytes64, [15] * 64), ir.VectorType(I16, 32)

    def row(r: Any, _: list[Any]) -> list[Any]:
        here = e.at(values, e.b.mul(e.b.mul(r, groups), I64(64)), I8)
        own = e.at(scales, e.b.mul(r, groups), F32)

        def group(g: Any, kept: list[Any]) -> list[Any]:
            place = e.at(here, e.b.shl(g, I64(6)), I8)
            e.prefetch(place, DENSE_AHEAD)
            both = e.load(place, bytes64)
            above = e.b.lshr(e.b.bitcast(both, halves), ir.Constant(halves, [4] * 32))
            columns = e.at(x, e.b.shl(g, I64(7)), I8)
            total = e.load(e.at(begin, e.b.shl(g, I64(4)), I32), ints)
            for part, offset in ((both, 0), (e.b.bitcast(above, bytes64), 64)):
                q = e.load(e.at(columns, offset, I8), bytes64)
                total = e.call("llvm.x86.avx512.vpdpbusd.512", ints, total, e.b.and_(part, low), q)
            scale = e.b.fmul(e.load(e.at(own, g, F32), F32, 4), e.load(e.at(factors, g, F32), F32, 4))
            return [e.multiplied(e.b.sitofp(total, floats), e.every_lane(scale), kept[0])]

        found = e.loop(I64(0), groups, 1, [e.zeros()], group)
        e.b.store(e.summed(found[0]), e.at(y, r, F32), align=4)
        return []

    e.loop(first, last, 1, [], row)
    e.b.ret_void()
    return str(e.module)


def quantise_int4(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(packed (O, I / 2) uint8, scales (O, G) float32) of float32 weights whose columns fill whole groups."""
    grouped = weights.reshape(len(weights), -1, GROUP)
    scales = np.maximum(np.abs(grouped).max(-1) / 7, 1e-30).astype(np.float32)
    codes = (np.clip(np.rint(grouped / scales[..., None]), -8, 7) + 8).astype(np.uint8)
    return (codes[..., :64] | (codes[..., 64:] << 4)).reshape(len(weights), -1), scales


def quantise_input(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q (I,) int8, t (G,) float32, start (G, 16) int32) of one float32 input: what `int4` wants of it."""
    grouped = x.reshape(-1, GROUP)
    factors = np.maximum(np.abs(grouped).max(-1) / 127, 1e-30).astype(np.float32)
    codes = np.rint(grouped / factors[:, None]).astype(np.int8)
    start = np.zeros((len(grouped), 16), np.int32)
    start[:, 0] = -8 * codes.sum(-1, dtype=np.int32)
    return codes.reshape(-1), factors, start
