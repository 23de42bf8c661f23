"""The contract every family keeps, on a tiny checkpoint of each: nothing unclaimed, nothing lost, exact removal.

The families come from the registry: a new file in `coterie/model/families` is tested without a change here.
"""

import json
import re
from collections import Counter

import numpy as np
import pytest

import forms
import tiny
from coterie.errors import CoterieError
from coterie.model.experts import Experts, expert_biases, expert_shapes, read_rows
from coterie.model.family import detect, registry
from coterie.model.layer import ROLES, expert_axis, find_blocks, shared_by
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.inspect_ import inspect
from coterie.verbs.prune import prune
from coterie.verbs.sparsify import sparsify
from coterie.verbs.verify import verify

STOCK = [t for t in tiny.model_types() if registry()[t].stock]
SPELLINGS = tiny.spellings()
every_spelling = pytest.mark.parametrize(
    ("model_type", "fused"), SPELLINGS, ids=[t + ("-fused" if fused else "") for t, fused in SPELLINGS]
)
every_stock_family = pytest.mark.parametrize("model_type", STOCK)


def opened(folder):
    checkpoint = Checkpoint.open(folder)
    family = detect(checkpoint.config, list(checkpoint.tensors))
    return checkpoint, family, find_blocks(checkpoint, family)


def details(result):
    """Detail by check; fails with all of them where one is not ok."""
    assert result["ok"], result["checks"]
    return {check["name"]: check["detail"] for check in result["checks"]}


def expert_bytes(checkpoint, block, e):
    """Everything that belongs to expert e, by what it is called within the block; written apart from `apply`."""
    if block.experts:
        return {key: checkpoint.raw(name) for key, name in block.experts[e].items()}
    found = {}
    for name in block.fused:
        size = checkpoint.tensors[name].num_bytes // block.num_experts
        found[name] = checkpoint.raw(name, e * size, size)
    return found


# --- claiming -----------------------------------------------------------------------------------------------------


@every_spelling
def test_every_tensor_has_one_plausible_role(tiny_checkpoint, model_type, fused):
    """Each tensor has exactly one role; routers count the experts; only what is named so is an expert's."""
    checkpoint, family, blocks = opened(tiny_checkpoint(model_type, fused))
    assert set(blocks.roles) == set(checkpoint.tensors)
    assert set(blocks.roles.values()) <= set(ROLES)
    assert family.num_experts(checkpoint.config) == tiny.NUM_EXPERTS
    assert family.num_experts_per_token(checkpoint.config) == tiny.TOP_K
    counts = Counter(blocks.roles.values())
    assert counts["router"] == len(blocks.moe) == len({(b.key, b.attention) for b in blocks.moe})
    for name, role in blocks.roles.items():
        if role == "expert":
            assert re.search(r"expert|_linear|[.]moe[.]", name), name
            assert "shared" not in name, name
        if re.search(r"embed|lm_head|norm|self_attn|vision_(model|tower)", name):
            assert role in ("other", "shared"), name
    for block in blocks.moe:
        num_rows = tiny.NUM_EXPERTS + block.num_zero
        assert read_rows(checkpoint, block, block.router).shape == (num_rows, tiny.HIDDEN)
        for name in block.rows:
            assert expert_axis(block, name, checkpoint.tensors[name].shape) is not None


@every_spelling
def test_an_experts_matrices_account_for_its_weights(tiny_checkpoint, model_type, fused):
    """`experts[e]` is (gate, up, down) as (F, D), (F, D), (D, F), and all experts together are all expert weights."""
    checkpoint, _, blocks = opened(tiny_checkpoint(model_type, fused))
    for block in blocks.moe:
        gate, up, down = Experts(checkpoint, block)[tiny.NUM_EXPERTS - 1]
        if not block.attention:  # attention experts project to heads and back from them
            assert up.shape[1] == down.shape[0] == tiny.HIDDEN
            assert up.shape == down.shape[::-1]
        assert gate is None or gate.shape == up.shape
        names = [*(n for expert in block.experts for n in expert.values()), *block.fused]
        weights = sum(checkpoint.tensors[n].num_parameters for n in names if "bias" not in n)
        assert tiny.NUM_EXPERTS * sum(m.size for m in (gate, up, down) if m is not None) == weights


