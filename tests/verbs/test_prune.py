"""`prune` from end to end on checkpoints made by hand: counts, budgets, choices, what is read and what is written."""

import json
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.decide.experts import num_kept
from coterie.decide.pruning import Remaining
from coterie.errors import CoterieError
from coterie.methods.prune import stun
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.prune import prune
from handmade import HIDDEN, MLP, WIDTH, block, deepseek, qwen, qwen_config, read_all, save

EXPERT = "model.layers.{}.mlp.experts.{}.{}.weight"
ROUTER = "model.layers.{}.mlp.gate.weight"
MERGING = {"method": "stun", "kappa": 3}


def kept(report):
    """Kept experts by layer."""
    return {int(key): layer["kept"] for key, layer in report.plan["layers"].items()}


def pairs_and_singles(num_layers=2):
    """Routers of eight experts: in layer 0 each expert 2i+1 almost repeats 2i; in layer 1 all are far apart."""
    close, far = np.zeros((8, HIDDEN)), np.zeros((8, HIDDEN))
    for e in range(8):
        close[e, 0] = 10 * (e // 2) + 0.01 * (e % 2) * (1 + e)
        far[e, 1] = 10 * e + e**2
    return [close, far][:num_layers]


# --- counts ------------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(0, 999))
def test_the_share_is_taken_in_decimal(num_experts, thousandths):
    """`floor(ratio * E)` experts go, for the ratio as it is written, not as binary fractions round it."""
    removed = math.floor(Fraction(thousandths, 1000) * num_experts)
    assert num_kept(Remaining(ratio=thousandths / 1000), num_experts) == num_experts - removed


def test_a_share_of_0_29_of_a_hundred_is_29(tmp_path):
    """0.29 * 100 is 28.999999999999996 in binary; 29 experts go all the same."""
    model = qwen(tmp_path / "model", experts=100, layers=1)
    report = prune(model, tmp_path / "out", method="first", ratio=0.29)
    assert kept(report) == {0: list(range(71))}
    assert report.report["after"]["experts"] == 71
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == 71


def test_the_default_share_is_a_quarter(tmp_path):
    """Of eight experts six stay, in every layer."""
    report = prune(qwen(tmp_path / "model"), tmp_path / "out")
    assert [len(k) for k in kept(report).values()] == [6, 6]


def test_a_count_instead_of_a_share(tmp_path):
    """`experts` names what stays."""
    report = prune(qwen(tmp_path / "model"), tmp_path / "out", experts=3)
    assert [len(k) for k in kept(report).values()] == [3, 3]


def test_nothing_to_remove_copies_the_model(tmp_path):
    """A ratio of 0 keeps every tensor as it is."""
    model = qwen(tmp_path / "model")
    report = prune(model, tmp_path / "out", ratio=0)
    assert report.report["sparsity"] == {"experts": 0, "linears": 0, "all": 0}
    before, after = read_all(model), read_all(tmp_path / "out")
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, math.nan, math.inf])
def test_a_share_outside_its_range(tmp_path, ratio):
    """The share lies in [0, 1)."""
    with pytest.raises(CoterieError, match=r"--ratio .*: the share of experts to remove must be in \[0, 1\)"):
        prune(qwen(tmp_path / "model"), tmp_path / "out", ratio=ratio)


@pytest.mark.parametrize("experts", [-1, 0, 9])
def test_a_count_outside_its_range(tmp_path, experts):
    """A layer keeps at least one and at most all of its experts."""
    with pytest.raises(CoterieError, match=f"--experts {experts}: the model has 8; expected 1 to 8"):
        prune(qwen(tmp_path / "model"), tmp_path / "out", experts=experts)


@pytest.mark.parametrize("count", [{"ratio": 0.9}, {"experts": 1}])
def test_fewer_experts_than_are_chosen_per_token(tmp_path, count):
    """Top-2 routing needs two experts; nothing is written."""
    with pytest.raises(CoterieError, match="keeps 1 experts, but 2 are chosen per token"):
        prune(qwen(tmp_path / "model"), tmp_path / "out", **count)
    assert not list(tmp_path.glob("out*"))


