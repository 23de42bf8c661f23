"""What `coterie report` measures: an original and what was made of it, on the same tokens; and the shape it comes in.

Every model is judged as by `eval`, paired with the original, and timed as by `bench`. Importing this module imports
torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Required, TypedDict, cast

from coterie.decide.abilities import abilities
from coterie.errors import CoterieError
from coterie.forward.data import read_all
from coterie.forward.documents import Document
from coterie.judge import paired, rounding
from coterie.judge.commands import Commands
from coterie.judge.facts import Digest, Facts, digest_of, overlaps, ways
from coterie.judge.judging import Judging
from coterie.judge.paired import Interval, Kept
from coterie.judge.quality import Judged, judge
from coterie.judge.speed import STEPS, Runner, Speeds, prompt_length
from coterie.judge.speed import measure as measure_speeds
from coterie.model import loading
from coterie.model.layer import Model
from coterie.model.loadable import check_whole
from coterie.reference_model import HELD_OUT
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.record import Progress, Stopwatch, part_of, versions
from coterie.storage.resumable import Resumable


class Speed(TypedDict):
    """Tokens per second of one sequence: medians between their 10th and 90th percentiles."""

    prefill: Interval
    decode: Interval
    relative_decode: float  # over that of the original
    prompt: int  # tokens
    new: int


class Measured(Judged, total=False):
    """A model of the report; or a reference, which has a "what", and of the facts its size alone."""

    name: Required[str]
    what: str
    makes: str  # the command that makes a reference, up to the groups and the dtype of scales
    ways: list[str]  # what was done to the original, in order, of `facts.WAYS`
    bytes: Required[int]
    parameters: int
    experts: dict[str, int] | None
    hash: str
    command: str | None
    sparsity: float | None
    kurtosis: dict[str, float]
    bits_per_parameter: Required[float]  # of the original
    mean: Required[Interval | None]  # loss over data sets
    cut: Required[dict[str, float]]  # by data set: the share of answers that were cut off
    fate: dict[str, list[int]]
    speed: Speed


class Comparison(TypedDict):
    """What `report` returns, but for where its page is."""

    models: list[Measured]  # the original first
    references: list[Measured]
    options: dict[str, object]
    notes: list[str]
    versions: dict[str, str]
    seconds: float
    peak_rss_bytes: int


@contextmanager
def side_by_side(
    named: Mapping[str, str | Path],
    files: Mapping[str, str | Path],
    options: Judging,
    on_progress: Progress,
    page: Path,
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[Lineup]:
    """The models to be measured, by name, on the held-out texts that ship where no files are given; and the run that
    keeps what is measured in PAGE.partial/, model by model, until it makes the page."""
    documents, notes = read_all(files or HELD_OUT)
    if not files:
        files = HELD_OUT
        notes = [f"no --data: judged on the held-out texts that ship with coterie ({', '.join(HELD_OUT)})"]
    asked = {**vars(options), "task_path": None, "data": {name: str(file) for name, file in files.items()}}
    digests = {name: digest_of(file) for name, file in files.items()}
    identity = {"command": "report", "options": asked, "digests": digests}
    identity |= {"source": {name: Checkpoint.open(path).hash for name, path in named.items()}}
    with Resumable(page, identity, resume=resume, replace=overwrite) as run:
        yield Lineup(dict(named), documents, digests, options, asked, run.start(on_progress), notes, run)


@dataclass
class Lineup:
    """The models to be measured, the first of which is the original; on what, how, and what has to be said about it."""

    named: dict[str, str | Path]
    documents: dict[str, list[Document]]
    digests: dict[str, Digest | None]  # of the data
    options: Judging
    asked: dict[str, object]  # the options as they are reported
    on_progress: Progress
    notes: list[str]
    run: Resumable
    original: Kept | None = None  # what its evaluation leaves to be compared
    parameters: int = 0  # of the original
    num_judged: int = 0
    clock: Stopwatch = field(default_factory=Stopwatch)

    def compare(self, *, speed: bool) -> Comparison:
        """All that is measured of the models."""
        with warnings_to(self.notes):
            models = self.models()
            references = self.references()
            if speed:
                self.add_speed(models)
            else:
                self.notes.append("speed was not measured: not asked for")
        return {
            "models": models,
            "references": references,
            "options": self.asked,
            "notes": _grouped(self.notes, [f"{path}: {name}: " for path in self.paths for name in self.digests]),
            "versions": versions(),
            **self.clock.read(),  # type: ignore[typeddict-item]
        }

    @property
    def paths(self) -> list[str | Path]:
        return list(self.named.values())

    def models(self) -> list[Measured]:
        """All models in order, those that cannot be loaded refused before any is judged."""
        facts = [Facts.of(path) for path in self.paths]
        for path in self.paths:
            check_whole(Checkpoint.open(path))
        paired.check_tokens(self.paths[0], self.paths[1:], self.documents)
        self.parameters = facts[0].parameters
        found = list[Measured]()
        for (name, path), fact in zip(self.named.items(), facts, strict=True):
            self.notes += [f"{name}: {note}" for note in fact.notes]
            self.notes += overlaps(name, fact.calibrated, self.digests)
            known = {"name": name, "ways": ways(path, facts[0].hash), **fact.as_dict()}
            found.append(self._measured(path, known, fact.bytes, self._load))
            if fate := self._fate(path, name) if len(found) > 1 else None:
                found[-1]["fate"] = fate
        return found

    def _judged(self, path: str | Path, load: Callable[[str | Path], Any]) -> tuple[Judged, Kept]:
        """The quality of the model that `load` gives for a path, and what a comparison needs; measured once, whatever
        interrupts the run."""
        number, self.num_judged = self.num_judged, self.num_judged + 1
        place = self.run.partial / f"judged-{number}.safetensors"
        told = part_of(self.on_progress, number, len(self.named) + 1)

        def measure() -> dict[str, Any]:
            first = len(self.notes)
            judged, kept = judge(path, self.documents, self.options, load, told)
            kept.save(place)
            notes, self.notes[first:] = self.notes[first:], []
            return {"judged": judged, "notes": notes}

        known = self.run.step(str(number), measure)
        self.notes += known["notes"]
        return known["judged"], Kept.load(place)

    def _load(self, path: str | Path) -> Any:
        return loading.load(path, dtype=self.options.dtype)

    def _measured(
        self, path: str | Path, known: dict[str, object], num_bytes: int, load: Callable[[str | Path], Any]
    ) -> Measured:
        """What is known, and the quality of the model that `load` gives."""
        judged, kept = self._judged(path, load)
        seed, losses = self.options.seed, {name: (sums, kept.counts[name]) for name, sums in kept.losses.items()}
        found = known | {"bits_per_parameter": 8 * num_bytes / self.parameters, **judged}
        found["mean"] = paired.mean_of_sets(losses, seed)
        found["cut"] = {name: float(cut.mean()) for name, cut in kept.cut.items()}
        if self.original is None:
            self.original = kept
        else:
            gains = {n: (sums - kept.losses[n], kept.counts[n]) for n, sums in self.original.losses.items()}
            pair = paired.compare(path, kept, self.paths[0], self.original, seed=seed)
            found["paired"] = {**pair, "mean": paired.mean_of_sets(gains, seed)}
        return cast(Measured, found)

    def _fate(self, path: str | Path, name: str) -> dict[str, list[int]] | None:
        """What became of the original's experts; nothing, with a note, where that is unknown."""
        reason = "no coterie.json leads back to the original"
        try:
            fate = paired.experts_fate(path, self.paths[0])
        except CoterieError as error:  # such as an original that is dense
            fate, reason = None, str(error)
        if fate is None:
            self.notes.append(f"{name}: no map of its experts: {reason}")
            return None
        return {key: list(levels) for key, levels in fate.levels.items()}

    def references(self) -> list[Measured]:
        """The original with its experts rounded to 4 bits; none, with a note, where that cannot be simulated."""
        path = self.paths[0]
        try:
            source = Model.open(path)
            num_bytes = rounding.rounded_bytes(source)
        except CoterieError as error:
            self.notes.append(f"no 4-bit reference: {error}")
            return []
        known: dict[str, object] = {"name": "4-bit experts (simulated)", "what": rounding.DESCRIPTION}
        commands = Commands(str(path), can=abilities(source))
        makes = commands.line("quantize", "OUT", "--bits", rounding.REFERENCE_BITS, "--method", "round")
        known |= {"makes": makes, "ways": ["quantised"], "bytes": num_bytes}
        try:
            return [
                self._measured(
                    path, known, num_bytes, lambda p: rounding.round_experts(self._load(p), len(source.main))
                )
            ]
        except CoterieError as error:
            self.notes.append(f"no 4-bit reference: {error}")
            return []

    def add_speed(self, models: list[Measured]) -> None:
        """Loads all models at once and measures them as `bench` does; where memory is short, says so instead."""
        short = loading.memory_short(sum(model["bytes"] for model in models))
        if short:
            self.notes.append(f"speed was not measured: all models in memory at once {short}")
            return
        runners = [Runner(str(path), loading.load(path, dtype=self.options.dtype).eval()) for path in self.paths]
        try:
            prompt, found = prompt_length(runners), measure_speeds(runners, [1], self.on_progress)
        except CoterieError as error:
            self.notes.append(f"speed was not measured: {error}")
            return
        for model, speeds in zip(models, found, strict=True):
            model["speed"] = _speed(speeds, found[0], prompt)


