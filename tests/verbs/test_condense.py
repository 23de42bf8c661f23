"""`condense`: searches equal to slow obvious ones, folded layers equal to explicit sums, errors before any work."""

import json
import shutil

import numpy as np
import pytest
import torch

import slow_condense
import tiny
from coterie.errors import CoterieError
from coterie.model.loading import is_ours, load, load_stock
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.apply import apply
from coterie.verbs.condense import condense
from coterie.verbs.verify import verify

MIX = {"experts": [5, 0], "gates": [0.7, -0.3], "shared_gate": 0.6}


def texts(lengths=(20, 13, 20, 7), seed=3):
    draw = np.random.default_rng(seed)
    return [draw.integers(3, tiny.VOCABULARY, n).tolist() for n in lengths]


@pytest.fixture
def data(tmp_path):
    """The texts above as token ids, given as they are."""
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"input_ids": text}) for text in texts()))
    return [f"texts={file}"]


def plan_of(report):
    """{layer: (experts, gates, shared gate)} of a report."""
    found = {int(k): v["condensed"] for k, v in report.plan["layers"].items()}
    return {k: (v["experts"], v["gates"], v["shared_gate"]) for k, v in found.items()}


def close(found, expected):
    """Logits of all texts, to float32 rounding."""
    top = max(float(e.abs().max()) for e in expected)
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) <= 2e-6 * top


def loaded_logits(folder):
    model = load(folder, dtype="float32")
    with torch.no_grad():
        return [model(input_ids=torch.tensor([t]), use_cache=False).logits[0] for t in texts()]


# --- searches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, 3, 0])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "deepseek_v2"])
def test_official_equals_the_slow_search(tiny_checkpoint, tmp_path, data, monkeypatch, model_type, keep):
    """Experts, gates and layers in the order chosen; gates from whole texts, searches on their first 12 tokens."""
    monkeypatch.setattr("coterie.decide.condenser.SEARCHED_TOKENS", 12)
    folder, kept = tiny_checkpoint(model_type), tiny.TOP_K if keep is None else keep
    report = condense(folder, tmp_path / "out", layers=2, keep=keep, select="official", data=data)
    expected, order = slow_condense.official(folder, texts(), kept, 2, searched=12)
    assert report.report["layer_order"] == order
    for layer, (experts, gates, shared) in plan_of(report).items():
        assert experts == expected[layer][0]
        assert [*gates, shared] == pytest.approx([*expected[layer][1], expected[layer][2]], rel=1e-5)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "deepseek_v2"])
def test_least_squares_equals_solving_from_the_outputs(tiny_checkpoint, tmp_path, data, model_type):
    """Layers 1 and 3 in order: the second is fitted to its original on what the first, condensed, lets through."""
    folder = tiny_checkpoint(model_type)
    report = condense(folder, tmp_path / "out", layer_ids=[3, 1], data=data)
    whole, plan = slow_condense.Whole(folder), {}
    for layer in (1, 3):
        experts, gates, shared, error = slow_condense.least_squares(whole, texts(), layer, tiny.TOP_K, plan)
        plan[layer] = (experts, gates, shared)
        found = plan_of(report)[layer]
        assert found[0] == experts
        assert [*found[1], found[2]] == pytest.approx([*gates, shared], rel=1e-4)
        assert report.report["refit_error"][str(layer)] == pytest.approx(error, rel=1e-4)
    assert report.report["layer_order"] == [3, 1]


def test_least_squares_loses_less_of_a_layer_than_the_published_choice(tiny_checkpoint, tmp_path, data):
    """Measured on the same activations of the same layers, layer by layer."""
    folder, errors = tiny_checkpoint("qwen2_moe"), {}
    for select in ("official", "least-squares"):
        report = condense(folder, tmp_path / select, layers=4, select=select, data=data, samples=4)
        errors[select] = report.report["layer_error"]
    assert all(errors["least-squares"][key] < errors["official"][key] for key in "0123")


