"""Routers that know more experts than are stored: nothing, a constant or another expert in place of those that went."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import slow_criteria
import tiny
from coterie.errors import CoterieError
from coterie.forward.measure import measure
from coterie.model.layer import Model
from coterie.model.loading import load
from coterie.model.routed import RoutedExperts
from coterie.model.stats import Stats
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.apply import apply
from coterie.verbs.collect import collect
from coterie.verbs.inspect_ import inspect
from coterie.verbs.prune import prune
from coterie.verbs.stun import stun
from coterie.verbs.verify import verify
from handmade import file_bytes, qwen

FAMILIES = ("qwen2_moe", "mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss")
E, KEPT, GONE = tiny.NUM_EXPERTS, [1, 4, 6], [0, 2, 3, 5, 7]
BATCH = torch.from_numpy(np.random.default_rng(1).integers(3, tiny.VOCABULARY, (2, 24)))


def sequences():
    """Two domains of token sequences."""
    draw = np.random.default_rng(0)
    lengths = {"prose": (24, 7, 24, 13), "code": (9, 30)}
    return {name: [tuple(draw.integers(3, tiny.VOCABULARY, n).tolist()) for n in ns] for name, ns in lengths.items()}


def every(given):
    return [sample for samples in given.values() for sample in samples]


def plan_of(folder, **how):
    """A plan that keeps the same three experts of every layer."""
    return {"layers": {block.key: {"kept": KEPT, **how} for block in Model.open(folder).main}}


def logits_of(model, implementation="eager"):
    model.set_experts_implementation(implementation)
    with torch.inference_mode():
        return model(input_ids=BATCH, use_cache=False).logits


def experts_of(model):
    """The experts modules by layer."""
    return {key: block.experts for key, block in slow_criteria.blocks(model).items()}


class SlowExperts(torch.nn.Module):
    """One token and one chosen expert at a time: the stock expert, or its constant where one is given."""

    def __init__(self, experts, constants):
        super().__init__()
        self.experts, self.constants = experts, constants

    def forward(self, x, chosen, weights):
        total = torch.zeros_like(x)
        for t in range(len(x)):
            for e, g in zip(chosen[t].tolist(), weights[t], strict=True):
                if e in self.constants:
                    total[t] += g * self.constants[e]
                else:
                    total[t] += g * self.experts(x[t : t + 1], torch.tensor([[e]]), torch.ones(1, 1))[0]
        return total


def slow_logits(folder, constants):
    """The original's logits with constants (by layer and expert) in place of experts."""
    model = slow_criteria.load(folder)
    for key, block in slow_criteria.blocks(model).items():
        block.experts = SlowExperts(block.experts, constants.get(key, {}))
    with torch.inference_mode():
        return model(input_ids=BATCH, use_cache=False).logits


@pytest.fixture
def measured(tiny_checkpoint, tmp_path):
    """`measured(model_type)`: (checkpoint, statistics of it)."""

    def get(model_type):
        folder, path = tiny_checkpoint(model_type), tmp_path / f"{model_type}.stats"
        measure(Model.open(folder), sequences(), torch.float32).save(path)
        return folder, path

    return get


