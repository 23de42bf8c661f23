"""Two checkouts side by side on the reference model: do they write the same, and which is faster?

    python benchmarks/checkouts.py OLD NEW [--work FOLDER] [--rounds 5]

Every command runs as a process of its own, with the package of one checkout. What it writes is compared by hashes: all
files byte for byte, coterie.json and what is printed without times, memory and versions; statistics by their tensors.
Then start-up, calibration and rewriting are timed in turn, OLD NEW OLD NEW, and the medians' ratio is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DATA = ["--data", "prose=prose.txt", "--data", "code=code.txt"]
SAMPLES = [*DATA, "--samples", "8", "--seq-len", "128"]
FEW = [*DATA, "--samples", "4", "--seq-len", "64"]
COMMANDS = {  # what is written: command and arguments; later ones read what earlier ones wrote
    "stats": ["collect", "MODEL", "stats", *SAMPLES],
    "pruned": ["prune", "MODEL", "pruned"],
    "unequal": ["prune", "MODEL", "unequal", "--budget", "global", "--non-uniform", "coterie"],
    "reap": ["prune", "MODEL", "reap", "--method", "reap", "--stats", "stats"],
    "constants": ["prune", "MODEL", "constants", "--method", "mone", "--stats", "stats"],
    "stun": ["stun", "MODEL", "stun", "--stats", "stats", *SAMPLES],
    "wanda": ["sparsify", "MODEL", "wanda", "--also", "attention", *SAMPLES],
    "corrected": ["sparsify", "MODEL", "corrected", "--method", "sparsegpt", "--pattern", "2:4", *SAMPLES],
    "sparse": ["sparsify", "MODEL", "sparse", "--method", "magnitude", "--save", "sparse"],
    "merged": ["merge", "MODEL", "merged", "--experts", "48", "--align", *FEW],
    "condensed": ["condense", "MODEL", "condensed", "--layers", "1", *SAMPLES],
    "official": ["condense", "MODEL", "official", "--layer-ids", "3", "--select", "official", "--keep", "2", *SAMPLES],
    "recovered": ["recover", "condensed", "recovered", "--teacher", "MODEL", "--steps", "3", "--samples", "16",
                  "--seq-len", "64", *DATA],
    "shorter": ["drop", "MODEL", "shorter", "--unit", "block", *SAMPLES],
    "packed": ["pack", "wanda", "packed"],
    "applied": ["apply", "MODEL", "condensed/coterie.json", "applied"],
}  # fmt: skip
TIMED = {
    "coterie --help": ["--help"],
    "inspect": ["inspect", "MODEL"],
    "collect, 32 x 512 tokens": ["collect", "MODEL", "timed", *DATA, "--samples", "32", "--seq-len", "512"],
    "prune (rewriting)": ["prune", "MODEL", "timed"],
}
PASSING = {"seconds", "peak_rss_bytes", "search_seconds", "io", "versions"}  # differ from run to run


def run(checkout: Path, folder: Path, arguments: list[str]) -> float:
    """Runs a command of a checkout in a folder; seconds. Raises: CalledProcessError where it fails."""
    path = str(checkout.resolve() / "src")
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    command = [sys.executable, "-m", "coterie", *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return time.perf_counter() - began


def lasting(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {key: lasting(inner) for key, inner in value.items() if key not in PASSING}
    return [lasting(inner) for inner in value] if isinstance(value, list) else value


def hashes(folder: Path, name: str) -> dict[str, str]:
    """File -> hash of what a command wrote."""
    from safetensors.numpy import load_file

    found, out = {}, folder / name
    if out.is_file():  # statistics: their header is in no order
        return {
            name: hashlib.sha256(repr(sorted((k, v.tobytes()) for k, v in load_file(out).items())).encode()).hexdigest()
        }
    for path in sorted(out.iterdir()):
        raw = path.read_bytes()
        if path.name == "coterie.json":
            raw = json.dumps(lasting(json.loads(raw)), sort_keys=True).encode()
        if path.name != "coterie.log":
            found[path.name] = hashlib.sha256(raw).hexdigest()
    return found


def prepared(work: Path, checkout: Path) -> Path:
    """An empty folder with the model and its data, the same for all checkouts."""
    source = checkout / "src" / "coterie" / "reference_model"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source / "model", work / "MODEL")
    for name in ("prose", "code"):
        shutil.copy(source / "calibration" / f"{name}.txt", work)
    return work


def compare(checkouts: list[Path], work: Path) -> bool:
    """Runs all commands of both, and says which outputs differ."""
    found = []
    for checkout in checkouts:
        folder = prepared(work, checkouts[0])
        written = {}
        for name, arguments in COMMANDS.items():
            run(checkout, folder, arguments)
            written[name] = hashes(folder, name)
        found.append(written)
    for name in COMMANDS:
        old, new = (written[name] for written in found)
        wrong = sorted(file for file in old.keys() | new.keys() if old.get(file) != new.get(file))
        print(f"{name:<12} {'differs: ' + ', '.join(wrong) if wrong else f'{len(old)} files equal'}", flush=True)
    return found[0] == found[1]


def measure(checkouts: list[Path], work: Path, rounds: int) -> None:
    """Times both in turn, after one run of each that does not count."""
    folder = prepared(work, checkouts[0])
    for name, arguments in TIMED.items():
        seconds: list[list[float]] = [[], []]
        for round_number in range(rounds + 1):
            for checkout, times in zip(checkouts, seconds, strict=True):
                out = folder / "timed"
                shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
                taken = run(checkout, folder, arguments)
                if round_number:
                    times.append(taken)
        old, new = map(statistics.median, seconds)
        print(f"{name:<26} {old:8.3f} s {new:8.3f} s   {new / old:.2f} of the time", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/checkouts"))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    checkouts = [given.old, given.new]
    same = compare(checkouts, given.work.absolute())
    measure(checkouts, given.work.absolute(), given.rounds)
    sys.exit(not same)


if __name__ == "__main__":
    main()
