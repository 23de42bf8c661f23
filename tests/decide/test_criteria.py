"""Criteria of statistics, outputs and earlier checkpoints: by hand, against slow ones, guarded, weighted, refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP

import slow_criteria
import tiny
from coterie.decide import criteria, reconstruct
from coterie.decide.guard import super_experts
from coterie.errors import CoterieError
from coterie.forward.measure import measure
from coterie.methods import prune as methods
from coterie.methods.prune import ean, frequency, man, mone, msan, naee, naee_greedy, reap, router_norm_change
from coterie.model.experts import read_layer
from coterie.model.layer import Model
from coterie.model.stats import SUMS, Stats, agreement, mean
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.collect import collect
from coterie.verbs.prune import prune
from handmade import HIDDEN, deepseek, qwen, read_all

BY_STATS = ("ean", "frequency", "man", "mone", "msan", "reap")
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
E = 8


def sequences(seed=0):
    """Two domains of token sequences."""
    draw = np.random.default_rng(seed)
    lengths = {"prose": (24, 7, 24, 13), "code": (9, 30)}
    return {name: [tuple(draw.integers(3, tiny.VOCABULARY, n).tolist()) for n in ns] for name, ns in lengths.items()}


def every(given):
    return [sample for samples in given.values() for sample in samples]


def files(folder, given):
    """One JSONL file of token ids per domain."""
    folder.mkdir()
    for name, samples in given.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"input_ids": list(s)}) for s in samples))
    return {name: folder / f"{name}.jsonl" for name in given}


def kept(report, layer="0"):
    return report.plan["layers"][layer]["kept"]


def task_of(folder, count=6, weights=None):
    """What a criterion is asked of every layer of a checkpoint."""
    model = Model.open(folder)
    num_groups = model.family.groups(model.checkpoint.config).num_groups
    layers = {b: read_layer(model.checkpoint, b) for b in model.main}
    return criteria.Task(layers, count, num_groups, weights or {})


# --- by hand -----------------------------------------------------------------------------------------------

# Expert 0: outputs (3, 4) with weight 0.5 and (0, 1) with weight 1; expert 1: (6, 8) with weight 0.1; expert 2: none.
TOKENS = np.array([2.0, 1.0, 0.0])
NORMS = np.array([6.0, 10.0, 0.0])
GATED = np.array([3.5, 1.0, 0.0])
SQUARED = np.array([26.0, 100.0, 0.0])
OUTPUTS = np.array([[3.0, 5.0], [6.0, 8.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (frequency.score(TOKENS), [2, 1, 0]),
        (ean.score(NORMS), [6, 10, 0]),
        (reap.score(TOKENS, GATED), [1.75, 1, 0]),
        (man.score(TOKENS, NORMS), [3, 10, 0]),
        (msan.score(TOKENS, SQUARED), [13, 100, 0]),
        (mone.score(TOKENS, SQUARED, OUTPUTS), [9, 0, 0]),  # mean (1.5, 2.5): 2.25 + 2.25 twice; one output is its mean
    ],
    ids=["frequency", "ean", "reap", "man", "msan", "mone"],
)
def test_scores_by_hand(score, expected):
    """Each formula on three tokens; an expert that no token chose scores 0, the lowest."""
    assert score.tolist() == expected


def test_a_criterion_says_what_it_reads():
    """Its sums exist; every method belongs to one kind."""
    assert set(methods.names("stats")) == set(BY_STATS)
    assert all(set(methods.load(name).SUMS) <= set(SUMS) for name in BY_STATS)
    assert methods.names("base") == ["router-norm-change"] and methods.names("outputs") == ["naee", "naee-greedy"]
    assert methods.names() == sorted(methods.names("router", "weights", "stats", "base", "outputs", "clusters"))


def test_means_of_nothing_are_zero():
    """Not NaN."""
    assert mean(np.array([3.0, 0.0]), np.array([2.0, 0.0])).tolist() == [1.5, 0]


def test_agreement_by_hand():
    """{0, 1} and {1, 2} share one of two; {0} and {0} all."""
    assert agreement({"a": [0, 1], "b": [0]}, {"a": [1, 2], "b": [0]}) == {"layers": {"a": 0.5, "b": 1.0}, "mean": 0.75}


# --- against the slow way ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scores_and_kept_sets_equal_the_slow_ones(tiny_checkpoint, model_type):
    """To 1e-5 of the largest score of the layer, counts exactly; and the same experts stay at 25 % and 50 %."""
    folder, given = tiny_checkpoint(model_type), sequences()
    stats, expected = measure(Model.open(folder), given, torch.float32), slow_criteria.scores(folder, every(given))
    for name in BY_STATS:
        for count in (6, 4):
            task = task_of(folder, count)
            scores = criteria.by_stats(task, name, stats)
            for block, choice in criteria.keep(task, scores).items():
                slow = expected[name][block.key]
                tolerance = 0 if name == "frequency" else 1e-5 * slow.max()
                np.testing.assert_allclose(scores[block], slow, rtol=0, atol=tolerance, err_msg=name)
                assert list(choice.kept) == slow_criteria.highest(slow, count, task.num_groups), name
    for key, slow in expected["output_max"].items():
        np.testing.assert_allclose(stats.get(key, "output_max"), slow, rtol=1e-5)


def test_a_run_from_end_to_end_equals_the_slow_one(tiny_checkpoint, tmp_path):
    """`collect`, then `prune --method reap`: nothing is guarded where nothing stands out, scores are reported."""
    folder, given = tiny_checkpoint("qwen3_moe"), sequences()
    collect(folder, tmp_path / "x.stats", data=files(tmp_path / "data", given), samples=8)
    report = prune(folder, tmp_path / "out", method="reap", stats=tmp_path / "x.stats", ratio=0.5)
    slow = slow_criteria.scores(folder, every(given))["reap"]
    for key, scores in slow.items():
        assert kept(report, key) == slow_criteria.highest(scores, 4)
        np.testing.assert_allclose(report.report["scores"][key], scores, rtol=1e-4)
    assert report.report["guarded"] == [] and report.options["stats"] == str(tmp_path / "x.stats")
    assert set(report.plan["budget"]["stability"]["layers"]) == set(slow)
    assert report.plan["budget"]["stats"]["samples"] == {"prose": 4, "code": 2}


def test_prune_measures_the_data_itself(tiny_checkpoint, tmp_path):
    """`prune --data` decides as `collect` and `prune --stats` do, super experts guarded; the record names the data."""
    folder, data = tiny_checkpoint("qwen3_moe"), files(tmp_path / "data", sequences())
    collect(folder, tmp_path / "x.stats", data=data, samples=8)
    for method in ("reap", "stun"):
        two = prune(folder, tmp_path / f"{method}-2", method=method, stats=tmp_path / "x.stats", ratio=0.5)
        one = prune(folder, tmp_path / f"{method}-1", method=method, data=data, samples=8, ratio=0.5)
        assert one.plan["layers"] == two.plan["layers"] and one.report["guard"] == two.report["guard"] == "on"
        assert one.report.get("scores") == two.report.get("scores")
        assert one.report["stability"] == two.report["stability"] and one.report["stability"]
        assert set(one.options["data"]) == set(data) and (one.options["samples"], one.options["stats"]) == (8, None)
        assert one.plan["budget"]["samples"] == two.plan["budget"]["stats"]["samples"]


def test_without_a_method_data_decide_where_there_are_any(tiny_checkpoint, tmp_path, model):
    """REAP with data or statistics, STUN without and where an option shapes it; which and why is said and recorded."""
    path = write(tmp_path / "x.stats", model, gated_output_norms=np.arange(E), coactivation=np.ones((2, E, E)))
    tiny_one, data = tiny_checkpoint("qwen3_moe"), files(tmp_path / "data", sequences())
    for number, (source, options, method, why) in enumerate((
        (model, {}, "stun", "no --method, no data: stun decides, by router rows alone"),
        (model, {"stats": path}, "reap", "no --method: reap decides, by what experts do on --stats"),
        (model, {"stats": path, "lambda2": 1}, "stun", "no --method: stun decides, which --lambda2 shapes"),
        (tiny_one, {"data": data}, "reap", "no --method: reap decides, by what experts do on --data"),
    )):  # fmt: skip
        out = tmp_path / str(number)
        prune(source, out, experts=6, **options)
        record = json.loads((out / "coterie.json").read_text())
        assert record["options"]["method"] == method and any(w.startswith(why) for w in record["report"]["warnings"])
        asked = prune(source, out, experts=6, method=method, overwrite=True, **options)
        assert asked.plan == record["plan"] and not any("--method" in w for w in asked.report["warnings"])


def test_domains_are_weighted_without_a_second_run(tiny_checkpoint):
    """A weight of 2 scores as if the domain's data were given twice, a weight of 0 as if it were not there."""
    folder, given = tiny_checkpoint("olmoe"), sequences()
    stats = measure(Model.open(folder), given, torch.float32)
    for weights, data in (({"code": 2}, [*every(given), *given["code"]]), ({"code": 0}, given["prose"])):
        expected = slow_criteria.scores(folder, data)
        for name in BY_STATS:
            for block, score in criteria.by_stats(task_of(folder, weights=weights), name, stats).items():
                slow = expected[name][block.key]
                np.testing.assert_allclose(score, slow, rtol=0, atol=1e-5 * slow.max(), err_msg=name)


