"""Work that takes hours: whatever ends it, `status` knows of it, and with resume it ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import tiny
from coterie.errors import CoterieError
from coterie.verbs.collect import collect
from coterie.verbs.status import status


@pytest.fixture
def data(tmp_path):
    """Six texts of three lengths."""
    texts = [np.random.default_rng(i).integers(3, tiny.VOCABULARY, n).tolist() for i, n in enumerate((20, 9, 14) * 2)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"input_ids": t}) for t in texts))
    return [f"texts={tmp_path / 'texts.jsonl'}"]


class Stop(BaseException):
    """What ends a run at one of its reports of progress."""


def stopping(at):
    """A callback that ends the run at the call of that number, and the calls so far."""
    calls = []

    def tell(stage, done, total):
        calls.append((stage, done, total))
        if len(calls) == at:
            raise Stop

    return tell, calls


def stopped_everywhere(run, out, same):
    """Ends `run(on_progress=, resume=)` at each of its calls of progress in turn, always going on from the call before;
    then from each alone. `same()` looks at the result, which is then removed. Returns the stages in order."""
    tell, calls = stopping(0)
    run(on_progress=tell)
    same()
    for at in range(1, len(calls) + 1):
        tell, _ = stopping(at)
        with pytest.raises(Stop):
            run(on_progress=tell)
        found = status(out)
        assert found["state"] == "interrupted" and found["command"], found
        again, repeated = stopping(0)
        run(on_progress=again, resume=True)
        assert len(repeated) <= len(calls) - at + 2, (at, calls, repeated)
        same()
    return list(dict.fromkeys(stage for stage, _, _ in calls))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("merging", [False, True])
def test_collect_goes_on_after_any_layer(tiny_checkpoint, tmp_path, data, model_type, merging):
    """The file is the same, byte for byte, and nothing is left beside it."""
    folder, out, whole = tiny_checkpoint(model_type), tmp_path / "stats", tmp_path / "whole"
    collect(folder, whole, data=data, merging=merging)

    def same():
        assert out.read_bytes() == whole.read_bytes() and not (tmp_path / "stats.partial").exists()
        out.unlink()

    def run(**how):
        found = collect(folder, out, data=data, merging=merging, **how)
        assert len(found["layers"]) > 1 and found["domains"] == {"texts": {"samples": 6, "tokens": 86}}

    assert stopped_everywhere(run, out, same) == ["measuring layers"]


def test_a_measurement_of_something_else_is_not_gone_on_with(tiny_checkpoint, tmp_path, data):
    """Other options, another model or other data are refused, and so is a folder that is not ours, or no interrupted
    run's."""
    folder, out = tiny_checkpoint("qwen2_moe"), tmp_path / "stats"
    with pytest.raises(Stop):
        collect(folder, out, data=data, on_progress=stopping(2)[0])
    with pytest.raises(CoterieError, match="left by an interrupted run; add --resume to go on"):
        collect(folder, out, data=data)
    with pytest.raises(CoterieError, match="begun with another source, plan or option"):
        collect(folder, out, data=data, seq_len=10, resume=True)
    with pytest.raises(CoterieError, match="begun with another source, plan or option"):
        collect(tiny_checkpoint("olmoe"), out, data=data, resume=True)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"input_ids": [5, 6, 7]}))
    with pytest.raises(CoterieError, match="begun on other data"):
        collect(folder, out, data=data, resume=True)
    collect(folder, out, data=data, overwrite=True)
    with pytest.raises(CoterieError, match="is complete, so that there is nothing to go on with"):
        collect(folder, out, data=data, resume=True)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "precious").touch()
    with pytest.raises(CoterieError, match="nothing that coterie wrote"):
        collect(folder, tmp_path / "other", data=data, overwrite=True)


def test_status_answers_while_it_measures(tiny_checkpoint, tmp_path, data):
    """From the first second on: the command, the process, the stage and the layers."""
    folder, seen = tiny_checkpoint("qwen2_moe"), []

    def look(*_):
        seen.append(status(tmp_path / "stats"))

    collect(folder, tmp_path / "stats", data=data, on_progress=look)
    first, last = seen[0], seen[-1]
    assert (first["state"], first["command"], first["pid"]) == ("running", "collect", os.getpid())
    assert first["stage"] == {"name": "measuring layers", "done": 1, "all": 4}
    assert (first["layers"], last["layers"]) == ({"done": 1, "all": 4}, {"done": 4, "all": 4})


def test_a_killed_process_is_gone_on_from(tiny_checkpoint, tmp_path, data):
    """kill -9, by the command line: what the next one writes is the same."""
    folder, out = tiny_checkpoint("qwen2_moe"), tmp_path / "stats"
    collect(folder, tmp_path / "whole", data=data)
    code = (
        "import os, signal, coterie, sys\n"
        "def kill(stage, done, total):\n    os.kill(os.getpid(), signal.SIGKILL) if done == 3 else None\n"
        "coterie.collect(sys.argv[1], sys.argv[2], data=sys.argv[3:], on_progress=kill)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder, out, *data], check=False)
    assert done.returncode == -signal.SIGKILL and status(out)["layers"]["done"] == 3 and not status(out)["alive"]
    command = [sys.executable, "-m", "coterie", "collect", folder, out, "--data", *data, "--resume"]
    subprocess.run(command, check=True, capture_output=True)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
