"""`--in-place`: MODEL becomes OUT without room for a second copy, and is used up.

`edits/` says what stands where, and `writer.py` names and journals files. A weight file is moved
into OUT.partial, and the filesystem takes out of it what goes (`fallocate`, FALLOC_FL_COLLAPSE_RANGE: ext4, XFS), in
whole blocks and without moving a byte. Where a file does not lend itself to that, it is copied as ever and its source
removed: room for one file is needed.

After the first file there is no MODEL to decide from again. So everything that is still to be done stands in
OUT.partial/in-place.json before it begins, and a resume needs that alone:

    rename into OUT.partial | bytes that fill up the block before each cut, which go where the cut begins, among bytes
    that go | cuts, from the last to the first | header, of the old length | rename to the final name | journal

Each step can be repeated but for the cuts, and the file's size says how many of those are done. This holds for a run
that is killed; whether it holds when power fails between two cuts is the filesystem's affair.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError, guarded
from coterie.storage.checkpoint import BITS, Checkpoint, load_json
from coterie.storage.copying import write_at
from coterie.storage.planned import root
from coterie.storage.record import Progress, Report, Stopwatch, model_card, record_of, to_json
from coterie.storage.writer import IN_PLACE, Output, Run, Writer, header_bytes, num_copied, partial_of, tidy

COLLAPSE_RANGE = 8  # linux/falloc.h
MAX_RECORD = 2**31  # bytes
FALLOCATE = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # of Linux


@dataclass(frozen=True)
class Recipe:
    """What is to become of each weight file, and everything that OUT needs beside them.

    path, stamps: of the source, as `Checkpoint` has them. cut: files that the filesystem can cut; others are copied.
    """

    path: Path
    stamps: dict[str, list[int]]
    outputs: dict[str, list[Output]]
    metadata: dict[str, dict[str, str]]
    starts: dict[str, int]  # where a file's data begins
    cut: tuple[str, ...]
    indexed: bool
    report: Report

    @classmethod
    def of(cls, source: Checkpoint, outputs: dict[str, list[Output]], report: Report, out: Path) -> Recipe:
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
        starts = {shard: min(t.start for t in source.tensors.values() if t.file == shard) for shard in outputs}
        recipe = cls(
            source.path.resolve(), source.stamps, outputs, {s: source.metadata[s] for s in outputs}, starts, (),
            source.indexed, report,
        )  # fmt: skip
        block = block_size(source.path)
        return replace(recipe, cut=tuple(shard for shard in outputs if block and recipe.cuts(shard, block) is not None))

    @property
    def shards(self) -> list[str]:
        return list(self.stamps)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resume must be equal in."""
        report = self.report
        return {
            "command": report.command, "options": report.options, "plan": report.plan,
            "source": report.source["hash"], "in_place": str(self.path),
        }  # fmt: skip

    @property
    def room(self) -> int:
        """Bytes that the disk must have free: for the largest file that is copied."""
        return max((num_copied(ts) for shard, ts in self.outputs.items() if shard not in self.cut), default=0)

    @property
    def note(self) -> str:
        copied = len(self.outputs) - len(self.cut)
        more = f", {copied} copied one at a time ({self.room:,} bytes of room)" if copied else ""
        return f"--in-place uses up the weight files of {self.path}: {len(self.cut)} cut where they are{more}"

    def cuts(self, shard: str, block: int) -> list[tuple[int, int]] | None:
        """The ranges that go, ascending, but for what goes at the end; None where the file cannot be cut to what is
        wanted: a range is not of whole blocks, order changes, or the header has grown."""
        found, position = [], self.starts[shard]
        for run in self.runs(shard):
            if run.start < position or (run.start - position) % block:
                return None
            if run.start > position:
                found.append((position, run.start))
            position = run.end
        return found if len(header_bytes(self.outputs[shard], self.metadata[shard], 0)) <= self.starts[shard] else None

    def runs(self, shard: str) -> Iterator[Run]:
        return (p for o in self.outputs[shard] for p in o.parts if isinstance(p, Run) and p.num_bytes)

    def check(self, shard: str) -> Path:
        """The file to use up. Raises: CoterieError where it is not the one that was planned with."""
        path = self.path / shard
        try:
            status = path.stat()
        except OSError as error:
            raise CoterieError(f"{path}: cannot be read ({error.strerror or error}); it is needed to go on") from error
        if [status.st_size, status.st_mtime_ns] != self.stamps[shard]:
            raise CoterieError(f"{path}: changed since this run began; what was planned no longer fits it")
        return path

    def as_dict(self) -> dict[str, Any]:
        def parts(output: Output) -> list[list[int]]:
            return [[p.start, p.end] for p in output.parts if isinstance(p, Run)]

        files = {
            shard: {
                "stamp": self.stamps[shard],
                "start": self.starts[shard],
                "cut": shard in self.cut,
                "metadata": self.metadata[shard],
                "tensors": [[o.name, o.dtype, list(o.shape), parts(o)] for o in tensors],
            }
            for shard, tensors in self.outputs.items()
        }
        gone = {shard: stamp for shard, stamp in self.stamps.items() if shard not in self.outputs}
        report = self.report.as_dict()
        return {"path": str(self.path), "files": files, "gone": gone, "indexed": self.indexed, "record": report}

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Raises: CoterieError for a record that `as_dict` did not write: it says which files are used up."""
        found = load_json(path, limit=MAX_RECORD)
        try:
            files, record = found["files"], found["record"]
            _demand(all(Path(name).name == name and name.endswith(".safetensors") for name in [*files, *found["gone"]]))
            stamps = {s: f["stamp"] for s, f in files.items()} | found["gone"]
            _demand(all(len(stamp) == 2 and all(type(n) is int for n in stamp) for stamp in stamps.values()))
            return cls(
                Path(found["path"]), stamps, {shard: _outputs(shard, file) for shard, file in files.items()},
                {s: f["metadata"] for s, f in files.items()}, {s: f["start"] for s, f in files.items()},
                tuple(s for s, f in files.items() if f["cut"]), found["indexed"], _report(record),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CoterieError(f"{path}: damaged ({error!r:.80}); what is left to do cannot be told from it") from error


def _demand(condition: bool) -> None:
    """Raises: ValueError, also where Python leaves assertions out: a record is somebody else's word."""
    if not condition:
        raise ValueError("a value that no run writes")


