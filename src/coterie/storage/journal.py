"""What a run writes down about itself in `OUT.partial/`: the journal, its lock, and a log for people.

The journal is JSON lines. One process at a time holds it, by a lock that dies with the process; so whoever finds it
unlocked knows that the run is over. `resumable.py` and `writer.py` write it; `status` reads it. The log stays in OUT,
the journal does not.

    {"identity": hash, "asked": {...}}           once: what a resume must be equal to, and what to tell people
    {"began": time, "pid": number, "files": number, "bytes": to copy, "later": to fill in afterwards,
     "written": kept from an earlier process, "source": {file: [size, time of change]}}
                                                 each time that a process begins or goes on
    {"at": time, "written": bytes}               about once a second while bytes are copied; not synced
    {"at": time, "stage": text, "done": units, "total": units}   the same while anything else is done
    {"shard": name, "bytes": size, "at", "written"}         a file is complete
    {"unit": {...}, "of": number of layers, "at"}           a layer is complete
    {"complete": name}                           OUT is a single file, and there
    {"aside": name}                              where the result that is replaced waits to be removed
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from coterie.errors import CoterieError, writing

JOURNAL = "journal.jsonl"
LOG = "coterie.log"
LOCK_TRIES, LOCK_WAIT = 5, 0.05  # somebody who asks for the status holds the lock for an instant
Entry = dict[str, object]  # a line; a damaged journal may hold any JSON object


class Journal:
    """The open and locked journal of a folder. Times are seconds since 1970."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder and the journal if need be. Raises: CoterieError when another run holds it."""
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = (folder / JOURNAL).open("ab+", buffering=0)
        try:
            self._lock()
        except BaseException:
            self._file.close()
            raise
        self._file.seek(0)
        self.entries, self._end = entries_of(self._file.read())

    def _lock(self) -> None:
        for tried in range(1, LOCK_TRIES + 1):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if tried == LOCK_TRIES:
                    raise held_by_another(self.folder) from error
            time.sleep(LOCK_WAIT)
        # A run that ended meanwhile took the folder, and this journal in it, away: the lock would be of nothing.
        with suppress(OSError):
            if os.path.samestat(os.fstat(self._file.fileno()), (self.folder / JOURNAL).stat()):
                return
        raise CoterieError(f"{self.folder}: another run ended here just now; see what it left, and ask again")

    def keep(self) -> None:
        """Goes on after the last whole line."""
        self._file.truncate(self._end)

    def clear(self) -> None:
        """Begins anew."""
        self.entries = []
        self._file.truncate(0)

    def add(self, entry: Entry, *, sync: bool = True) -> None:
        """Writes a line, which is on the disk afterwards if `sync`."""
        with writing(self.folder):
            view = memoryview(json.dumps(entry).encode() + b"\n")
            while view:
                view = view[self._file.write(view) :]
            if sync:
                os.fsync(self._file.fileno())
        self.entries.append(entry)

    def say(self, text: str) -> None:
        """Adds a line to the log."""
        log = self.folder / LOG
        with writing(self.folder), log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{stamp(time.time())} {' '.join(text.split())}\n")

    def discard(self) -> None:
        """Removes journal, log and folder, where a run ends before it wrote anything."""
        with suppress(OSError):
            (self.folder / LOG).unlink(missing_ok=True)
            (self.folder / JOURNAL).unlink()
            self.folder.rmdir()

    def close(self) -> None:
        self._file.close()


def entries_of(raw: bytes) -> tuple[list[Entry], int]:
    """The journal's whole lines, and where they end: what a cut line named is written again."""
    entries, end = [], 0
    for line in raw.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or not line.endswith(b"\n"):
            break
        entries.append(entry)
        end += len(line)
    return entries, end


def read_journal(folder: Path) -> list[Entry]:
    """The entries of a folder's journal; none where it has none, or where it cannot be read."""
    try:
        if not (folder / JOURNAL).is_file():  # a named pipe would be waited for
            return []
        return entries_of((folder / JOURNAL).read_bytes())[0]
    except OSError:
        return []


def shards_of(entries: list[Entry]) -> dict[str, int]:
    """Complete files and their sizes."""
    found = {shard: entry.get("bytes") for entry in entries[1:] if isinstance(shard := entry.get("shard"), str)}
    return {shard: size for shard, size in found.items() if type(size) is int}


def is_held(folder: Path) -> bool:
    """Whether a living process writes the folder."""
    try:
        if not (folder / JOURNAL).is_file():
            return False
        with (folder / JOURNAL).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def held_by_another(folder: Path) -> CoterieError:
    return CoterieError(f"{folder}: another run writes here; wait for it, or choose another OUT")


def stamp(seconds: float) -> str:
    """A time as people and programs read it: UTC, whole seconds."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
