"""`compare`: what each criterion would keep, from one file, and how far they agree."""

import json
import subprocess
import sys

import numpy as np
import pytest

import coterie
from coterie.errors import CoterieError
from coterie.methods import prune as methods
from coterie.model.stats import SUMS, Stats
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.compare import compare
from coterie.verbs.prune import prune
from handmade import HIDDEN, deepseek, qwen

E = 8
NAMED = ["ean", "frequency", "man", "mone", "msan", "reap", "router-norm", "stun"]


def write(path, model, layers=("0", "1"), num_experts=E, seed=0, **sums):
    """A statistics file of random sums in every layer, but for those given; both halves alike."""
    draw = np.random.default_rng(seed)
    stats = Stats(Checkpoint.open(model).hash, {"x": 4, "y": 2})
    for domain in stats.samples:
        for layer in layers:
            for name, (axes, _) in SUMS.items():
                if set(axes) <= set("ED"):
                    shape = [{"E": num_experts, "D": HIDDEN}[a] for a in axes]
                    value = np.asarray(sums.get(name, draw.uniform(1, 2, shape)), dtype=float)
                    stats.add(domain, layer, name, value if value.shape[:1] == (2,) else np.stack([value, value]))
    stats.save(path)
    return path


@pytest.fixture
def model(tmp_path):
    return qwen(tmp_path / "model")


def test_every_applicable_criterion_is_there(tmp_path, model):
    """Those of statistics and of router rows; the others are named with what they need."""
    found = compare(model, write(tmp_path / "x.stats", model))
    assert list(found["criteria"]) == NAMED
    assert set(found["left_out"]) | set(NAMED) | {"first", "random"} == set(methods.names())
    assert "--data" in found["left_out"]["naee"] and "--base" in found["left_out"]["router-norm-change"]
    assert json.loads(json.dumps(found)) == found
    assert found["model"]["hash"] == Checkpoint.open(model).hash and found["samples"] == {"x": 4, "y": 2}


@pytest.mark.parametrize("options", [{}, {"ratio": 0.5}, {"experts": 5}, {"weights": "x=3,y=0", "ratio": 0.5}])
def test_what_would_be_kept_is_what_prune_keeps(tmp_path, model, options):
    """By every criterion, for the same options."""
    path = write(tmp_path / "x.stats", model)
    found = compare(model, path, **options)
    for name in NAMED:
        given = {} if name == "router-norm" else {"stats": path}
        how = {k: v for k, v in options.items() if k != "weights" or given}
        how |= {"removed": "remove"} if name == "mone" else {}  # its own way keeps the router
        plan = prune(model, tmp_path / "out", method=name, dry_run=True, **given, **how).plan
        assert found["criteria"][name]["kept"] == {key: layer["kept"] for key, layer in plan["layers"].items()}, name
        if given and name != "stun":
            assert found["criteria"][name]["stability"] == plan["budget"]["stability"]


def test_overlap_by_hand(tmp_path, model):
    """Frequency keeps 0 to 3, the sum of norms 2 to 5: they share half; each agrees with itself."""
    path = write(
        tmp_path / "x.stats", model, tokens=[9, 8, 7, 6, 5, 4, 1, 1], output_norms=[1, 1, 9, 8, 7, 6, 1, 1],
        gated_output_norms=[9, 8, 7, 6, 1, 1, 1, 1],
    )  # fmt: skip
    found = compare(model, path, ratio=0.5)
    kept = {name: found["criteria"][name]["kept"]["0"] for name in ("frequency", "ean")}
    assert kept == {"frequency": [0, 1, 2, 3], "ean": [2, 3, 4, 5]}
    assert found["overlap"]["frequency"]["ean"] == found["overlap"]["ean"]["frequency"] == 0.5
    assert all(found["overlap"][name][name] == 1 for name in NAMED)


