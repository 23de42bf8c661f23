"""Show how far a run is, or was when it ended: what was asked, what is done, the rate, the time left.

Example: coterie status OUT
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from coterie.errors import CoterieError
from coterie.options import Help, public
from coterie.pages.terminal import Asked, known, table
from coterie.storage.journal import is_held, read_journal, shards_of, stamp
from coterie.storage.record import object_at, record_of
from coterie.storage.steps import Folders, is_first
from coterie.storage.writer import partial_of

UNPACKED = (
    "the dense checkpoint is complete, and not packed yet; unless a process counts its zeros, add --resume to go on"
)
Entry = Mapping[str, object]  # a line of a journal, or a record, in which anything may stand
Entries = Sequence[Entry]


@dataclass(frozen=True)
class Done:
    """How much of something is done, and of how much; None where that is not known yet."""

    done: int
    all: int | None


NONE = Done(0, 0)  # of layers, where nothing is filled in after copying


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
        files, layers     {"done", "all"}: files written, layers pruned in place ("all" is null until the first is)
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


def _complete(out: Path, found: Entry) -> dict[str, object]:
    return {
        "path": str(out),
        "state": "complete",
        "command": found.get("command"),
        "options": object_at(found, "options"),
        "alive": False,
        "seconds": _number(object_at(found, "report").get("seconds")),
    }


def _run(folder: Path, entries: Entries) -> dict[str, object]:
    """Of a folder that is being written, or that an ended run left."""
    asked = object_at(entries[0], "asked") if entries else {}
    begun = [i for i, e in enumerate(entries) if _number(e.get("began")) is not None]
    last = entries[begun[-1]] if begun else {}
    alive = is_held(folder)
    layers = [e for e in entries if isinstance(e.get("unit"), dict)]
    # A file that was cut short is written again, so its bytes count only while somebody writes it.
    counted = entries if alive else [e for e in entries if "began" in e or "shard" in e]
    copied = Done(int(_last(counted, "written") or 0), _number(last.get("bytes")))
    solved = Done(len(layers), _number(layers[-1].get("of")) if layers else None)
    rate, later = _rate(entries[begun[-1] :]) if begun else None, bool(last.get("later"))
    return {
        "path": str(folder),
        "state": "running" if alive else "interrupted",
        "command": asked.get("command"),
        "options": object_at(asked, "options"),
        "alive": alive,
        "pid": last.get("pid"),
        "began": _shown(_number(last.get("began"))),
        "updated": _shown(time.time() if alive and not entries else _last(entries, "at", "began")),
        "files": vars(Done(len(shards_of(entries)), _number(last.get("files")))),
        "layers": vars(solved),
        "bytes": vars(copied),
        "bytes_per_second": rate,
        "seconds_left": _left(copied, rate, solved if later else NONE, _seconds_per_layer(entries) if later else 0.0),
    }


def _left(copied: Done, rate: float | None, solved: Done, seconds: float | None) -> float | None:
    """Seconds: what is left of bytes at a rate, and of layers, which take some seconds each."""
    if copied.all is None or solved.all is None or seconds is None:
        return None
    missing = max(0, copied.all - copied.done)
    if missing and not rate:
        return None
    return (missing / rate if missing and rate else 0.0) + seconds * max(0, solved.all - solved.done)


def _seconds_per_layer(entries: Entries) -> float | None:
    """The mean, over layers that followed another one in the same process."""
    times: list[float] = []
    before: float | None = None
    for entry in entries:
        if "began" in entry:
            before = None
        at = _number(entry.get("at"))
        if "unit" in entry and at is not None:
            times += [at - before] if before is not None else []
            before = at
        elif "shard" in entry:
            before = at
    return sum(times) / len(times) if times else None


def _rate(entries: Entries) -> float | None:
    """Bytes per second since a process began, until it last said how far it was."""
    began = _number(entries[0].get("began"))
    first = _number(entries[0].get("written")) or 0
    said = [(a, w) for e in entries[1:] if (a := _number(e.get("at"))) and (w := _number(e.get("written"))) is not None]
    if began is None or not said or said[-1][0] <= began or said[-1][1] <= first:
        return None
    return (said[-1][1] - first) / (said[-1][0] - began)


def _last(entries: Entries, *keys: str) -> float | None:
    """The last number under one of these keys."""
    return next(
        (n for e in reversed(entries) for key in reversed(keys) if (n := _number(e.get(key))) is not None), None
    )


def _number(value: object) -> Any:
    """A sensible number, or nothing: a journal may have been damaged."""
    return value if type(value) in (int, float) and 0 <= value < 2**63 else None  # type: ignore[operator]


def _shown(seconds: float | None) -> str | None:
    return None if seconds is None or seconds > 2**35 else stamp(seconds)


def show(found: dict[str, Any], asked: Asked) -> Iterator[str]:
    """What was asked, and how far it is."""
    rows = [("command", f"coterie {found['command']}")]
    rows += [(f"  {name}", f"{value}") for name, value in found["options"].items() if value not in (None, "", {})]
    if "bytes" in found:
        rows += [("process", f"{found['pid']}, {'alive' if found['alive'] else 'gone'}")]
        rows += [("began", f"{found['began']}"), ("last heard of", f"{found['updated']}")]
        rows += [(kind, f"{found[kind]['done']:,} of {known(found[kind]['all'])}") for kind in ("files", "bytes")]
        rows += [("layers", f"{found['layers']['done']:,} of {known(found['layers']['all'])}")]
        rows += [("MB per second", known(found["bytes_per_second"], 1e6))]
        rows += [("seconds left", known(found["seconds_left"]))]
    rows += [("note", found["note"])] if "note" in found else []
    return table(f"{found['path']}: {found['state']}", rows)
