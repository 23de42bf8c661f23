"""`--save sparse`: the same folder as packing what the command wrote dense, whatever interrupts it; and packed folders
under the other commands."""

import inspect
import json
import os
import shutil

import pytest

import coterie
import tiny
from coterie.cli import main
from coterie.codecs.open import opened
from coterie.edits import saving
from coterie.errors import CoterieError
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.status import status

VERBS = ("prune", "merge", "stun", "sparsify", "condense", "recover", "drop", "apply")
NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


def half(model, out, **options):
    """The command most tests use: half of the expert weights zero, without data."""
    return coterie.sparsify(model, out, method="magnitude", sparsity=0.5, **options)


@pytest.fixture(scope="module")
def home(tiny_checkpoint, tmp_path_factory):
    """A folder with `dense`, half zeros, `packed`, the same packed, and `saved`, by --save sparse; to be read only."""
    folder = tmp_path_factory.mktemp("saving")
    half(tiny_checkpoint("qwen3_moe"), folder / "dense")
    coterie.pack(folder / "dense", folder / "packed")
    half(tiny_checkpoint("qwen3_moe"), folder / "saved", save="sparse")
    return folder


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """A few token sequences."""
    path = tmp_path_factory.mktemp("ids") / "ids.jsonl"
    path.write_text(
        "".join(json.dumps({"input_ids": [(7 * i + j) % 120 + 3 for j in range(24)]}) + "\n" for i in range(4))
    )
    return path


def weights(folder):
    """What must be equal to the byte."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "config.json"}


def left(folder):
    """The names in a folder."""
    return sorted(p.name for p in folder.iterdir())


def record(folder):
    return json.loads((folder / "coterie.json").read_text())


def code(capsys, *arguments):
    """(exit code, standard output, standard error) of the program."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return (stop.value.code or 0, *capsys.readouterr())


# --- the same as packing afterwards -------------------------------------------------------------------------------


def test_saving_sparse_gives_the_bytes_of_packing_afterwards(home):
    """Same weights and config; nothing else stays beside OUT."""
    assert weights(home / "saved") == weights(home / "packed")
    assert left(home) == ["dense", "packed", "saved"]


def test_the_record_is_the_commands_with_what_packing_did(home, tiny_checkpoint):
    """Command, source, plan and report stay; options say how it was saved; bytes are those on the disk."""
    dense, packed, saved = (record(home / name) for name in ("dense", "packed", "saved"))
    assert saved["options"] == dense["options"] | {"save": "sparse"} and packed["options"] == dense["options"]
    for found in (packed, saved):
        assert found["command"] == "sparsify" and found["plan"] == dense["plan"] and found["source"] == dense["source"]
        assert found["report"]["expert_zeros"] == dense["report"]["expert_zeros"]
        size = Checkpoint.open(home / "saved").num_bytes
        assert found["report"]["after"]["bytes"] == found["report"]["packed"]["after"] == size
        assert found["report"]["packed"]["before"] == dense["report"]["after"]["bytes"] > size
    assert "--save sparse" in (home / "saved" / "README.md").read_text()
    assert "## Packed" in (home / "packed" / "README.md").read_text()


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_takes_save_and_refuses_what_it_does_not_know(verb, tmp_path):
    """An unknown value is refused before the model is looked at."""
    assert inspect.signature(getattr(coterie, verb)).parameters["save"].default == "dense"
    rest = [tmp_path / "plan.json"] if verb == "apply" else []
    with pytest.raises(CoterieError, match=r"--save 'zip': unknown; expected one of dense, sparse"):
        getattr(coterie, verb)(tmp_path / "none", *rest, tmp_path / "out", save="zip")