# --- statistics by hand ------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return qwen(tmp_path / "model")


def write(path, model, domains=("x",), layers=("0", "1"), **sums):
    """A statistics file of these sums in every layer; each (E,) of both halves, or (2, E) of each."""
    sums = {"tokens": np.ones(E), "output_max": np.ones(E)} | sums
    stats = Stats(Checkpoint.open(model).hash, dict.fromkeys(domains, 4))
    for domain in domains:
        for layer in layers:
            for name, value in sums.items():
                value = np.asarray(value, dtype=float)
                stats.add(domain, layer, name, np.stack([value, value]) if value.ndim == 1 else value)
    stats.save(path)
    return path


def test_ties_go_to_the_lower_id(tmp_path, model):
    """Of equal counts the first stay."""
    path = write(tmp_path / "x.stats", model, tokens=[1, 2, 1, 1, 2, 1, 1, 1])
    report = prune(model, tmp_path / "out", method="frequency", stats=path, experts=4)
    assert kept(report) == kept(report, "1") == [0, 1, 2, 4]


def test_every_routing_group_keeps_as_many(tmp_path):
    """Four groups of four: the most used of each stays, though all of the first group are used more."""
    model, path = deepseek(tmp_path / "model"), tmp_path / "x.stats"
    tokens = np.arange(16)[::-1] + 1.0
    stats = Stats(Checkpoint.open(model).hash, {"x": 2})
    for name in ("tokens", "output_max"):
        stats.add("x", "0", name, np.stack([tokens, tokens]))
    stats.save(path)
    report = prune(model, tmp_path / "out", method="frequency", stats=path, experts=8)
    assert kept(report) == [0, 1, 4, 5, 8, 9, 12, 13]


