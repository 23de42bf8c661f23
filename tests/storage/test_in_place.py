"""`--in-place`: MODEL's own files become OUT, whatever interrupts that; and it never begins where it could not end."""

import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_interruption import MUTATING, kill_everywhere, names

from coterie.cli import main
from coterie.errors import CoterieError
from coterie.storage import in_place
from coterie.storage.checkpoint import Checkpoint, read_header
from coterie.verbs.apply import apply
from coterie.verbs.prune import prune
from coterie.verbs.status import status
from handmade import file_bytes, qwen, read_all, save

BLOCK = 4096
NOT_HERE = "the filesystem of temporary files cannot cut ranges out of a file (ext4 and XFS can)"


def blocks(folder, *, experts=6, layers=2, lead=700):
    """A checkpoint whose experts and router rows fill whole blocks, and whose data begin anywhere."""
    draw = np.random.default_rng(0)
    shards = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp."
        tensors = {f"model.layers.{layer}.input_layernorm.weight": draw.normal(size=lead).astype(np.float32)}
        for e in range(experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                shape = (1024, 1) if part == "down_proj" else (1, 1024)
                tensors[f"{prefix}experts.{e}.{part}.weight"] = draw.normal(size=shape).astype(np.float32)
        tensors[f"{prefix}gate.weight"] = draw.normal(size=(experts, 1024)).astype(np.float32)
        shards.append(tensors)
    config = {"model_type": "qwen2_moe", "num_hidden_layers": layers, "num_experts": experts, "hidden_size": 1024}
    return save(folder, config | {"num_experts_per_tok": 1, "vocab_size": 5}, shards)


def slow_collapse(descriptor, offset, length):
    """What the filesystem does, by moving bytes."""
    assert offset % BLOCK == length % BLOCK == 0
    size = os.fstat(descriptor).st_size
    assert offset + length < size
    os.pwrite(descriptor, os.pread(descriptor, size, offset + length), offset)
    os.ftruncate(descriptor, size - length)


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(in_place, "collapse", slow_collapse)


@pytest.fixture
def memory():
    """A folder in memory, where files cannot be cut: there they are copied one at a time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


def equal(folder, other):
    a, b = read_all(folder), read_all(other)
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


# --- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not in_place.block_size(Path(tempfile.gettempdir())), reason=NOT_HERE)
def test_the_filesystem_cuts_files_where_they_are(tmp_path):
    """The inodes stay, the tensors are those of an ordinary run, and MODEL has no weights left."""
    model = blocks(tmp_path / "model")
    prune(model, tmp_path / "whole", ratio=0.5, method="first")
    before = sorted(p.stat().st_ino for p in model.glob("*.safetensors"))
    report = prune(model, tmp_path / "out", ratio=0.5, method="first", in_place=True).report
    assert sorted(p.stat().st_ino for p in (tmp_path / "out").glob("*.safetensors")) == before
    assert report["io"] == {"asked": "in-place", "files": {"cut": 2, "copied": 0}}
    assert equal(tmp_path / "out", tmp_path / "whole")
    assert names(model) == ["config.json", "model.safetensors.index.json"]
    assert names(tmp_path / "out") == names(tmp_path / "whole")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=2, max_size=2).filter(lambda k: len(k[0]) == len(k[1])),
    st.sampled_from([1, 700, 1023, 1024, 3000]),
)
def test_any_choice_of_experts_is_cut_right(slow, kept, lead):
    """Wherever data begin in a block, and whichever ranges go: first, last, neighbours, all but one."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = blocks(folder / "model", lead=lead)
        plan = {"layers": {str(i): {"kept": sorted(k)} for i, k in enumerate(kept)}}
        apply(model, plan, folder / "whole")
        report = apply(model, plan, folder / "out", in_place=True).report
        assert report["io"]["files"] == {"cut": 2, "copied": 0}
        assert equal(folder / "out", folder / "whole")


def test_files_that_cannot_be_cut_are_copied_one_at_a_time(memory):
    """Rows of 16 bytes fill no block. The same bytes as ever; said beforehand, with the room it takes."""
    model = qwen(memory / "model", num_shards=3)
    (model / "tokenizer.json").write_text("{}")
    prune(model, memory / "whole")
    told = prune(model, memory / "out", in_place=True, dry_run=True).report["warnings"]
    assert any("0 cut where they are, 3 copied one at a time (" in note for note in told)
    assert prune(model, memory / "out", in_place=True).report["io"]["files"] == {"cut": 0, "copied": 3}
    assert file_bytes(memory / "out") == file_bytes(memory / "whole")
    assert names(model) == ["config.json", "model.safetensors.index.json", "tokenizer.json"]


def test_the_disk_needs_room_for_one_file(memory, monkeypatch):
    """Not for all of them."""
    model = qwen(memory / "model", num_shards=4, experts=200)
    usage = type("Usage", (), {"free": sum(values.nbytes for values in read_all(model).values()) // 3})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CoterieError, match="free some space"):
        prune(model, memory / "out")
    prune(model, memory / "out", in_place=True)


def test_a_file_of_which_nothing_stays_goes(slow, tmp_path):
    """All experts of a layer in one file, none of them kept in OUT under another layer's name."""
    model = blocks(tmp_path / "model")
    prune(model, tmp_path / "whole", experts=1, method="first")
    prune(model, tmp_path / "out", experts=1, method="first", in_place=True)
    assert equal(tmp_path / "out", tmp_path / "whole")
    for shard in (tmp_path / "out").glob("*.safetensors"):
        read_header(shard)


# --- kill -9 -------------------------------------------------------------------------------------------------------


def killed(monkeypatch, model, whole, folder):
    """Kills a run at every step; each time the folder tells what to do, and resume completes the same bytes."""
    monkeypatch.setattr("test_interruption.MUTATING", (*MUTATING, "ftruncate"))
    kept, out, want = folder / "kept", folder / "out", file_bytes(whole)
    shutil.copytree(model, kept, copy_function=shutil.copy2)
    run = partial(prune, model, out, ratio=0.5, method="first", in_place=True)

    def check(step):
        if out.exists():
            assert {n: b for n, b in file_bytes(out).items() if n in want} == want, step
        elif (folder / "out.partial" / "in-place.json").exists():
            assert status(out)["state"] == "interrupted"
            for other in ({"overwrite": True}, {"resume": True}):
                with pytest.raises(CoterieError):
                    prune(kept, out, ratio=0.5, method="first", **other)
        run(resume=True)
        assert file_bytes(out) == want, step
        shutil.rmtree(out)
        shutil.rmtree(model)
        shutil.copytree(kept, model, copy_function=shutil.copy2)

    assert kill_everywhere(run, check) > 50


@pytest.mark.skipif(not in_place.block_size(Path(tempfile.gettempdir())), reason=NOT_HERE)
def test_kill_9_at_every_step_of_cutting(tmp_path, monkeypatch):
    """Before and after each rename, filling, cut, header and line of the journal."""
    model = blocks(tmp_path / "model")
    shutil.copytree(model, tmp_path / "first", copy_function=shutil.copy2)
    prune(tmp_path / "first", tmp_path / "whole", ratio=0.5, method="first", in_place=True)
    real, step = in_place.collapse, os.truncate  # `os.truncate` is one of the calls that a kill counts

    def counted(descriptor, offset, length):
        step(descriptor, os.fstat(descriptor).st_size)
        real(descriptor, offset, length)
        os.truncate(descriptor, os.fstat(descriptor).st_size)

    monkeypatch.setattr(in_place, "collapse", counted)
    killed(monkeypatch, model, tmp_path / "whole", tmp_path)


def test_kill_9_at_every_step_of_copying_one_at_a_time(memory, monkeypatch):
    """A source file goes only after its bytes have their final name."""
    model = qwen(memory / "model", num_shards=2)
    prune(model, memory / "whole", ratio=0.5, method="first")
    killed(monkeypatch, model, memory / "whole", memory)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return qwen(tmp_path / "model", num_shards=2)


def refused(model, out, match, **options):
    before = file_bytes(model)
    with pytest.raises(CoterieError, match=match):
        prune(model, out, in_place=True, **options)
    assert file_bytes(model) == before and not out.exists() and not Path(f"{out}.partial").exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"io": "copy"}, "--in-place and --io exclude each other"),
        ({"engine": "ray"}, "--in-place and --engine exclude each other"),
        ({"overwrite": True}, "--in-place and --overwrite exclude each other"),
        ({"save": "sparse"}, "packing needs the dense checkpoint beside it"),
        ({"experts": 2, "method": "stun", "kappa": 3}, "is computed, not copied"),
    ],
)
def test_what_does_not_go_with_it_is_refused(model, tmp_path, options, fault):
    """Before anything is changed."""
    refused(model, tmp_path / "out", fault, **options)