def _outputs(shard: str, file: dict[str, Any]) -> list[Output]:
    """The tensors of one file of a record. Raises: ValueError and others for what cannot be."""
    size, start = file["stamp"][0], file["start"]
    _demand(type(start) is int and 8 <= start <= size and all(isinstance(v, str) for v in file["metadata"].values()))
    found = []
    for name, dtype, shape, parts in file["tensors"]:
        _demand(isinstance(name, str) and dtype in BITS and all(type(n) is int and n >= 0 for n in shape))
        _demand(all(type(n) is int for part in parts for n in part) and all(start <= a <= b <= size for a, b in parts))
        found.append(Output(name, dtype, tuple(shape), tuple(Run(shard, a, b) for a, b in parts)))
        _demand(found[-1].num_bytes * 8 == math.prod(shape) * BITS[dtype])
    return found


def _report(record: dict[str, Any]) -> Report:
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
    out: Path, command: str, options: dict[str, Any], model: str | Path, clock: Stopwatch, on_progress: Progress
) -> Report | None:
    """Completes what an interrupted run of the same command left, or reads the report of one that is complete. None
    where MODEL was not touched yet.

    Raises: CoterieError where that run was asked for something else.
    """
    record = partial_of(out) / IN_PLACE
    if record.is_file():
        recipe = Recipe.read(record)
        _check_same(recipe.report, recipe.path, command, options, model, record)
        return consume(recipe, out, clock, resume=True, prepare=None, on_progress=on_progress)
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
    report: Report, path: Path, command: str, options: dict[str, Any], model: str | Path, where: Path
) -> None:
    if (report.command, report.options, path) != (command, options, Path(model).resolve()):
        raise CoterieError(
            f"{where}: of another source, plan or option (`coterie {report.command}` of {path}); repeat that command"
        )


