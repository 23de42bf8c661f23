"""Dropping experts against copying files: time, processor time and memory, side by side on one checkpoint.

    python benchmarks/disk.py [--folder /tmp] [--runs 5] [--write docs/results.md]

Makes a checkpoint of 4 GB of random numbers in Qwen3's form, drops a quarter of the experts of each layer in every way
that `--io` knows, and next to it copies the kept bytes with `cp`, and loads and saves the checkpoint with transformers.
The page cache gives the checkpoint up before each run, and every run ends with its bytes on the disk. What Python takes
to start is measured and taken off the commands of ours. Rows are interleaved, and the median of their runs counts: the
speed of a disk comes and goes, and on a busy machine only the ratios say something. What came first, on memory that
the machine had not used yet, is not counted. With `--xfs FOLDER`, a folder on a filesystem that shares blocks, there
are rows of that too; then headers of 2 TB are read and planned on. Everything made is removed again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path

from memory import forget
from synthetic import make
from tables import markdown

PYTHON = (sys.executable, "-W", "ignore")
COTERIE = (*PYTHON, "-m", "coterie")
BEGIN, END = "<!-- disk:begin -->", "<!-- disk:end -->"
SAVE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Taken:
    """Seconds, processor seconds and peak resident bytes of one run."""

    seconds: float
    processor: float
    memory: int
    load: float = 0.0  # of the machine, when the run began


def taken(command: list[str]) -> Taken:
    """Runs a command to its end; its memory counts from what this script itself takes. Raises: SystemExit when it
    fails."""
    load, began = os.getloadavg()[0], time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return Taken(time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, load)


def dropping(model: Path, out: Path, io: str) -> list[str]:
    return [*COTERIE, "prune", str(model), str(out), "--method", "first", "--ratio", "0.25", "--io", io]


def synced(command: str, *paths: Path) -> list[str]:
    """A shell command, and then its files on the disk."""
    return ["sh", "-ec", f"{command}; find $2 -type f -exec sync {{}} +", "sh", *map(str, paths)]


def rows_of(folder: Path, model: Path, kept: Path) -> dict[str, tuple[Path, list[str]]]:
    """Name in the table -> what is read, and the command. `kept` holds the bytes that stay."""
    out = folder / "out"
    rows = {"`cp` of the kept bytes": (kept, synced("cp -r $1 $2", kept, out))}
    for io in ("auto", "copy", "plain"):
        rows[f"ours, `--io {io}`"] = (model, dropping(model, out, io))
    return rows


def measured(folder: Path, model: Path, runs: int) -> tuple[dict[str, list[Taken]], Taken, int]:
    """All rows, interleaved; the start of the interpreter; and how many bytes stay."""
    kept, found = folder / "kept", dict[str, list[Taken]]()
    taken(dropping(model, kept, "auto"))
    start = min((taken([*COTERIE, "--help"]) for _ in range(3)), key=lambda t: t.seconds)
    rows = list(rows_of(folder, model, kept).items()) * (runs + 1)
    for name, (source, command) in rows:
        found.setdefault(name, []).append(cold(name, source, command, folder / "out"))
    found = {name: one[1:] for name, one in found.items()}
    size = sum(path.stat().st_size for path in kept.iterdir())
    shutil.rmtree(kept)
    # Last and once: it writes the whole checkpoint, and takes long.
    save = synced(f"{sys.executable} -W ignore -c '{SAVE}' $1 $2", model, folder / "out")
    name = "transformers, load and save all"
    found[name] = [cold(name, model, save, folder / "out")]
    return found, start, size


def cold(name: str, source: Path, command: list[str], out: Path) -> Taken:
    """One run that finds nothing of its source in memory."""
    os.sync()
    forget(source)
    result = taken(command)
    print(name, result, file=sys.stderr, flush=True)
    shutil.rmtree(out)
    return result


def shared(model: Path, folder: Path) -> dict[str, Taken]:
    """The same where blocks can be shared, and with the source used up."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        copy = Path(shutil.copytree(model, Path(place, "model")))
        os.sync()
        runs = [_removed(dropping(copy, Path(place, "out"), "reflink")) for _ in range(3)]
        used_up = taken([*dropping(copy, Path(place, "out"), "auto"), "--in-place"])
    return {"ours, `--io reflink` (XFS)": min(runs, key=lambda t: t.seconds), "ours, `--in-place` (XFS)": used_up}


