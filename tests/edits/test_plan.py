"""Plans: decisions as data that can be written, read back, edited, refused, and executed to the same bytes."""

import ast
import json
import shutil
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.edits.plan import Choice, Plan, read_plan
from coterie.errors import CoterieError
from coterie.storage.record import to_json
from coterie.verbs.apply import apply
from coterie.verbs.prune import prune
from handmade import HIDDEN, deepseek, file_bytes, qwen, read_all, save

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def choices(draw):
    """Up to six experts, some kept; the others dropped, or each in the cluster of a kept one."""
    num_experts = draw(st.integers(1, 6))
    kept = sorted(draw(st.sets(st.integers(0, num_experts - 1), min_size=1)))
    if draw(st.booleans()):
        return Choice(tuple(kept))
    clusters = [[k] for k in kept]
    for e in sorted(set(range(num_experts)) - set(kept)):
        draw(st.sampled_from(clusters)).append(e)
    return Choice(tuple(kept), tuple(tuple(c) for c in clusters), draw(st.booleans()))


KEYS = st.integers(0, 99).map(str) | st.just("mtp.0")
PLANS = st.builds(
    Plan,
    layers=st.dictionaries(KEYS, choices(), max_size=3),
    attention=st.dictionaries(KEYS, choices(), max_size=2),
    budget=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=2),
    drop_mtp=st.booleans(),
)


# --- reading and writing -----------------------------------------------------------------------------------


@given(PLANS)
def test_a_plan_survives_its_file(plan):
    """Written as JSON and read back, alone or inside a coterie.json, a plan is equal to itself."""
    content = json.loads(to_json(plan.as_dict()))
    assert read_plan(content) == plan
    assert read_plan({"format": 1, "command": "prune", "plan": content}) == plan


@given(JSON)
def test_arbitrary_json_is_a_plan_or_our_error(value):
    """Whatever JSON an object holds, reading it gives a Plan or a CoterieError."""
    for content in (
        value,
        {"layers": value},
        {"layers": {"0": value}},
        {"plan": value},
        {"layers": {}, "budget": value},
    ):
        if isinstance(content, dict):
            with suppress(CoterieError):
                assert isinstance(read_plan(content), Plan)


@given(st.sampled_from(["kept", "clusters", "merged", "extra"]), JSON)
def test_a_choice_with_one_value_changed(key, value):
    """A choice with arbitrary JSON in one place is as consistent as any, or refused."""
    choice = {"kept": [0, 2], "clusters": [[0, 1], [2, 3]], "merged": False} | {key: value}
    try:
        found = read_plan({"layers": {"0": choice}}).layers["0"]
    except CoterieError:
        return
    assert list(found.kept) == sorted(set(found.kept)) and found.kept
    assert not found.clusters or all(k in c for k, c in zip(found.kept, found.clusters, strict=True))


FAULTS = {
    "no layers": ({}, "no `layers` object"),
    "layers is a list": ({"layers": []}, "no `layers` object"),
    "plan is a list": ({"plan": []}, "no `layers` object"),
    "unknown key": ({"layers": {}, "layer": {}}, r"unknown keys \['layer'\]"),
    "layer is a list": ({"layers": {"0": [1]}}, "layer '0': expected an object"),
    "unknown key in a layer": ({"layers": {"0": {"keep": [1]}}}, "expected the keys kept, clusters, merged"),
    "attention is a list": ({"layers": {"0": {"attention": [1]}}}, r"layer '0' \(attention\): expected the keys"),
    "nothing kept": ({"layers": {"0": {"kept": []}}}, "`kept` must be ascending, distinct"),
    "kept missing": ({"layers": {"0": {"clusters": [[0]]}}}, "`kept` must be"),
    "kept descends": ({"layers": {"0": {"kept": [1, 0]}}}, "`kept` must be ascending"),
    "kept twice": ({"layers": {"0": {"kept": [1, 1]}}}, "`kept` must be ascending, distinct"),
    "kept is a boolean": ({"layers": {"0": {"kept": [False, True]}}}, "`kept` must be"),
    "kept is negative": ({"layers": {"0": {"kept": [-1, 0]}}}, "`kept` must be"),
    "kept is text": ({"layers": {"0": {"kept": "01"}}}, "`kept` must be"),
    "clusters is flat": ({"layers": {"0": {"kept": [0], "clusters": [0]}}}, "must be lists of expert ids"),
    "merged is a number": ({"layers": {"0": {"kept": [0], "merged": 1}}}, "`merged` a boolean"),
    "a cluster too many": ({"layers": {"0": {"kept": [0], "clusters": [[0], [1]]}}}, "for each kept expert"),
    "a cluster of others": ({"layers": {"0": {"kept": [0], "clusters": [[1, 2]]}}}, "for each kept expert"),
    "in two clusters": ({"layers": {"0": {"kept": [0, 1], "clusters": [[0, 2], [1, 2]]}}}, "stands in two clusters"),
    "merged without clusters": ({"layers": {"0": {"kept": [0], "merged": True}}}, "need their clusters"),
    "budget is a list": ({"layers": {}, "budget": []}, "budget must be an object"),
    "drop_mtp is text": ({"layers": {}, "drop_mtp": "yes"}, "drop_mtp a boolean"),
}


