"""OUT.partial/ of a run that may be killed: begun, or gone on with, and what it finished so far.

A run notes each unit of its work (a layer, a step) in the journal, once what it made of it is on the disk. Begun again
with resume, it finds those notes, and does what is left.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from coterie.errors import CoterieError, writing
from coterie.storage.files import fsync
from coterie.storage.folders import partial_of, tidy_file
from coterie.storage.journal import JOURNAL, Journal
from coterie.storage.record import Progress

HEARTBEAT = 1.0  # seconds between two notes of how far the work is


class Resumable:
    """A run's OUT.partial/, held by this process. Use as a context manager; leaving it unfinished keeps the folder for
    a later resume, unless the run was refused."""

    def __init__(
        self, out: Path, identity: Mapping[str, object], *, resume: bool = False, replace: bool = True
    ) -> None:
        """Opens `OUT.partial/`, fresh or resumed. `identity` is what must be equal for a resume to be the same run.

        replace: whether OUT may exist.
        Raises: CoterieError when another run holds the folder, or a resumed one was asked for something else.
        """
        self.out, self.partial = out, partial_of(out)
        self.units: list[dict[str, Any]] = []  # of this run and, after a resume, of the one before
        self._identity = identity
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._beat = 0.0
        self._journal = Journal(self.partial)
        try:
            if self.out.exists() and not (replace or resume):  # since `check_out` looked
                self._journal.discard()
                raise CoterieError(f"{out}: exists already; choose another OUT, or add --overwrite")
            self._resumed = resume and bool(self._journal.entries)
            with writing(self.partial):
                self._go_on()
        except CoterieError:
            self._journal.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _: object) -> None:
        if error is not None and not self._may_go_on(error):
            tidy_file(self.out)
        elif error is not None and self.partial.exists():
            with suppress(CoterieError):
                self._journal.say(f"stopped: {str(error) or type(error).__name__}")
        self._journal.close()

    def _may_go_on(self, error: BaseException) -> bool:
        """Whether a resume could end otherwise: not where model, data and options are refused."""
        return self._resumed or not isinstance(error, CoterieError) or isinstance(error.__cause__, OSError)

    def _go_on(self) -> None:
        """Goes on after the last whole note; a fresh run empties the folder."""
        entries = self._journal.entries
        if self._resumed:
            if entries[0].get("identity") != self.identity:
                raise self._another()
            self._journal.keep()
            self.units = [unit for entry in entries[1:] if isinstance(unit := entry.get("unit"), dict)]
            return
        for path in self.partial.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._journal.clear()
        asked = {key: self._identity.get(key) for key in ("command", "options")}
        self._journal.add({"identity": self.identity, "asked": asked})

    def _another(self) -> CoterieError:
        return CoterieError(
            f"{self.partial}: was begun with another source, plan or option; "
            "repeat the first command, or start anew with --overwrite"
        )

    def begun(self, **numbers: object) -> None:
        """Notes that this process begins, or goes on; and what `storage/journal.py` names beside."""
        self._journal.add({"began": time.time(), "pid": os.getpid(), **numbers})

    def start(self, on_progress: Progress) -> Progress:
        """Notes that this process begins; returns what tells, and about once a second notes, how far the work is."""
        self.begun()

        def tell(stage: str, done: int, total: int) -> None:
            if time.monotonic() - self._beat > HEARTBEAT:
                self._beat = time.monotonic()
                self._journal.add({"at": time.time(), "stage": stage, "done": done, "total": total}, sync=False)
            on_progress(stage, done, total)

        return tell

    def unit(self, entry: dict[str, Any], of: int | None = None) -> None:
        """Journals a finished unit of work (a layer; `of` so many), whose results are on the disk."""
        self._journal.add({"unit": entry, "of": of, "at": time.time()})
        self.units.append(entry)
        self._journal.say(f"finished {len(self.units)}" + (f" of {of} layers" if of else ""))

    def step(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, something of JSON; of a step that an earlier process finished, what it gave there."""
        known = next((unit for unit in self.units if unit.get("step") == name), None)
        if known is None:
            known = {"step": name, "found": make()}
            self.unit(known)
        return known["found"]

    def finish_file(self, write: Callable[[Path], Any]) -> None:
        """Has `write` make a file, which takes the name OUT when it is complete; then the folder goes."""
        made = self.partial / self.out.name
        with writing(self.out):
            write(made)
            fsync(made)
            made.rename(self.out)
            fsync(self.out.parent)
            self._journal.add({"complete": self.out.name})
            tidy_file(self.out)
