"""The command line: exit codes, one line per refusal, JSON alone on standard output, a quick start."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import coterie as package
from coterie.cli import application, commands, main
from coterie.pages.terminal import sized
from handmade import qwen


def coterie(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Runs the command in this process: exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_prune_prints_coterie_json_and_nothing_else(tmp_path, capsys):
    """With --json, standard output is the content of coterie.json."""
    model = qwen(tmp_path / "model")
    code, out, _ = coterie("prune", model, tmp_path / "out", "--ratio", 0.25, "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "out" / "coterie.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["prune", "MODEL", "OUT", "--no-such-flag"], "No such option"),
        (["prune", "MODEL"], "Missing argument"),
        (["prune", "MODEL", "OUT", "--method", "astrology"], "expected one of"),
        (["prune", "MODEL", "OUT", "--method", "REEP"], "did you mean reap?"),
        (["prune", "MODEL", "OUT", "--budget", "Global"], "did you mean global?"),
        (["prune", "MODEL", "OUT", "--ratio", "1"], "[0, 1)"),
        (["prune", "MODEL", "OUT", "--ratio", "-0.1"], "[0, 1)"),
        (["prune", "MODEL", "OUT", "--ratio", "nan"], "[0, 1)"),
        (["prune", "MODEL", "OUT", "--ratio", "0.99"], "per token"),
        (["prune", "MODEL", "OUT", "--method", "first", "--linkage", "official"], "ignored"),
        (["prune", "MODEL", "OUT", "--min-experts", "4"], "ignored"),
        (["prune", "nowhere", "OUT"], "no such folder"),
        (["inspect", "nowhere"], "no such folder"),
        (["frobnicate"], "No such command"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, says):
    """Every refusal is one line beginning `error:`, exits with 2 and writes nothing."""
    model = qwen(tmp_path / "model")
    paths = {"MODEL": model, "OUT": tmp_path / "out", "nowhere": tmp_path / "nowhere"}
    code, out, err = coterie(*(paths.get(a, a) for a in arguments), capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("arguments", [["inspect", "nowhere"], ["prune", "--no-such-flag"], ["frobnicate"]])
def test_with_json_a_refusal_is_an_object(capsys, arguments):
    """{"error": ...} on standard output, and nothing on standard error; the exit code stays."""
    code, out, err = coterie(*arguments, "--json", capsys=capsys)
    assert (code, err, list(json.loads(out))) == (2, "", ["error"])


def test_the_version_is_told(capsys):
    """`coterie --version`."""
    assert coterie("--version", capsys=capsys) == (0, f"coterie {package.__version__}\n", "")


@pytest.mark.parametrize(
    ("typed", "proposed"),
    [("coterie pru", "prune"), ("coterie prune --thr", "--threshold"), ("coterie --ver", "--version")],
)
def test_a_shell_completes_commands_and_their_options(typed, proposed):
    """As the script of `coterie --show-completion bash` asks: all words, the number of the last, the mode."""
    asked = {"COMP_WORDS": typed.replace(" ", "\n"), "COMP_CWORD": str(typed.count(" "))}
    env = os.environ | asked | {"_COTERIE_COMPLETE": "complete_bash"}
    argv = [sys.executable, "-m", "coterie"]
    found = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [proposed]


def test_dry_run_decides_and_writes_nothing(tmp_path, capsys):
    """--dry-run prints the plan with the kept counts and leaves no file."""
    model = qwen(tmp_path / "model")
    code, out, _ = coterie("prune", model, tmp_path / "out", "--dry-run", "--json", capsys=capsys)
    assert code == 0 and not (tmp_path / "out").exists()
    assert all(len(layer["kept"]) < 8 for layer in json.loads(out)["plan"]["layers"].values())


def test_inspect_counts_what_the_headers_say(tmp_path, capsys):
    """`inspect --json` sums to the checkpoint's parameters and bytes."""
    model = qwen(tmp_path / "model")
    _, out, _ = coterie("inspect", model, "--json", capsys=capsys)
    found = json.loads(out)
    assert sum(role["bytes"] for role in found["roles"].values()) == found["bytes"]
    assert sum(role["parameters"] for role in found["roles"].values()) == found["parameters"]


def test_a_full_resume_of_a_finished_run_exits_with_0(tmp_path, capsys):
    """--resume on a complete OUT changes nothing and exits with 0."""
    model = qwen(tmp_path / "model")
    coterie("prune", model, tmp_path / "out", capsys=capsys)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    code, _, _ = coterie("prune", model, tmp_path / "out", "--resume", capsys=capsys)
    assert code == 0 and before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "MODEL"], ["prune", "MODEL", "OUT"]])
