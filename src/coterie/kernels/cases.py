"""What is measured of one matrix: sparse kernels, their rivals and reading alone, interleaved, single calls timed.

Every kernel walks a ring of copies larger than the caches, so that weights come from memory as they do while decoding.
With one thread a time is the thread's processor time, which on an idle machine is the time that passes, and on a busy
one leaves out what other processes took: without that, long calls, which are interrupted more often, would look slower
than they are. With more threads it is wall time. Only ratios of one run should be trusted.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from coterie.codecs.bits import CODES, GROUP, Packed, words
from coterie.kernels import rivals
from coterie.kernels import run as kernels
from coterie.kernels.memory import TORCH, Arena, load

RING = 320 << 20  # bytes of copies that a kernel walks through
MAX_COPIES = 4096
SHARE = 64 << 20  # bytes that a case reads per round, where its copies are large
QUANTILE = 0.2  # of single calls: what disturbed them is left out
Case = tuple[Callable[[int], object], int, int]  # (call with a copy's number, copies, bytes read)


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(threads: int) -> dict[str, object]:
    """What numbers are of: processor, its kernels, cores, threads, load, and torch."""
    return {
        "processor": processor(),
        "kernels": list(kernels.available()),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
    }


def clock() -> Callable[[], float]:
    """Processor time of this thread if torch uses one, else wall time."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def interleaved(cases: dict[str, Case], rounds: int) -> dict[str, float]:
    """Seconds of one call: the 20th percentile over rounds in which every case has its turns."""
    now = clock()
    times: dict[str, list[float]] = {name: [] for name in cases}
    position = dict.fromkeys(cases, 0)
    for turn in range(rounds + 1):
        for name, (call, copies, num_bytes) in cases.items():
            for _ in range(max(1, min(8, SHARE // num_bytes))):
                began = now()
                call(position[name] % copies)
                if turn:  # the first round compiles and touches pages
                    times[name].append(now() - began)
                position[name] += 1
    return {name: float(np.quantile(found, QUANTILE)) for name, found in times.items()}


def num_copies(num_bytes: int) -> int:
    return max(2, min(MAX_COPIES, RING // max(1, num_bytes)))


def dense_cases(bits: np.ndarray, dtype: str, x: torch.Tensor, threads: int) -> dict[str, Case]:
    """Reading alone, torch's ways and ours to multiply the dense matrix `bits` (O, I), and dense int4."""
    arena = Arena()
    copies = [arena.put(bits) for _ in range(num_copies(bits.nbytes))]
    held = [torch.from_numpy(c).view(TORCH[dtype]) for c in copies]
    x, label = x.to(TORCH[dtype]), dtype.lower()
    row = x[None]
    found = reading(copies, threads) | {
        f"torch F.linear {label}": (lambda i: F.linear(row, held[i]), len(held), bits.nbytes),
        f"torch.mv {label}": (lambda i: torch.mv(held[i], x), len(held), bits.nbytes),
    }
    found |= torch_int4(held[0], row)
    for which in levels():
        found |= own_dense(which, copies, dtype, x, threads)
    return found | (own_int4(held[0], x, arena, threads) if "avx512" in levels() else {})


def levels() -> list[str]:
    """The levels with kernels, best first."""
    return [level for level in kernels.available() if level != "torch"]


def reading(copies: list[np.ndarray], threads: int) -> dict[str, Case]:
    """Reading a copy and doing nothing with it: with AVX-512, where a kernel of ours does."""
    size = copies[0].nbytes // 256 * 256
    if "avx512" not in levels() or size == 0:
        return {}
    out = np.zeros(64 * 8 * threads, np.uint8)
    edges = np.linspace(0, size // 256, 1 + (1 if threads == 1 else 8 * threads)).astype(np.int64) * 256
    kernel, jobs = kernels.compiled("avx512", "read", rivals.reader), []
    for copy in copies:
        shares = [(copy.ctypes.data + a, b - a, out.ctypes.data + 64 * n) for n, (a, b) in enumerate(pairwise(edges))]
        jobs.append(np.array([[kernel, 0, at, 0, 0, 0, y, 0, 0, 0, n] for at, n, y in shares], np.int64))
    return {"read": runner("avx512", jobs, copies[0].nbytes, threads, (copies, out))}


def own_dense(which: str, copies: list[np.ndarray], dtype: str, x: torch.Tensor, threads: int) -> dict[str, Case]:
    """Our dense kernel of a level, where the columns fill the words that it reads."""
    rows, columns = copies[0].shape
    if columns % 32 or dtype not in CODES:
        return {}
    kind, vector = inputs(which, dtype, x)
    kernel, y = kernels.gemv(which, dtype, kind, 1, True), np.zeros(rows, np.float32)
    jobs = [split([kernel, 0, c.ctypes.data, 0, 0, vector.ctypes.data], y, columns, threads) for c in copies]
    return {f"own dense {dtype.lower()} {which}": runner(which, jobs, copies[0].nbytes, threads, (copies, vector, y))}


def sparse_case(name: str, which: str, packed: Packed, x: torch.Tensor, threads: int) -> dict[str, Case]:
    """The sparse kernel of a level on copies of a packed matrix."""
    size = packed.num_bytes + 4 * packed.shape[0] - packed.rows.nbytes
    stack = load((packed for _ in range(num_copies(size))), Arena())
    _, vector = inputs(which, packed.dtype, x)
    y, jobs = np.zeros(packed.shape[0], np.float32), []
    for matrix in stack.matrices:
        kernel = matrix.kernel(kernels.Variant(which, x.dtype == torch.bfloat16), 1)
        jobs.append(split([kernel, *matrix.pointers(), vector.ctypes.data], y, packed.shape[1], threads))
    return {name: runner(which, jobs, stack.matrices[0].num_bytes, threads, (stack, vector, y))}


def inputs(which: str, dtype: str, x: torch.Tensor) -> tuple[str, np.ndarray]:
    """(type, values): the vector as a level's kernel wants it, padded to whole words."""
    kind = kernels.input_type(which, dtype, x.dtype == torch.bfloat16)
    padded = F.pad(x.to(torch.bfloat16 if kind == "BF16" else torch.float32), (0, 32 * words(len(x)) - len(x)))
    return kind, Arena().put(padded.view(torch.int16 if kind == "BF16" else torch.int32).numpy())


def split(job: list[int], y: np.ndarray, columns: int, threads: int) -> np.ndarray:
    """The job over all rows, in as many blocks as `coterie.kernels.multiply` would make."""
    edges = np.linspace(0, len(y), 1 + (1 if threads == 1 else 8 * threads)).astype(np.int64)
    tail = [words(columns), len(y)]
    return np.array([[*job, y.ctypes.data, a, b, *tail] for a, b in pairwise(edges)], np.int64)


def runner(which: str, jobs: list[np.ndarray], size: int, threads: int, alive: object) -> Case:
    """A call per list of jobs; `alive` is what they hold addresses of."""
    return (lambda i, _=alive: kernels.run(which, jobs[i], threads)), len(jobs), size  # type: ignore[misc]


def torch_int4(weights: torch.Tensor, row: torch.Tensor) -> dict[str, Case]:
    """torch's int4 kernel on codes of no meaning, where this build has one and the shape suits it."""
    rows, columns = weights.shape
    if columns % GROUP or row.dtype != torch.bfloat16:
        return {}
    try:
        codes = torch.randint(0, 15, (rows, columns), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.rand(columns // GROUP, rows, 2).bfloat16()
        ring = [packed.clone() for _ in range(num_copies(packed.nbytes))]
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        multiply(row, ring[0], GROUP, scales)
    except (RuntimeError, AttributeError):
        return {}
    size = packed.nbytes + scales.nbytes
    return {"torch dense int4": (lambda i: multiply(row, ring[i], GROUP, scales), len(ring), size)}


def own_int4(weights: torch.Tensor, x: torch.Tensor, arena: Arena, threads: int) -> dict[str, Case]:
    """Our dense int4 kernel, its result checked against its own quantised weights first."""
    rows, columns = weights.shape
    if columns % GROUP:
        return {}
    packed, scales = rivals.quantise_int4(weights.float().numpy())
    q, factors, start = (arena.put(a) for a in rivals.quantise_input(x.float().numpy()))
    ring = [(arena.put(packed), arena.put(scales)) for _ in range(num_copies(packed.nbytes))]
    kernel, y = kernels.compiled("avx512", "int4", rivals.int4), np.zeros(rows, np.float32)
    parts = ([a.ctypes.data for a in (factors, values, start, scale, q)] for values, scale in ring)
    jobs = [split([kernel, *addresses], y, columns, threads) for addresses in parts]
    kernels.run("avx512", jobs[0])
    codes = np.stack([packed.reshape(rows, -1, 64) & 15, packed.reshape(rows, -1, 64) >> 4], 2).astype(float) - 8
    exact = (codes.reshape(rows, -1, GROUP) * scales[..., None]).reshape(rows, -1)
    wanted = exact @ (q.reshape(-1, GROUP) * factors[:, None].astype(float)).reshape(-1)
    assert np.allclose(y, wanted, atol=1e-4 * max(1e-30, np.abs(wanted).max()))
    size = packed.nbytes + scales.nbytes // 2  # scales as bf16 would do
    return {"own dense int4": runner("avx512", jobs, size, threads, (ring, q, factors, start, y))}


def table(cases: dict[str, Case], seconds: dict[str, float], against: Iterable[str]) -> list[dict[str, object]]:
    """Per case: bytes, seconds, share of the bandwidth that reading alone has, and how often faster than each rival."""
    bandwidth = cases["read"][2] / seconds["read"] if "read" in cases else None
    return [
        {
            "name": name,
            "bytes": size,
            "seconds": seconds[name],
            "bandwidth_share": None if bandwidth is None else size / seconds[name] / bandwidth,
            "times_faster_than": {rival: seconds[rival] / seconds[name] for rival in against},
        }
        for name, (_, _, size) in cases.items()
    ]
