"""Where rows of data come from beside plain files: Parquet, folders, and data sets of the hub. Used by `data.py`.

Every row is a JSON-like object with the place it stands at; what it may hold, `data.py` says. The libraries that read
Parquet and the hub's data sets are an extra, imported when they are needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from coterie.errors import CoterieError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".ndjson", ".parquet")  # what is read of a folder
HUB = "hub:"
HUB_ROWS = 10_000  # of a data set on the hub at most: some hold terabytes
KINDS = 4  # of files that are left out, named in a note
COLUMNS = ("text", "input_ids", "messages", "prompt", "answer")
EXTRA = "needs the extra: pip install 'coterie[data]'"

Row = tuple[str, Mapping[str, object]]  # its place, and its columns


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
    found = [p for p in below if p.suffix.lower() in SUFFIXES]
    if not found:
        raise CoterieError(f"{folder}: no file to read; expected some of {', '.join('*' + s for s in SUFFIXES)}")
    if len(found) < len(below):
        others = Counter(p.suffix.lower() or "no suffix" for p in below if p.suffix.lower() not in SUFFIXES)
        kinds = ", ".join(kind for kind, _ in others.most_common(KINDS)) + ", ..." * (len(others) > KINDS)
        notes.append(f"{folder}: files of other kinds are left out: {others.total()} ({kinds})")
    return found


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, of the columns that data may have.

    Raises: CoterieError without pyarrow, for a damaged file, and for one without such a column.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as e:
        raise CoterieError(f"{path}: reading Parquet {EXTRA}") from e
    number = 0
    try:
        with ParquetFile(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            if not columns:
                raise CoterieError(f"{path}: columns {_listed(file.schema_arrow.names)}; expected {COLUMNS[0]!r}")
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for entry in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", entry
    except (ArrowException, OSError, ValueError) as e:
        if isinstance(e, CoterieError):
            raise
        raise CoterieError(f"{path}: cannot be read as Parquet ({e!s:.200})") from e


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
        return {column if column in COLUMNS else "text": row[column]}
    found = {name: row[name] for name in COLUMNS if name in row}
    if not found:
        raise CoterieError(f"{source}: columns {_listed(row)}; name the one with the text: hub:NAME:SPLIT:COLUMN")
    return found


def _listed(names: Iterable[str]) -> str:
    return f"{', '.join(map(str, names)) or 'none'}"[:200]
