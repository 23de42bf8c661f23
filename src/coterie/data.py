"""Text to tokens, by domain: what `--data NAME=FILE` names, what the files hold, and their token ids.

First step of calibration and of evaluation. Imports neither torch nor transformers: tokenizers are passed in.

A file whose name ends in `.jsonl` or `.ndjson` holds one JSON object a line, each one of

    {"text": "..."}                    a document
    {"input_ids": [17, 4, ...]}        a document that is tokenised already, used as given
    {"prompt": "...", "answer": "46"}  a problem, for generation; a file of problems holds nothing else

Further keys are left alone. Any other file is plain text: the whole file is one document.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError

KINDS = '{"text": ...}, {"input_ids": [...]} or {"prompt": ..., "answer": ...}'


@dataclass(frozen=True)
class Document:
    """One text, token sequence or problem of a data file; `where` is its place, as `file` or `file:line`."""

    where: str
    text: str | None = None
    input_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    answer: str | None = None

    @property
    def is_problem(self) -> bool:
        return self.prompt is not None


def parse_data(items: Iterable[str]) -> dict[str, Path]:
    """The files named by `NAME=FILE` options, in their order.

    Raises: CoterieError where the form is wrong, a name comes twice, or a file cannot be data (`check_file`).
    """
    data: dict[str, Path] = {}
    for item in items:
        name, _, file = str(item).partition("=")
        name = name.strip()
        if not name or not file:
            raise CoterieError(f"data {str(item)!r}: expected NAME=FILE, such as prose=held_out.txt")
        if name in data:
            raise CoterieError(
                f"data {str(item)!r}: the name {name!r} is taken by {data[name]}; give each file its own"
            )
        data[name] = check_file(Path(file))
    return data


def check_file(path: str | Path) -> Path:
    """`path` itself, if a regular file with something in it.

    Raises: CoterieError if it is missing, a folder, a device or pipe, unreadable or empty.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise CoterieError(f"{path}: no such file; expected a text or JSONL file")
        if not path.is_file():
            found = "a folder" if path.is_dir() else "not a regular file"
            raise CoterieError(f"{path}: {found}; expected a text or JSONL file")
        if path.stat().st_size == 0:
            raise CoterieError(f"{path}: the file is empty; expected text or JSON lines")
    except CoterieError:
        raise
    except (OSError, ValueError) as e:  # ValueError: a null byte in the name
        raise CoterieError(f"{str(path)!r}: cannot be read ({e}); expected a text or JSONL file") from e
    return path


def read_documents(path: str | Path) -> Iterator[Document]:
    """The documents of a data file, in order; a line feed ends a line, a byte order mark is dropped.

    Raises: CoterieError naming file and line where the content is not what the module's docstring describes.
    """
    path = check_file(path)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        yield Document(where=str(path), text=_decode(_read(path), str(path)))
        return
    first: Document | None = None
    for number, line in enumerate(_read(path).split(b"\n"), 1):
        where = f"{path}:{number}"
        if text := _decode(line, where).strip():
            document = _parse(text, where)
            first = first or document
            if document.is_problem != first.is_problem:
                raise CoterieError(f"{where}: found problems and documents in one file; keep them in two")
            yield document
    if first is None:
        raise CoterieError(f"{path}: found blank lines only; expected lines such as {KINDS}")


def encode(document: Document, tokenizer: Any) -> list[int]:
    """Token ids of a document or of a problem's prompt: `input_ids` as given, text with the tokenizer's special tokens.

    Raises: CoterieError if there is text but no tokenizer.
    """
    if document.input_ids is not None:
        return list(document.input_ids)
    if tokenizer is None:
        raise CoterieError(f"{document.where}: text needs a tokenizer; give one, or lines of token ids (input_ids)")
    text = document.text if document.prompt is None else document.prompt
    return tokenizer(text, verbose=False)["input_ids"]  # else it warns of lengths that windows will cut


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as e:
        raise CoterieError(f"{path}: cannot be read ({e})") from e


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise CoterieError(f"{where}: byte {e.start} is not UTF-8 ({e.reason}); convert the file to UTF-8") from e


def _parse(line: str, where: str) -> Document:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as e:  # ValueError: also a number of too many digits
        raise CoterieError(f"{where}: not JSON ({e}); expected a line such as {KINDS}") from e
    keys = set(entry) if isinstance(entry, dict) else set()
    kinds = [kind for kind in ({"text"}, {"input_ids"}, {"prompt", "answer"}) if kind <= keys]
    if len(kinds) != 1:
        found = f"an object with keys {sorted(keys)}" if isinstance(entry, dict) else type(entry).__name__
        raise CoterieError(f"{where}: found {found}; expected exactly one of {KINDS}")
    if kinds[0] == {"text"}:
        return Document(where, text=_string(entry, "text", where))
    if kinds[0] == {"input_ids"}:
        return Document(where, input_ids=_token_ids(entry["input_ids"], where))
    if isinstance(entry["answer"], int) and not isinstance(entry["answer"], bool):
        entry["answer"] = str(entry["answer"])
    answer = _string(entry, "answer", where).strip()
    prompt = _string(entry, "prompt", where)
    if not answer or not prompt:
        raise CoterieError(f"{where}: the {'prompt' if answer else 'answer'} is empty; expected some text")
    return Document(where, prompt=prompt, answer=answer)


def _string(entry: dict[str, Any], key: str, where: str) -> str:
    value = entry[key]
    if not isinstance(value, str):
        raise CoterieError(f"{where}: {key!r} is {type(value).__name__}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:  # half of an escaped surrogate pair, which no tokenizer takes
        raise CoterieError(f"{where}: {key!r} is not valid Unicode ({e.reason}); mend the escape sequence") from e
    return value


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        found = "empty" if value == [] else type(value).__name__
        raise CoterieError(f"{where}: 'input_ids' is {found}; expected a list of token ids")
    for token in value:
        if type(token) is not int or not 0 <= token < 2**31:  # bool is an int to isinstance
            found = str(token) if type(token) is int else type(token).__name__
            raise CoterieError(f"{where}: 'input_ids' holds {found}; expected whole numbers from 0")
    return tuple(value)
