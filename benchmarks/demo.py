"""`make demo`: makes the shipped reference model smaller in two ways, verifies, judges, and prints one table.

Every step is a command that a user could type; each is shown before it runs.
"""

import shlex
import tempfile
import time
from pathlib import Path

from coterie.reference_model import CALIBRATION, MODEL
from coterie.storage.record import record_of
from results import Row, judge, run, table

RATIO, BITS = 0.25, 4
DATA = [f"--data={name}={file}" for name, file in CALIBRATION.items()]
SOME_TEXT, SOME_PROBLEMS = 20_000, 100  # characters per domain: the whole held-out set takes several minutes


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        low, pruned = Path(folder) / "low", Path(folder) / "pruned"
        show("inspect", MODEL)
        show("quantize", MODEL, low, "--bits", BITS)
        show("prune", MODEL, pruned, "--ratio", RATIO, *DATA, "--samples", 64)
        show("verify", pruned, "--against", MODEL)
        print(
            "\ncoterie eval MODEL low pruned --data ...   (20 KB of each held-out text, 100 word problems)", flush=True
        )
        rows = [Row("reference model", judge(MODEL, SOME_TEXT, SOME_PROBLEMS))]
        for name, out in ((f"experts in {BITS} bits", low), (f"reap, {RATIO:.0%} of experts", pruned)):
            rows.append(Row(name, judge(out, SOME_TEXT, SOME_PROBLEMS), record_of(out)))
    print("\nPerplexity per domain (lower is better); exact match on word problems (higher is better):\n")
    print(table(rows))
    print(f"\n{time.monotonic() - began:.0f} seconds in all.")


def show(verb: str, *arguments: object) -> None:
    """Prints a command as it would be typed, and what it prints."""
    print(f"\n$ coterie {verb} {shlex.join(map(str, arguments))}", flush=True)
    run(verb, *arguments, as_json=False)


if __name__ == "__main__":
    main()