# --- routing groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["stun", "random", "router-norm"])
def test_groups_lose_equally_many(tmp_path, method):
    """Four groups of four: each keeps three of its own, and clusters stay inside their group."""
    model = deepseek(tmp_path / "model")
    report = prune(model, tmp_path / "out", method=method, experts=12)
    layer = report.plan["layers"]["0"]
    assert Counter(e // 4 for e in layer["kept"]) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert all(len({e // 4 for e in cluster}) == 1 for cluster in layer.get("clusters", []))
    bias = read_all(tmp_path / "out")["model.layers.0.mlp.gate.e_score_correction_bias"]
    assert bias.tolist() == layer["kept"]  # the bias of expert e is e


@pytest.mark.parametrize(("experts", "near"), [(13, "12 and 16"), (10, "8 and 12"), (15, "12 and 16"), (5, "8 and 12")])
def test_counts_that_break_groups_name_the_nearest_that_work(tmp_path, experts, near):
    """Four groups of at least two: 8, 12 and 16 work, and the refusal says which are near."""
    with pytest.raises(CoterieError, match=f"nearest that work: {near}"):
        prune(deepseek(tmp_path / "model"), tmp_path / "out", experts=experts)


def test_competing_groups_must_hold_top_k(tmp_path):
    """Two of four groups compete for six choices: three experts per group are the least."""
    model = deepseek(tmp_path / "model", top_k=6)
    with pytest.raises(CoterieError, match="nearest that work: 12 and 16"):
        prune(model, tmp_path / "out", experts=8)
    assert len(kept(prune(model, tmp_path / "out", experts=12))[0]) == 12


def test_groups_that_do_not_divide_the_experts_are_refused(tmp_path):
    """Sixteen experts in three groups is a config that lies."""
    with pytest.raises(CoterieError, match="16 experts in 3 routing groups"):
        prune(deepseek(tmp_path / "model", groups=3), tmp_path / "out", method="first", experts=12)


# --- a global budget ---------------------------------------------------------------------------------------

GLOBAL = {"budget": "global", "ratio": 0.25}


def test_one_height_for_all_layers_rounds_to_one_count(tmp_path):
    """All four removals would fall on layer 0's near-clones; stock configs hold one count, so both layers keep six."""
    report = prune(qwen(tmp_path / "model", routers=pairs_and_singles()), tmp_path / "out", **GLOBAL)
    budget = report.plan["budget"]
    assert budget["global"] == {"layer 0": 4, "layer 1": 8} and budget["rounded"]
    assert [len(k) for k in kept(report).values()] == [6, 6]
    assert 0 < budget["global_cost"] < budget["cost"]


def test_unequal_counts_can_be_refused(tmp_path):
    """`refuse` stops where rounding would be needed, and not where it would not."""
    with pytest.raises(CoterieError, match="keeps 4 to 8 experts"):
        prune(qwen(tmp_path / "model", routers=pairs_and_singles()), tmp_path / "out", **GLOBAL, non_uniform="refuse")
    same = [pairs_and_singles()[0]] * 2
    report = prune(qwen(tmp_path / "same", routers=same), tmp_path / "out", **GLOBAL, non_uniform="refuse")
    assert report.plan["budget"]["global"] == {"layer 0": 6, "layer 1": 6} and not report.plan["budget"]["rounded"]


def test_unequal_counts_in_our_own_layout(tmp_path):
    """`coterie` writes them under a model type that stock software refuses aloud, and we can read the result again."""
    model = qwen(tmp_path / "model", routers=pairs_and_singles())
    report = prune(model, tmp_path / "out", **GLOBAL, non_uniform="coterie")
    assert {layer: len(k) for layer, k in kept(report).items()} == {0: 4, 1: 8}
    clusters = report.plan["layers"]["0"]["clusters"]
    assert clusters == [[0, 1], [2, 3], [4, 5], [6, 7]]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "coterie" and config["coterie"]["model_type"] == "qwen2_moe"
    assert config["coterie"]["num_experts"] == {"0": 4, "1": 8}
    assert report.report["after"]["experts"] == {"0": 4, "1": 8}
    checkpoint = Checkpoint.open(tmp_path / "out")
    blocks = Model.of(checkpoint)
    assert [b.num_experts for b in blocks.moe] == [4, 8]
    with pytest.raises(CoterieError, match="layer 0 has 4; keep fewer"):
        prune(tmp_path / "out", tmp_path / "again", experts=6)


def test_a_floor_under_a_global_budget(tmp_path):
    """With five experts as the floor, layer 0 gives three and layer 1 the fourth."""
    model = qwen(tmp_path / "model", routers=pairs_and_singles())
    report = prune(model, tmp_path / "out", **GLOBAL, min_experts=5, non_uniform="coterie")
    assert {layer: len(k) for layer, k in kept(report).items()} == {0: 5, 1: 7}
    with pytest.raises(CoterieError, match="--min-experts 7: the budget keeps 6"):
        prune(model, tmp_path / "out2", **GLOBAL, min_experts=7)


def test_the_floor_defaults_to_top_k(tmp_path):
    """Layer 0 holds eight clones: cut as low as it can go, it still keeps the two that a token chooses."""
    routers = [np.ones((8, HIDDEN)), pairs_and_singles()[1]]
    model = qwen(tmp_path / "model", routers=routers)
    report = prune(model, tmp_path / "out", budget="global", experts=5, non_uniform="coterie")
    assert {layer: len(k) for layer, k in kept(report).items()} == {0: 2, 1: 8}


# --- the published program ---------------------------------------------------------------------------------


def test_official_at_a_fixed_count_is_single_linkage(tmp_path):
    """Layer by layer, the clusters are those of `official_clusters` without a threshold."""
    model = qwen(tmp_path / "model")
    report = prune(model, tmp_path / "out", linkage="official", experts=4, kappa=0)
    for layer in range(2):
        d = stun.official_distances(read_all(model)[ROUTER.format(layer)], "F32", normalise=True)
        assert sorted(report.plan["layers"][str(layer)]["clusters"]) == stun.official_clusters(d, np.inf, 4)


def test_official_with_a_global_budget(tmp_path):
    """The published search finds its target exactly; unequal counts are written as found, or rounded as ours are."""
    model = qwen(tmp_path / "model", routers=pairs_and_singles())
    options = {"linkage": "official", "distance": "raw", **GLOBAL}
    written = prune(model, tmp_path / "out", **options, non_uniform="coterie")
    assert {layer: len(k) for layer, k in kept(written).items()} == {0: 4, 1: 8}
    rounded = prune(model, tmp_path / "rounded", **options)
    assert rounded.plan["budget"]["global"] == {"layer 0": 4, "layer 1": 8} and rounded.plan["budget"]["rounded"]
    assert [len(k) for k in kept(rounded).values()] == [6, 6]


def test_official_with_a_global_budget_that_comes_out_equal(tmp_path):
    """Equal counts keep the search's own clusters: chains that its linkage rule blocks are not joined after all.

    Distances 0-1 1, 1-2 1.1, 3-4 1.5 along a line (experts 5 to 7 far off): single linkage would join {0, 1, 2};
    below the threshold of 1.6 that pair is blocked by d(0, 2) = 2.1, and {3, 4} joins instead.
    """
    router = np.zeros((8, HIDDEN))
    router[:, 0] = [0, 1, 2.1, 100, 101.5, 1000, 2000, 3000]
    model = qwen(tmp_path / "model", routers=[router, router])
    report = prune(
        model, tmp_path / "out", linkage="official", distance="raw", budget="global", experts=6, threshold=1.55
    )
    assert not report.plan["budget"]["rounded"]
    for layer in report.plan["layers"].values():
        assert layer["clusters"] == [[0, 1], [2], [3, 4], [5], [6], [7]]


def test_official_beside_a_prediction_layer(tmp_path):
    """A multi-token-prediction layer takes no part in the search and gets the average count."""
    routers = pairs_and_singles()
    routers = [*routers, routers[0]]
    model = qwen(tmp_path / "model", layers=3, routers=routers, num_hidden_layers=2, num_nextn_predict_layers=1)
    options = {"linkage": "official", "distance": "raw", **GLOBAL}
    report = prune(model, tmp_path / "out", **options, non_uniform="coterie")
    assert {layer: len(k) for layer, k in kept(report).items()} == {0: 4, 1: 8, 2: 6}


# --- choices -----------------------------------------------------------------------------------------------


def test_the_written_experts_are_the_kept_ones_renumbered(tmp_path):
    """Kept experts keep their bytes under new numbers, the router its kept rows, and nothing else changes."""
    model = qwen(tmp_path / "model")
    report = prune(model, tmp_path / "out", experts=5)
    before, after = read_all(model), read_all(tmp_path / "out")
    expected = {n: v for n, v in before.items() if ".mlp.experts." not in n}
    for layer, ids in kept(report).items():
        expected[ROUTER.format(layer)] = before[ROUTER.format(layer)][ids]
        for new, old in enumerate(ids):
            expected |= {EXPERT.format(layer, new, part): before[EXPERT.format(layer, old, part)] for part in MLP}
    assert after.keys() == expected.keys()
    assert all(np.array_equal(after[n], expected[n]) for n in expected)


@pytest.mark.parametrize("method", ["stun", "random", "first", "router-norm", "weight-norm"])
@given(seed=st.integers(0, 50), experts=st.integers(2, 8))
@settings(max_examples=8)
def test_kept_ascends_and_each_cluster_holds_its_own(tmp_path_factory, method, seed, experts):
    """`kept` ascends; `clusters[i]` contains `kept[i]`; together the clusters hold every original id once."""
    folder = tmp_path_factory.mktemp("prune")
    report = prune(qwen(folder / "model", seed=seed), folder / "out", method=method, experts=experts)
    for layer in report.plan["layers"].values():
        assert layer["kept"] == sorted(set(layer["kept"])) and len(layer["kept"]) == experts
        if method == "stun":
            assert all(k in c for k, c in zip(layer["kept"], layer["clusters"], strict=True))
            assert sorted(e for c in layer["clusters"] for e in c) == list(range(8))


def test_the_representative_is_nearest_to_its_clusters_mean(tmp_path):
    """Clusters of three or more keep the member whose weights are nearest to the mean of all."""
    model = qwen(tmp_path / "model", seed=3)
    report = prune(model, tmp_path / "out", experts=3, kappa=0)
    weights = read_all(model)
    checked = 0
    for key, layer in report.plan["layers"].items():
        for stays, cluster in zip(layer["kept"], layer["clusters"], strict=True):
            flat = {e: np.concatenate([weights[EXPERT.format(key, e, p)].ravel() for p in MLP]) for e in cluster}
            mean = np.mean([v.astype(np.float64) for v in flat.values()], axis=0)
            if len(cluster) > 2:
                assert stays == min(cluster, key=lambda e: np.linalg.norm(flat[e] - mean))
                checked += 1
    assert checked


def test_scores_keep_the_highest(tmp_path):
    """router-norm keeps the longest router rows, weight-norm the heaviest experts, first the lowest ids."""
    model = qwen(tmp_path / "model", layers=1)
    weights = read_all(model)
    rows = np.linalg.norm(weights[ROUTER.format(0)], axis=1)
    heavy = [sum((weights[EXPERT.format(0, e, p)].astype(float) ** 2).sum() for p in MLP) for e in range(8)]
    for method, scores in (("router-norm", rows), ("weight-norm", heavy), ("first", -np.arange(8))):
        report = prune(model, tmp_path / method, method=method, experts=3)
        assert kept(report)[0] == sorted(np.argsort(scores)[-3:])


def test_seeds_repeat(tmp_path):
    """The same seed draws the same experts; another draws others."""
    model = qwen(tmp_path / "model", experts=32)
    drawn = [
        kept(prune(model, tmp_path / name, method="random", experts=16, seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]  # layers draw independently


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_few_clusters_become_means(tmp_path, dtype):
    """Fewer clusters than kappa: each, its router row too, becomes its members' mean in float64, rounded once."""
    model = qwen(tmp_path / "model", dtype=dtype)
    report = prune(model, tmp_path / "out", experts=2, **MERGING)
    before, after = read_all(model), read_all(tmp_path / "out")
    for key, layer in report.plan["layers"].items():
        assert layer["merged"] is True
        for new, cluster in enumerate(layer["clusters"]):
            names = {
                EXPERT.format(key, new, part): [before[EXPERT.format(key, e, part)] for e in cluster] for part in MLP
            }
            for name, members in names.items():
                mean = np.sum([m.astype(np.float64) for m in members], axis=0) / len(cluster)
                assert np.array_equal(after[name], mean.astype(dtype))
            rows = before[ROUTER.format(key)][cluster].astype(np.float64)
            assert np.array_equal(after[ROUTER.format(key)][new], (rows.sum(0) / len(cluster)).astype(dtype))


def test_as_many_clusters_as_kappa_keep_representatives(tmp_path):
    """kappa = 3 merges layers of one or two clusters; three clusters, or kappa = 0, keep original experts."""
    model = qwen(tmp_path / "model")
    three = prune(model, tmp_path / "three", experts=3)
    never = prune(model, tmp_path / "never", experts=2, kappa=0)
    always = prune(model, tmp_path / "always", experts=3, kappa=4)
    merged = [[layer.get("merged", False) for layer in r.plan["layers"].values()] for r in (three, never, always)]
    assert merged == [[False, False], [False, False], [True, True]]


def test_fused_experts_are_sliced_and_merged(tmp_path):
    """All experts in one tensor: kept ones are cut out of it, merged ones averaged into it."""
    draw = np.random.default_rng(0)
    fused = {
        "model.layers.0.mlp.gate.weight": draw.normal(size=(8, HIDDEN)).astype(np.float32),
        "model.layers.0.mlp.experts.gate_up_proj": draw.normal(size=(8, 2 * WIDTH, HIDDEN)).astype(np.float32),
        "model.layers.0.mlp.experts.down_proj": draw.normal(size=(8, HIDDEN, WIDTH)).astype(np.float32),
    }
    model = save(tmp_path / "model", qwen_config(num_hidden_layers=1), [fused])
    cut = prune(model, tmp_path / "cut", experts=5)
    for name, values in read_all(tmp_path / "cut").items():
        assert np.array_equal(values, fused[name][kept(cut)[0]])
    merged = prune(model, tmp_path / "merged", experts=2)
    for name, values in read_all(tmp_path / "merged").items():
        for new, cluster in enumerate(merged.plan["layers"]["0"]["clusters"]):
            mean = fused[name][cluster].astype(np.float64).sum(0) / len(cluster)
            assert np.array_equal(values[new], mean.astype(np.float32))


# --- what is read and written ------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Every (tensor, number of bytes) that is read as values."""
    found = []
    original = Checkpoint.raw

    def raw(self, name, start=0, length=None):
        result = original(self, name, start, length)
        found.append((name, len(result)))
        return result

    monkeypatch.setattr(Checkpoint, "raw", raw)
    return found


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("options", [{}, GLOBAL, {"linkage": "official"}, {"method": "random"}, {"experts": 2}])
def test_a_dry_run_reads_routers_only_and_writes_nothing(tmp_path, reads, options):
    """Deciding without the representative step reads each router once and no other value, and leaves no trace."""
    model = qwen(tmp_path / "model", num_shards=3)
    before = listing(tmp_path)
    report = prune(model, tmp_path / "out", dry_run=True, **options)
    assert report.report["dry_run"] and listing(tmp_path) == before
    assert sorted(reads) == [(ROUTER.format(layer), 8 * HIDDEN * 4) for layer in range(2)]


def bytes_read():
    """Bytes this process has asked the kernel for so far."""
    with open("/proc/self/io") as file:
        return int(file.readline().removeprefix("rchar: "))


def test_a_dry_run_reads_almost_nothing_of_a_large_model(tmp_path):
    """Of 67 MB of experts no byte is read."""
    try:
        bytes_read()
    except OSError:
        pytest.skip("this system does not count a process's reads")
    tensors = block("model.layers.0.", np.random.default_rng(0).normal(size=(8, HIDDEN)), np.random.default_rng(0))
    header, position = {}, 0
    for name in tensors:
        shape = list(tensors[name].shape) if "gate.weight" in name else [2**9, 2**12 // 3]
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(qwen_config(num_hidden_layers=1)))
    with (model / "model.safetensors").open("wb") as file:  # sparse: zeros that take no space
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    prune(qwen(tmp_path / "small"), tmp_path / "out", dry_run=True)  # whatever is imported on first use
    before = bytes_read()
    prune(model, tmp_path / "out", dry_run=True)
    assert position > 67_000_000 and bytes_read() - before < 200_000  # versions of installed packages


def test_pairs_are_chosen_without_reading_weights(tmp_path, reads):
    """A clustering into pairs is decided by the routers alone: nothing but routers is read as values."""
    prune(qwen(tmp_path / "model", routers=[pairs_and_singles()[0]] * 2), tmp_path / "out", experts=4)
    assert {name for name, _ in reads} == {ROUTER.format(0), ROUTER.format(1)}


def test_a_dry_run_decides_what_the_run_will_do(tmp_path):
    """The counts, clusters and sizes are those of the real run; its report says that it was none."""
    model = qwen(tmp_path / "model")
    dry, wet = (prune(model, tmp_path / "out", dry_run=d) for d in (True, False))
    assert dry.report["after"] == wet.report["after"] and dry.plan["budget"] == wet.plan["budget"]
    clusters = [[sorted(layer["clusters"]) for layer in report.plan["layers"].values()] for report in (dry, wet)]
    assert clusters[0] == clusters[1]
    assert (dry.report["dry_run"], wet.report["dry_run"]) == (True, False)


def test_the_report_counts(tmp_path):
    """Parameters, bytes and shares by hand: one layer of eight experts of 36 weights, of which two go."""
    model = qwen(tmp_path / "model", layers=1)
    report = prune(model, tmp_path / "out").report
    rest = 5 * HIDDEN + HIDDEN * HIDDEN + HIDDEN + WIDTH * HIDDEN + HIDDEN  # embedding, q, norm, shared, its gate
    assert report["before"] == {"parameters": rest + 8 * (36 + HIDDEN), "bytes": 4 * (rest + 320), "experts": 8}
    assert report["after"] == {"parameters": rest + 6 * (36 + HIDDEN), "bytes": 4 * (rest + 240), "experts": 6}
    linears = 320 + HIDDEN * HIDDEN + WIDTH * HIDDEN + HIDDEN
    shares = {"experts": 2 / 8, "linears": 80 / linears, "all": 80 / (rest + 320)}
    assert report["sparsity"] == pytest.approx(shares, rel=1e-12)


def test_awkward_counts_are_said_aloud(tmp_path):
    """Seven experts do not please every kernel; sixteen do."""
    model = qwen(tmp_path / "model", experts=32)
    warnings = prune(model, tmp_path / "odd", experts=7).report["warnings"]
    assert any("7 experts is not a multiple of 8" in w for w in warnings)
    warnings = prune(model, tmp_path / "even", experts=16).report["warnings"]
    assert not any("multiple of 8" in w for w in warnings)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"ratio": 0.5, "experts": 4}, "--ratio and --experts say the same thing twice"),
        ({"method": "random", "kappa": 0}, "--kappa shapes the method stun and would be ignored by random"),
        ({"method": "first", "budget": "global"}, "--budget shapes the method stun"),
        ({"method": "first", "linkage": "official"}, "--linkage shapes the method stun"),
        ({"method": "first", "distance": "raw"}, "--distance shapes the method stun"),
        ({"min_experts": 3}, "--min-experts is the floor of a global budget and would be ignored"),
        ({"non_uniform": "refuse"}, "--non-uniform is about a global budget and would be ignored"),
        ({"threshold": 1.0}, "--threshold would be ignored"),
        ({"threshold": 1.0, "linkage": "official"}, "--threshold would be ignored"),
        ({"threshold": 1.0, "budget": "global"}, "--threshold would be ignored"),
        ({"min_experts": 3, "budget": "global", "linkage": "official"}, "--min-experts: the published program"),
        ({"method": "magic"}, "--method 'magic': unknown; expected one of .*first, .*random"),
        ({"budget": "local"}, "--budget 'local': unknown; expected one of uniform, global"),
        ({"non_uniform": "x"}, "--non-uniform 'x': unknown"),
        ({"kappa": -1}, "--kappa -1"),
        ({"min_experts": 0, "budget": "global"}, "--min-experts 0"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
    ],
)
def test_options_that_would_be_ignored_or_contradict_are_refused(tmp_path, options, fault):
    """No option is silently ignored, and no value guessed at."""
    with pytest.raises(CoterieError, match=fault):
        prune(qwen(tmp_path / "model"), tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["stun", "first"])
