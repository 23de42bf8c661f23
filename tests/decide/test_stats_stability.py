"""Statistics in `prune`: co-activation and usage decide, half the data decides again, what does not fit is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.edits.plan import read_plan
from coterie.errors import CoterieError
from coterie.model import stats as stats_module
from coterie.model.stats import Stats, parse_weights, stability
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.prune import prune
from handmade import HIDDEN, deepseek, file_bytes, qwen, read_all

E = 8
LINE = [0, 3, 5, 20, 40, 60, 80, 100]  # router rows along one axis: 1 and 2 are nearest, then 0 and 1


def routers(positions=LINE):
    rows = np.zeros((E, HIDDEN))
    rows[:, 0] = positions
    return [rows, rows]


def counts(*pairs):
    """Co-activation of these pairs, (E, E), one token each."""
    matrix = np.zeros((E, E))
    for i, j in pairs:
        matrix[i, j] += 1
        matrix[j, i] += 1
    return matrix


def write(path, model, tokens=None, pairs=None, layers=("0", "1"), domains=("x",)):
    """A statistics file; `tokens` (E,) and `pairs` (E, E) of both halves, or (2, ...) of each."""
    stats = Stats(Checkpoint.open(model).hash, dict.fromkeys(domains, 4))
    for domain in domains:
        for layer in layers:
            for name, value, axes in (("tokens", tokens, 1), ("coactivation", pairs, 2)):
                value = np.ones((E,) * axes) if value is None else np.asarray(value, dtype=float)
                stats.add(domain, layer, name, np.stack([value, value]) if value.ndim == axes else value)
    stats.save(path)
    return path


@pytest.fixture
def model(tmp_path):
    return qwen(tmp_path / "model", routers=routers())


def clusters(report, layer="0"):
    return [c for c in report.plan["layers"][layer]["clusters"] if len(c) > 1]


# --- what statistics decide --------------------------------------------------------------------------------


def test_coactivation_decides_who_merges(tmp_path, model):
    """Seven of eight stay: 1 and 2 are nearest by their rows; 0 and 1, chosen together, by lambda2."""
    path = write(tmp_path / "x.stats", model, pairs=counts((0, 1), (0, 1), (0, 1)))
    assert clusters(prune(model, tmp_path / "rows", experts=7)) == [[1, 2]]
    assert clusters(prune(model, tmp_path / "weak", experts=7, stats=path, lambda2=1e-6)) == [[1, 2]]
    assert clusters(prune(model, tmp_path / "both", experts=7, stats=path, lambda2=1)) == [[0, 1]]
    assert clusters(prune(model, tmp_path / "data", experts=7, stats=path, lambda1=0, lambda2=1)) == [[0, 1]]


def test_of_two_the_more_used_stays(tmp_path, model):
    """Without statistics the longer router row (2); with them, the one with more tokens, whatever the lambdas."""
    tokens = np.ones(E)
    tokens[1] = 5
    path = write(tmp_path / "x.stats", model, tokens)
    kept = {}
    for name, options in {
        "rows": {},
        "used": {"stats": path, "method": "stun"},
        "both": {"stats": path, "lambda2": 1e-6},
        "dry": {"stats": path, "method": "stun", "dry_run": True},
    }.items():
        kept[name] = prune(model, tmp_path / name, experts=7, **options).plan["layers"]["0"]["kept"]
    assert kept["rows"] == [0, 2, 3, 4, 5, 6, 7]
    assert kept["used"] == kept["both"] == kept["dry"] == [0, 1, 3, 4, 5, 6, 7]


def test_clones_merge_first_whatever_the_lambdas(tmp_path):
    """Every expert cloned, and clones chosen together: cut to half, each cluster is an expert and its clone."""
    draw = np.random.default_rng(0).normal(size=(4, HIDDEN))
    model = qwen(tmp_path / "model", routers=[np.concatenate([draw, draw])] * 2)
    path = write(tmp_path / "x.stats", model, pairs=counts(*((e, e + 4) for e in (0, 1, 2, 3) * 3), (0, 1), (2, 3)))
    for number, lambdas in enumerate(((1, 0.5), (0, 1), (1, 10))):
        options = dict(zip(("lambda1", "lambda2"), lambdas, strict=True))
        report = prune(model, tmp_path / str(number), experts=4, stats=path, **options)
        assert clusters(report) == clusters(report, "1") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_domains_are_weighted(tmp_path, model):
    """Domain a chooses 0 and 1 together, b 3 and 4: the weights say which pair merges."""
    path, stats = tmp_path / "x.stats", Stats(Checkpoint.open(model).hash, {"a": 2, "b": 2})
    for domain, pair in (("a", (0, 1)), ("b", (3, 4))):
        for layer in "01":
            stats.add(domain, layer, "tokens", np.ones((2, E)))
            stats.add(domain, layer, "coactivation", np.stack([counts(pair)] * 2))
    stats.save(path)
    how = {"experts": 7, "stats": path, "lambda1": 0, "lambda2": 1}
    assert clusters(prune(model, tmp_path / "a", weights="a=2", **how)) == [[0, 1]]
    assert clusters(prune(model, tmp_path / "b", weights={"b": 2}, **how)) == [[3, 4]]
    report = prune(model, tmp_path / "only", weights="b=0.5,a=0", **how)
    assert clusters(report) == [[3, 4]] and report.options["weights"] == "b=0.5,a=0.0"


def test_official_with_coactivation(tmp_path, model):
    """The published program's modes: counts alone, and counts added to the undivided router distance."""
    path = write(tmp_path / "x.stats", model, pairs=counts((0, 1), (3, 4), (3, 4)))
    how = {"experts": 7, "stats": path, "linkage": "official", "lambda2": 1}
    assert clusters(prune(model, tmp_path / "alone", lambda1=0, **how)) == [[3, 4]]  # the pair chosen twice
    # 0-1: 3 - 1 / (6 / 64) = -7.7; 3-4: 20 - 2 / (6 / 64) = -1.3
    assert clusters(prune(model, tmp_path / "mixed", distance="raw", **how)) == [[0, 1]]