@pytest.mark.parametrize("model_type", [t for t, fused in SPELLINGS if fused])
def test_both_spellings_hold_the_same_experts(tiny_checkpoint, model_type):
    """An expert read from the hub's spelling equals the one read from transformers' own."""
    hub, fused = opened(tiny_checkpoint(model_type)), opened(tiny_checkpoint(model_type, fused=True))
    assert [b.name for b in hub[2].moe] == [b.name for b in fused[2].moe]
    for ours, theirs in zip(hub[2].moe, fused[2].moe, strict=True):
        for e in (0, 5):
            one, other = Experts(hub[0], ours).flat(e), Experts(fused[0], theirs).flat(e)
            np.testing.assert_array_equal(one, other)


# --- rewriting ----------------------------------------------------------------------------------------------------


@every_spelling
def test_removing_nothing_changes_no_byte(tiny_checkpoint, tmp_path, model_type, fused):
    """With ratio 0 every tensor keeps its name, dtype, shape and bytes, and config.json its values."""
    source = Checkpoint.open(tiny_checkpoint(model_type, fused))
    prune(source.path, tmp_path / "out", method="first", ratio=0)
    out = Checkpoint.open(tmp_path / "out")
    assert out.config == source.config
    assert list(out.tensors) == list(source.tensors)
    for name, tensor in source.tensors.items():
        assert (out.tensors[name].dtype, out.tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert out.raw(name) == source.raw(name)


@every_spelling
@pytest.mark.parametrize("method", ["stun", "random"])
def test_removal_is_exact(tiny_checkpoint, tmp_path, model_type, fused, method):
    """After a quarter of the experts is gone, stock transformers loads the result without a complaint, and its
    logits equal to the last bit those of the original with the dropped experts masked, which are not the original's."""
    source = tiny_checkpoint(model_type, fused)
    prune(source, tmp_path / "out", method=method, ratio=0.25, seed=3 if method == "random" else 0)
    found = details(verify(tmp_path / "out", against=source))
    assert f"of {tiny.NUM_EXPERTS * 3 // 4} experts" in found["files"]
    if model_type in STOCK:
        assert "no key missing" in found["loads in stock transformers"]
        comparison = found["logits equal the masked original"]
        assert comparison.startswith("bit-equal"), comparison
        assert float(re.search(r"moved them by up to ([\d.e+-]+)", comparison)[1]) > 1e-3
    else:
        assert found["loads in stock transformers"].startswith("not loaded: transformers has no causal language model")


@every_spelling
def test_kept_experts_keep_their_bytes(tiny_checkpoint, tmp_path, model_type, fused):
    """Expert i of the result is, byte for byte, expert kept[i] of the source; so is its router row."""
    source, _, before = opened(tiny_checkpoint(model_type, fused))
    report = prune(source.path, tmp_path / "out", method="random", ratio=0.25)
    out, _, after = opened(tmp_path / "out")
    for old, new in zip(before.moe, after.moe, strict=True):
        layer = report.plan["layers"][old.key]
        kept = (layer["attention"] if old.attention else layer)["kept"]
        assert new.num_experts == len(kept) == tiny.NUM_EXPERTS * 3 // 4
        for i, e in enumerate(kept):
            assert expert_bytes(out, new, i) == expert_bytes(source, old, e)
        for name, before_it in zip((new.router, *new.rows), (old.router, *old.rows), strict=True):
            found, expected = read_rows(out, new, name), read_rows(source, old, before_it)
            axis = expected.shape.index(old.num_rows)
            np.testing.assert_array_equal(found, expected.take([*kept, *old.zero_rows], axis))


@every_stock_family
def test_order_of_experts_means_nothing(tiny_checkpoint, tmp_path, model_type):
    """Swapping neighbouring experts with their router rows, biases and table entries leaves the function alone, so
    the roles name everything that belongs to an expert. Tight, not exact: a token's experts are added in id order."""
    source, _, blocks = opened(tiny_checkpoint(model_type))
    tensors, config = tiny.read(source.path)
    swap = np.arange(tiny.NUM_EXPERTS).reshape(-1, 2)[:, ::-1].ravel()  # within every routing group
    for block in blocks.moe:
        for name in (*block.fused, block.router, *block.rows):
            tensors[name] = tensors[name].copy()
            held, axis = tensors[name], 0
            if shared_by(block, name) > 1:
                held = held[block.layout.segment[0]]
            elif name not in block.fused:
                axis = expert_axis(block, name, held.shape)
            parts = held.reshape(*held.shape[:axis], block.num_rows, -1)
            held[:] = parts.take([*swap, *block.zero_rows], axis).reshape(held.shape)
        for name in block.tables:
            tensors[name] = swap[tensors[name]].astype(tensors[name].dtype)
        for e in range(0, tiny.NUM_EXPERTS if block.experts else 0, 2):
            for key, name in block.experts[e].items():
                other = block.experts[e + 1][key]
                tensors[name], tensors[other] = tensors[other], tensors[name]
    tiny.write(tmp_path / "swapped", tensors, config)
    expected, found = tiny.logits(source.path), tiny.logits(tmp_path / "swapped")
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("published", [True, False])
def test_identity_experts_stay(tiny_checkpoint, tmp_path, published):
    """The router's rows of experts that are the identity are none of the experts that are counted, ranked and cut;
    whether they have weights (transformers saves some, which it never uses) or, as published, none."""
    tensors, config = tiny.read(tiny_checkpoint("longcat_flash"))
    stored = {n: v for n, v in tensors.items() if not (published and re.search(r"experts\.(8|9|10|11)\.", n))}
    assert (stored.keys() != tensors.keys()) == published
    source = Checkpoint.open(tiny.write(tmp_path / "model", stored, config))
    prune(source.path, tmp_path / "out", ratio=0.5)
    out, _, after = opened(tmp_path / "out")
    assert out.config["zero_expert_num"] == source.config["zero_expert_num"] == tiny.NUM_ZERO
    for block in after.moe:
        assert out.tensors[block.router].shape == (tiny.NUM_EXPERTS // 2 + tiny.NUM_ZERO, tiny.HIDDEN)
        assert all(bool(expert) != published for expert in block.unused)


def test_weights_of_identity_experts_are_refused(tiny_checkpoint, tmp_path):
    """Fused as in memory, gate and up have rows for them: whose is whose is not guessed."""
    folder = tiny.save("qwen3_moe", tmp_path / "model", fused=True)
    tensors, config = tiny.read(folder)
    config |= {"model_type": "longcat_flash", "zero_expert_num": tiny.NUM_EXPERTS}
    for name in [n for n in tensors if n.endswith("mlp.gate.weight")]:
        rows = tensors.pop(name)
        tensors[name.replace("gate.weight", "router.classifier.weight")] = np.concatenate([rows, rows])
    for name in [n for n in tensors if n.endswith("gate_up_proj")]:
        tensors[name] = np.concatenate([tensors[name]] * 2)
    with pytest.raises(CoterieError, match=r"gate_up_proj.* has shape \[16, 32, 32\], which 8 experts cannot share"):
        opened(tiny.write(folder, tensors, config))


def test_a_known_text_model_in_another_wrapper_is_pruned(tmp_path):
    """Its config and tensors stand inside: Mistral Small 4 as published is a mistral3."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = tiny.tiny_config("mistral4").to_dict()
    vision = {**tiny.VISION, "model_type": "pixtral", "image_size": 32}
    config = AutoConfig.for_model("mistral3", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    prune(tmp_path / "model", tmp_path / "out", ratio=0.25)
    details(verify(tmp_path / "out", against=tmp_path / "model"))


def test_kimi_k25_as_published_is_cut_and_calibrated(tiny_checkpoint, tmp_path):
    """Its text model calls itself kimi_k2, which transformers has no class for, and its experts are in int4."""
    model = forms.store(tiny_checkpoint("kimi_k25"), tmp_path / "model", "int4")
    config = json.loads((model / "config.json").read_text())
    config["text_config"] |= {"model_type": "kimi_k2", "quantization_config": config.pop("quantization_config")}
    (model / "config.json").write_text(json.dumps(config))
    assert inspect(model)["can"]["collect"] is True
    data = tiny.id_lines(tmp_path / "a.jsonl", 4, 24)
    prune(model, tmp_path / "out", ratio=0.25, method="reap", data=data, samples=4, seq_len=24)
    details(verify(tmp_path / "out", against=model))
    assert opened(tmp_path / "out")[2].main[0].num_experts == 6


def test_one_linear_per_expert_is_read_and_cut_as_fused_ones(tiny_checkpoint, tmp_path):
    """gpt-oss as others save it: the same matrices, biases, choice, and experts left, with their new numbers."""
    fused = opened(tiny_checkpoint("gpt_oss"))
    tensors, config = tiny.read(fused[0].path)
    listed = opened(tiny.write(tmp_path / "lists", tiny.as_lists(tensors), config))
    for ours, theirs in zip(listed[2].moe, fused[2].moe, strict=True):
        assert expert_shapes(listed[0], ours) == expert_shapes(fused[0], theirs)
        for e in (0, 5):
            np.testing.assert_array_equal(Experts(listed[0], ours).flat(e), Experts(fused[0], theirs).flat(e))
            biases = zip(expert_biases(listed[0], ours, e), expert_biases(fused[0], theirs, e), strict=True)
            for found, expected in biases:
                np.testing.assert_array_equal(found, expected)
    for folder, name in ((fused[0].path, "fused"), (listed[0].path, "listed")):
        prune(folder, tmp_path / f"{name}-out", method="weight-norm", ratio=0.25)
        sparsify(folder, tmp_path / f"{name}-zeros", method="magnitude")
    for what in ("out", "zeros"):
        expected, found = (tiny.read(tmp_path / f"{name}-{what}")[0] for name in ("fused", "listed"))
        expected = tiny.as_lists(expected)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


def test_hash_tables_name_all_experts(tiny_checkpoint):
    """The tiny table of token -> expert spreads over all experts; a degenerate one would let any mapping pass."""
    checkpoint, _, blocks = opened(tiny_checkpoint("deepseek_v4"))
    tables = [name for block in blocks.moe for name in block.tables]
    assert tables
    for name in tables:
        assert set(checkpoint.read(name).ravel()) == set(range(tiny.NUM_EXPERTS))


# --- what travels with an expert ------------------------------------------------------------------------------------


def test_scales_and_biases_travel_with_their_expert(tiny_checkpoint, tmp_path):
    """Whatever is stored under an expert's number is kept, renumbered or dropped with it: FP8 weights, their scales,
    biases."""
    import torch
    from safetensors.torch import save_file

    tensors, config = tiny.read(tiny_checkpoint("kimi_k2"))
    generator = np.random.default_rng(0)
    made = {}
    for name, values in tensors.items():
        made[name] = torch.from_numpy(values)
        if ".experts." in name:
            made[name] = made[name].to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = torch.from_numpy(generator.random((1, 1), np.float32))
            made[name.replace(".weight", ".bias")] = torch.from_numpy(generator.random(len(values), np.float32))
    tiny.write(tmp_path / "model", {}, config)
    save_file(made, tmp_path / "model" / "model.safetensors")
    source, _, before = opened(tmp_path / "model")
    assert set(before.moe[0].experts[0]) == {f"{m}_proj.{k}" for m in ("gate", "up", "down") for k in (
        "weight", "weight_scale_inv", "bias",
    )}  # fmt: skip
    for method in ("stun", "weight-norm"):  # both read FP8 weights through their scales
        report = prune(source.path, tmp_path / method, method=method, ratio=0.25)
        details(verify(tmp_path / method, against=source.path))
        out, _, after = opened(tmp_path / method)
        for old, new in zip(before.moe, after.moe, strict=True):
            for i, e in enumerate(report.plan["layers"][old.key]["kept"]):
                assert expert_bytes(out, new, i) == expert_bytes(source, old, e)


MTP = {  # model type -> (where its MTP layer stands, tensors of the layer's own beside a decoder layer's)
    "qwen3_next": ("mtp.layers.0.", ("mtp.fc.weight", "mtp.norm.weight")),
    "deepseek_v3": ("model.layers.4.", ("model.layers.4.eh_proj.weight", "model.layers.4.shared_head.norm.weight")),
}


@pytest.fixture(params=MTP)
def with_mtp(request, tiny_checkpoint, tmp_path):
    """A model with one multi-token-prediction layer, which repeats the last decoder layer; and the layer's names."""
    prefix, own = MTP[request.param]
    tensors, config = tiny.read(tiny_checkpoint(request.param))
    last = "model.layers.3."
    layer = {prefix + n.removeprefix(last): v.copy() for n, v in tensors.items() if n.startswith(last)}
    layer |= {name: np.ones((tiny.HIDDEN, tiny.HIDDEN), np.float32) for name in own}
    config["num_nextn_predict_layers"] = 1
    return tiny.write(tmp_path / "model", tensors | layer, config), set(layer)


def test_mtp_layers_are_cut_like_the_others(with_mtp, tmp_path):
    """A multi-token-prediction layer keeps as many experts as the others, and stock transformers still loads all
    that it reads."""
    model, names = with_mtp
    prune(model, tmp_path / "out", ratio=0.25)
    details(verify(tmp_path / "out", against=model))
    _, _, blocks = opened(tmp_path / "out")
    assert {block.num_experts for block in blocks.moe} == {6}
    assert sum(block.mtp for block in blocks.moe) == 1
    kept = names & set(Checkpoint.open(tmp_path / "out").tensors)
    assert {n for n in names if ".experts." not in n} <= kept


def test_mtp_layers_can_be_dropped(with_mtp, tmp_path):
    """With drop_mtp nothing of the layer is left, and the config counts none."""
    model, names = with_mtp
    prune(model, tmp_path / "out", ratio=0.25, drop_mtp=True)
    details(verify(tmp_path / "out", against=model))
    out, _, blocks = opened(tmp_path / "out")
    assert not any(block.mtp for block in blocks.moe)
    assert not names & set(out.tensors)
    assert out.config["num_nextn_predict_layers"] == 0


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp.mystery.weight", "mlp.experts.scale", "mlp.experts.8.up_proj.weight"])
def test_an_unclaimed_tensor_of_a_block_is_refused(tiny_checkpoint, tmp_path, name):
    """A tensor inside a MoE block that no rule claims is named, not skipped."""
    tensors, config = tiny.read(tiny_checkpoint("qwen3_moe"))
    tensors[f"model.layers.1.{name}"] = np.zeros(8, np.float32)
    with pytest.raises(CoterieError, match=re.escape(name)):
        opened(tiny.write(tmp_path / "model", tensors, config))


def test_a_dense_model_is_refused(tmp_path):
    """A model without experts is called dense."""
    tensors = {"model.layers.0.mlp.up_proj.weight": np.zeros((4, 4), np.float32)}
    model = tiny.write(tmp_path / "model", tensors, {"model_type": "llama", "num_hidden_layers": 1})
    with pytest.raises(CoterieError, match=r"'llama' is dense.*mixture-of-experts"):
        prune(model, tmp_path / "out")


def test_a_dense_model_of_a_known_family_is_refused(tiny_checkpoint, tmp_path):
    """A known model type whose layers are all dense has nothing to prune."""
    tensors, config = tiny.read(tiny_checkpoint("qwen3_moe"))
    dense = {name: values for name, values in tensors.items() if ".mlp." not in name}
    with pytest.raises(CoterieError, match="no layer has a router"):
        opened(tiny.write(tmp_path / "model", dense, config))


def test_an_unknown_family_is_refused_with_its_neighbours(tiny_checkpoint, tmp_path):
    """An unknown model type is refused, naming the nearest known ones and where to add it."""
    tensors, config = tiny.read(tiny_checkpoint("mixtral"))
    model = tiny.write(tmp_path / "model", tensors, {**config, "model_type": "mixtrol"})
    with pytest.raises(CoterieError, match=r"'mixtrol' is not a family we know.*mixtral.*coterie/model/families"):
        prune(model, tmp_path / "out")


def test_a_family_that_cannot_be_built_is_reported():
    """A family in the registry that no recipe can make tiny fails its tests with what to add, not with a skip."""
    with pytest.raises(LookupError, match="HAND_MADE"):
        tiny.tiny_config("no_such_family")


def test_config_keeps_the_keys_it_had(tiny_checkpoint, tmp_path):
    """Only the count changes in config.json, under the key the source used."""
    source = tiny_checkpoint("qwen3_moe")
    prune(source, tmp_path / "out", ratio=0.25)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert len(changed) == 1
    assert after[changed.pop()] == 6
