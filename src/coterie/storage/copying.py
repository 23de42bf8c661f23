"""Copies runs of bytes between files, in the cheapest way that the two places allow.

Last step of the data flow: `writer` says which bytes, this says how. A way takes moves, does what it can, and hands
back the rest; the next way goes on with it, and the last one can do everything:

    reflink   the filesystem shares the blocks: nothing moves (XFS, btrfs; both sides at one offset modulo 4096)
    direct    past the page cache, by a few threads: little processor time, and the cache keeps what it holds
    copy      inside the kernel (copy_file_range)
    plain     through a buffer

Which of direct and copy is faster depends on the disk and on what the page cache holds already: where there is enough
to copy, the first bytes go by each of them in turn, timed until they are on the disk, and the rest by the faster one.

Memory: `THREADS` buffers of `CHUNK` bytes, whatever is copied.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from coterie.errors import CoterieError, check_choice, reading

PAGE = 4096
CHUNK = 8 << 20  # bytes of one read and write
THREADS = 4
BATCH = 512  # chunks handed to the threads at once
TRIAL = 256 << 20  # bytes by which a way is timed
WORTH = 1.1  # times as fast as direct, which takes a fifth of its processor time, is what copy must be
DIRECT_LEAST = 1 << 20  # bytes; the page cache serves shorter moves better
FICLONERANGE = 0x4020940D  # linux/fs.h
O_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where the system has none
REFUSALS = {
    getattr(errno, name) for name in ("EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "ENOTTY", "EPERM", "ETXTBSY")
}  # this way does not work here; another may


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes `start:end` of the file `source`, to the target from byte `to` on."""

    source: Path
    start: int
    end: int
    to: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    def cut(self, first: int, last: int) -> Move:
        """The part that fills the target's bytes `first:last`."""
        shift = self.start - self.to
        return Move(self.source, first + shift, last + shift, first)

    def pages(self) -> tuple[Move | None, list[Move]]:
        """What fills whole pages of the target, if anything, and what is left at the ends."""
        stop = self.to + self.num_bytes
        first, last = -(-self.to // PAGE) * PAGE, stop // PAGE * PAGE
        if first >= last:
            return None, [self]
        ends = [self.cut(self.to, first), self.cut(last, stop)]
        return self.cut(first, last), [end for end in ends if end.num_bytes]

    @property
    def congruent(self) -> bool:
        """Whether both sides begin at the same offset modulo a page."""
        return (self.start - self.to) % PAGE == 0


OnBytes = Callable[[int], None]
Refuse = Callable[[Path, OSError], None]  # told of an error with a source: raises it, unless another way may work


class Files:
    """The descriptors of one target and its sources, opened when they are first needed."""

    def __init__(self, target: Path) -> None:
        self.path = target
        self._open: dict[tuple[Path, int], int] = {}

    def source(self, path: Path, flags: int = 0) -> int:
        with reading(path, passing=REFUSALS):
            return self._get(path, os.O_RDONLY | flags)

    def target(self, flags: int = 0) -> int:
        return self._get(self.path, os.O_WRONLY | flags)

    def _get(self, path: Path, flags: int) -> int:
        if (path, flags) not in self._open:
            self._open[path, flags] = os.open(path, flags)
        return self._open[path, flags]

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


# --- the ways -----------------------------------------------------------------------------------------------------


def reflink(files: Files, moves: list[Move], on_bytes: OnBytes, refuse: Refuse) -> list[Move]:
    """Lets the target share the source's blocks, as far as whole pages go. Returns what is left."""
    rest: list[Move] = []
    refused: set[Path] = set()
    for move in moves:
        middle, ends = move.pages()
        if middle is None or not middle.congruent or move.source in refused:
            rest.append(move)
            continue
        try:
            share(files.source(move.source), files.target(), middle)
        except OSError as error:
            refuse(move.source, error)
            refused.add(move.source)
            rest.append(move)
            continue
        on_bytes(middle.num_bytes)
        rest += ends
    return rest


def share(source: int, target: int, move: Move) -> None:
    """One reflink between open files. Raises: OSError, with one of `REFUSALS` where blocks cannot be shared."""
    fcntl.ioctl(target, FICLONERANGE, struct.pack("=qQQQ", source, move.start, move.num_bytes, move.to))


def direct(
    files: Files, moves: list[Move], on_bytes: OnBytes, refuse: Refuse, *, least: int = DIRECT_LEAST
) -> list[Move]:
    """Moves whole pages of the target past the page cache, several chunks at a time; of runs of `least` bytes or more.
    Returns what is left.

    Where the two sides differ modulo a page, a chunk is read with the pages around it and shifted in memory.
    """
    rest: list[Move] = []
    chunks: list[Move] = []
    for move in moves:
        middle, ends = move.pages()
        if middle is None or middle.num_bytes < least or not _opens_direct(files, move.source, refuse):
            rest.append(move)
            continue
        rest += ends
        stop = middle.to + middle.num_bytes
        chunks += [middle.cut(at, min(at + CHUNK, stop)) for at in range(middle.to, stop, CHUNK)]
    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(min(THREADS, len(chunks))):
        buffers.put(memoryview(mmap.mmap(-1, CHUNK + PAGE)))
    pool = ThreadPoolExecutor(THREADS)
    try:
        for first in range(0, len(chunks), BATCH):
            batch = chunks[first : first + BATCH]
            for chunk, error in zip(batch, pool.map(partial(_move_direct, files, buffers), batch), strict=True):
                if error is None:
                    on_bytes(chunk.num_bytes)
                    continue
                if error.errno:
                    refuse(chunk.source, error)
                rest.append(chunk)
    finally:
        pool.shutdown(cancel_futures=True)
    return rest


def _opens_direct(files: Files, source: Path, refuse: Refuse) -> bool:
    try:
        if not O_DIRECT:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        files.source(source, O_DIRECT)
        files.target(O_DIRECT)
    except OSError as error:
        refuse(source, error)
        return False
    return True


def _move_direct(files: Files, buffers: SimpleQueue[memoryview], chunk: Move) -> OSError | None:
    """Moves one chunk of whole target pages. Returns why it could not be moved; errno 0 for one that was cut short,
    which says nothing against this way."""
    view = buffers.get()
    try:
        shift, length = chunk.start % PAGE, chunk.num_bytes
        with reading(chunk.source, passing=REFUSALS):
            wanted = -(-(shift + length) // PAGE) * PAGE
            found = os.preadv(files.source(chunk.source, O_DIRECT), [view[:wanted]], chunk.start - shift)
        if shift and found - shift >= length:
            view[:length] = view[shift : shift + length]
        if found - shift < length or os.pwrite(files.target(O_DIRECT), view[:length], chunk.to) < length:
            return OSError(0, "came to less than was asked")
    except OSError as error:
        return error
    finally:
        buffers.put(view)
    return None


def copy(files: Files, moves: list[Move], on_bytes: OnBytes, refuse: Refuse) -> list[Move]:
    """Copies inside the kernel. Returns what is left: that from which on the kernel would not."""

    def step(source: int, target: int, part: Move) -> int:
        try:
            return os.copy_file_range(source, target, min(part.num_bytes, 1 << 30), part.start, part.to)
        except OSError as error:
            refuse(part.source, error)
            return 0

    return [rest for move in moves if (rest := _stepwise(files, move, step, on_bytes)).num_bytes]


def plain(files: Files, moves: list[Move], on_bytes: OnBytes, refuse: Refuse) -> list[Move]:
    """Reads and writes through a buffer; nothing is ever left.

    Raises: CoterieError when a source is shorter than it was.
    """

    def step(source: int, target: int, part: Move) -> int:
        with reading(part.source, passing=REFUSALS):
            block = os.pread(source, min(part.num_bytes, CHUNK), part.start)
        if not block:
            raise CoterieError(
                f"{part.source}: ended at byte {part.start:,}, expected {part.end:,}; the source changed"
            )
        write_at(target, block, part.to)
        return len(block)

    return [rest for move in moves if (rest := _stepwise(files, move, step, on_bytes)).num_bytes]


def _stepwise(files: Files, move: Move, step: Callable[[int, int, Move], int], on_bytes: OnBytes) -> Move:
    """Repeats `step(source, target, rest)`, which returns how many bytes it copied, until none. Returns the rest."""
    source, target, stop = files.source(move.source), files.target(), move.to + move.num_bytes
    while move.num_bytes and (copied := step(source, target, move)):
        move = move.cut(move.to + copied, stop)
        on_bytes(copied)
    return move


def write_at(target: int, data: bytes | memoryview, position: int) -> None:
    """Writes all of `data` from byte `position` on."""
    view = memoryview(data)
    while view:
        written = os.pwrite(target, view, position)
        view, position = view[written:], position + written


# --- choosing -----------------------------------------------------------------------------------------------------

WAYS = {"reflink": reflink, "direct": direct, "copy": copy, "plain": plain}
IO = ("auto", *WAYS)


def check_io(io: str) -> None:
    """Raises: CoterieError for a way that does not exist."""
    check_choice("--io", io, IO)


class Copier:
    """Copies by every way in turn, or by the one asked for, and counts the bytes of each."""

    def __init__(self, io: str = "auto") -> None:
        check_io(io)
        self.io = io
        self.moved: Counter[str] = Counter()  # bytes by way
        self.rates: dict[str, float] = {}  # bytes a second of the ways that were timed

    def move(self, target: Path, moves: list[Move], on_bytes: OnBytes) -> None:
        """Does all moves into the file `target`, which exists.

        Raises: CoterieError when the way asked for does not work here, or a source is shorter than it was; OSError
        when the target cannot be written.
        """
        with closing(Files(target)) as files:
            if self.io == "auto":
                moves = self._timed(files, self._run("reflink", files, moves, on_bytes), on_bytes)
            for way in self._ladder():
                moves = self._run(way, files, moves, on_bytes)
        assert not moves

    def _ladder(self) -> list[str]:
        """The ways in the order they are tried after reflink. One that was asked for leaves the ends of runs to the
        last."""
        if self.io != "auto":
            return [self.io, "plain"]
        direct, copy = (self.rates.get(way, 0.0) for way in ("direct", "copy"))
        return ["copy", "direct", "plain"] if copy > WORTH * direct else ["direct", "copy", "plain"]

    def _timed(self, files: Files, moves: list[Move], on_bytes: OnBytes) -> list[Move]:
        """Begins with the moves by each way that is not timed yet, as far as there is enough. Returns what is left."""
        for way in ("direct", "copy"):
            if way in self.rates or sum(move.num_bytes for move in moves) < TRIAL:
                continue
            head, rest = split(moves, TRIAL)
            before, began = self.moved[way], time.monotonic()
            moves = self._run(way, files, head, on_bytes) + rest
            os.fdatasync(files.target())
            self.rates[way] = (self.moved[way] - before) / (time.monotonic() - began)
        return moves

    def _run(self, way: str, files: Files, moves: list[Move], on_bytes: OnBytes) -> list[Move]:
        least = PAGE if self.io == "direct" else DIRECT_LEAST
        run = partial(direct, least=least) if way == "direct" else WAYS[way]
        return run(files, moves, partial(self._count, way, on_bytes), self._refuse) if moves else []

    def _count(self, way: str, on_bytes: OnBytes, num_bytes: int) -> None:
        self.moved[way] += num_bytes
        on_bytes(num_bytes)

    def _refuse(self, source: Path, error: OSError) -> None:
        if error.errno not in REFUSALS:
            raise error
        if self.io != "auto":
            raise CoterieError(
                f"--io {self.io}: not possible from {source} ({error.strerror or error}); use --io auto"
            ) from error

    @property
    def notes(self) -> list[str]:
        """Where the way asked for was never of use."""
        if self.io in ("auto", "plain") or self.moved[self.io] or not self.moved:
            return []
        return [f"--io {self.io} moved no byte: no run fills a page of {PAGE} bytes at an offset that it needs"]


def can_share(source: Path, folder: Path) -> bool:
    """Whether files in `folder` can share blocks with `source`: tried on its first page."""
    probe = folder / "probe.tmp"
    try:
        probe.touch()
        try:
            with closing(Files(probe)) as files:
                share(files.source(source), files.target(), Move(source, 0, PAGE, 0))
        finally:
            probe.unlink()
    except OSError:
        return False
    return True


def shareable(moves: list[Move]) -> int:
    """Bytes that need no room where blocks can be shared."""
    middles = (move.pages()[0] for move in moves)
    return sum(middle.num_bytes for middle in middles if middle and middle.congruent)


def split(moves: list[Move], num_bytes: int) -> tuple[list[Move], list[Move]]:
    """The first `num_bytes` of the moves, and the rest."""
    head, rest = list[Move](), list[Move]()
    for move in moves:
        cut = move.to + min(move.num_bytes, num_bytes)
        head.append(move.cut(move.to, cut))
        rest.append(move.cut(cut, move.to + move.num_bytes))
        num_bytes -= head[-1].num_bytes
    return [m for m in head if m.num_bytes], [m for m in rest if m.num_bytes]


def joined(moves: list[Move]) -> list[Move]:
    """Neighbours on both sides as one move."""
    found: list[Move] = []
    for move in moves:
        last = found[-1] if found else None
        if last and last.source == move.source and last.end == move.start and last.to + last.num_bytes == move.to:
            found[-1] = replace(last, end=move.end)
        elif move.num_bytes:
            found.append(move)
    return found
