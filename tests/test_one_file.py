"""One new thing is one new file: the examples of CONTRIBUTING.md, put into a copy of the package, work end to end."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import coterie
import tiny

CONTRIBUTING = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## [^\n]*`src/coterie/([^`\n]+\.py)`\n\n```python\n(.+?)```", CONTRIBUTING, re.M | re.S))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a copy of the package that has the seven files."""
    home = tmp_path_factory.mktemp("package")
    shutil.copytree(Path(coterie.__file__).parent, home / "coterie", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in EXAMPLES.items():
        assert not (home / "coterie" / name).exists()
        (home / "coterie" / name).write_text(text, encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with shared experts, as the hub spells it."""
    return tiny.save("qwen2_moe", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def run(package, tmp_path):
    """Runs a command of the copy in an empty folder; what it printed, as JSON."""

    def command(*arguments):
        environment = os.environ | {"PYTHONPATH": str(package)}
        words = [sys.executable, "-m", "coterie", *map(str, arguments), "--json"]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return command


@pytest.fixture
def data(tmp_path):
    """--data with a few samples of token ids."""
    draw, file = np.random.default_rng(0), tmp_path / "prose.jsonl"
    lines = [{"input_ids": draw.integers(3, tiny.VOCABULARY, 16).tolist()} for _ in range(8)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return ["--data", f"prose={file}", "--samples", "8", "--seq-len", "16"]


def test_contributing_shows_seven_files():
    """A criterion, a rule for zeros, a merge method, a selection, a codec, a kind of edit and a verb."""
    folders = [str(Path(name).parent) for name in EXAMPLES]
    methods = [f"methods/{kind}" for kind in ("prune", "sparsify", "merge", "condense")]
    assert folders == [*methods, "codecs", "edits/kinds", "verbs"]


def test_a_criterion(run, model):
    """`prune` finds it, and keeps what it says."""
    record = run("prune", model, "OUT", "--method", "last", "--experts", 6)
    assert {tuple(layer["kept"]) for layer in record["plan"]["layers"].values()} == {(2, 3, 4, 5, 6, 7)}
    assert run("verify", "OUT", "--against", model)["ok"]


def test_a_rule_for_zeros(run, model, tmp_path):
    """`sparsify` finds it; half of every row is zero, and those are the first inputs."""
    run("sparsify", model, "OUT", "--method", "far")
    weights = load_file(tmp_path / "OUT" / "model.safetensors")
    found = next(w for name, w in weights.items() if "experts.0.up_proj" in name)
    half = found.shape[1] // 2
    assert not found[:, :half].any() and found[:, half:].all()


def test_a_merge_method(run, model, data):
    """`merge` finds it, and averages the clusters that it names."""
    record = run("merge", model, "OUT", "--method", "neighbours", "--experts", 4, *data)
    layer = next(iter(record["plan"]["layers"].values()))
    assert layer["clusters"] == [[0, 1], [2, 3], [4, 5], [6, 7]] and layer["merged"]
    assert run("verify", "OUT", "--against", model)["ok"]


def test_a_selection_for_condensed_layers(run, model, data):
    """`condense` finds it, and the layer's experts are the ones that it chose."""
    record = run("condense", model, "OUT", "--layers", 1, "--keep", 2, "--select", "rarest", *data)
    (layer,) = record["plan"]["layers"].values()
    assert len(layer["condensed"]["experts"]) == 2
    assert run("verify", "OUT", "--against", model)["ok"]


def test_a_codec(run, model, data, tmp_path):
    """A checkpoint that is stored so is a MODEL like any other: pruned to the same bytes, measured alike."""
    coded = tmp_path / "coded"
    shutil.copytree(model, coded)
    weights = load_file(coded / "model.safetensors")
    odd = {name: (f"{name}.negated", -w) if ".experts." in name else (name, w) for name, w in weights.items()}
    save_file(dict(odd.values()), coded / "model.safetensors", {"format": "pt"})
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "negated"}}))
    assert run("inspect", coded)["parameters"] == run("inspect", model)["parameters"]
    for name, source in (("plain", model), ("decoded", coded)):
        run("prune", source, name, "--experts", 4)
        run("collect", source, f"{name}.stats", *data)
    plain, decoded = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "decoded"))
    assert plain.keys() == decoded.keys() and all(np.array_equal(plain[n], decoded[n]) for n in plain)
    plain, decoded = (load_file(tmp_path / f"{name}.stats") for name in ("plain", "decoded"))
    assert plain.keys() == decoded.keys() and all(np.array_equal(plain[n], decoded[n]) for n in plain)


def test_a_kind_of_edit(run, model, tmp_path):
    """`apply` executes it, the record holds it, `verify` recomputes it, and finds a byte that is another."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers": {"1": {"scale": 2.0}}}))
    record = run("apply", model, plan, "OUT")
    assert record["plan"]["layers"] == {"1": {"scale": 2.0}}
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "OUT"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"model.layers.1.mlp.gate.weight"}
    assert np.array_equal(after["model.layers.1.mlp.gate.weight"], 2 * before["model.layers.1.mlp.gate.weight"])
    assert run("verify", "OUT", "--against", model)["ok"]


def test_a_verb(run, model, package):
    """It is a command with help and JSON, and a function of the package."""
    assert run("sizes", model) == {"files": {"model.safetensors": (model / "model.safetensors").stat().st_size}}
    environment = os.environ | {"PYTHONPATH": str(package)}
    code = f"import coterie; print(coterie.sizes({str(model)!r}, unit=1000)['files']); assert 'sizes' in dir(coterie)"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    shown = [sys.executable, "-m", "coterie", "sizes", "--help"]
    assert "Bytes that count as one" in subprocess.run(shown, env=environment, capture_output=True, text=True).stdout
