"""Show how far a run is, or was when it ended: what was asked, what is done, the rate, the time left.

Example: coterie status OUT
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from coterie.errors import CoterieError
from coterie.options import Help, public
from coterie.pages.terminal import Asked, known, table
from coterie.storage.folders import Folders, is_first, partial_of
from coterie.storage.journal import Entry, is_held, read_journal, shards_of, stamp
from coterie.storage.record import object_at, record_of

UNPACKED = (
    "the dense checkpoint is complete, and not packed yet; unless a process counts its zeros, add --resume to go on"
)
NUMBERS = ("began", "at", "written", "bytes", "files", "later", "of", "done", "total")  # in a journal's entries


@public
def status(
    out: Annotated[str | Path, Help("What a command was told to write, or its OUT.partial.", "OUT", given=Path)],
) -> dict[str, Any]:
    """What is under the name OUT: a complete result, or a run (OUT.partial may be named too).

    All of it is what the run itself wrote down (`storage/journal.py`), so it can be asked for at any time.

    Returns `path`, `state` (running, interrupted or complete), `command` and `options` as asked, and `alive`; of a
    run also
        pid               of the process that wrote last
        began, updated    times of its beginning and of the last entry, UTC
        stage             {"name", "done", "all"}: what was being done last, where that is no copying; null before
        files, layers     {"done", "all"}: files written, layers of the last pass ("all" is null until the first is)
        bytes             {"done", "all"}: what is copied or computed at once; layers come on top
        bytes_per_second  of the process that wrote last, while it copied; null before the first byte
        seconds_left      at the rate so far; null where nothing can be said yet
    Between the two steps of --save sparse nothing is written down: OUT.dense, complete, is then said to be interrupted,
    with a `note` of why, and `alive` is null.
    Raises: CoterieError when there is neither.
    """
    given = Path(out)
    try:
        named = given.name.endswith(".partial") and given.is_dir() and not partial_of(given).is_dir()
        # With --save sparse, the dense checkpoint is made first, beside OUT.
        dense = Folders(given).dense
        steps = (partial_of(given), partial_of(dense))
        for folder in (given,) if named else steps:
            if folder.is_dir():
                return _run(folder, read_journal(folder))
        if (found := record_of(given)) is not None:
            return _complete(given, found)
        if is_first(dense) and (found := record_of(dense)):
            return _complete(dense, found) | {"state": "interrupted", "alive": None, "note": UNPACKED}
    except (OSError, ValueError) as error:
        if isinstance(error, CoterieError):
            raise
        raise CoterieError(f"{str(given)!r:.200}: cannot be read ({error})") from error
    raise CoterieError(f"{given}: neither a result of coterie (no coterie.json) nor a run (no {given.name}.partial)")


def _complete(out: Path, found: Mapping[str, object]) -> dict[str, object]:
    return {
        "path": str(out),
        "state": "complete",
        "command": found.get("command"),
        "options": object_at(found, "options"),
        "alive": False,
        "seconds": _number(object_at(found, "report").get("seconds")),
    }


@dataclass(frozen=True)
class JournalLine:
    """An entry of the journal; None for what it does not say, or where a damaged one says no sensible number."""

    began: float | None
    at: float | None
    written: int | None
    bytes: int | None
    files: int | None
    later: int | None
    of: int | None
    done: int | None
    total: int | None
    pid: object
    stage: object
    is_shard: bool
    layer_of: object  # the pass that a finished layer belongs to

    @classmethod
    def read(cls, entry: Entry) -> JournalLine:
        numbers = {name: _number(entry.get(name)) for name in NUMBERS}
        is_layer = isinstance(entry.get("unit"), dict) and numbers["of"] is not None
        return cls(
            **numbers,
            pid=entry.get("pid"),
            stage=entry.get("stage"),
            is_shard="shard" in entry,
            layer_of=object_at(entry, "unit").get("pass", "") if is_layer else None,
        )

    @property
    def is_layer(self) -> bool:
        return self.layer_of is not None


def _run(folder: Path, entries: list[Entry]) -> dict[str, object]:
    """The status of a folder that is being written, or that an ended run left."""
    asked = object_at(entries[0], "asked") if entries else {}
    lines, alive = [JournalLine.read(entry) for entry in entries], is_held(folder)
    begun = [number for number, line in enumerate(lines) if line.began is not None]
    process = lines[begun[-1] :] if begun else [JournalLine.read({})]  # what the last one wrote
    first = process[0]
    layers, stages = _last_pass(lines), [line for line in process if isinstance(line.stage, str)]
    # A file that was cut short is written again, so its bytes count only while somebody writes it.
    counted = lines if alive else [line for line in lines if line.began is not None or line.is_shard]
    done = int(next((line.written for line in reversed(counted) if line.written is not None), 0))
    times = [seconds for line in lines for seconds in (line.at, line.began) if seconds is not None]
    updated = times[-1] if times else time.time() if alive and not entries else None
    rate = _rate(process)
    missing = None if first.bytes is None else max(0, first.bytes - done)
    return {
        "path": str(folder),
        "state": "running" if alive else "interrupted",
        "command": asked.get("command"),
        "options": object_at(asked, "options"),
        "alive": alive,
        "pid": first.pid,
        "began": _shown(first.began),
        "updated": _shown(updated),
        "stage": {"name": stages[-1].stage, "done": stages[-1].done, "all": stages[-1].total} if stages else None,
        "files": {"done": len(shards_of(entries)), "all": first.files},
        "layers": {"done": len(layers), "all": layers[-1].of if layers else None},
        "bytes": {"done": done, "all": first.bytes},
        "bytes_per_second": rate,
        "seconds_left": _left(lines, missing, rate, has_later=bool(first.later)),
    }


def _last_pass(lines: list[JournalLine]) -> list[JournalLine]:
    """The layers that are finished of the pass through the model that was noted last."""
    layers = [line for line in lines if line.is_layer]
    return [line for line in layers if line.layer_of == layers[-1].layer_of]


def _left(lines: list[JournalLine], missing: int | None, rate: float | None, *, has_later: bool) -> float | None:
    """Seconds: what is left of bytes and of layers, each at its own rate. has_later: layers follow the copying."""
    if missing is None or (missing and not rate):
        return None
    left = missing / rate if missing and rate else 0.0
    if not has_later:
        return left
    layers, seconds = _last_pass(lines), _seconds_per_layer(lines)
    if seconds is None or layers[-1].of is None:
        return None
    return left + seconds * max(0, layers[-1].of - len(layers))


def _seconds_per_layer(lines: list[JournalLine]) -> float | None:
    """The mean, over layers that followed another one, or a file, in the same process."""
    times: list[float] = []
    before: float | None = None
    for line in lines:
        if line.began is not None:
            before = None
        if line.is_layer and line.at is not None and before is not None:
            times.append(line.at - before)
        if line.is_shard or (line.is_layer and line.at is not None):
            before = line.at
    return sum(times) / len(times) if times else None


def _rate(process: list[JournalLine]) -> float | None:
    """Bytes per second since a process began, until it last said how far it was."""
    began, kept = process[0].began, process[0].written or 0
    said = [(line.at, line.written) for line in process[1:] if line.at is not None and line.written is not None]
    if began is None or not said or said[-1][0] <= began or said[-1][1] <= kept:
        return None
    return (said[-1][1] - kept) / (said[-1][0] - began)


def _number(value: Any) -> Any:
    """A sensible number, or nothing."""
    return value if type(value) in (int, float) and 0 <= value < 2**63 else None


def _shown(seconds: float | None) -> str | None:
    return None if seconds is None or seconds > 2**35 else stamp(seconds)


def show(found: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    """What was asked, and how far it is."""
    rows = [("command", f"coterie {found['command']}")]
    rows += [(f"  {name}", f"{value}") for name, value in found["options"].items() if value not in (None, "", {})]
    if "bytes" in found:
        rows += [("process", f"{found['pid']}, {'alive' if found['alive'] else 'gone'}")]
        rows += [("began", f"{found['began']}"), ("last heard of", f"{found['updated']}")]
        stage = found["stage"]
        rows += [(stage["name"], f"{known(stage['done'])} of {known(stage['all'])}")] if stage else []
        rows += [(kind, f"{found[kind]['done']:,} of {known(found[kind]['all'])}") for kind in ("files", "bytes")]
        rows += [("layers", f"{found['layers']['done']:,} of {known(found['layers']['all'])}")]
        rows += [("MB per second", known(found["bytes_per_second"], 1e6))]
        rows += [("seconds left", known(found["seconds_left"]))]
    rows += [("note", found["note"])] if "note" in found else []
    return table(f"{found['path']}: {found['state']}", rows)