@pytest.mark.parametrize("verb", ["prune", "stun", "drop", "condense", "apply"])
def test_other_commands_save_sparse_from_a_model_with_zeros(home, ids, tmp_path, verb):
    """What stands in OUT is, unpacked, what the command writes dense."""
    model, few = home / "dense", {"data": [f"a={ids}"], "samples": 4, "seq_len": 24}
    plan = coterie.prune(model, tmp_path / "plan", ratio=0.25).as_dict() if verb == "apply" else None
    act = {
        "prune": lambda out, **how: coterie.prune(model, out, ratio=0.25, **how),
        "stun": lambda out, **how: coterie.stun(model, out, sparsity=0.6, second="magnitude", **how),
        "drop": lambda out, **how: coterie.drop(model, out, count=1, **few, **how),
        "condense": lambda out, **how: coterie.condense(model, out, layer_ids=[1], **few, **how),
        "apply": lambda out, **how: coterie.apply(model, plan, out, **how),
    }[verb]
    act(tmp_path / "dense")
    report = act(tmp_path / "out", save="sparse")
    assert report.command == verb and report.options["save"] == "sparse" and report.report["packed"]["tensors"] > 0
    view, dense = opened(Checkpoint.open(tmp_path / "out")), Checkpoint.open(tmp_path / "dense")
    assert view.config == dense.config and list(view.tensors) == list(dense.tensors)
    assert all(view.raw(name) == dense.raw(name) for name in dense.tensors)
    assert not (tmp_path / "out.dense").exists()
    assert all(c["ok"] for c in coterie.verify(tmp_path / "out", against=model)["checks"])


# --- interruptions ------------------------------------------------------------------------------------------------


class Stop(KeyboardInterrupt):
    """Ctrl-C."""


def stopping(number):
    """A progress callback that stops the run at its call of that number, and how many calls there were."""
    calls = []

    def on_progress(*_):
        calls.append(1)
        if len(calls) == number:
            raise Stop

    return on_progress, calls


def first_step(home, folder):
    """What the first step leaves: the dense checkpoint, with a record that asks for a sparse one."""
    shutil.copytree(home / "dense", folder)
    content = record(folder)
    content["options"]["save"] = "sparse"
    (folder / "coterie.json").write_text(json.dumps(content))