@pytest.mark.parametrize(("content", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_plan_is_refused_with_its_fault(content, fault, tmp_path):
    """Each way in which a plan can be wrong is told apart; read from a file, the file is named."""
    with pytest.raises(CoterieError, match=fault):
        read_plan(content)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CoterieError, match=r"plan\.json: .*" + fault):
        read_plan(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"layers": {}, "layers": {}}', b"[" * 99_999])
def test_a_file_that_is_no_plan(content, tmp_path):
    """Anything but one JSON object is refused by the file's name."""
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(CoterieError, match=r"plan\.json: "):
        read_plan(path)


@pytest.mark.parametrize("name", ["missing.json", "x" * 300, "a\0b", "folder"])
def test_a_plan_that_is_not_there(tmp_path, name):
    """A missing file, an impossible name and a folder without a record are refused."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(CoterieError):
        read_plan(tmp_path / name)


def test_who_stands_for_whom():
    """Original ids to new ones: kept experts by position, covered ones by their cluster's, others not at all."""
    assert Choice((1, 4), ((1, 0), (4, 5))).stand_ins(6) == {1: 0, 4: 1, 0: 0, 5: 1}
    assert Choice((1, 4)).stand_ins(6) == {1: 0, 4: 1}


def test_kinds_of_entry_are_found_in_order_and_without_the_heavy_libraries():
    """Nine files, in the order in which their entries take effect; reading a plan imports neither torch nor scipy."""
    code = (
        "import sys; from coterie.edits.plan import kinds, read_plan\n"
        "read_plan({'layers': {}})\n"
        "print([kind.block.names + kind.layer.names + kind.plan.names for kind in kinds()])\n"
        "print({'torch', 'transformers', 'scipy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert ast.literal_eval(found[0]) == [
        ("kept", "clusters"), ("merged", "shares", "aligned"), ("drop_mtp", "dropped"), ("converted",),
        ("dequantised",), ("removed", "constants", "constants"), ("sparsity",), ("condensed",), ("bits", "quantized"),
    ]  # fmt: skip
    assert found[1] == "set()"


def test_what_no_attribute_is_named_after_is_an_entry():
    """A plan holds entries of kinds that it does not know by name, under their keys."""
    plan = Plan({}, entries={"scale": {"1": 2.0}})
    assert plan.at("scale") == {"1": 2.0} and plan.at("rotate") == {} and plan.at("dropped") == ()


# --- executing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"experts": 2},
        {"method": "random", "seed": 3},
        {"budget": "global", "non_uniform": "coterie", "distance": "raw"},
        {"linkage": "official", "experts": 4},
    ],
    ids=str,
)
def test_apply_repeats_what_prune_did(tmp_path, options):
    """From coterie.json, its folder, its plan alone, or the object: the same bytes as the run that made it."""
    model, out = qwen(tmp_path / "model", num_shards=2), tmp_path / "out"
    report = prune(model, out, **options)
    alone = tmp_path / "plan.json"
    alone.write_text(json.dumps(report.plan))
    for number, plan in enumerate((out / "coterie.json", str(out), alone, report.plan, report.as_dict())):
        again = apply(model, plan, tmp_path / f"again{number}")
        assert file_bytes(tmp_path / f"again{number}") == file_bytes(out)
        assert again.plan == report.plan and again.command == "apply"
        assert {k: again.report[k] for k in ("before", "after", "sparsity")} == {
            k: report.report[k] for k in ("before", "after", "sparsity")
        }


def test_a_hand_edited_plan(tmp_path):
    """Other experts, only some layers: the plan does what it says."""
    model = qwen(tmp_path / "model")
    before = read_all(model)
    plan = {"layers": {"0": {"kept": [1, 6, 7]}, "1": {"kept": [0, 2, 4]}}}
    report = apply(model, plan, tmp_path / "out")
    after = read_all(tmp_path / "out")
    for layer, ids in ((0, [1, 6, 7]), (1, [0, 2, 4])):
        router = f"model.layers.{layer}.mlp.gate.weight"
        assert np.array_equal(after[router], before[router][ids])
        for new, old in enumerate(ids):
            name = f"model.layers.{layer}.mlp.experts.{{}}.down_proj.weight"
            assert np.array_equal(after[name.format(new)], before[name.format(old)])
    assert report.report["after"]["experts"] == 3
    assert report.report["sparsity"]["experts"] == 1 - 6 / 16


def test_an_empty_plan_copies_the_model(tmp_path):
    """Layers that a plan does not name stay as they are."""
    model = qwen(tmp_path / "model")
    apply(model, {"layers": {}}, tmp_path / "out")
    before, after = read_all(model), read_all(tmp_path / "out")
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)


