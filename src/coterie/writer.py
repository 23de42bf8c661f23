"""Writes a checkpoint folder so that its name is either absent or complete.

Everything goes to `OUT.partial/`; each finished shard is fsynced, renamed and journalled; the last act renames
the folder to `OUT`. A killed run leaves `OUT.partial/`, from which the same command with resume goes on: a
shard in the journal is kept, anything else is written again, so the result is byte-identical.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from coterie.checkpoint import INDEX, MAX_HEADER, Checkpoint, read_header
from coterie.errors import CoterieError

JOURNAL = "journal.jsonl"
PAGE = 4096
CHUNK = 16 << 20  # bytes per read where the kernel cannot copy by itself


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes `start:end` of a source shard, copied as they are."""

    file: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Made:
    """Bytes computed when their turn comes."""

    num_bytes: int
    make: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Hole:
    """Bytes that come later, through `Writer.put`."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write: its parts, end to end, are its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Run | Made | Hole, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def check_out(out: Path, source: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses an OUT that would destroy or swallow something. Raises: CoterieError."""
    if resume and overwrite:
        raise CoterieError("--resume and --overwrite exclude each other; choose one")
    try:
        _check_place(out, source, resume or overwrite)
    except OSError as error:
        raise CoterieError(f"{out}: cannot be written ({error.strerror or error}); choose another OUT") from error


def _check_place(out: Path, source: Path, may_exist: bool) -> None:
    if out.name in ("", "..") or "\0" in out.name:
        raise CoterieError(f"{out}: names no folder of its own; choose another OUT")
    home = source.resolve()
    for target in (out.resolve(), partial_of(out).resolve()):
        if target == home or home in target.parents or target in home.parents:
            raise CoterieError(f"{target}: lies inside MODEL ({source}), or MODEL inside it; choose another OUT")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CoterieError(f"{out}: exists and is not a plain folder; choose another OUT")
    if out.exists() and not may_exist:
        raise CoterieError(f"{out}: exists already; choose another OUT, or add --overwrite")
    if out.exists() and any(out.iterdir()) and not (out / "coterie.json").is_file():
        raise CoterieError(f"{out}: is not a folder that coterie wrote (no coterie.json); refusing to replace it")
    if partial_of(out).exists() and not may_exist:
        raise CoterieError(
            f"{partial_of(out)}: left by an interrupted run; add --resume to go on, or --overwrite to start anew"
        )
    if not _ours(partial_of(out)):
        raise CoterieError(f"{partial_of(out)}: in the way, and nothing that coterie wrote; choose another OUT")


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _ours(partial: Path) -> bool:
    """Whether `OUT.partial` may be emptied: it is absent, empty, or a plain folder with our journal or report."""
    if not partial.exists():
        return not partial.is_symlink()
    plain = partial.is_dir() and not partial.is_symlink()
    return plain and (not any(partial.iterdir()) or any((partial / n).is_file() for n in (JOURNAL, "coterie.json")))


