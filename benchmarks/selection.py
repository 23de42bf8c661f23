"""How many weights per second one core scores, selects and zeroes, beside what libraries offer for the same.

    python benchmarks/selection.py [--rounds 7] [--json FILE]

Expert matrices of Qwen3-30B-A3B, Arctic and Mixtral. Seconds are the processor's own, and candidates take turns on the
same matrix, so that a busy machine slows all of them and little; each number is the 20th percentile of its times. The
exit code is 1 where scoring, selecting and zeroing a matrix by Wanda, which is what pruning does, falls below
`--require` million weights per second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries are loaded

import numpy as np
import torch

from coterie.edits.budget import row_zeros
from coterie.methods.masks import choose, lowest_per_group, lowest_per_row, zero
from coterie.methods.sparsify import magnitude, wanda
from coterie.storage.numerics import decode, encode
from tables import markdown

SHAPES = ((768, 2048), (2048, 768), (4864, 7168), (14336, 4096))
SPARSITIES = (0.25, 0.5, 0.65)
PIPELINE = "score, select, zero: Wanda"

Candidates = dict[str, Callable[[], object]]


def bf16_matrix(rows: int, columns: int) -> np.ndarray:
    """Random weights as they come from a file: float32 that holds bf16."""
    values = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    return decode(encode(values, "BF16", "random"), "BF16", "random").reshape(rows, columns)


def selections(weight: np.ndarray, sparsity: float) -> Candidates:
    """Ways to find each row's lowest: others stop at a threshold or an order, ours go on to the mask."""
    norms = np.random.default_rng(1).random(weight.shape[1]) + 0.1
    scores = wanda.score(weight, norms)
    counts = row_zeros(len(weight), round(sparsity * weight.size))
    k, tensor = int(counts[-1]), torch.from_numpy(scores)
    return {
        "np.sort": lambda: np.sort(scores, axis=1),
        "np.argpartition": lambda: np.argpartition(scores, k - 1, axis=1),
        "torch.kthvalue": lambda: torch.kthvalue(tensor, k, dim=1),
        "torch.topk": lambda: torch.topk(tensor, k, dim=1, largest=False, sorted=False),
        "lowest_per_row": lambda: lowest_per_row(scores, counts),
        "lowest_per_group 2:4": lambda: lowest_per_group(scores, 2, 4),
        PIPELINE: lambda: pipeline(weight, lambda part: wanda.score(part, norms), counts),
        "score, select, zero: magnitude": lambda: pipeline(weight, magnitude.score, counts),
    }


def pipeline(weight: np.ndarray, score: Callable[[np.ndarray], np.ndarray], counts: np.ndarray) -> np.ndarray:
    """What pruning does to a matrix (`decide/pruner.py`): the copy that it zeroes is part of it."""
    kept = weight.copy()
    zero(kept, choose(weight, score, counts))
    return kept


def codecs(weight: np.ndarray) -> Candidates:
    raw = encode(weight, "BF16", "random")
    return {
        "decode bf16": lambda: decode(raw, "BF16", "random"),
        "encode bf16": lambda: encode(weight, "BF16", "random"),
        "torch: bf16 to float32": lambda: torch.frombuffer(raw, dtype=torch.bfloat16).float(),
        "torch: float32 to bf16": lambda: torch.from_numpy(weight).bfloat16(),
    }


def rates(candidates: Candidates, num_weights: int, rounds: int) -> dict[str, float]:
    """Million weights per second of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            began = time.thread_time()
            run()
            times[name].append(time.thread_time() - began)
    return {name: num_weights / float(np.percentile(found, 20)) / 1e6 for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--require", type=float, default=150, help="million weights per second")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    selected, coded = [], []
    for rows, columns in SHAPES:
        weight, shape = bf16_matrix(rows, columns), f"{rows} x {columns}"
        for sparsity in SPARSITIES:
            found = rates(selections(weight, sparsity), weight.size, options.rounds)
            selected.append({"matrix": shape, "sparsity": sparsity, **found})
        coded.append({"matrix": shape, **rates(codecs(weight), weight.size, options.rounds)})
    print("Million weights per second on one core.\n")
    for rows in (selected, coded):
        print(markdown(list(rows[0]), [list(row.values()) for row in rows]), end="\n\n")
    if options.json:
        options.json.write_text(json.dumps({"selection": selected, "codec": coded}, indent=2) + "\n")
    slowest = min(row[PIPELINE] for row in selected)
    print(f"Slowest {PIPELINE}: {slowest:.0f}; required: {options.require:.0f}.")
    sys.exit(slowest < options.require)


if __name__ == "__main__":
    main()
