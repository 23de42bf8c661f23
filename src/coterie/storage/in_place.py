"""`--in-place`: MODEL becomes OUT without room for a second copy, and is used up.

Beside `edits/execution.py`, which says what stands where, and `writer.py`, which names and journals files. A weight
file is moved into OUT.partial, and the filesystem takes out of it what goes (`fallocate`, FALLOC_FL_COLLAPSE_RANGE:
ext4, XFS), in whole blocks and without moving a byte. Where a file does not lend itself to that, it is copied as ever
and its source removed: room for one file is needed.

After the first file there is no MODEL to decide from again. So everything that is still to be done stands in
OUT.partial/in-place.json before it begins, and a resume needs that alone:

    rename into OUT.partial | bytes that fill up the block before each cut, which go where the cut begins, among bytes
    that go | cuts, from the last to the first | header, of the old length | rename to the final name | journal

Each step can be repeated but for the cuts, and the file's size says how many of those are done. This holds for a run
that is killed; whether it holds when power fails between two cuts depends on the filesystem.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError, reading, writing
from coterie.storage.card import card
from coterie.storage.checkpoint import BITS, Checkpoint, load_json
from coterie.storage.copying import write_at
from coterie.storage.folders import IN_PLACE, partial_of, tidy
from coterie.storage.planned import root
from coterie.storage.record import Progress, Report, Stopwatch, record_of, to_json
from coterie.storage.shards import Output, Run, header_bytes, num_copied
from coterie.storage.writer import Writer

COLLAPSE_RANGE = 8  # linux/falloc.h
MAX_RECORD = 2**31  # bytes
FALLOCATE = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # of Linux


@dataclass(frozen=True)
class WeightFile:
    """What is to become of a file of MODEL."""

    name: str
    stamp: list[int]  # as `Checkpoint.stamps` has it
    start: int  # where its data begins
    metadata: dict[str, str]
    tensors: list[Output]
    cut: bool = False  # by the filesystem; else it is copied

    @property
    def runs(self) -> list[Run]:
        """What stays, in the order in which it will stand."""
        return [p for o in self.tensors for p in o.parts if isinstance(p, Run) and p.num_bytes]

    def cuts(self, block: int) -> list[tuple[int, int]] | None:
        """The ranges that go, ascending, but for what goes at the end; None where the file cannot be cut to what is
        wanted: a range is not of whole blocks, order changes, or the header has grown."""
        found, position = [], self.start
        for run in self.runs:
            if run.start < position or (run.start - position) % block:
                return None
            if run.start > position:
                found.append((position, run.start))
            position = run.end
        return found if len(header_bytes(self.tensors, self.metadata, 0)) <= self.start else None

    def as_dict(self) -> dict[str, object]:
        def runs(output: Output) -> list[list[int]]:
            return [[part.start, part.end] for part in output.parts if isinstance(part, Run)]

        tensors = [[o.name, o.dtype, list(o.shape), runs(o)] for o in self.tensors]
        found = {"stamp": self.stamp, "start": self.start, "cut": self.cut, "metadata": self.metadata}
        return found | {"tensors": tensors}


@dataclass(frozen=True)
class UsedUp:
    """What is to become of each weight file, and everything that OUT needs beside them."""

    path: Path  # of the source
    files: dict[str, WeightFile]
    gone: dict[str, list[int]]  # the stamps of files of which nothing stays
    indexed: bool
    report: Report

    @classmethod
    def of(cls, source: Checkpoint, outputs: dict[str, list[Output]], report: Report, out: Path) -> UsedUp:
        """Raises: CoterieError, before anything is changed, where MODEL's files cannot be used up."""
        source = root(source)
        for shard, tensors in outputs.items():
            odd = next((o for o in tensors for p in o.parts if not isinstance(p, Run) or p.file != shard), None)
            if odd:
                raise CoterieError(
                    f"--in-place: {odd.name!r} is computed, not copied, and what it is made of must be there until the "
                    "end; leave --in-place out"
                )
        _check_files(source, out)
        block, stamps, files = block_size(source.path), source.stamps, {}
        for shard, tensors in outputs.items():
            start = min(t.start for t in source.tensors.values() if t.file == shard)
            file = WeightFile(shard, stamps[shard], start, source.metadata[shard], tensors)
            files[shard] = replace(file, cut=block > 0 and file.cuts(block) is not None)
        gone = {shard: stamp for shard, stamp in stamps.items() if shard not in outputs}
        return cls(source.path.resolve(), files, gone, source.indexed, report)

    @property
    def stamps(self) -> dict[str, list[int]]:
        return {name: file.stamp for name, file in self.files.items()} | self.gone

    @property
    def shards(self) -> list[str]:
        return list(self.stamps)

    @property
    def metadata(self) -> dict[str, dict[str, str]]:
        return {name: file.metadata for name, file in self.files.items()}

    @property
    def copied(self) -> list[WeightFile]:
        return [file for file in self.files.values() if not file.cut]

    @property
    def identity(self) -> dict[str, object]:
        """What a resume must be equal in."""
        report = self.report
        return {
            "command": report.command, "options": report.options, "plan": report.plan,
            "source": report.source["hash"], "in_place": str(self.path),
        }  # fmt: skip

    @property
    def room(self) -> int:
        """Bytes that the disk must have free: for the largest file that is copied."""
        return max((num_copied(file.tensors) for file in self.copied), default=0)

    @property
    def note(self) -> str:
        copied = len(self.copied)
        more = f", {copied} copied one at a time ({self.room:,} bytes of room)" if copied else ""
        return (
            f"--in-place uses up the weight files of {self.path}: {len(self.files) - copied} cut where they are{more}"
        )

    def check(self, shard: str) -> Path:
        """The file to use up. Raises: CoterieError where it is not the one that was planned with."""
        path = self.path / shard
        with reading(path, "; it is needed to go on"):
            status = path.stat()
        if [status.st_size, status.st_mtime_ns] != self.stamps[shard]:
            raise CoterieError(f"{path}: changed since this run began; what was planned no longer fits it")
        return path

    def remove(self, shard: str) -> None:
        """What is left of a file once its bytes are in OUT.partial under their final name."""
        if (self.path / shard).exists():
            with writing(self.path):
                self.check(shard).unlink()

    def as_dict(self) -> dict[str, object]:
        files = {name: file.as_dict() for name, file in self.files.items()}
        found = {"path": str(self.path), "files": files, "gone": self.gone, "indexed": self.indexed}
        return found | {"record": self.report.as_dict()}

    @classmethod
    def read(cls, path: Path) -> UsedUp:
        """Raises: CoterieError for a record that `as_dict` did not write: it says which files are used up."""
        found = load_json(path, limit=MAX_RECORD)
        try:
            files = {name: _file(name, **file) for name, file in found["files"].items()}
            for name, stamp in found["gone"].items():
                _demand_file(name, stamp)
            return cls(Path(found["path"]), files, found["gone"], found["indexed"], _report(found["record"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CoterieError(f"{path}: damaged ({error!r:.80}); what is left to do cannot be told from it") from error


def _demand(condition: bool) -> None:
    """Raises: ValueError. A record is not trusted, so this is no assertion, which `python -O` leaves out."""
    if not condition:
        raise ValueError("a value that no run writes")


def _demand_file(name: str, stamp: list[int]) -> None:
    _demand(Path(name).name == name and name.endswith(".safetensors"))
    _demand(len(stamp) == 2 and all(type(n) is int for n in stamp))


def _file(name: str, *, stamp: Any, start: Any, cut: Any, metadata: Any, tensors: Any) -> WeightFile:
    """One file of a record. Raises: ValueError and others for what cannot be."""
    _demand_file(name, stamp)
    _demand(type(start) is int and 8 <= start <= stamp[0] and all(isinstance(v, str) for v in metadata.values()))
    found = []
    for tensor, dtype, shape, runs in tensors:
        _demand(isinstance(tensor, str) and dtype in BITS and all(type(n) is int and n >= 0 for n in shape))
        _demand(all(type(n) is int for run in runs for n in run) and all(start <= a <= b <= stamp[0] for a, b in runs))
        found.append(Output(tensor, dtype, tuple(shape), tuple(Run(name, a, b) for a, b in runs)))
        _demand(found[-1].num_bytes * 8 == math.prod(shape) * BITS[dtype])
    return WeightFile(name, stamp, start, metadata, found, bool(cut))


def _report(record: Mapping[str, Any]) -> Report:
    """A report out of its record. Raises: ValueError and KeyError for anything else."""
    fields = {key: record[key] for key in ("command", "options", "source", "plan", "report", "versions")}
    _demand(all(isinstance(value, str if key == "command" else dict) for key, value in fields.items()))
    _demand(isinstance(fields["source"]["hash"], str) and isinstance(fields["source"]["path"], str))
    _demand({"before", "after"} <= set(fields["report"]))
    return Report(**fields)


def _check_files(source: Checkpoint, out: Path) -> None:
    """Weight files must be the folder's own, and beside OUT: they become OUT's by being renamed."""
    home = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(source.path, os.W_OK):
        raise CoterieError(
            f"--in-place: {source.path} is read-only, so its files cannot be moved; leave --in-place out"
        )
    for shard in source.shards:
        path = source.path / shard
        status = path.lstat()
        if path.is_symlink() or status.st_nlink > 1:
            raise CoterieError(
                f"--in-place: {path} is a link, and other names would lose what it leads to; copy the folder first, or "
                "leave --in-place out"
            )
        if status.st_dev != home.stat().st_dev:
            raise CoterieError(f"--in-place: {out} is on another filesystem than {source.path}; choose another OUT")


def block_size(folder: Path) -> int:
    """Bytes of the blocks that files in the folder can be cut by; 0 where they cannot be cut: tried on an empty one."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            block = os.fstatvfs(file.fileno()).f_bsize
            os.truncate(file.fileno(), 3 * block)
            collapse(file.fileno(), block, block)
    except OSError:
        return 0
    return block


def collapse(descriptor: int, offset: int, length: int) -> None:
    """Takes `length` bytes from `offset` on out of a file, what follows moves up. Raises: OSError."""
    if FALLOCATE is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if FALLOCATE(descriptor, COLLAPSE_RANGE, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# --- the run -------------------------------------------------------------------------------------------------------


def check_in_place(*, io: str, engine: str, overwrite: bool) -> None:
    """Raises: CoterieError for options that would be ignored, or would lose what cannot be had again."""
    for flag, is_given in (("--io", io != "auto"), ("--engine", engine != "local"), ("--overwrite", overwrite)):
        if is_given:
            raise CoterieError(f"--in-place and {flag} exclude each other: MODEL's own files become OUT, and only once")


def went_on(
    out: Path, command: str, options: Mapping[str, object], model: str | Path, clock: Stopwatch, on_progress: Progress
) -> Report | None:
    """Completes what an interrupted run of the same command left, or reads the report of one that is complete. None
    where MODEL was not touched yet.

    Raises: CoterieError where that run was asked for something else.
    """
    record = partial_of(out) / IN_PLACE
    if record.is_file():
        left = UsedUp.read(record)
        _check_same(left.report, left.path, command, options, model, record)
        return consume(left, out, clock, resume=True, prepare=None, on_progress=on_progress)
    if partial_of(out).exists() or (found := record_of(out)) is None:
        return None
    try:
        report = _report(found)
        _demand(report.report["io"]["asked"] == "in-place")
    except (ValueError, KeyError, TypeError):
        return None  # of another kind of run, which says itself that OUT is its own
    _check_same(report, Path(report.source["path"]).resolve(), command, options, model, out)
    tidy(out)
    return report


def _check_same(
    report: Report, path: Path, command: str, options: Mapping[str, object], model: str | Path, where: Path
) -> None:
    if (report.command, report.options, path) != (command, options, Path(model).resolve()):
        raise CoterieError(
            f"{where}: of another source, plan or option (`coterie {report.command}` of {path}); repeat that command"
        )


def consume(
    work: UsedUp,
    out: Path,
    clock: Stopwatch,
    *,
    resume: bool,
    prepare: Callable[[Writer], None] | None,
    on_progress: Progress,
) -> Report:
    """Makes OUT of MODEL's files. `prepare` writes the small files; None: an earlier run did, and the record too."""
    report, outputs = work.report, {name: file.tensors for name, file in work.files.items()}
    total, done = sum(map(num_copied, outputs.values())), 0
    with Writer(out, work.identity, resume=resume, replace=False) as writer:
        writer.begin(work, outputs, room=work.room)
        if prepare:
            prepare(writer)
            writer.text(IN_PLACE, to_json(work.as_dict()))
        for name, file in work.files.items():
            if file.cut:
                writer.file(name, partial(_cut, work, file))
            else:
                writer.shard(name)
            work.remove(name)
            done += num_copied(file.tensors)
            on_progress("writing", done, total)
        for name in work.gone:
            work.remove(name)
        counts = {"cut": len(work.files) - len(work.copied), "copied": len(work.copied)}
        report.report.update(clock.read() | {"io": {"asked": "in-place", "files": counts}})
        writer.text("coterie.json", to_json(report.as_dict()))
        writer.text("README.md", card(work.path, report, load_json(writer.partial / "config.json")))
        writer.finish()
    return report


def _cut(work: UsedUp, file: WeightFile, path: Path) -> int:
    """Makes `path` of the source file, or goes on with what an interrupted run made of it. Returns its size."""
    final = path.with_name(file.name)
    if not path.exists():
        # A kill came between the final name and the journal, or this is the beginning.
        (final if final.exists() else work.check(file.name)).rename(path)
    with path.open("rb+", buffering=0) as opened:
        descriptor = opened.fileno()
        _cut_open(file, work.path / file.name, descriptor)
        write_at(descriptor, header_bytes(file.tensors, file.metadata, file.start), 0)
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size


def _cut_open(file: WeightFile, source: Path, descriptor: int) -> None:
    """Takes what goes out of an open file; the size tells how much of that is done. `source`: its name, for errors."""
    block, runs = os.fstatvfs(descriptor).f_bsize, file.runs
    cuts = file.cuts(block)
    if cuts is None:
        raise CoterieError(f"{source}: the filesystem's blocks have {block} bytes, others than before")
    stop = runs[-1].end if runs else file.start
    sizes = [stop]  # after how many cuts
    for first, last in reversed(cuts):
        sizes.append(sizes[-1] - (last - first))
    size = os.fstat(descriptor).st_size
    if size in (file.stamp[0], stop):
        for first, last in cuts:
            filling = -first % block
            write_at(descriptor, _following(descriptor, runs, last, filling), first)
        os.ftruncate(descriptor, stop)
        os.fsync(descriptor)
        size = stop
    if size not in sizes:
        raise CoterieError(f"{source}: has {size:,} bytes now, which no step of this run leaves")
    for first, last in list(reversed(cuts))[sizes.index(size) :]:
        begin, length = first + -first % block, last - first
        if begin + length >= size:
            os.ftruncate(descriptor, size - length)
        else:
            collapse(descriptor, begin, length)
        size -= length


def _following(descriptor: int, runs: list[Run], position: int, length: int) -> bytes:
    """The `length` bytes that stay from `position` on: of the run that begins there, and of those behind it."""
    found = b""
    for run in runs:
        if run.start >= position and len(found) < length:
            found += os.pread(descriptor, min(length - len(found), run.num_bytes), run.start)
    return found
