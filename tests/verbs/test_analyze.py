"""The instrument of `coterie analyze`, on models whose answer is planted and on hand-sized numbers."""

import html
import json
import re
import shlex
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import tiny
from coterie import analyze
from coterie.cli import main
from coterie.errors import CoterieError
from coterie.forward.activations import plain_walk
from coterie.forward.stream import Stream
from coterie.judge import alignment, locality, rounding
from coterie.judge.advice import redundancy
from coterie.judge.locality import Tokens
from coterie.judge.numbers import correlation, cosine, pairs
from coterie.judge.probe import probe
from coterie.judge.similarity import compare_router, compare_weights
from coterie.model.experts import Experts
from coterie.model.layer import Model
from coterie.model.loading import load_stock
from coterie.pages.analysis import shown as shown_page

E, D, N = tiny.NUM_EXPERTS, tiny.HIDDEN, tiny.EXPERT_HIDDEN
LAYER, EXPERT = "model.layers.1.mlp", "model.layers.1.mlp.experts.{}.{}_proj.weight"
SHAPES = {"gate": (N, D), "up": (N, D), "down": (D, N)}


def sequences(seed=0, lengths=(9, 24, 9, 17)):
    draw = np.random.default_rng(seed)
    return [tuple(draw.integers(3, tiny.VOCABULARY, n).tolist()) for n in lengths]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two domains of token ids."""
    folder = tmp_path_factory.mktemp("data")
    for name, given_ in (("a", sequences()), ("b", sequences(1, (30, 5)))):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"input_ids": list(s)}) for s in given_))
    return {name: folder / f"{name}.jsonl" for name in "ab"}


@pytest.fixture
def edited(tiny_checkpoint, tmp_path):
    """`edited(change)`: a copy of the tiny qwen2_moe whose tensors `change` has edited in place."""

    def make(change):
        source, folder = tiny_checkpoint("qwen2_moe"), tmp_path / "edited"
        tensors, config = tiny.read(source)
        tensors = {name: value.copy() for name, value in tensors.items()}
        change(tensors)
        return tiny.write(folder, tensors, config)

    return make


def flat(tensors, e):
    return np.concatenate([tensors[EXPERT.format(e, part)].ravel() for part in SHAPES])


def put(tensors, e, values):
    """Writes a flat vector (gate, up, down) as expert e."""
    for part, shape in SHAPES.items():
        size = shape[0] * shape[1]
        tensors[EXPERT.format(e, part)] = values[:size].reshape(shape).astype(np.float32)
        values = values[size:]


def permuted(tensors, source, target, order):
    """Expert `target` becomes expert `source` with its neurons in another order."""
    for part in SHAPES:
        matrix = tensors[EXPERT.format(source, part)]
        tensors[EXPERT.format(target, part)] = (matrix[:, order] if part == "down" else matrix[order]).copy()


# --- planted models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8])
def test_a_planted_cosine_of_weights_is_recovered(edited, data, rho):
    """Experts sqrt(rho) c + sqrt(1 - rho) n_e of orthonormal c and n_e have pairwise cosine rho, to 0.01."""
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((3 * N * D, E + 1)))[0].T

    def plant(tensors):
        for e in range(E):
            put(tensors, e, 4 * (np.sqrt(rho) * directions[E] + np.sqrt(1 - rho) * directions[e]))

    found = analyze(edited(plant), data=data, samples=4, seq_len=32)["layers"][1]
    matrix = np.array(found["cosine"]["weights"])
    assert matrix.shape == (E, E) and np.abs(np.diag(matrix) - 1).max() < 1e-6
    assert np.abs(pairs(matrix) - rho).max() < 0.01
    assert found["energy"]["raw"] == pytest.approx(rho + (1 - rho) / E, abs=0.01)
    assert found["energy"]["aligned"] >= found["energy"]["raw"] - 0.01


def test_a_planted_permutation_is_fully_recovered(edited, data):
    """Expert 5 is expert 2 with its neurons in another order: one function, found as one."""
    order = np.random.default_rng(3).permutation(N)
    found = analyze(edited(lambda t: permuted(t, 2, 5, order)), data=data, samples=4, seq_len=32)["layers"][1]
    (pair,) = found["alignment"]["alike"]
    assert pair["experts"] == [2, 5] and pair["cosine"] == pytest.approx(1)
    assert order[np.array(pair["permutation"])].tolist() == list(range(N))
    assert pair["kendall"] == pytest.approx(alignment.kendall(np.argsort(order)), abs=1e-5)
    assert found["cosine"]["weights"][2][5] < 0.5 < found["alignment"]["cosine"][2][5]
    assert found["cosine"]["outputs"][2][5] == pytest.approx(1, abs=1e-4)
    assert found["redundancy"]["pairs"] == found["redundancy"]["spare"] == 1


def test_spare_experts_become_advice(edited, data):
    """What STUN could drop is said in words, with the layer and the number."""
    result = analyze(edited(lambda t: permuted(t, 2, 5, np.arange(N)[::-1])), data=data, samples=4, seq_len=32)
    stun = next(item for item in result["advice"] if item["about"] == "stun")
    assert stun["numbers"]["spare"] == {"0": 0, "1": 1, "2": 0, "3": 0}
    assert "layer 1: 1 pair of experts with output cosine of 0.9 or more, STUN can drop 1 of 8" in stun["text"]


def test_a_router_that_is_its_experts_mean_gate_neurons_is_explained_by_them(edited, data):
    """R^2 is 1 for gate, and as good as nothing for the others."""

    def plant(tensors):
        rows = [tensors[EXPERT.format(e, "gate")].mean(axis=0) for e in range(E)]
        tensors[f"{LAYER}.gate.weight"] = np.stack(rows) * 9

    r2 = analyze(edited(plant), data=data, samples=4, seq_len=32)["layers"][1]["router"]["r2"]
    assert r2["gate"] == pytest.approx(1, abs=1e-4) and r2["up"] < 0.5 and r2["down"] < 0.5


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_r_squared_of_a_noisy_copy_is_as_predicted(noise):
    """Rows r = m + n, |m| = 1, |n| = s: R^2 = V / (V + (2 s^2 + s^4) / D), V the variance of cos(m_i, m_j)."""
    count, width, found, expected = 64, 128, [], []
    for seed in range(4):
        draw = np.random.default_rng(seed)
        share = draw.uniform(0, 1, (count, 1))
        own = draw.standard_normal((count, width)) / np.sqrt(width)
        common = draw.standard_normal(width) / np.sqrt(width)
        m = np.sqrt(share) * common + np.sqrt(1 - share) * own
        m /= np.linalg.norm(m, axis=1, keepdims=True)
        rows = m + noise * draw.standard_normal((count, width)) / np.sqrt(width)
        layer = type("Layer", (), {"router": rows})
        found.append(compare_router(layer, {"gate": m})[1]["gate"])
        variance = pairs(cosine(m)).var()
        expected.append(variance / (variance + (2 * noise**2 + noise**4) / width))
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.05)


# --- the probe against loops over the stock model -----------------------------------------------------------------


def stock_calls(folder, samples):
    """What the stock model asks the experts of layer 1, sample after sample: (x, chosen, weights, the module)."""
    model, _ = load_stock(folder, "float32", experts_implementation="eager")
    module, calls = model.model.layers[1].mlp.experts, []
    module.register_forward_pre_hook(lambda _, args: calls.append([a.clone() for a in args]))
    with torch.inference_mode():
        for sample in samples:
            model(input_ids=torch.tensor([sample]), use_cache=False)
    return [torch.cat(parts) for parts in zip(*calls, strict=True)], module


def test_the_probe_is_on_the_true_trajectory(tiny_checkpoint):
    """Outputs of all experts, chosen or not, on the inputs that the stock model gives them: likeness, norms, swaps."""
    folder, samples = tiny_checkpoint("qwen2_moe"), sequences(0, (24,) * 3)
    (x, chosen, weights), module = stock_calls(folder, samples)
    outputs = torch.zeros(len(x), E, D)
    for e in range(E):
        gate, up = (x @ module.gate_up_proj[e].T).chunk(2, dim=1)
        outputs[:, e] = ((F.silu(gate) * up) @ module.down_proj[e].T).detach()
    found = {b.key: f for b, f in probe(Model.open(folder), {"a": samples}, torch.float32)}["1"]
    assert found["probe"]["tokens"] == len(x) == 72
    for i, j in ((0, 1), (6, 3)):
        c = F.cosine_similarity(outputs[:, i], outputs[:, j]).detach().double()
        assert found["cosine"]["outputs"][i][j] == pytest.approx(float(c.mean()), abs=2e-4)
        assert found["cosine"]["angular"][i][j] == pytest.approx(float((1 - c.arccos() / np.pi).mean()), abs=2e-4)
    norms = outputs.norm(dim=2).detach()
    np.testing.assert_allclose(found["norms"]["mean"], norms.mean(0), atol=1e-4)
    g, n = weights.flatten().numpy(), norms.gather(1, chosen).flatten().numpy()
    assert found["norms"]["gate_norm"] == pytest.approx(np.corrcoef(g, n)[0, 1], abs=1e-3)
    assert found["norms"]["gate_contribution"] == pytest.approx(np.corrcoef(g, g * n)[0, 1], abs=1e-3)
    largest = sum(int(e in row.topk(2).indices) for row, ids in zip(norms, chosen, strict=True) for e in ids)
    assert found["norms"]["chosen_largest"] == pytest.approx(largest / chosen.numel(), abs=1e-6)
    true = (outputs.gather(1, chosen[..., None].expand(-1, -1, D)) * weights[..., None]).sum(1)
    rows, sums = torch.arange(len(x)), weights.sum(1, keepdim=True)
    first = outputs[rows, chosen[rows, weights.argmax(1)]] * sums
    error = (first - true).square().sum() / true.square().sum()
    assert found["probe"]["counterfactual"]["first"]["error"] == pytest.approx(float(error), rel=1e-3)


def test_swaps_use_the_routers_scores(tiny_checkpoint):
    """`next` runs the experts ranked third and fourth by logit with the chosen two's weights; `all` every one."""
    folder, samples = tiny_checkpoint("qwen2_moe"), sequences(0, (24,) * 3)
    (x, chosen, weights), module = stock_calls(folder, samples)
    router = torch.from_numpy(tiny.read(folder)[0][f"{LAYER}.gate.weight"])
    scores = (x @ router.T).softmax(dim=1)
    ranked = scores.argsort(dim=1, descending=True)
    assert torch.equal(ranked[:, :2].sort(1).values, chosen.sort(1).values)

    def summed(ids, gates):
        total = torch.zeros(len(x), D)
        for t in range(len(x)):
            for e, g in zip(ids[t], gates[t], strict=True):
                gate, up = (module.gate_up_proj[e] @ x[t]).chunk(2)
                total[t] += g * (module.down_proj[e] @ (F.silu(gate) * up))
        return total.detach()

    true = summed(chosen, weights)
    swaps = {
        "next": summed(ranked[:, 2:4], weights.sort(dim=1, descending=True).values),
        "all": summed(torch.arange(E).expand(len(x), E), scores * weights.sum(1, keepdim=True)),
    }
    found = {b.key: f for b, f in probe(Model.open(folder), {"a": samples}, torch.float32)}["1"]
    for name, other in swaps.items():
        error = float((other - true).square().sum() / true.square().sum())
        assert found["probe"]["counterfactual"][name]["error"] == pytest.approx(error, rel=1e-3), name


