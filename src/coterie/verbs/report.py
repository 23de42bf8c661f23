"""Quality against bytes against speed: one page with plots and tables, which opens without a network.

Example: coterie report MODEL OUT1 OUT2 -o report.html --data prose=prose.txt
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from coterie.codecs.open import opened
from coterie.edits.kurtosis import of_experts
from coterie.errors import CoterieError
from coterie.forward.data import MAX_DATA, Document, read_documents
from coterie.forward.samples import DTYPE
from coterie.judge.judging import Files, Judging, judged_files
from coterie.model.family import names_experts
from coterie.model.layer import Model
from coterie.options import Help, public
from coterie.pages.report import render
from coterie.pages.terminal import Asked, interval, table
from coterie.reference_model import HELD_OUT
from coterie.storage.checkpoint import Checkpoint, resolve
from coterie.storage.files import check_new_file, write_whole
from coterie.storage.record import Progress, Stopwatch, no_progress, object_at, record_of, typed, versions

LONGEST = 400  # characters of a command that are shown
Digest = tuple[int, str]  # bytes of a file, and their hash


# Nothing is hidden for looks: what was not measured is said. Numbers are gathered here; `pages/report.py` lays them out.
@public
def report(
    models: Annotated[
        str | Path | Sequence[str | Path],
        Help("The original first, then what was made of it.", "MODEL...", given=list[str]),
    ],
    out: Annotated[str | Path, Help("The page to write; must not exist.", "FILE", flags=("--out", "-o"), given=Path)],
    *,
    data: Annotated[
        Files,
        Help(
            "As for eval; repeatable [default: texts that ship].",
            "NAME=FILE",
            given=list[str],
            read=judged_files,
            default=(),
        ),
    ],
    judging: Annotated[Judging, {"tasks": None, "task_path": None, "dtype": DTYPE}],
    speed: Annotated[bool, Help("Do not measure tokens per second.")] = True,
    overwrite: Annotated[bool, Help("Replace FILE.")] = False,
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measures the models, the first of which is the original, and writes one self-contained HTML page to `out`.

    data, window, stride, batch_size, max_new_tokens, dtype, seed: as in `eval`; without data, the held-out texts that
    ship are judged. speed: whether to measure tokens per second, for which all models are in memory at once.
    Returns what the page shows: `{"models": [...], "references": [...], "options", "notes", "versions", "seconds",
    ...}`. A model has "name", "path", "bytes", "parameters", "bits_per_parameter" (8 bytes / the original's
    parameters), "experts" (by layer; None: unknown), "mean" (loss, nats per token, mean over data sets), "cut" (share
    of answers cut off), "perplexity" and "exact_match" as `eval` has them; where it applies "paired" (as `eval
    --against` has it, with "mean"), "fate" (of the original's experts), "kurtosis", "sparsity", "speed". `references`
    holds the original with experts rounded to 4 bits.
    Raises: CoterieError for bad options, data or models, and when `out` exists (unless `overwrite`) or is no place.
    """
    paths = [models] if isinstance(models, str | Path) else list(models)
    if not paths:
        raise CoterieError("no model was given; expected the original first, then what was made of it")
    clock, target = Stopwatch(), Path(out)
    check_new_file(target, overwrite)
    files: Files = data or HELD_OUT
    work = Work(paths, judging, on_progress)
    if not data:
        work.notes.append(f"no --data: judged on the held-out texts that ship with coterie ({', '.join(HELD_OUT)})")
    documents = {name: list(read_documents(file, work.notes)) for name, file in files.items()}
    with _warnings_to(work.notes):
        entries = work.entries(documents, files)
        references = work.references(documents)
        if speed:
            work.add_speed(entries)
        else:
            work.notes.append("speed was not measured: not asked for")
    found = {
        "models": entries,
        "references": references,
        "options": {**vars(judging), "task_path": None, "data": {name: str(file) for name, file in files.items()}},
        "notes": _grouped(work.notes, [f"{path}: {name}: " for path in paths for name in files]),
        "versions": versions(),
        **clock.read(),
    }
    write_whole(target, lambda partial: partial.write_text(render(found), encoding="utf-8"))
    return {"out": str(out), **found}


