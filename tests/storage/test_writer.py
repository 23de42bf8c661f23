"""Writing a checkpoint: OUT is absent or complete, interrupted runs go on byte for byte, nothing else is touched."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from coterie.errors import CoterieError
from coterie.storage.checkpoint import INDEX, Checkpoint, read_header
from coterie.storage.record import to_json
from coterie.storage.shards import FileLayout, Made, Output, Run, header_bytes
from coterie.storage.writer import Writer
from coterie.verbs.prune import prune
from handmade import file_bytes, qwen, qwen_config, read_all, save

EXPERTS = {"experts": 5}


@pytest.fixture
def model(tmp_path):
    """Three shards and the small files that hub folders have."""
    folder = qwen(tmp_path / "model", num_shards=3)
    for name in ("tokenizer.json", "generation_config.json", "merges.txt", "chat_template.jinja", "LICENSE"):
        (folder / name).write_text(f"content of {name}")
    return folder


@pytest.fixture
def undisturbed(model, tmp_path):
    """The files of a run that nothing disturbed."""
    prune(model, tmp_path / "undisturbed", **EXPERTS)
    return file_bytes(tmp_path / "undisturbed")


def interrupt_at(calls):
    """A progress callback that raises at its n-th call while writing."""
    count = 0

    def on_progress(stage, done, total):
        nonlocal count
        count += stage == "writing"
        if count == calls:
            raise KeyboardInterrupt

    return on_progress


def num_steps(model, out):
    """How often a whole run reports progress while writing."""
    steps = []
    prune(model, out, **EXPERTS, on_progress=lambda stage, *_: steps.append(stage))
    return steps.count("writing")


# --- interruption and resuming -----------------------------------------------------------------------------


def test_a_run_interrupted_anywhere_resumes_to_the_same_bytes(model, undisturbed, tmp_path):
    """Whichever piece of a shard was being written, the resumed result is byte-identical and OUT absent until then."""
    for calls in range(1, num_steps(model, tmp_path / "counted") + 1):
        out = tmp_path / f"out{calls}"
        with pytest.raises(KeyboardInterrupt):
            prune(model, out, **EXPERTS, on_progress=interrupt_at(calls))
        assert not out.exists() and Path(f"{out}.partial").is_dir()
        prune(model, out, **EXPERTS, resume=True)
        assert file_bytes(out) == undisturbed
        assert not Path(f"{out}.partial").exists()


def test_a_killed_process_leaves_what_a_resume_completes(model, undisturbed, tmp_path):
    """SIGKILL in the middle of the second shard: nothing under OUT's name, and the resume finishes the work."""
    out = tmp_path / "out"
    code = (
        "import os, sys; from coterie.verbs.prune import prune\n"
        "def kill(stage, done, total):\n"
        "    if stage == 'writing' and done > total / 2: os.kill(os.getpid(), 9)\n"
        "prune(sys.argv[1], sys.argv[2], experts=5, on_progress=kill)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model), str(out)], capture_output=True)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    prune(model, out, **EXPERTS, resume=True)
    assert file_bytes(out) == undisturbed


def test_finished_shards_are_not_written_again(model, tmp_path):
    """What the journal says is done keeps its file; what it does not, or what has another size, is written again."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        prune(model, out, **EXPERTS, on_progress=interrupt_at(num_steps(model, tmp_path / "counted")))
    first, second = (partial / f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
    inode = first.stat().st_ino
    second.write_bytes(second.read_bytes()[:-1])
    prune(model, out, **EXPERTS, resume=True)
    assert (out / first.name).stat().st_ino == inode
    Checkpoint.open(out)


@pytest.mark.parametrize("cut", ["middle of a line", "all", "garbage", "not UTF-8", "odd entries"])
def test_a_damaged_journal_costs_work_and_nothing_else(model, undisturbed, tmp_path, cut):
    """A journal cut or garbled by the crash means that shards are written again."""
    out, journal = tmp_path / "out", tmp_path / "out.partial" / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        prune(model, out, **EXPERTS, on_progress=interrupt_at(num_steps(model, tmp_path / "counted")))
    raw = journal.read_bytes()
    identity = raw[: raw.index(b"\n") + 1]
    odd = b'{"shard": "model-00001-of-00003.safetensors"}\n{"shard": [], "bytes": true}\n{"shard": "a\\u0000"}\n{}\n'
    content = {
        "middle of a line": raw[:-5],
        "all": b"",
        "garbage": identity + b"[[[\n" + raw,
        "not UTF-8": identity + b"\xff\xfe\n",
        "odd entries": identity + odd,
    }[cut]
    journal.write_bytes(content)
    with pytest.raises(KeyboardInterrupt):
        prune(model, out, **EXPERTS, resume=True, on_progress=interrupt_at(2))
    prune(model, out, **EXPERTS, resume=True)
    assert file_bytes(out) == undisturbed


@pytest.mark.parametrize("change", [{"experts": 6}, {"experts": 5, "method": "random"}, {"experts": 5, "kappa": 0}])
def test_resuming_with_another_option_is_refused(model, undisturbed, tmp_path, change):
    """A resume must be the same run; the refusal leaves what is there for the right one."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prune(model, out, **EXPERTS, on_progress=interrupt_at(3))
    with pytest.raises(CoterieError, match="begun with another source, plan or option"):
        prune(model, out, **change, resume=True)
    prune(model, out, **EXPERTS, resume=True)
    assert file_bytes(out) == undisturbed


def test_resuming_from_another_source_is_refused(model, tmp_path):
    """Weights that changed meanwhile would give a mixture of two models."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prune(model, out, method="first", on_progress=interrupt_at(3))
    qwen(model, num_shards=3, seed=1)
    with pytest.raises(CoterieError, match="begun with another source"):
        prune(model, out, method="first", resume=True)


def test_a_left_over_run_is_neither_resumed_nor_thrown_away_unasked(model, undisturbed, tmp_path):
    """Without a flag the leftovers are refused; with --overwrite they are begun anew."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prune(model, out, experts=6, on_progress=interrupt_at(3))
    with pytest.raises(CoterieError, match="left by an interrupted run; add --resume to go on, or --overwrite"):
        prune(model, out, **EXPERTS)
    prune(model, out, **EXPERTS, overwrite=True)
    assert file_bytes(out) == undisturbed


def test_resuming_with_nothing_to_resume_starts_afresh(model, undisturbed, tmp_path):
    """--resume is safe to give always."""
    prune(model, tmp_path / "out", **EXPERTS, resume=True)
    assert file_bytes(tmp_path / "out") == undisturbed


def test_resuming_a_complete_result_is_done(model, tmp_path):
    """A complete OUT is not touched; its own report comes back."""
    out = tmp_path / "out"
    first = prune(model, out, **EXPERTS)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    again = prune(model, out, **EXPERTS, resume=True)
    assert again.as_dict() == json.loads(json.dumps(first.as_dict()))
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(CoterieError, match="is complete, but was made with another source, plan or option"):
        prune(model, out, experts=6, resume=True)


@pytest.mark.parametrize("key", ["source", "report", "versions", "plan", "options"])
@pytest.mark.parametrize("value", [None, [], "x", 1])
def test_resuming_a_result_whose_record_is_damaged(model, tmp_path, key, value):
    """A coterie.json that was edited into nonsense is refused."""
    out = tmp_path / "out"
    prune(model, out, **EXPERTS)
    record = json.loads((out / "coterie.json").read_text())
    (out / "coterie.json").write_text(json.dumps(record | {key: value}))
    with pytest.raises(CoterieError, match="made with another source"):
        prune(model, out, **EXPERTS, resume=True)


def test_a_second_run_at_the_same_time_is_refused(model, undisturbed, tmp_path):
    """The folder is locked while a run writes it; the first run does not notice."""
    refused = []

    def on_progress(stage, done, total):
        if stage == "writing" and not refused:
            for flags in ({"resume": True}, {"overwrite": True}, {}):
                with pytest.raises(CoterieError, match=r"out\.partial: "):
                    prune(model, tmp_path / "out", **EXPERTS, **flags)
                refused.append(flags)

    prune(model, tmp_path / "out", **EXPERTS, on_progress=on_progress)
    assert len(refused) == 3 and file_bytes(tmp_path / "out") == undisturbed


# --- where OUT may be --------------------------------------------------------------------------------------


def test_an_existing_result_is_replaced_only_when_asked(model, tmp_path):
    """OUT that exists is refused; --overwrite replaces it at the end, leaving no copy."""
    out = tmp_path / "out"
    prune(model, out, experts=6)
    with pytest.raises(CoterieError, match="exists already; choose another OUT, or add --overwrite"):
        prune(model, out, **EXPERTS)
    with pytest.raises(KeyboardInterrupt):
        prune(model, out, **EXPERTS, overwrite=True, on_progress=interrupt_at(3))
    assert json.loads((out / "config.json").read_text())["num_experts"] == 6
    prune(model, out, **EXPERTS, resume=True)
    assert json.loads((out / "config.json").read_text())["num_experts"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_that_is_not_ours_is_never_replaced(model, tmp_path, flags):
    """A folder with somebody's files and no coterie.json stays as it is."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(CoterieError):
        prune(model, tmp_path / "out", **flags)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years"
    assert not (tmp_path / "out.partial").exists()


def test_an_empty_folder_may_be_overwritten(model, undisturbed, tmp_path):
    """An empty OUT is refused like any other, and replaced when asked."""
    (tmp_path / "out").mkdir()
    with pytest.raises(CoterieError, match="exists already"):
        prune(model, tmp_path / "out", **EXPERTS)
    prune(model, tmp_path / "out", **EXPERTS, overwrite=True)
    assert file_bytes(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("place", ["model", "model/out", ".", "model/../model/x/y", "link/out", "link"])
def test_out_inside_model_or_around_it_is_refused(model, tmp_path, flags, place):
    """Writing into MODEL, over it or around it would destroy it."""
    (tmp_path / "link").symlink_to(model)
    before = file_bytes(model)
    with pytest.raises(CoterieError, match="choose another OUT"):
        prune(model, tmp_path / place, **EXPERTS, **flags)
    assert file_bytes(model) == before


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_model_in_the_place_of_the_unfinished_folder(tmp_path, flags):
    """OUT.partial is emptied by a fresh run: a model there, or anything else that is not ours, is refused."""
    model = qwen(tmp_path / "out.partial")
    with pytest.raises(CoterieError, match="choose another OUT"):
        prune(model, tmp_path / "out", **flags)
    other = qwen(tmp_path / "other")
    with pytest.raises(CoterieError, match=r"out\.partial"):
        prune(other, tmp_path / "out", **flags)
    assert file_bytes(model) == file_bytes(other)


def test_a_backup_beside_out_survives(model, tmp_path):
    """A folder that the user calls OUT.old is theirs, even when coterie once wrote it."""
    prune(model, tmp_path / "out.old", experts=6)
    prune(model, tmp_path / "out", experts=6)
    prune(model, tmp_path / "out", **EXPERTS, overwrite=True)
    assert json.loads((tmp_path / "out.old" / "config.json").read_text())["num_experts"] == 6


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_out_that_is_a_file_or_a_link_is_refused(model, tmp_path, flags):
    """Only plain folders are replaced."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with pytest.raises(CoterieError, match="exists and is not a plain folder"):
            prune(model, tmp_path / name, **flags)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("out", ["", ".", "..", "/", "a\0b", "x" * 300])
def test_out_without_a_name_is_refused(model, tmp_path, monkeypatch, out):
    """A folder that cannot be renamed into place cannot be OUT."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(CoterieError):
        prune(model, out, overwrite=True)


def test_missing_parents_are_made(model, tmp_path):
    """OUT may lie in folders that do not exist yet, and may be relative."""
    prune(model, tmp_path / "a" / "b" / "out", **EXPERTS)
    assert (tmp_path / "a" / "b" / "out" / "config.json").is_file()


def test_a_parent_that_is_a_file(model, tmp_path):
    """A file where a parent folder was expected is our error."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(CoterieError):
        prune(model, tmp_path / "file" / "out")


# --- disks that refuse -------------------------------------------------------------------------------------


def failing(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_read_only_place_is_refused(model, tmp_path, monkeypatch):
    """A file system that cannot be written gives our error, which names the folder, and nothing appears."""
    monkeypatch.setattr(Path, "mkdir", failing(errno.EROFS))
    with pytest.raises(CoterieError, match=r"out\.partial: cannot be written \(Read-only file system\)"):
        prune(model, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("function", ["copy_file_range", "fsync", "pwrite"])
def test_a_disk_that_fails_leaves_nothing_under_outs_name(model, undisturbed, tmp_path, monkeypatch, code, function):
    """A full or broken disk gives our error; OUT does not exist, and the run resumes once there is room."""
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing(code))
        with pytest.raises(CoterieError, match=r"out\.partial: cannot be written"):
            prune(model, tmp_path / "out", **EXPERTS)
    assert not (tmp_path / "out").exists()
    prune(model, tmp_path / "out", **EXPERTS, resume=True)
    assert file_bytes(tmp_path / "out") == undisturbed


def test_a_disk_that_fills_up_for_real(model, tmp_path):
    """A process that may write no more than 1 kB per file is refused by the kernel itself, and says what to do."""
    code = (
        "import resource, sys; from coterie.verbs.prune import prune; from coterie.errors import CoterieError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: prune(sys.argv[1], sys.argv[2], experts=5)\n"
        "except CoterieError as error: print(error)"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-B", "-c", code, str(model), str(out)], capture_output=True, text=True)
    assert "cannot be written (File too large); free some space and add resume=True" in done.stdout, done.stderr
    assert not out.exists()


def test_too_little_space_is_known_before_writing(model, tmp_path, monkeypatch):
    """The size of the result is compared with the free space first."""
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CoterieError, match="the disk has 100 free"):
        prune(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_copying_without_the_kernels_help_gives_the_same_bytes(model, undisturbed, tmp_path, monkeypatch, code):
    """Where copy_file_range does not work, bytes go through a buffer."""
    monkeypatch.setattr(os, "copy_file_range", failing(code))
    prune(model, tmp_path / "out", **EXPERTS)
    assert file_bytes(tmp_path / "out") == undisturbed


def test_short_copies_and_short_writes_go_on(model, undisturbed, tmp_path, monkeypatch):
    """A kernel that copies seven bytes at a time, and writes three, gives the same bytes."""
    copy, write = os.copy_file_range, os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", lambda source, target, n, *at: copy(source, target, min(n, 7), *at))
        prune(model, tmp_path / "out", **EXPERTS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", failing(errno.EXDEV))
        patch.setattr(os, "pwrite", lambda target, data, at: write(target, data[:3], at))
        prune(model, tmp_path / "out2", **EXPERTS)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "out2") == undisturbed


def test_a_source_cut_while_it_is_copied(model, tmp_path):
    """A shard that shrinks under the copy is noticed, not padded."""

    def on_progress(stage, done, total):
        if stage == "writing":
            for path in model.glob("*.safetensors"):
                os.truncate(path, 10)

    with pytest.raises(CoterieError, match=r"the source changed|cannot be read|ended while reading"):
        prune(model, tmp_path / "out", **EXPERTS, on_progress=on_progress)
    assert not (tmp_path / "out").exists()


# --- what is written ---------------------------------------------------------------------------------------


def data_offset(path):
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("num_shards", [1, 3])
def test_most_bytes_keep_their_offset_modulo_a_page(tmp_path, num_shards):
    """Page-aligned runs of the source stay page-aligned, so that file systems can share blocks: no other place for the
    data would let more bytes keep their offset."""
    model = qwen(tmp_path / "model", num_shards=num_shards)
    prune(model, tmp_path / "out", method="first", experts=5)
    before, after = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    for shard in after.shards:
        shifts = {}
        for new in (t for t in after.tensors.values() if t.file == shard):
            old = before.tensors.get(new.name)  # `first` renames nothing
            if old and old.num_bytes == new.num_bytes:
                shifts[(new.start - old.start) % 4096] = shifts.get((new.start - old.start) % 4096, 0) + new.num_bytes
        assert shifts[0] >= max(shifts.values())
        assert data_offset(tmp_path / "out" / shard) == min(t.start for t in after.tensors.values() if t.file == shard)


@given(
    st.integers(0, 10_000), st.text(max_size=20), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)
)
def test_any_header_reads_back_and_is_aligned(start, name, metadata):
    """Whatever the names and metadata, we and the safetensors library read the padded header back as meant."""
    if name == "__metadata__":
        return
    outputs = [Output(name, "U8", (3,), (Run("x", start, start + 3),))]
    raw = header_bytes(outputs, metadata) + b"abc"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(raw)
        tensors, found = read_header(path)
        with safe_open(path, "numpy") as file:
            assert list(file.keys()) == [name] and file.get_tensor(name).tobytes() == b"abc"
    assert found == metadata and list(tensors) == [name]
    assert tensors[name].start % 4096 == start % 4096


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 10), st.booleans()), max_size=8))
@settings(max_examples=50)
def test_parts_follow_each_other(parts):
    """Runs, neighbouring or not, and made bytes stand end to end behind the header."""
    content = bytes(range(100))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "source").write_bytes(content)
        pieces = [content[start : start + length] for start, length, _ in parts]
        asked = [
            Made(length, lambda piece=piece: piece) if made else Run("source", start, start + len(piece))
            for (start, length, made), piece in zip(parts, pieces, strict=True)
        ]
        layout = FileLayout.of([Output("x", "U8", (sum(map(len, pieces)),), tuple(asked))], {}, Path(folder))
        written = bytearray(layout.num_bytes)
        written[: len(layout.header)] = layout.header
        for position, part in layout.made:
            written[position : position + part.num_bytes] = part.make()
        for move in layout.moves:
            written[move.to : move.to + move.num_bytes] = content[move.start : move.end]
        assert written == layout.header + b"".join(pieces)


