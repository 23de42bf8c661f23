"""Copying runs of bytes: every way gives the same bytes, and what one way cannot do, another does."""

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.cli import main
from coterie.errors import CoterieError
from coterie.storage import copying
from coterie.storage.copying import PAGE, Copier, Move, can_share, joined, shareable
from coterie.verbs.prune import prune
from handmade import file_bytes, qwen

SIZE = 300_001  # bytes of each source; no multiple of a page
OTHER = Path("/dev/shm")  # on most systems another filesystem than the temporary folder's


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks for each move, though files are small."""
    monkeypatch.setattr(copying, "CHUNK", 4 * PAGE)


@pytest.fixture
def sources(tmp_path):
    """Two files of random bytes."""
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(draw.bytes(SIZE))
    return tmp_path / "a", tmp_path / "b"


def moves_of(a, b):
    """Runs with aligned and unaligned ends, at the same offset modulo a page on both sides and not, long and short, to
    the very end of a file; end to end in the target, which begins with a header of 100 bytes."""
    runs = [(a, 100, 50_000), (b, 50_000, 50_001), (a, 60_000, SIZE), (b, 7, 4000), (a, 0, 5 * PAGE), (b, 0, SIZE)]
    moves, position = [], 100
    for source, start, end in runs:
        moves.append(Move(source, start, end, position))
        position += end - start
    return moves


def copied(target, moves, io):
    """The target after the moves, with the copier and the bytes it counted."""
    counted = []
    target.write_bytes(b"h" * 100)
    os.truncate(target, moves[-1].to + moves[-1].num_bytes)
    copier = Copier(io)
    copier.move(target, moves, counted.append)
    assert sum(counted) == sum(copier.moved.values()) == sum(m.num_bytes for m in moves)
    return target.read_bytes(), copier


def expected(moves):
    return b"h" * 100 + b"".join(m.source.read_bytes()[m.start : m.end] for m in moves)


def fail(code):
    def raises(*_, **__):
        raise OSError(code, os.strerror(code))

    return raises


def clone(target, request, argument):
    """What a filesystem that shares blocks does at FICLONERANGE: whole pages only, and the bytes are there."""
    source, start, length, to = struct.unpack("=qQQQ", argument)
    if request != copying.FICLONERANGE or any(n % PAGE for n in (start, length, to)):
        raise OSError(errno.EINVAL, "not whole pages")
    os.pwrite(target, os.pread(source, length, start), to)


# --- the same bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", ["auto", "direct", "copy", "plain"])
def test_every_way_gives_the_same_bytes(sources, tmp_path, io):
    """Whatever the ends of the runs and their places modulo a page."""
    moves = moves_of(*sources)
    found, copier = copied(tmp_path / "target", moves, io)
    assert found == expected(moves)
    if io in ("copy", "plain"):
        assert set(copier.moved) == {io}


@pytest.mark.parametrize("io", ["auto", "direct", "copy", "plain"])
@pytest.mark.parametrize("there", [True, False], ids=["to memory", "from memory"])
def test_another_filesystem(sources, tmp_path, io, there):
    """Between filesystems a forced way works or is refused in one line; auto finds one that works."""
    if not OTHER.is_dir() or OTHER.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second filesystem")
    with tempfile.TemporaryDirectory(dir=OTHER) as folder:
        if there:
            moves, target = moves_of(*sources), Path(folder, "target")
        else:
            moves, target = moves_of(*(Path(shutil.copy(s, folder)) for s in sources)), tmp_path / "target"
        try:
            assert copied(target, moves, io)[0] == expected(moves)
        except CoterieError as error:
            assert io in ("direct", "copy") and f"--io {io}: not possible from" in str(error)


def test_blocks_are_shared_where_both_sides_agree(sources, tmp_path, monkeypatch):
    """Reflinks take whole pages of runs that keep their offset; ends and other runs go by other ways."""
    monkeypatch.setattr(fcntl, "ioctl", clone)
    moves = moves_of(*sources)
    found, copier = copied(tmp_path / "target", moves, "reflink")
    assert found == expected(moves)
    assert copier.moved["reflink"] == shareable(moves) == 49_152 - PAGE  # of the first run; the others are shifted
    assert set(copier.moved) == {"reflink", "plain"}
    assert copied(tmp_path / "target", moves, "auto")[1].moved["reflink"] == shareable(moves)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mkfs.xfs"), reason="needs root and mkfs.xfs")
def test_blocks_are_shared_for_real(tmp_path):
    """On XFS, copies by reflink hold the same bytes and take no room; a target elsewhere is refused."""
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(320 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        source = mount / "a"
        source.write_bytes(np.random.default_rng(0).bytes(20 << 20))
        os.sync()
        before = shutil.disk_usage(mount).free
        moves = [Move(source, 100, 20 << 20, 100)]
        found, copier = copied(mount / "target", moves, "auto")
        os.sync()
        assert found == expected(moves) and copier.moved["reflink"] == (20 << 20) - PAGE
        assert before - shutil.disk_usage(mount).free < 1 << 20
        assert can_share(source, mount) and not can_share(source, tmp_path)
        with pytest.raises(CoterieError, match="--io reflink: not possible from"):
            copied(tmp_path / "target", moves, "reflink")
    finally:
        subprocess.run(["umount", mount], check=True)


def test_short_reads_and_writes_go_on(sources, tmp_path, monkeypatch):
    """A kernel that reads and writes less than it was asked gives the same bytes, by every way."""
    moves, calls = moves_of(*sources), {name: getattr(os, name) for name in ("pread", "preadv", "pwrite")}
    monkeypatch.setattr(os, "pread", lambda file, length, at: calls["pread"](file, min(length, 1000), at))
    monkeypatch.setattr(os, "preadv", lambda file, views, at: calls["preadv"](file, [views[0][:PAGE]], at))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: calls["pwrite"](file, data[:3000], at))
    for io in ("auto", "plain"):
        assert copied(tmp_path / "target", moves, io)[0] == expected(moves)


# --- choosing ------------------------------------------------------------------------------------------------------


def test_ways_are_tried_in_turn(sources, tmp_path, monkeypatch):
    """Where neither blocks can be shared, nor the cache passed by, nor the kernel copies, a buffer is left."""
    moves = [Move(sources[0], 0, SIZE, 100)]
    monkeypatch.setattr(copying, "DIRECT_LEAST", PAGE)
    monkeypatch.setattr(fcntl, "ioctl", fail(errno.EOPNOTSUPP))
    monkeypatch.setattr(copying, "O_DIRECT", 0)
    assert set(copied(tmp_path / "target", moves, "auto")[1].moved) == {"copy"}
    monkeypatch.setattr(os, "copy_file_range", fail(errno.EXDEV))
    found, copier = copied(tmp_path / "target", moves, "auto")
    assert found == expected(moves) and set(copier.moved) == {"plain"}


def test_auto_times_each_way_on_the_first_bytes(sources, tmp_path, monkeypatch):
    """Both are timed once, on as many bytes each, whatever comes later; every byte arrives all the same."""
    monkeypatch.setattr(fcntl, "ioctl", fail(errno.EOPNOTSUPP))
    monkeypatch.setattr(copying, "DIRECT_LEAST", PAGE)
    monkeypatch.setattr(copying, "TRIAL", 3 * PAGE + 5)
    moves = moves_of(*sources)
    found, copier = copied(tmp_path / "target", moves, "auto")
    assert found == expected(moves) and set(copier.rates) == {"direct", "copy"}
    assert all(copier.rates.values()) or copying.O_DIRECT == 0
    before = dict(copier.rates)
    copier.move(tmp_path / "target", moves, lambda _: None)
    assert (tmp_path / "target").read_bytes() == expected(moves) and copier.rates == before


@pytest.mark.parametrize(("rate", "way"), [(0.5, "direct"), (1.05, "direct"), (1.2, "copy")])
def test_auto_goes_on_with_the_faster_way(sources, tmp_path, monkeypatch, rate, way):
    """A little more speed is not worth what copying through the cache takes of the processor."""
    monkeypatch.setattr(fcntl, "ioctl", fail(errno.EOPNOTSUPP))
    monkeypatch.setattr(copying, "DIRECT_LEAST", PAGE)
    (tmp_path / "target").touch()
    copier = Copier("auto")
    copier.rates = {"direct": 1.0, "copy": rate}
    copier.move(tmp_path / "target", [Move(sources[0], 0, 16 * PAGE, 0)], lambda _: None)
    if way == "direct" and "direct" not in copier.moved:
        pytest.skip("the temporary folder knows no O_DIRECT")
    assert set(copier.moved) == {way}


@pytest.mark.parametrize("io", ["reflink", "direct", "copy"])
def test_a_way_that_was_asked_for_and_does_not_work_is_refused(sources, tmp_path, monkeypatch, io):
    """A forced way never gives way to another in silence."""
    monkeypatch.setattr(fcntl, "ioctl", fail(errno.EOPNOTSUPP))
    monkeypatch.setattr(copying, "O_DIRECT", 0)
    monkeypatch.setattr(os, "copy_file_range", fail(errno.EXDEV))
    with pytest.raises(CoterieError, match=f"--io {io}: not possible from .*use --io auto"):
        copied(tmp_path / "target", [Move(sources[0], 100, SIZE, 100)], io)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("function", ["preadv", "pwrite"])
def test_a_disk_that_fails_under_the_threads(sources, tmp_path, monkeypatch, code, function):
    """A failure in a thread comes out as one error: ours for the source, the system's own for the target."""
    calls = {"preadv": os.preadv, "pwrite": os.pwrite}
    moves = [Move(sources[0], 0, 40 * PAGE, 0)]
    (tmp_path / "target").touch()

    def failing(file, data, at):
        if at > 20 * PAGE:
            raise OSError(code, os.strerror(code))
        return calls[function](file, data, at)

    monkeypatch.setattr(os, function, failing)
    expected_error = (CoterieError, "cannot be read") if function == "preadv" else (OSError, os.strerror(code))
    try:
        with pytest.raises(expected_error[0], match=expected_error[1]):
            Copier("direct").move(tmp_path / "target", moves, lambda _: None)
    except CoterieError as error:
        if "not possible" in str(error):
            pytest.skip("the temporary folder knows no O_DIRECT")
        raise


