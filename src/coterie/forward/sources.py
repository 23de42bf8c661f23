"""Where records of data come from: files as they are or packed, tables, folders, and data sets of the hub.

Every record is a JSON-like object with the place it stands at; what it may say, `documents.py` knows. The libraries
that read zstd, Parquet, Arrow and the hub's data sets are an extra, imported when they are needed.
"""

from __future__ import annotations

import codecs
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from gzip import GzipFile
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError
from coterie.forward.documents import COLUMNS, KINDS, forms_of
from coterie.forward.json_records import NAMED
from coterie.storage.checkpoint import load_json

SUFFIXES = (".txt", ".md", ".py", *NAMED, ".parquet", ".arrow")  # what is read of a folder
PACKED = (".gz", ".zst", ".zstd")  # and what may follow
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how such files begin
ARROW = b"ARROW1"
TABLES = {b"PAR1": "Parquet", ARROW[:4]: "Arrow", b"\xff" * 4: "Arrow", ".parquet": "Parquet", ".arrow": "Arrow"}
MAX_DATA = 2**30  # bytes of a file, unpacked; it is read whole
HUB = "hub:"
HUB_ROWS = 10_000  # of a data set on the hub at most: some hold terabytes
SHOWN = 4  # kinds of files that are left out, named in a note
EXTRA = "needs the extra: pip install 'coterie[data]'"

Row = tuple[str, Mapping[str, object]]  # its place, and its columns


def suffix_of(path: Path) -> str:
    """What a file is by its name, packed or not: `.jsonl` of `c4.jsonl.gz`."""
    return (Path(path.stem) if path.suffix.lower() in PACKED else path).suffix.lower()


def read_text(path: Path) -> str:
    """A file's text, unpacked, without a byte order mark.

    Raises: CoterieError if it cannot be read or unpacked, is too large, or is not UTF-8.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:  # some files of the system say that they have no size
            packed = b"" if size > MAX_DATA else file.read(MAX_DATA + 1)
        raw = _unpacked(path, packed) if len(packed) <= MAX_DATA else packed
    except (OSError, EOFError, zlib.error) as e:
        raise CoterieError(f"{path}: cannot be read ({e})") from e
    if max(size, len(raw)) > MAX_DATA:
        found = max(size, len(raw))
        raise CoterieError(f"{path}: {found:,} bytes or more; expected at most {MAX_DATA:,}: give a part of it")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise CoterieError(f"{path}:{line}: byte {e.start} is not UTF-8 ({e.reason}); convert the file to UTF-8") from e


def _unpacked(path: Path, raw: bytes) -> bytes:
    """What a file holds, one byte beyond the limit at most."""
    if raw.startswith(GZIP):
        with GzipFile(path) as file:
            return file.read(MAX_DATA + 1)
    if raw.startswith(ZSTD):
        with _pyarrow(path, "zstd"):
            from pyarrow import input_stream

            with input_stream(str(path), compression="zstd") as file:
                return file.read(MAX_DATA + 1)
    return raw


def files_below(folder: Path, notes: list[str]) -> list[Path]:
    """All files of a folder that can be data, at any depth, sorted; hidden and empty ones are left out.

    How many others there are is added to `notes`.
    Raises: CoterieError if there is none, or the folder cannot be read.
    """
    try:
        seen = [p for p in folder.rglob("*") if not any(s[0] == "." for s in p.relative_to(folder).parts)]
        below = sorted(p for p in seen if p.is_file() and p.stat().st_size)
    except OSError as e:
        raise CoterieError(f"{folder}: cannot be read ({e})") from e
    found = [p for p in below if suffix_of(p) in SUFFIXES]
    if not found:
        raise CoterieError(f"{folder}: no file to read; expected some of {', '.join('*' + s for s in SUFFIXES)}")
    if len(found) < len(below):
        others = Counter(p.suffix.lower() or "no suffix" for p in below if suffix_of(p) not in SUFFIXES)
        kinds = ", ".join(kind for kind, _ in others.most_common(SHOWN)) + ", ..." * (len(others) > SHOWN)
        notes.append(f"{folder}: files of other kinds are left out: {others.total()} ({kinds})")
    return found


def table_rows(path: Path) -> Iterator[Row] | None:
    """The rows of a Parquet or Arrow file, of the columns that data may have; None for a file of another kind.

    Raises: CoterieError without pyarrow, for a damaged file, and for one without such columns.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(4)
    except OSError as e:
        raise CoterieError(f"{path}: cannot be read ({e})") from e
    kind = TABLES.get(begin) or TABLES.get(path.suffix.lower())
    return _rows(path, kind) if kind else None


def _rows(path: Path, kind: str) -> Iterator[Row]:
    number = 0
    with _pyarrow(path, kind):
        for batch in (_parquet if kind == "Parquet" else _arrow)(path):
            for entry in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", {key: _without_nulls(value) for key, value in entry.items()}


