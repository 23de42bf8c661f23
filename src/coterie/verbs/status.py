"""Show how far a run is, or was when it ended: what was asked, what is done, the rate, the time left.

Example: coterie status OUT
"""

from __future__ import annotations

import time
from collections.abc import Iterator
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
Entries = list[dict[str, Any]]


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


def _complete(out: Path, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "path": str(out),
        "state": "complete",
        "command": found.get("command"),
        "options": object_at(found, "options"),
        "alive": False,
        "seconds": _number(object_at(found, "report").get("seconds")),
    }


def _run(folder: Path, entries: Entries) -> dict[str, Any]:
    """Of a folder that is being written, or that an ended run left."""
    asked = object_at(entries[0], "asked") if entries else {}
    begun = [i for i, e in enumerate(entries) if _number(e.get("began")) is not None]
    last = entries[begun[-1]] if begun else {}
    alive = is_held(folder)
    layers = [e for e in entries if isinstance(e.get("unit"), dict)]
    # A file that was cut short is written again, so its bytes count only while somebody writes it.
    counted = entries if alive else [e for e in entries if "began" in e or "shard" in e]
    bytes_ = {"done": _written(counted), "all": _number(last.get("bytes"))}
    now = time.time() if alive else _last(entries)
    rate = _rate(entries[begun[-1] :]) if begun else None
    found = {
        "path": str(folder),
        "state": "running" if alive else "interrupted",
        "command": asked.get("command"),
        "options": object_at(asked, "options"),
        "alive": alive,
        "pid": last.get("pid"),
        "began": _shown(last.get("began")),
        "updated": _shown(now if alive and not entries else _last(entries)),
        "files": {"done": len(shards_of(entries)), "all": _number(last.get("files"))},
        "layers": {"done": len(layers), "all": _number(layers[-1].get("of")) if layers else None},
        "bytes": bytes_,
        "bytes_per_second": rate,
    }
    return found | {"seconds_left": _left(found, entries, last)}


def _left(found: dict[str, Any], entries: Entries, last: dict[str, Any]) -> float | None:
    """Seconds: what is left of bytes and of layers, each at its own rate."""
    bytes_, layers, rate = found["bytes"], found["layers"], found["bytes_per_second"]
    if bytes_["all"] is None:
        return None
    missing = max(0, bytes_["all"] - bytes_["done"])
    if missing and not rate:
        return None
    left = missing / rate if missing else 0.0
    if not last.get("later"):  # nothing is filled in after copying
        return left
    seconds = _seconds_per_layer(entries)
    if seconds is None or layers["all"] is None:
        return None
    return left + seconds * max(0, layers["all"] - layers["done"])


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


def _written(entries: Entries) -> int:
    """Bytes that are there, by the last entry that says so."""
    said = [n for e in entries if (n := _number(e.get("written"))) is not None]
    return int(said[-1]) if said else 0


def _last(entries: Entries) -> float | None:
    times = [n for e in entries for key in ("at", "began") if (n := _number(e.get(key))) is not None]
    return times[-1] if times else None


def _number(value: Any) -> Any:
    """A sensible number, or nothing: a journal may have been damaged."""
    return value if type(value) in (int, float) and 0 <= value < 2**63 else None


def _shown(seconds: Any) -> str | None:
    value = _number(seconds)
    return None if value is None or value > 2**35 else stamp(value)


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