def test_halves_that_disagree_are_reported(tmp_path, model):
    """One half prefers expert 0, the other expert 7: of four kept they share three."""
    first, second = np.array([9.0, 8, 8, 8, 0, 0, 0, 1]), np.array([1.0, 8, 8, 8, 0, 0, 0, 9])
    path = write(tmp_path / "x.stats", model, tokens=np.stack([first, second]))
    report = prune(model, tmp_path / "out", method="frequency", stats=path, experts=4)
    assert report.plan["budget"]["stability"] == {"layers": {"0": 0.75, "1": 0.75}, "mean": 0.75}


def test_half_of_too_little_is_said(tmp_path, model):
    """One sample: the choice stands, and how stable it is stays open."""
    path = write(tmp_path / "x.stats", model, tokens=np.stack([np.arange(E), np.zeros(E)]))
    report = prune(model, tmp_path / "out", method="frequency", stats=path, experts=4)
    assert kept(report) == [4, 5, 6, 7] and "stability" not in report.plan["budget"]
    assert any("not measured: from half of the data, layer 0" in w for w in report.report["warnings"])


def test_prediction_layers_keep_their_longest_router_rows(tmp_path):
    """Calibration never sees a multi-token-prediction layer, which is said."""
    rows = [np.outer(np.arange(E) + 1.0, np.ones(HIDDEN))] * 3
    model = qwen(tmp_path / "model", layers=3, routers=rows, num_hidden_layers=2, num_nextn_predict_layers=1)
    path = write(tmp_path / "x.stats", model, tokens=np.arange(E)[::-1])
    report = prune(model, tmp_path / "out", method="frequency", stats=path, experts=4)
    assert [kept(report, layer) for layer in "012"] == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert criteria.UNMEASURED in report.report["warnings"]


def test_only_the_sums_that_decide_are_read(tmp_path, model, monkeypatch):
    """Of a file of many sums, the criterion's, the guard's and the counts."""
    from coterie.model import stats as stats_module

    path = write(tmp_path / "x.stats", model, gated_output_norms=np.ones(E), logits=np.ones(E))
    read, original = [], stats_module.read_bytes
    monkeypatch.setattr(stats_module, "read_bytes", lambda *given: read.append(given[3]) or original(*given))
    prune(model, tmp_path / "out", method="reap", stats=path)
    assert {name.rpartition("/")[2] for name in read} == {"tokens", "gated_output_norms", "output_max"}