def _parquet(path: Path) -> Iterator[Any]:
    """Batches of the columns that data may have."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=1024, columns=_columns(file.schema_arrow.names, path))


def _arrow(path: Path) -> Iterator[Any]:
    """The same of a stream, as `datasets` saves them, or of a file."""
    from pyarrow import ipc, memory_map

    with memory_map(str(path)) as source:
        is_file = source.read(len(ARROW)) == ARROW
        source.seek(0)
        with (ipc.open_file if is_file else ipc.open_stream)(source) as reader:
            columns = _columns(reader.schema.names, path)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            yield from (batch.select(columns) for batch in batches)


@contextmanager
def _pyarrow(path: Path, kind: str) -> Iterator[None]:
    """While entered, a fault of a file is a CoterieError, as is that pyarrow is missing."""
    try:
        from pyarrow import ArrowException
    except ImportError as e:
        raise CoterieError(f"{path}: reading {kind} {EXTRA}") from e
    try:
        yield
    except CoterieError:
        raise
    except (ArrowException, OSError, ValueError) as e:
        raise CoterieError(f"{path}: cannot be read as {kind} ({e!s:.200})") from e


def _columns(names: Iterable[str], path: Path) -> list[str]:
    if not forms_of(names):
        raise CoterieError(f"{path}: columns {_listed(names)}; expected those of one of {KINDS}")
    return [name for name in COLUMNS if name in names]


def _without_nulls(value: object) -> object:
    """Every object of a table has all keys of its column: a null stands for one that is not there, but for content."""
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None or key == "content"}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def saved_tables(folder: Path, notes: list[str]) -> list[Path] | None:
    """The Arrow files of a folder that `datasets` saved, of its split `train` if it has several; None for another.

    Which split is read is added to `notes`. Raises: CoterieError for several splits without that one, and damage.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = load_json(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not splits or not all(isinstance(s, str) for s in splits):
            raise CoterieError(f"{folder / 'dataset_dict.json'}: no names of splits; save the data set again")
        split = splits[0] if len(splits) == 1 else "train"
        if split not in splits or split != Path(split).name:
            raise CoterieError(f"{folder}: splits {_listed(splits)}; name one as {folder}/SPLIT")
        if len(splits) > 1:
            notes.append(f"{folder}: of the splits {_listed(splits)}, train is read")
        return saved_tables(folder / split, notes)
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return None
    state, found = folder / "state.json", list[Path]()
    files = load_json(state).get("_data_files")
    for entry in files if isinstance(files, list) else ():
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name != Path(name).name or not (folder / name).is_file():
            raise CoterieError(f"{state}: names {name!r:.80}, which is no file beside it; save the data set again")
        found.append(folder / name)
    if not found:
        raise CoterieError(f"{state}: names no data files; save the data set again")
    return found


def hub_rows(source: str, notes: list[str]) -> Iterator[Row]:
    """The first rows of `hub:NAME[:SPLIT[:COLUMN]]`; NAME is owner/name, or owner/name/configuration.

    Where there are more, `notes` says so in the end.
    Raises: CoterieError without the library, for another form, or when the hub does not give it.
    """
    name, split, column = _parse_hub(source)
    try:
        import datasets
    except ImportError as e:
        raise CoterieError(f"{source}: reading the hub's data sets {EXTRA}") from e
    from huggingface_hub.constants import HF_HUB_OFFLINE

    parts = name.split("/")
    try:
        # A stream fetches what is read only; offline there is nothing but what an earlier download left.
        data = datasets.load_dataset(
            "/".join(parts[:2]), *parts[2:], split=split, streaming=not HF_HUB_OFFLINE, verification_mode="no_checks"
        )
        for number, row in enumerate(data, 1):
            if number > HUB_ROWS:
                notes.append(f"{source}: its first {HUB_ROWS:,} rows are read, and no more")
                break
            yield f"{source}, row {number}", _row(row, column, source)
    except CoterieError:
        raise
    except Exception as e:  # the hub, the network, the cache and every file format have their own
        reason = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]:.200}"
        raise CoterieError(f"{source}: the hub did not give it ({reason}); check name, split and network") from e


def _parse_hub(source: str) -> tuple[str, str, str | None]:
    name, *rest = source.removeprefix(HUB).split(":")
    if len(rest) > 2 or not all([*name.split("/"), *rest]) or name.count("/") > 2:
        raise CoterieError(f"{source}: expected hub:NAME[:SPLIT[:COLUMN]], such as hub:allenai/c4/en:train:text")
    return name, (rest[0] if rest else "train"), (rest[1] if len(rest) > 1 else None)


def _row(row: Mapping[str, object], column: str | None, source: str) -> Mapping[str, object]:
    """What data may have of a row; a column that was asked for stands as its text."""
    if column is not None:
        if column not in row:
            raise CoterieError(f"{source}: columns {_listed(row)}; expected {column!r}")
        return {column if column in COLUMNS else "text": _without_nulls(row[column])}
    if not forms_of(row):
        raise CoterieError(f"{source}: columns {_listed(row)}; name the one with the text: hub:NAME:SPLIT:COLUMN")
    return {name: _without_nulls(row[name]) for name in COLUMNS if name in row}


def _listed(names: Iterable[str]) -> str:
    return f"{', '.join(map(str, names)) or 'none'}"[:200]
