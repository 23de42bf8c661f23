"""`python benchmarks/bits.py`: experts of the shipped reference model in few bits, by every method of `quantize`.

Each result is read back as stored, its experts put into the stock model in float32, and set beside the original: the
mean KL divergence per token over 2,048 tokens of each held-out domain, and exact match on the first problems. Rows are
kept in a JSONL file as they come, so that an interrupted run goes on; `--write docs/results.md` fills in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a barrier on a busy machine waits for all

import torch
import torch.nn.functional as F

import coterie
from coterie.model.experts import expert_matrices
from coterie.model.layer import Model
from coterie.model.loading import load_tokenizer
from coterie.model.moe import experts_modules
from coterie.reference_model import CALIBRATION, DOMAINS, HELD_OUT, MODEL, PROBLEMS
from results import PAGE, write_between
from tables import markdown

TOKENS, WINDOW = 2048, 512
SEEDS = (0, 1, 2)
DATA = {"samples": 64, "seq_len": 512, "data": CALIBRATION}
WAYS: dict[str, dict[str, Any]] = {
    "round": {"method": "round"},
    "search": {"method": "search"},
    "search, data": {"method": "search", **DATA},
} | {f"gptq, seed {seed}": {"method": "gptq", "seed": seed, **DATA} for seed in SEEDS}


GPTQ = {"method": "gptq", **DATA}
MIXED: dict[str, dict[str, Any]] = {  # all by gptq, in our own format
    "3 bits for all": {"bits": 3, "format": "coterie"},
    "2 bits for all": {"bits": 2, "format": "coterie"},
    "2.5 on average, measured": {"average": 2.5},
    "2.5 on average, by frequency": {"average": 2.5, "allocate": "frequency"},
    "2.5 on average, at random, seed 0": {"average": 2.5, "allocate": "random"},
    "2.5 on average, at random, seed 1": {"average": 2.5, "allocate": "random", "seed": 1},
    "2.5 on average, a width for each layer": {"average": 2.5, "per": "layer"},
    "3 on average, measured": {"average": 3.0},
    "2 on average, measured": {"average": 2.0},
}


class Judge:
    """The stock model in float32, whose experts are replaced by those of one result after the other."""

    def __init__(self, num_problems: int, home: Path) -> None:
        self.model = coterie.load(MODEL, dtype="float32").eval()
        tokenizer = load_tokenizer(MODEL)
        texts = (tokenizer(HELD_OUT[d].read_text(encoding="utf-8")).input_ids[:TOKENS] for d in DOMAINS)
        self.ids = torch.tensor(list(texts)).view(len(DOMAINS), -1, WINDOW)
        self.problems = home / "problems.jsonl"
        lines = PROBLEMS.read_text(encoding="utf-8").splitlines()[:num_problems]
        self.problems.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.original = self.log_probabilities()

    @torch.no_grad()
    def log_probabilities(self) -> torch.Tensor:
        """(domain, token, vocabulary)."""
        domains = (torch.cat([F.log_softmax(self.model(w[None]).logits[0], -1) for w in found]) for found in self.ids)
        return torch.stack(list(domains))

    @torch.no_grad()
    def hold(self, out: Path) -> None:
        """Puts the experts of OUT into the model."""
        found = Model.open(out)
        for block in found.main:
            (module,) = experts_modules(self.model.model.layers[int(block.key)])
            for e in range(block.num_experts):
                gate, up, down = (torch.tensor(m) for m in expert_matrices(found.checkpoint, block, e) if m is not None)
                module.gate_up_proj[e] = torch.cat([gate, up])
                module.down_proj[e] = down

    def divergence(self) -> dict[str, float]:
        """Mean KL of the original's next-token distribution from the model's, nats, by domain."""
        found = (self.original.exp() * (self.original - self.log_probabilities())).sum(-1).mean(-1)
        return dict(zip(DOMAINS, found.tolist(), strict=True))

    def exact_match(self) -> dict[str, float]:
        found = coterie.eval(MODEL, data={"problems": self.problems}, load=lambda path: self.model)
        value: dict[str, float] = found["models"][0]["exact_match"]["problems"]
        return value


def rows(home: Path, num_problems: int) -> list[dict[str, Any]]:
    """One row a width and method; those in the file are not made again."""
    home.mkdir(parents=True, exist_ok=True)
    file, judge = home / "bits.jsonl", Judge(num_problems, home)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not done:
        done.append({"name": "original", "bits": 16, "bytes": 1.0, "kl": 0.0, "exact": judge.exact_match()})
        file.write_text(json.dumps(done[0]) + "\n")
    for bits in (4, 3, 2):
        for way, options in WAYS.items():
            name = f"{bits} bits, {way}"
            if any(row["name"] == name for row in done):
                continue
            began = time.monotonic()
            report = coterie.quantize(MODEL, home / "out", bits=bits, overwrite=True, **options).report
            seconds = time.monotonic() - began
            judge.hold(home / "out")
            found = judge.divergence()
            share = report["after"]["bytes"] / report["before"]["bytes"]
            done.append({
                "name": name, "bits": bits, "bytes": share, "kl": sum(found.values()) / len(found), "domains": found,
                "exact": judge.exact_match(), "seconds": seconds,
            })  # fmt: skip
            with file.open("a") as lines:
                lines.write(json.dumps(done[-1]) + "\n")
            print(done[-1], flush=True)
    return done


def mixed_rows(home: Path, num_problems: int) -> list[dict[str, Any]]:
    """One row a mix of widths; those in the file are not made again."""
    home.mkdir(parents=True, exist_ok=True)
    file, judge = home / "mixed.jsonl", Judge(num_problems, home)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name, options in MIXED.items():
        if any(row["name"] == name for row in done):
            continue
        report = coterie.quantize(MODEL, home / "out", overwrite=True, **GPTQ | options).report
        judge.hold(home / "out")
        found, share = judge.divergence(), report["after"]["bytes"] / report["before"]["bytes"]
        items = report.get("widths", {}).get("items", {})
        done.append({
            "name": name, "bytes": share, "kl": sum(found.values()) / len(found), "items": items,
            "exact": judge.exact_match(),
        })  # fmt: skip
        with file.open("a") as lines:
            lines.write(json.dumps(done[-1]) + "\n")
        print(done[-1], flush=True)
    return done


def mixed_table(found: list[dict[str, Any]]) -> str:
    """With each row's KL over that on the line between 2 and 3 bits for all, at its bytes."""
    three, two = (next(row for row in found if row["name"] == f"{n} bits for all") for n in (3, 2))
    lines = []
    for row in found:
        at = (row["bytes"] - two["bytes"]) / (three["bytes"] - two["bytes"])
        line, exact = two["kl"] + at * (three["kl"] - two["kl"]), row["exact"]
        widths = ", ".join(f"{count} at {width}" for width, count in row["items"].items() if count)
        lines.append([
            row["name"], f"{row['bytes']:.3f}", f"{row['kl']:.4f}", f"{row['kl'] / line:.2f}" if line > 0 else "",
            f"{100 * exact['value']:.0f} % [{100 * exact['low']:.0f}, {100 * exact['high']:.0f}]", widths,
        ])  # fmt: skip
    head = ["experts, gptq", "bytes of all", "KL", "of the line's", "exact match", "items by width"]
    return markdown(head, lines)


