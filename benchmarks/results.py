"""`make bench`: prunes the shipped reference model by every method and writes the table into docs/results.md.

Each row prunes in a process of its own (so that seconds and peak memory are its own) and is judged on held-out
text of five domains (half of it) and on 500 word problems. Random pruning is drawn three times, as the control.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coterie
from coterie.reference_model import DOMAINS, HELD_OUT, MODEL, PROBLEMS
from coterie.storage.record import versions

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
RATIOS = (0.125, 0.25, 0.5)
DRAWS = 3
README_ROWS = ("stun 12.5 %", "stun 25 %", "stun 50 %", "random 25 % (seed 0)")
SOME_TEXT = 50_000  # characters per domain, half of what is held out: a row takes a minute instead of two


@dataclass(frozen=True)
class Row:
    """One line of a table: its name, what `coterie eval` measured, and what `coterie prune` reported."""

    name: str
    judged: dict[str, Any]
    pruned: dict[str, Any] | None = field(default=None)


def run(verb: str, *arguments: object, as_json: bool = True) -> dict[str, Any]:
    """Runs the command in a process of its own. With as_json returns what it says; otherwise shows it."""
    command = [sys.executable, "-m", "coterie", verb, *map(str, arguments), *(["--json"] if as_json else [])]
    quiet = subprocess.PIPE if as_json else None
    done = subprocess.run(command, check=True, stdout=quiet, stderr=quiet, text=True)
    return json.loads(done.stdout) if as_json else {}


def judge(model: Path, num_characters: int | None = None, num_problems: int | None = None) -> dict[str, Any]:
    """Perplexity per domain on the first `num_characters` of its text, exact match on the first `num_problems`."""
    with tempfile.TemporaryDirectory() as folder:
        data = some_of(Path(folder), num_characters, num_problems)
        return run("eval", model, *data, "--window", 512, "--batch-size", 64)["models"][0]


def some_of(folder: Path, num_characters: int | None, num_problems: int | None) -> list[str]:
    """The options that name the first characters of each held-out text, and the first problems, written to `folder`."""
    data = []
    for name, file in {**HELD_OUT, "problems": PROBLEMS}.items():
        text, some = file.read_text(encoding="utf-8"), folder / file.name
        lines = text.splitlines(keepends=True)[:num_problems]
        some.write_text("".join(lines) if name == "problems" else text[:num_characters], encoding="utf-8")
        data.append(f"--data={name}={some}")
    return data


def prune_and_judge(name: str, *options: object) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        pruned = run("prune", MODEL, out, *options)
        row = Row(name, judge(out, SOME_TEXT), pruned)
    print(" | ".join(cells(row)), flush=True)
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


def runs() -> Iterator[tuple[Any, ...]]:
    """(name of the row, options of `coterie prune`)."""
    for ratio in RATIOS:
        percent, share = f"{100 * ratio:g} %", ("--ratio", ratio)
        yield f"stun {percent}", *share
        yield f"stun official {percent}", *share, "--linkage", "official"
        yield f"stun global {percent}", *share, "--budget", "global", "--non-uniform", "coterie"
        for method in ("router-norm", "weight-norm", "first"):
            yield f"{method} {percent}", *share, "--method", method
        for seed in range(DRAWS):
            yield f"random {percent} (seed {seed})", *share, "--method", "random", "--seed", seed


def all_rows() -> list[Row]:
    """Every run, as many at a time as there are cores, each on one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        original = pool.submit(lambda: Row("reference model", judge(MODEL, SOME_TEXT)))
        rows = list(pool.map(lambda options: prune_and_judge(*options), runs()))
        return [original.result(), *rows]


def write_between(page: Path, mark: str, text: str) -> None:
    """Replaces what stands between the page's `<!-- mark:begin -->` and `<!-- mark:end -->`."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    content = page.read_text(encoding="utf-8")
    page.write_text(f"{content.split(begin)[0]}{begin}\n{text}\n{end}{content.split(end)[1]}", encoding="utf-8")


def main() -> None:
    used = ", ".join(f"{p} {v}" for p, v in versions().items())
    rows = all_rows()
    note = f"Measured by `make bench` on {platform.machine()}; {used}."
    write_between(PAGE, "expert-dropping", f"{table(rows)}\n\n{note}")
    some = [row for row in rows if row.name in ("reference model", *README_ROWS)]
    write_between(README, "results", table(some))


if __name__ == "__main__":
    main()
