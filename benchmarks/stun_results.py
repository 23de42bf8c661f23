"""`python benchmarks/stun_results.py`: STUN against its halves on the shipped reference model, at equal totals.

At 40, 50 and 65 % of the expert weights: STUN (experts, then OWL inside the rest), OWL alone, Wanda alone, and experts
alone. Three draws of calibration data each; experts alone need none. Rows are kept in a JSONL file as they come, so
that an interrupted run goes on; the table and its findings go into docs/results.md.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from coterie.reference_model import DOMAINS, MODEL
from coterie.storage.record import versions
from results import SOME_TEXT, judge, run

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- stun: begin -->\n", "<!-- stun: end -->\n"
TOTALS, SEEDS = (0.4, 0.5, 0.65), (0, 1, 2)
WAYS = ("stun", "owl", "wanda", "experts")
NAMES = {"stun": "STUN (OWL inside)", "owl": "OWL alone", "wanda": "Wanda alone", "experts": "experts alone"}


def command(way: str, total: float, seed: int) -> list[object]:
    """What `coterie` is asked for."""
    if way == "experts":
        return ["prune", "--method", "stun", "--ratio", total]
    draw = ["--sparsity", total, "--seed", seed, "--seq-len", 512]
    return ["stun", "--second", "owl", *draw] if way == "stun" else ["sparsify", "--method", way, *draw]


def row(way: str, total: float, seed: int, num_problems: int | None) -> dict[str, Any]:
    verb, *options = command(way, total, seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        made = run(str(verb), MODEL, out, *options)["report"]
        judged = judge(out, SOME_TEXT, num_problems)
    return {
        "way": way, "total": total, "seed": seed, "sparsity": made["sparsity"]["experts"],
        "kurtosis": made.get("kurtosis"), "seconds": made["seconds"], "cold": len(made["cold_experts"]),
        "perplexity": {d: judged["perplexity"][d]["value"] for d in DOMAINS},
        "exact": judged["exact_match"]["problems"]["value"],
    }  # fmt: skip


def measure(file: Path, num_problems: int | None) -> list[dict[str, Any]]:
    """All rows; those in the file are not made again."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["way"], r["total"], r["seed"]) for r in rows}
    wanted = [(w, t, s) for s in SEEDS for t in TOTALS for w in WAYS if w != "experts" or s == 0]
    for way, total, seed in wanted:
        if (way, total, seed) not in done:
            rows.append(row(way, total, seed, num_problems))
            with file.open("a") as out:
                out.write(json.dumps(rows[-1]) + "\n")
            print(cells(rows[-1:]), flush=True)
    return rows


def cells(rows: list[dict[str, Any]]) -> str:
    """One line of the table: means over seeds, and the range of exact match."""
    exact = [100 * r["exact"] for r in rows]
    spread = f" ({min(exact):.1f} to {max(exact):.1f})" if len(rows) > 1 else ""
    perplexity = [statistics.mean(r["perplexity"][d] for r in rows) for d in DOMAINS]
    kurtosis = rows[0]["kurtosis"]
    shown = " → ".join(f"{k:.2f}" for k in kurtosis.values()) if kurtosis else ""
    columns = [f"{100 * rows[0]['total']:.0f} %", NAMES[rows[0]["way"]], *(f"{p:.2f}" for p in perplexity)]
    columns += [
        f"{statistics.mean(exact):.1f} %{spread}",
        shown,
        f"{statistics.mean(r['seconds'] for r in rows):.0f} s",
    ]
    return "| " + " | ".join(columns) + " |"


def table(rows: list[dict[str, Any]]) -> str:
    head = ["total", "way", *DOMAINS, "exact match", "kurtosis before → between → after", "time"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for total in TOTALS:
        for way in WAYS:
            found = [r for r in rows if (r["way"], r["total"]) == (way, total)]
            lines += [cells(found)] if found else []
    return "\n".join(lines)


def claim(rows: list[dict[str, Any]]) -> str:
    """The paper's claim, held against every total: lower perplexity and higher exact match than OWL alone?"""
    lines = []
    for total in TOTALS:
        means = {}
        for way in ("stun", "owl"):
            found = [r for r in rows if (r["way"], r["total"]) == (way, total)]
            means[way] = (
                statistics.geometric_mean(v for r in found for v in r["perplexity"].values()),
                100 * statistics.mean(r["exact"] for r in found),
            )
        (p, e), (q, f) = means["stun"], means["owl"]
        verdict = "confirmed" if p < q and e > f else "not confirmed" if p > q and e < f else "mixed"
        lines.append(
            f"- {100 * total:.0f} %: geometric mean perplexity {p:.2f} against {q:.2f} of OWL alone, "
            f"exact match {e:.1f} % against {f:.1f} %: {verdict}."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("stun_rows.jsonl"), help="where rows are kept")
    parser.add_argument("--problems", type=int, help="how many word problems [default: all]")
    options = parser.parse_args()
    rows = measure(options.rows, options.problems)
    note = f"(torch {versions()['torch']}, half of each held-out text, means of {len(SEEDS)} draws of calibration data)"
    question = "The paper's claim, STUN above unstructured pruning alone at the same total:"
    text = f"{BEGIN}{table(rows)}\n\n{note}\n\n{question}\n\n{claim(rows)}\n{END}"
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2] if rest else ""
    PAGE.write_text(f"{before.rstrip()}\n\n{text}{after}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