def _speed(found: Speeds, original: Speeds, prompt: int) -> Speed:
    prefill, decode = (by_batch["1"] for by_batch in (found["prefill"], found["decode"]))
    return {
        "prefill": {"value": prefill["50"], "low": prefill["10"], "high": prefill["90"]},
        "decode": {"value": decode["50"], "low": decode["10"], "high": decode["90"]},
        "relative_decode": decode["50"] / original["decode"]["1"]["50"],
        "prompt": prompt,
        "new": STEPS,
    }


@contextmanager
def warnings_to(notes: list[str]) -> Iterator[None]:
    """Takes what would be said aloud meanwhile for the notes, which the page and the command line show."""

    def note(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            notes.append(record.getMessage())
        return record.levelno < logging.WARNING

    logger = logging.getLogger("coterie")
    logger.addFilter(note)
    try:
        yield
    finally:
        logger.removeFilter(note)


def _grouped(notes: Sequence[str], prefixes: Sequence[str]) -> list[str]:
    """The notes, those that differ in their model and data set alone as one."""
    found: dict[str, list[str]] = {}
    for note in notes:
        prefix = next((p for p in prefixes if note.startswith(p)), "")
        found.setdefault(note.removeprefix(prefix), []).append(prefix)
    more = {rest: len(dict.fromkeys(where)) - 1 for rest, where in found.items()}
    return [
        where[0] + rest + (f" (and in {more[rest]} more of these evaluations)" if more[rest] else "")
        for rest, where in found.items()
    ]
