"""`make bench`: prunes the shipped reference model by every method and writes the table into docs/results.md.

Each row prunes in a process of its own (so that seconds and peak memory are its own) and is judged on held-out
text of five domains and on 500 word problems. Random pruning is drawn five times, as the control.
"""

import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coterie
from coterie.reference_model import DOMAINS, HELD_OUT, MODEL, PROBLEMS
from coterie.report import versions

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
BEGIN, END = "<!-- expert-dropping:begin -->", "<!-- expert-dropping:end -->"
RATIOS = (0.125, 0.25, 0.5)
DRAWS = 5


@dataclass(frozen=True)
class Row:
    """One line of a table: its name, what `coterie eval` measured, and what `coterie prune` reported."""

    name: str
    judged: dict[str, Any]
    pruned: dict[str, Any] | None = field(default=None)


def run(verb: str, *arguments: object, as_json: bool = True) -> dict[str, Any]:
    """Runs the command in a process of its own. With as_json returns what it says; otherwise shows it."""
    command = [sys.executable, "-m", "coterie", verb, *map(str, arguments), *(["--json"] if as_json else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE if as_json else None, text=True)
    return json.loads(done.stdout) if as_json else {}


def judge(model: Path, num_problems: int = 500) -> dict[str, Any]:
    """Perplexity per domain and exact match on the first `num_problems` problems."""
    with tempfile.TemporaryDirectory() as folder:
        some = Path(folder) / "problems.jsonl"
        some.write_text("".join(PROBLEMS.read_text(encoding="utf-8").splitlines(keepends=True)[:num_problems]))
        data = [f"--data={name}={file}" for name, file in {**HELD_OUT, "problems": some}.items()]
        return run("eval", model, *data, "--batch-size", 64)["models"][0]


def prune_and_judge(name: str, *options: object) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        pruned = run("prune", MODEL, out, *options)
        row = Row(name, judge(out), pruned)
    print(cells(row), flush=True)
    return row


def cells(row: Row) -> list[str]:
    judged, exact = row.judged, row.judged["exact_match"]["problems"]
    size = row.pruned["report"]["after"] if row.pruned else sizes()
    report = row.pruned["report"] if row.pruned else None
    return [
        row.name,
        f"{size['parameters'] / 1e6:.2f} M",
        f"{size['bytes'] / 1e6:.1f} MB",
        str(size["experts"]) if isinstance(size["experts"], int) else "varies",
        *(f"{judged['perplexity'][d]['value']:.2f}" for d in DOMAINS),
        f"{100 * exact['value']:.1f} %",
        f"{report['seconds']:.1f} s" if report else "",
        f"{report['peak_rss_bytes'] / 1e6:.0f} MB" if report else "",
    ]


def sizes() -> dict[str, Any]:
    found = coterie.inspect(MODEL)
    return {
        "parameters": found["parameters"],
        "bytes": found["bytes"],
        "experts": next(iter(found["experts"].values())),
    }


def table(rows: list[Row]) -> str:
    """A Markdown table that also reads well in a terminal."""
    head = ["", "parameters", "bytes", "experts", *DOMAINS, "exact match", "time", "memory"]
    lines = [head, ["---"] * len(head), *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = [[c.ljust(w, "-" if c == "---" else " ") for c, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def all_rows() -> list[Row]:
    rows = [Row("reference model", judge(MODEL))]
    for ratio in RATIOS:
        percent = f"{100 * ratio:g} %"
        rows.append(prune_and_judge(f"stun {percent}", "--ratio", ratio))
        if ratio > RATIOS[0]:
            rows.append(prune_and_judge(f"stun official {percent}", "--ratio", ratio, "--linkage", "official"))
            unequal = ("--budget", "global", "--non-uniform", "coterie")
            rows.append(prune_and_judge(f"stun global {percent}", "--ratio", ratio, *unequal))
            for method in ("router-norm", "weight-norm", "first"):
                rows.append(prune_and_judge(f"{method} {percent}", "--ratio", ratio, "--method", method))
        for seed in range(DRAWS):
            name = f"random {percent} (seed {seed})"
            rows.append(prune_and_judge(name, "--ratio", ratio, "--method", "random", "--seed", seed))
    return rows


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    used = ", ".join(f"{p} {v}" for p, v in versions().items())
    body = f"{BEGIN}\n\n{table(all_rows())}\n\nMeasured by `make bench` on {platform.machine()}; {used}.\n\n{END}"
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + body + after, encoding="utf-8")


if __name__ == "__main__":
    main()