def table(found: list[dict[str, Any]]) -> str:
    head = ["experts", "bytes of all", "KL", "of rounding's", *DOMAINS, "exact match", "seconds"]
    plain = {row["bits"]: row["kl"] for row in found if row["name"].endswith("round")}
    lines = []
    for row in found:
        exact = row["exact"]
        lines.append([
            row["name"], f"{row['bytes']:.3f}", f"{row['kl']:.4f}",
            f"{row['kl'] / plain[row['bits']]:.2f}" if row["bits"] in plain else "",
            *(f"{row['domains'][d]:.4f}" if "domains" in row else "" for d in DOMAINS),
            f"{100 * exact['value']:.0f} % [{100 * exact['low']:.0f}, {100 * exact['high']:.0f}]",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
        ])  # fmt: skip
    return markdown(head, lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, default=Path("build/bits"))
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--write", type=Path, nargs="?", const=PAGE)
    parser.add_argument("--mixed", action="store_true", help="widths that differ, beside one width for all")
    asked = parser.parse_args()
    if asked.mixed:
        mark, shown = "bits-mixed", mixed_table(mixed_rows(asked.home, asked.problems))
    else:
        mark, shown = "bits", table(rows(asked.home, asked.problems))
    print(shown)
    if asked.write:
        write_between(asked.write, mark, shown)