def _removed(command: list[str]) -> Taken:
    result = taken(command)
    shutil.rmtree(command[command.index("prune") + 2])
    return result


def headers(folder: Path) -> dict[str, Taken]:
    """What needs headers and routers alone, on a checkpoint of 2 TB that is mostly holes."""
    model = make("kimi-k2-bf16", folder / "large", sparse=True)
    plan = ["prune", str(model), str(folder / "no"), "--ratio", "0.25", "--dry-run", "--json"]
    commands = {"`inspect --json`": ["inspect", str(model), "--json"], "`prune --dry-run`, STUN": plan}
    return {
        name: min((taken([*COTERIE, *rest]) for _ in range(3)), key=lambda t: t.seconds)
        for name, rest in commands.items()
    }


def median(runs: list[Taken]) -> Taken:
    """Of each figure by itself."""
    return Taken(*(statistics.median(values) for values in zip(*(astuple(run) for run in runs), strict=True)))


def page(found: dict[str, list[Taken]], start: Taken, size: int, more: dict[str, Taken], read: dict[str, Taken]) -> str:
    usual = {name: median(runs) for name, runs in found.items()}
    yardstick = next(iter(usual.values()))
    lines = []
    for name, one in (usual | more).items():
        ours = start if name.startswith("ours") else Taken(0, 0, 0)
        seconds, processor = one.seconds - ours.seconds, one.processor - ours.processor
        lines.append(
            (name, f"{seconds:.1f} s", f"{seconds / yardstick.seconds:.2f}", f"{processor:.2f} s",
             f"{processor / yardstick.processor:.2f}", "" if one is yardstick else f"{one.memory / 1e6:.0f} MB")
        )  # fmt: skip
    cp = [t.seconds for t in next(iter(found.values()))]
    loads = [t.load for runs in found.values() for t in runs]
    head = ["", "time", "of `cp`", "processor", "of `cp`", "peak memory"]
    second = [(name, f"{one.seconds:.1f} s", f"{one.processor:.1f} s", f"{one.load:.1f}") for name, one in read.items()]
    machine = f"{platform.machine()}, Linux {platform.release().split('-')[0]}"
    return "\n".join(
        [
            markdown(head, lines),
            "",
            f"{size / 1e9:.2f} GB are kept; medians of {len(cp)} runs (transformers, in place: one; reflink: the best "
            f"of three); `cp` took {min(cp):.1f} to {max(cp):.1f} s. Start of the interpreter, taken off ours: "
            f"{start.seconds:.2f} s, {start.processor:.2f} s of processor time. Load of the machine meanwhile: "
            f"{min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} processors.",
            "",
            markdown(["Kimi-K2's shapes, 2 TB, headers and routers", "time", "processor", "load"], second),
            "",
            f"Measured by `python benchmarks/disk.py` on {machine}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the checkpoint, on a disk with 12 GB of room")
    parser.add_argument("--xfs", type=Path, help="a folder on a filesystem that shares blocks, with 5 GB of room")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--write", type=Path, help="a page to put the table into, between its marks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        model = make("qwen3-30b-a3b", folder / "model", layers=options.layers, experts=64, shard_bytes=700_000_000)
        more = shared(model, options.xfs) if options.xfs else {}
        found, start, size = measured(folder, model, options.runs)
        text = page(found, start, size, more, headers(folder))
    print(text)
    if options.json:
        rows = {name: [vars(t) for t in runs] for name, runs in found.items()}
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    if options.write:
        before, _, rest = options.write.read_text().partition(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
