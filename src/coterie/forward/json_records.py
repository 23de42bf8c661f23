"""The records of a text that is JSON: an object a line, a list of objects, or one object after another.

Whether a text is JSON, the file's name says (`.json`, `.jsonl`, `.ndjson`), or else its beginning: an object with
something in it, alone or in a list.
"""

import json
import re
from collections.abc import Iterator

from coterie.errors import CoterieError

BY_LINES = (".jsonl", ".ndjson")
NAMED = (".json", *BY_LINES)
MAX_NESTED = 2**21  # lists and objects in a line: two bytes of JSON can take 64 of memory
MAX_NESTED_ALL = 2**24  # and in a file that is not read by lines
SPACE = re.compile(r"[ \t\r\n]*")

Records = Iterator[tuple[str, object]]  # where each stands, and what it is


class _NotJson(CoterieError):
    """A text that does not parse."""


def json_records(text: str, file: str, suffix: str) -> Records | None:
    """The records of a text; None where it is not JSON, and its name does not say that it is.

    Raises: CoterieError, at the record, where it does not parse, or would take too much memory.
    """
    begin = _after_space(text, 0)
    by_lines = _is_object(text[begin : text.find("\n", begin) + 1 or len(text)]) or (
        suffix in BY_LINES and not text.startswith("[", begin)
    )
    read = _lines if by_lines else _values
    if suffix in NAMED:
        return read(text, file)
    try:
        _, first = next(read(text, file), ("", None))
    except _NotJson:
        return None
    return read(text, file) if first and isinstance(first, dict) else None


def parsed(text: str, where: str) -> object:
    """One value. Raises: CoterieError where it does not parse, names a key twice, or would take too much memory."""
    _check_nesting(text, where, MAX_NESTED)
    value, end = _next_value(text, _after_space(text, 0), where)
    if _after_space(text, end) < len(text):
        raise _NotJson(f"{where}: not JSON (more follows after character {end:,})")
    return value


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(parsed(line, ""), dict)
    except CoterieError as e:
        return not isinstance(e, _NotJson)  # an object with a fault, which is said when it is read


def _lines(text: str, file: str) -> Records:
    end = 0
    for number in range(1, text.count("\n") + 2):
        start, end = end, text.find("\n", end) + 1 or len(text)
        if line := text[start:end].strip():
            yield f"{file}:{number}", parsed(line, f"{file}:{number}")


def _values(text: str, file: str) -> Records:
    """The entries of a list that is the whole text; else one value after another."""
    at, number = _after_space(text, 0), 0
    if text.startswith(("{", "["), at):
        _check_nesting(text, file, MAX_NESTED_ALL)
    in_list = text.startswith("[", at)
    at = _after_space(text, at + in_list)
    while at < len(text) and not (in_list and text[at] == "]"):
        number += 1
        where = f"{file}, record {number}"
        value, at = _next_value(text, at, where)
        yield where, value
        at = _after_space(text, at)
        if in_list and text.startswith(",", at):
            at = _after_space(text, at + 1)
        elif in_list and not text.startswith("]", at):
            raise _NotJson(f"{where}: neither a comma nor the list's end follows; is the file cut?")
    if in_list and (at == len(text) or _after_space(text, at + 1) < len(text)):
        raise _NotJson(f"{file}: not JSON ({'more follows after the list' if at < len(text) else 'the list is cut'})")


def _next_value(text: str, at: int, where: str) -> tuple[object, int]:
    """The value that begins at a character, and where it ends."""
    try:
        return DECODER.raw_decode(text, at)
    except CoterieError as e:
        raise CoterieError(f"{where}: {e}") from e
    except (ValueError, RecursionError) as e:  # ValueError: also a number of too many digits
        raise _NotJson(f"{where}: not JSON ({e!s:.200})") from e


def _check_nesting(text: str, where: str, most: int) -> None:
    nested = text.count("[") + text.count("{")
    if nested > most:
        raise CoterieError(f"{where}: {nested:,} lists and objects; expected at most {most:,}")


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CoterieError("an object names a key twice; expected each once")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)
