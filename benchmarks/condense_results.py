"""`python benchmarks/condense_results.py`: CD-MoE on the shipped reference model, beside its baselines and recovered.

A quarter, a third and a half of the layers are condensed to the shared expert alone (S) or with always-on experts
(SR), chosen as published or by least squares; then the model without as many MoE layers, or whole decoder layers. Which
layers: one search each for a half, whose order gives the smaller sets. Then recovery, stage by stage, and the same
fine-tuning of the uncompressed model as the control. Rows are kept in a JSONL file and outputs in a folder as they
come, so that an interrupted run goes on. Tokens per second come last, all models in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a barrier on a busy machine waits for all

import coterie
from coterie.reference_model import DOMAINS, MODEL
from coterie.storage.record import versions
from results import PAGE, SOME_TEXT, judge, run, write_between
from tables import markdown

COUNTS = (2, 3, 4)  # of 8 layers: a quarter, a third, a half
WAYS = {("official", 0): "S official", ("least-squares", 0): "S least squares",
        ("official", None): "SR official", ("least-squares", None): "SR least squares"}  # fmt: skip
STAGES = {
    "closed form": ("--stage", "local", "--steps", 0),
    "local": ("--stage", "local"),
    "distill": ("--stage", "distill"),
    "local, then distill": ("--stage", "all"),
}
DRAW = ("--seq-len", 512)
REPORTED = ("after", "layer_order", "passes", "search_seconds", "layer_error", "refit_error", "seconds", "stages")
PREFILL, DECODE, BATCHES, ROUNDS = 256, 16, (1, 16), 5


class Run:
    """Rows made so far, and where the outputs are."""

    def __init__(self, home: Path, num_problems: int | None, steps: int) -> None:
        self.home, self.num_problems, self.steps = home, num_problems, steps
        self.file = home / "rows.jsonl"
        home.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows = {row["name"]: row for row in map(json.loads, lines)}

    def path(self, name: str) -> Path:
        return self.home / name.replace(", ", "-").replace(" ", "-")

    def row(self, name: str, verb: str = "", model: Path = MODEL, *options: object, judged: bool = True) -> dict:
        """Makes a model, judges it, and takes both down, unless it was made before."""
        if name not in self.rows:
            row: dict[str, Any] = {"name": name}
            if verb:
                report = run(verb, model, self.path(name), *options, "--overwrite")["report"]
                row |= {key: report[key] for key in REPORTED if key in report}
            if judged:
                row["judged"] = judge(self.path(name) if verb else MODEL, SOME_TEXT, self.num_problems)
            self.rows[name] = row
            with self.file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(name, *quality(row), flush=True)
        return self.rows[name]

    def make(self) -> None:
        """All rows but the speeds."""
        self.row("original")
        most = max(COUNTS)
        for (select, keep), way in WAYS.items():
            how = ("--select", select, *(("--keep", keep) if keep is not None else ()), *DRAW)
            order = self.row(f"{way} {most}", "condense", MODEL, "--layers", most, *how)["layer_order"]
            for count in COUNTS[:-1]:
                ids = ",".join(map(str, order[:count]))
                self.row(f"{way} {count}", "condense", MODEL, "--layer-ids", ids, *how)
        for unit in ("layer", "block"):
            for count in COUNTS:
                self.row(f"{unit} drop {count}", "drop", MODEL, "--unit", unit, "--count", count, *DRAW)
        for way in ("SR least squares", "S least squares"):
            for count in COUNTS:
                self.recover(f"{way} {count}", whole=(way, count) == ("SR least squares", 3))
        ids = ",".join(map(str, self.rows["SR least squares 4"]["layer_order"][:3]))
        self.row("control", "recover", MODEL, "--stage", "lm", "--layer-ids", ids, "--steps", self.steps)

    def recover(self, name: str, *, whole: bool) -> None:
        """Recovered: by all stages, or each by itself where the whole is wanted."""
        steps, small = ("--steps", self.steps), self.path(name)
        if whole:
            self.row(f"{name}, lm", "recover", small, "--stage", "lm", *steps)
        for stage, options in STAGES.items():
            if whole or stage == "local, then distill":
                steps_of = () if stage == "closed form" else steps
                self.row(f"{name}, {stage}", "recover", small, "--teacher", MODEL, *options, *steps_of)

    def names(self) -> Iterator[str]:
        """Rows of the first table, by count and way."""
        yield "original"
        for count in COUNTS:
            yield from (f"{way} {count}" for way in [*WAYS.values(), "layer drop", "block drop"])


def verified(done: Run) -> str:
    """Says what `coterie verify` found of every output; a fault ends the benchmark."""
    found = []
    for name in done.rows:
        if name != "original":
            before = done.path(name.partition(", ")[0]) if ", " in name else MODEL
            found.append(run("verify", done.path(name), "--against", before)["checks"])
    compared = [check["detail"] for checks in found for check in checks if check["name"].startswith("logits")]
    exact = sum(detail.startswith("bit-equal") for detail in compared)
    return (
        f"`coterie verify` of all {len(found)} outputs: no key missing or unexpected in stock transformers, "
        f"every tensor accounted for; logits of the {len(compared)} unrecovered ones equal the explicit forward, "
        f"{exact} bit for bit, the others but for rounding."
    )


# --- speed -------------------------------------------------------------------------------------------------------


def speeds(models: dict[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """Tokens per second of every model, relative to the first: the median over rounds of ratios within a round."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = {n: AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for n, p in models.items()}
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    with torch.inference_mode():
        for _ in range(rounds + 1):  # the first warms up
            for name, model in loaded.items():
                for batch in BATCHES:
                    for kind, seconds in timed(model, batch):
                        taken[name].setdefault(f"{kind} {batch}", []).append(seconds)
    first = taken[next(iter(models))]
    return {
        name: {k: statistics.median(a / b for a, b in zip(first[k][1:], v[1:], strict=True)) for k, v in by.items()}
        for name, by in taken.items()
    }


