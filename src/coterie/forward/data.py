"""Text to tokens, by domain: what `--data NAME=FILE` names, what the files hold, and their token ids.

First step of calibration and of evaluation. Imports neither torch nor transformers: tokenizers are passed in.

A file whose name ends in `.jsonl` or `.ndjson` holds one JSON object a line, each one of

    {"text": "..."}                    a document
    {"input_ids": [17, 4, ...]}        a document that is tokenised already, used as given
    {"messages": [{"role": ...}]}      a conversation, spelled out by the tokenizer's chat template
    {"prompt": "...", "answer": "46"}  a problem, for generation; a file of problems holds nothing else

Further keys are left alone. The rows of a `.parquet` file are such objects. Any other file is plain text: the whole
file is one document. Where sources are allowed, `NAME=FOLDER` stands for all such files below a folder, and
`NAME=hub:OWNER/NAME[:SPLIT[:COLUMN]]` for a data set of the hub.
"""

import codecs
import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError
from coterie.forward import sources
from coterie.reference_model import CALIBRATION

KINDS = '{"text": ...}, {"input_ids": [...]}, {"messages": [...]} or {"prompt": ..., "answer": ...}'
MAX_DATA = 2**30  # bytes of a file; it is read whole
MAX_NESTED = 2**21  # lists and objects in a line: two bytes of JSON can take 64 of memory
SHIPPED = f"no --data: calibrating on the texts that ship with coterie ({', '.join(CALIBRATION)})"


@dataclass(frozen=True)
class Document:
    """One text, token sequence or problem of a data file; `where` is its place, as `file` or `file:line`."""

    where: str
    text: str | None = None
    input_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: tuple[Mapping[str, object], ...] | None = None

    @property
    def is_problem(self) -> bool:
        return self.prompt is not None


