"""`merge`: clusters by hand and against slow ones, weights, alignment, both routers, statistics, refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import coterie
import slow_merge
import tiny
from coterie.decide import merging
from coterie.edits.kinds.merge import Members
from coterie.edits.plan import Choice, read_plan
from coterie.errors import CoterieError
from coterie.forward.measure import measure
from coterie.methods import align
from coterie.methods import merge as methods
from coterie.methods.merge import hc_smoe, m_smoe
from coterie.model.experts import expert_biases, read_layer, store_expert
from coterie.model.layer import Model
from coterie.model.loading import load, load_stock
from coterie.model.stats import SUMS, Stats
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.apply import apply
from coterie.verbs.collect import collect
from coterie.verbs.merge import merge
from coterie.verbs.verify import verify
from handmade import deepseek, file_bytes, qwen, read_all
from test_cli import coterie as command

FAMILIES = ("qwen2_moe", "mixtral", "qwen3_moe", "deepseek_v3", "olmoe")
RUNS = [*((family, "hc-smoe") for family in FAMILIES), ("deepseek_v3", "m-smoe")]  # where both methods do alike
E = 8
HEADS = {"num_attention_heads": 1, "num_key_value_heads": 1}  # without them a model of width 4 cannot be built


def sequences(seed=0):
    """Two domains of token sequences."""
    draw = np.random.default_rng(seed)
    lengths = {"prose": (24, 7, 13), "code": (9, 30)}
    return {name: [tuple(draw.integers(3, tiny.VOCABULARY, n).tolist()) for n in ns] for name, ns in lengths.items()}


def every(given):
    return [sample for samples in given.values() for sample in samples]


def files(folder, given):
    """One JSONL file of token ids per domain."""
    folder.mkdir(exist_ok=True)
    for name, samples in given.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"input_ids": list(s)}) for s in samples))
    return {name: folder / f"{name}.jsonl" for name in given}


def num_groups(folder):
    model = Model.open(folder)
    return model.family.groups(model.checkpoint.config).num_groups


# --- by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([0, 2, 5, 8.5], [[0, 1], [2, 3]]),  # 5 is 4 from {0, 2} on average and 3.5 from 8.5; by the nearest it is 3
        ([0, 2, 5, 9.5], [[0, 1, 2], [3]]),  # 5 is 4 from {0, 2} on average and 4.5 from 9.5; by the farthest it is 5
    ],
    ids=["not single linkage", "not complete linkage"],
)
def test_hc_smoe_agglomerates_mean_outputs_by_average_linkage(points, expected):
    """Four experts on a line: 0 and 2 join first; where the third goes tells average linkage from the two others."""
    sums = np.array([[10.0 * p, 0.0] for p in points])  # of ten tokens
    assert hc_smoe.cluster(2, np.array(10.0), sums) == expected


def test_hc_smoe_keeps_clones_together():
    """Equal mean outputs are at distance 0, and join before all others."""
    outputs = np.array([[1.0, 2.0], [5.0, 5.0], [1.0, 2.0], [5.0, 5.1]])
    assert hc_smoe.cluster(3, np.array(7.0), outputs) == [[0, 2], [1], [3]]


def test_m_smoe_joins_each_expert_to_the_dominant_one_of_most_similar_logits():
    """Of usage 5, 1, 4, 0, 2 the experts 0 and 2 dominate; by angle 1 and 4 join 2, and 3, opposite to 2, joins 0."""
    logits = np.array([[1.0, 0.0], [1.0, 2.0], [0.0, 3.0], [0.0, -1.0], [0.1, 1.0]]).T  # (T, E)
    assert m_smoe.cluster(2, np.array([5.0, 1, 4, 0, 2]), logits.T @ logits) == [[0, 3], [1, 2, 4]]


def test_ties_go_to_lower_ids():
    """Of equal usage the lower ids dominate, and of equally near dominant experts the lower is joined."""
    assert m_smoe.cluster(2, np.ones(4), np.ones((4, 4))) == [[0, 2, 3], [1]]


def test_an_expert_without_logits_is_like_none():
    """Its cosine is 0, not NaN: it joins one that is not opposite."""
    assert m_smoe.cosines(np.array([[4.0, 0.0], [0.0, 0.0]])).tolist() == [[1, 0], [0, 0]]


def test_shares_and_leaders():
    """Three tokens and one make 3/4 and 1/4; no tokens make halves; the most used stands for the cluster."""
    tokens = np.array([1.0, 0.0, 3.0, 0.0])
    assert methods.shares([0, 2], tokens) == (0.25, 0.75) and methods.leader([0, 2], tokens) == 2
    assert methods.shares([1, 3], tokens) == (0.5, 0.5) and methods.leader([1, 3], tokens) == 1


@given(arrays.arrays(float, (6, 3), elements=st.integers(-40, 40).map(float)), st.integers(1, 6))
def test_clusters_of_any_vectors_have_the_asked_number(outputs, count):
    """A partition of all experts, ordered, whatever ties and clones there are; by both methods."""
    products, tokens = outputs @ outputs.T, np.abs(outputs).sum(axis=1)
    for clusters in (hc_smoe.cluster(count, np.array(1.0), outputs), m_smoe.cluster(count, tokens, products)):
        assert sorted(e for c in clusters for e in c) == list(range(6)) and len(clusters) == count
        assert clusters == sorted(sorted(c) for c in clusters)


@given(st.integers(0, 10**6), st.integers(1, 7))
def test_clusters_of_random_vectors_equal_the_slow_ones(seed, count):
    """By loops over clusters and over tokens."""
    draw = np.random.default_rng(seed)
    means, logits, tokens = draw.normal(size=(7, 4)), draw.normal(size=(9, 7)), draw.integers(0, 5, 7).astype(float)
    assert hc_smoe.cluster(count, np.array(3.0), 3 * means) == slow_merge.hc_smoe(means, count)
    assert m_smoe.cluster(count, tokens, logits.T @ logits) == slow_merge.m_smoe(tokens, logits, count)


# --- against the slow way ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tiny_checkpoint):
    """`seen(model_type)`: what calibration should find in a tiny checkpoint, computed once."""
    found = {}

    def get(model_type):
        if model_type not in found:
            found[model_type] = slow_merge.seen(tiny_checkpoint(model_type), every(sequences()))
        return found[model_type]

    return get


@pytest.mark.parametrize("model_type", [*FAMILIES, "gpt_oss"])
def test_outputs_on_all_tokens_equal_the_slow_ones(tiny_checkpoint, tmp_path, seen, model_type):
    """Though the last map sees sums alone, biases included; in memory and mapped to files alike."""
    model, given = Model.open(tiny_checkpoint(model_type)), sequences()
    found = measure(model, given, torch.float32, extra=("all_outputs", "logit_products"))
    again = measure(model, given, torch.float32, extra=("all_outputs", "logit_products"), spill=tmp_path, budget=0)
    for key, layer in seen(model_type).items():
        means = found.get(key, "all_outputs") / found.get(key, "num_tokens")
        np.testing.assert_allclose(means, layer.means, rtol=1e-5, atol=1e-5 * np.abs(layer.means).max())
        assert np.array_equal(found.get(key, "tokens"), layer.tokens)
        products = found.get(key, "logit_products")
        np.testing.assert_allclose(np.diag(products), found.get(key, "logits_squared"), rtol=1e-12)
        expected = layer.logits.T @ layer.logits
        np.testing.assert_allclose(products, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        for name in ("all_outputs", "logit_products"):
            np.testing.assert_allclose(again.get(key, name), found.get(key, name), rtol=1e-12)


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("model_type", FAMILIES)
def test_clusters_and_weights_equal_the_slow_ones_and_load_in_stock_transformers(
    tiny_checkpoint, tmp_path, seen, model_type, method
):
    """Experts, router rows and biases are means weighted by tokens; experts leave the file; every key fits."""
    folder, out = tiny_checkpoint(model_type), tmp_path / "out"
    data = files(tmp_path / "data", sequences())
    report = merge(folder, out, method=method, experts=4, data=data, samples=6)
    before, after = Model.open(folder), Model.open(out)
    for block, new in zip(before.main, after.main, strict=True):
        layer, choice = seen(model_type)[block.key], read_plan(report.plan).layers[block.key]
        expected = slow_merge.clusters(layer, method, 4, num_groups(folder))
        assert sorted(map(list, choice.clusters)) == sorted(expected)
        assert list(choice.kept) == sorted(choice.kept)
        _check_weights(before, block, after, new, choice, layer.tokens)
    assert load_stock(out, "float32")[1] == {}
    found = verify(out, against=folder)
    assert found["ok"], found
    assert report.report["after"]["experts"] == 4 and report.report["sparsity"]["experts"] == 0.5
    assert out.joinpath("model.safetensors").stat().st_size < folder.joinpath("model.safetensors").stat().st_size


def _check_weights(before, block, after, new, choice, tokens):
    """Every tensor with one entry an expert is the mean of the cluster's, to float32."""
    for i, cluster in enumerate(choice.clusters):
        assert choice.kept[i] == min(cluster, key=lambda e: (-tokens[e], e))
        used = [tokens[e] for e in cluster]
        for key, name in new.experts[i].items():
            values = [before.checkpoint.read(block.experts[e][key]) for e in cluster]
            _close(after.checkpoint.read(name), slow_merge.average(values, used))
        for old, name in zip((block.router, *block.rows), (new.router, *new.rows), strict=True):
            values = [before.checkpoint.read(old)[e] for e in cluster]
            _close(after.checkpoint.read(name)[i], slow_merge.average(values, used))


