"""Whatever ends a run, and whenever: OUT is absent or complete, and the same command with resume completes it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from coterie.edits.plan import read_plan
from coterie.errors import CoterieError
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.journal import JOURNAL, Journal, entries_of, is_held
from coterie.storage.shards import Hole, Output, Run
from coterie.storage.writer import Writer
from coterie.verbs.apply import apply
from coterie.verbs.prune import prune
from coterie.verbs.status import status
from handmade import file_bytes, qwen

MUTATING = ("mkdir", "fsync", "pwrite", "rename", "unlink", "rmdir", "truncate", "copy_file_range")


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where that is possible: hundreds of runs wait for the disk at every step otherwise."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def model(tmp_path):
    folder = qwen(tmp_path / "model", num_shards=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def killed_at(step, action):
    """Runs `action` in a process that kills itself at its `step`-th change to the disk: before it if `step` is odd, at
    half of it where it writes to the journal, else after it. Returns whether it came that far."""
    child = os.fork()
    if child == 0:
        try:
            _arm(step)
            action()
        except BaseException as error:
            print(repr(error), file=sys.__stderr__)
            os._exit(3)
        os._exit(0)
    _, result = os.waitpid(child, 0)
    assert result == signal.SIGKILL or os.waitstatus_to_exitcode(result) == 0
    return result == signal.SIGKILL


def _arm(step):
    """Counts calls that change the disk, and kills this process at one of them."""
    calls = 0

    def deadly(real, before):
        nonlocal calls
        calls += 1
        fatal = calls == (step + 1) // 2
        if fatal and step % 2:
            before()
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return real()  # which may make such calls itself
        finally:
            if fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def patched(real):
        return lambda *args, **kwargs: deadly(partial(real, *args, **kwargs), lambda: None)

    add = Journal.add

    def add_half(self, entry):
        self._file.write(json.dumps(entry).encode()[:20])

    for name in MUTATING:
        setattr(os, name, patched(getattr(os, name)))
    Journal.add = lambda self, entry, **how: deadly(lambda: add(self, entry, **how), lambda: add_half(self, entry))


def kill_everywhere(action, check):
    """Calls `check(step)` after a kill at every step; returns how many there are."""
    step = 1
    while killed_at(step, action):
        check(step)
        step += 1
    return step - 1


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# --- kill -9 -------------------------------------------------------------------------------------------------------


def test_kill_9_at_every_step_of_a_run(model, tmp_path):
    """Between any two changes to the disk: nothing stands under OUT's name, or all of it; resume completes the same."""
    prune(model, tmp_path / "whole")
    whole, out = file_bytes(tmp_path / "whole"), tmp_path / "out"

    def check(step):
        if out.exists():
            assert {n: b for n, b in file_bytes(out).items() if n != JOURNAL} == whole, step
            assert status(out)["state"] == "complete"
        elif (tmp_path / "out.partial").exists():
            assert status(out)["state"] == "interrupted"
        prune(model, out, resume=True)
        assert file_bytes(out) == whole and names(tmp_path) == ["model", "out", "whole"], step
        shutil.rmtree(out)

    assert kill_everywhere(partial(prune, model, out), check) > 50


def test_kill_9_at_every_step_of_a_resumed_run(model, tmp_path):
    """A second kill costs no more than the first."""
    prune(model, tmp_path / "whole")
    whole, out = file_bytes(tmp_path / "whole"), tmp_path / "out"

    def begin():
        def stop(stage, done, total):
            if stage == "writing" and done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prune(model, out, on_progress=stop)

    def check(step):
        prune(model, out, resume=True)
        assert file_bytes(out) == whole and names(tmp_path) == ["model", "out", "whole"], step
        shutil.rmtree(out)
        begin()

    begin()
    assert kill_everywhere(partial(prune, model, out, resume=True), check) > 30


def test_kill_9_at_every_step_of_replacing_a_result(model, tmp_path):
    """With --overwrite, OUT is the old result, absent, or the new one; in the end only the new one is left."""
    prune(model, tmp_path / "new")
    prune(model, tmp_path / "old", experts=7)
    new, old, out = file_bytes(tmp_path / "new"), file_bytes(tmp_path / "old"), tmp_path / "out"
    seen = set()

    def check(step):
        found = {n: b for n, b in file_bytes(out).items() if n != JOURNAL} if out.exists() else None
        seen.add({None: "absent", "old": "old", "new": "new"}[found and ("old" if found == old else "new")])
        assert found in (None, old, new), step
        begun = (tmp_path / "out.partial").exists() or found != old
        prune(model, out, resume=begun, overwrite=not begun)
        assert file_bytes(out) == new and names(tmp_path) == ["model", "new", "old", "out"], step
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "old", out)

    shutil.copytree(tmp_path / "old", out)
    kill_everywhere(partial(prune, model, out, overwrite=True), check)
    assert seen == {"old", "absent", "new"}


