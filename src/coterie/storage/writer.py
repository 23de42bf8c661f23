"""Writes a checkpoint folder so that its name is either absent or complete.

Everything goes to `OUT.partial/`; each finished shard is fsynced, renamed and journalled; the last act renames
the folder to `OUT`. A killed run leaves `OUT.partial/`, from which the same command with resume goes on: a
shard in the journal is kept, anything else is written again, so the result is byte-identical. What a shard holds,
`shards.py` says; how bytes are copied, `copying.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from coterie.errors import CoterieError, writing
from coterie.storage.checkpoint import INDEX, Tensor, read_header
from coterie.storage.copying import Copier, Move, can_share, shareable, write_at
from coterie.storage.files import fsync
from coterie.storage.folders import tidy
from coterie.storage.journal import shards_of
from coterie.storage.resumable import HEARTBEAT, Resumable
from coterie.storage.shards import FileLayout, Output, num_bytes, num_copied

SAID_EVERY = 60.0  # seconds between two lines of the log, while one file is copied


class Source(Protocol):
    """Where bytes are copied from: a `Checkpoint`, or what is left of one (`UsedUp`)."""

    @property
    def path(self) -> Path: ...

    @property
    def shards(self) -> Sequence[str]: ...

    @property
    def stamps(self) -> dict[str, list[int]]: ...

    @property
    def metadata(self) -> Mapping[str, dict[str, str]]: ...

    @property
    def indexed(self) -> bool: ...


class Writer(Resumable):
    """The only code that writes weight files. Use as a context manager; leaving it without `finish` keeps
    `OUT.partial/` for a later resume."""

    def __init__(
        self, out: Path, identity: Mapping[str, object], *, resume: bool = False, io: str = "auto", replace: bool = True
    ) -> None:
        """Opens `OUT.partial/` as `Resumable` does. io: how bytes are copied."""
        self.copier = Copier(io)
        # An engine may put another in its place.
        self.move: Callable[[Path, list[Move], Callable[[int], None]], None] = self.copier.move
        self._places: dict[str, Tensor] = {}  # of the shards written so far
        self._open: dict[str, int] = {}
        self._source: Source
        self._stamps: dict[str, list[int]] = {}
        self._outputs: dict[str, list[Output]] = {}
        self._copied, self._kept, self._total = 0, 0, 0  # bytes: so far, of these by an earlier run, of all
        self._began = self._said = time.monotonic()
        super().__init__(out, identity, resume=resume, replace=replace)
        self._done = self._finished_shards()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        super().__exit__(kind, error, trace)

    def _may_go_on(self, error: BaseException) -> bool:
        return True  # the folder may be all that there is of a model (`in_place.py`)

    def _finished_shards(self) -> dict[str, int]:
        """Those that an earlier run left whole, and their sizes."""
        found = {shard: (self.partial / shard, size) for shard, size in shards_of(self._journal.entries).items()}
        return {shard: size for shard, (path, size) in found.items() if path.is_file() and path.stat().st_size == size}

    def begin(self, source: Source, outputs: dict[str, list[Output]], room: int | None = None) -> None:
        """Notes what will be written from what, before anything is.

        room: bytes of the disk that this takes, if not all.

        Raises: CoterieError when the disk has no room for it (then nothing is left), or the source's files are not
        those of the run that is resumed.
        """
        self._source, self._stamps, self._outputs = source, source.stamps, outputs
        earlier = next((e["source"] for e in self._journal.entries if "began" in e and "source" in e), self._stamps)
        if earlier != self._stamps:
            raise self._another()
        copied, size = {shard: num_copied(tensors) for shard, tensors in outputs.items()}, num_bytes(outputs)
        self._total = sum(copied.values())
        self._copied = self._kept = sum(copied[shard] for shard in copied.keys() & self._done.keys())
        self._check_space(source, outputs, size - self._there(outputs) if room is None else room)
        later, written = size - self._total, self._kept
        self.begun(files=len(outputs), bytes=self._total, later=later, written=written, source=self._stamps)
        verb = f"went on with {len(self._done)} files kept" if self._resumed else "began"
        self._journal.say(
            f"{verb}: coterie {self._identity.get('command', '')}, process {os.getpid()}, "
            f"{self._total:,} bytes to {len(outputs)} files"
        )

    def _there(self, shards: Iterable[str]) -> int:
        """Bytes of the disk that an earlier run's files take already."""
        files = (self.partial / name for shard in shards for name in (shard, f"{shard}.tmp"))
        return sum(path.stat().st_blocks * 512 for path in files if path.is_file())

    def _check_space(self, source: Source, outputs: dict[str, list[Output]], needed: int) -> None:
        """Raises: CoterieError when the disk has no room for `needed` bytes, less those that can be shared."""
        with writing(self.partial):
            free = shutil.disk_usage(self.partial).free
        shared = self.copier.io in ("auto", "reflink")
        if needed > free and shared and can_share(source.path / source.shards[0], self.partial):
            needed -= sum(shareable(FileLayout.of(ts, {}, source.path).moves) for ts in outputs.values())
        if needed > free:
            if not self._resumed:
                self._journal.discard()
            raise CoterieError(f"{self.out}: needs {needed:,} bytes, the disk has {free:,} free; free some space")

    def shard(self, name: str, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Writes one safetensors file, unless the journal says it is done. Tensors keep the given order."""
        outputs, source = self._outputs[name], self._source

        def advance(num_bytes: int) -> None:
            self._advance(num_bytes)
            on_bytes(num_bytes)

        def write(path: Path) -> int:
            layout = FileLayout.of(outputs, source.metadata[name], source.path)
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
        if name not in self._done:
            temporary, began, before = self.partial / f"{name}.tmp", time.monotonic(), Counter(self.copier.moved)
            with writing(self.partial):
                size = make(temporary)
                temporary.rename(self.partial / name)
            self._journal.add({"shard": name, "bytes": size, "at": time.time(), "written": self._copied})
            seconds, ways = time.monotonic() - began, "+".join(self.copier.moved - before) or "nothing copied"
            self._journal.say(f"wrote {name}: {size:,} bytes in {seconds:.1f} s ({ways}); {self._progress()}")
        self._places |= read_header(self.partial / name)[0]

    def _advance(self, num_bytes: int) -> None:
        """Counts copied bytes, and now and then says so."""
        self._copied += num_bytes
        now = time.monotonic()
        if now - self._beat > HEARTBEAT:
            self._beat = now
            self._journal.add({"at": time.time(), "written": self._copied}, sync=False)
        if now - self._said > SAID_EVERY:
            self._said = now
            self._journal.say(self._progress())

    def _progress(self) -> str:
        """Bytes done of all, the rate, and the time left at that rate."""
        rate = (self._copied - self._kept) / max(time.monotonic() - self._began, 1e-9)
        left = f"{max(0, self._total - self._copied) / rate:,.0f} s left" if rate else "nothing to measure a rate by"
        return f"{self._copied:,} of {self._total:,} bytes, {rate / 1e6:,.0f} MB/s, {left}"

    @property
    def io(self) -> dict[str, object]:
        """What the report says: the way asked for, bytes by the way they went, bytes a second of the ways that were
        timed, files kept from an interrupted run."""
        copier, rates = self.copier, {way: round(rate) for way, rate in self.copier.rates.items()}
        return {"asked": copier.io, "bytes": dict(copier.moved), "timed": rates, "kept_files": len(self._done)}

    def put(self, name: str, offset: int, data: bytes) -> None:
        """Fills a hole: bytes of the tensor `name` from byte `offset` of it, in a shard that `shard` wrote."""
        tensor = self._places[name]
        assert offset >= 0 and offset + len(data) <= tensor.num_bytes
        with writing(self.partial):
            if tensor.file not in self._open:
                self._open[tensor.file] = os.open(self.partial / tensor.file, os.O_WRONLY)
            write_at(self._open[tensor.file], data, tensor.start + offset)

    def where(self, name: str) -> tuple[Path, int, int]:
        """The file that a tensor stands in, its first and its last byte there, once `shard` wrote it."""
        tensor = self._places[name]
        return self.partial / tensor.file, tensor.start, tensor.end

    def unit(self, entry: dict[str, Any], of: int | None = None) -> None:
        """Journals a finished unit of work (a layer; `of` so many), after what it put is on the disk."""
        with writing(self.partial):
            for descriptor in self._open.values():
                os.fsync(descriptor)
        super().unit(entry, of)

    def text(self, name: str, content: str) -> None:
        """Writes a small file; a path in it that is not UTF-8 is written escaped."""
        with writing(self.partial):
            (self.partial / name).write_text(content, encoding="utf-8", errors="backslashreplace")
            fsync(self.partial / name)

    def copy(self, path: Path) -> None:
        """Copies a small file."""
        with writing(self.partial):
            shutil.copyfile(path, self.partial / path.name)
            fsync(self.partial / path.name)

    def finish(self) -> None:
        """Writes the index, reads every header back against what was meant, and renames the folder to OUT.

        Raises: CoterieError when the source changed meanwhile: the copy may then be a mixture of two states of it.
        """
        if self._source.indexed:
            weight_map = {output.name: shard for shard, outputs in self._outputs.items() for output in outputs}
            metadata = {"total_size": num_bytes(self._outputs)}
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            self.text(INDEX, json.dumps(index, indent=2) + "\n")
        for shard, outputs in self._outputs.items():
            found, _ = read_header(self.partial / shard)
            written = {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}
            assert written == {o.name: (o.dtype, o.shape) for o in outputs}, f"{shard} is not what was meant"
        if self._source.stamps != self._stamps:
            raise CoterieError(f"{self._source.path}: the source changed while it was copied; start anew, --overwrite")
        self._journal.say(f"complete after {time.monotonic() - self._began:.1f} s")
        with writing(self.partial):
            self._swap()

    def _swap(self) -> None:
        """Gives the folder its name. The journal goes last: whatever kills the run, what is left can be gone on from,
        and a run that waits for the lock finds no folder that is unlocked and unfinished."""
        fsync(self.partial)
        if self.out.exists():
            # An empty folder of a new name is the only thing that a rename may replace here.
            old = self.out.with_name(f"{self.out.name}.old-{os.getpid()}-{time.time_ns()}")
            self._journal.add({"aside": old.name})
            old.mkdir()
            self.out.rename(old)
        self.partial.rename(self.out)
        fsync(self.out.parent)
        tidy(self.out, self._journal.entries)
