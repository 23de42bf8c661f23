"""`coterie report`: the page's first table, the 4-bit reference, maps of experts, notes, refusals."""

import html
import json
import os
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import PROBLEM, make_model, make_tokenizer, text_of, write
from test_page import browser, opened  # noqa: F401 - fixtures

import coterie
import forms
from coterie.cli import main
from coterie.decide.abilities import abilities
from coterie.errors import CoterieError
from coterie.judge import lineup, speed
from coterie.judge.commands import Commands
from coterie.judge.facts import Facts, digest_of, named, overlaps, ways
from coterie.judge.rounding import round_experts, rounded_bytes, symmetric
from coterie.model import family
from coterie.model.layer import Model
from coterie.model.loading import load
from coterie.pages.page import sized
from coterie.reference_model import MODEL
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.report import report

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small MoE model, three results with hostile and equal names, and data."""
    home = tmp_path_factory.mktemp("report")
    make_model("qwen2_moe").save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    coterie.prune(home / "model", home / EVIL, ratio=0.5)
    (home / "other").mkdir()
    coterie.prune(home / "model", home / "other" / "model", ratio=0.25)
    (home / "a.txt").write_text(text_of(300))
    write(home / "p.jsonl", *({"prompt": PROBLEM[i:], "answer": "46"} for i in range(4)))
    return home


@pytest.fixture(scope="module")
def made(folders):
    """The report of all of them, with its page."""
    data = {"a": folders / "a.txt", "p": folders / "p.jsonl"}
    paths = [folders / "model", folders / EVIL, folders / "other" / "model"]
    found = report(paths, folders / "report.html", data=data, window=32, max_new_tokens=8)
    return found, (folders / "report.html").read_text(encoding="utf-8")


def rows_of(page, number):
    """The cells of the page's table `number`, as text."""
    body = re.findall(r"<tbody>(.*?)</tbody>", page, flags=re.DOTALL)[number]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body, flags=re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]


# The page


def test_the_first_table_has_one_row_per_model(made, folders):
    """Named by its folder, in the order given; where two folders are called alike, by what stands above as well."""
    found, page = made
    names = [str(folders / "model"), EVIL, str(folders / "other" / "model")]
    assert [row[0] for row in rows_of(page, 0)] == names == [m["name"] for m in found["models"]]


def test_the_page_holds_what_is_returned(made):
    """The same numbers as JSON, and in the tables."""
    found, page = made
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["numbers"] == json.loads(json.dumps({k: v for k, v in found.items() if k != "out"}))
    first, model = rows_of(page, 0)[1], found["models"][1]
    assert first[1] == sized(model["bytes"]) and f'title="{model["bytes"]:,} bytes"' in page
    for cell, mean, form in ((2, model["paired"]["mean"], "+.4f"), (4, model["mean"], ".3f")):
        value, low, high = (format(mean[key], form) for key in ("value", "low", "high"))
        assert first[cell] == f"{value} <small>[{low}, {high}]</small>"


def test_models_are_judged_as_eval_judges_them(made, folders):
    """Perplexity, answers and pairs are those of `coterie eval --against`."""
    data = {"a": folders / "a.txt", "p": folders / "p.jsonl"}
    theirs = coterie.eval(folders / EVIL, data=data, window=32, max_new_tokens=8, against=folders / "model")["models"][
        0
    ]
    ours = made[0]["models"][1]
    assert ours["perplexity"] == theirs["perplexity"] and ours["exact_match"] == theirs["exact_match"]
    assert {k: v for k, v in ours["paired"].items() if k != "mean"} == theirs["paired"]
    assert ours["mean"]["value"] == pytest.approx(np.log(theirs["perplexity"]["a"]["value"]))


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_killed_report_goes_on(made, folders, tmp_path, monkeypatch, stop_at):
    """Whatever model (the fourth is the reference) it is stopped at: those before are not judged again, and it ends
    with the numbers of one that was never stopped; meanwhile `status` answers."""
    page, judged, original = tmp_path / "r.html", [], lineup.judge
    paths = [folders / "model", folders / EVIL, folders / "other" / "model"]
    asked = {
        "data": {"a": folders / "a.txt", "p": folders / "p.jsonl"},
        "window": 32,
        "max_new_tokens": 8,
        "speed": False,
    }

    def judge(*given):
        judged.append(given[0])
        if len(judged) == stop_at:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(lineup, "judge", judge)
    with pytest.raises(KeyboardInterrupt):
        report(paths, page, **asked)
    assert not page.exists() and coterie.status(page)["state"] == "interrupted"
    with pytest.raises(CoterieError, match="--resume"):
        report(paths, page, **asked)
    found = report(paths, page, resume=True, **asked)
    assert len(judged) == 5 and not list(tmp_path.glob("*.partial"))
    for ours, theirs in zip(
        found["models"] + found["references"], made[0]["models"] + made[0]["references"], strict=True
    ):
        assert ours == {key: value for key, value in theirs.items() if key != "speed"}