def test_a_router_that_is_not_finite_is_refused(tmp_path, value, method):
    """One NaN or infinity in a router is refused by the router's name."""
    routers = pairs_and_singles()
    routers[1][3, 2] = value
    model = qwen(tmp_path / "model", routers=routers)
    with pytest.raises(CoterieError, match=r"router 'model\.layers\.1\.mlp\.gate\.weight' holds NaN or infinite"):
        prune(model, tmp_path / "out", method=method)


@pytest.mark.parametrize("options", [{"method": "weight-norm"}, {"experts": 2}])
def test_experts_that_are_not_finite_are_refused_where_they_decide(tmp_path, options):
    """NaN weights cannot be compared; a method that does not read them copies them as they are."""
    model = qwen(tmp_path / "model", layers=1)
    tensors = read_all(model)
    for e in range(8):
        tensors[EXPERT.format(0, e, "up_proj")][0, 0] = np.nan
    save(model, qwen_config(num_hidden_layers=1), [tensors])
    with pytest.raises(CoterieError, match=r"layer 0: expert \d holds NaN or infinite weights"):
        prune(model, tmp_path / "out", **options)
    prune(model, tmp_path / "out", method="first")
    assert np.isnan(read_all(tmp_path / "out")[EXPERT.format(0, 0, "up_proj")][0, 0])