def parse_data(items: Iterable[str], *, folders: bool = False) -> dict[str, Path]:
    """The files named by `NAME=FILE` options, in their order; with `folders`, also folders and data sets of the hub.

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
        data[name] = check_source(file) if folders else check_file(file)
    return data


def calibration_files(data: Mapping[str, str | Path] | Iterable[str] | str | None) -> dict[str, Path]:
    """Files by domain: from `NAME=FILE` items, from one, or from a dictionary. Raises: CoterieError as `parse_data`."""
    if isinstance(data, Mapping):
        return {str(name): check_source(file) for name, file in data.items()}
    return parse_data([data] if isinstance(data, str) else data or (), folders=True)


def check_source(path: str | Path) -> Path:
    """`path` itself, if a folder, `hub:...`, or a file that can be data. Raises: CoterieError as `check_file`."""
    if str(path).startswith(sources.HUB):
        return Path(path)
    try:
        if Path(path).is_dir():
            return Path(path)
    except (OSError, ValueError):  # a name too long, or with a null byte
        pass
    return check_file(path)


def check_file(path: str | Path) -> Path:
    """`path` itself, if a regular file with something in it.

    Raises: CoterieError if it is missing, a folder, a device or pipe, unreadable or empty.
    """
    path = Path(path)
    try:
        mode, size = (path.stat().st_mode, path.stat().st_size) if path.exists() else (0, 0)
    except (OSError, ValueError) as e:  # ValueError: a null byte in the name
        raise CoterieError(f"{str(path)!r}: cannot be read ({e}); expected a text or JSONL file") from e
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "not a regular file" if mode else "no such file"
        raise CoterieError(f"{path}: {found}; expected a text or JSONL file")
    if not size:
        raise CoterieError(f"{path}: the file is empty; expected text or JSON lines")
    return path


def read_documents(path: str | Path, notes: list[str] | None = None) -> Iterator[Document]:
    """The documents of a data file, in order; a line feed ends a line, a byte order mark is dropped.

    What a folder or a data set of the hub holds beyond them is added to `notes`, for the caller to say aloud.
    Raises: CoterieError naming file and line where the content is not what the module's docstring describes.
    """
    path, notes = check_source(path), [] if notes is None else notes
    if str(path).startswith(sources.HUB):
        yield from _uniform((_document(row, where) for where, row in sources.hub_rows(str(path), notes)), path)
    elif path.is_dir():
        for file in sources.files_below(path, notes):
            yield from read_documents(file)
    elif path.suffix.lower() == ".parquet":
        yield from _uniform((_document(row, where) for where, row in sources.parquet_rows(path)), path)
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        yield from _uniform(_json_lines(path), path)
    else:
        yield Document(where=str(path), text=_decode(_read(path), str(path)))


def _json_lines(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split(b"\n"), 1):
        where = f"{path}:{number}"
        if text := _decode(line, where).strip():
            yield _parse(text, where)


def _uniform(documents: Iterable[Document], path: Path) -> Iterator[Document]:
    """The documents. Raises: CoterieError where there are none, or problems among them."""
    first: Document | None = None
    for document in documents:
        first = first or document
        if document.is_problem != first.is_problem:
            raise CoterieError(f"{document.where}: found problems and documents in one file; keep them in two")
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
    if document.messages is not None:
        return _plain_ids(_spelled_out(document, tokenizer), tokenizer)
    text = document.text if document.prompt is None else document.prompt
    return tokenizer(text, verbose=False)["input_ids"]  # else it warns of lengths that windows will cut


def _plain_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text without special tokens, but for those that the text itself spells out."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _spelled_out(document: Document, tokenizer: Any) -> str:
    """A conversation as the text that the model was trained on. Raises: CoterieError where the template fails."""
    if not getattr(tokenizer, "chat_template", None):
        raise CoterieError(f"{document.where}: the tokenizer has no chat template for messages; write them as text")
    try:
        return tokenizer.apply_chat_template(list(document.messages or ()), tokenize=False)
    except Exception as e:  # a template is a program, and refuses roles or orders in its own way
        raise CoterieError(f"{document.where}: the chat template refuses the messages ({e!s:.200})") from e


def draw(
    documents: dict[str, list[Document]],
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    max_positions: int | None,
) -> tuple[dict[str, list[tuple[int, ...]]], list[str]]:
    """Token sequences by name, and what should be said aloud about them.

    `samples` in all are spread evenly over the names, one more for the first where they do not divide. Lines of
    token ids are a sample each, in order. Texts are tokenised without special tokens, joined by the end-of-text token
    and cut into blocks of `seq_len` (at most `max_positions`), of which as many as are needed are drawn without
    replacement, in their order; a text shorter than one block is one shorter sample.
    Raises: CoterieError for what is no document, has no tokens, or does not fit the model.
    """
    for option, value, least in (("samples", samples, len(documents)), ("seq-len", seq_len, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise CoterieError(f"--{option} {value!r}: expected a whole number, at least {least}")
    notes = []
    length = min(seq_len, max_positions or seq_len)
    if length < seq_len and any(d.input_ids is None for entries in documents.values() for d in entries):
        notes.append(f"--seq-len {seq_len} is more than the model's {length} positions: blocks have {length} tokens")
    base, rest = divmod(samples, len(documents))
    found = {}
    for number, (name, entries) in enumerate(documents.items()):
        share = base + (number < rest)
        if _all_token_ids(entries):
            found[name] = _as_given(entries[:share], max_positions)
        else:
            found[name] = _drawn_blocks(_joined(entries, tokenizer, notes), length, share, seed)
        if len(found[name]) < share:
            notes.append(f"data {name!r} gives {len(found[name])} of the {share} samples that were its share")
    return found, notes


def _all_token_ids(documents: list[Document]) -> bool:
    """Whether documents are token ids, not texts. Raises: CoterieError for problems, and for both in one."""
    given = [d.input_ids is not None for d in documents]
    odd = next((d for d, is_ids in zip(documents, given, strict=True) if is_ids != given[0]), None)
    if odd:
        raise CoterieError(f"{odd.where}: found texts and token ids under one name; give each a name of its own")
    if any(d.is_problem for d in documents):
        raise CoterieError(f"{documents[0].where}: problems are for eval; calibration expects texts or token ids")
    return given[0]


def _as_given(documents: list[Document], max_positions: int | None) -> list[tuple[int, ...]]:
    for document in documents:
        if max_positions and len(document.input_ids or ()) > max_positions:
            raise CoterieError(
                f"{document.where}: {len(document.input_ids or ())} token ids; the model has {max_positions} positions"
            )
    return [document.input_ids or () for document in documents]


def _joined(documents: list[Document], tokenizer: Any, notes: list[str]) -> list[int]:
    """All texts as one sequence, with the end-of-text token between them."""
    if tokenizer is None:
        encode(documents[0], None)  # says what is missing
    parts = [_plain_ids(d.text if d.text is not None else _spelled_out(d, tokenizer), tokenizer) for d in documents]
    parts = [part for part in parts if part]
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None and len(parts) > 1:
        notes.append("the tokenizer has no end-of-text token: texts are joined without one")
    joined: list[int] = []
    for number, part in enumerate(parts):
        joined += ([end] if number and end is not None else []) + list(part)
    if not joined:
        raise CoterieError(f"{documents[0].where}: no tokens; expected some text")
    return joined


def _drawn_blocks(tokens: list[int], length: int, count: int, seed: int) -> list[tuple[int, ...]]:
    import numpy as np

    total = len(tokens) // length
    if not total:
        return [tuple(tokens)]
    chosen = np.sort(np.random.default_rng(seed).choice(total, size=min(count, total), replace=False))
    return [tuple(tokens[i * length : (i + 1) * length]) for i in chosen.tolist()]


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:  # some files of the system say that they have no size
            raw = b"" if size > MAX_DATA else file.read(MAX_DATA + 1)
    except OSError as e:
        raise CoterieError(f"{path}: cannot be read ({e})") from e
    if max(size, len(raw)) > MAX_DATA:
        raise CoterieError(f"{path}: {max(size, len(raw)):,} bytes; expected at most {MAX_DATA:,}: give a part of it")
    return raw.removeprefix(codecs.BOM_UTF8)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise CoterieError(f"{where}: byte {e.start} is not UTF-8 ({e.reason}); convert the file to UTF-8") from e


def _parse(line: str, where: str) -> Document:
    nested = line.count("[") + line.count("{")
    if nested > MAX_NESTED:
        raise CoterieError(f"{where}: {nested:,} lists and objects in a line; expected at most {MAX_NESTED:,}")
    try:
        entry = json.loads(line, object_pairs_hook=_no_duplicates)
    except CoterieError as e:
        raise CoterieError(f"{where}: {e}") from e
    except (ValueError, RecursionError) as e:  # ValueError: also a number of too many digits
        raise CoterieError(f"{where}: not JSON ({e}); expected a line such as {KINDS}") from e
    return _document(entry, where)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CoterieError("an object names a key twice; expected each once")
    return found


def _document(entry: Any, where: str) -> Document:
    """What a line or row holds. Raises: CoterieError for what the module's docstring does not describe."""
    keys = set(entry) if isinstance(entry, dict) else set()
    kinds = [kind for kind in ({"text"}, {"input_ids"}, {"messages"}, {"prompt", "answer"}) if kind <= keys]
    if len(kinds) != 1:
        found = f"an object with keys {sorted(keys)}" if isinstance(entry, dict) else type(entry).__name__
        raise CoterieError(f"{where}: found {found}; expected exactly one of {KINDS}")
    if "text" in keys:
        return Document(where, text=_string(entry["text"], "text", where))
    if "input_ids" in keys:
        return Document(where, input_ids=_token_ids(entry["input_ids"], where))
    if "messages" in keys:
        return Document(where, messages=_messages(entry["messages"], where))
    answer = str(entry["answer"]) if type(entry["answer"]) is int else entry["answer"]
    answer = _string(answer, "answer", where).strip()
    prompt = _string(entry["prompt"], "prompt", where)
    if not answer or not prompt:
        raise CoterieError(f"{where}: the {'prompt' if answer else 'answer'} is empty; expected some text")
    return Document(where, prompt=prompt, answer=answer)


def _string(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise CoterieError(f"{where}: {key!r} is {type(value).__name__}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:  # half of an escaped surrogate pair, which no tokenizer takes
        raise CoterieError(f"{where}: {key!r} is not valid Unicode ({e.reason}); mend the escape sequence") from e
    return value


def _messages(value: Any, where: str) -> tuple[Mapping[str, object], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) and "role" in m for m in value):
        raise CoterieError(f"{where}: 'messages' must be a list of objects, each with a role and its content")
    for message in value:
        _string(message["role"], "role", where)
        if message.get("content") is not None:
            _string(message["content"], "content", where)
    return tuple(value)


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        found = "empty" if value == [] else type(value).__name__
        raise CoterieError(f"{where}: 'input_ids' is {found}; expected a list of token ids")
    for token in value:
        if type(token) is not int or not 0 <= token < 2**31:  # bool is an int to isinstance
            found = str(token) if type(token) is int else type(token).__name__
            raise CoterieError(f"{where}: 'input_ids' holds {found}; expected whole numbers from 0")
    return tuple(value)