def test_a_resumed_report_is_of_the_same_models_and_data(folders, tmp_path, monkeypatch):
    """What another data set, model or window measured is never taken for it."""
    monkeypatch.setattr(lineup, "judge", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    page, asked = tmp_path / "r.html", {"data": {"a": folders / "a.txt"}, "window": 32, "speed": False}
    with pytest.raises(KeyboardInterrupt):
        report([folders / "model"], page, **asked)
    for models, other in (([folders / EVIL], {}), ([folders / "model"], {"window": 16})):
        with pytest.raises(CoterieError, match="was begun with another"):
            report(models, page, resume=True, **asked | other)


def test_the_map_shows_what_the_plan_kept(made, folders):
    """Of four experts two are left, those of the plan."""
    plan = json.loads((folders / EVIL / "coterie.json").read_text())["plan"]["layers"]
    fate = made[0]["models"][1]["fate"]
    assert {key: [e for e, level in enumerate(levels) if level] for key, levels in fate.items()} == {
        key: value["kept"] for key, value in plan.items()
    }
    assert "fate" not in made[0]["models"][0]


def test_speed_is_measured_in_tokens_per_second(made):
    """Of every model, medians between the percentiles; the original is as fast as itself; 64 positions are filled."""
    speeds = [m["speed"] for m in made[0]["models"]]
    assert all(0 < s[k]["low"] <= s[k]["value"] <= s[k]["high"] for s in speeds for k in ("prefill", "decode"))
    assert speeds[0]["relative_decode"] == 1
    assert [(s["prompt"], s["new"]) for s in speeds] == [(56, 8)] * 3


def test_speed_is_what_bench_measures(folders, tmp_path, monkeypatch):
    """Calls of 7, 8 and 14 seconds for 56 tokens: 8, 7 and 4 a second; steps of half the seconds are twice as fast."""
    times = [([14.0, 8.0, 7.0], [1.0, 2.0, 4.0]), ([7.0], [1.0])]
    monkeypatch.setattr(speed, "_times", lambda runners, size, length: times)
    paths = [folders / "model", folders / EVIL]
    found = report(paths, tmp_path / "r.html", data={"a": folders / "a.txt"}, window=32)["models"]
    assert found[0]["speed"]["prefill"] == {"value": 7, "low": pytest.approx(4.6), "high": pytest.approx(7.8)}
    assert [m["speed"]["decode"]["value"] for m in found] == [0.5, 1]
    assert [m["speed"]["relative_decode"] for m in found] == [1, 2]


def test_bits_are_per_parameter_of_the_original(made):
    """Float32 has 32; half of the experts gone leaves fewer, by the original's count."""
    first, second, _ = made[0]["models"]
    assert first["bits_per_parameter"] == 32
    assert second["bits_per_parameter"] == 8 * second["bytes"] / first["parameters"] < 32


@pytest.mark.slow
def test_the_page_works_in_a_browser(made, opened):  # noqa: F811
    """All plots are drawn, from disk, without an error in the console; the first table sorts by bytes."""
    tab = opened(made[1])
    figures = tab.query_selector_all("figure")
    assert len(figures) >= 5
    assert all(tab.evaluate("f => f.querySelector('svg[role=group]').children.length", f) > 3 for f in figures)
    tab.locator("table").first.locator("th button").nth(1).click()
    titles = tab.locator("table").first.locator("tbody td:nth-child(2)")
    sizes = [int(cell.get_attribute("title").replace(",", "").split()[0]) for cell in titles.all()]
    assert len(sizes) == 3 and sizes == sorted(sizes)


def test_notes_that_differ_in_their_place_alone_are_one(made, folders):
    """8 tokens are too few for an answer: said once, for all three models and the reference."""
    (note,) = [n for n in made[0]["notes"] if "cut off" in n]
    assert note.startswith(f"{folders / 'model'}: p: ") and note.endswith("(and in 2 more of these evaluations)")
    assert {m["cut"]["p"] for m in made[0]["models"]} == {1.0}


# Rounding


def slow_rounded(row):
    """Group by group, number by number."""
    found = []
    for start in range(0, len(row), 64):
        group = row[start : start + 64]
        scale = float(np.float16(max(map(abs, group)) / 7))
        found += [scale * min(7, max(-8, round(v / scale))) if scale else 0.0 for v in group]
    return found


@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=150))
def test_rounding_is_that_of_each_group(row):
    """Against a slow loop; the last group may be short."""
    found = symmetric(torch.tensor([row], dtype=torch.float32))[0].tolist()
    assert found == pytest.approx(slow_rounded([float(v) for v in row]), abs=1e-6)


