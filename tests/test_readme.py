"""What the README tells people to type works."""

import re
import shlex
from pathlib import Path

import pytest

from coterie.cli import main
from coterie.model.families import UNABLE
from coterie.model.family import registry
from coterie.reference_model import HELD_OUT, MODEL

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a short text; commands and code run in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text(HELD_OUT["prose"].read_text(encoding="utf-8")[:3000])
    return tmp_path


def commands() -> list[list[str]]:
    block = README.split("## Use it")[1].split("```")[1]
    return [shlex.split(re.split(r"\s{8,}", line.strip())[0]) for line in block.strip().splitlines()]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_their_order(workplace):
    """As printed, on the shipped model; what would write over an earlier result goes beside it."""
    paths = {"MODEL": str(MODEL), "PLAN.json": "OUT/coterie.json"}
    for _, verb, *arguments in sorted(commands(), key=lambda c: c[1] == "apply"):
        argv = [paths.get(a, a) for a in arguments]
        if verb in ("apply", "stun", "sparsify"):
            argv[argv.index("OUT")] = verb
        with pytest.raises(SystemExit) as stop:
            main([verb, *argv])
        assert not stop.value.code, (verb, stop.value.code)


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