# --- what is computed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_null_is_the_original_with_those_experts_weights_zeroed(tiny_checkpoint, tmp_path, model_type):
    """Bit for bit, by stock's loop over experts; and to 1e-5 by its grouped product."""
    folder = tiny_checkpoint(model_type)
    apply(folder, plan_of(folder, removed="null"), tmp_path / "out")
    model, original = load(tmp_path / "out"), slow_criteria.load(folder)
    with torch.no_grad():
        for experts in experts_of(original).values():
            for _, parameter in experts.named_parameters(recurse=False):
                parameter[GONE] = 0
    expected = logits_of(original)
    assert torch.equal(logits_of(model), expected)
    assert (logits_of(model, "grouped_mm") - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_mone_gives_mean_outputs_instead_of_experts(measured, tmp_path, model_type):
    """The mean of f_e over the tokens routed to e, weighted as e would be: file and logits equal the slow ones."""
    folder, path = measured(model_type)
    report = prune(folder, tmp_path / "out", method="mone", stats=path, experts=5)
    constants = {}
    for key, experts in slow_criteria.fires(folder, every(sequences())).items():
        assert report.plan["layers"][key]["removed"] == "constant"
        gone = [e for e in range(E) if e not in report.plan["layers"][key]["kept"]]
        means = [np.mean([y for _, y in experts[e]], axis=0) if experts[e] else np.zeros(tiny.HIDDEN) for e in gone]
        out = Model.open(tmp_path / "out")
        block = next(b for b in out.main if b.key == key)
        stored = out.checkpoint.read(block.constants)
        np.testing.assert_allclose(stored, means, rtol=0, atol=1e-5 * np.abs(means).max())
        constants[key] = {e: torch.tensor(c, dtype=torch.float32) for e, c in zip(gone, means, strict=True)}
    expected = slow_logits(folder, constants)
    found = logits_of(load(tmp_path / "out"))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (logits_of(slow_criteria.load(folder)) - expected).abs().max() > 1e-2  # leaving experts out does show
    assert report.options["removed"] == "constant"


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_an_alias_of_a_twin_changes_nothing(tiny_checkpoint, tmp_path, model_type):
    """Expert 5 is given expert 2's weights; led to it, nothing changes, also where a token chooses both."""
    folder = tmp_path / "twins"
    shutil.copytree(tiny_checkpoint(model_type), folder)
    tensors, config = tiny.read(folder)
    for block in Model.open(folder).main:
        for key, name in block.experts[5].items() if block.experts else ():
            tensors[name] = tensors[block.experts[2][key]]
        for name in block.fused:
            tensors[name][5] = tensors[name][2]
    tiny.write(folder, {n: np.ascontiguousarray(v) for n, v in tensors.items()}, config)
    kept = [0, 1, 2, 3, 4, 6, 7]
    clusters = [[0], [1], [5, 2], [3], [4], [6], [7]]
    layer = {"kept": kept, "clusters": clusters, "removed": "alias"}
    plan = {"layers": {block.key: layer for block in Model.open(folder).main}}
    apply(folder, plan, tmp_path / "out")
    before = logits_of(slow_criteria.load(folder))
    assert (logits_of(load(tmp_path / "out")) - before).abs().max() < 1e-5 * before.abs().max()
    assert verify(tmp_path / "out", against=folder)["ok"]


class Doubling(torch.nn.Module):
    """Two experts: x and 2 x."""

    def forward(self, x, chosen, weights):
        return ((chosen + 1) * weights).sum(1, keepdim=True) * x


def test_routed_by_hand():
    """Row 0 leads to expert 1, row 1 to none, row 2 to expert 0; 0.25 of a constant is added for row 1."""
    x, chosen = torch.tensor([[1.0, 2.0], [10.0, 20.0], [3.0, 3.0]]), torch.tensor([[0, 1], [1, 2], [1, 1]])
    weights = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.0]])
    null = RoutedExperts(Doubling(), (1, -1, 0))
    constant = RoutedExperts(Doubling(), (1, -1, 0), torch.tensor([[8.0, 0.0]]))
    assert null(x, chosen, weights).tolist() == [[1.5, 3.0], [7.5, 15.0], [0.0, 0.0]]
    assert constant(x, chosen, weights).tolist() == [[3.5, 3.0], [9.5, 15.0], [4.0, 0.0]]


def test_domains_weigh_in_constants(measured, tmp_path):
    """A weight of 0 leaves a domain out of the means, as if it had not been given."""
    folder, path = measured("olmoe")
    report = prune(folder, tmp_path / "out", method="mone", stats=path, experts=5, weights="code=0")
    experts, out = slow_criteria.fires(folder, sequences()["prose"]), Model.open(tmp_path / "out")
    for block in out.main:
        gone = [e for e in range(E) if e not in report.plan["layers"][block.key]["kept"]]
        fired = [[y for _, y in experts[block.key][e]] for e in gone]
        means = [np.mean(ys, axis=0) if ys else np.zeros(tiny.HIDDEN) for ys in fired]
        stored = out.checkpoint.read(block.constants)
        np.testing.assert_allclose(stored, means, rtol=0, atol=1e-5 * np.abs(means).max())
    assert report.plan["constants"] == {"stats": str(path), "weights": {"code": 0.0}}


# --- what is written ---------------------------------------------------------------------------------------------