def test_metadata_and_shards_are_kept(model, tmp_path):
    """Shard names and each shard's metadata are those of the source; the index names every tensor and the size."""
    prune(model, tmp_path / "out", **EXPERTS)
    before, after = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    assert after.shards == before.shards and after.metadata == before.metadata
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == {name: t.file for name, t in after.tensors.items()}
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["metadata"] == {"total_size": after.num_bytes}


def test_a_shard_left_empty_is_left_out(tmp_path):
    """A shard of dropped experts alone disappears, from the folder and from the index."""
    draw = np.random.default_rng(0)
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up", "down")]
    weights = {name: draw.normal(size=(2, 2)).astype(np.float32) for name in names}
    last = {name: weights.pop(name) for name in names[-3:]}
    router = {"model.layers.0.mlp.gate.weight": np.eye(4, dtype=np.float32)}
    config = qwen_config(num_experts=4, num_hidden_layers=1)
    prune(save(tmp_path / "model", config, [router | weights, last]), tmp_path / "out", method="first", experts=3)
    assert [p.name for p in sorted((tmp_path / "out").glob("*.safetensors"))] == ["model-00001-of-00002.safetensors"]
    assert len(read_all(tmp_path / "out")) == 10 == len(Checkpoint.open(tmp_path / "out").tensors)


