"""The sparse kernels against torch, the best dense kernel of our own, and dense int4: interleaved, single calls timed.

    python benchmarks/sparse_kernels.py [--threads N] [--shapes 768x2048,...] [--rounds N] [--only matrix,layer]

How it is measured: `coterie.sparse.cases`. `coterie bench OUT` measures a checkpoint's own matrices and whole models.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from coterie.sparse import kernels
from coterie.sparse.cases import Case, dense_cases, interleaved, levels, processor, sparse_case, table
from coterie.sparse.experts import SparseExperts, forward
from coterie.sparse.format import encode
from coterie.sparse.memory import Arena, load

SPARSITIES = (0.4, 0.5, 0.65)


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


# --- one expert matrix --------------------------------------------------------------------------------------------


def matrix_table(rows: int, columns: int, rounds: int, threads: int) -> str:
    """A Markdown table: bytes, time, share of read bandwidth, and ratios to each rival."""
    rng = np.random.default_rng(0)
    weights = torch.from_numpy((0.02 * rng.standard_normal((rows, columns))).astype(np.float32)).bfloat16()
    bits = weights.view(torch.int16).numpy().view(np.uint16)
    x = torch.from_numpy(rng.standard_normal(columns).astype(np.float32)).bfloat16()
    cases = dense_cases(bits, "BF16", x, threads)
    for sparsity in SPARSITIES:
        pruned = np.where(rng.random(bits.shape) < sparsity, np.uint16(0), bits)
        packed = encode(np.ascontiguousarray(pruned), "BF16", (rows, columns))
        for level in levels():
            cases |= sparse_case(f"sparse {sparsity:.0%} {level}", level, packed, x, threads)
    seconds = interleaved(cases, rounds)
    own = [name for name in cases if name.startswith("own dense bf16")]
    best = [min(own, key=lambda name: seconds[name])] if own else []
    rivals = [*best, *(n for n in ("torch F.linear bf16", "torch.mv bf16", "own dense int4") if n in cases)]
    read = f", read bandwidth {cases['read'][2] / seconds['read'] / 1e9:.1f} GB/s" if "read" in cases else ""
    head = f"| kernel | bytes | us | % of bandwidth | {' | '.join(f'vs {n}' for n in rivals)} |\n"
    lines = [f"### {rows} x {columns}{read}\n\n", head, "|---" * (4 + len(rivals)) + "|\n"]
    for row in table(cases, seconds, rivals):
        share = "" if row["bandwidth_share"] is None else f"{100 * row['bandwidth_share']:.0f}"
        ratios = " | ".join(f"{ratio:.2f}" for ratio in row["times_faster_than"].values())
        size = row["bytes"] / bits.nbytes
        lines.append(f"| {row['name']} | {size:.3f} | {1e6 * row['seconds']:.0f} | {share} | {ratios} |\n")
    return "".join(lines)


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