def test_a_run_killed_anywhere_resumes_to_the_same_bytes(tiny_checkpoint, home, tmp_path):
    """In the first step, between the two, and in the second."""
    model = tiny_checkpoint("qwen3_moe")
    on_progress, calls = stopping(0)
    half(model, tmp_path / "whole", save="sparse", on_progress=on_progress)
    total = len(calls)
    for number in (1, total // 6, total // 3, total // 2, 2 * total // 3, total - 1, total):
        out = tmp_path / str(number)
        with pytest.raises(Stop):
            half(model, out, save="sparse", on_progress=stopping(number)[0])
        assert not out.exists()
        with pytest.raises(CoterieError, match="--resume"):
            half(model, out, save="sparse")
        half(model, out, save="sparse", resume=True)
        assert weights(out) == weights(home / "saved")
        assert [n for n in left(tmp_path) if n.startswith(f"{number}.")] == []


def test_a_run_killed_before_it_tidied_up_is_finished_by_resume(tiny_checkpoint, home, tmp_path):
    """OUT is complete and OUT.dense still there; resuming a complete OUT changes nothing."""
    model, out = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    half(model, out, save="sparse")
    before = weights(out)
    first_step(home, tmp_path / "out.dense")
    report = half(model, out, save="sparse", resume=True)
    assert weights(out) == before and not (tmp_path / "out.dense").exists()
    again = half(model, out, save="sparse", resume=True)
    assert again.report["packed"] == report.report["packed"] and weights(out) == before


def stopping_removal(patch, number):
    """Once packing is done, Ctrl-C comes instead of the removal of that number."""
    pack, left = saving.pack, [number]

    def counted(remove):
        def act(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            return remove(*args, **kwargs)

        return act

    def packed(*args, **kwargs):
        report = pack(*args, **kwargs)
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        return report

    patch.setattr("coterie.edits.saving.pack", packed)


def test_a_run_killed_while_it_tidies_up_leaves_nothing_for_ever(tiny_checkpoint, home, tmp_path, monkeypatch):
    """Whichever file it had come to: OUT is complete, nothing is named as a checkpoint, and resume removes the rest."""
    model, out = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    shutil.copytree(home / "saved", out)
    files = len(left(home / "dense"))
    for number in range(files + 1):
        first_step(home, tmp_path / "out.dense")
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stopping_removal(patch, number)
            half(model, out, save="sparse", resume=True)
        assert left(tmp_path) == ["out", "out.dense.old"] and len(left(tmp_path / "out.dense.old")) == files - number
        half(model, out, save="sparse", resume=True)
        assert left(tmp_path) == ["out"] and weights(out) == weights(home / "saved")


def test_what_tidying_up_left_is_removed_when_asked_and_only_if_it_is_ours(tiny_checkpoint, home, tmp_path):
    """By --overwrite too; not by a dry run, not without either option, and no folder of somebody else's."""
    model, out, old = tiny_checkpoint("qwen3_moe"), tmp_path / "out", tmp_path / "out.dense.old"
    first_step(home, old)
    with pytest.raises(CoterieError, match=r"out\.dense\.old: left by an interrupted run; add --resume"):
        half(model, out, save="sparse")
    half(model, out, save="sparse", resume=True, dry_run=True)
    assert left(tmp_path) == ["out.dense.old"] and weights(old) == weights(home / "dense")
    half(model, out, save="sparse", overwrite=True)
    assert left(tmp_path) == ["out"]
    shutil.copytree(home / "dense", old)
    with pytest.raises(CoterieError, match=r"out\.dense\.old: in the way, and not left by --save sparse"):
        half(model, out, save="sparse", resume=True)
    assert weights(old) == weights(home / "dense")


def test_between_the_steps_status_tells_of_the_dense_checkpoint(tiny_checkpoint, home, tmp_path, monkeypatch, capsys):
    """While zeros are counted there is no journal; a folder of that name that is no first step says nothing."""
    out = tmp_path / "out"

    def pack(*args, **kwargs):
        raise Stop

    monkeypatch.setattr("coterie.edits.saving.pack", pack)
    with pytest.raises(Stop):
        half(tiny_checkpoint("qwen3_moe"), out, save="sparse")
    found = status(out)
    assert (found["path"], found["state"], found["alive"]) == (str(tmp_path / "out.dense"), "interrupted", None)
    assert (found["command"], found["options"]["save"]) == ("sparsify", "sparse")
    assert "complete, and not packed yet" in found["note"] and found["note"] in code(capsys, "status", out)[1]
    shutil.rmtree(tmp_path / "out.dense")
    shutil.copytree(home / "dense", tmp_path / "out.dense")
    with pytest.raises(CoterieError, match="neither a result of coterie"):
        status(out)


def test_saving_dense_names_what_saving_sparse_left(tiny_checkpoint, home, tmp_path):
    """Both folders and an unfinished one, in the record too, all left alone; somebody else's are not named."""
    model, out = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    with pytest.raises(Stop):
        half(model, out, save="sparse", on_progress=stopping(1)[0])
    for name in ("out.dense", "out.dense.old"):
        first_step(home, tmp_path / name)
    beside = [tmp_path / f"out.dense{end}" for end in ("", ".old", ".partial")]
    note = half(model, out).report["warnings"][-1]
    assert note.startswith(", ".join(map(str, beside)) + ": of --save sparse")
    assert note in record(out)["report"]["warnings"] and all(path.is_dir() for path in beside)
    for path in beside[1:]:
        shutil.rmtree(path)
    shutil.copytree(home / "dense", beside[0], dirs_exist_ok=True)
    assert not any("--save sparse" in said for said in half(model, out, overwrite=True).report["warnings"])


def test_recover_names_what_saving_sparse_left(tiny_checkpoint, home, ids, tmp_path):
    """It writes its report by itself."""
    first_step(home, tmp_path / "out.dense")
    how = {"data": {"d": ids}, "samples": 4, "stage": "lm", "layer_ids": "1", "steps": 1, "batch_size": 2}
    for save in ("dense", "sparse"):
        model, how["save"] = tiny_checkpoint("qwen3_moe"), save
        found = coterie.recover(model, tmp_path / "out", overwrite=True, dry_run=True, **how).report
        assert any(f"{tmp_path / 'out.dense'}: of --save sparse" in n for n in found["warnings"]) == (save == "dense")


def test_a_name_that_leaves_no_room_for_the_other_folders_is_refused(tiny_checkpoint, tmp_path):
    """244 letters are a name, and 258 are none."""
    with pytest.raises(CoterieError, match="File name too long"):
        half(tiny_checkpoint("qwen3_moe"), tmp_path / ("x" * 244), save="sparse")
    assert left(tmp_path) == []


def test_resume_with_other_options_is_refused(tiny_checkpoint, tmp_path):
    """A complete OUT of another saving, or of another share."""
    model, out = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    half(model, out, save="sparse")
    for options in ({"save": "dense"}, {"save": "sparse", "min_tokens": 3}):
        with pytest.raises(CoterieError, match="another source, plan or option"):
            half(model, out, resume=True, **options)


def test_what_is_in_the_way_is_refused_and_left_alone(tiny_checkpoint, home, tmp_path):
    """A folder named OUT.dense that is no first step, even with --overwrite; an OUT beside an unfinished first step."""
    model, out = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    shutil.copytree(home / "dense", tmp_path / "out.dense")
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(CoterieError, match=r"out\.dense: in the way"):
            half(model, out, save="sparse", **how)
    assert weights(tmp_path / "out.dense") == weights(home / "dense") and not out.exists()
    shutil.rmtree(tmp_path / "out.dense")
    with pytest.raises(Stop):
        half(model, out, save="sparse", on_progress=stopping(1)[0])
    shutil.copytree(home / "dense", out)
    with pytest.raises(CoterieError, match="move it away"):
        half(model, out, save="sparse", resume=True)
    assert weights(out) == weights(home / "dense")
    half(model, out, save="sparse", overwrite=True)
    assert weights(out) == weights(home / "saved") and left(tmp_path) == ["out"]


# --- nothing to gain ----------------------------------------------------------------------------------------------


def test_where_nothing_shrinks_the_dense_result_is_kept_and_named(tiny_checkpoint, tmp_path):
    """Too few zeros were made: refused after the work, with what it made complete beside OUT."""
    out = tmp_path / "out"
    with pytest.raises(CoterieError, match=r"would shrink.*complete in .*out\.dense"):
        coterie.sparsify(tiny_checkpoint("qwen3_moe"), out, method="magnitude", sparsity=0.01, save="sparse")
    assert not out.exists() and left(tmp_path) == ["out.dense"]
    assert coterie.verify(tmp_path / "out.dense", against=tiny_checkpoint("qwen3_moe"))["ok"]


def test_commands_that_make_no_zeros_are_refused_before_they_work(tiny_checkpoint, tmp_path):
    """Of a model without any; nothing is written."""
    with pytest.raises(CoterieError, match="makes no zeros"):
        coterie.prune(tiny_checkpoint("qwen3_moe"), tmp_path / "out", save="sparse")
    assert left(tmp_path) == []


def test_a_dry_run_says_what_the_disk_must_hold(tiny_checkpoint, tmp_path):
    """And writes nothing."""
    report = half(tiny_checkpoint("qwen3_moe"), tmp_path / "out", save="sparse", dry_run=True).report
    assert any(f"{report['before']['bytes']:,} bytes to OUT.dense" in note for note in report["warnings"])
    assert report["after"]["bytes"] < report["before"]["bytes"] and left(tmp_path) == []


# --- packed folders under the other commands ----------------------------------------------------------------------


def test_unpacking_restores_the_record_too(home, tiny_checkpoint, tmp_path):
    """The plan and report of the command, with the dense bytes: verified against the original as before."""
    coterie.unpack(home / "saved", tmp_path / "out")
    found, dense = record(tmp_path / "out"), record(home / "dense")
    assert found["plan"] == dense["plan"] and found["report"]["after"] == dense["report"]["after"]
    assert "packed" not in found["report"] and "## Packed" not in (tmp_path / "out" / "README.md").read_text()
    assert coterie.verify(tmp_path / "out", against=tiny_checkpoint("qwen3_moe"))["ok"]


def test_a_folder_without_a_record_is_packed_under_its_own(tiny_checkpoint, home, tmp_path):
    """A checkpoint that no command of ours made; one whose coterie.json is no record is refused."""
    shutil.copytree(home / "dense", tmp_path / "in")
    (tmp_path / "in" / "coterie.json").unlink()
    coterie.pack(tmp_path / "in", tmp_path / "out")
    assert record(tmp_path / "out")["command"] == "pack"
    assert coterie.verify(tmp_path / "out", against=tmp_path / "in")["ok"]
    (tmp_path / "in" / "coterie.json").write_text('{"command": "stun", "plan": 3}')
    with pytest.raises(CoterieError, match="not a record of coterie"):
        coterie.pack(tmp_path / "in", tmp_path / "out2")


@pytest.mark.parametrize("against", ["original", "dense", "neither"])
def test_verify_checks_a_packed_folder_as_the_dense_one(home, tiny_checkpoint, against):
    """Against the original and against the folder it was packed from; another model is a fault."""
    other = {"original": tiny_checkpoint("qwen3_moe"), "dense": home / "dense", "neither": tiny_checkpoint("olmoe")}
    result = coterie.verify(home / "packed", against=other[against])
    checks = {c["name"]: c for c in result["checks"]}
    assert result["ok"] == (against != "neither")
    assert checks["packed tensors"]["ok"] and "96 matrices" in checks["packed tensors"]["detail"]
    assert checks["accounts for every tensor"]["ok"] == (against != "neither")
    assert checks["computes"]["detail"].startswith("finite logits")


def test_verify_says_what_int8_lost(home, tmp_path):
    """Rounded tensors are counted, not compared."""
    coterie.pack(home / "dense", tmp_path / "out", values="int8")
    result = coterie.verify(tmp_path / "out", against=home / "dense")
    details = " ".join(c["detail"] for c in result["checks"])
    assert result["ok"] and "96 rounded to few bits" in details


def test_verify_after_int8_finds_no_fault_where_there_is_none(home, tiny_checkpoint, ids, tmp_path):
    """Routers with zeros that were not packed are checked against the original; so are trained tensors, and experts
    dropped from a model that had zeros."""
    original, data = tiny_checkpoint("qwen3_moe"), {"d": ids}
    coterie.stun(original, tmp_path / "stun", preset="paper", second="magnitude", sparsity=0.5, expert_ratio=0)
    coterie.prune(home / "dense", tmp_path / "prune", ratio=0.25)
    shutil.copytree(home / "dense", tmp_path / "bare")  # zeros that no plan knows of
    (tmp_path / "bare" / "coterie.json").unlink()
    coterie.recover(
        tmp_path / "bare", tmp_path / "recover", data=data, samples=4, stage="lm", layer_ids="1", steps=1, batch_size=2
    )
    for name, source in (("stun", original), ("prune", home / "dense"), ("recover", tmp_path / "bare")):
        coterie.pack(tmp_path / name, tmp_path / f"{name}-int8", values="int8")
        result = coterie.verify(tmp_path / f"{name}-int8", against=source)
        assert result["ok"], (name, result)
        checks = {c["name"]: c["detail"] for c in result["checks"]}
        assert "that were rounded when they were packed" in checks["accounts for every tensor"], name


def test_inspect_counts_dense_parameters_and_stored_bytes(home):
    """Of a packed folder and of the dense one."""
    packed, dense = coterie.inspect(home / "packed"), coterie.inspect(home / "dense")
    assert packed["parameters"] == dense["parameters"] and packed["experts"] == dense["experts"]
    assert packed["bytes"] == Checkpoint.open(home / "packed").num_bytes < dense["bytes"]
    assert packed["packed"]["tensors"] == 96 and dense["packed"] == {"tensors": 0, "bytes": 0}


def test_eval_measures_the_same_perplexity(home, ids):
    """Packed and zero-filled, in float32."""
    found = coterie.eval([home / "packed", home / "dense"], data={"a": ids}, dtype="float32")["models"]
    packed, dense = (m["perplexity"]["a"]["value"] for m in found)
    assert packed == pytest.approx(dense, rel=1e-4)


def test_what_trains_a_model_refuses_a_packed_one(home, ids, tmp_path):
    """Its weights are not there to be trained; the way out is named. Other commands read it (test_packed_model.py)."""
    with pytest.raises(CoterieError, match="`coterie unpack`"):
        coterie.recover(home / "packed", tmp_path / "out", stage="lm", layer_ids=[1], data=[f"a={ids}"])
    coterie.prune(home / "packed", tmp_path / "out", ratio=0.25)
    assert coterie.verify(tmp_path / "out", against=home / "packed")["ok"]


def changed(home, out, part):
    """The packed folder with one thing wrong."""
    shutil.copytree(home / "packed", out)
    path = out / "model.safetensors"
    if part == "version":
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"]["format"] = 9
        (out / "config.json").write_text(json.dumps(config))
    elif part == "truncated":
        path.write_bytes(path.read_bytes()[:-64])
    else:
        start = Checkpoint.open(out).tensors[f"{NAME}.{part}"].start
        data = bytearray(path.read_bytes())
        data[start] ^= 1
        path.write_bytes(data)
    return out


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("mask", "keeps"),
        ("values", "checksum"),
        ("rows", "values"),
        ("version", "format 9"),
        ("truncated", "truncated"),
    ],
)
def test_every_kind_of_damage_has_its_exit_code(home, tmp_path, capsys, part, says):
    """verify answers with a named fault and 3; what would load or restore it refuses with 2, and writes nothing."""
    wrong = changed(home, tmp_path / "wrong", part)
    status, out, _ = code(capsys, "verify", wrong, "--json")
    fault = next(c for c in json.loads(out)["checks"] if not c["ok"])
    assert status == 3 and says in fault["detail"]
    assert part in ("version", "truncated") or NAME in fault["detail"]
    for arguments in (["unpack", wrong, tmp_path / "out"], ["eval", wrong, "--data", f"a={tmp_path / 'ids'}"]):
        (tmp_path / "ids").write_text('{"input_ids": [3, 4, 5]}\n')
        status, _, err = code(capsys, *arguments)
        assert status == 2 and err.startswith("error:") and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_program_saves_sparse(tiny_checkpoint, home, tmp_path, capsys):
    """--save on the command line, with the record as --json prints it; a wrong one exits with 2."""
    arguments = ["sparsify", tiny_checkpoint("qwen3_moe"), tmp_path / "out", "--method", "magnitude", "--json"]
    status, out, _ = code(capsys, *arguments, "--save", "sparse")
    assert status == 0 and json.loads(out) == record(tmp_path / "out")
    assert weights(tmp_path / "out") == weights(home / "saved")
    assert code(capsys, *arguments[:2], tmp_path / "o", "--save", "zip")[0] == 2
    assert "import coterie" in tiny.read(tmp_path / "out")[1]["quantization_config"]["coterie"]