@pytest.mark.parametrize("shape", [(8,), (8, 0), (7, HIDDEN), (8, HIDDEN, 2), (1, 8)])
def test_a_router_of_another_shape_is_refused(tmp_path, shape):
    """A router has one row per expert."""
    tensors = block("model.layers.0.", np.zeros((8, HIDDEN)), np.random.default_rng(0))
    tensors["model.layers.0.mlp.gate.weight"] = np.zeros(shape, np.float32)
    with pytest.raises(CoterieError, match=r"mlp\.gate\.weight"):
        prune(save(tmp_path / "model", qwen_config(num_hidden_layers=1), [tensors]), tmp_path / "out")


def test_averaging_what_cannot_be_averaged_is_refused(tmp_path):
    """Integer-coded experts can be dropped, but not merged; the refusal comes before anything is written."""
    tensors = {
        name: values if "mlp.gate." in name else values.astype(np.int8)
        for name, values in block("model.layers.0.", np.eye(8, HIDDEN), np.random.default_rng(0)).items()
    }
    model = save(tmp_path / "model", qwen_config(num_hidden_layers=1), [tensors])
    assert prune(model, tmp_path / "dropped", method="first", experts=2)
    plan = {"layers": {"0": {"kept": [0, 4], "clusters": [[0, 1, 2, 3], [4, 5, 6, 7]], "merged": True}}}
    from coterie.verbs.apply import apply

    with pytest.raises(CoterieError, match=r"cannot read .*packed integers"):
        apply(model, plan, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*qwen_config(), "text_config", "coterie", "n_group", "topk_group", "num_nextn_predict_layers"]


