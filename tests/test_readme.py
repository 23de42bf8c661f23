"""What the README tells people to type works."""

import contextlib
import itertools
import re
import shlex
import sys
from pathlib import Path

import pytest

import coterie
from coterie.cli import main
from coterie.model.families import UNABLE
from coterie.model.family import registry

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from first_day import furnish, listed  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
WRITERS = ("quantize", "prune", "merge", "sparsify", "stun", "condense", "recover", "drop", "apply", "collect")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the list takes for granted; commands and code run in it."""
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    return tmp_path


def made(words: list[str]) -> set[str]:
    """The names that a command leaves behind."""
    _, verb, *arguments = words
    named = {after for flag, after in itertools.pairwise(arguments) if flag in ("-o", ">")}
    if verb not in WRITERS or "--dry-run" in arguments:
        return named
    return named | {[word for word in arguments if word.isupper()][1]}  # after what is read


def test_the_list_of_the_readme_uses_what_it_has_made():
    """No OUT twice, and nothing is read before a line above has made it; all verbs that write are there."""
    there = {"MODEL", "FILE"}
    for line in listed(README):
        words = shlex.split(line)
        assert words[0] == "coterie" and words[1] in coterie.VERBS, line
        found = made(words)
        assert not found & there, line
        read = set(re.findall(r"\b[A-Z]+(?:\.json)?\b", line)) - found
        assert read - there <= ({"OTHER"} if "--dry-run" in words else set()), line
        there |= found
    assert set(WRITERS) <= {shlex.split(line)[1] for line in listed(README)}


@pytest.mark.slow
def test_the_list_of_the_readme_runs(workplace):
    """As printed, in its order, on the shipped model."""
    for line in listed(README):
        command, _, file = line.partition(" > ")
        with open(file or "printed", "w") as out, contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
            main(shlex.split(command)[1:])
        assert not stop.value.code, (line, stop.value.code)
        assert all(Path(name).exists() for name in made(shlex.split(line))), line


@pytest.mark.slow
def test_the_python_of_the_readme_runs(workplace):
    """The marked code block, as printed."""
    for block in re.findall(r"<!-- run -->\n```python\n(.+?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})


def test_every_page_the_readme_names_is_there():
    """Links to files lead somewhere."""
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_numbers_of_model_types_are_those_of_the_registry():
    """README and CHANGELOG count the families there are, and README names every type that is not calibrated."""
    stock, all_types = sum(family.stock for family in registry().values()), len(registry())
    assert re.findall(r"(\d+) model types", README) == [str(stock), str(all_types)]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"for {stock} model types of transformers 5 (and by files alone for {all_types - stock} more)" in changes
    followed = " ".join(README.split("## Which models")[1].split("##")[0].split()).partition(
        "transformers computes but"
    )[2]
    whole = {t for t in UNABLE["stream"] if not t.endswith("_text")}
    assert set(re.findall(r"`(\w+)`", followed)) == whole


def test_generated_pages_are_fresh():
    """docs/cli.md, methods.md and families.md say what the code says."""
    import runpy
    import sys

    argv, sys.argv = sys.argv, ["generate.py", "--check"]
    try:
        runpy.run_path(str(ROOT / "docs" / "generate.py"), run_name="__main__")
    finally:
        sys.argv = argv