def test_dry_run_of_a_plan(tmp_path):
    """Sizes without writing."""
    model = qwen(tmp_path / "model")
    plan = prune(model, tmp_path / "out", dry_run=True).plan
    report = apply(model, plan, tmp_path / "out", dry_run=True)
    assert report.report["after"]["experts"] == 6 and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("layers", "fault"),
    [
        ({"2": {"kept": [0, 1]}}, "layer '2' has no experts"),
        ({"x": {"kept": [0, 1]}}, "layer 'x' has no experts"),
        ({"0": {"attention": {"kept": [0, 1]}}}, "layer '0' has no attention experts"),
        ({"0": {"kept": [0, 8]}, "1": {"kept": [0, 1]}}, "layer 0 names expert 8, but its ids end at 7"),
        ({"0": {"kept": [0], "clusters": [[0, 2**70]]}}, "layer 0 names expert"),
        ({"0": {"kept": [0]}, "1": {"kept": [0]}}, "layer 0: keeps 1 experts, but 2 are chosen per token"),
        ({"0": {"kept": [0, 1, 2]}, "1": {"kept": [0, 1]}}, r"different numbers of experts \(2 to 3\)"),
        ({"0": {"kept": [0, 1, 2]}}, r"different numbers of experts \(3 to 8\)"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(tmp_path, layers, fault):
    """What would fail at load, or load and compute something else, is refused before a byte is written."""
    with pytest.raises(CoterieError, match=fault):
        apply(qwen(tmp_path / "model"), {"layers": layers}, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_plan_that_breaks_routing_groups_is_refused(tmp_path):
    """Groups must keep equally many, or the router would choose among others."""
    plan = {"layers": {"0": {"kept": [0, 1, 2, 3, 4, 5, 8, 12]}}}
    with pytest.raises(CoterieError, match=r"keeps \[4, 2, 1, 1\] experts in its 4 routing groups"):
        apply(deepseek(tmp_path / "model"), plan, tmp_path / "out")


@given(st.dictionaries(st.sampled_from(["0", "1"]), choices()), st.sampled_from([{}, {"layout": "coterie"}]))
@settings(max_examples=60)
def test_any_plan_is_executed_or_refused(tmp_path_factory, layers, budget):
    """Every well-formed plan gives a checkpoint with the kept experts of each layer, or our error and no file."""
    folder = tmp_path_factory.mktemp("plan")
    model = qwen(folder / "model", experts=6)
    try:
        apply(model, Plan(layers, budget=budget).as_dict(), folder / "out")
    except CoterieError:
        assert not list(folder.glob("out*"))
        return
    finally:
        shutil.rmtree(model)
    routers = {n: len(v) for n, v in read_all(folder / "out").items() if n.endswith("mlp.gate.weight")}
    assert routers == {
        f"model.layers.{key}.mlp.gate.weight": len(layers[key].kept) if key in layers else 6 for key in ("0", "1")
    }


def test_tables_of_token_ids_follow_the_experts(tmp_path):
    """A table of experts per token names the new ids: a dropped expert's cluster, or else the nearest router row's."""
    draw = np.random.default_rng(0)
    prefix = "layers.0.ffn."
    router = np.zeros((4, HIDDEN), np.float32)
    router[:, 0] = [0, 10, 11, 1]
    tensors = {
        f"{prefix}gate.weight": router,
        f"{prefix}gate.tid2eid": np.array([[0, 1], [2, 3], [3, 0]], np.int64),
    }
    for e in range(4):
        tensors |= {
            f"{prefix}experts.{e}.{w}.weight": draw.normal(size=(2, 2)).astype(np.float32) for w in ("w1", "w2", "w3")
        }
    config = {"model_type": "deepseek_v4", "n_routed_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    model = save(tmp_path / "model", config, [tensors])
    plans = {
        "clusters": ({"kept": [0, 1], "clusters": [[0, 2], [1, 3]]}, [[0, 1], [0, 1], [1, 0]]),
        "nearest": ({"kept": [0, 1]}, [[0, 1], [1, 0], [0, 0]]),
    }
    for name, (choice, expected) in plans.items():
        apply(model, {"layers": {"0": choice}}, tmp_path / name)
        assert read_all(tmp_path / name)[f"{prefix}gate.tid2eid"].tolist() == expected
    save(model, config, [tensors | {f"{prefix}gate.tid2eid": np.zeros((3, 2), np.float32)}])
    with pytest.raises(CoterieError, match="a table of expert ids as F32"):
        apply(model, {"layers": {"0": {"kept": [0, 1]}}}, tmp_path / "out")
    tensors[f"{prefix}gate.tid2eid"][0, 0] = 4
    save(model, config, [tensors])
    with pytest.raises(CoterieError, match="names expert 4, but 4 exist"):
        apply(model, {"layers": {"0": {"kept": [0, 1]}}}, tmp_path / "out")