def test_routers_and_kept_experts_keep_their_bytes(tiny_checkpoint, tmp_path):
    """The router, its biases and all else are as they were; kept experts are renumbered; config.json says where to."""
    folder, out = tiny_checkpoint("deepseek_v3"), tmp_path / "out"
    report = apply(folder, plan_of(folder, removed="null"), out)
    before, after = Model.open(folder), Checkpoint.open(out)
    for block in before.main:
        for i, e in enumerate(KEPT):
            for part, name in block.experts[e].items():
                assert before.checkpoint.raw(name) == after.raw(name.replace(f".experts.{e}.", f".experts.{i}.")), part
    kept = [n for n, role in before.roles.items() if role != "expert"]
    assert all(before.checkpoint.raw(n) == after.raw(n) for n in kept)
    assert len(after.tensors) == len(kept) + len(before.main) * 3 * len(KEPT)
    config = json.loads((out / "config.json").read_text())
    keys = [b.key for b in before.main]
    assert config["model_type"] == "coterie" and config["n_routed_experts"] == E
    assert config["coterie"] == {
        "format": 1,
        "model_type": "deepseek_v3",
        "num_experts": dict.fromkeys(keys, 3),
        "routes": {key: [-1, 0, -1, -1, 1, -1, 2, -1] for key in keys},
    }
    assert report.report["after"]["experts"] == 3 and report.report["sparsity"]["experts"] == pytest.approx(5 / 8)


def test_removed_remove_gives_mones_choice_in_a_stock_checkpoint(measured, tmp_path):
    """The same experts stay; no constants, no layout of ours."""
    folder, path = measured("qwen3_moe")
    ours = prune(folder, tmp_path / "ours", method="mone", stats=path, experts=5)
    stock = prune(folder, tmp_path / "stock", method="mone", stats=path, experts=5, removed="remove")
    for key, layer in stock.plan["layers"].items():
        assert layer == {"kept": ours.plan["layers"][key]["kept"]}
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["model_type"] == "qwen3_moe"
    assert "constants" not in stock.plan and verify(tmp_path / "stock", against=folder)["ok"]


def test_the_plan_repeats_the_result_and_needs_those_statistics(measured, tmp_path):
    """Byte for byte; other statistics are refused by the constants' fingerprint, unless the plan no longer has it."""
    folder, path = measured("qwen2_moe")
    prune(folder, tmp_path / "out", method="mone", stats=path, experts=5)
    apply(folder, tmp_path / "out", tmp_path / "again")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "again")
    given = sequences() | {"code": [(5, 6, 7, 8, 9, 10)]}
    measure(Model.open(folder), given, torch.float32).save(path)
    with pytest.raises(CoterieError, match=r"gives other constants for layer 0 than the plan was made with"):
        apply(folder, tmp_path / "out", tmp_path / "other")
    assert not list(tmp_path.glob("other*"))
    plan = json.loads((tmp_path / "out" / "coterie.json").read_text())["plan"]
    for layer in plan["layers"].values():
        del layer["constants"]
    report = apply(folder, plan, tmp_path / "edited")
    assert all(len(layer["constants"]) == 64 for layer in report.plan["layers"].values())
    assert verify(tmp_path / "edited", against=folder)["ok"]


def test_statistics_that_are_gone_are_asked_for(measured, tmp_path):
    """Nothing is written without them; but what was written can be verified without."""
    folder, path = measured("qwen3_moe")
    prune(folder, tmp_path / "out", method="mone", stats=path, experts=5)
    path.unlink()
    with pytest.raises(CoterieError, match=r"qwen3_moe\.stats"):
        apply(folder, tmp_path / "out", tmp_path / "again")
    assert not list(tmp_path.glob("again*"))
    assert verify(tmp_path / "out", against=folder)["ok"]


KILLED = """
import os, sys
from coterie import prune
from coterie.storage import writer
original, count = writer.Writer.shard, 0
def shard(self, *given):
    global count
    count += 1
    original(self, *given)
    if count == 2:
        os._exit(9)
writer.Writer.shard = shard
prune(sys.argv[1], sys.argv[2], method="mone", stats=sys.argv[3], experts=5)
"""


def test_a_killed_run_resumes_to_the_same_bytes(tiny_checkpoint, tmp_path):
    """Two shards of four were there."""
    from transformers import AutoModelForCausalLM

    folder, path = tmp_path / "sharded", tmp_path / "x.stats"
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen3_moe"), dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="60KB")
    measure(Model.open(folder), sequences(), torch.float32).save(path)
    how = {"method": "mone", "stats": path, "experts": 5}
    prune(folder, tmp_path / "whole", **how)
    command = [sys.executable, "-c", KILLED, folder, tmp_path / "out", path]
    assert subprocess.run(command, env=os.environ, check=False).returncode == 9
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    prune(folder, tmp_path / "out", resume=True, **how)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")