def test_a_single_file_stays_a_single_file(tmp_path):
    """model.safetensors without an index gives the same, and no index."""
    prune(qwen(tmp_path / "model"), tmp_path / "out", **EXPERTS)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "coterie.json", "coterie.log", "model.safetensors",
    ]  # fmt: skip


def test_small_files_travel_and_the_rest_is_said_aloud(model, tmp_path):
    """Tokenizer, template and licence are copied; code, pickles, unused weights, links out, old cards are not."""
    for name in ("modeling_x.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "README.md", "coterie.json"):
        (model / name).write_text("{}")
    save_file({"x": np.ones(1)}, model / "consolidated.safetensors")
    (tmp_path / "secret.txt").write_text("secret")
    (model / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (model / "original").mkdir()
    report = prune(model, tmp_path / "out", **EXPERTS)
    found = {p.name for p in (tmp_path / "out").iterdir()}
    small = {"tokenizer.json", "generation_config.json", "merges.txt", "chat_template.jinja", "LICENSE"}
    shards = {p.name for p in model.glob("model-*.safetensors")}
    assert found == small | shards | {"config.json", "coterie.json", "coterie.log", "README.md", INDEX}
    assert all((tmp_path / "out" / n).read_text() == f"content of {n}" for n in small)
    (warning,) = (w for w in report.report["warnings"] if "not copied" in w)
    for name in ("modeling_x.py", "pytorch_model.bin", "consolidated.safetensors", "notes.txt"):
        assert name in warning


def test_the_config_changes_in_its_count_only(tmp_path):
    """Every other value of config.json is as it was, strings that look like lists and large numbers included."""
    extra = {
        "torch_dtype": "float32",
        "note": "[ 1, 2 ]",
        "list": [1, 2.5, -3],
        "big": 2**70,
        "nested": {"π": [[], {}]},
    }
    model = qwen(tmp_path / "model", **extra)
    prune(model, tmp_path / "out", **EXPERTS)
    before, after = (json.loads((f / "config.json").read_text()) for f in (model, tmp_path / "out"))
    assert after == before | {"num_experts": 5} and list(after) == list(before)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(alphabet='[]{}1,. -\n"\\'),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_indented_json_reads_back(value):
    """Putting number lists on one line changes no value."""
    assert json.loads(to_json(value)) == value


def test_number_lists_stand_on_one_line():
    """Kept experts are read by people: a list of numbers takes one line, a list of lists one per list."""
    assert to_json({"kept": [1, 2, 3]}) == '{\n  "kept": [1, 2, 3]\n}\n'
    assert to_json([[1], [2, 3]]) == "[\n  [1],\n  [2, 3]\n]\n"


def test_the_record_and_the_card(model, tmp_path):
    """coterie.json is the report; the card names the source, the command and the numbers before and after."""
    report = prune(model, tmp_path / "out", **EXPERTS)
    record = json.loads((tmp_path / "out" / "coterie.json").read_text())
    assert record == json.loads(json.dumps(report.as_dict()))
    assert (record["format"], record["command"], record["options"]["experts"]) == (1, "prune", 5)
    assert record["source"] == {"path": str(model), "hash": Checkpoint.open(model).hash}
    assert record["report"]["seconds"] >= 0 and record["report"]["peak_rss_bytes"] > 10**6
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--experts 5" in card and "| routed experts per layer | 8 | 5 |" in card


def test_the_result_can_be_pruned_again(model, tmp_path):
    """Removing three experts in two steps by score removes those that one step does."""
    prune(model, tmp_path / "step1", method="router-norm", experts=7)
    prune(tmp_path / "step1", tmp_path / "step2", method="router-norm", experts=5)
    prune(model, tmp_path / "once", method="router-norm", experts=5)
    twice, once = read_all(tmp_path / "step2"), read_all(tmp_path / "once")
    assert twice.keys() == once.keys() and all(np.array_equal(twice[n], once[n]) for n in once)


def test_memory_stays_flat(tmp_path):
    """Rewriting 200 MB of sparse experts takes a few MB of memory, since bytes move inside the kernel."""
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up", "down")]
    header, position = {}, 0
    for name, shape in [("model.layers.0.mlp.gate.weight", [4, 4]), *((n, [2048, 2048]) for n in names)]:
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(qwen_config(num_experts=4, num_hidden_layers=1)))
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    small = qwen(tmp_path / "small")
    code = (
        "import resource, sys; from coterie.verbs.prune import prune\n"
        "prune(sys.argv[1], sys.argv[2] + '0', method='first')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "prune(sys.argv[3], sys.argv[2] + '1', method='first', experts=3)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    command = [sys.executable, "-c", code, str(small), str(tmp_path / "out"), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert position > 200_000_000 and int(done.stdout) < 20_000_000


def test_two_writers_of_one_folder(tmp_path):
    """The lock is the writer's own: a second one is refused until the first is closed."""
    with Writer(tmp_path / "out", {"run": 1}), pytest.raises(CoterieError, match="another run writes here"):
        Writer(tmp_path / "out", {"run": 1}, resume=True)
    with Writer(tmp_path / "out", {"run": 1}, resume=True):
        pass
