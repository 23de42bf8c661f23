"""`python benchmarks/first_day.py`: walks the README's list in a fresh folder; prints what each command took and said.

Commands run as printed, in their order, by a shell. MODEL is the shipped reference model, FILE the beginning of a
held-out text. `--write docs/results.md` puts the table there.
"""

import argparse
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from calibration import processor
from coterie.reference_model import HELD_OUT, MODEL
from results import PAGE, README, write_between
from tables import markdown

CHARACTERS = 10_000  # of FILE
WIDTH = 90  # characters shown of a line
HEAD = ["command", "seconds", "MB", "says first"]


def listed(readme: str) -> list[str]:
    """The commands under "Use it", without what is said of them."""
    section = readme.split("\n## Use it\n")[1].split("\n## ")[0]
    lines = [
        line for block in re.findall(r"^```\n(.*?)^```", section, flags=re.M | re.S) for line in block.splitlines()
    ]
    return [line.partition("  #")[0].strip() for line in lines]


def furnish(folder: Path) -> None:
    """What the list takes for granted: MODEL and FILE."""
    (folder / "MODEL").symlink_to(MODEL)
    (folder / "FILE").write_text(HELD_OUT["prose"].read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")


def walked(command: str, folder: Path) -> list[object]:
    """Runs a line in a shell: the line, seconds, peak megabytes, and the first two lines that it printed."""
    said, began = folder / "said", time.monotonic()
    with said.open("w") as out:
        process = subprocess.Popen(["bash", "-c", command], cwd=folder, stdout=out, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command}: exit code {os.waitstatus_to_exitcode(status)}")
    first = [line.strip()[:WIDTH] for line in said.read_text().splitlines() if line.strip()][:2]
    shown = re.sub(" +", " ", " / ".join(first)).replace("|", r"\|")
    return [f"`{re.sub(' +', ' ', command)}`", time.monotonic() - began, used.ru_maxrss * 1024 // 10**6, shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/results.md")
    options = parser.parse_args()
    cores, load, rows = os.cpu_count(), os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as place:
        furnish(Path(place))
        for command in listed(README.read_text(encoding="utf-8")):
            rows.append(walked(command, Path(place)))
            print(*rows[-1], sep=" | ", flush=True)
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    seconds = sum(float(str(row[1])) for row in rows)
    note = (
        f"{processor()}, {cores} cores, threads: {threads}, load {load:.1f} at the beginning; {seconds:.0f} s in all."
    )
    table = f"{markdown(HEAD, rows)}\n\n{note}"
    if options.write:
        write_between(PAGE, "first-day", table)
    print(f"\n{table}")


if __name__ == "__main__":
    main()