def test_routing_keeps_what_the_router_prefers(tiny_checkpoint, tmp_path, data):
    """The experts with the largest sum of weights, under their mean weight where chosen."""
    folder = tiny_checkpoint("qwen2_moe")
    report = condense(folder, tmp_path / "out", layer_ids="2", select="routing", keep=3, data=data)
    choices, shared = slow_condense.Whole(folder).routing(texts())
    weights = {e: [w for x, w in choices[2] if x == e] for e in range(tiny.NUM_EXPERTS)}
    best = sorted(weights, key=lambda e: -sum(weights[e]))[:3]
    experts, gates, c = plan_of(report)[2]
    assert experts == best
    assert gates == pytest.approx([sum(weights[e]) / len(weights[e]) for e in best], rel=1e-5)
    assert c == pytest.approx(shared[2], rel=1e-5)


def slow_kl(whole, held_out, plan):
    """Mean over tokens of KL(original || condensed)."""
    total = 0.0
    for text in held_out:
        p, q = (whole.states(text, which)[0].double().log_softmax(-1) for which in (None, plan))
        total += float((p.exp() * (p - q)).sum())
    return total / sum(map(len, held_out))


@pytest.mark.parametrize("kind", ["greedy", "one-shot", "beam"])
def test_layers_are_judged_by_the_logits_of_held_out_samples(tiny_checkpoint, tmp_path, data, kind):
    """Every 4th sample judges, the others fit; scores are those of the whole model, one candidate at a time."""
    folder = tiny_checkpoint("qwen2_moe")
    report = condense(folder, tmp_path / "out", layers=2, layer_search=kind, data=data)
    whole, fitting, judging = slow_condense.Whole(folder), texts()[:3], texts()[3:]
    plans = {i: slow_condense.least_squares(whole, fitting, i, tiny.TOP_K)[:3] for i in range(4)}

    def kl(layers):
        return slow_kl(whole, judging, {i: plans[i] for i in layers})

    alone = sorted(range(4), key=lambda i: kl([i]))
    order, scores = report.report["layer_order"], report.report["layer_scores"]
    if kind == "one-shot":
        assert order == alone[:2] and scores == pytest.approx([kl([i]) for i in order], rel=1e-4)
        return
    assert scores == pytest.approx([kl(order[:1]), kl(order)], rel=1e-4)
    if kind == "greedy":
        assert order == [alone[0], min((i for i in range(4) if i != alone[0]), key=lambda i: kl([alone[0], i]))]
    else:
        pairs = [(i, j) for i in range(4) for j in range(i)]
        assert kl(order) == pytest.approx(min(map(kl, pairs)), rel=1e-6)


@pytest.mark.parametrize("select", ["official", "least-squares", "routing"])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "olmoe"])
def test_decisions_are_the_same_bit_for_bit_outside_memory(
    tiny_checkpoint, tmp_path, data, monkeypatch, model_type, select
):
    """With a budget of no bytes for activations: experts, gates, layers, and what they were judged by."""
    folder = tiny_checkpoint(model_type)
    inside = condense(folder, tmp_path / "inside", layers=2, select=select, data=data)
    monkeypatch.setattr("coterie.forward.stream.IN_MEMORY", 0)
    outside = condense(folder, tmp_path / "outside", layers=2, select=select, data=data)
    assert outside.plan == inside.plan
    for name in ("layer_order", "layer_scores", "layer_error"):
        assert outside.report[name] == inside.report[name]


def test_few_samples_judge_what_they_fit(tiny_checkpoint, tmp_path):
    """Three samples leave none over; that is said."""
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(json.dumps({"input_ids": text}) for text in texts()[:3]))
    report = condense(tiny_checkpoint("qwen2_moe"), tmp_path / "out", layers=1, data=[f"few={file}"])
    assert any("too few to hold some out" in note for note in report.report["warnings"])


