"""The one exception users meet, what makes one of failing file operations, and how text of unknown origin is shown."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

LONGEST = 2000  # characters of a message; names and values come from files, and may be of any length


class CoterieError(ValueError):
    """Bad input: the message names the file or tensor, what was found, what was expected, and what to do.

    Characters that a terminal would obey are spelled out, and what is longer than a page is cut in its middle.
    """

    def __init__(self, message: object) -> None:
        text = str(message)
        half = LONGEST // 2
        text = text if len(text) <= LONGEST else f"{text[:half]} [...] {text[-half:]}"
        super().__init__("\n".join(map(printable, text.split("\n"))))


def check_choice(what: str, value: object, allowed: Iterable[str]) -> None:
    """Raises: CoterieError unless the value is one of these names; the nearest one, in any case, is proposed."""
    names = {name.lower(): name for name in allowed}
    if value in names.values():
        return
    near = get_close_matches(value.lower(), names, 1) if isinstance(value, str) else []
    proposal = f"; did you mean {names[near[0]]}?" if near else ""
    raise CoterieError(f"{what} {value!r:.60}: unknown; expected one of {', '.join(names.values())}{proposal}")


def printable(text: str) -> str:
    """The text with every character that is no visible one spelled out: escape as `\\x1b`, half a pair as `\\ud800`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """While entered, a failing file operation is a CoterieError: the folder is on a full or read-only disk."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "free some space and add --resume" if full else "check permissions, or choose another OUT"
        raise CoterieError(f"{folder}: cannot be written ({error.strerror or error}); {hint}") from error


@contextmanager
def reading(path: Path, hint: str = "", passing: Collection[int | None] = ()) -> Iterator[None]:
    """While entered, a failing file operation is a CoterieError: `path` cannot be read. The hint ends the message.

    passing: error numbers that stay what they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno in passing:
            raise
        raise CoterieError(f"{path}: cannot be read ({error.strerror or error}){hint}") from error
