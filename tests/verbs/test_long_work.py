"""Work that takes hours: whatever ends it, `status` knows of it, and with resume it ends as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest

import tiny
from coterie.errors import CoterieError
from coterie.storage.folders import partial_of
from coterie.verbs.analyze import analyze
from coterie.verbs.collect import collect
from coterie.verbs.condense import condense
from coterie.verbs.drop import drop
from coterie.verbs.status import status
from handmade import file_bytes


@pytest.fixture
def data(tmp_path):
    """Six texts of three lengths."""
    texts = [np.random.default_rng(i).integers(3, tiny.VOCABULARY, n).tolist() for i, n in enumerate((20, 9, 14) * 2)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"input_ids": t}) for t in texts))
    return [f"texts={tmp_path / 'texts.jsonl'}"]


class Stop(BaseException):
    """What ends a run at one of its reports of progress."""


def stopping(at):
    """A callback that ends the run at the call of that number, and the calls so far; writing is looked at elsewhere."""
    calls = []

    def tell(stage, done, total):
        if stage != "writing":
            calls.append((stage, done, total))
        if len(calls) == at != 0:
            raise Stop

    return tell, calls


def stopped_everywhere(run, out, same, *, every=1, unit=1):
    """Ends `run(on_progress=, resume=)` at every so manyth of its reports of progress, and what goes on at its first;
    then goes on to the end, and has `same()` look at the result and remove it. Returns the stages in order.

    unit: reports of progress that stand for one unit of work: so many more are repeated at most.
    """
    tell, calls = stopping(0)
    run(on_progress=tell)
    same()
    for at in range(1, len(calls) + 1, every):
        with pytest.raises(Stop):
            run(on_progress=stopping(at)[0])
        found = status(out)
        assert found["state"] == "interrupted" and found["command"], found
        tell, repeated = stopping(0)
        with suppress(Stop):
            run(on_progress=stopping(1)[0], resume=True)
        if partial_of(out).exists():
            run(on_progress=tell, resume=True)
        assert len(repeated) <= len(calls) - at + unit, (at, calls, repeated)
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


CONDENSING = {
    "least squares": {"layers": 2},
    "least squares, beam": {"layers": 2, "layer_search": "beam"},
    "named": {"layer_ids": [1, 3]},
    "routing": {"layers": 1, "select": "routing", "layer_search": "one-shot"},
    "published": {"layers": 2, "select": "official"},
}


def told(report):
    """A record without what says when and how fast, and which files an earlier process had written."""
    unequal = ("seconds", "search_seconds", "peak_rss_bytes", "io")
    kept = {name: value for name, value in report.report.items() if name not in unequal}
    return json.loads(json.dumps(report.as_dict() | {"report": kept}))


def check_decision(verb, folder, tmp_path, asked, **how):
    """A verb that decides by running the model: stopped anywhere, it ends with the same folder and the same record."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    expected = told(verb(folder, whole, **asked))
    texts = ("coterie.json", "README.md", "coterie.log")

    def same():
        found, wanted = ({n: b for n, b in file_bytes(p).items() if n not in texts} for p in (out, whole))
        assert found == wanted and sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())
        assert not (tmp_path / "out.partial").exists()
        shutil.rmtree(out)

    def run(**more):
        assert told(verb(folder, out, **asked, **more)) == expected

    return stopped_everywhere(run, out, same, **how)


@pytest.mark.parametrize("asked", CONDENSING.values(), ids=CONDENSING)
def test_condense_goes_on_after_any_layer_and_round(tiny_checkpoint, tmp_path, data, asked):
    """Layers that were measured, rounds of the search and layers that were fitted are not run again."""
    asked = {"data": data, "dtype": "float32"} | asked
    assert len(check_decision(condense, tiny_checkpoint("qwen2_moe"), tmp_path, asked, every=5, unit=4)) >= 1


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_drop_goes_on_after_any_layer(tiny_checkpoint, tmp_path, data, unit):
    """So does the choice of layers that change least."""
    check_decision(drop, tiny_checkpoint("qwen2_moe"), tmp_path, {"data": data, "unit": unit, "count": 1})


@pytest.mark.parametrize("verb", [condense, drop])
def test_a_complete_result_is_not_decided_again(tiny_checkpoint, tmp_path, data, verb):
    """With resume, the record says what was found; another option is refused."""
    asked = {"layers": 1} if verb is condense else {"count": 1}
    first = verb(tiny_checkpoint("qwen2_moe"), tmp_path / "out", data=data, **asked)
    tell, calls = stopping(0)
    again = verb(tiny_checkpoint("qwen2_moe"), tmp_path / "out", data=data, **asked, resume=True, on_progress=tell)
    assert again.as_dict() == json.loads(json.dumps(first.as_dict())) and not calls
    with pytest.raises(CoterieError, match="made with another source, plan or option"):
        verb(tiny_checkpoint("qwen2_moe"), tmp_path / "out", data=data, **asked, seed=5, resume=True)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
def test_analyze_goes_on_after_any_layer(tiny_checkpoint, tmp_path, data, model_type):
    """The page has the same numbers, of layers that an earlier process looked at too."""
    folder, out = tiny_checkpoint(model_type), tmp_path / "page.html"
    whole = analyze(folder, data=data)

    def same():
        assert out.is_file() and not (tmp_path / "page.html.partial").exists()
        out.unlink()

    def run(**how):
        found = analyze(folder, out=out, data=data, **how)
        timed = ("seconds", "peak_rss_bytes")
        assert all(json.dumps(found[name]) == json.dumps(whole[name]) for name in whole if name not in timed)

    assert stopped_everywhere(run, out, same, every=2) == ["analyzing layers"]
    with pytest.raises(CoterieError, match="without --output nothing was kept"):
        analyze(folder, data=data, resume=True)