def test_chance_is_reported_beside(tmp_path, model):
    """Random draws share the kept share on average; the draws follow the seed."""
    path = write(tmp_path / "x.stats", model)
    first, again, other = (compare(model, path, ratio=0.5, seed=seed)["random"] for seed in (0, 0, 9))
    assert first["expected"] == 0.5 and first["draws"] == 5
    assert first == again != other
    assert all(0.2 < share < 0.8 for share in first["overlap"].values())


def test_stability_and_what_has_none(tmp_path, model):
    """Halves that keep other experts; criteria of router rows read no data."""
    halves = np.array([[9, 8, 7, 6, 0, 0, 0, 1], [0, 8, 7, 6, 0, 0, 1, 9.0]])
    found = compare(model, write(tmp_path / "x.stats", model, tokens=halves), experts=4)
    assert found["criteria"]["frequency"]["stability"] == {"layers": {"0": 0.75, "1": 0.75}, "mean": 0.75}
    assert found["criteria"]["router-norm"]["stability"] is None


def test_half_of_too_little_is_said(tmp_path, model):
    """One sample: what is kept stands, stability is open, and notes say why."""
    found = compare(model, write(tmp_path / "x.stats", model, tokens=np.stack([np.ones(E), np.zeros(E)])))
    assert found["criteria"]["reap"]["stability"] is None
    assert any("how stable reap is was not measured" in note for note in found["notes"])


def test_super_experts_are_guarded_as_in_prune(tmp_path, model):
    """Listed, and kept by every criterion of statistics unless asked otherwise."""
    largest = np.ones(E)
    largest[7] = 500
    sums = dict.fromkeys(
        ("tokens", "output_norms", "gated_output_norms", "output_norms_squared"), np.arange(E)[::-1] + 1
    )
    path = write(tmp_path / "x.stats", model, layers=("0",), output_max=largest, **sums)
    whole = Stats.load(path)
    for domain in whole.samples:
        for name in SUMS:
            if (domain, "0", name) in whole.sums:
                ordinary = np.ones((2, E)) if name == "output_max" else whole.sums[domain, "0", name]
                whole.add(domain, "1", name, ordinary)
    whole.save(path)
    found = compare(model, path, ratio=0.5)
    assert found["guarded"] == [["0", 7, 500.0]]
    assert all(7 in found["criteria"][name]["kept"]["0"] for name in methods.names("stats"))
    without = compare(model, path, ratio=0.5, no_guard=True)
    assert without["guarded"] == [] and without["criteria"]["frequency"]["kept"]["0"] == [0, 1, 2, 3]


def test_routing_groups_are_kept(tmp_path):
    """Four groups of four lose equally many by every criterion."""
    model = deepseek(tmp_path / "model")
    found = compare(model, write(tmp_path / "x.stats", model, layers=("0",), num_experts=16), experts=12)
    for result in found["criteria"].values():
        assert [sum(e // 4 == g for e in result["kept"]["0"]) for g in range(4)] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"ratio": 0.5, "experts": 4}, "say the same thing twice"),
        ({"ratio": 1}, r"must be in \[0, 1\)"),
        ({"experts": 1}, "keeps 1 experts, but 2 are chosen per token"),
        ({"weights": "poetry=1"}, "domain 'poetry' is not in the statistics"),
    ],
)
def test_options_are_checked_as_in_prune(tmp_path, model, options, fault):
    """The same refusals."""
    path = write(tmp_path / "x.stats", model)
    with pytest.raises(CoterieError, match=fault):
        compare(model, path, **options)


def test_statistics_of_another_model_are_refused(tmp_path, model):
    """By fingerprint."""
    other = qwen(tmp_path / "other", seed=1)
    with pytest.raises(CoterieError, match=r"x\.stats: collected on another model"):
        compare(model, write(tmp_path / "x.stats", other))


def test_nothing_heavy_is_imported_and_nothing_printed(tmp_path, model):
    """Seconds, not minutes: routers and sums are numpy."""
    path = write(tmp_path / "x.stats", model)
    code = "import sys, coterie; coterie.compare(sys.argv[1], sys.argv[2]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, model, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert coterie.compare is compare
