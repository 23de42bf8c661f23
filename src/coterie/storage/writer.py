"""Writes a checkpoint folder so that its name is either absent or complete.

Everything goes to `OUT.partial/`; each finished shard is fsynced, renamed and journalled; the last act renames
the folder to `OUT`. A killed run leaves `OUT.partial/`, from which the same command with resume goes on: a
shard in the journal is kept, anything else is written again, so the result is byte-identical. How the bytes get there
is `copying.py`'s affair.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from coterie.errors import CoterieError, guarded
from coterie.storage.checkpoint import BITS, INDEX, MAX_HEADER, Tensor, read_header
from coterie.storage.copying import PAGE, Copier, Move, can_share, joined, shareable, write_at
from coterie.storage.journal import JOURNAL, Journal, held_by_another, is_held, read_journal, shards_of

IN_PLACE = "in-place.json"  # in OUT.partial: MODEL's files are being used up, and what is left to do
HEARTBEAT = 1.0  # seconds between two notes of how far the copying is
SAID_EVERY = 60.0  # seconds between two lines of the log, while one file is copied


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


def whole(tensor: Tensor, name: str | None = None) -> Output:
    """The tensor as it is, perhaps under another name."""
    return Output(name or tensor.name, tensor.dtype, tensor.shape, (Run(tensor.file, tensor.start, tensor.end),))


def computed(name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], bytes]) -> Output:
    """A tensor whose bytes are computed when their turn comes."""
    return Output(name, dtype, shape, (Made(math.prod(shape) * BITS[dtype] // 8, make),))


class Source(Protocol):
    """Where bytes are copied from: a `Checkpoint`, or what is left of one (`in_place.Recipe`)."""

    @property
    def path(self) -> Path: ...

    @property
    def shards(self) -> Sequence[str]: ...

    @property
    def stamps(self) -> dict[str, list[int]]: ...


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there already."""
    return next(place for place in (folder, *folder.resolve().parents) if place.is_dir())


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
    if is_held(partial_of(out)):
        raise held_by_another(partial_of(out))
    if partial_of(out).exists() and not may_exist:
        raise CoterieError(
            f"{partial_of(out)}: left by an interrupted run; add --resume to go on, or --overwrite to start anew"
        )
    if (partial_of(out) / IN_PLACE).exists():
        raise CoterieError(
            f"{partial_of(out)}: holds what --in-place left of a model; repeat that command with --resume, which alone "
            "completes it"
        )
    if not _ours(partial_of(out)):
        raise CoterieError(f"{partial_of(out)}: in the way, and nothing that coterie wrote; choose another OUT")


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _ours(partial: Path) -> bool:
    """Whether `OUT.partial` may be emptied: it is absent, empty, or a plain folder with our journal or report."""
    if not partial.exists():
        return not partial.is_symlink()
    if not partial.is_dir() or partial.is_symlink():
        return False
    # A link in it would be written through, a pipe waited for; coterie makes neither.
    plain = all(not path.is_symlink() and (path.is_file() or path.is_dir()) for path in partial.iterdir())
    return plain and (not any(partial.iterdir()) or any((partial / n).is_file() for n in (JOURNAL, "coterie.json")))