def test_light_commands_import_neither_torch_nor_transformers(tmp_path, arguments):
    """Help, inspect and prune start without the heavy libraries."""
    model = qwen(tmp_path / "model")
    argv = [str({"MODEL": model, "OUT": tmp_path / "out"}.get(a, a)) for a in arguments]
    code = (
        "import sys\nfrom coterie.cli import main\n"
        f"try: main({argv!r})\nexcept SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_public_name_is_there():
    """What `coterie.__all__` promises can be imported."""
    import coterie

    for name in coterie.__all__:
        assert getattr(coterie, name) is not None


@pytest.mark.parametrize("command", ["", *commands()])
def test_help_is_what_the_documentation_shows(command):
    """Every option, its default and its order, word by word."""
    runner = CliRunner(env={"COLUMNS": "110", "TERMINAL_WIDTH": "110"})
    shown = runner.invoke(application(command), [*command.split(), "--help"], prog_name="coterie").output
    pages = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8").split("```\n")[1::2]
    begins = f"Usage: coterie {command} [OPTIONS]" if command else "Usage: coterie [OPTIONS] COMMAND"
    assert [page for page in pages if page.startswith(begins)] == [f"{shown.strip()}\n"]
    assert len(pages) == 1 + len(commands())


def spelled(signature):
    """Positional parameters in order, and keyword-only ones with their defaults; functions by name."""
    given = signature.parameters.values()
    return {
        "positional": [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty],
        "keywords": {
            p.name: getattr(p.default, "__name__", list(p.default) if isinstance(p.default, tuple) else p.default)
            for p in given
            if p.kind is p.KEYWORD_ONLY
        },
    }


def test_public_signatures_stay_as_they_were():
    """The parameters of every verb, their kinds and defaults."""
    known = json.loads((Path(__file__).parent / "signatures.json").read_text())
    assert {name: spelled(inspect.signature(getattr(package, name))) for name in commands()} == known


@pytest.mark.parametrize(
    ("num_bytes", "says"),
    [(0, "0 bytes"), (999, "999 bytes"), (33_317_376, "33.3 MB"), (2_500, "2.5 kB"), (957e9, "957.0 GB")],
)
def test_bytes_are_shown_in_units_that_hold_them(num_bytes, says):
    """So that a bar never says "0.0 of 0.0 GB"."""
    assert sized(num_bytes) == says


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": "0.5"}, "--ratio '0.5': expected a number"),
        ({"experts": 2.5}, "--experts 2.5: expected a whole number"),
        ({"experts": True}, "--experts True: expected a whole number"),
        ({"resume": 1}, "--resume 1: expected True or False"),
        ({"method": 3}, "--method 3: expected text"),
    ],
)
def test_a_value_of_another_type_is_refused_like_a_wrong_one(tmp_path, options, says):
    """Python callers meet what the command line refuses while it reads what was typed."""
    with pytest.raises(package.CoterieError, match=says):
        package.prune(tmp_path / "model", tmp_path / "out", **options)


def test_numbers_of_other_libraries_are_numbers(tmp_path):
    """numpy's, and whole ones where any number will do."""
    model = qwen(tmp_path / "model")
    package.prune(model, tmp_path / "out", ratio=np.float32(0.25), dry_run=True)
    package.prune(model, tmp_path / "out", experts=np.int64(6), lambda1=1, dry_run=True)


@pytest.mark.parametrize(
    ("words", "begun", "says"),
    [
        (["prune", "MODEL", "my out", "-q"], ["my out.partial"], "goes on: coterie prune MODEL 'my out' -q --resume"),
        (["prune", "MODEL", "o", "--overwrite"], ["o.dense.partial"], "this goes on: coterie prune MODEL o --resume"),
        (["collect", "MODEL", "s", "--resume"], ["s.partial"], "this goes on: coterie collect MODEL s --resume"),
        (["report", "MODEL", "-o", "r"], ["r.partial"], "this goes on: coterie report MODEL -o r --resume"),
        (["prune", "MODEL", "o"], [], "nothing was finished that could be kept"),
        (["analyze", "MODEL"], [], "nothing was finished that could be kept"),
        (["eval", "MODEL"], ["MODEL.partial"], "nothing was finished that could be kept"),
    ],
)  # fmt: skip
def test_what_ctrl_c_says_is_true(tmp_path, monkeypatch, capsys, words, begun, says):
    """Where a run is left that can be gone on with, the command that does; else that nothing is."""

    def stopped(*_, **__):
        for name in begun:
            (tmp_path / name).mkdir()
        raise KeyboardInterrupt

    stopped.__signature__ = inspect.signature(getattr(package, words[0]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package, words[0], stopped)
    code, out, err = coterie(*words, capsys=capsys)
    assert (code, out) == (130, "") and err.startswith("interrupted; ") and err.strip().endswith(says)
