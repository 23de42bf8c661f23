"""OUT and the folders beside it: where a run may write, and what an earlier one may have left there.

OUT.partial       what is being written; takes OUT's name when it is complete, or goes where OUT is a single file
OUT.old-...       the result that is replaced, until it is removed
OUT.dense         of `--save sparse` (`edits/saving.py`): the dense checkpoint that its first step writes
OUT.dense.old     the same while it is removed after the second step
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import CoterieError
from coterie.storage.files import check_new_file
from coterie.storage.journal import JOURNAL, Entry, held_by_another, is_held, read_journal
from coterie.storage.record import object_at, record_of

IN_PLACE = "in-place.json"  # in OUT.partial: MODEL's files are being used up, and what is left to do


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there already."""
    return next(place for place in (folder, *folder.resolve().parents) if place.is_dir())


def check_out(out: Path, source: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises: CoterieError for an OUT whose writing would destroy other files, or mix with them."""
    if resume and overwrite:
        raise CoterieError("--resume and --overwrite exclude each other; choose one")
    try:
        _check_place(out, source, resume or overwrite)
    except OSError as error:
        raise CoterieError(f"{out}: cannot be written ({error.strerror or error}); choose another OUT") from error


def _check_place(out: Path, source: Path, may_exist: bool) -> None:
    if out.name in ("", "..") or "\0" in out.name:
        raise CoterieError(f"{out}: names no folder of its own; choose another OUT")
    home, partial = source.resolve(), partial_of(out)
    for target in (out.resolve(), partial.resolve()):
        if target == home or home in target.parents or target in home.parents:
            raise CoterieError(f"{target}: lies inside MODEL ({source}), or MODEL inside it; choose another OUT")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CoterieError(f"{out}: exists and is not a plain folder; choose another OUT")
    if out.exists() and not may_exist:
        raise CoterieError(f"{out}: exists already; choose another OUT, or add --overwrite")
    if out.exists() and any(out.iterdir()) and not (out / "coterie.json").is_file():
        raise CoterieError(f"{out}: is not a folder that coterie wrote (no coterie.json); refusing to replace it")
    if is_held(partial):
        raise held_by_another(partial)
    if partial.exists() and not may_exist:
        raise CoterieError(
            f"{partial}: left by an interrupted run; add --resume to go on, or --overwrite to start anew"
        )
    if (partial / IN_PLACE).exists():
        raise CoterieError(
            f"{partial}: holds what --in-place left of a model; repeat that command with --resume, which alone "
            "completes it"
        )
    if not _ours(partial):
        raise CoterieError(f"{partial}: in the way, and nothing that coterie wrote; choose another OUT")


def check_file(file: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises: CoterieError for a file that cannot be written, whose folder FILE.partial is somebody else's, or that a
    resume finds complete."""
    if resume and overwrite:
        raise CoterieError("--resume and --overwrite exclude each other; choose one")
    check_new_file(file, overwrite or resume)
    partial = partial_of(file)
    if is_held(partial):
        raise held_by_another(partial)
    if not _ours(partial):
        raise CoterieError(f"{partial}: in the way, and nothing that coterie wrote; give another name")
    if resume and file.exists() and any("complete" in entry for entry in read_journal(partial) or [{"complete": None}]):
        tidy_file(file)
        raise CoterieError(f"{file}: is complete, so that there is nothing to go on with; --overwrite makes it anew")
    if partial.exists() and not (resume or overwrite):
        raise CoterieError(
            f"{partial}: left by an interrupted run; add --resume to go on, or --overwrite to start anew"
        )


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _ours(partial: Path) -> bool:
    """Whether `OUT.partial` may be emptied: it is absent, empty, or a plain folder with our journal or report."""
    if partial.is_symlink() or not partial.is_dir():
        return not partial.is_symlink() and not partial.exists()
    found = list(partial.iterdir())
    # A link in it would be written through, a pipe waited for; coterie makes neither.
    plain = all(not path.is_symlink() and (path.is_file() or path.is_dir()) for path in found)
    return plain and (not found or any((partial / name).is_file() for name in (JOURNAL, "coterie.json")))


def tidy(out: Path, entries: list[Entry] | None = None) -> None:
    """Removes what a finished run has no more use for: the result that it replaced, and what it wrote down."""
    for entry in read_journal(out) if entries is None else entries:
        name = entry.get("aside")
        if isinstance(name, str) and name == Path(name).name and name.startswith(f"{out.name}.old-"):
            shutil.rmtree(out.with_name(name), ignore_errors=True)
    with suppress(OSError):
        (out / IN_PLACE).unlink(missing_ok=True)
        (out / JOURNAL).unlink(missing_ok=True)


def tidy_file(file: Path) -> None:
    """Removes FILE.partial once FILE is complete; the journal, which says so, goes last."""
    partial = partial_of(file)
    with suppress(OSError):
        for path in partial.iterdir():
            if path.name != JOURNAL:
                path.unlink()
        (partial / JOURNAL).unlink(missing_ok=True)
        partial.rmdir()


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
    """A note, for a run that saves dense, that names what `--save sparse` has beside the same OUT, if anything."""
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