class Writer:
    """The only code that writes weight files. Use as a context manager; leaving it without `finish` keeps
    `OUT.partial/` for a later resume."""

    def __init__(
        self, out: Path, identity: dict[str, Any], *, resume: bool = False, io: str = "auto", replace: bool = True
    ) -> None:
        """Opens `OUT.partial/`, fresh or resumed. `identity` is what must be equal for a resume to be the same run.

        replace: whether OUT may exist.
        Raises: CoterieError when another run holds the folder, or a resumed one was asked for something else.
        """
        self.out, self.partial = out, partial_of(out)
        self.units: list[dict[str, Any]] = []  # of this run and, after a resume, of the one before
        self.copier = Copier(io)
        # An engine may put another in its place.
        self.move: Callable[[Path, list[Move], Callable[[int], None]], None] = self.copier.move
        self._places: dict[str, tuple[str, int, int]] = {}  # tensor -> shard, first and last byte
        self._open: dict[str, int] = {}
        self._sources: Source | None = None
        self._stamps: dict[str, list[int]] = {}
        self._written, self._kept, self._total = 0, 0, 0  # bytes: by this run, by the one before, of all
        self._began = self._said = time.monotonic()
        self._beat = 0.0
        self._identity = identity
        self._journal = Journal(self.partial)
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        try:
            if self.out.exists() and not (replace or resume):  # since `check_out` looked
                self._journal.discard()
                raise CoterieError(f"{out}: exists already; choose another OUT, or add --overwrite")
            self._resumed = resume and bool(self._journal.entries)
            self._done = self._guarded(self._recover)
        except CoterieError:
            self._journal.close()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        if error is not None and self.partial.exists():
            with suppress(CoterieError):
                self._journal.say(f"stopped: {str(error) or type(error).__name__}")
        self._journal.close()

    def _recover(self) -> dict[str, int]:
        """The finished shards and their sizes, after a resume; a fresh run empties the folder."""
        entries = self._journal.entries
        if self._resumed:
            if entries[0].get("identity") != self.identity:
                raise self._another()
            self._journal.keep()
            self.units = [e["unit"] for e in entries[1:] if isinstance(e.get("unit"), dict)]
            return {s: n for s, n in shards_of(entries).items() if self._size(s) == n}
        for path in self.partial.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._journal.clear()
        asked = {key: self._identity.get(key) for key in ("command", "options")}
        self._journal.add({"identity": self.identity, "asked": asked})
        return {}

    def _another(self) -> CoterieError:
        return CoterieError(
            f"{self.partial}: was begun with another source, plan or option; "
            "repeat the first command, or start anew with --overwrite"
        )

    def _size(self, shard: str) -> int | None:
        path = self.partial / shard
        return path.stat().st_size if path.is_file() else None

    def _guarded(self, action: Callable[[], Any]) -> Any:
        return guarded(self.partial, action)

    def begin(self, source: Source, outputs: dict[str, list[Output]], room: int | None = None) -> None:
        """Notes what will be written from what, before anything is.

        room: bytes of the disk that this takes, if not all.

        Raises: CoterieError when the disk has no room for it (then nothing is left), or the source's files are not
        those of the run that is resumed.
        """
        self._sources, self._stamps = source, source.stamps
        earlier = next((e["source"] for e in self._journal.entries if "began" in e and "source" in e), self._stamps)
        if earlier != self._stamps:
            raise self._another()
        self._total = sum(num_copied(tensors) for tensors in outputs.values())
        self._kept = sum(num_copied(tensors) for shard, tensors in outputs.items() if shard in self._done)
        entry: dict[str, Any] = {"began": time.time(), "pid": os.getpid(), "files": len(outputs), "bytes": self._total}
        holes = sum(p.num_bytes for tensors in outputs.values() for o in tensors for p in o.parts)
        entry |= {"later": holes - self._total, "written": self._kept, "source": self._stamps}
        self._check_space(source, outputs, room)
        self._journal.add(entry)
        verb = f"went on with {len(self._done)} files kept" if self._resumed else "began"
        self._journal.say(
            f"{verb}: coterie {self._identity.get('command', '')}, process {os.getpid()}, "
            f"{self._total:,} bytes to {len(outputs)} files"
        )

    def _check_space(self, source: Source, outputs: dict[str, list[Output]], room: int | None) -> None:
        """Raises: CoterieError when the disk cannot hold what is not there already."""
        files = (self.partial / name for shard in outputs for name in (shard, f"{shard}.tmp"))
        there = sum(path.stat().st_blocks * 512 for path in files if path.is_file())
        needed = sum(o.num_bytes for tensors in outputs.values() for o in tensors) - there if room is None else room
        free = self._guarded(lambda: shutil.disk_usage(self.partial).free)
        shared = self.copier.io in ("auto", "reflink")
        if needed > free and shared and can_share(source.path / source.shards[0], self.partial):
            needed -= sum(shareable(Layout.of(ts, {}, source.path).moves) for ts in outputs.values())
        if needed > free:
            if not self._resumed:
                self._journal.discard()
            raise CoterieError(f"{self.out}: needs {needed:,} bytes, the disk has {free:,} free; free some space")

    def shard(
        self,
        name: str,
        outputs: list[Output],
        metadata: dict[str, str],
        source: Source,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Writes one safetensors file, unless the journal says it is done. Tensors keep the given order."""

        def advance(num_bytes: int) -> None:
            self._advance(num_bytes)
            on_bytes(num_bytes)

        def write(path: Path) -> int:
            layout = Layout.of(outputs, metadata, source.path)
            with path.open("wb", buffering=0) as file:
                write_at(file.fileno(), layout.header, 0)
                os.truncate(file.fileno(), layout.num_bytes)
                for position, part in layout.made:
                    made = part.make()
                    assert len(made) == part.num_bytes
                    write_at(file.fileno(), made, position)
                    advance(len(made))
                self.move(path, layout.moves, advance)
                os.fsync(file.fileno())
            return layout.num_bytes

        if name in self._done:
            on_bytes(num_copied(outputs))
        self.file(name, write)

    def file(self, name: str, make: Callable[[Path], int]) -> None:
        """A safetensors file that `make(path)` leaves complete and on the disk under another name, returning its size;
        unless the journal says it is done."""
        if name in self._done:
            self._place(name)
            return
        temporary, began, before = self.partial / f"{name}.tmp", time.monotonic(), Counter(self.copier.moved)
        size = self._guarded(lambda: make(temporary))
        self._guarded(lambda: temporary.rename(self.partial / name))
        self._journal.add({"shard": name, "bytes": size, "at": time.time(), "written": self._kept + self._written})
        seconds, ways = time.monotonic() - began, "+".join(self.copier.moved - before) or "nothing copied"
        self._journal.say(f"wrote {name}: {size:,} bytes in {seconds:.1f} s ({ways}); {self._progress()}")
        self._place(name)

    def _advance(self, num_bytes: int) -> None:
        """Counts copied bytes, and now and then says so."""
        self._written += num_bytes
        now = time.monotonic()
        if now - self._beat > HEARTBEAT:
            self._beat = now
            self._journal.add({"at": time.time(), "written": self._kept + self._written}, sync=False)
        if now - self._said > SAID_EVERY:
            self._said = now
            self._journal.say(self._progress())

    def _progress(self) -> str:
        """Bytes done of all, the rate, and the time left at that rate."""
        rate = self._written / max(time.monotonic() - self._began, 1e-9)
        done = self._kept + self._written
        left = f"{max(0, self._total - done) / rate:,.0f} s left" if rate else "nothing to measure a rate by"
        return f"{done:,} of {self._total:,} bytes, {rate / 1e6:,.0f} MB/s, {left}"

    @property
    def io(self) -> dict[str, Any]:
        """For the report: the way asked for, bytes by the way they went, and files kept from an interrupted run."""
        return {"asked": self.copier.io, "bytes": dict(self.copier.moved), "kept_files": len(self._done)}

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
            write_at(self._open[shard], data, start + offset)

        self._guarded(write)

    def where(self, name: str) -> tuple[Path, int, int]:
        """The file that a tensor stands in, its first and its last byte there, once `shard` wrote it."""
        shard, start, end = self._places[name]
        return self.partial / shard, start, end

    def unit(self, entry: dict[str, Any], of: int | None = None) -> None:
        """Journals a finished unit of work (a layer; `of` so many), after what it put is on the disk."""
        for descriptor in self._open.values():
            self._guarded(partial(os.fsync, descriptor))
        self._journal.add({"unit": entry, "of": of, "at": time.time()})
        self.units.append(entry)
        self._journal.say(f"finished {len(self.units)}" + (f" of {of} layers" if of else ""))

    def text(self, name: str, content: str) -> None:
        def write() -> None:
            # A path that is not UTF-8 is written escaped.
            with (self.partial / name).open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

        self._guarded(write)

    def copy(self, path: Path) -> None:
        def write() -> None:
            shutil.copyfile(path, self.partial / path.name)
            with (self.partial / path.name).open("rb+") as file:
                os.fsync(file.fileno())

        self._guarded(write)

    def finish(self, expected: dict[str, dict[str, Output]], indexed: bool) -> None:
        """Writes the index, reads every header back against what was meant, and renames the folder to OUT.

        Raises: CoterieError when somebody wrote to the source meanwhile: what was copied is then nobody's model.
        """
        if indexed:
            weight_map = {name: shard for shard, outputs in expected.items() for name in outputs}
            total = sum(o.num_bytes for outputs in expected.values() for o in outputs.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self.text(INDEX, json.dumps(index, indent=2) + "\n")
        for shard, outputs in expected.items():
            found, _ = read_header(self.partial / shard)
            written = {n: (t.dtype, t.shape) for n, t in found.items()}
            assert written == {n: (o.dtype, o.shape) for n, o in outputs.items()}, f"{shard} is not what was meant"

        if self._sources and self._sources.stamps != self._stamps:
            raise CoterieError(f"{self._sources.path}: the source changed while it was copied; start anew, --overwrite")
        self._journal.say(f"complete after {time.monotonic() - self._began:.1f} s")
        self._guarded(self._swap)

    def _swap(self) -> None:
        """Gives the folder its name. The journal goes last: whatever kills the run, what is left can be gone on from,
        and a run that waits for the lock finds no folder that is unlocked and unfinished."""
        _fsync_folder(self.partial)
        if self.out.exists():
            # An empty folder of a new name is the only thing that a rename may replace here.
            old = self.out.with_name(f"{self.out.name}.old-{os.getpid()}-{time.time_ns()}")
            self._journal.add({"aside": old.name})
            old.mkdir()
            self.out.rename(old)
        self.partial.rename(self.out)
        _fsync_folder(self.out.parent)
        tidy(self.out, self._journal.entries)


def tidy(out: Path, entries: list[dict[str, Any]] | None = None) -> None:
    """Removes what a finished run has no more use for: the result that it replaced, and what it wrote down."""
    if entries is None:
        entries = read_journal(out)
    for name in (entry["aside"] for entry in entries if "aside" in entry):
        if isinstance(name, str) and name == Path(name).name and name.startswith(f"{out.name}.old-"):
            shutil.rmtree(out.with_name(name), ignore_errors=True)
    with suppress(OSError):
        (out / IN_PLACE).unlink(missing_ok=True)
        (out / JOURNAL).unlink(missing_ok=True)


def _fsync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True)
class Layout:
    """What stands where in a file to be written."""

    header: bytes
    moves: list[Move]  # neighbouring runs of one source file as one
    made: list[tuple[int, Made]]  # from which byte on
    num_bytes: int

    @classmethod
    def of(cls, outputs: list[Output], metadata: dict[str, str], source: Path) -> Layout:
        """`source`: the folder that runs are of."""
        header = header_bytes(outputs, metadata)
        placed = [(len(header) + position, part) for position, part in _placed(outputs)]
        moves = [Move(source / p.file, p.start, p.end, to) for to, p in placed if isinstance(p, Run)]
        made = [(position, part) for position, part in placed if isinstance(part, Made)]
        return cls(header, joined(moves), made, len(header) + sum(output.num_bytes for output in outputs))


def _placed(outputs: list[Output]) -> Iterator[tuple[int, Run | Made | Hole]]:
    """All parts, with the byte of the data where each begins."""
    position = 0
    for part in (part for output in outputs for part in output.parts):
        yield position, part
        position += part.num_bytes


def num_copied(outputs: list[Output]) -> int:
    """Bytes that are there once the file is: all but the holes."""
    return sum(p.num_bytes for output in outputs for p in output.parts if not isinstance(p, Hole))


def header_bytes(outputs: list[Output], metadata: dict[str, str], length: int | None = None) -> bytes:
    """The length and JSON header of a safetensors file, of `length` bytes in all if it is shorter.

    Padded with spaces otherwise so that the most bytes keep their offset modulo 4096: page-aligned runs then stay
    page-aligned, a filesystem that shares blocks can share them, and the page cache can be passed by.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for output in outputs:
        end = position + output.num_bytes
        header[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * ((_offset(outputs) - 8 - len(text)) % PAGE if length is None else length - 8 - len(text))
    if len(text) > MAX_HEADER:
        raise CoterieError(f"the header to write has {len(text):,} bytes; readers take at most {MAX_HEADER:,}")
    return len(text).to_bytes(8, "little") + text


def _offset(outputs: list[Output]) -> int:
    """Where data should begin modulo a page: 0, or where most copied bytes stand as they do in their source."""
    votes: Counter[int] = Counter()
    for position, part in _placed(outputs):
        if isinstance(part, Run):
            votes[(part.start - position) % PAGE] += part.num_bytes
    return votes.most_common(1)[0][0] if votes else 0