def test_rounding_by_hand():
    """max 7: the scale is 1, and 2.4 becomes 2; what is in another group has another scale."""
    row = torch.zeros(128)
    row[0], row[1], row[2], row[64], row[65] = 7.0, 2.4, -6.6, 0.7, 0.24
    found = symmetric(row)
    assert found[:4].tolist() == [7, 2, -7, 0]
    assert found[64:66].tolist() == pytest.approx([0.7, 0.2], rel=1e-3)


def test_only_experts_are_rounded(folders):
    """Every expert weight takes one of at most 16 values a group; all other weights stay."""
    before, after = load(folders / "model"), round_experts(load(folders / "model"), 2)
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(old, new) != (".mlp.experts." in name), name
    row = after.model.layers[0].mlp.experts.gate_up_proj[1, 3]
    assert row.tolist() == pytest.approx(
        slow_rounded(before.model.layers[0].mlp.experts.gate_up_proj[1, 3].tolist()), abs=1e-6
    )


def test_bytes_of_rounded_experts(folders):
    """2 layers of 4 experts, gate and up (8, 16), down (16, 8): half a byte a weight, and one scale a row."""
    source = Model.open(folders / "model")
    expert = 2 * 8 * (8 + 2) + 16 * (4 + 2)
    experts = 2 * 4 * 3 * 8 * 16
    assert rounded_bytes(source) == source.checkpoint.num_bytes - 4 * experts + 8 * expert


def test_weights_in_parts_are_no_plain_floats(tiny_checkpoint, tmp_path):
    """Of experts stored as blocks and scales (MXFP4) the reference is not simulated, and the reason names both."""
    source = Model.open(forms.mxfp4(tiny_checkpoint("gpt_oss"), tmp_path / "model"))
    with pytest.raises(CoterieError, match=r"layer 0: its experts are stored as U8, expected plain floats"):
        rounded_bytes(source)


def test_the_reference_is_judged_and_is_no_row_of_the_first_table(made):
    """It has loss, bytes and a pair, and stands in a table of its own."""
    found, page = made
    (reference,) = found["references"]
    assert reference["bytes"] < found["models"][0]["bytes"]
    assert reference["paired"]["difference"]["a"]["value"] != 0
    (row,) = rows_of(page, 1)
    assert row[0] == reference["name"] and row[-1] == f"<code>{reference['makes']}</code>"


def test_the_command_of_a_reference_runs_or_says_why_it_cannot(made, tmp_path, capsys):
    """Where rows are long enough for a group of the format, as in the shipped model; the tiny model's are not."""
    assert made[0]["references"][0]["makes"].startswith("# coterie quantize cannot be used here: ")
    source = Model.open(MODEL)
    commands = Commands(str(MODEL), can=abilities(source))
    line = commands.line("quantize", str(tmp_path / "a b"), "--bits", 4, "--method", "round")
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(line)[1:], "--dry-run", "--json"])
    assert not stop.value.code
    stored = json.loads(capsys.readouterr().out)["report"]["after"]["bytes"]
    assert stored == pytest.approx(rounded_bytes(source), rel=0.06)  # its groups are of 32, the reference's of 64


# What is said, and what is refused


def test_what_was_not_measured_is_said(folders, tmp_path):
    """Without speed; with a model that no record leads back from; on data that it was calibrated on."""
    make_model("qwen2_moe").save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    record = {"command": "prune", "options": {"data": {"a": str(folders / "a.txt")}}, "plan": {"layers": {}}}
    (tmp_path / "other" / "coterie.json").write_text(json.dumps(record))
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "note": "another fingerprint"}))
    found = report(
        [folders / "model", tmp_path / "other"],
        tmp_path / "r.html",
        data={"b": folders / "a.txt"},
        window=32,
        speed=False,
    )
    notes = "\n".join(found["notes"])
    assert "speed was not measured" in notes and "no coterie.json leads back" in notes
    assert "other: was calibrated on" in notes and "judged on as 'b'" in notes
    assert "speed" not in found["models"][0] and "fate" not in found["models"][1]


