"""The package as Python callers meet it: types that a checker sees, records, refusals in Python's words."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import coterie
from coterie import options
from coterie.cli import commands
from coterie.errors import CoterieError
from coterie.storage.record import Report
from handmade import qwen

CALLS = """
import coterie

report = coterie.prune("MODEL", "OUT", ratio=0.25)
reveal_type(report)
reveal_type(report.after)
coterie.prune("MODEL", "OUT", rato=0.25)
coterie.quantize("MODEL", "OUT", bits="4")
coterie.nothing
"""


def test_a_type_checker_knows_the_functions(tmp_path):
    """A misspelled argument, a wrong type and an unknown name are found before anything runs."""
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    where = os.environ | {"MYPYPATH": str(Path(coterie.__file__).parents[1])}  # an editable install is found by no path
    command = [sys.executable, "-m", "mypy", str(file)]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=where)
    said = [line.split(":", 2)[1:] for line in checked.stdout.splitlines() if "calls.py" in line]
    found = {int(number): text for number, text in said if "defined" not in text or "has no attribute" in text}
    assert "coterie.storage.record.Report" in found[5] and "dict[str, Any]" in found[6]
    assert 'did you mean "ratio"?' in found[7]
    assert 'expected "int | None"' in found[8] and 'has no attribute "nothing"' in found[9]


def test_a_report_answers_the_first_questions(tmp_path):
    """Sizes, seconds, the whole as one dictionary; printed it is one line."""
    report = coterie.prune(qwen(tmp_path / "model"), tmp_path / "out", experts=4)
    assert report.before == report.data["report"]["before"] and report.after["experts"] == 4
    assert report.seconds == report.report["seconds"]
    assert re.fullmatch(r"<Report of prune: [\d,]+ -> [\d,]+ bytes, 8 -> 4 experts per layer, \d+\.\d s>", repr(report))
    planned = coterie.prune(tmp_path / "model", tmp_path / "other", experts=4, dry_run=True)
    assert repr(planned).startswith("<Report of prune, planned: ") and isinstance(planned, Report)


@pytest.mark.parametrize(
    ("verb", "given", "says"),
    [
        ("prune", {"ratio": 2}, "ratio"),
        ("prune", {"experts": 4, "ratio": 0.5}, "experts"),
        ("prune", {"min_experts": 3}, "min_experts"),
        ("prune", {"in_place": True, "save": "sparse"}, "in_place=True"),
        ("prune", {"resume": True, "overwrite": True}, "resume=True and overwrite=True"),
        ("sparsify", {"sparsity": 3}, "sparsity"),
        ("stun", {"sparsity": "x"}, "sparsity 'x': expected a number"),
        ("quantize", {"group_size": 7}, "group_size"),
    ],
)
def test_refusals_in_python_name_arguments(tmp_path, verb, given, says):
    """As they are written there, never as flags."""
    token = options._TYPED.set(False)
    try:
        with pytest.raises(CoterieError, match=re.escape(says)) as refused:
            getattr(coterie, verb)(qwen(tmp_path / "model"), tmp_path / "out", **given)
    finally:
        options._TYPED.reset(token)
    assert "--" not in str(refused.value)


def test_a_command_line_names_flags(tmp_path, capsys):
    """The same refusal as it is typed."""
    from coterie.cli import main

    token = options._TYPED.set(False)
    try:
        with pytest.raises(SystemExit):
            main(["prune", str(qwen(tmp_path / "model")), str(tmp_path / "out"), "--resume", "--overwrite"])
    finally:
        options._TYPED.reset(token)
    assert "--resume and --overwrite" in capsys.readouterr().err


def test_looking_needs_no_compiler():
    """Kernels are compiled by a library that is loaded with the first of them, and torch where something computes."""
    code = (
        "import sys, coterie\ncoterie.inspect(sys.argv[1])\n"
        "assert not {'llvmlite', 'torch', 'transformers'} & set(sys.modules), sys.modules"
    )
    from coterie.reference_model import MODEL

    subprocess.run([sys.executable, "-c", code, str(MODEL)], check=True)


def test_every_verb_has_typed_arguments():
    """Those that are read from several types aside, each has a type of its own."""
    for name in commands():
        for parameter in inspect.signature(getattr(coterie, name)).parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, (name, parameter.name)
