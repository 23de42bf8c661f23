"""Commands as cards and pages print them can be typed: the command line reads what was recorded."""

import shlex

import pytest
import typer
from test_measure import files, sequences

import coterie
from coterie.cli import application
from coterie.judge.facts import _command
from coterie.reference_model import MODEL
from coterie.storage.record import typed

CONDENSED = {"layers": {"1": {"condensed": {"experts": [0, 2], "gates": [0.5, 0.5], "shared_gate": 1.0}}}}
VERBS = {  # options of each verb that writes a checkpoint; D, S, P and T: data, statistics, a plan and a teacher
    "prune": [{"ratio": 0.5}, {"method": "reap", "stats": "S", "weights": "prose=2,code=0.5", "no_guard": True}],
    "stun": [{"second": "magnitude", "expert_ratio": 0.25}, {"also": "attention,shared", "data": "D"}],
    "sparsify": [{"method": "magnitude", "sparsity": 0.25}, {"pattern": "2:4", "one_pass": True, "data": "D"}],
    "quantize": [{"bits": 2, "group_size": 32}, {"method": "gptq", "data": "D"}],
    "merge": [{"ratio": 0.5, "data": "D"}],
    "condense": [{"layer_ids": [3, 1], "data": "D"}, {"layers": 1, "data": "D"}],
    "recover": [{"teacher": "T", "data": "D"}, {"stage": "lm", "layer_ids": "1", "lr": 1e-5, "data": "D"}],
    "drop": [{"unit": "block", "count": 2, "data": "D"}],
    "apply": [{"plan": "P"}, {"plan": CONDENSED, "save": "sparse"}],
    "pack": [{}, {"values": "int8"}],
    "unpack": [{}],
}


def parsed(text):
    """(command, its parameters) as the command line understands them; nothing is run."""
    words = shlex.split(text)
    assert words[0] == "coterie"
    program = typer.main.get_command(application(words[1]))
    context = program.make_context("coterie", words[1:])
    name, command, rest = program.resolve_command(context, words[1:])
    return name, command.make_context(name, rest, parent=context).params


@pytest.fixture(scope="module")
def paths(tiny_checkpoint, tmp_path_factory):
    """What the letters stand for, in a folder whose name needs quotes; M is a model, Z has zeros, O those packed."""
    home = tmp_path_factory.mktemp("it's $HOME `a`")
    data, model = files(home / "two words", sequences()), tiny_checkpoint("qwen2_moe")
    coterie.collect(model, home / "a b.stats", data=data, samples=4)
    coterie.apply(model, CONDENSED, home / "condensed")
    coterie.sparsify(model, home / "zeros", method="magnitude", sparsity=0.5)
    coterie.pack(home / "zeros", home / "packed")
    for folder in ("zeros", "packed"):
        (home / folder / "coterie.json").unlink()  # else the card is that of sparsify
    return {
        "D": {name: str(file) for name, file in data.items()}, "S": str(home / "a b.stats"), "T": str(model),
        "P": str(home / "condensed" / "coterie.json"), "M": model, "Z": home / "zeros", "O": home / "packed",
        "C": home / "condensed", "R": MODEL,
    }  # fmt: skip


@pytest.mark.parametrize(("verb", "given"), [(verb, options) for verb, many in VERBS.items() for options in many])
def test_what_a_card_prints_is_parsed_as_what_was_recorded(paths, tmp_path, verb, given):
    """Every option of the record, in the command line's own spelling; and those that were given are among them."""
    options = {name: paths.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    source = paths[{"recover": "C", "quantize": "R", "pack": "Z", "unpack": "O"}.get(verb, "M")]
    plan = [options.pop("plan")] if verb == "apply" else []
    calibrated = {"samples": 4, "seq_len": 32} if "data" in options else {}
    report = getattr(coterie, verb)(source, *plan, tmp_path / "out", **options, **calibrated, dry_run=True)
    assert report.command == verb
    name, params = parsed(typed(verb, report.options))
    model, out = {"pack": ("dense", "out"), "unpack": ("packed", "dense")}.get(verb, ("model", "out"))
    assert name == verb and (params[model], str(params[out])) == ("MODEL", "OUT")
    for key, value in report.options.items():
        found = params[key]
        if key == "data":
            assert (found or []) == [f"{n}={file}" for n, file in value.items()]
        elif key == "plan":
            assert str(found) == (paths["P"] if plan == [paths["P"]] else "PLAN")
        elif isinstance(value, list):
            assert found == ",".join(map(str, value))
        elif value:
            assert str(found) == str(value)
        else:
            assert found in (None, False, 0, "")
    assert {*given} - {"plan"} <= {key for key, value in report.options.items() if value}


def test_the_example_of_every_kind_of_value():
    """Lists are joined, dictionaries repeat their option, what a shell reads is quoted, what says nothing is absent."""
    options = {"layer_ids": [3, 5], "data": {"a": "x y.txt", "b": "$b"}, "no_guard": True, "also": "", "lr": None}
    text = "coterie prune MODEL OUT --layer-ids 3,5 --data 'a=x y.txt' --data 'b=$b' --no-guard"
    assert typed("prune", options | {"resume": False, "weights": {}, "ids": []}) == text == _command("prune", options)
    assert (
        typed("apply", {"plan": "my plan.json", "save": "dense"})
        == "coterie apply MODEL 'my plan.json' OUT --save dense"
    )
    assert typed("prune", {"seed": 0, "base": "two\nlines"}) == r"coterie prune MODEL OUT --seed 0 --base 'two\nlines'"
    long = _command("prune", {"base": "x" * 1000})
    assert long.endswith("x [...]") and len(long) == 406