def test_an_interruption_stops_the_threads(sources, tmp_path, monkeypatch):
    """What has not begun when the caller gives up is not begun any more."""
    written = []
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *given: written.append(1) or real(*given))
    monkeypatch.setattr(copying, "THREADS", 1)

    def stop(_):
        raise KeyboardInterrupt

    moves = [Move(sources[0], 0, 72 * PAGE, 0)]  # 18 chunks
    (tmp_path / "target").touch()
    try:
        with pytest.raises(KeyboardInterrupt):
            Copier("direct").move(tmp_path / "target", moves, stop)
    except CoterieError:
        pytest.skip("the temporary folder knows no O_DIRECT")
    assert 1 <= len(written) < 18


def test_a_source_that_became_shorter_is_noticed(sources, tmp_path):
    """By every way: bytes that are not there are not made up."""
    for io in ("auto", "direct", "copy", "plain"):
        with pytest.raises(CoterieError, match="the source changed"):
            copied(tmp_path / "target", [Move(sources[0], SIZE - 5000, SIZE + 50_000, 100)], io)


# --- the arithmetic ------------------------------------------------------------------------------------------------


@given(st.integers(0, 20_000), st.integers(1, 20_000), st.integers(0, 20_000))
def test_a_move_is_its_pages_and_its_ends(start, length, to):
    """Together they fill the same bytes; the middle fills whole pages, and the ends less than one page each."""
    move = Move(Path("a"), start, start + length, to)
    middle, ends = move.pages()
    parts = sorted([*ends, *([middle] if middle else [])], key=lambda m: m.to)
    assert joined(parts) == [move]
    if middle:
        assert middle.to % PAGE == 0 and middle.num_bytes % PAGE == 0 and middle.num_bytes > 0
        assert all(end.num_bytes < PAGE for end in ends) and len(ends) <= 2
    else:
        assert length < 2 * PAGE