class Writer:
    """The only code that writes weight files. Use as a context manager; leaving it without `finish` keeps
    `OUT.partial/` for a later resume."""

    def __init__(self, out: Path, identity: dict[str, Any], *, resume: bool = False) -> None:
        """Opens `OUT.partial/`, fresh or resumed. `identity` is what must be equal for a resume to be the same run.

        Raises: CoterieError when another run holds the folder, or a resumed one was asked for something else.
        """
        self.out, self.partial = out, partial_of(out)
        self.units: list[dict[str, Any]] = []  # of this run and, after a resume, of the one before
        self._places: dict[str, tuple[str, int, int]] = {}  # tensor -> shard, first and last byte
        self._open: dict[str, int] = {}
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._guarded(lambda: self.partial.mkdir(parents=True, exist_ok=True))
        self._journal = self._guarded(lambda: (self.partial / JOURNAL).open("ab+", buffering=0))
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._journal.close()
            raise CoterieError(
                f"{self.partial}: another run writes here; wait for it, or choose another OUT"
            ) from error
        try:
            self._done = self._guarded(lambda: self._recover(resume))
        except CoterieError:
            self._journal.close()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._journal.close()

    def _recover(self, resume: bool) -> dict[str, int]:
        """The finished shards and their sizes, after a resume; a fresh run empties the folder."""
        entries, end = self._entries()
        if resume and entries:
            if entries[0].get("identity") != self.identity:
                raise CoterieError(
                    f"{self.partial}: was begun with another source, plan or option; "
                    "repeat the first command, or start anew with --overwrite"
                )
            self._journal.truncate(end)
            self.units = [e["unit"] for e in entries[1:] if isinstance(e.get("unit"), dict)]
            done = {e["shard"]: e.get("bytes") for e in entries[1:] if isinstance(e.get("shard"), str)}
            return {s: n for s, n in done.items() if type(n) is int and self._size(s) == n}
        for path in self.partial.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._journal.truncate(0)
        self._log({"identity": self.identity})
        return {}

    def _entries(self) -> tuple[list[dict[str, Any]], int]:
        """The journal's whole lines, and where they end: what a cut line named is written again."""
        self._journal.seek(0)
        entries, end = [], 0
        for line in self._journal.read().splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(entry, dict) or not line.endswith(b"\n"):
                break
            entries.append(entry)
            end += len(line)
        return entries, end

    def _size(self, shard: str) -> int | None:
        path = self.partial / shard
        return path.stat().st_size if path.is_file() else None

    def _log(self, entry: dict[str, Any]) -> None:
        def write() -> None:
            _write_all(self._journal.fileno(), json.dumps(entry).encode() + b"\n")
            os.fsync(self._journal.fileno())

        self._guarded(write)

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """Runs a file operation; a full or read-only disk becomes a CoterieError."""
        try:
            return action()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            hint = "free some space and add --resume" if full else "check permissions, or choose another OUT"
            raise CoterieError(f"{self.partial}: cannot be written ({error.strerror or error}); {hint}") from error

    def check_space(self, num_bytes: int) -> None:
        """Raises: CoterieError when the disk cannot hold `num_bytes` beside what is already written."""
        free = shutil.disk_usage(self.partial).free + sum(self._done.values())
        if num_bytes > free:
            raise CoterieError(f"{self.out}: needs {num_bytes:,} bytes, the disk has {free:,} free; free some space")

    def shard(
        self,
        name: str,
        outputs: list[Output],
        metadata: dict[str, str],
        source: Checkpoint,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Writes one safetensors file, unless the journal says it is done. Tensors keep the given order."""
        if name in self._done:
            on_bytes(sum(o.num_bytes for o in outputs))
            self._place(name)
            return
        temporary = self.partial / f"{name}.tmp"

        def write() -> int:
            with temporary.open("wb") as file:
                file.write(header_bytes(outputs, metadata))
                file.flush()
                copy_parts(file.fileno(), source.path, (p for o in outputs for p in o.parts), on_bytes)
                os.fsync(file.fileno())
                return file.tell()

        size = self._guarded(write)
        self._guarded(lambda: temporary.rename(self.partial / name))
        self._log({"shard": name, "bytes": size})
        self._place(name)

    def _place(self, shard: str) -> None:
        """Where the shard's tensors stand."""
        found, _ = read_header(self.partial / shard)
        self._places |= {name: (shard, tensor.start, tensor.end) for name, tensor in found.items()}

    def put(self, name: str, offset: int, data: bytes) -> None:
        """Fills a hole: bytes of the tensor `name` from byte `offset` of it, in a shard that `shard` wrote."""
        shard, start, end = self._places[name]
        assert offset >= 0 and start + offset + len(data) <= end

        def write() -> None:
            if shard not in self._open:
                self._open[shard] = os.open(self.partial / shard, os.O_WRONLY)
            view, position = memoryview(data), start + offset
            while view:
                written = os.pwrite(self._open[shard], view, position)
                view, position = view[written:], position + written

        self._guarded(write)

    def unit(self, entry: dict[str, Any]) -> None:
        """Journals a finished unit of work (a layer), after what it put is on the disk."""
        for descriptor in self._open.values():
            self._guarded(partial(os.fsync, descriptor))
        self._log({"unit": entry})
        self.units.append(entry)

    def text(self, name: str, content: str) -> None:
        def write() -> None:
            # A path that is not UTF-8 is written escaped.
            with (self.partial / name).open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

        self._guarded(write)

    def copy(self, path: Path) -> None:
        self._guarded(lambda: shutil.copyfile(path, self.partial / path.name))

    def finish(self, expected: dict[str, dict[str, Output]], indexed: bool) -> None:
        """Writes the index, reads every header back against what was meant, and renames the folder to OUT."""
        if indexed:
            weight_map = {name: shard for shard, outputs in expected.items() for name in outputs}
            total = sum(o.num_bytes for outputs in expected.values() for o in outputs.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self.text(INDEX, json.dumps(index, indent=2) + "\n")
        for shard, outputs in expected.items():
            found, _ = read_header(self.partial / shard)
            written = {n: (t.dtype, t.shape) for n, t in found.items()}
            assert written == {n: (o.dtype, o.shape) for n, o in outputs.items()}, f"{shard} is not what was meant"

        def swap() -> None:
            (self.partial / JOURNAL).unlink()
            _fsync_folder(self.partial)
            if not self.out.exists():
                self.partial.rename(self.out)
                _fsync_folder(self.out.parent)
                return
            # An empty folder of a new name is the only thing that a rename may replace here.
            old = tempfile.mkdtemp(prefix=f"{self.out.name}.old-", dir=self.out.parent)
            self.out.rename(old)
            self.partial.rename(self.out)
            _fsync_folder(self.out.parent)
            shutil.rmtree(old, ignore_errors=True)

        self._guarded(swap)


def _fsync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def header_bytes(outputs: list[Output], metadata: dict[str, str]) -> bytes:
    """The length and JSON header of a safetensors file.

    Padded with spaces so that the data begins at the same offset modulo 4096 as in the source: page-aligned
    runs then stay page-aligned, and a filesystem that shares blocks can share them.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for output in outputs:
        end = position + output.num_bytes
        header[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    first = next((part for output in outputs for part in output.parts), None)
    offset = first.start if isinstance(first, Run) else 0
    text += b" " * ((offset - 8 - len(text)) % PAGE)
    assert len(text) <= MAX_HEADER
    return len(text).to_bytes(8, "little") + text


def copy_parts(
    target: int, folder: Path, parts: Iterable[Run | Made | Hole], on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Appends parts to the open file `target`; neighbouring runs of one source file are copied as one."""
    pending: Run | None = None
    sources: dict[str, int] = {}

    def flush() -> None:
        if pending is not None:
            if pending.file not in sources:
                sources[pending.file] = os.open(folder / pending.file, os.O_RDONLY)
            _copy_range(sources[pending.file], target, pending, on_bytes)

    try:
        for part in parts:
            if isinstance(part, Run) and pending and pending.file == part.file and pending.end == part.start:
                pending = Run(part.file, pending.start, part.end)
                continue
            flush()
            pending = part if isinstance(part, Run) else None
            if isinstance(part, Hole):
                os.truncate(target, os.lseek(target, part.num_bytes, os.SEEK_CUR))
            if isinstance(part, Made):
                made = part.make()
                assert len(made) == part.num_bytes
                _write_all(target, made)
                on_bytes(len(made))
        flush()
    finally:
        for descriptor in sources.values():
            os.close(descriptor)


def _copy_range(source: int, target: int, run: Run, on_bytes: Callable[[int], None]) -> None:
    """Copies inside the kernel where it can (and shares blocks where the filesystem can), else through a buffer."""
    position = run.start
    while position < run.end:
        wanted = min(run.end - position, 64 * CHUNK)
        try:
            copied = os.copy_file_range(source, target, wanted, position)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
            block = os.pread(source, min(wanted, CHUNK), position)
            copied = len(block)
            _write_all(target, block)
        if copied == 0:
            raise CoterieError(f"{run.file}: ended at byte {position:,}, expected {run.end:,}; the source changed")
        position += copied
        on_bytes(copied)


def _write_all(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