def timed(model: Any, batch: int) -> Iterator[tuple[str, float]]:
    """Seconds of a prefill, and of the tokens decoded after it."""
    import torch

    ids = torch.arange(batch * PREFILL).view(batch, PREFILL) * 7919 % 4000
    began = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    yield "prefill", time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(DECODE):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    yield "decode", time.perf_counter() - began


# --- tables ------------------------------------------------------------------------------------------------------


def quality(row: dict[str, Any]) -> list[str]:
    judged = row["judged"]
    exact = 100 * judged["exact_match"]["problems"]["value"]
    return [*(f"{judged['perplexity'][d]['value']:.2f}" for d in DOMAINS), f"{exact:.1f} %"]


def main_table(run: Run, speed: dict[str, dict[str, float]]) -> str:
    kinds = [f"{kind} {batch}" for kind in ("prefill", "decode") for batch in BATCHES]
    found = coterie.inspect(MODEL)
    size = {key: found[key] for key in ("parameters", "bytes")}
    rows = []
    for name in run.names():
        row = run.rows[name]
        after = row.get("after", size)
        cells = [f"{after['parameters'] / 1e6:.2f} M", f"{after['bytes'] / 1e6:.1f} MB"]
        rows.append([name, *cells, *(f"{speed[name][kind]:.2f}x" for kind in kinds), *quality(row)])
    return markdown(["layers", "parameters", "bytes", *kinds, *DOMAINS, "exact match"], rows)


def recovery_table(run: Run) -> str:
    rows = []
    for name in run.rows:
        if ", " in name or name in ("original", "control") or any(n.startswith(f"{name}, ") for n in run.rows):
            shown = "control: original after lm" if name == "control" else name
            rows.append([shown, *quality(run.rows[name]), f"{run.rows[name].get('seconds', 0):.0f} s"])
    rows.sort(key=lambda cells: (cells[0].split(",")[0], "," in cells[0]))
    return markdown(["", *DOMAINS, "exact match", "time"], rows)


def search_table(run: Run) -> str:
    rows = []
    for way in WAYS.values():
        row = run.rows[f"{way} {max(COUNTS)}"]
        passes, seconds = row["passes"], row["search_seconds"]
        errors = row.get("refit_error") or {str(i): row["layer_error"][str(i)] for i in row["layer_order"]}
        rows.append([
            way, f"{passes['experts']:.1f}", f"{seconds['experts']:.0f} s", f"{passes['layers']:.1f}",
            f"{seconds['layers']:.0f} s", f"{statistics.mean(row['layer_error'].values()):.3f}",
            ", ".join(map(str, row["layer_order"])), f"{statistics.mean(errors.values()):.3f}",
        ])  # fmt: skip
    head = ["", "passes: experts", "time", "passes: layers", "time", "error, all layers", "order", "error, chosen"]
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("condensed"), help="where rows and outputs are kept")
    parser.add_argument("--problems", type=int, help="how many word problems [default: all]")
    parser.add_argument("--steps", type=int, default=200, help="of each stage of recovery")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the speed measurement")
    parser.add_argument("--rows-only", action="store_true", help="no speed, no page")
    given = parser.parse_args()
    done = Run(given.home, given.problems, given.steps)
    done.make()
    if given.rows_only:
        return
    paths = {name: done.path(name) if name != "original" else MODEL for name in done.names()}
    speed = speeds(paths, given.rounds)
    (given.home / "speed.json").write_text(json.dumps(speed, indent=1))
    note = f"torch {versions()['torch']}. {verified(done)}"
    texts = {
        "condense": f"{main_table(done, speed)}\n\n{note}",
        "condense-search": search_table(done),
        "recovery": recovery_table(done),
    }
    for mark, text in texts.items():
        print(text)
        write_between(PAGE, mark, text)


if __name__ == "__main__":
    main()
