"""`make demo`: prune the shipped reference model, verify the result, judge both, print one table.

Every step is a command that a user could type; each is shown before it runs.
"""

import shlex
import tempfile
import time
from pathlib import Path

from coterie.reference_model import MODEL
from results import Row, judge, run, table

RATIO = 0.25
SOME_TEXT, SOME_PROBLEMS = 40_000, 200  # characters per domain: the whole held-out set takes several minutes


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned"
        show("inspect", MODEL)
        show("prune", MODEL, out, "--ratio", RATIO)
        pruned = run("prune", MODEL, out, "--ratio", RATIO, "--overwrite")
        show("verify", out, "--against", MODEL)
        print("\ncoterie eval MODEL pruned --data ...   (40 KB of each held-out text, 200 word problems)")
        rows = [
            Row("reference model", judge(MODEL, SOME_TEXT, SOME_PROBLEMS)),
            Row(f"stun, {RATIO:.0%} of experts", judge(out, SOME_TEXT, SOME_PROBLEMS), pruned),
        ]
    print("\nPerplexity per domain (lower is better); exact match on word problems (higher is better):\n")
    print(table(rows))
    print(f"\n{time.monotonic() - began:.0f} seconds in all.")


def show(verb: str, *arguments: object) -> None:
    """Prints a command as it would be typed, and what it prints."""
    print(f"\n$ coterie {verb} {shlex.join(map(str, arguments))}", flush=True)
    run(verb, *arguments, as_json=False)


if __name__ == "__main__":
    main()