@dataclass
class Work:
    """The models to be measured, how, and what has to be said about it."""

    paths: list[str | Path]
    options: Judging
    on_progress: Progress
    notes: list[str] = field(default_factory=list)
    original: Any = None  # what the original's evaluation leaves to be compared
    parameters: int = 0  # of the original

    def entries(self, documents: dict[str, list[Document]], files: Files) -> list[dict[str, Any]]:
        """One entry per model, in order."""
        from coterie.judge import paired

        facts = [_facts(path) for path in self.paths]
        names = _names(self.paths)
        paired.check_tokens(self.paths[0], self.paths[1:], documents)
        self.parameters, digests = facts[0]["parameters"], {name: _digest(file) for name, file in files.items()}
        found = []
        for path, name, fact in zip(self.paths, names, facts, strict=True):
            self.notes += [f"{name}: {note}" for note in fact.pop("notes")]
            self.notes += _overlaps(name, fact.pop("data"), digests)
            entry, kept = self._judged(path, documents)
            found.append({"name": name, **fact, "bits_per_parameter": self._bits(fact["bytes"]), **entry})
            if self.original is None:
                self.original = kept
            else:
                found[-1] |= self._compared(path, name, kept)
        return found

    def _bits(self, num_bytes: int) -> float:
        return 8 * num_bytes / self.parameters

    def _judged(self, path: str | Path, documents: dict[str, list[Document]], load: Any = None) -> tuple[Any, Any]:
        from coterie.judge import paired
        from coterie.judge.quality import judge
        from coterie.model import loading

        load = load or (lambda place: loading.load(place, dtype=self.options.dtype))
        entry, kept = judge(path, documents, self.options, load, self.on_progress)
        losses = {name: (sums, kept.counts[name]) for name, sums in kept.losses.items()}
        cut = {name: float(found.mean()) for name, found in kept.cut.items()}
        return {**entry, "mean": paired.mean_of_sets(losses, self.options.seed), "cut": cut}, kept

    def _compared(self, path: str | Path, name: str, kept: Any) -> dict[str, Any]:
        """What pairs a model with the original, and what became of the original's experts in it."""
        from coterie.judge import paired

        pair = self._paired(path, kept)
        try:
            fate = paired.experts_fate(path, self.paths[0])
            reason = "no coterie.json leads back to the original"
        except CoterieError as error:  # such as an original that is dense
            fate, reason = None, str(error)
        if fate is None:
            self.notes.append(f"{name}: no map of its experts: {reason}")
            return {"paired": pair}
        return {"paired": pair, "fate": {key: list(levels) for key, levels in fate.levels.items()}}

    def _paired(self, path: str | Path, kept: Any) -> dict[str, Any]:
        from coterie.judge import paired

        seed = self.options.seed
        gains = {n: (sums - kept.losses[n], kept.counts[n]) for n, sums in self.original.losses.items()}
        pair = paired.compare(path, kept, self.paths[0], self.original, seed=seed)
        return {**pair, "mean": paired.mean_of_sets(gains, seed)}

    def references(self, documents: dict[str, list[Document]]) -> list[dict[str, Any]]:
        """The original with its experts rounded to 4 bits; none, with a note, where that cannot be simulated."""
        from coterie.judge import rounding
        from coterie.model import loading

        path = self.paths[0]
        try:
            source = Model.open(path)
            num_bytes = rounding.rounded_bytes(source)
            model = rounding.round_experts(loading.load(path, dtype=self.options.dtype), len(source.main))
        except CoterieError as error:
            self.notes.append(f"no 4-bit reference: {error}")
            return []
        entry, kept = self._judged(path, documents, lambda _: model)
        pair = self._paired(path, kept)
        size = {"bytes": num_bytes, "bits_per_parameter": self._bits(num_bytes)}
        return [{"name": "4-bit experts (simulated)", "what": rounding.DESCRIPTION, **size, **entry, "paired": pair}]

    def add_speed(self, entries: list[dict[str, Any]]) -> None:
        """Loads all models at once and measures them as `bench` does; where memory is short, says so instead."""
        from coterie.judge.speed import STEPS, Runner, measure, prompt_length
        from coterie.model import loading

        short = loading.memory_short(sum(entry["bytes"] for entry in entries))
        if short:
            self.notes.append(f"speed was not measured: all models in memory at once {short}")
            return
        runners = [Runner(str(path), loading.load(path, dtype=self.options.dtype).eval()) for path in self.paths]
        try:
            size = {"prompt": prompt_length(runners), "new": STEPS}
            found = measure(runners, [1], self.on_progress)
        except CoterieError as error:
            self.notes.append(f"speed was not measured: {error}")
            return
        for entry, speeds in zip(entries, found, strict=True):
            entry["speed"] = _speed(speeds, found[0]) | size


