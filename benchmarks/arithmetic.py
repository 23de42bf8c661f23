"""`python benchmarks/arithmetic.py`: what `--dtype auto` computes in on this processor, and what that costs or gains.

Five commands on the shipped model, whose weights are bfloat16, in float32, bfloat16 and auto in turns, a few times;
the fastest of each counts, since others only make a run slower. `--write docs/results.md` replaces this processor's
rows and keeps those of others.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import coterie
from calibration import processor
from coterie.model.arithmetic import fast
from coterie.reference_model import CALIBRATION, HELD_OUT, MODEL
from results import PAGE, write_between
from tables import markdown

TYPES = ("float32", "bfloat16", "auto")
ROUNDS = 3
HEAD = ["processor", "command", "float32, s", "bfloat16, s", "auto, s", "auto is", "of the faster one's speed"]
DATA = {"data": {"prose": CALIBRATION["prose"]}, "samples": 8, "seq_len": 256}


def commands(folder: Path) -> dict[str, Callable[[str], object]]:
    """Each runs in a type and writes, where it writes, over what it wrote before."""
    text = folder / "text"
    text.write_text(HELD_OUT["prose"].read_text(encoding="utf-8")[:6_000], encoding="utf-8")
    coterie.condense(MODEL, folder / "dense", layers=1, **DATA)
    again = {"overwrite": True}
    return {
        "collect": lambda dtype: coterie.collect(MODEL, folder / "stats", dtype=dtype, **DATA, **again),
        "condense": lambda dtype: coterie.condense(MODEL, folder / "c", layers=1, dtype=dtype, **DATA, **again),
        "sparsify": lambda dtype: coterie.sparsify(MODEL, folder / "s", sparsity=0.5, dtype=dtype, **DATA, **again),
        "eval": lambda dtype: coterie.eval(MODEL, data={"prose": text}, dtype=dtype),
        "recover": lambda dtype: coterie.recover(
            folder / "dense", folder / "r", teacher=MODEL, steps=3, dtype=dtype, data=DATA["data"], samples=32,
            batch_size=4, **again,
        ),
    }  # fmt: skip


def measured() -> list[list[object]]:
    """A row a command, of the fastest of some rounds in turns."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, run in commands(Path(place)).items():
            seconds: dict[str, list[float]] = {dtype: [] for dtype in TYPES}
            for _ in range(ROUNDS):
                for dtype in TYPES:
                    began = time.perf_counter()
                    run(dtype)
                    seconds[dtype].append(time.perf_counter() - began)
            best = {dtype: min(found) for dtype, found in seconds.items()}
            share = min(best["float32"], best["bfloat16"]) / best["auto"]
            cells = [f"{best[dtype]:.2f}" for dtype in TYPES]
            rows.append([processor(), name, *cells, fast("bfloat16"), f"{share:.2f}"])
            print(rows[-1], flush=True)
    return rows


def others(page: Path) -> list[list[object]]:
    """The rows of the page that are of other processors."""
    between = re.search(r"<!-- arithmetic:begin -->\n(.*?)<!-- arithmetic:end -->", page.read_text("utf-8"), re.DOTALL)
    lines = between[1].splitlines()[2:] if between else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [list(row) for row in rows if row[0] != processor()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, nargs="?", const=PAGE)
    asked = parser.parse_args()
    found = measured()
    print(markdown(HEAD, found))
    if asked.write:
        write_between(asked.write, "arithmetic", markdown(HEAD, [*others(asked.write), *found]))
