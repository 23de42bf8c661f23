"""The folders beside OUT in which `--save sparse` takes its two steps (`edits/saving.py`), and what may be left of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coterie.errors import CoterieError
from coterie.storage.journal import read_journal
from coterie.storage.record import object_at, record_of
from coterie.storage.writer import partial_of


@dataclass(frozen=True)
class Folders:
    """The first step writes `dense`, which is `old` while it is removed after the second."""

    out: Path

    @property
    def dense(self) -> Path:
        return self.out.with_name(self.out.name + ".dense")

    @property
    def old(self) -> Path:
        return self.out.with_name(self.out.name + ".dense.old")

    @property
    def begun(self) -> list[Path]:
        """What an interrupted run left to go on from."""
        return [path for path in (self.dense, partial_of(self.dense), partial_of(self.out)) if path.exists()]


def is_first(folder: Path) -> bool:
    """Whether a folder is the first step's: a dense checkpoint that was asked to become sparse.

    Raises: CoterieError for a damaged record.
    """
    return not folder.is_symlink() and object_at(record_of(folder), "options").get("save") == "sparse"


def left_over(out: Path) -> list[str]:
    """For a run that saves dense: a note that names what `--save sparse` has beside the same OUT, if anything."""
    folders = Folders(out)
    unfinished = partial_of(folders.dense)
    try:
        found = [folder for folder in (folders.dense, folders.old) if is_first(folder)]
        asked = read_journal(unfinished)[:1]
        found += [unfinished for entry in asked if object_at(entry, "asked", "options").get("save") == "sparse"]
    except (CoterieError, OSError):  # damaged, or no name that can be: nothing says that it is ours
        return []
    names = ", ".join(map(str, found))
    return [f"{names}: of --save sparse to the same OUT, and left as it is; delete what is not needed"] if found else []