def test_links_are_refused(model, tmp_path):
    """Another name of the same file would lose its bytes, as a hub's cache has them."""
    shard = "model-00001-of-00002.safetensors"
    os.link(model / shard, tmp_path / "other")
    refused(model, tmp_path / "out", "is a link")
    (tmp_path / "other").unlink()
    (model / shard).rename(tmp_path / "blob")
    (model / shard).symlink_to(tmp_path / "blob")
    with pytest.raises(CoterieError, match="link"):
        prune(model, tmp_path / "out", in_place=True)
    assert (tmp_path / "blob").exists() and not (tmp_path / "out").exists()


def test_a_folder_that_is_read_only_is_refused(model, tmp_path, monkeypatch):
    """Before a byte of OUT is written."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    refused(model, tmp_path / "out", "is read-only")


def test_another_filesystem_is_refused(model, tmp_path, memory):
    if memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("memory and temporary files are one filesystem here")
    refused(model, memory / "out", "on another filesystem")


def interrupted(model, out):
    """A run of which the first file is done."""

    def stop(stage, done, total):
        if stage == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, out, in_place=True, on_progress=stop)


def test_a_source_file_that_changed_meanwhile_is_refused(model, tmp_path):
    """What was planned with another file must not be cut out of this one; what is done stays."""
    interrupted(model, tmp_path / "out")
    path = model / SECOND
    os.utime(path, ns=(0, 0))
    with pytest.raises(CoterieError, match="changed since this run began"):
        prune(model, tmp_path / "out", in_place=True, resume=True)
    assert path.exists()


def test_another_option_or_model_is_refused_when_going_on(model, tmp_path):
    """And the right command still completes the run."""
    interrupted(model, tmp_path / "out")
    with pytest.raises(CoterieError, match="of another source, plan or option"):
        prune(model, tmp_path / "out", experts=5, in_place=True, resume=True)
    other = qwen(tmp_path / "other", num_shards=2)
    with pytest.raises(CoterieError, match="of another source, plan or option"):
        prune(other, tmp_path / "out", in_place=True, resume=True)
    prune(model, tmp_path / "out", in_place=True, resume=True)
    assert Checkpoint.open(tmp_path / "out").config["num_experts"] == 6
    again = prune(model, tmp_path / "out", in_place=True, resume=True)  # complete: says what it holds
    assert again.report["after"]["experts"] == 6
    with pytest.raises(CoterieError, match="of another source, plan or option"):
        prune(model, tmp_path / "out", experts=5, in_place=True, resume=True)


SECOND = "model-00002-of-00002.safetensors"
FILE = ("files", SECOND)


@pytest.mark.parametrize(
    "change",
    [
        ("files", 3),
        ("gone", {"../precious.safetensors": [1, 1]}),
        ("gone", {"config.json": [1, 1]}),
        (*FILE, "start", -1),
        (*FILE, "start", 2**70),
        (*FILE, "stamp", [1, 2, 3]),
        (*FILE, "tensors", [["x", "F32", [1], [[0, 4]]]]),
        (*FILE, "tensors", [["x", "F32", [2**60], [[200, 204]]]]),
        (*FILE, "tensors", [["x", "F99", [1], [[200, 204]]]]),
        (*FILE, "metadata", {"a": 1}),
        ("record", "source", {}),
        ("record", "report", []),
    ],
)
def test_a_damaged_record_is_refused(model, tmp_path, change):
    """It says which files are used up, so nothing is believed that the run itself would not have written."""
    interrupted(model, tmp_path / "out")
    path = tmp_path / "out.partial" / "in-place.json"
    record = place = json.loads(path.read_text())
    *keys, last, value = change
    for key in keys:
        place = place[key]
    place[last] = value
    path.write_text(json.dumps(record))
    before = file_bytes(tmp_path / "out.partial"), file_bytes(model)
    with pytest.raises(CoterieError, match=r"in-place\.json: damaged"):
        prune(model, tmp_path / "out", in_place=True, resume=True)
    assert (file_bytes(tmp_path / "out.partial"), file_bytes(model)) == before


def test_from_the_command_line(model, tmp_path, capsys):
    """Both commands that move bytes have the flag, and say what they use up."""
    prune(model, tmp_path / "plan", ratio=0.5)
    command = ["apply", str(model), str(tmp_path / "plan" / "coterie.json"), str(tmp_path / "out"), "--in-place"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert not ended.value.code
    assert "uses up the weight files of" in capsys.readouterr().err
    assert equal(tmp_path / "out", tmp_path / "plan")
    plan = tmp_path / "plan" / "coterie.json"
    assert apply(model, plan, tmp_path / "out", in_place=True, resume=True).report["after"]["experts"] == 4