def part_of(tensor):
    part = Hole(tensor.num_bytes) if "experts" in tensor.name else Run(tensor.file, tensor.start, tensor.end)
    return Output(tensor.name, tensor.dtype, tensor.shape, (part,))


def fill(model, out, resume=False):
    """A run that leaves holes and fills them, layer after layer, as the commands that zero weights do."""
    source = Checkpoint.open(model)
    outputs = {shard: [part_of(t) for t in source.tensors.values() if t.file == shard] for shard in source.shards}
    with Writer(out, {"command": "fill"}, resume=resume) as writer:
        writer.begin(source, outputs)
        for shard in outputs:
            writer.shard(shard)
        for layer in range(len(writer.units), 2):
            for name in (n for n in source.tensors if f"layers.{layer}." in n and "experts" in n):
                writer.put(name, 0, source.raw(name)[::-1])
            writer.unit({"layer": layer}, 2)
        writer.text("coterie.json", "{}")
        writer.finish()


def test_kill_9_at_every_step_of_filling_in(model, tmp_path):
    """Layers that the journal says are done stay; one that was cut short is filled again, to the same bytes."""
    fill(model, tmp_path / "whole")
    whole, out = file_bytes(tmp_path / "whole"), tmp_path / "out"

    def check(step):
        if out.exists():
            assert {n: b for n, b in file_bytes(out).items() if n != JOURNAL} == whole, step
        else:
            fill(model, out, resume=True)
            assert file_bytes(out) == whole, step
        shutil.rmtree(out)

    assert kill_everywhere(partial(fill, model, out), check) > 100