def test_probing_changes_nothing_for_later_layers(tiny_checkpoint, monkeypatch):
    """The hidden states that leave the model are those of a plain run, bit for bit."""
    model, samples, kept = Model.open(tiny_checkpoint("mixtral")), sequences(), []
    embed = Stream.embed

    def keeping(self, *args, **kwargs):
        kept.append(embed(self, *args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(Stream, "embed", keeping)
    list(probe(model, {"a": samples}, torch.float32))
    stream = Stream(model, torch.float32)
    plain = stream.embed(samples)
    list(stream.run(plain, plain_walk(model.checkpoint, torch.float32)))
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(kept[0], plain, strict=True))


def test_where_activations_are_kept_does_not_matter(tiny_checkpoint, tmp_path):
    """Mapped to files, layers run twice; what is found is the same."""
    model, given_ = Model.open(tiny_checkpoint("qwen2_moe")), {"a": sequences()}
    inside = [entry for _, entry in probe(model, given_, torch.float32)]
    assert inside == [entry for _, entry in probe(model, given_, torch.float32, spill=tmp_path, budget=0)]


def test_condensing_a_layer_of_one_function_loses_nothing(edited, data):
    """Where all experts are one, two of them with constant gates are the routed sum."""

    def plant(tensors):
        for e in range(1, E):
            permuted(tensors, 0, e, np.arange(N))

    found = analyze(edited(plant), data=data, samples=4, seq_len=32)["layers"][1]
    assert found["condense"]["captured"] == pytest.approx(1, abs=1e-4)
    assert found["condense"]["lost"] == pytest.approx(0, abs=1e-4)
    assert found["energy"]["aligned"] == pytest.approx(1, abs=1e-4)
    assert found["redundancy"]["spare"] == E - 1


# --- parts on hand-sized numbers ----------------------------------------------------------------------------------


def test_weights_are_compared_in_blocks_as_whole(tiny_checkpoint):
    """However few experts are held at a time, cosines and mean neurons are those of all at once."""
    model = Model.open(tiny_checkpoint("mixtral"))
    experts = Experts(model.checkpoint, model.main[0])
    whole, few = compare_weights(experts), compare_weights(experts, most_bytes=3 * 4 * 3 * N * D)
    slow = cosine(np.stack([experts.flat(e) for e in range(E)]))
    for name, values in whole.cosines.items():
        np.testing.assert_allclose(few.cosines[name], values, atol=1e-6)
    np.testing.assert_allclose(whole.cosines["weights"], slow, atol=1e-6)
    gate, up, down = experts[3]
    for part, mean in (("gate", gate.mean(0)), ("up", up.mean(0)), ("down", down.mean(1))):
        assert np.corrcoef(few.means[part][3], mean)[0, 1] == pytest.approx(1)  # scaled by the largest weight


def test_cosines_of_extreme_rows():
    """Neither zeros nor the largest numbers make NaN."""
    found = cosine(np.array([[0, 0], [3e38, 3e38], [1e-40, 0]], np.float32))
    np.testing.assert_allclose(found, [[0, 0, 0], [0, 1, 0.5**0.5], [0, 0.5**0.5, 1]], atol=1e-6)


def test_correlation_of_nothing_is_none():
    """A constant has no correlation, two values have no line worth the name."""
    assert correlation(np.ones(5), np.arange(5)) is None and correlation(np.arange(2), np.arange(2)) is None
    assert correlation(np.arange(5), -np.arange(5)) == pytest.approx(-1)


@given(st.permutations(range(7)))
def test_kendall_counts_inversions(order):
    """tau = (pairs in order - pairs out of order) / all pairs."""
    order = np.array(order)
    signs = [np.sign(order[j] - order[i]) for i in range(7) for j in range(i + 1, 7)]
    assert alignment.kendall(order) == pytest.approx(np.mean(signs))


def test_the_barycentre_never_loses_what_it_had():
    """Each round of matching and averaging captures more; chance alone gives more than 1 / m."""
    draw = np.random.default_rng(0)
    held = [draw.standard_normal((12, 9)).astype(np.float32) for _ in range(6)]
    centre, orders, energies = alignment.barycentre(held)
    assert all(a < b for a, b in pairwise(energies)) and energies[0] > 1 / 6
    assert all(sorted(order) == list(range(12)) for order in orders)
    np.testing.assert_allclose(centre, np.mean([p[o] for p, o in zip(held, orders, strict=True)], axis=0), atol=1e-6)
    lost = sum(((p[o] - centre) ** 2).sum() for p, o in zip(held, orders, strict=True))
    assert 1 - lost / sum((p**2).sum() for p in held) == pytest.approx(energies[-1], abs=1e-5)


def test_copies_in_any_order_are_one_barycentre():
    """Permuted copies of one expert are captured whole."""
    draw = np.random.default_rng(1)
    one = draw.standard_normal((10, 12)).astype(np.float32)
    assert alignment.barycentre([one[draw.permutation(10)] for _ in range(4)])[2][-1] == pytest.approx(1)


def test_only_so_many_experts_are_aligned():
    """All of a small layer, some of a large one, none with more neurons than a matching can take."""
    assert alignment.how_many(64, (32, 768)) == 64
    assert 2 <= alignment.how_many(128, (768, 6144)) < 128
    assert alignment.how_many(8, (14336, 12288)) == 0 and alignment.how_many(1, (8, 8)) == 0


def test_rounding_by_hand():
    """2 bits have four levels from the lowest to the highest of a group, which stay as they are."""
    weights = torch.tensor([[0.0, 0.4, 1.6, 3.0], [5.0, 5.0, 5.0, 5.0]])
    assert rounding.even(weights, 2).tolist() == [[0, 0, 2, 3], [5, 5, 5, 5]]
    halves = rounding.even(torch.tensor([[0.0, 0.4, 1.6, 3.0, 7.0]]), 2, group=2)
    assert torch.allclose(halves, torch.tensor([[0.0, 0.4, 1.6, 3.0, 7.0]]))


@given(st.integers(1, 150), st.sampled_from(rounding.BITS), st.integers(0, 99))
def test_rounding_errs_by_half_a_step_at_most(columns, num_bits, seed):
    """Of each group of 64 inputs, a shorter last one included."""
    weights = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    gap = (rounding.even(weights, num_bits) - weights).abs()
    for part, error in zip(weights.split(64, dim=1), gap.split(64, dim=1), strict=True):
        step = (part.amax(1) - part.amin(1)) / (2**num_bits - 1)
        assert (error.amax(1) <= step / 2 + 1e-5).all()


def test_fewer_bits_err_more(tiny_checkpoint, data):
    """In weights, in every layer's sum; eight bits are nearly exact."""
    for entry in analyze(tiny_checkpoint("qwen2_moe"), data=data, samples=4, seq_len=32)["layers"]:
        for what in ("weights", "layer"):
            errors = [entry["bits"][b][what] for b in ("8", "4", "3", "2")]
            assert errors == sorted(errors) and errors[0] < 0.02, what


def test_repeats_by_hand():
    """Of three neighbouring pairs two repeat; the step from sample 0 to sample 1 is none."""
    chosen = np.array([[0], [0], [1], [1], [1]])
    tokens = Tokens(np.array([0, 0, 0, 1, 1]), np.zeros(5, np.int64), ("a",))
    found = locality.look(chosen, 4, tokens)
    assert found["locality"]["repeat"] == pytest.approx(2 / 3, abs=1e-6) and found["locality"]["pairs"] == 3
    assert found["locality"]["chance"] == pytest.approx(0.4**2 + 0.6**2) and found["locality"]["uniform"] == 0.25
    assert found["load"]["all"] == [0.4, 0.6, 0, 0] and found["load"]["unused"] == 2


def test_tokens_in_no_order_repeat_as_often_as_chance_says():
    """Routing without memory: what is measured is what is expected."""
    draw = np.random.default_rng(0)
    chosen = np.stack([draw.choice(8, 2, replace=False, p=np.arange(1, 9) / 36) for _ in range(4000)])
    tokens = Tokens(np.zeros(4000, np.int64), np.zeros(4000, np.int64), ("a",))
    found = locality.look(chosen, 8, tokens)["locality"]
    assert found["repeat"] == pytest.approx(found["chance"], abs=0.02)


def test_ids_beyond_the_experts_are_nobody():
    """Dropped choices count neither as load nor as repeats nor as company."""
    tokens = Tokens(np.zeros(3, np.int64), np.zeros(3, np.int64), ("a",))
    found = locality.look(np.array([[0, 4], [1, 4], [1, 4]]), 4, tokens)
    assert found["load"]["all"] == pytest.approx([1 / 3, 2 / 3, 0, 0], abs=1e-5)
    assert found["locality"]["repeat"] == 0.5 and not np.any(found["coactivation"])


def test_cache_by_hand():
    """Two places for 0 1 0 2 0 1: recent use hits 0, 0; the hottest two, 0 and 1, hit five of six."""
    found = locality.cache(np.array([[0], [1], [0], [2], [0], [1]]), 8)
    assert found["experts"] == 2 and found["lru"] == pytest.approx(2 / 6, abs=1e-6)
    assert found["hot"] == pytest.approx(5 / 6, abs=1e-6)


def test_coactivation_by_hand():
    """Pairs of one token, both ways round; lift is against independence."""
    tokens = Tokens(np.zeros(4, np.int64), np.zeros(4, np.int64), ("a",))
    found = locality.look(np.array([[0, 1], [1, 0], [2, 3], [2, 3]]), 4, tokens)
    assert found["coactivation"] == [[0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 2], [0, 0, 2, 0]]
    assert found["coactive"][0] == {"experts": [0, 1], "tokens": 2, "lift": 2.0}


def test_spare_experts_are_alike_to_all_of_their_cluster():
    """a ~ b and b ~ c but not a ~ c: one is spare, not two."""
    outputs = np.array([[1, 0.95, 0.7], [0.95, 1, 0.95], [0.7, 0.95, 1]])
    found = redundancy(outputs, outputs)
    assert (found["pairs"], found["spare"], found["most"]) == (2, 1, 0.95)
    assert found["router"] == pytest.approx(1)


# --- the verb -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_families(tiny_checkpoint, data, model_type):
    """Biases, fused and gate-less experts, dense layers among others: all numbers are finite, all matrices E x E."""
    result = analyze(tiny_checkpoint(model_type), data=data, samples=4, seq_len=32)
    assert json.loads(json.dumps(result, allow_nan=False))["layers"] == result["layers"]
    assert [e["layer"] for e in result["layers"]] == [b.key for b in Model.open(tiny_checkpoint(model_type)).main]
    for entry in result["layers"]:
        for name in ("weights", "router", "outputs"):
            matrix = np.array(entry["cosine"][name])
            assert matrix.shape == (E, E) and np.allclose(matrix, matrix.T) and np.allclose(np.diag(matrix), 1)
        assert ("gate" in entry["cosine"]) == (model_type != "nemotron_h")
        assert sum(entry["load"]["all"]) == pytest.approx(1, abs=1e-4)
    assert {item["about"] for item in result["advice"]} >= {"stun", "condense", "barycentre", "bits", "load"}


def test_the_same_seed_gives_the_same_numbers(tiny_checkpoint, data):
    """And says what was measured on what."""
    first, second = (analyze(tiny_checkpoint("mixtral"), data=data, samples=4, seq_len=32) for _ in range(2))
    assert first["layers"] == second["layers"] and first["advice"] == second["advice"]
    assert first["domains"] == {"a": {"samples": 2, "tokens": 33}, "b": {"samples": 2, "tokens": 35}}
    assert "outputs of all experts are compared on 68 tokens per layer, spread evenly over all" in first["notes"]


def test_the_page(tiny_checkpoint, data, tmp_path):
    """One file with the numbers inside, in which a folder's name is text; replaced only when asked."""
    folder, out = tmp_path / "<script>alert(1)<", tmp_path / "page.html"
    shutil.copytree(tiny_checkpoint("mixtral"), folder)
    result = analyze(folder, data=data, samples=4, seq_len=32, out=out)
    text = out.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    carried = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert carried["numbers"]["layers"] == result["layers"]
    assert f"Rounded to {rounding.LEVELS}, which makes 4 bits 4.5; those of coterie report are symmetric" in text
    kinds = [plot["kind"] for plot in carried["plots"]]
    assert kinds.count("heatmap") == 6 and {"scatter", "lines"} < set(kinds)
    for advice in result["advice"]:
        said = (advice["verdict"], advice["number"], advice["command"])
        assert all(said) and all(html.escape(part) in text for part in said), advice["about"]
    assert len(carried["plots"][0]["views"]) == len(result["layers"])
    with pytest.raises(CoterieError, match=r"page\.html: exists already"):
        analyze(folder, data=data, samples=4, seq_len=32, out=out)
    analyze(folder, data=data, samples=4, seq_len=32, out=out, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.name, "page.html"]


def test_commands_can_be_pasted(tiny_checkpoint, data, tmp_path, monkeypatch):
    """Every command of every finding runs, in a shell's words, on a folder whose name needs quotes."""
    folder = tmp_path / "it's; a model"
    shutil.copytree(tiny_checkpoint("qwen2_moe"), folder)
    monkeypatch.chdir(tmp_path)
    advice = analyze(folder.name, data=data, samples=4, seq_len=32)["advice"]
    lines = list(dict.fromkeys(line for item in advice for line in item["command"].splitlines()))
    assert {shlex.split(line)[1] for line in lines if line[0] != "#"} >= {"collect", "compare", "prune", "condense"}
    assert "# coterie quantize cannot be used here: " in "\n".join(lines)  # its rows are too short for a group
    for line in lines:
        if line[0] != "#":
            with pytest.raises(SystemExit) as stop:
                main(shlex.split(line)[1:])
            assert not stop.value.code, line


def test_a_page_of_the_reference_models_size_is_below_a_megabyte():
    """8 layers of 64 experts."""
    draw, count = np.random.default_rng(0), 64
    matrix = draw.uniform(-1, 1, (count, count)).round(4).tolist()
    names = ("weights", "gate", "up", "down", "router", "outputs", "angular")
    path = {"error": 0.5}
    entry = {
        "num_experts": count, "chosen": 4, "cosine": dict.fromkeys(names, matrix), "coactivation": matrix,
        "alignment": {"experts": list(range(count)), "cosine": matrix, "kendall": matrix, "mean": 0.1, "chance": 0.0},
        "norms": {"points": draw.uniform(0, 9, (400, 2)).round(4).tolist()}, "bits": {"4": {"layer": 0.1}},
        "probe": {"counterfactual": {"next": path}}, "load": {"domains": {"a": [1 / count] * count}},
    }  # fmt: skip
    layers = [{"layer": str(i), **entry} for i in range(8)]
    made = {"model": {"path": "m"}, "layers": layers, "domains": {"a": {"tokens": 9}}, "advice": [], "notes": []}
    text = shown_page(made)
    assert len(text.encode()) < 1_000_000 and "are not among the numbers that this page saves" in text


def test_a_page_of_very_many_experts_leaves_matrices_out(monkeypatch, tiny_checkpoint, data, tmp_path):
    """And says so; heatmaps show means of neighbours."""
    from coterie.pages import analysis as shown

    monkeypatch.setattr(shown, "MOST_CELLS", 100)
    monkeypatch.setattr(shown, "MOST_ROWS", 4)
    analyze(tiny_checkpoint("mixtral"), data=data, samples=4, seq_len=32, out=tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert "are not among the numbers that this page saves" in text and '"6-7"' in text
    grid = shown._grid(np.array([[1, 2, 3, 4]] * 4), [0, 1, 2, 3])
    assert grid.rows == ("0", "1", "2", "3") and grid.values[0] == (None, 2, 3, 4)


def test_damaged_weights_are_refused(edited, data):
    """NaN in an expert that no token may choose is found all the same."""

    def plant(tensors):
        tensors[EXPERT.format(3, "up")][0, 0] = np.nan

    with pytest.raises(CoterieError, match=r"layer 1.*NaN"):
        analyze(edited(plant), data=data, samples=4, seq_len=32)


def test_the_command(tiny_checkpoint, data, tmp_path, capsys):
    """--json prints one object, -o writes the page, neither prints the advice; a refusal is one line."""
    call = ["analyze", str(tiny_checkpoint("mixtral")), "--data", f"a={data['a']}", "--samples", "2", "--seq-len", "32"]

    def run(*more):
        with pytest.raises(SystemExit) as ended:
            main([*call, *more])
        return ended.value.code, *capsys.readouterr()

    page = tmp_path / "x.html"
    code, out, _ = run("--json", "-o", str(page))
    assert code == 0 and page.exists() and len(json.loads(out)["layers"][0]["cosine"]["weights"]) == E
    code, out, err = run()
    assert code == 0 and "condense" in out and "note: outputs of all experts" in err
    assert "stun: No expert is spare: whatever is removed has a cost to be measured\n" in out
    assert f"\n  coterie condense {call[1]} condensed --layer-ids " in out
    code, out, err = run("--output", str(page))
    assert (code, out) == (2, "") and err.startswith("error:") and len(err.splitlines()) == 1
