"""What recovery brings: the reference model condensed, then recovered stage by stage, beside what the same fine-tuning
does to the uncompressed model.

Each row is judged on held-out text of five domains and on word problems; losses on held-out samples of the training
data are in the reports. LM-only and distilled recovery stand in rows of their own. Training data are the texts that
ship, unless given.

    python benchmarks/recovery.py [--layers 4] [--steps 200] [--lr X] [--data NAME=FILE ...] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a barrier on a busy machine waits for all

from coterie.condense import condense
from coterie.recover import recover
from coterie.reference_model import DOMAINS, MODEL
from coterie.report import versions
from results import SOME_TEXT, judge
from tables import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--quick", action="store_true", help="few steps, little text")
    parser.add_argument("--json", type=Path, default=None, help="where the numbers go")
    given = parser.parse_args()
    how = {"data": given.data, "lr": given.lr, "steps": given.steps or (5 if given.quick else 200)}
    how |= {"samples": 64} if given.quick else {}
    text, problems = (5_000, 20) if given.quick else (SOME_TEXT, None)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path, report in models(Path(folder), given.layers, 8 if given.quick else 64, how):
            judged = judge(path, text, problems)
            rows.append({"name": name, "judged": judged, "report": report})
            print(name, *cells(rows[-1])[1:], flush=True)
    print(markdown(["", *DOMAINS, "exact match", "seconds", "steps"], [cells(row) for row in rows]))
    if given.json:
        given.json.write_text(json.dumps({"options": how, "rows": rows, "versions": versions()}, indent=1))


def models(home: Path, layers: int, samples: int, how: dict[str, Any]) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(name, folder, report) of every row, made when its turn comes."""
    yield "original", MODEL, {}
    small = home / "condensed"
    report = condense(MODEL, small, layers=layers, seq_len=256, samples=samples)
    yield f"{layers} layers condensed", small, report.report
    ids = sorted(report.report["layer_order"])
    stages = {
        "closed form": {"teacher": MODEL, "stage": "local", "steps": 0},
        "lm": {"stage": "lm"},
        "local": {"teacher": MODEL, "stage": "local"},
        "distill": {"teacher": MODEL, "stage": "distill"},
        "local, then distill": {"teacher": MODEL, "stage": "all"},
    }
    for name, stage in stages.items():
        out = home / name.replace(", ", "-").replace(" ", "-")
        yield name, out, recover(small, out, **how | stage).report
    control = recover(MODEL, home / "control", stage="lm", layer_ids=ids, **how)
    yield "control: original after lm", home / "control", control.report


def cells(row: dict[str, Any]) -> list[Any]:
    judged, report = row["judged"], row["report"]
    steps = sum(stage["steps"] for stage in report.get("stages", []))
    perplexities = [judged["perplexity"][domain]["value"] for domain in DOMAINS]
    exact = f"{100 * judged['exact_match']['problems']['value']:.1f} %"
    return [row["name"], *perplexities, exact, report.get("seconds", ""), steps or ""]


if __name__ == "__main__":
    main()