def test_a_global_budget_with_coactivation(tmp_path, model):
    """One height over all layers, negative heights included."""
    pairs = counts((0, 1), (3, 4), (5, 6))
    path, stats = tmp_path / "x.stats", Stats(Checkpoint.open(model).hash, {"x": 2})
    for layer, value in (("0", pairs), ("1", np.ones((E, E)) - np.eye(E))):
        stats.add("x", layer, "tokens", np.ones((2, E)))
        stats.add("x", layer, "coactivation", np.stack([value] * 2))
    stats.save(path)
    report = prune(
        model, tmp_path / "out", ratio=0.125, budget="global", non_uniform="coterie", stats=path, lambda1=0, lambda2=1
    )
    assert [len(layer["kept"]) for layer in report.plan["layers"].values()] == [6, 8]
    assert report.plan["budget"]["global_cost"] < report.plan["budget"]["cost"] < 0


def test_clusters_stay_in_their_routing_group(tmp_path):
    """Experts of two groups that are always chosen together do not merge."""
    model, path = deepseek(tmp_path / "model"), tmp_path / "x.stats"
    stats = Stats(Checkpoint.open(model).hash, {"x": 2})
    pairs = np.zeros((16, 16))
    pairs[0, 15] = pairs[15, 0] = 100
    stats.add("x", "0", "tokens", np.ones((2, 16)))
    stats.add("x", "0", "coactivation", np.stack([pairs] * 2))
    stats.save(path)
    report = prune(model, tmp_path / "out", experts=12, stats=path, lambda2=5)
    assert len(clusters(report)) == 4 and all(len({e // 4 for e in c}) == 1 for c in clusters(report))


def test_prediction_layers_are_cut_by_their_router(tmp_path):
    """Calibration never sees a multi-token-prediction layer: its rows alone decide, and that is said."""
    said = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    model = qwen(tmp_path / "model", layers=3, routers=[*routers(), routers()[0]], **said)
    path = write(tmp_path / "x.stats", model, pairs=counts((0, 1)))
    report = prune(model, tmp_path / "out", method="stun", experts=7, stats=path, lambda1=0, lambda2=1)
    assert [clusters(report, layer) for layer in "012"] == [[[0, 1]], [[0, 1]], [[1, 2]]]
    assert any("never measured: router rows alone" in w for w in report.report["warnings"])
    assert set(report.plan["budget"]["stability"]["layers"]) == {"0", "1"}


# --- what is recorded --------------------------------------------------------------------------------------


def test_the_statistics_are_recorded(tmp_path, model):
    """coterie.json names the file, the model it was collected on, and how many samples each domain gave."""
    path = write(tmp_path / "x.stats", model, domains=("prose", "a/b"))
    report = prune(model, tmp_path / "out", method="stun", stats=path, lambda2=0.5, weights="prose=2")
    record = json.loads((tmp_path / "out" / "coterie.json").read_text())
    expected = {"path": str(path), "model": record["source"]["hash"], "samples": {"prose": 4, "a/b": 4}}
    assert record["plan"]["budget"]["stats"] == expected
    assert record["options"]["lambda2"] == 0.5 and record["options"]["weights"] == "prose=2.0"
    assert read_plan(tmp_path / "out").as_dict() == report.plan
    plain = prune(model, tmp_path / "plain")
    assert not {"stats", "stability"} & set(plain.plan["budget"]) and plain.options["stats"] is None


def test_a_run_resumes_with_its_statistics(tmp_path, model):
    """A complete OUT is recognised; with other statistics it is another run."""
    path = write(tmp_path / "x.stats", model, pairs=counts((0, 1)))
    prune(model, tmp_path / "out", method="stun", stats=path, lambda2=1)
    before = file_bytes(tmp_path / "out")
    prune(model, tmp_path / "out", method="stun", stats=path, lambda2=1, resume=True)
    assert file_bytes(tmp_path / "out") == before
    write(path, model, pairs=counts((6, 7)))
    with pytest.raises(CoterieError, match="made with another source, plan or option"):
        prune(model, tmp_path / "out", method="stun", stats=path, lambda2=1, resume=True)


def test_only_what_is_needed_is_read(tmp_path, model, monkeypatch):
    """Of a file of many sums, those of two names."""
    path = write(tmp_path / "x.stats", model)
    stats = Stats.load(path)
    for layer in "01":
        stats.add("x", layer, "outputs", np.ones((2, E, HIDDEN)))
    stats.save(path)
    read, original = [], stats_module.read_bytes
    monkeypatch.setattr(stats_module, "read_bytes", lambda *given: read.append(given[3]) or original(*given))
    prune(model, tmp_path / "out", method="stun", stats=path, lambda2=1, dry_run=True)
    assert sorted(read) == [f"x/{layer}/{name}" for layer in "01" for name in ("coactivation", "tokens")]
    assert len(Stats.load(path).sums) == 6


# --- half the data -----------------------------------------------------------------------------------------


def test_stability_by_hand():
    """Halves that keep {0, 1, 2} and {0, 1, 5} share two of three; different counts are over the larger."""
    stats = Stats("m", {"x": 2}, {("x", layer, "tokens"): np.array([[0.0], [1.0]]) for layer in "ab"})
    chosen = {"a": [(0, 1, 2), (0, 1, 5)], "b": [(0, 1), (0, 1, 2, 3)]}

    def choose(half):
        return {key: pair[int(half.get(key, "tokens").item())] for key, pair in chosen.items()}

    found = stability(stats, choose)
    assert found["layers"] == {"a": 2 / 3, "b": 1 / 2} and found["mean"] == pytest.approx(7 / 12)


@given(st.integers(0, 2**32 - 1))
def test_halves_add_up(seed):
    """What the halves hold is what the whole holds."""
    values = np.random.default_rng(seed).integers(0, 100, (3, 2, E)).astype(float)
    stats = Stats("m", dict.fromkeys("abc", 2), {(d, "0", "tokens"): v for d, v in zip("abc", values, strict=True)})
    weights = {"b": 0.5}
    parts = [stats.half(index).get("0", "tokens", weights) for index in (0, 1)]
    assert np.array_equal(sum(parts), stats.get("0", "tokens", weights))


def test_clearly_separated_experts_are_stable(tmp_path, model):
    """Both halves see the same pairs: everything they keep is the same, and is reported so."""
    path = write(tmp_path / "x.stats", model, pairs=counts((0, 1), (3, 4), (5, 6)))
    report = prune(model, tmp_path / "out", experts=5, stats=path, lambda1=0, lambda2=1)
    assert report.plan["budget"]["stability"] == {"layers": {"0": 1.0, "1": 1.0}, "mean": 1.0}
    assert json.loads((tmp_path / "out" / "coterie.json").read_text())["plan"]["budget"]["stability"]["mean"] == 1


def test_halves_that_disagree_are_reported(tmp_path, model):
    """One half merges 0 with 1, the other 3 with 4: of seven kept they share six."""
    pairs = np.stack([counts((0, 1), (0, 1)), counts((3, 4))])
    path = write(tmp_path / "x.stats", model, pairs=pairs)
    report = prune(model, tmp_path / "out", method="stun", experts=7, stats=path, lambda1=0, lambda2=1)
    assert clusters(report) == [[0, 1]]
    assert report.plan["budget"]["stability"]["layers"] == {"0": 6 / 7, "1": 6 / 7}


def test_usage_alone_can_be_unstable(tmp_path, model):
    """Halves that agree on the cluster can differ on who is used more."""
    tokens = np.ones((2, E))
    tokens[0, 1] = tokens[1, 2] = 5
    report = prune(model, tmp_path / "out", method="stun", experts=7, stats=write(tmp_path / "x.stats", model, tokens))
    assert report.plan["budget"]["stability"]["mean"] == 6 / 7


def test_too_little_data_for_halves_is_said(tmp_path, model):
    """One sample: the choice stands, and how stable it is stays open."""
    path = write(tmp_path / "x.stats", model, np.stack([np.ones(E), np.zeros(E)]))
    report = prune(model, tmp_path / "out", method="stun", experts=7, stats=path)
    assert "stability" not in report.plan["budget"]
    assert any("not measured: from half of the data, layer 0" in w for w in report.report["warnings"])


def test_weights_are_read_once(tmp_path, model, monkeypatch):
    """A cluster's nearest expert does not depend on statistics: halves with the same clusters read no experts again."""
    reads, original = [], Checkpoint.raw
    monkeypatch.setattr(Checkpoint, "raw", lambda self, *a, **k: reads.append(a[0]) or original(self, *a, **k))
    path = write(tmp_path / "x.stats", model)
    numbers = []
    for name, options in (("without", {}), ("with", {"stats": path})):
        reads.clear()
        prune(model, tmp_path / name, method="stun", experts=4, kappa=0, **options)
        numbers.append(sum(".experts." in name for name in reads))
    assert numbers[0] == numbers[1] > 2


# --- weights of domains ------------------------------------------------------------------------------------


def test_weights_are_parsed():
    """From the command line's spelling and from a dictionary; names may hold what files' names hold."""
    assert parse_weights("code=2, chat=0.5") == {"code": 2.0, "chat": 0.5}
    assert parse_weights("a=b/c=1e1") == {"a=b/c": 10.0}
    assert parse_weights({"a,b": 0}) == {"a,b": 0.0}
    assert parse_weights(None) == parse_weights({}) == {}


@pytest.mark.parametrize("text", ["", "code", "code=", "=2", "code=two", "code=-1", "code=nan", "code=inf", "a=1,,b=2"])
def test_weights_that_are_none_are_refused(text):
    """A name and a finite number, 0 or more."""
    with pytest.raises(CoterieError, match=r"--weights .*: expected NAME=WEIGHT, 0 or more"):
        parse_weights(text)


@pytest.mark.parametrize("value", [None, "x", [1], 10**400])
def test_weights_of_other_types_are_refused(value):
    """Also from Python."""
    with pytest.raises(CoterieError, match="expected NAME=WEIGHT"):
        parse_weights({"code": value})


def test_a_domain_named_twice_is_refused():
    """Which of two weights counts would be a guess."""
    with pytest.raises(CoterieError, match="names 'code' twice"):
        parse_weights("code=1,code=2")


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"lambda2": 1}, "--lambda2 weighs co-activation, which only data show; add --stats"),
        ({"lambda1": 2, "stats": "x"}, "--lambda1 weighs router distance .* would be ignored; add --lambda2"),
        ({"lambda1": 0, "stats": "x"}, "--lambda1 weighs router distance .* would be ignored; add --lambda2"),
        ({"lambda1": -1, "lambda2": 1, "stats": "x"}, "--lambda1 -1: expected a finite number"),
        ({"lambda2": np.nan, "stats": "x"}, "--lambda2 nan: expected a finite number"),
        ({"lambda2": np.inf, "stats": "x"}, "--lambda2 inf: expected a finite number"),
        ({"weights": "x=2"}, "--weights are of the data's domains and would be ignored"),
        ({"method": "random", "stats": "x"}, "--stats would be ignored by random; it is of stun, ean, .*-change"),
        ({"method": "first", "lambda1": 0.5}, "--lambda1 shapes the method stun and would be ignored by first"),
        ({"method": "first", "lambda2": 0.5}, "--lambda2 shapes the method stun"),
        ({"method": "first", "weights": "x=1"}, "--weights are of the data's domains and would be ignored"),
        ({"lambda1": 0, "lambda2": 1, "stats": "x", "distance": "raw"}, "--distance .* would be ignored"),
        ({"linkage": "official", "lambda2": 1, "stats": "x"}, "--linkage official knows --lambda1 and --lambda2 as"),
        ({"linkage": "official", "lambda1": 0, "lambda2": 2, "stats": "x"}, "--linkage official knows"),
        ({"weights": "x"}, "--weights"),
    ],
)
def test_options_that_would_be_ignored_or_contradict_are_refused(tmp_path, model, options, fault):
    """Before any file is read."""
    with pytest.raises(CoterieError, match=fault):
        prune(model, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_statistics_of_another_model_are_refused_by_both_fingerprints(tmp_path, model):
    """The file's and the model's, so that it can be seen which is which."""
    other = qwen(tmp_path / "other", seed=1)
    path = write(tmp_path / "x.stats", other)
    mine, theirs = (Checkpoint.open(folder).hash[:16] for folder in (model, other))
    with pytest.raises(
        CoterieError, match=rf"x\.stats: collected on another model \(fingerprint {theirs}, here {mine}"
    ):
        prune(model, tmp_path / "out", method="stun", stats=path)
    assert not list(tmp_path.glob("out*"))


def test_statistics_without_a_layer_are_refused(tmp_path, model):
    """Every layer is decided by the same rule or none."""
    path = write(tmp_path / "x.stats", model, layers=("0",))
    with pytest.raises(CoterieError, match="layer 1 has no 'tokens' in the statistics"):
        prune(model, tmp_path / "out", method="stun", stats=path)


def test_statistics_of_other_sizes_are_refused(tmp_path, model):
    """Sums of other numbers of experts, in one domain or all; sums too large to add."""
    for values, fault in (
        (
            {"x": np.ones((2, 7)), "y": np.ones((2, 7))},
            r"layer 0: 'tokens' has shape \(7,\) .* the layer has 8 experts",
        ),
        ({"x": np.ones((2, 8)), "y": np.ones((2, 7))}, "layer 0: 'tokens' is damaged or out of range"),
        ({"x": np.full((2, 8), 1e308)}, "layer 0: 'tokens' is damaged or out of range"),
        ({"x": np.zeros((2, 8))}, "layer 0: the statistics, as weighted, hold no token"),
    ):
        stats = Stats(Checkpoint.open(model).hash, dict.fromkeys(values, 2))
        for domain, value in values.items():
            for layer in "01":
                stats.add(domain, layer, "tokens", value)
        stats.save(tmp_path / "x.stats")
        with pytest.raises(CoterieError, match=fault):
            prune(model, tmp_path / "out", method="stun", stats=tmp_path / "x.stats")


@pytest.mark.parametrize(
    ("weights", "fault"),
    [("y=1", "domain 'y' is not in the statistics; they hold x"), ("x=0", "as weighted, hold no token"),
     ("x=1e300", "out of range")],
)  # fmt: skip
def test_weights_that_do_not_fit_the_statistics_are_refused(tmp_path, model, weights, fault):
    """Unknown domains, and weights that leave nothing or too much."""
    with pytest.raises(CoterieError, match=fault):
        prune(model, tmp_path / "out", method="stun", stats=write(tmp_path / "x.stats", model), weights=weights)


@pytest.mark.parametrize("name", ["missing.stats", "model", "a\0b", "x" * 300, "model/config.json"])
def test_a_file_that_is_no_statistics(tmp_path, model, name):
    """Missing, a folder, an impossible name, another kind of file."""
    with pytest.raises(CoterieError):
        prune(model, tmp_path / "out", method="stun", stats=tmp_path / name)
    assert read_all(model) and not list(tmp_path.glob("out*"))
