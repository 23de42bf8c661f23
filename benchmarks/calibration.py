"""Calibration's speed: tokens per second of the streaming forward beside those of stock transformers.

One process runs all of them in turns, on the same checkpoint, samples, batches, dtype and threads; stock holds the
whole model in memory, ours reads each layer and each expert from disk. Every round gives each its share of stock's
speed, and the table shows the medians. Speed is also told in seconds of the processor: on a machine that others use,
seconds of the clock say how busy they were. Stock runs its decoder without the head, which calibration leaves out too.

    python benchmarks/calibration.py [--quick] [--json FILE]
    python benchmarks/calibration.py --spill

The second measures what it costs that activations leave memory: one layer with the widths of Qwen3-30B-A3B (32 of its
experts), as many tokens as pass the default budget, in turns with the same in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a barrier on a busy machine waits for all

import numpy as np
import torch

from coterie.decide.pruner import Pruner
from coterie.edits.budget import zeros_per_row
from coterie.forward.activations import Walk, plain_walk
from coterie.forward.measure import measuring_walk
from coterie.forward.stream import Stream
from coterie.methods import sparsify as methods
from coterie.model.layer import Model
from coterie.model.loading import quiet_transformers
from coterie.storage.record import versions

STOCK = ("grouped_mm", "eager")  # batched_mm copies an expert for every token: 200 times slower, and out of memory
CLOCKS = ("clock", "processor")
FULL = {"num_hidden_layers": 8, "num_experts": 32}
QUICK = {"num_hidden_layers": 2, "num_experts": 16}
LAYER = {
    "num_hidden_layers": 1, "num_experts": 32, "hidden_size": 2048, "moe_intermediate_size": 768, "vocab_size": 4096,
    "num_experts_per_tok": 8, "num_attention_heads": 32, "head_dim": 128,
}  # fmt: skip
SPILLING = 112  # samples of 512 tokens: 1.2 GB of activations, where the budget is 1 GiB
CONFIG = {
    "hidden_size": 1024, "moe_intermediate_size": 512, "intermediate_size": 2048, "num_experts_per_tok": 4,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "norm_topk_prob": True,
}  # fmt: skip


@dataclass
class Contender:
    """Something that takes all samples through the model; `run` returns what of it is told apart, if anything."""

    name: str
    run: Callable[[], np.ndarray | None]
    seconds: list[np.ndarray] = field(default_factory=list)  # by round, of the clock and of the processor
    apart: list[np.ndarray] = field(default_factory=list)


def clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer samples and rounds")
    parser.add_argument("--spill", action="store_true", help="what it costs that activations go to files")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, default=None, help="where the numbers go")
    given = parser.parse_args()
    num_samples, rounds = given.samples or (4 if given.quick else 32), given.rounds or (2 if given.quick else 5)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    draw = torch.Generator().manual_seed(0)
    if given.spill:
        spilled(given.rounds or 2)
        return
    samples = torch.randint(3, CONFIG["vocab_size"], (num_samples, given.seq_len), generator=draw).tolist()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in given.dtype:
            path = write_model(Path(folder) / dtype, dtype, QUICK if given.quick else FULL)
            found[dtype] = measure(path, getattr(torch, dtype), samples, rounds)
    model = CONFIG | (QUICK if given.quick else FULL)
    setting = {
        "processor": processor(), "threads": torch.get_num_threads(), "model": model,
        "samples": num_samples, "seq_len": given.seq_len, "rounds": rounds, "versions": versions(),
    }  # fmt: skip
    print(table(setting, found))
    if given.json:
        given.json.write_text(json.dumps({"setting": setting, "results": found}, indent=1))


def spilled(rounds: int) -> None:
    """Prints seconds of `collect` with activations in files and in memory, and the process's largest memory so far."""
    draw = torch.Generator().manual_seed(0)
    samples = torch.randint(3, LAYER["vocab_size"], (SPILLING, 512), generator=draw).tolist()
    halves = torch.tensor([i % 2 for i in range(SPILLING)]).repeat_interleave(512)
    with tempfile.TemporaryDirectory() as folder:
        source = Model.open(write_model(Path(folder), "bfloat16", LAYER))
        stream = Stream(source, torch.bfloat16)
        for round_ in range(rounds + 1):
            for name, more in (("in files", {}), ("in memory", {"budget": 2**40})):
                began = clocks()
                walk = measuring_walk(source, torch.bfloat16, halves, 2, lambda block, sums: None)
                for _ in stream.run(stream.embed(samples, **more), walk):
                    pass
                wall, spent = clocks() - began
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
                warm = "" if round_ else " (not counted: kernels are compiled, files enter the page cache)"
                print(f"{name}: {wall:.1f} s, {spent:.1f} s of the processor, at most {peak:.2f} GB so far{warm}")