def test_passes_are_counted_in_whole_models(tiny_checkpoint, tmp_path, data):
    """All texts through some of 4 layers. Published: gates 1, layers' inputs 1, (8 + 7) candidates a layer 15; layers 1
    and the rounds 4/4 + 4/4 + 3/4 + 2/4 + 1/4, less what is the same. Ours: one run of each layer, one more of those
    that are condensed."""
    folder = tiny_checkpoint("qwen2_moe")
    published = condense(folder, tmp_path / "a", layers=1, select="official", data=data).report["passes"]
    named = condense(folder, tmp_path / "b", layer_ids=[1, 3], data=data).report["passes"]
    assert published == {"experts": 17.0, "layers": 1 + (4 + 3 + 2 + 1 + 3) / 4}
    assert named == {"experts": 1.5, "layers": 0.0}


def test_an_expert_that_no_token_chose_is_no_candidate(tmp_path, tiny_checkpoint):
    """One text of one token chooses 2 of 8 experts: asked for 3, the published choice keeps those 2, and says so."""
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"input_ids": [17]}))
    folder = tiny_checkpoint("qwen2_moe")
    report = condense(folder, tmp_path / "out", layer_ids=[1], keep=3, select="official", data=[f"one={file}"])
    choices, _ = slow_condense.Whole(folder).routing([[17]])
    assert set(plan_of(report)[1][0]) == {e for e, _ in choices[1]}
    assert any("keep fewer experts" in note for note in report.report["warnings"])


# --- folding ------------------------------------------------------------------------------------------------------

STOCK = [
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "flint",
    "mellum",
    "exaone_moe",
    "glm4_moe_lite",
    "kimi_linear",
    "hy_v3",
    "llama4",
    "llama4_text",
]
OURS = ["dbrx", "deepseek_v2", "olmoe", "mixtral", "granitemoe", "jamba", "lfm2_moe", "granitemoehybrid"]


@pytest.mark.parametrize("model_type", STOCK + OURS)
def test_a_condensed_checkpoint_computes_the_explicit_sums(tiny_checkpoint, tmp_path, model_type):
    """Not the first layers, so stock where a config lists them, else ours; no key is missing, and `verify` agrees."""
    folder, out = tiny_checkpoint(model_type), tmp_path / "out"
    keys = json.loads(json.dumps(apply(folder, {"layers": {}}, out, dry_run=True).report["before"]["experts"]))
    assert keys == tiny.NUM_EXPERTS
    apply(folder, {"layers": {"3": {"condensed": MIX}}}, out)
    assert is_ours(out) == (model_type in OURS)
    result = verify(out, against=folder)
    assert result["ok"], result
    assert "1 condensed layers as explicit sums" in result["checks"][-1]["detail"]


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "exaone_moe", "deepseek_v2", "olmoe"])
def test_logits_are_those_of_whole_models_with_sums_put_in(tiny_checkpoint, tmp_path, model_type):
    """Two layers of different sets, against the stock original with its blocks replaced by hand."""
    folder, out = tiny_checkpoint(model_type), tmp_path / "out"
    other = {"experts": [2], "gates": [1.5], "shared_gate": 0.25}
    apply(folder, {"layers": {"1": {"condensed": MIX}, "3": {"condensed": other}}}, out)
    plan = {1: ([5, 0], [0.7, -0.3], 0.6), 3: ([2], [1.5], 0.25)}
    assert close(loaded_logits(out), slow_condense.Whole(folder).logits(texts(), plan))


def test_one_width_serves_all_dense_layers(tiny_checkpoint, tmp_path):
    """exaone_moe has a dense layer 0 of 48; layers of 16 + 2*16 = 48 and 16 + 16 = 32 leave it at 48, one with five
    experts (96) widens all; zeros fill the rest and parameters count what is stored."""
    folder = tiny_checkpoint("exaone_moe")
    for experts, width in ((2, 48), (5, 96)):
        out = tmp_path / str(width)
        wide = {"experts": list(range(experts)), "gates": [0.5] * experts, "shared_gate": 1.0}
        narrow = {"experts": [0], "gates": [0.5], "shared_gate": 1.0}
        report = apply(folder, {"layers": {"1": {"condensed": wide}, "2": {"condensed": narrow}}}, out)
        tensors, config = tiny.read(out)
        for layer in (0, 1, 2):
            assert tensors[f"model.layers.{layer}.mlp.gate_proj.weight"].shape == (width, tiny.HIDDEN)
            assert tensors[f"model.layers.{layer}.mlp.down_proj.weight"].shape == (tiny.HIDDEN, width)
        assert not tensors["model.layers.2.mlp.up_proj.weight"][32:].any()
        assert config["intermediate_size"] == width
        assert config["mlp_layer_types"] == ["dense", "dense", "dense", "sparse"]
        stored = sum(values.size for values in tensors.values())
        assert report.report["after"]["parameters"] == stored == Checkpoint.open(out).num_parameters