def consume(
    recipe: Recipe,
    out: Path,
    clock: Stopwatch,
    *,
    resume: bool,
    prepare: Callable[[Writer], None] | None,
    on_progress: Progress,
) -> Report:
    """Makes OUT of MODEL's files. `prepare` writes the small files; None: an earlier run did, and the recipe too."""
    report, total, done = recipe.report, sum(map(num_copied, recipe.outputs.values())), 0
    with Writer(out, recipe.identity, resume=resume, replace=False) as writer:
        writer.begin(recipe, recipe.outputs, room=recipe.room)
        if prepare:
            prepare(writer)
            writer.text(IN_PLACE, to_json(recipe.as_dict()))
        for shard, tensors in recipe.outputs.items():
            if shard in recipe.cut:
                writer.file(shard, lambda path, shard=shard: _cut(recipe, shard, path))  # type: ignore[misc]
            else:
                writer.shard(shard, tensors, recipe.metadata[shard], recipe)
            _remove(recipe, shard)
            done += num_copied(tensors)
            on_progress("writing", done, total)
        for shard in set(recipe.stamps) - set(recipe.outputs):
            _remove(recipe, shard)
        counts = {"cut": len(recipe.cut), "copied": len(recipe.outputs) - len(recipe.cut)}
        report.report.update(clock.read() | {"io": {"asked": "in-place", "files": counts}})
        writer.text("coterie.json", to_json(report.as_dict()))
        writer.text("README.md", model_card(recipe.path.name, report))
        writer.finish({s: {o.name: o for o in os} for s, os in recipe.outputs.items()}, recipe.indexed)
    return report


def _remove(recipe: Recipe, shard: str) -> None:
    """What is left of a source file once its bytes are in OUT.partial under their final name."""
    if (recipe.path / shard).exists():
        guarded(recipe.path, recipe.check(shard).unlink)


def _cut(recipe: Recipe, shard: str, path: Path) -> int:
    """Makes `path` of the source file, or goes on with what an interrupted run made of it. Returns its size."""
    final = path.with_name(shard)
    if not path.exists():
        # A kill came between the final name and the journal, or this is the beginning.
        (final if final.exists() else recipe.check(shard)).rename(path)
    with path.open("rb+", buffering=0) as file:
        _cut_open(recipe, shard, file.fileno())
        header = header_bytes(recipe.outputs[shard], recipe.metadata[shard], recipe.starts[shard])
        write_at(file.fileno(), header, 0)
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _cut_open(recipe: Recipe, shard: str, descriptor: int) -> None:
    block, runs = os.fstatvfs(descriptor).f_bsize, list(recipe.runs(shard))
    cuts = recipe.cuts(shard, block)
    if cuts is None:
        raise CoterieError(f"{recipe.path / shard}: the filesystem's blocks have {block} bytes, others than before")
    stop = runs[-1].end if runs else recipe.starts[shard]
    sizes = [stop]  # after how many cuts
    for first, last in reversed(cuts):
        sizes.append(sizes[-1] - (last - first))
    size = os.fstat(descriptor).st_size
    if size in (recipe.stamps[shard][0], stop):
        for first, last in cuts:
            filling = -first % block
            write_at(descriptor, _following(descriptor, runs, last, filling), first)
        os.ftruncate(descriptor, stop)
        os.fsync(descriptor)
        size = stop
    if size not in sizes:
        raise CoterieError(f"{recipe.path / shard}: has {size:,} bytes now, which no step of this run leaves")
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
