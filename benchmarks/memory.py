"""Peak memory and time of whole commands on a checkpoint far larger than the memory they may take.

    python benchmarks/memory.py [--samples 8] [--seq-len 512] [--folder /tmp] [--json FILE]

Makes a checkpoint of 12.6 GB in Mixtral's form with experts of 88 MB, prunes it by each command in a process of its
own, and removes everything again; twice the checkpoint's size must be free. The page cache gives the checkpoint up
before each command, so that its bytes come from the disk. The exit code is 1 where a command takes more than `--limit`
bytes of memory, or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synthetic import MODELS, make, resized, write_data
from tables import markdown

COTERIE = (sys.executable, "-W", "ignore", "-m", "coterie")
MODEL = "mixtral-8x7b"
SPARSITY = 0.4
SAMPLE_EVERY = 0.05  # seconds


def commands(data: Path, samples: int, seq_len: int) -> dict[str, list[object]]:
    """Name in the table -> what follows `coterie`, without MODEL and OUT."""
    calibrated = ["--sparsity", SPARSITY, "--data", f"ids={data}", "--samples", samples, "--seq-len", seq_len]
    return {
        "prune": ["prune", "--ratio", 0.25],
        "sparsify magnitude": ["sparsify", "--method", "magnitude", "--sparsity", SPARSITY],
        "sparsify wanda": ["sparsify", "--method", "wanda", *calibrated],
        "stun": ["stun", *calibrated],
    }


def measured(command: list[str]) -> dict[str, Any]:
    """Runs a command to its end.

    Returns seconds, processor seconds, the kernel's peak of resident bytes, and the sampled peaks of its parts:
    memory of its own (anonymous) and mapped files. Raises: SystemExit when the command fails.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors, text=True)
        peaks: dict[str, int] = {"RssAnon": 0, "RssFile": 0}
        watcher = threading.Thread(target=lambda: watch(process.pid, peaks))
        watcher.start()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        watcher.join()
        errors.seek(0)
        said.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{errors.read()[-2000:]}")
        report = json.load(said)["report"]
    return {
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_bytes": used.ru_maxrss * 1024,  # Linux counts KiB
        "peak_anonymous_bytes": peaks["RssAnon"],
        "peak_mapped_bytes": peaks["RssFile"],
        "report_peak_bytes": report["peak_rss_bytes"],
        "bytes_out": report["after"]["bytes"],
        "experts_sparsity": report["sparsity"]["experts"],
    }


def watch(pid: int, peaks: dict[str, int]) -> None:
    """Raises `peaks` to what /proc says of the process, until it ends."""
    while found := dict(resident(pid)):
        for kind in peaks:
            peaks[kind] = max(peaks[kind], found.get(kind, 0))
        time.sleep(SAMPLE_EVERY)


def resident(pid: int) -> Iterator[tuple[str, int]]:
    """(kind, bytes) of a living process's resident memory; nothing of a dead one."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        kind, _, value = line.partition(":")
        if kind.startswith("Rss"):
            yield kind, int(value.split()[0]) * 1024


def forget(folder: Path) -> None:
    """Asks the page cache to give up a folder's files."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run_all(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Makes the checkpoint in `folder` and measures the commands asked for."""
    sizes = {"layers": options.layers, "experts": options.experts, "intermediate": options.intermediate}
    out, began = folder / "out", time.monotonic()
    model = make(MODEL, folder / "model", **sizes)
    num_bytes = sum(path.stat().st_size for path in model.iterdir())
    print(f"{num_bytes / 1e9:.1f} GB written in {time.monotonic() - began:.0f} s", file=sys.stderr)
    data = write_data(
        folder / "ids.jsonl", vocabulary=resized(MODELS[MODEL][0])["vocab_size"], samples=options.samples,
        seq_len=options.seq_len,
    )  # fmt: skip
    for name, arguments in commands(data, options.samples, options.seq_len).items():
        if options.commands and name not in options.commands:
            continue
        forget(model)
        verb, *rest = map(str, arguments)
        row = {
            "command": name,
            "bytes_in": num_bytes,
            **measured([*COTERIE, verb, str(model), str(out), *rest, "--json"]),
        }
        print(json.dumps(row), file=sys.stderr, flush=True)
        yield row
        shutil.rmtree(out)


def table(rows: list[dict[str, Any]]) -> str:
    head = ["", "time", "processor", "peak memory", "of its own", "read", "written", "expert weights gone"]
    lines = [
        (
            row["command"], f"{row['seconds']:.0f} s", f"{row['processor_seconds']:.0f} s",
            f"{row['peak_bytes'] / 1e9:.2f} GB", f"{row['peak_anonymous_bytes'] / 1e9:.2f} GB",
            f"{row['bytes_in'] / 1e9:.1f} GB", f"{row['bytes_out'] / 1e9:.1f} GB", f"{row['experts_sparsity']:.1%}",
        )
        for row in rows
    ]  # fmt: skip
    return markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=3584, help="3 x 4096 x 3584 bf16 weights are 88 MB")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--commands", nargs="+", choices=commands(Path(), 1, 1), help="only these")
    parser.add_argument("--limit", type=float, default=3e9, help="bytes of peak resident memory")
    parser.add_argument("--folder", type=Path, help="where to make the checkpoint, on a disk with room")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = list(run_all(Path(folder), options))
    print(table(rows))
    print(f"\nCalibrated on {options.samples} samples of {options.seq_len} tokens.")
    if options.json:
        setting = {"samples": options.samples, "seq_len": options.seq_len, "threads": os.environ.get("OMP_NUM_THREADS")}
        options.json.write_text(json.dumps(setting | {"runs": rows}, indent=2) + "\n")
    sys.exit(max(row["peak_bytes"] for row in rows) > options.limit)


if __name__ == "__main__":
    main()