def test_every_model_has_a_kurtosis(folders, made):
    """As it is, of all weights in its experts that are not zero; in the same section of the page."""
    found, page = made
    for entry, path in zip(found["models"], [folders / "model", folders / EVIL], strict=False):
        checkpoint = Checkpoint.open(path)
        weights = [checkpoint.read(n) for n, r in Model.open(path).roles.items() if r == "expert"]
        values = np.concatenate([w.reshape(-1) for w in weights]).astype(np.float64)
        values = values[values != 0] - values[values != 0].mean()
        assert entry["kurtosis"] == {"as it is": pytest.approx((values**4).mean() / (values**2).mean() ** 2, rel=1e-4)}
    assert "Kurtosis of expert weights" in page


def test_models_have_names_of_their_own(folders, tmp_path, monkeypatch):
    """NAME=FOLDER, or a dictionary; a folder that is called so is none; names are all different."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a=b", "b"):
        (tmp_path / name).mkdir()
    assert named("x=a") == {"x": "a"} and named({"x": "a"}) == {"x": "a"}
    assert named(["a", "b", "a=b", "a=b=b", "hub/id"]) == {"b": "b", "a=b": "a=b", "a": "b=b", "hub/id": "hub/id"} | {
        "a (2)": "a"
    }
    assert list(named(["a", "a", "a"])) == ["a", "a (2)", "a (3)"] and list(named(["b=a", "b"])) == ["b", "b (2)"]
    with pytest.raises(CoterieError, match=r"x=\.\.\.: two models are called so"):
        named(["x=a", "x=b"])
    found = report([f"<b>={folders / 'model'}"], tmp_path / "r.html", data={"a": folders / "a.txt"}, window=32)
    assert found["models"][0]["name"] == "<b>" and "<b>" not in (tmp_path / "r.html").read_text()


def test_ways_are_what_records_say(folders, tmp_path):
    """Of all steps from the original on; of the last one where nothing leads back; none where nothing is recorded."""
    original = Checkpoint.open(folders / "model").hash
    coterie.prune(folders / "model", tmp_path / "one", method="first", ratio=0.5)
    coterie.sparsify(tmp_path / "one", tmp_path / "both", method="magnitude", sparsity=0.5)
    assert ways(tmp_path / "one", original) == ["pruned"] and ways(folders / "model", original) == []
    assert ways(tmp_path / "both", original) == ["pruned", "zeros"]
    assert ways(tmp_path / "both", "another") == ["zeros"]
    record = json.loads((tmp_path / "both" / "coterie.json").read_text())
    (tmp_path / "both" / "coterie.json").write_text(json.dumps(record | {"command": "recover"}))
    assert ways(tmp_path / "both", original) == ["pruned", "recovered"]
    (tmp_path / "both" / "coterie.json").write_text(json.dumps(record | {"plan": {"layers": 3}}))
    assert ways(tmp_path / "both", original) == []


def test_a_model_that_cannot_be_loaded_is_refused_before_any_is_judged(folders, tmp_path, monkeypatch):
    """Here one stored in a way that nothing reads."""
    shutil.copytree(folders / "model", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "no"}}))
    monkeypatch.setattr("coterie.judge.lineup.judge", lambda *_: pytest.fail("judged"))
    with pytest.raises(CoterieError, match="quant_method 'no'"):
        report([folders / "model", tmp_path / "m"], tmp_path / "r.html", data={"a": folders / "a.txt"})


def test_records_are_not_trusted(folders, tmp_path):
    """Numbers that are none, and text where objects belong, make no page that cannot be read."""
    path = tmp_path / "m"
    coterie.prune(folders / "model", path, ratio=0.5)
    record = json.loads((path / "coterie.json").read_text())
    record["report"] |= {"kurtosis": {"before": float("nan"), "after": 1e999, EVIL: 3.0}, "sparsity": "much"}
    record |= {"options": [1], "command": EVIL}
    (path / "coterie.json").write_text(json.dumps(record))
    found = report(
        [folders / "model", path], tmp_path / "r.html", data={"a": folders / "a.txt"}, window=32, speed=False
    )
    assert found["models"][1]["kurtosis"] == {EVIL: 3.0} and found["models"][1]["sparsity"] is None
    assert EVIL not in (tmp_path / "r.html").read_text()
    (path / "coterie.json").write_text("{")
    with pytest.raises(CoterieError, match="not valid JSON"):
        report([folders / "model", path], tmp_path / "s.html", data={"a": folders / "a.txt"}, speed=False)
    assert not list(tmp_path.glob("s.html*"))


def test_files_that_a_record_names_are_read_only_where_they_may_be_the_judged_ones(tmp_path):
    """A file larger than memory, devices, pipes and nonsense are not; the same content under another name is found."""
    (tmp_path / "judged").write_text("four")
    (tmp_path / "same").write_text("four")
    (tmp_path / "other").write_text("five")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**42)
    os.mkfifo(tmp_path / "pipe")
    digests = {"a": digest_of(tmp_path / "judged"), "b": digest_of(tmp_path / "huge")}
    named = [*(str(tmp_path / name) for name in ("huge", "pipe", "other", "none")), "/proc/kcore", "/dev/zero", "\0", 3]
    assert overlaps("m", dict(enumerate(named)), digests) == []
    (note,) = overlaps("m", dict(enumerate([*named, str(tmp_path / "same")])), digests)
    assert "same, which it is judged on as 'a'" in note and digests["b"] is None


def test_a_family_that_is_not_known_has_an_unknown_number_of_experts(folders, tmp_path, monkeypatch):
    """Not none, and a note says why; a dense model has none."""
    monkeypatch.setattr(family, "registry", dict)
    found = report(folders / "model", tmp_path / "r.html", data={"a": folders / "a.txt"}, window=32, speed=False)
    assert found["models"][0]["experts"] is None and "unknown" in rows_of((tmp_path / "r.html").read_text(), 0)[0]
    assert any(
        "model: how many experts its layers have is unknown: config.json: 'qwen2_moe'" in n for n in found["notes"]
    )
    make_model("llama").save_pretrained(tmp_path / "dense")
    assert Facts.of(tmp_path / "dense").experts == {}


def test_our_own_layout_is_read(folders, tmp_path):
    """Layers with different numbers of experts, which stock transformers does not load."""
    plan = {"layers": {"0": {"kept": [0, 1, 2]}, "1": {"kept": [1, 3]}}, "budget": {"layout": "coterie"}}
    coterie.apply(folders / "model", plan, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "coterie"
    found = report(
        [folders / "model", tmp_path / "ours"],
        tmp_path / "r.html",
        data={"a": folders / "a.txt"},
        window=32,
        speed=False,
    )
    assert found["models"][1]["experts"] == {"0": 3, "1": 2}
    assert found["models"][1]["fate"] == {"0": [1, 1, 1, 0], "1": [0, 1, 0, 1]}
    assert set(found["models"][1]["paired"]["router_overlap"]) == {"0", "1"}


@pytest.mark.parametrize(
    ("out", "says"),
    [("model", "is a folder"), ("a.txt", "exists"), ("no/r.html", "make it first"), ("\0", "not a file name")],
)
def test_a_place_that_cannot_be_written_is_refused_first(folders, out, says):
    """Before any model is opened."""
    with pytest.raises(CoterieError, match=says):
        report([folders / "nothing"], folders / out if out != "\0" else out)


@pytest.mark.parametrize(
    ("models", "options", "says"),
    [
        ([], {}, "no model was given"),
        (["model"], {"budget": "much"}, "--budget 'much': expected bytes, as in 20GB"),
        (["nowhere"], {}, "no such folder"),
        (["model"], {"data": ["x="]}, "expected NAME=FILE"),
        (["model"], {"window": 1}, "window is 1"),
        (["model"], {"window": 8, "stride": 8}, "stride is 8"),
        (["model"], {"dtype": "int4"}, "expected one of auto"),
    ],
)
def test_bad_input_is_refused(folders, tmp_path, models, options, says):
    """And nothing is written."""
    with pytest.raises(CoterieError, match=says):
        report([folders / m for m in models], tmp_path / "r.html", **options)
    assert not list(tmp_path.iterdir())


def test_the_command_line(folders, tmp_path, capsys):
    """--json prints what is returned and nothing else; a page that exists is replaced only when asked."""
    arguments = ["report", str(folders / "model"), "-o", str(tmp_path / "r.html"), "--data", f"a={folders / 'a.txt'}"]
    arguments += ["--window", "32", "--no-speed", "--json"]
    for more, code in (([], 0), ([], 2), (["--overwrite"], 0)):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *more])
        out = capsys.readouterr().out
        assert (stop.value.code or 0) == code
        if code:
            assert "--overwrite" in json.loads(out)["error"]
        else:
            found = json.loads(out)
            assert [m["name"] for m in found["models"]] == ["model"] and found["out"] == str(tmp_path / "r.html")


def test_the_public_name_is_the_function():
    """`coterie.report` stays the function although a module is called so."""
    import importlib

    importlib.import_module("coterie.verbs.report")
    assert coterie.report is report