def _close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


# --- what must not change ----------------------------------------------------------------------------------


def spelled(folder):
    """A checkpoint's arrays and config, and for its MoE layers the block that names them."""
    tensors, config = tiny.read(folder)
    return tensors, config, {block.key: block for block in Model.open(folder).main}


def clone(tensors, block, source, target):
    """Expert `target` becomes a copy of `source`; its router row does not."""
    for key, name in block.experts[source].items():
        tensors[block.experts[target][key]] = tensors[name].copy()


@pytest.mark.parametrize(("model_type", "method"), RUNS)
def test_clones_that_no_token_chooses_merge_without_a_trace(tiny_checkpoint, tmp_path, model_type, method):
    """Expert 5 is a copy of 4 whose row every token dislikes: of share 0 in the mean, of weight 0 in the softmax.

    Measured on the tokens that are compared, so that no other expert without tokens is chosen there.
    """
    tensors, config, blocks = spelled(tiny_checkpoint(model_type))
    for name in tensors:
        if "embed_tokens" in name:
            tensors[name][:, 0] = 50.0  # every token has much of channel 0, through all layers
    for block in blocks.values():
        for target in (5, 1) if num_groups(tiny_checkpoint(model_type)) > 1 else (5,):
            clone(tensors, block, target - 1, target)
            tensors[block.router][:, 0] = 0.0
            tensors[block.router][target] = 0.0
            tensors[block.router][target, 0] = -50.0
            for row in block.rows:
                tensors[row][target] = -5.0
    model, count = tiny.write(tmp_path / "model", tensors, config), E - num_groups(tiny_checkpoint(model_type))
    tokens = np.random.default_rng(1).integers(3, tiny.VOCABULARY, (2, 24)).tolist()  # as in tiny.logits
    data = files(tmp_path / "data", {"x": tokens})
    report = merge(model, tmp_path / "out", method=method, experts=count, data=data, samples=2)
    if method == "hc-smoe":
        assert all([4, 5] in layer["clusters"] for layer in report.plan["layers"].values())
    before, after = tiny.logits(model), tiny.logits(tmp_path / "out")
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * np.abs(before).max())