@pytest.mark.parametrize("removed", ["null", "constant"])
def test_verify_accounts_for_it(measured, tmp_path, removed):
    """Every tensor, and the original's logits with the same experts replaced; one changed constant is found."""
    folder, path = measured("gpt_oss")
    prune(folder, tmp_path / "out", method="reap", stats=path, experts=5, removed=removed)
    found = verify(tmp_path / "out", against=folder)
    assert found["ok"], found
    detail = {check["name"]: check["detail"] for check in found["checks"]}
    assert "routers keep rows" in detail["loads in stock transformers"]
    assert "4 routers" in detail["logits equal the masked original"]
    if removed == "constant":
        assert "4 with constants added" in detail["accounts for every tensor"]
        tensors, config = tiny.read(tmp_path / "out")
        name = next(n for n in tensors if n.endswith("constants"))
        tensors[name][0, 0] += 1
        tiny.write(tmp_path / "out", tensors, config)
        found = verify(tmp_path / "out", against=folder)
        assert not found["ok"] and any(name in check["detail"] for check in found["checks"])


def test_inspect_counts_constants(measured, tmp_path):
    """Three rows of 32 float32 values in each of 4 layers."""
    folder, path = measured("qwen3_moe")
    prune(folder, tmp_path / "out", method="mone", stats=path, experts=5)
    found = inspect(tmp_path / "out")
    assert found["roles"]["constant"] == {"tensors": 4, "parameters": 4 * 3 * 32, "bytes": 4 * 3 * 32 * 4}
    assert set(found["experts"].values()) == {5}


def test_neither_top_k_nor_groups_bind_what_is_stored(measured, tmp_path):
    """One expert may stay of a model that chooses two within one of two groups: the router is whole."""
    folder, path = measured("deepseek_v3")
    with pytest.raises(CoterieError, match="2 are chosen per token"):
        prune(folder, tmp_path / "out", method="reap", stats=path, experts=1)
    report = prune(folder, tmp_path / "out", method="reap", stats=path, experts=1, removed="null")
    assert all(len(layer["kept"]) == 1 for layer in report.plan["layers"].values())
    assert verify(tmp_path / "out", against=folder)["ok"]


def test_norm_changes_are_signed_and_null_keeps_the_router(tiny_checkpoint, tmp_path):
    """Rows 1 and 6 shrank, row 3 grew: 1 and 6 go, and all eight rows stay."""
    base, model = tiny_checkpoint("olmoe"), tmp_path / "model"
    tensors, config = tiny.read(base)
    for block in Model.open(base).main:
        rows = tensors[block.router] = tensors[block.router].copy()
        rows[[1, 6, 3]] *= np.array([[0.5], [0.6], [9.0]], np.float32)
    tiny.write(model, tensors, config)
    report = prune(model, tmp_path / "out", method="router-norm-change", base=base, removed="null", dry_run=True)
    assert report.plan["layers"]["0"] == {"kept": [0, 2, 3, 4, 5, 7], "removed": "null"}


def test_experts_that_no_token_chose_give_zero_and_it_is_said(tiny_checkpoint, tmp_path):
    """Two tokens reach at most four of eight experts."""
    folder, path = tiny_checkpoint("olmoe"), tmp_path / "x.stats"
    measure(Model.open(folder), {"x": [(5, 6)]}, torch.float32).save(path)
    report = prune(folder, tmp_path / "out", method="mone", stats=path, experts=4)
    assert any("chosen by no calibration token: their constants are zero" in w for w in report.report["warnings"])
    out = Model.open(tmp_path / "out")
    assert all((out.checkpoint.read(b.constants) == 0).all(axis=1).any() for b in out.main)


def test_the_layout_is_announced_before_the_work(measured, tmp_path, caplog):
    """In the log, once; nothing where the result is a stock checkpoint."""
    folder, path = measured("olmoe")
    prune(folder, tmp_path / "a", method="mone", stats=path, experts=6, dry_run=True)
    assert [r.getMessage() for r in caplog.records if "coterie.load" in r.getMessage()]
    caplog.clear()
    prune(folder, tmp_path / "b", method="reap", stats=path, experts=6, dry_run=True)
    assert not caplog.records