def write_model(folder: Path, dtype: str, sizes: dict[str, int]) -> Path:
    """A qwen3_moe of random weights, about 1.7 GB in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with quiet_transformers():
        config = AutoConfig.for_model("qwen3_moe", **(CONFIG | sizes))
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
    return folder


def measure(path: Path, dtype: torch.dtype, samples: list[list[int]], rounds: int) -> list[dict[str, Any]]:
    """Each contender's tokens per second of both clocks, and its share of stock's, round by round."""
    num_tokens = sum(map(len, samples))
    contenders = [*stock(path, dtype, samples), *ours(path, dtype, samples)]
    for round_ in range(rounds + 1):
        for contender in contenders[round_ % len(contenders) :] + contenders[: round_ % len(contenders)]:
            began = clocks()
            apart = contender.run()
            if round_:  # the first one warms up: kernels are compiled, files enter the page cache
                contender.seconds.append(clocks() - began)
                contender.apart.extend([] if apart is None else [apart])
    default = np.array(contenders[0].seconds)
    fastest = np.min([c.seconds for c in contenders[: len(STOCK)]], axis=0)
    spent_by_name = {c.name: np.array(c.seconds) for c in contenders}
    spent_by_name |= {f"{c.name} without selection": np.array(c.seconds) - c.apart for c in contenders if c.apart}
    rows = []
    for name, spent in spent_by_name.items():
        rates = {"rate": num_tokens / spent, "of_default": default / spent, "of_fastest": fastest / spent}
        medians = {key: dict(zip(CLOCKS, np.median(v, axis=0).tolist(), strict=True)) for key, v in rates.items()}
        rows.append({"name": name, **medians, "seconds": spent.tolist()})
    return rows


def stock(path: Path, dtype: torch.dtype, samples: list[list[int]]) -> list[Contender]:
    """The whole model in memory, by each of the library's experts implementations; its default comes first."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    default = model.config._experts_implementation
    size = max(1, 2048 // len(samples[0]))
    batches = [torch.tensor(samples[i : i + size]) for i in range(0, len(samples), size)]

    def contender(name: str) -> Contender:
        def run() -> None:
            model.set_experts_implementation(name)
            with torch.inference_mode():
                for ids in batches:
                    model.get_decoder()(input_ids=ids, use_cache=False)

        return Contender(f"stock, {name}" + (" (its default)" if name == default else ""), run)

    return [contender(name) for name in sorted(STOCK, key=lambda name: name != default)]


def ours(path: Path, dtype: torch.dtype, samples: list[list[int]]) -> list[Contender]:
    source = Model.open(path)
    stream = Stream(source, dtype)
    halves = torch.tensor([i % 2 for i in range(len(samples))]).repeat_interleave(len(samples[0]))

    def through(walk: Walk, **spill: Any) -> None:
        for _ in stream.run(stream.embed(samples, **spill), walk):
            pass

    def measured(**spill: Any) -> None:
        through(measuring_walk(source, dtype, halves, 2, lambda block, sums: None), **spill)

    def pruned() -> np.ndarray:
        """Wanda at 50 %, written nowhere; returns the seconds that choosing the weights took."""
        shares, spent = {b.key: Fraction(1, 2) for b in source.main}, np.zeros(2)
        zeros = zeros_per_row(source, shares)
        pruner = Pruner(source.checkpoint, methods.load("wanda"), zeros, lambda *_: None, dtype)
        select = pruner.prune

        def timed(*args: Any) -> Any:
            began = clocks()
            try:
                return select(*args)
            finally:
                spent[:] += clocks() - began

        pruner.prune = timed
        through(pruner.walk)
        return spent

    return [
        Contender("streamed, nothing measured", lambda: through(plain_walk(source.checkpoint, dtype))),
        Contender("streamed, `collect`", measured),
        Contender("streamed, `collect`, spilled", lambda: measured(budget=0)),
        Contender("streamed, `sparsify`", pruned),
    ]


def processor() -> str:
    """Its name, and which 16-bit instructions it has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = values.get("flags", "").split()
    has = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{values.get('model name', 'unknown')} ({', '.join(has) or 'no AVX-512'})"


def table(setting: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown that also reads well in a terminal."""
    model = setting["model"]
    lines = [
        f"{setting['samples']} samples of {setting['seq_len']} tokens, {model['num_hidden_layers']} layers of "
        f"{model['num_experts']} experts, {setting['threads']} thread(s), {setting['processor']}; "
        f"medians of {setting['rounds']} rounds",
        "",
        "| dtype | what | tokens/s | of stock's default | of its fastest | tokens/CPU-s | of default | of fastest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for dtype, rows in found.items():
        for row in rows:
            shown = (
                f"{row[key][clock]:{'.0f' if key == 'rate' else '.2f'}}"
                for clock in CLOCKS
                for key in ("rate", "of_default", "of_fastest")
            )
            lines.append(f"| {dtype} | {row['name']} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
