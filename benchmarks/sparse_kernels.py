"""The sparse kernels against torch, the best dense kernel of our own, and dense int4; then a layer, and a whole model.

    python benchmarks/sparse_kernels.py [--threads N] [--shapes 768x2048,...] [--rounds N] [--only matrix,layer,model]
                                        [--write docs/results.md]

Everything compared is interleaved in one process, and single calls are timed: `coterie.kernels.cases`. The whole model
is a qwen3_moe of random weights whose experts are three quarters of the bytes that a token reads; half of them become
zero by magnitude. `coterie bench OUT` measures a checkpoint of yours in the same way.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from coterie.codecs.bits import encode
from coterie.kernels import run as kernels
from coterie.kernels.cases import Case, dense_cases, interleaved, levels, processor, sparse_case, table
from coterie.kernels.experts import SparseExperts, forward
from coterie.kernels.memory import Arena, load
from coterie.verbs.bench import bench
from coterie.verbs.pack import pack
from coterie.verbs.sparsify import sparsify
from results import write_between
from tables import markdown

SPARSITIES = (0.4, 0.5, 0.65)


SHAPES = "768x2048,1408x2048,2048x768,14336x4096"
RIVALS = ("torch F.linear bf16", "torch.mv bf16", "own dense int4")
MODEL = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 2048, "num_experts": 16,
    "num_experts_per_tok": 8, "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 4096, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "norm_topk_prob": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", default="matrix,layer,model")
    parser.add_argument("--write", type=Path, help="a page to put the tables into, between its marks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_average = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "?"
    parts = [
        f"{processor()}, {os.cpu_count()} cores, load {load_average} at the beginning, torch {torch.__version__}, "
        f"kernels {', '.join(kernels.available())}, {options.threads} thread(s)."
    ]
    with torch.inference_mode():
        if "matrix" in options.only:
            shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
            parts.append(matrices_table(shapes, options.rounds, options.threads))
        if "layer" in options.only:
            parts.append(layer_table(options.rounds))
    if "model" in options.only:
        parts.append(model_table(options.threads))
    text = "\n\n".join(parts)
    print(text)
    if options.write:
        write_between(options.write, "sparse", text)


# --- one expert matrix --------------------------------------------------------------------------------------------


def matrices_table(shapes: list[tuple[int, ...]], rounds: int, threads: int) -> str:
    """Per shape, sparsity and level: bytes, time, share of read bandwidth, and how often faster than each rival."""
    head = ["matrix", "kernel", "of the bytes", "us", "of bandwidth", "our best dense bf16", *RIVALS]
    lines = [line for rows, columns in shapes for line in matrix_lines(rows, columns, rounds, threads)]
    return markdown(head, lines)


def matrix_lines(rows: int, columns: int, rounds: int, threads: int) -> list[list[str]]:
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
    best = min(own, key=lambda name: seconds[name], default=RIVALS[0])
    lines = []
    for row in table(cases, seconds, (best, *(name for name in RIVALS if name in cases))):
        share = "" if row["bandwidth_share"] is None else f"{100 * row['bandwidth_share']:.0f} %"
        faster = [f"{row['times_faster_than'].get(name, float('nan')):.2f}" for name in (best, *RIVALS)]
        shown = [f"{rows} x {columns}", row["name"], f"{row['bytes'] / bits.nbytes:.3f}", f"{1e6 * row['seconds']:.0f}"]
        lines.append([*shown, share, *faster])
    return lines


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
    rivals = list(cases)[:3]
    lines = [
        [name, f"{1e3 * seconds[name]:.2f}", f"{num_bytes / seconds[name] / 1e9:.1f}",
         *(f"{seconds[r] / seconds[name]:.2f}" for r in rivals)]
        for name, (_, _, num_bytes) in cases.items()
    ]  # fmt: skip
    return markdown(["one layer, top-8 of 64, 2048-768-2048, one token", "ms", "GB/s", *rivals], lines)


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


# --- a whole model ------------------------------------------------------------------------------------------------


def model_table(threads: int) -> str:
    """Tokens per second of the packed model and of the same zeros stored dense, in stock transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as place:
        whole, dense, packed = (Path(place) / name for name in ("whole", "dense", "packed"))
        torch.manual_seed(0)
        config = AutoConfig.for_model("qwen3_moe", **MODEL)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(whole)
        sparsify(whole, dense, method="magnitude", sparsity=0.5)
        pack(dense, packed)
        found = bench(packed, against=dense, threads=threads)
    ours, stock = found["models"]
    experts = MODEL["num_experts_per_tok"] * MODEL["num_hidden_layers"] * 3 * 2
    experts *= MODEL["hidden_size"] * MODEL["moe_intermediate_size"]
    lines = [speed_line(kind, batch, ours, stock) for kind in ("prefill", "decode") for batch in ours[kind]]
    note = (
        f"Experts are {100 * experts / stock['bytes_per_token']:.0f} % of the bytes that a token reads, "
        f"{ours['bytes']:,} bytes on the disk stand against {stock['bytes']:,}; medians of single calls "
        f"({found['clock']})."
    )
    return markdown(["whole model, experts 50 %", "batch", "packed", "dense, stock", "faster"], lines) + "\n\n" + note


def speed_line(kind: str, batch: str, ours: dict[str, Any], stock: dict[str, Any]) -> list[str]:
    ours_, stock_ = (entry[kind][batch]["50"] for entry in (ours, stock))
    return [kind, batch, f"{ours_:.1f} tokens/s", f"{stock_:.1f} tokens/s", f"{ours_ / stock_:.2f}"]


if __name__ == "__main__":
    main()
