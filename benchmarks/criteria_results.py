"""`python benchmarks/criteria_results.py`: every criterion of `coterie prune` on the shipped reference model.

At 12.5, 25 and 50 % of the experts. Criteria that need data get three draws of calibration text (`coterie collect`
once a draw, `prune --stats` a row; naee-greedy, which runs on 10 samples itself, takes minutes a row), random pruning
is drawn five times. All rows are stock checkpoints, so that MoNE's removed experts are removed. Rows are kept in a
JSONL file as they come, and statistics beside it, so that an interrupted run goes on; the table goes into
docs/results.md.
"""

import argparse
import json
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from coterie.reference_model import DOMAINS, MODEL
from coterie.storage.record import versions
from results import PAGE, judge, run, write_between

RATIOS = (0.125, 0.25, 0.5)
SEEDS = {"data": (0, 1, 2), "random": (0, 1, 2, 3, 4), "none": (0,)}
BY_STATS = ("frequency", "ean", "reap", "man", "msan", "mone")
SLOW, FEW_SAMPLES = "naee-greedy", 10  # it computes a layer once for every candidate of every step
CRITERIA = (*BY_STATS, SLOW, "weight-norm", "router-norm", "stun", "random")
SEQ_LEN = 512
CHARACTERS, PROBLEMS = 20_000, 150  # what a row is judged on: about 20 seconds


def seeds(criterion: str) -> tuple[int, ...]:
    """The draws of a criterion: of calibration data, of experts, or none."""
    if criterion == "random":
        return SEEDS["random"]
    return SEEDS["data" if criterion in (*BY_STATS, SLOW) else "none"]


def wanted() -> list[tuple[str, float, int]]:
    """(criterion, ratio, seed) of every row: first draws first, and the slow criterion at the end."""
    keys = [(c, r, s) for s in SEEDS["random"] for r in RATIOS for c in CRITERIA if s in seeds(c)]
    return sorted(keys, key=lambda key: key[0] == SLOW)


def collected(folder: Path, seed: int) -> Path:
    """The statistics of a draw, measured unless they are there already."""
    path, record = folder / f"seed-{seed}.stats", folder / f"seed-{seed}.json"
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        found = run("collect", MODEL, path, "--seq-len", SEQ_LEN, "--seed", seed, "--overwrite")
        record.write_text(json.dumps(found))
    return path


def options(criterion: str, seed: int, folder: Path) -> list[object]:
    """What `coterie prune` is asked beside the method and the ratio."""
    if criterion in BY_STATS:
        return ["--stats", collected(folder, seed), "--removed", "remove"]
    if criterion == SLOW:
        few = ["--samples", FEW_SAMPLES, "--seq-len", SEQ_LEN, "--seed", seed]
        return ["--stats", collected(folder, seed), *few]
    return ["--seed", seed] if criterion == "random" else []


def row(criterion: str, ratio: float, seed: int, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        how = options(criterion, seed, folder)
        made = run("prune", MODEL, out, "--method", criterion, "--ratio", ratio, *how)["report"]
        judged = judge(out, CHARACTERS, PROBLEMS)
    stability = made["stability"]
    return {
        "criterion": criterion, "ratio": ratio, "seed": seed, "seconds": made["seconds"],
        "stability": stability["mean"] if stability else None, "guarded": len(made["guarded"]),
        "perplexity": {d: judged["perplexity"][d]["value"] for d in DOMAINS},
        "exact": judged["exact_match"]["problems"]["value"],
    }  # fmt: skip


def measure(file: Path, folder: Path, most: int | None) -> list[dict[str, Any]]:
    """All rows, as many at a time as there are cores, `most` at most; those in the file are not made again."""
    os.environ["OMP_NUM_THREADS"] = "1"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["criterion"], r["ratio"], r["seed"]) for r in rows}
    missing = [key for key in wanted() if key not in done][:most]
    for seed in {seed for criterion, _, seed in missing if criterion in (*BY_STATS, SLOW)}:
        collected(folder, seed)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for made in pool.map(lambda key: row(*key, folder), missing):
            rows.append(made)
            with file.open("a") as out:
                out.write(json.dumps(made) + "\n")
            print(cells([made]), flush=True)
    return rows


def cells(rows: list[dict[str, Any]]) -> str:
    """One line of the table: means over draws, the range of exact match, and the time of the fastest."""
    exact = [100 * r["exact"] for r in rows]
    spread = f" ({min(exact):.1f} to {max(exact):.1f})" if len(rows) > 1 else ""
    perplexity = [statistics.mean(r["perplexity"][d] for r in rows) for d in DOMAINS]
    stability = [r["stability"] for r in rows if r["stability"] is not None]
    columns = [f"{100 * rows[0]['ratio']:g} %", rows[0]["criterion"], str(len(rows))]
    columns += [f"{p:.2f}" for p in perplexity]
    columns += [
        f"{statistics.mean(exact):.1f} %{spread}",
        f"{100 * statistics.mean(stability):.0f} %" if stability else "",
        f"{min(r['seconds'] for r in rows):.1f} s",
    ]
    return "| " + " | ".join(columns) + " |"


def table(rows: list[dict[str, Any]]) -> str:
    head = ["removed", "criterion", "draws", *DOMAINS, "exact match", "stability", "time"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for ratio in RATIOS:
        for criterion in CRITERIA:
            found = [r for r in rows if (r["ratio"], r["criterion"]) == (ratio, criterion)]
            lines += [cells(found)] if found else []
    return "\n".join(lines)


def note(folder: Path) -> str:
    """What the table was measured with, and how long collecting took."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]
    used = f"torch {versions()['torch']}, {CHARACTERS:,} characters of each held-out text, {PROBLEMS} word problems"
    if not records:
        return f"({used})"
    seconds = statistics.mean(record["seconds"] for record in records)
    return f"({used}; collecting statistics took {seconds:.0f} s a draw, once for all criteria)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("criteria_rows.jsonl"), help="where rows are kept")
    parser.add_argument("--most", type=int, help="make so many rows and leave the page as it is [default: all rows]")
    given = parser.parse_args()
    folder = given.rows.with_suffix(".stats")
    rows = measure(given.rows, folder, given.most)
    text = f"{table(rows)}\n\n{note(folder)}"
    if given.most is None:
        write_between(PAGE, "criteria", text)
    print(text)


if __name__ == "__main__":
    main()
