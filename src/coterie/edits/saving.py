"""`--save dense|sparse`, the same for every command that writes a checkpoint.

Sparse takes two steps: the command writes the dense checkpoint to OUT.dense, then that is packed into OUT with the
command's own record, and deleted under the name OUT.dense.old. A killed run leaves OUT.dense or the partial folder of
either step, and --resume goes on from it; or OUT.dense.old, and --resume deletes it. Until the end the disk holds both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from coterie.edits.coding import some_shrink
from coterie.edits.execution import Writing
from coterie.edits.pack import pack
from coterie.errors import CoterieError, check_choice
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.folders import Folders, check_out, is_first, partial_of
from coterie.storage.record import Progress, Report

SAVES = ("dense", "sparse")
Verb = Callable[..., Report]


def needs_room(*, in_place: bool = False, **_: object) -> str:
    """Why what is asked for cannot be packed: there is no room for the dense checkpoint."""
    return "packing needs the dense checkpoint beside it; leave --in-place out" if in_place else ""


def savable(*, makes_zeros: bool = True, obstacle: Callable[..., str] = needs_room) -> Callable[[Verb], Verb]:
    """A verb with `save="sparse"` carried out; it itself writes dense checkpoints, and records the option.

    The verb takes keywords, among them model, out, writing and on_progress.
    makes_zeros: whether what it writes can hold more zeros than what it reads. obstacle: given the same keywords, why
    the result could not be packed; nothing where it can.
    """

    def decorate(verb: Verb) -> Verb:
        @wraps(verb)
        def run(**given: Any) -> Report:
            writing: Writing = given["writing"]
            check_choice("--save", writing.save, SAVES)
            if writing.save == "dense":
                return verb(**given)
            folders, source = Folders(Path(given["out"])), Checkpoint.open(given["model"])
            _check_folders(folders, source, writing)
            if reason := obstacle(**given):
                raise CoterieError(f"--save sparse: {reason}")
            if writing.dry_run:
                return _planned(verb(**given))
            if folders.old.exists():
                _remove(folders.old)
            if writing.resume and folders.out.exists() and not folders.begun:
                return verb(**given)  # complete: the verb compares it with what is asked, and says what it holds
            if not makes_zeros and not folders.begun:
                _check_zeros(verb.__name__, source, given["on_progress"])
            verb(**given | {"out": folders.dense})
            return _packed(folders, writing, given["on_progress"])

        return run

    return decorate


def _packed(folders: Folders, writing: Writing, on_progress: Progress) -> Report:
    """The second step: OUT.dense becomes OUT."""
    again = Writing(resume=writing.resume, overwrite=writing.overwrite, public=writing.public)
    try:
        report = pack(folders.dense, folders.out, writing=again, on_progress=on_progress)
    except CoterieError as error:
        raise CoterieError(
            f"{error}. The dense checkpoint is complete in {folders.dense}: use it as it is, or go on with --resume"
        ) from error
    _remove(folders.dense, folders.old)
    return report


def _remove(dense: Path, old: Path | None = None) -> None:
    """Under the name `old`, so that a kill in the middle leaves nothing that looks like a checkpoint. The record goes
    last: it says whose the folder is.

    Raises: CoterieError where it cannot be removed; OUT is complete then.
    """
    try:
        dense = dense.rename(old) if old else dense
        for path in dense.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "coterie.json":
                path.unlink(missing_ok=True)
        shutil.rmtree(dense)
    except FileNotFoundError:  # another process tidies up too
        return
    except OSError as error:
        raise CoterieError(
            f"{dense}: is packed, but cannot be removed ({error.strerror or error}); delete it"
        ) from error


def _check_folders(folders: Folders, source: Checkpoint, writing: Writing) -> None:
    """Raises: CoterieError, before any work, where one of the two steps could not write or go on."""
    try:
        _check_steps(folders, source, writing)
    except OSError as error:  # such as names that are too long with what is added to them
        raise CoterieError(
            f"{folders.out}: cannot be written ({error.strerror or error}); choose another OUT"
        ) from error


def _check_steps(folders: Folders, source: Checkpoint, writing: Writing) -> None:
    out, dense = folders.out, folders.dense
    resume, overwrite = writing.resume, writing.overwrite
    check_out(out, source.path, resume=resume, overwrite=overwrite)
    emptied = folders.old.is_dir() and not any(folders.old.iterdir())  # where a kill came before the very end
    for left in (folder for folder in (dense, folders.old) if folder.exists()):
        if not (is_first(left) or (emptied and left == folders.old)):
            raise CoterieError(f"{left}: in the way, and not left by --save sparse; move it, or choose another OUT")
        if not resume and not overwrite:
            raise CoterieError(
                f"{left}: left by an interrupted run; add --resume to go on, or --overwrite to start anew"
            )
    unfinished = partial_of(dense).exists() or (partial_of(out).exists() and not dense.exists())
    if resume and unfinished and (out.exists() or partial_of(out).exists()):
        # The dense checkpoint comes first, so that these were made by something else.
        other = out if out.exists() else partial_of(out)
        raise CoterieError(
            f"{other}: not of the run that left {folders.begun[0]}; move it away, or start anew with --overwrite"
        )


def _check_zeros(command: str, source: Checkpoint, on_progress: Progress) -> None:
    """Raises: CoterieError where the command would make nothing that packing shrinks."""
    model = Model.of(source)
    if not some_shrink(model, on_progress):
        raise CoterieError(
            f"--save sparse: `coterie {command}` makes no zeros, and {source.path} has no matrix with enough of them "
            "(bf16 needs 7 %); use --save dense, or make zeros with `coterie sparsify` or `coterie stun`"
        )


def _planned(report: Report) -> Report:
    """A dry run's report: bytes are what packing will make of the zeros, where their number is known."""
    dense, packed = report.report["after"]["bytes"], report.report.get("packed_estimate")
    report.report["after"]["bytes"] = packed or dense
    what = "estimated from the number of zeros" if packed else "those before packing"
    report.report["warnings"] = [
        *report.report.get("warnings", []),
        f"bytes are {what}: --save sparse first writes {dense:,} bytes to OUT.dense, and needs room for the packed "
        "checkpoint beside it",
    ]
    return report
