"""`coterie status`: what a run wrote down about itself, from anywhere and at any time."""

import json
import subprocess
import sys

import pytest

from coterie.cli import main
from coterie.errors import CoterieError
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.journal import JOURNAL
from coterie.storage.shards import Output, Run
from coterie.storage.writer import Writer
from coterie.verbs.prune import prune
from coterie.verbs.status import status
from handmade import qwen

ASKED = {"identity": "x", "asked": {"command": "sparsify", "options": {"method": "wanda"}}}
BEGAN = {"began": 100.0, "pid": 7, "files": 3, "bytes": 3000, "later": 0, "written": 0, "source": {}}


def left(folder, *entries):
    """OUT.partial as a killed process left it; returns OUT."""
    partial = folder / "out.partial"
    partial.mkdir()
    (partial / JOURNAL).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder / "out"


def test_a_run_that_was_killed_while_it_copied(tmp_path):
    """1000 of 3000 bytes in 10 s are 100 a second: 20 s are left; bytes of the file that was cut short do not count."""
    found = status(
        left(
            tmp_path, ASKED, BEGAN, {"at": 105.0, "written": 400},
            {"shard": "a.safetensors", "bytes": 1100, "at": 110.0, "written": 1000}, {"at": 112.0, "written": 1200},
        )
    )  # fmt: skip
    assert found == {
        "path": str(tmp_path / "out.partial"), "state": "interrupted", "command": "sparsify",
        "options": {"method": "wanda"}, "alive": False, "pid": 7,
        "began": "1970-01-01T00:01:40Z", "updated": "1970-01-01T00:01:52Z",
        "stage": None, "files": {"done": 1, "all": 3}, "layers": {"done": 0, "all": None},
        "bytes": {"done": 1000, "all": 3000}, "bytes_per_second": 100.0, "seconds_left": 20.0,
    }  # fmt: skip


def test_a_run_that_was_killed_between_layers(tmp_path):
    """Two of five layers, ten seconds each after everything was copied: thirty seconds are left."""
    copied = {"shard": "a", "bytes": 9, "at": 105.0, "written": 3000}
    units = [{"unit": {"layer": i}, "of": 5, "at": 115.0 + 10 * i} for i in range(2)]
    found = status(left(tmp_path, ASKED, BEGAN | {"later": 500}, copied, *units))
    assert found["layers"] == {"done": 2, "all": 5} and found["seconds_left"] == 30.0


def test_a_resumed_run_counts_what_was_kept_but_not_as_its_own_speed(tmp_path):
    """1000 bytes were kept; 500 more in 5 s are 100 a second, and 1500 are left."""
    again = BEGAN | {"began": 200.0, "pid": 8, "written": 1000}
    told = [("a", 110, 1000), ("b", 205, 1500)]
    shards = [{"shard": name, "bytes": 9, "at": at, "written": written} for name, at, written in told]
    found = status(left(tmp_path, ASKED, BEGAN, shards[0], again, shards[1]))
    assert (found["pid"], found["bytes_per_second"], found["seconds_left"]) == (8, 100.0, 15.0)


def test_before_the_first_byte_nothing_is_made_up(tmp_path):
    """No rate and no time left; nor when only the name of the command is known, nor even that."""
    found = status(left(tmp_path, ASKED, BEGAN))
    assert (found["bytes_per_second"], found["seconds_left"]) == (None, None)
    damaged = '{"asked": [1]}\n{"began": NaN, "bytes": "x"}\n{"unit": 1}\n'
    for content in (json.dumps(ASKED) + "\n", "", "\x00\xff", damaged):
        (tmp_path / "out.partial" / JOURNAL).write_text(content)
        found = status(tmp_path / "out")
        assert (found["state"], found["bytes"]["all"], found["seconds_left"]) == ("interrupted", None, None)


def test_a_run_that_lives(tmp_path):
    """While a process holds the folder the run is running; OUT and OUT.partial name the same."""
    model = Checkpoint.open(qwen(tmp_path / "model"))
    outputs = {"model.safetensors": [Output("x", "U8", (100,), (Run("model.safetensors", 0, 100),))]}
    with Writer(tmp_path / "out", {"command": "prune", "options": {"ratio": 0.5}}) as writer:
        writer.begin(model, outputs)
        writer.shard("model.safetensors")
        found = status(tmp_path / "out")
        assert found == status(tmp_path / "out.partial") | {"updated": found["updated"]}
        assert (found["state"], found["alive"], found["command"]) == ("running", True, "prune")
        assert found["bytes"] == {"done": 100, "all": 100} and found["files"] == {"done": 1, "all": 1}
        assert found["seconds_left"] == 0
    assert status(tmp_path / "out")["state"] == "interrupted"


def test_the_first_of_two_steps(tmp_path):
    """With --save sparse the dense checkpoint comes first, in a folder beside OUT: that is then what is asked about."""
    left(tmp_path, ASKED, BEGAN)
    (tmp_path / "out.partial").rename(tmp_path / "out.dense.partial")
    assert status(tmp_path / "out")["path"] == str(tmp_path / "out.dense.partial")


def test_a_complete_result(tmp_path):
    """What was asked, from the result's own record."""
    report = prune(qwen(tmp_path / "model"), tmp_path / "out", experts=5)
    found = status(tmp_path / "out")
    assert (found["state"], found["command"], found["options"]["experts"]) == ("complete", "prune", 5)
    assert found["seconds"] == report.report["seconds"]


@pytest.mark.parametrize("name", ["nothing", "model", "file", "a\0b", "x" * 300, "out.partial"])
def test_neither_a_run_nor_a_result_is_refused(tmp_path, name):
    """A name of nothing, of a model that coterie did not write, of a file, or no name at all."""
    qwen(tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(CoterieError):
        status(tmp_path / name)


def test_on_the_command_line(tmp_path, capsys):
    """A table for people, JSON for programs, exit code 0 for a run that was killed, 2 where there is none."""
    out = left(tmp_path, ASKED, BEGAN, {"shard": "a", "bytes": 1100, "at": 110.0, "written": 1_000})
    with pytest.raises(SystemExit) as stop:
        main(["status", str(out), "--json"])
    assert not stop.value.code and json.loads(capsys.readouterr().out) == status(out)
    with pytest.raises(SystemExit) as stop:
        main(["status", str(out)])
    said = capsys.readouterr().out
    assert not stop.value.code
    for line in ("out.partial: interrupted", "coterie sparsify", "7, gone", "1,000 of 3,000", "0 of unknown"):
        assert line in said
    with pytest.raises(SystemExit) as stop:
        main(["status", str(tmp_path / "nothing")])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_asking_is_cheap():
    """Neither torch nor transformers is imported to read a journal."""
    code = "import sys, coterie.verbs.status; assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_log_tells_the_story(tmp_path):
    """One line for the beginning, for each file and for the end, each with its time; it stays in the result."""
    prune(qwen(tmp_path / "model", num_shards=2), tmp_path / "out")
    lines = (tmp_path / "out" / "coterie.log").read_text().splitlines()
    assert all(line[10] == "T" and line[19] == "Z" for line in lines)
    told = [line.split(maxsplit=1)[1] for line in lines]
    assert [line.split()[0] for line in told] == ["began:", "wrote", "wrote", "complete"]
    assert "coterie prune" in told[0] and "model-00001-of-00002.safetensors" in told[1] and "MB/s" in told[2]