def published(folder, out, plan, target):
    """What the published program saves: every member of a cluster replaced by its mean, the router as it was."""
    tensors, config, blocks = spelled(folder)
    merged, _ = tiny.read(out)
    for key, block in blocks.items():
        for i, cluster in enumerate(plan["layers"][key]["clusters"]):
            for e in cluster:
                for part, name in block.experts[e].items():
                    tensors[name] = merged[f"{block.prefix}{block.layout.experts}{i}.{part}"]
    return tiny.write(target, tensors, config)


def ours(folder):
    """Logits of a folder in our own layout, as `tiny.logits` of a stock one."""
    tokens = np.random.default_rng(1).integers(3, tiny.VOCABULARY, (2, 24))
    with torch.inference_mode():
        return load(folder, dtype="float32")(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()


@pytest.mark.parametrize(("model_type", "method"), RUNS)
def test_aliased_routers_compute_what_the_published_duplicates_do(tiny_checkpoint, tmp_path, model_type, method):
    """E router rows, three experts: logits of the model with every member replaced by its mean, in half the bytes."""
    folder, out = tiny_checkpoint(model_type), tmp_path / "out"
    report = merge(
        folder, out, method=method, experts=3, router="alias", data=files(tmp_path / "data", sequences()), samples=6
    )
    duplicates = published(folder, out, report.plan, tmp_path / "duplicates")
    np.testing.assert_allclose(ours(out), tiny.logits(duplicates), rtol=1e-4, atol=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "coterie" and set(config["coterie"]["num_experts"].values()) == {3}
    before, after = read_all(folder), read_all(out)
    for block in Model.open(folder).main:
        assert np.array_equal(after[block.router], before[block.router])
        choice = report.plan["layers"][block.key]
        routes = config["coterie"]["routes"][block.key]
        assert all(routes[e] == i for i, cluster in enumerate(choice["clusters"]) for e in cluster)
    found = verify(out, against=folder)
    assert found["ok"], found
    assert report.report["after"]["bytes"] < report.report["before"]["bytes"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_identical_experts_alias_without_a_trace(tiny_checkpoint, tmp_path, model_type):
    """Eight experts of which each second copies the one before, all with rows of their own: four are stored."""
    tensors, config, blocks = spelled(tiny_checkpoint(model_type))
    for block in blocks.values():
        for e in range(0, E, 2):
            clone(tensors, block, e, e + 1)
    model, out = tiny.write(tmp_path / "model", tensors, config), tmp_path / "out"
    report = merge(model, out, experts=4, router="alias", data=files(tmp_path / "data", sequences()), samples=6)
    assert all(v["clusters"] == [[0, 1], [2, 3], [4, 5], [6, 7]] for v in report.plan["layers"].values())
    before = tiny.logits(model)
    np.testing.assert_allclose(ours(out), before, rtol=1e-5, atol=1e-5 * np.abs(before).max())


def test_aliases_may_cross_routing_groups_and_be_fewer_than_top_k(tiny_checkpoint, tmp_path):
    """The router is whole, so nothing binds what it leads to: two groups of four may lead to one expert in all."""
    model = tiny_checkpoint("deepseek_v3")
    stats = measured(tmp_path / "x.stats", model, layers=("1", "2", "3"), width=tiny.HIDDEN)
    report = merge(model, tmp_path / "out", experts=1, router="alias", stats=stats)
    assert report.plan["layers"]["1"]["clusters"] == [list(range(E))]
    assert np.isfinite(ours(tmp_path / "out")).all()
    with pytest.raises(CoterieError, match="keeps 1 experts, but 2 are chosen per token"):
        merge(model, tmp_path / "out2", experts=1, stats=stats)


# --- alignment ---------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_the_order_is_the_best_of_all(seed):
    """By trying every permutation of five neurons; a permuted copy comes back as it was."""
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(5, 3)).astype(np.float32), draw.normal(size=(5, 3)).astype(np.float32)
    assert tuple(align.order(a, b)) == slow_merge.best_order(a, b)
    mixed = a[draw.permutation(5)]
    assert np.array_equal(mixed[align.order(a, mixed)], a)


HUB = [(name, False) for name in ("mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "nemotron_h", "dbrx")]


@pytest.mark.parametrize(("model_type", "fused"), [*HUB, ("qwen3_moe", True), ("gpt_oss", True)])
def test_permuted_copies_are_lined_up_in_every_layout(tiny_checkpoint, tmp_path, model_type, fused):
    """Expert 3 is expert 6 with its neurons in another order: aligned, their mean is expert 6, biases included."""
    folder = shutil.copytree(tiny_checkpoint(model_type, fused), tmp_path / "model")
    block = Model.open(folder).main[0]
    permute(folder, block, 6, 3, np.random.default_rng(2))
    model = Model.open(folder)
    keys = list(model.moe[0].experts[0]) if block.experts else block.fused
    for aligned in (True, False):
        choice = Choice((6,), ((3, 6),), merged=True, aligned=aligned)
        members = Members(model.checkpoint, model.main[0], choice)
        one = members.numbered if block.experts else members.fused
        same = [all(np.array_equal(a, b) for a, b in [tuple(one(0, key))]) for key in keys]
        assert all(same) if aligned else not all(same), keys


def permute(folder, block, source, target, draw):
    """Writes expert `source` with permuted neurons into the place of `target`, in the file."""
    checkpoint = Checkpoint.open(folder)
    gate, up, down = read_layer(checkpoint, block).experts[source]
    order = draw.permutation(len(up))
    for name, offset, raw in store_expert(
        checkpoint, block, target, (None if gate is None else gate[order], up[order], down[:, order])
    ):
        poke(checkpoint, name, offset, raw)
    first, second = expert_biases(checkpoint, block, source)
    if first is not None:
        parts = first.reshape(-1, len(up))[:, order]
        stored = parts.T.ravel() if block.layout.interleaved else parts.ravel()
        names = [n for n in block.fused if n.endswith("_bias")]
        for name, values in zip(sorted(names, key=lambda n: "down" in n), (stored, second), strict=True):
            poke(checkpoint, name, target * values.nbytes, values.tobytes())


def poke(checkpoint, name, offset, raw):
    tensor = checkpoint.tensors[name]
    with (checkpoint.path / tensor.file).open("r+b") as file:
        file.seek(tensor.start + offset)
        file.write(raw)


def test_align_makes_a_mean_of_permuted_experts_that_computes(tiny_checkpoint, tmp_path):
    """Experts in pairs that differ in the order of their neurons alone: aligned and aliased, nothing is lost."""
    model, data = shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "model"), files(tmp_path / "d", sequences())
    draw = np.random.default_rng(0)
    for block in Model.open(model).main:
        for e in range(0, E, 2):
            permute(model, block, e, e + 1, draw)
    before, gaps = tiny.logits(model), {}
    for aligned in (True, False):
        out = tmp_path / f"out-{aligned}"
        report = merge(model, out, experts=4, router="alias", align=aligned, data=data, samples=6)
        assert report.plan["layers"]["0"]["clusters"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        gaps[aligned] = np.abs(ours(out) - before).max() / np.abs(before).max()
        assert verify(out, against=model)["ok"]
    assert gaps[True] < 1e-5 and gaps[False] > 1e-2


# --- statistics, plans, refusals ---------------------------------------------------------------------------


def measured(path, model, num_experts=E, layers=("0", "1"), width=4, **sums):
    """A statistics file with what merging reads, random but for the sums given."""
    draw = np.random.default_rng(0)
    stats = Stats(Checkpoint.open(model).hash, {"x": 4, "y": 2})
    for domain in stats.samples:
        for layer in layers:
            z = draw.normal(size=(20, num_experts))
            found = {
                "num_tokens": np.array(20.0),
                "tokens": draw.integers(1, 9, num_experts).astype(float),
                "output_max": np.ones(num_experts),
                "all_outputs": draw.normal(size=(num_experts, width)),
                "logit_products": z.T @ z,
            } | sums
            for name, value in found.items():
                stats.add(domain, layer, name, np.stack([value, value]))
    stats.save(path)
    return path


@pytest.mark.parametrize("method", methods.names())
def test_statistics_of_collect_merge_as_data_do(tiny_checkpoint, tmp_path, method):
    """`collect --merging`, then `merge --stats`, writes what `merge --data` writes; other files hold no more sums."""
    folder, data = tiny_checkpoint("mixtral"), files(tmp_path / "data", sequences())
    found = collect(folder, tmp_path / "x.stats", data=data, samples=6, merging=True)
    assert found["options"]["merging"] is True
    collect(folder, tmp_path / "plain.stats", data=data, samples=6)
    assert {name for _, _, name in Stats.load(tmp_path / "plain.stats").sums} == set(SUMS)
    merge(folder, tmp_path / "a", method=method, stats=tmp_path / "x.stats", experts=3)
    merge(folder, tmp_path / "b", method=method, data=data, samples=6, experts=3)
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")
    with pytest.raises(CoterieError, match=r"plain\.stats: holds no '.*', which .* `coterie collect --merging`"):
        merge(folder, tmp_path / "c", method=method, stats=tmp_path / "plain.stats", experts=3)


@pytest.mark.parametrize("options", [{}, {"align": True}, {"router": "alias"}], ids=["mean", "aligned", "alias"])
def test_a_plan_replays_to_the_same_bytes(tmp_path, options):
    """`apply` of coterie.json, and a resumed run, write what the run itself wrote; a dry run writes nothing."""
    model = qwen(tmp_path / "model", num_shards=3, **HEADS)
    stats = measured(tmp_path / "x.stats", model)
    dry = merge(model, tmp_path / "a", stats=stats, ratio=0.5, dry_run=True, **options)
    assert not (tmp_path / "a").exists()
    report = merge(model, tmp_path / "a", stats=stats, ratio=0.5, **options)
    assert dry.plan == report.plan and len(report.plan["layers"]["0"]["kept"]) == 4
    apply(model, tmp_path / "a" / "coterie.json", tmp_path / "b")
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")
    again = merge(model, tmp_path / "a", stats=stats, ratio=0.5, resume=True, **options)
    assert again.plan == report.plan


def test_domains_count_as_often_as_their_weights_say(tmp_path):
    """With weight 0 for y, clusters and shares are those of x alone."""
    model = qwen(tmp_path / "model")
    stats = Stats.load(measured(tmp_path / "x.stats", model))
    report = merge(model, tmp_path / "out", stats=tmp_path / "x.stats", weights="y=0", experts=3)
    alone = Stats(stats.model, {"x": 4}, {key: value for key, value in stats.sums.items() if key[0] == "x"})
    alone.save(tmp_path / "alone.stats")
    again = merge(model, tmp_path / "b", stats=tmp_path / "alone.stats", experts=3)
    assert report.plan["layers"] == again.plan["layers"]
    with pytest.raises(CoterieError, match="domain 'z' is not in the statistics; they hold x, y"):
        merge(model, tmp_path / "c", stats=tmp_path / "x.stats", weights="z=1")


def test_clusters_stay_inside_routing_groups(tmp_path):
    """Four groups of four become four of three, though all outputs but one group's are equal."""
    model, outputs = deepseek(tmp_path / "model"), np.zeros((16, 4))
    outputs[:4] = np.arange(4)[:, None]
    stats = measured(tmp_path / "x.stats", model, 16, layers=("0",), all_outputs=outputs)
    report = merge(model, tmp_path / "out", stats=stats, experts=12)
    clusters = report.plan["layers"]["0"]["clusters"]
    assert [sum(min(c) // 4 == max(c) // 4 == g for c in clusters) for g in range(4)] == [3, 3, 3, 3]


def test_what_the_report_says(tmp_path):
    """The largest clusters, how stable pairs are between halves (here equal), and super experts that were averaged."""
    model, largest = qwen(tmp_path / "model", layers=1), np.ones(E)
    largest[7] = 500
    outputs = np.zeros((E, 4))
    outputs[:4] = 100 * np.arange(4)[:, None]
    stats = measured(tmp_path / "x.stats", model, layers=("0",), output_max=largest, all_outputs=outputs)
    report = merge(model, tmp_path / "out", stats=stats, experts=4)
    assert report.report["largest_clusters"] == {"0": 5}
    assert report.plan["budget"]["stability"]["mean"] == 1
    said = "super experts are averaged with others, which may cost much: layer 0 expert 7"
    assert said in report.report["warnings"]


def test_unmeasured_layers_are_cut_not_merged(tmp_path):
    """A multi-token-prediction layer keeps its longest router rows, which is said; under an alias it stays whole."""
    model = qwen(tmp_path / "model", layers=3, num_nextn_predict_layers=1, num_hidden_layers=2, **HEADS)
    stats = measured(tmp_path / "x.stats", model)
    report = merge(model, tmp_path / "out", stats=stats, experts=6)
    assert merging.UNMEASURED + merging.LONGEST in report.report["warnings"]
    block = Model.open(model).moe[-1]
    assert block.mtp and "merged" not in report.plan["layers"][block.key]
    norms = np.linalg.norm(read_all(model)[block.router], axis=1)
    assert report.plan["layers"][block.key]["kept"] == sorted(np.argsort(-norms)[:6].tolist())
    aliased = merge(model, tmp_path / "aliased", stats=stats, experts=6, router="alias")
    assert set(aliased.plan["layers"]) == {"0", "1"}
    assert merging.UNMEASURED + merging.WHOLE in aliased.report["warnings"]


def test_statistics_of_another_model_are_refused(tmp_path):
    """By fingerprint, before anything is written."""
    model, other = qwen(tmp_path / "model"), qwen(tmp_path / "other", seed=1)
    with pytest.raises(CoterieError, match=r"x\.stats: collected on another model"):
        merge(model, tmp_path / "out", stats=measured(tmp_path / "x.stats", other))
    assert not list(tmp_path.glob("out*"))


def test_experts_of_unequal_shapes_are_refused(tmp_path):
    """There is no mean of matrices of different shapes: the tensor's expert is named, nothing is measured."""
    model = qwen(tmp_path / "model")
    stats = measured(tmp_path / "x.stats", model)
    tensors, config = tiny.read(model)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    tensors[name] = tensors[name][:-1].copy()
    odd = tiny.write(tmp_path / "odd", tensors, config)
    with pytest.raises(CoterieError, match=r"layer 1: expert 5 differs from expert 0 .* expected all alike"):
        merge(odd, tmp_path / "out", stats=stats)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"method": "average"}, "--method 'average': unknown; expected one of hc-smoe, m-smoe"),
        ({"router": "none"}, "--router 'none': unknown; expected one of mean, alias"),
        ({"ratio": 0.5, "experts": 4}, "say the same thing twice"),
        ({"ratio": 1.0}, r"must be in \[0, 1\)"),
        ({"experts": 9}, "--experts 9: the model has 8"),
        ({"experts": 0, "router": "alias"}, "--experts 0: the model has 8"),
        ({"experts": 1}, "keeps 1 experts, but 2 are chosen per token"),
        ({"samples": 4}, "--samples is of calibration and would be ignored"),
        ({"data": "x=x.txt"}, "x.txt"),
    ],
)
def test_options_are_checked_first(tmp_path, options, fault):
    """One line that says what was found and expected; nothing is written."""
    model = qwen(tmp_path / "model")
    stats = measured(tmp_path / "x.stats", model)
    with pytest.raises(CoterieError, match=fault):
        merge(model, tmp_path / "out", **{"stats": stats, **options})
    assert not list(tmp_path.glob("out*"))


def test_damaged_plans_are_refused(tmp_path):
    """Shares must match their clusters, and sum to one."""
    base = {"kept": [0, 2], "clusters": [[0, 1], [2]], "merged": True}
    for shares, fault in (
        ([[1.0], [1.0]], "one number for every member"),
        ([[0.5, 0.6], [1.0]], "sum to 1"),
        ([[0.5, float("nan")], [1.0]], "from 0 to 1"),
        ([[0.5, "a"], [1.0]], "from 0 to 1"),
        (3, "one number for every member"),
    ):
        with pytest.raises(CoterieError, match=fault):
            read_plan({"layers": {"0": base | {"shares": shares}}})
    with pytest.raises(CoterieError, match="of merged experts"):
        read_plan({"layers": {"0": {"kept": [0], "aligned": True}}})


def test_the_command(tmp_path, capsys):
    """`coterie merge` prints coterie.json and nothing else with --json; `coterie.merge` is the function."""
    model = qwen(tmp_path / "model")
    stats = measured(tmp_path / "x.stats", model)
    arguments = ("merge", model, tmp_path / "out", "--method", "m-smoe", "--experts", 6, "--stats", stats, "--json")
    code, out, _ = command(*arguments, capsys=capsys)
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "out" / "coterie.json").read_text())
    assert json.loads(out)["command"] == "merge" and coterie.merge is merge