# --- super experts -----------------------------------------------------------------------------------------


def test_super_experts_by_hand():
    """Two layers of 100 experts with largest outputs of about 1: 400 is super; 60 is not, beside 700 (under a tenth).

    With 200 experts, P99.5 lies between the largest and the second largest.
    """
    ordinary = [np.linspace(0.5, 1.5, 100) for _ in range(2)]
    assert super_experts(ordinary) == [[], []]  # the largest of all, but it does not stand out
    ordinary[1][7] = 400
    assert super_experts(ordinary) == [[], [7]]
    ordinary[0][3] = 700
    ordinary[1][7] = 60
    assert super_experts(ordinary) == [[3], []]
    assert super_experts([]) == []


@given(st.integers(0, 2**32 - 1))
def test_few_are_super(seed):
    """Never more than half a percent of all, rounded up."""
    largest = [np.random.default_rng(seed + i).lognormal(sigma=5, size=60) for i in range(10)]
    assert sum(map(len, super_experts(largest))) <= 3


def test_a_super_expert_stays_unless_asked_otherwise(tmp_path, model):
    """Expert 6 of layer 1 is used least of all; the report lists it, and says that it would have gone."""
    tokens, largest = np.array([9, 8, 7, 6, 5, 4, 1, 3]), np.ones((2, 2, E))
    path, stats = tmp_path / "x.stats", Stats(Checkpoint.open(model).hash, {"x": 4})
    largest[1, 0, 6] = 300
    for layer in (0, 1):
        stats.add("x", str(layer), "tokens", np.stack([tokens, tokens]))
        stats.add("x", str(layer), "output_max", largest[layer])
    stats.save(path)
    how = {"method": "frequency", "experts": 4, "stats": path}
    report = prune(model, tmp_path / "out", **how)
    assert (kept(report), kept(report, "1")) == ([0, 1, 2, 3], [0, 1, 2, 6])
    assert report.report["guarded"] == [["1", 6, 300.0]]
    assert any("layer 1 expert 6" in w for w in report.report["warnings"])
    without = prune(model, tmp_path / "without", no_guard=True, **how)
    assert kept(without, "1") == [0, 1, 2, 3] and without.report["guarded"] == []
    assert json.loads((tmp_path / "without" / "coterie.json").read_text())["options"]["no_guard"] is True


