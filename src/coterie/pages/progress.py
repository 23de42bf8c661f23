"""How far a command is: one bar for all of its stages on a terminal, elsewhere a line of text every half minute.

Stages tell of themselves one after the other, each with a total of its own. What share of the time each takes was
measured; from those shares and the time that passed comes the time that is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from coterie.pages.terminal import sized

EVERY = 30.0  # seconds between two lines
SOON = 2.0  # seconds before which, and
LITTLE = 0.02  # share of the work before which, nothing is said of the time that is left
# Stages in order and their shares of the time, measured on the reference model (`benchmarks/stages.py`). Those that a
# run does not have are passed over; a command with one stage, or an unknown one, needs no entry.
SHARES: Mapping[str, Mapping[str, float]] = {
    "prune": {
        "measuring layers": 0.90, "scoring experts": 0.03, "choosing representatives": 0.03,
        "trying sets of experts": 0.90, "writing": 0.07,
    },
    "stun": {
        "choosing representatives": 0.02, "measuring layers": 0.30, "writing": 0.10, "measuring outliers": 0.35,
        "pruning layers": 0.51, "counting zeros": 0.02, "packing": 0.06,
    },
    "sparsify": {
        "writing": 0.20, "measuring outliers": 0.30, "pruning layers": 0.70, "counting zeros": 0.02, "packing": 0.06,
    },
    "quantize": {"measuring widths": 0.4, "writing": 0.02, "quantising layers": 0.98},
    "merge": {"measuring layers": 0.97, "writing": 0.03},
    "condense": {"measuring layers": 0.57, "searching layers": 0.26, "fitting layers": 0.13, "writing": 0.04},
    "recover": {
        "writing": 0.03, "recovering (closed form)": 0.20, "recovering (local)": 0.25, "recovering (distill)": 0.52,
        "recovering (lm)": 0.52,
    },
    "drop": {"comparing layers": 0.87, "searching layers": 0.5, "writing": 0.13},
    "pack": {"counting zeros": 0.16, "writing": 0.14, "packing": 0.70},
    "unpack": {"checking packed tensors": 0.6, "writing": 0.4},
    "verify": {"comparing bytes": 0.2, "verifying": 0.8},
    "report": {"judging": 0.8, "measuring whole models": 0.2},
    "bench": {"measuring whole models": 0.75, "measuring kernels": 0.25},
}  # fmt: skip


class Gauge:
    """The stages of a command as one share of the whole, which never falls."""

    def __init__(self, shares: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._shares, self._clock = shares, clock
        self._began = self._stage_began = clock()
        self._passed, self._at, self._lead = 0.0, 0, 0.0  # shares of finished stages; of the stage, and its own share
        self.stage, self.done, self.total = "", 0, 0
        self.share = 0.0

    def advance(self, stage: str, done: int, total: int) -> None:
        """Is told, as `on_progress`, that `done` of a stage's `total` is done."""
        if stage != self.stage:
            self._enter(stage)
        self.stage, self.done, self.total = stage, done, total
        within = done / total if total else 1.0
        self.share = max(self.share, min(1.0, (self._passed + self._lead * within) / self._whole()))

    def _enter(self, stage: str) -> None:
        """Stages before this one in the table are over, whether they were met or not."""
        self._stage_began = self._clock()
        names = [*self._shares]
        name = stage.partition(",")[0]  # what follows says which of several: "searching layers, round 2"
        if name in names and name != self.stage.partition(",")[0]:
            place = names.index(name)
            if place < self._at:  # a stage that comes a second time, such as writing
                return
            self._passed += self._lead
            self._at, self._lead = place, self._shares[name]
        elif not names:
            self._lead = 1.0

    def _whole(self) -> float:
        """The shares of what was met and of what may come."""
        return max(self._passed + self._lead + sum([*self._shares.values()][self._at + 1 :]), 1e-9)

    @property
    def elapsed(self) -> float:
        return self._clock() - self._began

    @property
    def left(self) -> str:
        """About how long the rest takes at the pace so far; empty while that is a guess."""
        if self.share < LITTLE or self.elapsed < SOON or self.share >= 1:
            return ""
        return f"about {spelled(self.elapsed * (1 - self.share) / self.share)} left"

    @property
    def amount(self) -> str:
        """How much of how much in this stage, and how fast where it is bytes."""
        if not self.stage or self.stage.startswith("judging"):
            return ""
        if self.stage != "writing":
            return f"{self.done:,} of {self.total:,}"
        seconds = self._clock() - self._stage_began
        rate = f", {self.done / seconds / 1e6:,.0f} MB/s" if seconds > 1 else ""
        return f"{sized(self.done)} of {sized(self.total)}{rate}"

    def line(self) -> str:
        """37 % · measuring layers, 12 of 32 · about 4 min left"""
        what = ", ".join(filter(None, (self.stage or "starting", self.amount)))
        return " · ".join(filter(None, (f"{100 * self.share:.0f} %", what, self.left)))


def spelled(seconds: float) -> str:
    """A duration as one says it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def shown(command: str, watched: bool, say: Callable[[str], None]) -> Iterator[Callable[[str, int, int], None]]:
    """Yields an `on_progress` for the command; what it tells is a bar on standard error where somebody watches that,
    else a line for `say` every `EVERY` seconds."""
    gauge = Gauge(SHARES.get(command, {}))
    with _bar(gauge) if watched else _lines(gauge, say) as advance:
        yield advance


@contextmanager
def _lines(gauge: Gauge, say: Callable[[str], None]) -> Iterator[Callable[[str, int, int], None]]:
    over = threading.Event()

    def speak() -> None:
        while not over.wait(EVERY):
            say(gauge.line())

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield gauge.advance
    finally:
        over.set()
        speaker.join()


@contextmanager
def _bar(gauge: Gauge) -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %")]
    columns += [TextColumn("{task.fields[amount]}"), TimeElapsedColumn(), TextColumn("{task.fields[left]}")]
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("starting", total=1.0, amount="", left="")

        def advance(stage: str, done: int, total: int) -> None:
            gauge.advance(stage, done, total)
            bars.update(task, description=stage, completed=gauge.share, amount=gauge.amount, left=gauge.left)

        yield advance
        bars.update(task, completed=1.0, left="")