def test_neighbours_are_one_move():
    """Runs that follow each other on both sides are copied at once; a gap on either side separates them."""
    a = Path("a")
    assert joined([Move(a, 0, 3, 10), Move(a, 3, 5, 13), Move(a, 6, 7, 15), Move(a, 7, 8, 17)]) == [
        Move(a, 0, 5, 10), Move(a, 6, 7, 15), Move(a, 7, 8, 17),
    ]  # fmt: skip


# --- in a command --------------------------------------------------------------------------------------------------


def test_the_report_says_which_way_the_bytes_went(tmp_path):
    """`report.io` holds what was asked and all bytes by way; the way is no part of what was asked of the model."""
    model = qwen(tmp_path / "model")
    reports = {io: prune(model, tmp_path / io, io=io) for io in ("auto", "copy", "plain")}
    for io, report in reports.items():
        found = report.report["io"]
        assert found["asked"] == io and sum(found["bytes"].values()) == report.report["after"]["bytes"]
        assert "io" not in report.options and file_bytes(tmp_path / io) == file_bytes(tmp_path / "auto")
    assert set(reports["plain"].report["io"]["bytes"]) == {"plain"}


def test_a_way_that_was_of_no_use_is_said_aloud(tmp_path, monkeypatch):
    """A model of a few hundred bytes fills no page: nothing can be shared, and the report warns of it."""
    monkeypatch.setattr(fcntl, "ioctl", clone)
    report = prune(qwen(tmp_path / "model"), tmp_path / "out", io="reflink")
    assert any("--io reflink moved no byte" in note for note in report.report["warnings"])


def test_an_interrupted_run_may_go_on_another_way(tmp_path):
    """How bytes are copied changes none of them."""
    model = qwen(tmp_path / "model", num_shards=3)
    prune(model, tmp_path / "whole")

    def stop(stage, done, total):
        if stage == "writing" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, tmp_path / "out", io="copy", on_progress=stop)
    report = prune(model, tmp_path / "out", io="plain", resume=True)
    assert report.report["io"]["kept_files"] > 0
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")


def test_an_unknown_way_is_refused(tmp_path, capsys):
    """Exit code 2 and one line that names the ways."""
    model = qwen(tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        main(["prune", str(model), str(tmp_path / "out"), "--io", "carrier-pigeon"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: --io 'carrier-pigeon': unknown; expected one of auto, reflink, direct, copy, plain\n"
    )