@given(
    st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=2), st.sampled_from(["qwen2_moe", "deepseek_v3"])
)
@settings(max_examples=150)
def test_no_config_raises_anything_else(tmp_path_factory, changes, model_type):
    """Whatever stands in config.json, the answer is a report or our error."""
    folder = tmp_path_factory.mktemp("config")
    model = qwen(folder / "model", layers=1)
    config = qwen_config(num_hidden_layers=1, model_type=model_type) | changes
    (model / "config.json").write_text(json.dumps(config))
    try:
        report = prune(model, folder / "out")
    except CoterieError:
        assert not list(folder.glob("out*"))
    else:
        assert report.report["after"]["experts"] == 6


def test_a_dense_prediction_layer_is_dropped_too(tmp_path):
    """--drop-mtp leaves out everything of a layer beyond the config's count, also one without a router."""
    model = qwen(tmp_path / "model", num_nextn_predict_layers=1)
    tensors = read_all(model) | {"model.layers.2.mlp.up_proj.weight": np.ones((4, HIDDEN), np.float32)}
    save(model, json.loads((model / "config.json").read_text()), [tensors])
    prune(model, tmp_path / "out", drop_mtp=True)
    assert not any(name.startswith("model.layers.2.") for name in read_all(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_dropping_prediction_layers_that_are_not_there_is_refused(tmp_path):
    """--drop-mtp on a model without such layers would be ignored, so it is refused."""
    with pytest.raises(CoterieError, match="no multi-token-prediction layers"):
        prune(qwen(tmp_path / "model"), tmp_path / "out", drop_mtp=True)
