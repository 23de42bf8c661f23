"""Files that a command writes by themselves, such as statistics and pages: checked early, and written whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError


def check_new_file(path: Path, overwrite: bool) -> None:
    """Raises: CoterieError unless the file can be written: better now than after the work."""
    for place in (_partial_of(path), path):
        try:
            place.lstat()
            exists = True
        except FileNotFoundError:
            exists = False
        except (OSError, ValueError) as error:  # too long, below a file, or with a null byte
            raise CoterieError(f"{str(path)!r:.200}: not a file name ({error})") from error
    if path.is_dir():
        raise CoterieError(f"{path}: is a folder; expected a new file's name")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise CoterieError(f"{path}: its folder is missing, or may not be written to; make it first, or name another")
    if exists and not overwrite:
        raise CoterieError(f"{path}: exists already; give another name, or --overwrite")


def write_whole(path: Path, write: Callable[[Path], Any], *, sync: bool = True, hint: str = "") -> None:
    """Has `write` make a file beside `path`, which takes its name when it is complete, and on the disk if `sync`.

    Raises: CoterieError, which ends with the hint, when it cannot be written; then `path` is as it was.
    """
    partial = _partial_of(path)
    try:
        write(partial)
        if sync:
            fsync(partial)
        partial.rename(path)
    except OSError as error:
        raise CoterieError(f"{path}: cannot be written ({error.strerror or error}){hint}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Waits until what was written to a file, or changed in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial_of(path: Path) -> Path:
    return path.parent / f"{path.name}.partial"  # `with_name` refuses "." and ".."