# --- other ends ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small filesystem")
def test_a_disk_that_fills_up_while_it_is_written(tmp_path, monkeypatch):
    """Space that somebody else takes meanwhile: OUT is absent, the refusal says what to do, and that helps."""
    model = qwen(tmp_path / "model", num_shards=2, experts=400)
    prune(model, tmp_path / "whole", method="first")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 40}))
            with pytest.raises(CoterieError, match=r"cannot be written \(No space left on device\); free some space"):
                prune(model, disk / "out", method="first")
        assert names(disk) == ["out.partial"]
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        prune(model, disk / "out", method="first", resume=True)
        assert file_bytes(disk / "out") == file_bytes(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_too_little_space_leaves_nothing_behind(model, tmp_path, monkeypatch):
    """The refusal names both numbers, comes before any byte, and asks for no clean-up."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(CoterieError, match=r"needs [0-9,]+ bytes, the disk has 100 free"):
        prune(model, tmp_path / "out")
    assert names(tmp_path) == ["model"]


def test_a_resumed_run_needs_no_room_for_what_is_there(model, tmp_path, monkeypatch):
    """What the first run wrote is not asked for again, and a refusal keeps it."""

    def stop(stage, done, total):
        if stage == "writing" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, tmp_path / "out", on_progress=stop)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
    prune(model, tmp_path / "out", resume=True)
    assert (tmp_path / "out").is_dir()


def test_shared_blocks_need_no_room(model, tmp_path, monkeypatch):
    """Where the filesystem shares blocks, a result may be larger than the free space."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    monkeypatch.setattr("coterie.storage.writer.can_share", lambda *_: True)
    monkeypatch.setattr("coterie.storage.writer.shareable", lambda moves: sum(move.num_bytes for move in moves))
    prune(model, tmp_path / "out", method="first")
    assert (tmp_path / "out").is_dir()


def test_ctrl_c_leaves_what_can_be_resumed(model, tmp_path):
    """Exit code 130, one line that says how to go on, no OUT; and going on gives the same bytes."""
    prune(model, tmp_path / "whole")
    code = (
        "import os, signal, sys\nfrom coterie.storage import copying\nfrom coterie.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "copying.Copier.move = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "main(sys.argv[1:])"
    )
    arguments = ["prune", str(model), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    again = f"coterie prune {model} {tmp_path / 'out'} --resume"
    assert done.returncode == 130 and done.stderr.endswith(f"what is finished is kept, and this goes on: {again}\n")
    assert not (tmp_path / "out").exists()
    prune(model, tmp_path / "out", resume=True)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")
    assert "stopped: KeyboardInterrupt" in (tmp_path / "out" / "coterie.log").read_text()


# --- two runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]])
def test_a_second_run_exits_with_2(model, tmp_path, flags):
    """While one process writes, another is refused in one line, whatever its flags, and changes nothing."""
    out = tmp_path / "out"
    with Writer(out, {"command": "prune"}):
        (tmp_path / "out.partial" / "precious").write_text("x")
        command = [sys.executable, "-m", "coterie", "prune", str(model), str(out), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: {out}.partial: another run writes here; wait for it, or choose another OUT\n"
        assert (tmp_path / "out.partial" / "precious").exists()
    assert not is_held(tmp_path / "out.partial")


def test_a_run_that_waited_for_the_lock_of_a_finished_one(tmp_path, monkeypatch):
    """The folder that it opened has become OUT: the lock it got is of nothing, and it must not empty OUT."""
    folder, real = tmp_path / "out.partial", Journal._lock

    def slow(self):
        folder.rename(tmp_path / "out")
        real(self)

    monkeypatch.setattr(Journal, "_lock", slow)
    with pytest.raises(CoterieError, match="another run ended here just now"):
        Journal(folder)


def test_a_result_that_appeared_meanwhile_is_not_replaced(model, tmp_path):
    """Another run finished between the first look at OUT and the lock: without --overwrite its result stays."""
    prune(model, tmp_path / "out", experts=6)
    before = file_bytes(tmp_path / "out")
    with pytest.raises(CoterieError, match="exists already"):
        Writer(tmp_path / "out", {}, replace=False)
    assert file_bytes(tmp_path / "out") == before and names(tmp_path) == ["model", "out"]


# --- what must not change between a run and its resumption ---------------------------------------------------------


def stopped(run):
    """Runs until half of the bytes are there."""

    def stop(stage, done, total):
        if stage == "writing" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(on_progress=stop)


def test_another_option_is_refused(model, tmp_path):
    """The refusal changes nothing: the right command still completes the run."""
    run = partial(prune, model, tmp_path / "out")
    stopped(run)
    with pytest.raises(CoterieError, match="begun with another source, plan or option"):
        run(experts=5, resume=True)
    run(resume=True)


def test_another_plan_is_refused(model, tmp_path):
    """A plan that was edited between the run and its resumption gives another model."""
    plan = prune(model, tmp_path / "first", method="first", dry_run=True).plan
    run = partial(apply, model, out=tmp_path / "out")
    stopped(partial(run, plan))
    edited = read_plan(plan).as_dict()
    edited["layers"]["0"]["kept"] = [0, 1, 2, 3, 4, 7]
    with pytest.raises(CoterieError, match="begun with another source, plan or option"):
        run(edited, resume=True)
    run(plan, resume=True)


def large(folder):
    """A model that its fingerprint does not cover whole: between the blocks that it reads, a byte may change."""
    model = qwen(folder, dtype=np.float64, experts=1200)
    path = model / "model.safetensors"
    tensor = Checkpoint.open(model).tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    return model, path, tensor


def change(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def test_another_source_is_refused(tmp_path):
    """Even one byte that the fingerprint does not see: the file says when it was changed."""
    model, path, tensor = large(tmp_path / "model")
    run = partial(prune, model, tmp_path / "out", method="first", ratio=0.1)
    stopped(run)
    before = Checkpoint.open(model).hash
    change(path, next(p for p in range(tensor.start, path.stat().st_size) if not _covered(path, p)))
    assert Checkpoint.open(model).hash == before
    with pytest.raises(CoterieError, match="begun with another source, plan or option"):
        run(resume=True)
    assert not (tmp_path / "out").exists()


def _covered(path, position):
    """Whether the fingerprint reads that byte."""
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    starts = [header + (size - header) * i // 16 for i in range(16)]
    return any(start <= position < start + 4096 for start in starts)


def test_a_source_that_changes_while_it_is_copied(model, tmp_path):
    """What was copied would be half of one model and half of another: it does not become OUT."""

    def edit(stage, done, total):
        if stage == "writing" and done == total:
            path = model / "model-00001-of-00002.safetensors"
            change(path, path.stat().st_size - 1)

    with pytest.raises(CoterieError, match="the source changed while it was copied"):
        prune(model, tmp_path / "out", on_progress=edit)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CoterieError, match="begun with another source"):
        prune(model, tmp_path / "out", resume=True)


def test_a_journal_is_read_to_its_first_fault():
    """Whole lines count; a cut line, and what follows a fault, is done again."""
    assert entries_of(b'{"a": 1}\n{"b": 2}\n{"c"') == ([{"a": 1}, {"b": 2}], 18)
    assert entries_of(b'{"a": 1}\nnonsense\n{"b": 2}\n') == ([{"a": 1}], 9)
    assert entries_of(b"") == ([], 0)