def test_from_data_to_logits(tiny_checkpoint, tmp_path):
    """`collect`, `prune --method mone`, `verify`: as on the command line."""
    folder = tiny_checkpoint("qwen2_moe")
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"input_ids": list(s)}) for s in every(sequences())))
    collect(folder, tmp_path / "x.stats", data={"x": tmp_path / "x.jsonl"}, samples=6)
    report = prune(folder, tmp_path / "out", method="mone", stats=tmp_path / "x.stats", ratio=0.25)
    assert report.report["stability"] == report.plan["budget"]["stability"] and report.report["guard"] == "on"
    assert verify(tmp_path / "out", against=folder)["ok"]


# --- super experts in stun ---------------------------------------------------------------------------------------


def super_stats(folder, path, layer, expert):
    """Statistics in which one expert's outputs are extreme, and by which it is used least."""
    model = Model.open(folder)
    stats = Stats(model.checkpoint.hash, {"x": 4})
    for block in model.main:
        tokens, largest = np.full((2, E), 9.0), np.ones((2, E))
        if block.key == layer:
            tokens[:, expert], largest[:, expert] = 1, 300
        for name, values in (("tokens", tokens), ("output_max", largest)):
            stats.add("x", block.key, name, values)
    stats.save(path)
    return path


def alike(tmp_path):
    """A model in whose layers experts 2 and 6 are nearest to each other."""
    rows = 5 * np.random.default_rng(0).normal(size=(8, 4))
    rows[6] = rows[2] + 0.01
    return qwen(tmp_path / "model", routers=[rows] * 2)


@pytest.mark.parametrize("linkage", ["complete", "official"])
def test_stun_keeps_super_experts_where_statistics_exist(tmp_path, linkage):
    """Of 2 and 6 the more used stays; but 6, super in layer 1, is a cluster of its own there."""
    model = alike(tmp_path)
    path = super_stats(model, tmp_path / "x.stats", "1", 6)
    how = {"method": "stun", "experts": 7, "stats": path, "linkage": linkage, "dry_run": True}
    guarded, free = prune(model, tmp_path / "out", **how), prune(model, tmp_path / "out", no_guard=True, **how)
    layers = guarded.plan["layers"]
    assert 6 in layers["1"]["kept"] and [6] in layers["1"]["clusters"]
    assert guarded.report["guarded"] == [["1", 6, 300.0]] and guarded.report["guard"] == "on"
    assert any("layer 1 expert 6" in w for w in guarded.report["warnings"])
    assert free.plan["layers"]["0"]["clusters"] == layers["0"]["clusters"]
    assert 6 not in free.plan["layers"]["1"]["kept"] and free.report["guarded"] == []
    assert free.report["guard"] == "off: --no-guard"


def test_stun_without_statistics_says_that_nothing_is_guarded(tmp_path):
    """They are known from data alone."""
    report = prune(alike(tmp_path), tmp_path / "out", experts=7, dry_run=True).report
    assert report["guard"] == "off: without statistics no super experts are known" and report["stability"] is None


def test_more_super_experts_than_clusters_are_refused(tmp_path):
    """Both of two routing choices in one cluster cannot both stay."""
    from coterie.decide.clusters import Clusterer
    from coterie.decide.criteria import Task
    from coterie.decide.pruning import Pruning, Remaining
    from coterie.model.experts import read_layer
    from coterie.storage.record import no_progress

    source = Model.open(alike(tmp_path))
    layers = {b: read_layer(source.checkpoint, b) for b in source.main}
    guarded = {source.main[1]: [1, 2, 5]}
    asked = Pruning(remaining=Remaining(experts=2))
    clusterer = Clusterer(Task(layers, 2, 1), asked, guarded, floor=2, dry_run=True)
    with pytest.raises(CoterieError, match=r"layer 1: more super experts than the 2 experts that stay.*--no-guard"):
        clusterer.decide(None, no_progress)