def test_a_width_that_no_layer_has_yet_is_no_floor(tiny_checkpoint, tmp_path):
    """qwen2_moe's config says 48, but no layer is dense: 24 shared and one expert of 16 make 40."""
    apply(
        tiny_checkpoint("qwen2_moe"), {"layers": {"1": {"condensed": {"experts": [3], "gates": [1.0]}}}}, tmp_path / "o"
    )
    tensors, config = tiny.read(tmp_path / "o")
    assert config["intermediate_size"] == 40 and config["mlp_only_layers"] == [1]
    assert tensors["model.layers.1.mlp.up_proj.weight"].shape == (40, tiny.HIDDEN)


def test_gates_are_multiplied_in_float32_and_rounded_once(tiny_checkpoint, tmp_path):
    """In bfloat16: down's columns are the rounded products; gate and up are the experts' own bits."""
    model, _ = load_stock(tiny_checkpoint("qwen3_moe"), "bfloat16")
    model.save_pretrained(tmp_path / "bf16")
    mix = {"experts": [6, 1], "gates": [0.3, -1.7]}
    apply(tmp_path / "bf16", {"layers": {"2": {"condensed": mix}}}, tmp_path / "out")
    source, out = Checkpoint.open(tmp_path / "bf16"), Checkpoint.open(tmp_path / "out")
    at = "model.layers.2.mlp."
    for part in ("gate_proj", "up_proj"):
        whole = out.read(f"{at}{part}.weight")
        assert (whole == np.concatenate([source.read(f"{at}experts.{e}.{part}.weight") for e in (6, 1)])).all()
    downs = [torch.tensor(source.read(f"{at}experts.{e}.down_proj.weight")) for e in (6, 1)]
    products = torch.cat([downs[0] * np.float32(0.3), downs[1] * np.float32(-1.7)], 1)
    assert torch.equal(torch.tensor(out.read(f"{at}down_proj.weight")), products.bfloat16().float())


@pytest.mark.parametrize("fused", [False, True])
def test_the_spelling_on_disk_does_not_matter(tiny_checkpoint, tmp_path, fused):
    """Numbered and fused experts fold to the same logits."""
    folder = tiny_checkpoint("qwen2_moe", fused)
    apply(folder, {"layers": {"0": {"condensed": MIX}}}, tmp_path / "out")
    expected = slow_condense.Whole(folder).logits(texts(), {0: ([5, 0], [0.7, -0.3], 0.6)})
    assert close(loaded_logits(tmp_path / "out"), expected)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "olmoe"])
def test_all_layers_may_be_condensed(tiny_checkpoint, tmp_path, data, model_type):
    """It is said aloud, loads, and `verify` agrees: a dense model."""
    out = tmp_path / "out"
    report = condense(tiny_checkpoint(model_type), out, layers=4, data=data)
    assert any("the result is a dense model" in note for note in report.report["warnings"])
    assert report.report["after"]["experts"] == 0
    assert verify(out, against=tiny_checkpoint(model_type))["ok"]


def test_the_first_layers_of_a_prefix_family_stay_stock(tiny_checkpoint, tmp_path, data):
    """deepseek_v2 has layer 0 dense: condensing 1 raises its count to 2, condensing 2 needs our layout."""
    condense(tiny_checkpoint("deepseek_v2"), tmp_path / "a", layer_ids=[1], data=data)
    assert tiny.read(tmp_path / "a")[1]["first_k_dense_replace"] == 2
    assert load_stock(tmp_path / "a", "float32")[1] == {}
    condense(tiny_checkpoint("deepseek_v2"), tmp_path / "b", layer_ids=[2], data=data)
    assert is_ours(tmp_path / "b")


