"""The sparse kernels against torch, the best dense kernel of our own, and dense int4: interleaved, single calls timed.

    python benchmarks/sparse_kernels.py [--threads N] [--shapes 768x2048,...] [--rounds N] [--only matrix,layer]

Every kernel walks a ring of copies larger than the caches, so that weights come from memory as they do while decoding.
A time is the 20th percentile of single calls, and ratios are of one run. With one thread it is the thread's processor
time, which on an idle machine is the time that passes, and on a busy one leaves out what other processes took: without
that, long calls, which are interrupted more often, would look slower than they are. With more threads it is wall time.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from coterie.sparse import kernels, rivals
from coterie.sparse.experts import SparseExperts, forward
from coterie.sparse.format import encode, words
from coterie.sparse.memory import Arena, load

RING = 320 << 20  # bytes of copies that a kernel walks through
SPARSITIES = (0.4, 0.5, 0.65)
Case = tuple[Callable[[int], None], int, int]  # (call with a copy's number, copies, bytes read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", default="768x2048,1408x2048,2048x768,14336x4096")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", default="matrix,layer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_average = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "?"
    print(f"{processor()}, {os.cpu_count()} cores, load {load_average}, torch {torch.__version__}, ", end="")
    print(f"kernels {', '.join(kernels.available())}, {options.threads} thread(s)\n")
    with torch.inference_mode():
        for shape in options.shapes.split(",") if "matrix" in options.only else ():
            rows, columns = map(int, shape.split("x"))
            print(matrix_table(rows, columns, options.rounds, options.threads))
        if "layer" in options.only:
            print(layer_table(options.rounds))


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def interleaved(cases: dict[str, Case], rounds: int) -> dict[str, float]:
    """Seconds of one call: the 20th percentile over rounds in which every case has its turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in cases}
    position = dict.fromkeys(cases, 0)
    for turn in range(rounds + 1):
        for name, (call, copies, num_bytes) in cases.items():
            for _ in range(max(1, min(8, (64 << 20) // num_bytes))):
                began = clock()
                call(position[name] % copies)
                if turn:  # the first round compiles and touches pages
                    times[name].append(clock() - began)
                position[name] += 1
    return {name: float(np.quantile(found, 0.2)) for name, found in times.items()}


# --- one expert matrix --------------------------------------------------------------------------------------------


def matrix_table(rows: int, columns: int, rounds: int, threads: int) -> str:
    """A Markdown table: bytes, time, share of read bandwidth, and ratios to each rival."""
    rng = np.random.default_rng(0)
    weights = torch.from_numpy((0.02 * rng.standard_normal((rows, columns))).astype(np.float32)).bfloat16()
    x = torch.from_numpy(rng.standard_normal(columns).astype(np.float32)).bfloat16()
    cases = torch_cases(weights, x) | own_cases(weights, x, rng, threads)
    seconds = interleaved(cases, rounds)
    dense = 2 * rows * columns
    bandwidth = cases["read"][2] / seconds["read"] if "read" in cases else float("nan")
    best = min((n for n in cases if "dense bf16" in n), key=lambda n: seconds[n])
    rivals_ = [best, "torch F.linear bf16", "torch.mv bf16", *(n for n in cases if n == "own dense int4")]
    title = f"### {rows} x {columns}, read bandwidth {bandwidth / 1e9:.1f} GB/s\n\n"
    head = f"| kernel | bytes | us | % of bandwidth | {' | '.join(f'vs {n}' for n in rivals_)} |\n"
    lines = [head, "|---" * (4 + len(rivals_)) + "|\n"]
    for name, (_, _, size) in cases.items():
        share = 100 * size / seconds[name] / bandwidth
        ratios = " | ".join(f"{seconds[rival] / seconds[name]:.2f}" for rival in rivals_)
        lines.append(f"| {name} | {size / dense:.3f} | {1e6 * seconds[name]:.0f} | {share:.0f} | {ratios} |\n")
    return title + "".join(lines)


def torch_cases(weights: torch.Tensor, x: torch.Tensor) -> dict[str, Case]:
    """torch's two ways to multiply a bf16 matrix, and its int4 kernel."""
    size = weights.nbytes
    arena = Arena()
    bits = weights.view(torch.int16).numpy()
    copies = [torch.from_numpy(arena.put(bits)).view(torch.bfloat16) for _ in range(max(2, RING // size))]
    row = x[None]
    found: dict[str, Case] = {
        "torch F.linear bf16": (lambda i: F.linear(row, copies[i]), len(copies), size),
        "torch.mv bf16": (lambda i: torch.mv(copies[i], x), len(copies), size),
    }
    rows, columns = weights.shape
    try:
        codes = torch.randint(0, 15, (rows, columns), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.rand(columns // 128, rows, 2).bfloat16()
        ring = [packed.clone() for _ in range(max(2, RING // packed.nbytes))]
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        multiply(row, ring[0], 128, scales)
        found["torch dense int4"] = (lambda i: multiply(row, ring[i], 128, scales), len(ring), packed.nbytes)
    except (RuntimeError, AttributeError):
        pass  # this build of torch has none
    return found


def own_cases(weights: torch.Tensor, x: torch.Tensor, rng: np.random.Generator, threads: int) -> dict[str, Case]:
    """Reading alone, our dense bf16 and int4 kernels, and the sparse ones at every level and sparsity."""
    levels, arena = [level for level in kernels.available() if level != "torch"], Arena()
    if not levels:
        return {}
    rows, columns = weights.shape
    best, bits = levels[0], weights.view(torch.int16).numpy().view(np.uint16)
    found: dict[str, Case] = {}
    copies = [arena.put(bits) for _ in range(max(2, RING // weights.nbytes))]
    if best == "avx512":
        out = np.zeros(64, np.uint8)
        blank = [0, 0, 0, 0, out.ctypes.data, 0, 0, 0, weights.nbytes // 256 * 256]
        reads = [np.array([[rivals.reader(), 0, c.ctypes.data, *blank[1:]]], np.int64) for c in copies]
        found["read"] = runner(best, reads, weights.nbytes, 1, (copies, out))
        found |= int4_case(weights, x, arena, threads)
    inputs = {"BF16": x.view(torch.int16).numpy(), "F32": x.float().numpy()}
    vectors = {kind: arena.put(values) for kind, values in inputs.items()}
    for level in levels:
        kind = kernels.input_type(level, "BF16", True)
        kernel = kernels.gemv(level, "BF16", kind, 1, True)
        jobs = [
            split([kernel, 0, c.ctypes.data, 0, 0, vectors[kind].ctypes.data], rows, columns, threads) for c in copies
        ]
        found[f"own dense bf16 {level}"] = runner(level, jobs, weights.nbytes, threads, (copies, vectors))
    for sparsity in SPARSITIES:
        pruned = np.where(rng.random(weights.shape) < sparsity, np.uint16(0), bits)
        packed = encode(np.ascontiguousarray(pruned), "BF16", (rows, columns))
        size = packed.mask.nbytes + packed.values.nbytes + 4 * rows
        ring = load((packed for _ in range(max(2, RING // size))), arena).matrices
        for level in levels:
            kind = kernels.input_type(level, "BF16", True)
            kernel, source = kernels.gemv(level, "BF16", kind, 1), vectors[kind].ctypes.data
            jobs = [split([kernel, *m.pointers(), source], rows, columns, threads) for m in ring]
            found[f"sparse {sparsity:.0%} {level}"] = runner(level, jobs, size, threads, (ring, vectors))
    return found


OUT = np.zeros(1 << 17, np.float32)


def split(job: list[int], rows: int, columns: int, threads: int) -> np.ndarray:
    """The job over all rows, in as many blocks as `coterie.sparse.experts` would make."""
    blocks = 1 if threads == 1 else 8 * threads
    edges = np.linspace(0, rows, blocks + 1).astype(np.int64)
    tail = [words(columns), rows]
    jobs = [[*job, OUT.ctypes.data, a, b, *tail] for a, b in pairwise(edges)]
    return np.array(jobs, np.int64)


def runner(level: str, jobs: list[np.ndarray], size: int, threads: int, alive: object) -> Case:
    """A call per list of jobs; `alive` is what they hold addresses of."""
    return (lambda i, _=alive: kernels.run(level, jobs[i], threads)), len(jobs), size


def int4_case(weights: torch.Tensor, x: torch.Tensor, arena: Arena, threads: int) -> dict[str, Case]:
    """Our dense int4 kernel, its result checked against its own quantised weights first."""
    rows, columns = weights.shape
    if columns % 128:
        return {}
    packed, scales = rivals.quantise_int4(weights.float().numpy())
    q, factors, start = (arena.put(a) for a in rivals.quantise_input(x.float().numpy()))
    ring = [(arena.put(packed), arena.put(scales)) for _ in range(max(2, RING // packed.nbytes))]
    alive = (ring, q, factors, start)
    addresses = [factors.ctypes.data, 0, start.ctypes.data, 0, q.ctypes.data]
    jobs = []
    for values, factor in ring:
        addresses[1], addresses[3] = values.ctypes.data, factor.ctypes.data
        jobs.append(split([rivals.int4(), *addresses], rows, columns, threads))
    kernels.run("avx512", jobs[0])
    codes = np.stack([packed.reshape(rows, -1, 64) & 15, packed.reshape(rows, -1, 64) >> 4], 2).astype(float) - 8
    exact = (codes.reshape(rows, -1, 128) * scales[..., None]).reshape(rows, -1)
    wanted = exact @ (q.reshape(-1, 128) * factors[:, None].astype(float)).reshape(-1)
    assert np.allclose(OUT[:rows], wanted, atol=1e-4 * np.abs(wanted).max())
    return {"own dense int4": runner("avx512", jobs, packed.nbytes + scales.nbytes // 2, threads, alive)}


# --- a whole MoE layer --------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """What an experts module of transformers offers its implementation: 64 SwiGLU experts, 2048 to 768 and back."""

    has_gate, has_bias, has_post_expert_norm = True, False, False
    is_concatenated, is_transposed, _is_expert_parallel = True, False, False
    num_experts, hidden, inner, top_k = 64, 2048, 768, 8

    def _apply_gate(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up


def layer_table(rounds: int) -> str:
    """Milliseconds of one layer for one token, experts chosen at random."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    rng, layer = np.random.default_rng(0), Layer()
    e, d, f = Layer.num_experts, Layer.hidden, Layer.inner
    arena = Arena()

    def draw(*shape: int) -> torch.Tensor:
        values = (0.02 * rng.standard_normal(shape, np.float32)).astype(np.float32)
        bits = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
        return torch.from_numpy(arena.put(bits)).view(torch.bfloat16)

    gate_up, down = draw(e, 2 * f, d), draw(e, d, f)
    layer.gate_up_proj, layer.down_proj = (torch.nn.Parameter(t, requires_grad=False) for t in (gate_up, down))
    x, weights = torch.randn(1, d).bfloat16(), torch.full((1, Layer.top_k), 1 / Layer.top_k)
    choices = [torch.from_numpy(rng.permutation(e)[None, : Layer.top_k]) for _ in range(64)]
    size = 2 * 3 * d * f * Layer.top_k
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    cases: dict[str, Case] = {
        "loop of F.linear": (lambda i: looped(layer, x[0], choices[i][0], linear), 64, size),
        "loop of torch.mv": (lambda i: looped(layer, x[0], choices[i][0], torch.mv), 64, size),
        "transformers grouped_mm": (lambda i: grouped(layer, x, choices[i], weights), 64, size),
    }
    for sparsity in SPARSITIES:
        sparse = Layer()
        sparse.coterie = packed_experts(gate_up, down, sparsity, rng, arena)  # type: ignore[assignment]
        share = sparse.coterie.num_bytes // e * Layer.top_k
        call = lambda i, sparse=sparse: forward(sparse, x, choices[i], weights)  # noqa: E731
        cases[f"sparse {sparsity:.0%}"] = (call, 64, share)
    seconds = interleaved(cases, 2 * rounds)
    rows = ["### MoE layer, top-8 of 64 experts, 2048-768-2048, one token\n\n"]
    rivals_ = list(cases)[:3]
    rows.append(f"| | ms | GB/s | {' | '.join(f'vs {n}' for n in rivals_)} |\n" + "|---" * (3 + len(rivals_)) + "|\n")
    for name, (_, _, num_bytes) in cases.items():
        ratios = " | ".join(f"{seconds[r] / seconds[name]:.2f}" for r in rivals_)
        rows.append(f"| {name} | {1e3 * seconds[name]:.2f} | {num_bytes / seconds[name] / 1e9:.1f} | {ratios} |\n")
    return "".join(rows)


def linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x[None], weight)[0]


def looped(layer: Layer, x: torch.Tensor, chosen: torch.Tensor, multiply: Callable) -> torch.Tensor:
    """One expert after the other, by torch."""
    total = torch.zeros(layer.hidden)
    for e in chosen.tolist():
        h = layer._apply_gate(multiply(layer.gate_up_proj[e], x))
        total += multiply(layer.down_proj[e], h)
    return total


def packed_experts(
    gate_up: torch.Tensor, down: torch.Tensor, sparsity: float, rng: np.random.Generator, arena: Arena
) -> SparseExperts:
    """The same experts with zeros at random, packed."""

    def pruned(weights: torch.Tensor):
        for matrix in weights.view(torch.int16).numpy().view(np.uint16):
            kept = rng.random(matrix.shape, np.float32) >= sparsity
            yield encode(np.where(kept, matrix, np.uint16(0)), "BF16", matrix.shape)

    return SparseExperts((load(pruned(gate_up), arena),), load(pruned(down), arena))


if __name__ == "__main__":
    main()