def _speed(found: dict[str, Any], original: dict[str, Any]) -> dict[str, Any]:
    """What `bench` measured of one sequence: medians between their 10th and 90th percentiles, and against the first."""
    single = {kind: by_batch["1"] for kind, by_batch in found.items()}
    spread: dict[str, Any] = {k: {"value": q["50"], "low": q["10"], "high": q["90"]} for k, q in single.items()}
    return spread | {"relative_decode": single["decode"]["50"] / original["decode"]["1"]["50"]}


def show(found: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    """Bytes and loss of every model on the page."""
    entries = [*found["models"], *found["references"]]
    shown = [f"{m['bytes']:,} bytes" + (f", loss {interval(m['mean'])}" if m["mean"] else "") for m in entries]
    title = f"{asked['out']}: written in {found['seconds']:.1f} s"
    return table(title, list(zip((m["name"] for m in entries), shown, strict=True)))


# What headers and records say


def _facts(path: str | Path) -> dict[str, Any]:
    """Sizes, fingerprint, and what the model's coterie.json recorded; a record's numbers are checked, not trusted."""
    folder = resolve(path)
    checkpoint = Checkpoint.open(folder)
    view = opened(checkpoint)
    record = record_of(folder) or {}
    made, options = object_at(record, "report"), object_at(record, "options")
    sparsity = _number(object_at(made, "sparsity").get("experts"))
    stages = object_at(made, "kurtosis").items()
    recorded = {str(stage): n for stage, value in stages if (n := _number(value)) is not None}
    experts, kurtosis, notes = _experts(view, recorded)
    return {
        "bytes": checkpoint.num_bytes,
        "parameters": view.num_parameters,
        "experts": experts,
        "hash": checkpoint.hash,
        "command": _command(record.get("command"), options),
        "sparsity": sparsity,
        "kurtosis": kurtosis,
        "data": object_at(options, "data"),
        "notes": notes,
    }


def _experts(view: Checkpoint, recorded: dict[str, float]) -> tuple[dict[str, int] | None, dict[str, float], list[str]]:
    """Experts by layer, none where no layer has any left; None, and a note, where they are not understood. And the
    kurtosis of their weights by stage: as recorded, or else, which takes reading them all, as it is."""
    if not names_experts(view.tensors):
        return {}, recorded, []
    try:
        model = Model.of(view)
    except CoterieError as error:
        return None, recorded, [f"how many experts its layers have is unknown: {error}"]
    counts = {b.key: b.num_experts for b in model.main}
    try:
        found = None if recorded else of_experts(model)
    except CoterieError as error:  # rounded, or in a coding that is not read
        return counts, {}, [f"the kurtosis of its experts' weights is unknown: {error}"]
    return counts, recorded if found is None else {"as it is": found}, []


def _command(command: Any, options: dict[str, Any]) -> str | None:
    """The command as one would type it, from a record."""
    text = typed(command, options) if isinstance(command, str) else None
    return f"{text[:LONGEST]} [...]" if text and len(text) > LONGEST else text


def _names(paths: Sequence[str | Path]) -> list[str]:
    """A name for each model, all different: its folder's; with what stands above it, or a number, where two agree."""
    names = [Path(path).resolve().name if Path(path).is_dir() else str(path) for path in paths]
    names = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _overlaps(name: str, calibrated: dict[str, Any], digests: dict[str, Digest | None]) -> list[str]:
    """A note for each file that the model was calibrated on and is judged on."""
    sizes = {digest[0] for digest in digests.values() if digest}
    seen = {_digest(file, sizes): file for file in calibrated.values() if isinstance(file, str)}
    return [
        f"{name}: was calibrated on {seen[digest]}, which it is judged on as {data!r}: expect too good a result"
        for data, digest in digests.items()
        if digest is not None and digest in seen
    ]


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


def _digest(file: str | Path, sizes: Container[int] = range(1, MAX_DATA + 1)) -> Digest | None:
    """Size and hash of a regular file of such a size; nothing for anything else: a record may name any file here."""
    try:
        path = Path(file)
        size = path.stat().st_size if path.is_file() else 0
        if size not in sizes:
            return None
        with path.open("rb") as opened:
            return size, hashlib.file_digest(opened, "sha256").hexdigest()
    except (OSError, ValueError):
        return None


def _number(value: Any) -> float | None:
    """A finite number, or nothing."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value) else None


@contextlib.contextmanager
def _warnings_to(notes: list[str]) -> Iterator[None]:
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