def test_a_planted_super_expert_is_found(tiny_checkpoint, tmp_path):
    """An expert whose down projection is a thousand times larger, from end to end."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("qwen2_moe"), folder)
    tensors, config = tiny.read(folder)
    tensors["model.layers.1.mlp.experts.5.down_proj.weight"] *= 1000
    tiny.write(folder, tensors, config)
    stats = measure(Model.open(folder), sequences(), torch.float32)
    found = criteria.guard(task_of(folder), stats)
    assert [(b.key, ids) for b, ids in found.items() if ids] == [("1", [5])]


def test_largest_outputs_are_joined_by_the_larger(tmp_path, model):
    """Of halves, domains and merged files; a domain of weight 0 does not count."""
    stats = Stats("m", {"a": 2, "b": 2})
    stats.add("a", "0", "output_max", np.array([[1.0, 5.0], [2.0, 3.0]]))
    stats.add("b", "0", "output_max", np.array([[4.0, 1.0], [1.0, 1.0]]))
    assert stats.get("0", "output_max").tolist() == [4, 5]
    assert stats.get("0", "output_max", {"b": 0}).tolist() == [2, 5]
    assert stats.get("0", "output_max", {"a": 7}).tolist() == [4, 5]
    assert stats.half(1).get("0", "output_max").tolist() == [2, 3]
    stats.add("a", "0", "output_max", np.array([[9.0, 0.0], [0.0, 0.0]]))
    assert stats.get("0", "output_max").tolist() == [9, 5]


def test_more_super_experts_than_stay_are_refused():
    """By name, with what to do."""

    class Block:
        name, mtp, attention = "layer 3", False, False

    block = Block()
    with pytest.raises(CoterieError, match=r"layer 3: more super experts than the 1 .*--no-guard"):
        criteria.keep(criteria.Task({}, 1, 1), {block: np.zeros(4)}, {block: [0, 2]})


# --- the change of router norms ----------------------------------------------------------------------------


def layer(rows):
    return SimpleNamespace(key="0", router=np.array(rows), norms=np.linalg.norm(rows, axis=1))


def test_router_norm_change_by_hand():
    """Signed: a row that shrank goes before one that stayed, whatever the distance between the rows."""
    before, after = layer([[3, 4], [0, 1], [2, 0]]), layer([[0, 4], [0, 1], [0, 3]])
    assert router_norm_change.score(after, before).tolist() == [-1, 0, 1]


def test_rows_that_grew_are_kept(tmp_path):
    """Planted: the rows of experts 1, 4 and 6 grew by half, the others by less."""
    draw = np.random.default_rng(0).normal(size=(2, E, HIDDEN))
    grown = draw * np.where(np.isin(np.arange(E), [1, 4, 6]), 1.5, 1.01)[:, None]
    base, model = qwen(tmp_path / "base", routers=list(draw)), qwen(tmp_path / "model", routers=list(grown))
    report = prune(model, tmp_path / "out", method="router-norm-change", base=base, experts=3)
    assert kept(report) == kept(report, "1") == [1, 4, 6]
    assert report.options["base"] == str(base)


def test_super_experts_are_guarded_in_trained_routers_too(tmp_path):
    """With statistics, from which they are known: the row of expert 2 grew least, and stays."""
    draw = np.random.default_rng(0).normal(size=(2, E, HIDDEN))
    grown = draw * np.linspace(1.5, 1.6, E)[:, None]
    grown[:, 2] = draw[:, 2] * 1.1
    base, model = qwen(tmp_path / "base", routers=list(draw)), qwen(tmp_path / "model", routers=list(grown))
    stats = Stats(Checkpoint.open(model).hash, {"x": 2})
    for key in "01":
        stats.add("x", key, "output_max", np.where((np.arange(E) == 2) & (key == "0"), 1000.0, 1.0) * np.ones((2, 1)))
        stats.add("x", key, "tokens", np.ones((2, E)))
    stats.save(tmp_path / "x.stats")
    how = {"method": "router-norm-change", "base": base, "experts": 3, "stats": tmp_path / "x.stats"}
    report = prune(model, tmp_path / "out", **how)
    bare = prune(model, tmp_path / "bare", no_guard=True, **how)
    assert report.report["guard"] == "on" and report.report["guarded"] == [["0", 2, 1000.0]]
    assert 2 not in kept(bare) and 2 in kept(report) and {*kept(report)} - {2} < {*kept(bare)}


def test_routers_that_did_not_train_are_refused(tmp_path, model):
    """The same rows in both checkpoints: nothing can be told from them."""
    with pytest.raises(CoterieError, match="layer 0: no router row's norm differs from --base: the router did not"):
        prune(model, tmp_path / "out", method="router-norm-change", base=qwen(tmp_path / "base"))


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ({"experts": 6}, r"layer 0: its router has shape \(8, 4\), in --base \(6, 4\)"),
        ({"layers": 1}, "has no layer 1"),
    ],
)
def test_a_base_that_is_another_model_is_refused(tmp_path, model, other, fault):
    """Other sizes, fewer layers."""
    with pytest.raises(CoterieError, match=fault):
        prune(model, tmp_path / "out", method="router-norm-change", base=qwen(tmp_path / "base", seed=1, **other))


def test_a_base_of_another_family_is_refused(tmp_path, model, tiny_checkpoint):
    """Even where its router rows would fit."""
    with pytest.raises(CoterieError, match=r"--base .*: is 'mixtral', not 'qwen2_moe'; expected this model before"):
        prune(model, tmp_path / "out", method="router-norm-change", base=tiny_checkpoint("mixtral"))


# --- sets of experts ---------------------------------------------------------------------------------------


def costs(table):
    """An error function from the cost of each removed set, as "ab"."""
    return lambda kept: table["".join(str(e) for e in range(4) if e not in kept)]


def test_every_set_is_tried():
    """Removing 0 and 3 costs least together, though 1 alone is the least missed: greedy removal misses that."""
    table = {"0": 5, "1": 1, "2": 4, "3": 6, "01": 6, "02": 8, "03": 2, "12": 5, "13": 7, "23": 9}
    assert naee.choose(costs(table), [[0, 1, 2, 3]], [2], frozenset()) == [1, 2]
    assert naee_greedy.choose(costs(table), [[0, 1, 2, 3]], [2], frozenset()) == [0, 3]


@pytest.mark.parametrize("method", [naee, naee_greedy])
def test_sets_respect_groups_guards_and_ties(method):
    """Where all costs are equal lower ids stay; one of each group goes; those always kept do."""
    groups = [[0, 1, 2], [3, 4, 5]]
    assert method.choose(lambda kept: 1.0, groups, [2, 2], frozenset()) == [0, 1, 3, 4]
    assert method.choose(lambda kept: 1.0, groups, [2, 2], frozenset({2, 5})) == [0, 2, 3, 5]
    assert method.choose(lambda kept: 1.0, groups, [3, 3], frozenset()) == [0, 1, 2, 3, 4, 5]


def test_sets_are_counted():
    """8 choose 6; 3 choose 2 in each of two groups."""
    assert naee.num_subsets([8], [6]) == len(list(naee.subsets([range(8)], [6]))) == 28
    assert naee.num_subsets([3, 3], [2, 2]) == len(list(naee.subsets([range(3), range(3, 6)], [2, 2]))) == 9


class Every:
    """Instead of a choice: the errors of every allowed set."""

    def __init__(self, task):
        self.task, self.found = task, {}

    def choose(self, block, sets):
        groups = np.arange(block.num_experts).reshape(self.task.num_groups, -1).tolist()
        per_group = [self.task.kept // self.task.num_groups] * self.task.num_groups
        self.found[block.key] = {kept: sets.error(kept) for kept in naee.subsets(groups, per_group)}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_errors_equal_those_of_smaller_blocks(tiny_checkpoint, model_type):
    """Inner products and routing alone give what a block without the experts gives, to 1e-4 of the largest error."""
    folder, given = tiny_checkpoint(model_type), sequences()
    every_set = Every(task_of(folder))
    reconstruct.measure(Model.open(folder), given, every_set, torch.float32, lambda *_: None)
    expected = slow_criteria.errors(folder, every(given), 6)
    assert every_set.found.keys() == expected.keys()
    for key, errors in every_set.found.items():
        slow = np.array([expected[key][kept] for kept in errors])
        np.testing.assert_allclose([e.sum() for e in errors.values()], slow, rtol=1e-3, atol=1e-4 * slow.max())


def test_what_does_not_route_is_computed_once():
    """It returns what it returned, whatever was done to that since, for an equal input alone."""
    ran = []
    remembering = reconstruct.remembering(lambda x: ran.append(x) or 2 * x)
    remembering(torch.ones(2)).zero_()
    assert remembering(torch.ones(2)).tolist() == [2, 2] and len(ran) == 1
    assert remembering(torch.zeros(2)).tolist() == [0, 0] and len(ran) == 2
    assert remembering(torch.ones(3)).tolist() == [2, 2, 2] and len(ran) == 3


def test_a_shared_expert_runs_once_for_all_sets(tiny_checkpoint, monkeypatch):
    """No shared expert gets the same tokens twice, though 28 sets of each layer are tried."""
    ran, forward = [], Qwen2MoeMLP.forward
    monkeypatch.setattr(
        Qwen2MoeMLP, "forward", lambda self, x: ran.append((id(self), x.sum().item())) or forward(self, x)
    )
    folder = tiny_checkpoint("qwen2_moe")
    every_set = Every(task_of(folder))
    reconstruct.measure(Model.open(folder), sequences(), every_set, torch.float32, lambda *_: None)
    assert all(len(errors) == 28 for errors in every_set.found.values())
    assert len(ran) == len(set(ran)) > 0


def test_the_best_set_stays(tiny_checkpoint, tmp_path):
    """From end to end; greedy removal of one expert is exact; both say how much of the output is lost."""
    folder, given = tiny_checkpoint("mixtral"), sequences()
    data = files(tmp_path / "data", given)
    report = prune(folder, tmp_path / "out", method="naee", data=data, samples=8)
    for key, errors in slow_criteria.errors(folder, every(given), 6).items():
        assert kept(report, key) == list(min(errors, key=errors.__getitem__))
        assert 0 < report.report["reconstruction_error"][key] < 1
    assert 0 <= report.plan["budget"]["stability"]["mean"] <= 1
    assert any("super experts are known from --stats alone" in w for w in report.report["warnings"])
    assert report.options["data"] == {name: str(file) for name, file in data.items()}
    one = [prune(folder, tmp_path / m, method=m, data=data, samples=8, experts=7) for m in ("naee", "naee-greedy")]
    assert one[0].plan["layers"] == one[1].plan["layers"]


def test_sets_with_statistics_guard_and_with_weights_weigh(tiny_checkpoint, tmp_path):
    """A guarded expert is in every set; a domain of weight 0 changes nothing."""
    folder, given = tiny_checkpoint("mixtral"), sequences()
    data = files(tmp_path / "data", given)
    alone = prune(folder, tmp_path / "alone", method="naee", data={"prose": data["prose"]}, samples=4)
    weighed = prune(folder, tmp_path / "weighed", method="naee", data=data, samples=8, weights="code=0")
    assert alone.plan["layers"] == weighed.plan["layers"]
    gone = next(e for e in range(E) if e not in kept(alone, "2"))
    stats = Stats(Checkpoint.open(folder).hash, {"x": 2})
    for key in "0123":
        largest = np.ones((2, E))
        largest[:, gone] = 1000 if key == "2" else 1
        stats.add("x", key, "output_max", largest)
    stats.save(tmp_path / "x.stats")
    guarded = prune(
        folder,
        tmp_path / "guarded",
        method="naee",
        data={"prose": data["prose"]},
        samples=4,
        stats=tmp_path / "x.stats",
    )
    assert gone in kept(guarded, "2") and guarded.report["guarded"] == [["2", gone, 1000.0]]


def test_sets_over_the_budget_are_refused_with_their_number(tmp_path):
    """32 choose 16, before any data is read; greedy removal has no such limit."""
    model = qwen(tmp_path / "model", experts=32)
    with pytest.raises(
        CoterieError, match=r"keeping 16 of 32 experts there are 601,080,390 .*budget of 20,000; use naee-"
    ):
        prune(model, tmp_path / "out", method="naee", ratio=0.5, data={"x": tmp_path / "missing"})
    naee_greedy.check([32], [16])


@pytest.mark.parametrize("weights", ["poetry=1", "prose=0,code=0"])
def test_weights_that_do_not_fit_the_data_are_refused(tiny_checkpoint, tmp_path, weights):
    """Unknown domains, and none that counts."""
    data = files(tmp_path / "data", sequences())
    with pytest.raises(CoterieError, match=r"--weights: (domain 'poetry' is not in the data|every domain weighs 0)"):
        prune(tiny_checkpoint("mixtral"), tmp_path / "out", method="naee", data=data, weights=weights)


def test_too_many_tokens_for_memory_are_refused(tiny_checkpoint, tmp_path, monkeypatch):
    """Naming how many would fit."""
    monkeypatch.setattr(reconstruct, "MOST_PRODUCTS", 4 * 64 * 100)
    with pytest.raises(CoterieError, match=r"--samples: 107 tokens of 8 experts each; .* fit in memory for 100"):
        prune(tiny_checkpoint("mixtral"), tmp_path / "out", method="naee", data=files(tmp_path / "data", sequences()))


def test_a_router_in_another_dtype_than_stored_is_refused(tmp_path):
    """A sigmoid router computes in float32 from bfloat16 rows: sets cannot be tried there but in float32."""
    from safetensors.torch import save_file

    folder = tiny.save("deepseek_v3", tmp_path / "model")
    tensors, _ = tiny.read(folder)
    save_file({n: torch.from_numpy(v).bfloat16() for n, v in tensors.items()}, folder / "model.safetensors")
    how = {"method": "naee", "data": files(tmp_path / "data", sequences())}
    with pytest.raises(CoterieError, match=r"layer 1: its router computes in another dtype .*--dtype float32"):
        prune(folder, tmp_path / "out", dtype="bfloat16", **how)
    assert prune(folder, tmp_path / "out", dtype="float32", **how).report["after"]["experts"] == 6


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"method": "reap"}, "--method reap decides by statistics; add --data NAME=FILE, or --stats FILE"),
        ({"method": "router-norm-change"}, "compares with an earlier checkpoint; add --base"),
        ({"method": "reap", "stats": "x", "base": "y"}, "--base would be ignored by reap; it is of router-norm-change"),
        (
            {"method": "reap", "stats": "x", "data": {"a": "b"}},
            "--data is of calibration and would be ignored: --stats were measured already",
        ),
        ({"method": "reap", "stats": "x", "samples": 4}, "--samples is of calibration and would be ignored: --stats"),
        ({"method": "reap", "stats": "x", "seq_len": 4}, "--seq-len is of calibration and would be ignored: --stats"),
        (
            {"method": "reap", "stats": "x", "dtype": "float32"},
            "--dtype is of calibration and would be ignored: --stats",
        ),
        (
            {"method": "reap", "stats": "x", "seed": 1},
            "--seed is of --data and of the method random, and would be ignored by reap",
        ),
        ({"method": "reap", "stats": "x", "kappa": 1}, "--kappa shapes the method stun and would be ignored by reap"),
        ({"method": "reap", "stats": "x", "lambda2": 1}, "--lambda2 shapes the method stun"),
        (
            {"method": "router-norm-change", "base": "x", "stats": "s", "weights": "y=1"},
            "--weights would be ignored by router-norm-",
        ),
        ({"method": "random", "no_guard": True}, "--no-guard would be ignored by random"),
        ({"no_guard": True}, "--no-guard would be ignored: without statistics"),
        ({"method": "naee", "no_guard": True}, "--no-guard would be ignored: without statistics"),
        ({"method": "stun", "samples": 4}, "--samples is of calibration and would be ignored: there is no --data"),
        ({"method": "first", "data": {"a": "b"}}, "--data would be ignored by first; it is of stun, ean,"),
        ({"samples": 4}, "--samples is of calibration and would be ignored: there is no --data"),
        ({"data": {"a": "b"}, "weights": "c=2"}, "--weights: domain 'c' is not in the data: a"),
        ({"method": "mone", "data": {"a": "b"}}, "--removed constant reads mean outputs from a file .* give --stats"),
    ],
)
def test_options_that_are_missing_or_would_be_ignored_are_refused(tmp_path, model, options, fault):
    """Before any file is read."""
    with pytest.raises(CoterieError, match=fault):
        prune(model, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_statistics_that_do_not_fit_are_refused(tmp_path, model):
    """Of another model, of an absent domain, without a layer, a sum or a token, of other sizes."""
    other = qwen(tmp_path / "other", seed=1)
    cases = [
        (write(tmp_path / "a.stats", other), {}, r"a\.stats: collected on another model"),
        (write(tmp_path / "b.stats", model), {"weights": "poetry=2"}, "domain 'poetry' is not in the statistics; they"),
        (write(tmp_path / "c.stats", model, layers=("0",)), {}, "layer 1 has no 'output_max'"),
        (write(tmp_path / "d.stats", model), {"method": "reap"}, "layer 0 has no 'gated_output_norms'"),
        (write(tmp_path / "e.stats", model, tokens=np.zeros(E)), {}, "layer 0: the statistics, as weighted, hold no t"),
        (write(tmp_path / "f.stats", model, tokens=np.ones(7)), {}, r"layer 0: 'tokens' has shape \(7,\)"),
    ]
    for path, options, fault in cases:
        with pytest.raises(CoterieError, match=fault):
            prune(model, tmp_path / "out", **({"method": "frequency", "stats": path} | options))
    assert not list(tmp_path.glob("out*"))


def test_statistics_without_largest_outputs_ask_for_no_guard(tmp_path, model):
    """Written before there was a guard: usable, once one says so."""
    stats = Stats.load(write(tmp_path / "x.stats", model))
    stats.sums = {key: value for key, value in stats.sums.items() if key[2] != "output_max"}
    stats.save(tmp_path / "old.stats")
    how = {"method": "frequency", "stats": tmp_path / "old.stats"}
    with pytest.raises(CoterieError, match=r"super experts cannot be told \(layer 0 has no 'output_max'.*--no-guard"):
        prune(model, tmp_path / "out", **how)
    assert prune(model, tmp_path / "out", no_guard=True, **how)


def test_a_plan_by_statistics_is_applied_again(tmp_path, model):
    """The plan in coterie.json makes the same checkpoint without statistics."""
    from coterie.verbs.apply import apply

    path = write(tmp_path / "x.stats", model, tokens=np.arange(E))
    prune(model, tmp_path / "out", method="frequency", stats=path)
    apply(model, tmp_path / "out", tmp_path / "again")
    first, second = read_all(tmp_path / "out"), read_all(tmp_path / "again")
    assert first.keys() == second.keys() and all(np.array_equal(first[n], second[n]) for n in first)


def test_an_expert_with_no_token_goes_first(tmp_path, model):
    """Whatever the criterion of averages says of the others."""
    tokens = np.array([5.0, 0, 5, 5, 5, 5, 5, 5])
    sums = {
        name: np.where(tokens > 0, 1e-9, 0) for name in ("output_norms", "gated_output_norms", "output_norms_squared")
    }
    path = write(tmp_path / "x.stats", model, tokens=tokens, **sums)
    for name in ("reap", "man", "msan", "ean", "frequency"):
        assert 1 not in kept(prune(model, tmp_path / name, method=name, stats=path, experts=7))


def test_an_out_in_the_way_is_seen_before_any_set_is_tried(tiny_checkpoint, tmp_path, monkeypatch):
    """A folder of somebody else's: nothing is measured for it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    monkeypatch.setattr(reconstruct, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(CoterieError, match="out"):
        prune(
            tiny_checkpoint("mixtral"), tmp_path / "out", method="naee", data=files(tmp_path / "data", sequences()),
            samples=8, overwrite=True,
        )  # fmt: skip