def test_a_plan_is_replayed(tiny_checkpoint, tmp_path, data):
    """`apply` of the report's plan writes the same bytes; so does a resumed run."""
    folder = tiny_checkpoint("qwen2_moe")
    condense(folder, tmp_path / "a", layers=2, data=data)
    apply(folder, tmp_path / "a", tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = condense(folder, tmp_path / "a", layers=2, data=data, resume=True)
    assert again.report["layer_order"]


def test_a_dry_run_gives_the_size(tiny_checkpoint, tmp_path, data):
    """The same parameters as the real run, with nothing written."""
    folder = tiny_checkpoint("qwen2_moe")
    planned = condense(folder, tmp_path / "out", layers=2, data=data, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert planned.report["after"] == condense(folder, tmp_path / "out", layers=2, data=data).report["after"]


def test_verify_agrees_with_gates_that_bfloat16_rounded(tiny_checkpoint, tmp_path):
    """A gate of 0.3 moves nearly every weight of `down` when it is rounded; that is no fault, a gate of 0.31 is one."""
    model, _ = load_stock(tiny_checkpoint("qwen2_moe"), "bfloat16")
    model.save_pretrained(tmp_path / "bf16")
    for name, gate in (("out", 0.3), ("other", 0.31)):
        layer = {"condensed": {"experts": [5, 0], "gates": [0.7, gate], "shared_gate": 0.6}}
        apply(tmp_path / "bf16", {"layers": {"1": layer}}, tmp_path / name)
    assert verify(tmp_path / "out", against=tmp_path / "bf16")["checks"][-1]["ok"]
    shutil.copy(tmp_path / "out" / "coterie.json", tmp_path / "other" / "coterie.json")
    found = verify(tmp_path / "other", against=tmp_path / "bf16")
    assert {check["name"] for check in found["checks"] if not check["ok"]} == {
        "accounts for every tensor", "logits equal the masked original",
    }  # fmt: skip


def test_verify_finds_a_wrong_gate(tiny_checkpoint, tmp_path):
    """A plan whose gates are not those that were folded: other bytes, other logits."""
    folder, out = tiny_checkpoint("qwen2_moe"), tmp_path / "out"
    apply(folder, {"layers": {"1": {"condensed": MIX}}}, out)
    record = json.loads((out / "coterie.json").read_text())
    record["plan"]["layers"]["1"]["condensed"]["gates"] = [0.71, -0.3]
    (out / "coterie.json").write_text(json.dumps(record))
    bad = {check["name"] for check in verify(out, against=folder)["checks"] if not check["ok"]}
    assert bad == {"accounts for every tensor", "logits equal the masked original"}


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("qwen2_moe", {"layers": 5}, "--layers 5: .* has 4 layers with experts"),
        ("exaone_moe", {"layer_ids": [0]}, "--layer-ids 0: it is dense already; layers with experts: 1, 2, 3"),
        ("qwen2_moe", {"layer_ids": [4]}, "--layer-ids 4: the model's 4 layers end at 3"),
        ("qwen2_moe", {"layer_ids": [1, 1]}, "expected distinct layers"),
        ("qwen2_moe", {"layer_ids": "1,x"}, "expected decoder layer numbers"),
        ("qwen2_moe", {"layers": 1, "keep": 9}, "--keep 9: the layers have 8 experts"),
        ("qwen2_moe", {"layers": 1, "keep": -1}, "--keep -1"),
        ("qwen3_moe", {"layers": 1, "keep": 0}, "--keep 0: .* has no shared expert"),
        ("qwen2_moe", {"layers": 0}, "--layers 0: there is nothing to do"),
        ("qwen2_moe", {}, "found neither"),
        ("qwen2_moe", {"layers": 1, "layer_ids": [1]}, "found both"),
        ("qwen2_moe", {"layers": 1, "select": "best"}, "--select 'best': unknown"),
        ("qwen2_moe", {"layers": 1, "layer_search": "wide"}, "--layer-search 'wide': unknown"),
        ("qwen2_moe", {"layer_ids": [1], "layer_search": "beam"}, "--layer-search would be ignored"),
        ("gpt_oss", {"layers": 1}, "its experts have biases"),
        ("nemotron_h", {"layers": 1}, "its experts have no gate"),
        ("gemma4_text", {"layers": 1}, "one dense SwiGLU MLP"),
        ("qwen3_5_moe", {"layers": 1}, "our own layout holds text models alone"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tiny_checkpoint, tmp_path, model_type, options, message):
    """Without reading data, and with nothing written."""
    with pytest.raises(CoterieError, match=message):
        condense(tiny_checkpoint(model_type), tmp_path / "out", data=["x=hub:nobody/nothing"], **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("condensed", "message"),
    [
        ({"experts": [8], "gates": [1.0]}, "its ids end at 7"),
        ({"experts": [1, 1], "gates": [1.0, 1.0]}, "distinct expert ids"),
        ({"experts": [1], "gates": []}, "one number per expert"),
        ({"experts": [1], "gates": ["1"]}, "one number per expert"),
        ({"experts": [], "gates": []}, "nothing would be left"),
        ({"experts": [], "gate": []}, "with the keys experts, gates and shared_gate"),
    ],
)
def test_plans_that_do_not_fit_are_refused(tiny_checkpoint, tmp_path, condensed, message):
    """Whatever a hand-edited plan says."""
    with pytest.raises(CoterieError, match=message):
        apply(tiny_checkpoint("qwen3_moe"), {"layers": {"1": {"condensed": condensed}}}, tmp_path / "out")


def test_what_is_not_the_models_own_type_is_said_before_work(tiny_checkpoint, tmp_path, data, caplog):
    """A conversion, and our own layout."""
    report = condense(tiny_checkpoint("deepseek_v3"), tmp_path / "a", layers=1, data=data)
    assert report.report["converted"] == {"from": "deepseek_v3", "to": "glm4_moe_lite"}
    assert report.plan["converted"] == "glm4_moe_lite"
    condense(tiny_checkpoint("olmoe"), tmp_path / "b", layers=1, data=data)
    assert "converted to glm4_moe_lite" in caplog.text and "layout that `coterie.load` reads" in caplog.text


def test_damaged_weights_are_named(tiny_checkpoint, tmp_path, data):
    """NaN in one expert that few tokens choose: refused, with nothing written."""
    folder = shutil.copytree(tiny_checkpoint("qwen2_moe"), tmp_path / "bad")
    tensors, config = tiny.read(folder)
    tensors["model.layers.2.mlp.experts.5.up_proj.weight"][0, 0] = np.nan
    tiny.write(folder, tensors, config)
    with pytest.raises(CoterieError, match="NaN"):
        condense(folder, tmp_path / "out", layer_ids=[2], data=data)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("select", ["least-squares", "official"])
def test_a_block_that_was_opened_is_condensed(tiny_checkpoint, tmp_path, select):
    """Llama 4, whose blocks transformers keeps closed: its config lists the layers that keep their experts."""
    data = tmp_path / "ids.jsonl"
    data.write_text("".join(json.dumps({"input_ids": list(range(i + 3, i + 40))}) + "\n" for i in range(8)))
    folder, out = tiny_checkpoint("llama4"), tmp_path / "out"
    report = condense(folder, out, layers=1, select=select, data={"a": data}, samples=8)
    [gone] = map(int, report.plan["layers"])
    config = json.loads((out / "config.json").read_text())["text_config"]
    assert config["moe_layers"] == [i for i in range(4) if i != gone]
    result = verify(out, against=folder)
    assert result["ok"] and "1 condensed layers as explicit sums" in result["checks"][-1]["detail"], result