def test_the_verb_stun_guards_too(tiny_checkpoint, tmp_path):
    """An expert that STUN would drop stays once its outputs are extreme, unless --no-guard."""
    folder, data = tiny_checkpoint("qwen3_moe"), tmp_path / "x.jsonl"
    data.write_text(json.dumps({"input_ids": list(range(3, 30))}))
    plain = stun(folder, tmp_path / "out", sparsity=0.5, data={"x": data}, dry_run=True).plan["layers"]["1"]["kept"]
    gone = next(e for e in range(E) if e not in plain)
    path = super_stats(folder, tmp_path / "x.stats", "1", gone)
    how = {"sparsity": 0.5, "stats": path, "data": {"x": data}, "dry_run": True}
    guarded, free = stun(folder, tmp_path / "out", **how), stun(folder, tmp_path / "out", no_guard=True, **how)
    assert gone in guarded.plan["layers"]["1"]["kept"] and guarded.report["guarded"] == [["1", gone, 300.0]]
    assert gone not in free.plan["layers"]["1"]["kept"] and free.options["no_guard"] is True


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"method": "reap", "removed": "zero"}, "--removed 'zero': unknown; expected one of remove, null, constant"),
        ({"method": "stun", "removed": "null"}, "--removed null: stun chooses experts that take over"),
        ({"method": "naee-greedy", "removed": "null"}, "--removed null: naee-greedy chooses experts that take over"),
        ({"method": "random", "removed": "constant"}, "--removed constant needs mean outputs"),
        ({"method": "mone"}, "--method mone decides by statistics"),
        ({"method": "stun", "no_guard": True}, "--no-guard would be ignored: without statistics"),
        ({"method": "random", "removed": "null", "experts": 0}, "--experts 0"),
    ],
)
def test_options_that_contradict_are_refused(tmp_path, options, fault):
    """Before anything is read or written."""
    with pytest.raises(CoterieError, match=fault):
        prune(qwen(tmp_path / "model"), tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("layer", "rest", "fault"),
    [
        ({"removed": "gone"}, {}, "`removed` 'gone': unknown"),
        ({"removed": "alias"}, {}, "alias needs `clusters`"),
        ({"removed": "null", "clusters": [[1], [4], [6]]}, {}, "null and constant have none"),
        ({"removed": "alias", "clusters": [[1], [4], [6]]}, {}, "expert 0 is in no cluster"),
        ({"constants": "0" * 64}, {}, "expected a SHA-256 beside `removed`"),
        ({"removed": "constant", "constants": "x"}, {}, "expected a SHA-256 beside `removed`"),
        ({"removed": "constant"}, {}, "do not say from where"),
        ({"removed": "constant"}, {"constants": {"stats": 3}}, "must say of which `stats`"),
        ({"removed": "constant"}, {"constants": {"stats": "x", "weights": {"a": -1}}}, "must say of which `stats`"),
        ({"removed": "constant"}, {"constants": {"stats": "missing.stats"}}, r"missing\.stats"),
    ],
)
def test_plans_that_cannot_be_executed_are_refused(tiny_checkpoint, tmp_path, layer, rest, fault):
    """By the layer and what is wrong with it, before anything is written."""
    plan = {"layers": {"0": {"kept": KEPT, **layer}}, **rest}
    with pytest.raises(CoterieError, match=fault):
        apply(tiny_checkpoint("olmoe"), plan, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("model_type", ["arctic", "dbrx", "jetmoe", "llama4_text", "aria"])
def test_families_that_cannot_be_served_so_are_refused(tiny_checkpoint, tmp_path, model_type):
    """No stock class, experts that the registry does not see, a text model inside another: nothing is written."""
    folder = tiny_checkpoint(model_type)
    with pytest.raises(CoterieError, match=r"remove"):
        apply(folder, plan_of(folder, removed="null"), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "routes",
    [3, {"0": 3}, {"0": []}, {"0": [0.5]}, {"0": [0, 1, 2, 3]}, {"0": [-1, 0, -1, -1, 1, -1, 1, -1]}, {"9": [0]}],
)
def test_configs_that_lead_nowhere_are_refused(tiny_checkpoint, tmp_path, routes):
    """Whatever stands in config.json, the answer is a model or our error."""
    folder = tiny_checkpoint("olmoe")
    apply(folder, plan_of(folder, removed="null"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["coterie"]["routes"] = routes
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CoterieError):
        load(tmp_path / "out")
    assert not verify(tmp_path / "out")["ok"]


def test_what_is_routed_already_needs_its_original(tiny_checkpoint, tmp_path):
    """No second plan on top of the first."""
    folder = tiny_checkpoint("olmoe")
    apply(folder, plan_of(folder, removed="null"), tmp_path / "out")
    with pytest.raises(CoterieError, match="router"):
        prune(tmp_path / "out", tmp_path / "again", method="first", experts=2)
    assert not list(tmp_path.glob("again*"))
