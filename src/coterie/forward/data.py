"""What `--data NAME=FILE` names, and the documents of it. First step of calibration and of evaluation.

A file is read as what its content is: JSON, Parquet or Arrow, each record of which is one document (`documents.py` has
the forms), or plain text, which is one document as a whole. JSON may be an object a line, a list of objects, or one
object after another. What gzip or zstd packed is unpacked first. A file of problems holds nothing else.

Where sources are allowed, `NAME=FOLDER` stands for all such files below a folder, or for a data set that `datasets`
saved there, and `NAME=hub:OWNER/NAME[:SPLIT[:COLUMN]]` for a data set of the hub.
"""

import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from coterie.errors import CoterieError
from coterie.forward import sources
from coterie.forward.documents import KINDS, Document, document
from coterie.forward.json_records import json_records
from coterie.reference_model import CALIBRATION

SHIPPED = f"no --data: calibrating on the texts that ship with coterie ({', '.join(CALIBRATION)})"


def parse_data(items: Iterable[str], *, folders: bool = False) -> dict[str, Path]:
    """The files named by `NAME=FILE` options, or FILE alone, whose name is then its stem, in their order; with
    `folders`, also folders and data sets of the hub.

    Raises: CoterieError where the form is wrong, a name comes twice, or a file cannot be data (`check_file`).
    """
    data: dict[str, Path] = {}
    for item in items:
        name, named, file = str(item).partition("=")
        name, file = (name.strip(), file) if named else (Path(name).name.split(".")[0], name)
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


def read_all(files: Mapping[str, str | Path]) -> tuple[dict[str, list[Document]], list[str]]:
    """The documents by name, and what should be said aloud: how many of which form there are, and what was left out.

    Raises: CoterieError as `read_documents`.
    """
    notes: list[str] = []
    found = {name: list(read_documents(file, notes)) for name, file in files.items()}
    forms = {name: Counter(d.form for d in documents) for name, documents in found.items()}
    said = [f"{name}: {', '.join(f'{n:,} of {form}' for form, n in of.items())}" for name, of in forms.items()]
    return found, [*notes, f"documents read: {'; '.join(said)}"] if found else notes


def read_documents(path: str | Path, notes: list[str] | None = None) -> Iterator[Document]:
    """The documents of a data file, in order.

    What a folder or a data set of the hub holds beyond them is added to `notes`, for the caller to say aloud.
    Raises: CoterieError naming file and record where the content is not what the module's docstring describes.
    """
    path, notes = check_source(path), [] if notes is None else notes
    if str(path).startswith(sources.HUB):
        yield from _documents(sources.hub_rows(str(path), notes), path)
    elif not path.is_dir():
        yield from _of_file(path)
    elif (saved := sources.saved_tables(path, notes)) is not None:
        for file in saved:
            yield from _of_file(check_file(file))
    else:
        yield from _of_folder(path, notes)


def _of_file(path: Path) -> Iterator[Document]:
    rows: Iterable[tuple[str, object]] | None = sources.table_rows(path)
    if rows is None:
        text = sources.read_text(path)
        rows = json_records(text, str(path), sources.suffix_of(path))
        if rows is None:
            yield Document(str(path), text=text)
            return
    yield from _documents(rows, path)


def _of_folder(path: Path, notes: list[str]) -> Iterator[Document]:
    """Of all files below; `.json` may be settings of something, and is left out, aloud, where it begins with none."""
    left, read = list[CoterieError](), False
    for file in sources.files_below(path, notes):
        documents = _of_file(file)
        if sources.suffix_of(file) == ".json":
            try:
                first = next(documents)
            except CoterieError as error:
                left.append(error)
                continue
            yield first
        yield from documents
        read = True
    if left and not read:
        raise left[0]
    if left:
        notes.append(f"{path}: {len(left):,} .json files without documents are left out, one as {left[0]}")


def _documents(rows: Iterable[tuple[str, object]], path: Path) -> Iterator[Document]:
    """What the rows say. Raises: CoterieError where there are none, or problems among documents."""
    first: Document | None = None
    for where, entry in rows:
        found = document(entry, where)
        first = first or found
        if found.is_problem != first.is_problem:
            raise CoterieError(f"{where}: found problems and documents in one file; keep them in two")
        yield found
    if first is None:
        raise CoterieError(f"{path}: found blank lines only, or no records; expected objects with one of {KINDS}")
