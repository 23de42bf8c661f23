"""`verify` on results that were tampered with: each fault is found, named, and found by the check that should."""

import json
import re
import shutil

import numpy as np
import pytest

import tiny
from coterie.edits import masked
from coterie.errors import CoterieError
from coterie.judge import loads
from coterie.model import loading
from coterie.model.layer import Model
from coterie.storage.checkpoint import INDEX, Checkpoint
from coterie.verbs.apply import apply
from coterie.verbs.prune import prune
from coterie.verbs.verify import verify

FILES, BYTES, LOADS = "files", "accounts for every tensor", "loads in stock transformers"
COMPUTES, LOGITS = "computes", "logits equal the masked original"
ALL = [FILES, BYTES, LOADS, COMPUTES, LOGITS]
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    return tiny_checkpoint("qwen3_moe")


@pytest.fixture(scope="module")
def pruned(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "out"
    prune(source, folder, ratio=0.25)
    return folder


@pytest.fixture
def out(pruned, tmp_path):
    """A good result, to be spoiled."""
    return shutil.copytree(pruned, tmp_path / "out")


def rewrite(folder, change):
    """Applies `change(tensors)` to the weights of a folder."""
    tensors, config = tiny.read(folder)
    change(tensors)
    tiny.write(folder, tensors, config)


def edit(path, change):
    """Applies `change(content)` to a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def faults(result):
    """Details of the checks that failed, by name; every answer has the agreed form."""
    assert set(result) == {"ok", "checks"}
    assert all(set(check) == {"name", "ok", "detail"} for check in result["checks"])
    assert all(isinstance(check["ok"], bool) and check["detail"] for check in result["checks"])
    assert result["ok"] == all(check["ok"] for check in result["checks"])
    return {check["name"]: check["detail"] for check in result["checks"] if not check["ok"]}


def details(result):
    return {check["name"]: check["detail"] for check in result["checks"]}


# --- good results -------------------------------------------------------------------------------------------------


def test_a_good_result_passes_all_checks(out, source, capfd):
    """All five checks pass in order, saying what became of the tensors; nothing is printed."""
    seen = []
    result = verify(out, against=source, on_progress=lambda *step: seen.append(step))
    assert faults(result) == {}
    assert [check["name"] for check in result["checks"]] == ALL
    assert details(result)[BYTES] == "44 kept as is, 63 renamed, 4 row-sliced, 0 computed, 24 dropped"
    assert details(result)[LOGITS].startswith("bit-equal; leaving experts out of 4 routers")
    assert {stage for stage, _, _ in seen} == {"verifying", "comparing bytes"}
    assert capfd.readouterr() == ("", "")


def test_without_the_original_three_checks_are_made(out):
    """OUT alone is opened, loaded and run."""
    result = verify(out)
    assert faults(result) == {}
    assert [check["name"] for check in result["checks"]] == [FILES, LOADS, COMPUTES]


def test_any_model_can_be_verified_alone(source):
    """A checkpoint that coterie did not write has no plan to be held to."""
    result = verify(source)
    assert faults(result) == {}
    assert "no coterie.json" in details(result)[FILES]


def test_a_sharded_result_passes(source, tmp_path):
    """Shards and their index are compared like one file."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert Checkpoint.open(tmp_path / "sharded").indexed
    prune(tmp_path / "sharded", tmp_path / "out", ratio=0.25)
    assert faults(verify(tmp_path / "out", against=tmp_path / "sharded")) == {}


def test_averaged_experts_are_not_compared_with_masked_ones(source, tmp_path):
    """Where experts were merged no masked original exists: bytes are recomputed, logits need only be finite."""
    prune(source, tmp_path / "out", experts=2, kappa=3)
    result = verify(tmp_path / "out", against=source)
    assert faults(result) == {}
    assert re.search(r"[1-9]\d* computed", details(result)[BYTES])
    assert details(result)[LOGITS].startswith("not compared: experts were averaged")
    rewrite(tmp_path / "out", lambda t: t["model.layers.0.mlp.gate.weight"].__setitem__((0, 0), 3))
    assert set(faults(verify(tmp_path / "out", against=source))) == {BYTES}


def test_layers_of_unequal_size_pass_in_our_own_layout(source, tmp_path):
    """Our own layout is not for stock transformers; `coterie.load` reads it, and its logits are compared too."""
    plan = {"budget": {"layout": "coterie"}, "layers": {}}
    for layer, kept in enumerate(([0, 1, 2, 3, 4, 5], [2, 3, 7], [0, 1, 2, 4, 5, 6, 7], [0, 4])):
        plan["layers"][str(layer)] = {"kept": kept}
    apply(source, plan, tmp_path / "out")
    result = verify(tmp_path / "out", against=source)
    assert faults(result) == {}
    assert details(result)[LOADS].startswith("not loaded: layers keep different numbers of experts")
    assert "4 MoE blocks of 2 to 7 experts" in details(result)[FILES]
    assert "equal" in details(result)[LOGITS]


def test_what_cannot_be_loaded_is_said(tiny_checkpoint, tmp_path):
    """A family without a stock class passes on its files and bytes; the other checks say that they were not made."""
    model = tiny_checkpoint("arctic")
    prune(model, tmp_path / "out", ratio=0.25)
    result = verify(tmp_path / "out", against=model)
    assert faults(result) == {}
    assert all(details(result)[name].startswith("not ") for name in (LOADS, COMPUTES, LOGITS))


def test_too_little_memory_is_said(out, source, monkeypatch):
    """A model that does not fit in memory is loaded by name and shape alone; a wrong count is found even so."""
    monkeypatch.setattr(loading, "memory_short", lambda num_bytes: "needs 9.0 GB of memory, 1.0 GB available")
    result = verify(out, against=source)
    assert faults(result) == {}
    assert details(result)[LOADS].endswith("values were not read (needs 9.0 GB of memory, 1.0 GB available)")
    assert details(result)[LOGITS].startswith("not compared")
    edit(out / "config.json", lambda config: config.update(hidden_size=16))
    assert "mismatched keys" in faults(verify(out))[LOADS]


def test_memory_is_reckoned_in_float32(out):
    """Four bytes a parameter and some room: a tiny model fits, one of 10^15 parameters does not."""
    assert loads.float32_short(Checkpoint.open(out)) == ""

    class Huge:
        num_parameters = 10**15

    assert re.match(r"needs 5000000\.0 GB of memory, [\d.]+ GB available", loads.float32_short(Huge()))


# --- what the checker cannot run ------------------------------------------------------------------------------------


def fp8(folder, target, scales="BF16", router="F32", **config):
    """A copy of a checkpoint as published in FP8: every matrix of attention and experts with one scale, the router in
    its own dtype, all else in bfloat16."""
    import torch
    from safetensors.torch import save_file

    tensors, found = tiny.read(folder)
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    made = {}
    for name, values in tensors.items():
        tensor = torch.from_numpy(values)
        if name.endswith("proj.weight"):
            scale = tensor.abs().max() / 448
            made[name] = (tensor / scale).to(torch.float8_e4m3fn)
            made[name + "_scale_inv"] = scale.reshape(1, 1).to(dtypes[scales])
        else:
            made[name] = tensor.to(dtypes[router if name.endswith("gate.weight") else "BF16"])
    target.mkdir()
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (target / "config.json").write_text(json.dumps(found | {"dtype": "bfloat16", "quantization_config": settings}))
    return target


@pytest.mark.parametrize("scales", ["BF16", "F32"])
def test_fp8_as_published_is_computed_in_float32(source, tmp_path, scales):
    """What transformers decodes and what it leaves as stored meet in one dtype, so that logits are compared."""
    model = fp8(source, tmp_path / "fp8", scales)
    prune(model, tmp_path / "out", ratio=0.25)
    result = verify(tmp_path / "out", against=model)
    assert faults(result) == {}
    assert details(result)[COMPUTES] == "finite logits on 128 tokens in 2 sequence(s)"
    assert details(result)[LOGITS].startswith("bit-equal")


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_quantised_model_has_one_dtype(source, tmp_path, dtype):
    """A router stored in float32 among bfloat16 is of the dtype that is asked, as it is where nothing is quantised."""
    import torch

    model = loading.load(fp8(source, tmp_path / "fp8"), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32 if dtype == "float32" else torch.bfloat16}
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
        ({"quant_method": "awq", "bits": 4}, "pip install gptqmodel"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "pip install compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "pip install -U bitsandbytes"),
        ({"quant_method": "modelopt"}, "does not read quant_method 'modelopt'"),
    ],
)
def test_a_missing_package_is_no_fault(out, monkeypatch, settings, says):
    """What transformers reads only with a package that is not here, or not at all, is not held against OUT: the line
    says what to install."""
    from transformers.utils import import_utils

    for package in ("optimum", "gptqmodel", "compressed_tensors", "bitsandbytes"):
        if getattr(import_utils, f"is_{package}_available", lambda: False)():
            pytest.skip(f"{package} is installed")
    edit(out / "config.json", lambda config: config.update(quantization_config=settings))
    result = verify(out)
    assert faults(result) == {}
    assert details(result)[LOADS].startswith("not loaded: ")
    assert says in details(result)[LOADS]
    assert details(result)[COMPUTES].startswith("not computed")


def test_what_the_original_cannot_either_is_no_fault(source, tmp_path):
    """A tensor of a name that transformers has no place for, in OUT as in the original, is not held against OUT; one
    that the original does not have is."""
    model = shutil.copytree(source, tmp_path / "model")
    rewrite(model, lambda tensors: tensors.update({"model.layers.1.self_attn.k_proj.k_scale": np.ones(1, np.float32)}))
    prune(model, tmp_path / "out", ratio=0.25)
    alone, result = verify(tmp_path / "out"), verify(tmp_path / "out", against=model)
    assert "k_scale" in faults(alone)[LOADS]
    assert faults(result) == {}
    assert details(result)[LOADS].startswith("not loaded: the original does no better (unexpected keys: ")
    rewrite(
        tmp_path / "out", lambda tensors: tensors.update({"model.layers.1.self_attn.extra": np.ones(1, np.float32)})
    )
    assert "extra" in faults(verify(tmp_path / "out", against=model))[LOADS]


def test_a_forward_that_fails_for_both_is_no_fault(source, tmp_path, monkeypatch):
    """What stops the original's forward pass as well says nothing of OUT; what stops OUT's alone does."""
    model = shutil.copytree(source, tmp_path / "model")
    edit(model / "config.json", lambda config: config.update(hidden_act="nonesuch"))
    prune(model, tmp_path / "out", ratio=0.25)
    assert LOADS in faults(verify(tmp_path / "out"))
    assert faults(verify(tmp_path / "out", against=model)) == {}
    rewrite(model, lambda tensors: tensors["model.norm.weight"].__setitem__(0, np.nan))
    edit(model / "config.json", lambda config: config.update(hidden_act="silu"))
    prune(model, tmp_path / "infinite", ratio=0.25)
    assert COMPUTES in faults(verify(tmp_path / "infinite"))
    result = verify(tmp_path / "infinite", against=model)
    assert faults(result) == {}
    assert "not computed: the original does no better (" in details(result)[COMPUTES]


def test_an_unreadable_quantisation_is_told_from_a_broken_file(source, tmp_path):
    """Where transformers stumbles over quantised weights and there is no original to try, that is said; with one that
    loads, it is a fault."""
    model = fp8(source, tmp_path / "fp8")
    prune(model, tmp_path / "out", ratio=0.25)
    edit(tmp_path / "out" / "config.json", lambda config: config["quantization_config"].update(weight_block_size=3))
    alone, result = verify(tmp_path / "out"), verify(tmp_path / "out", against=model)
    assert LOADS in faults(result)
    assert faults(alone) == {} and "--against" in details(alone)[LOADS]


def undecided(tensors, config):
    """Routers whose rows come in pairs nearer than float32 can tell, of which the third choice takes one."""
    config["num_experts_per_tok"] = 3
    for layer in (2, 3):
        router = tensors[f"model.layers.{layer}.mlp.gate.weight"]
        router[1::2] = router[::2]
        router[::2, 0], router[1::2, 0] = 0, 1e-8
    return tensors, config


def test_rounding_that_grows_is_told_from_a_fault(source, tmp_path):
    """Where routers are nearly undecided, float32 chooses by rounding, and logits differ by what an expert gives: in
    float64 they agree, so that nothing is wrong; a wrong gate is found as before."""
    model = tiny.write(tmp_path / "model", *undecided(*tiny.read(source)))
    gates = {"experts": [3, 1, 6], "gates": [0.5, 0.25, 0.3], "shared_gate": 1.0}
    apply(model, {"layers": {"1": {"condensed": gates}}}, tmp_path / "out")
    result = verify(tmp_path / "out", against=model)
    assert faults(result) == {}
    assert re.match(r".*equal.* in float64; in float32 they differ by up to \d", details(result)[LOGITS])
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(tmp_path / "out", lambda tensors: tensors[name].__imul__(np.float32(1.01)))
    assert "differ by up to" in faults(verify(tmp_path / "out", against=model))[LOGITS]


# --- data ---------------------------------------------------------------------------------------------------------


def test_token_ids_are_used_as_given(out, source, tmp_path):
    """Lines of input_ids are sequences of their own, neither cut nor padded."""
    lines = [list(range(10, 80)), [3, 4], [5, 6, 7]]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in lines))
    result = verify(out, against=source, data=tmp_path / "data.jsonl")
    assert faults(result) == {}
    assert details(result)[COMPUTES] == "finite logits on 75 tokens in 3 sequence(s)"


def test_text_is_cut_into_blocks(out, source, tmp_path):
    """Text is tokenised by OUT's tokenizer; its first two blocks of 64 tokens are used."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)} | {"?": 100}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(out)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 100}" for i in range(300)))
    result = verify(out, against=source, data=tmp_path / "text.txt")
    assert faults(result) == {}
    assert details(result)[COMPUTES] == "finite logits on 128 tokens in 2 sequence(s)"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", '{"input_ids": [1, 128]}', "token 128; expected ids below 128"),
        ("data.jsonl", "[]", "no records"),
        ("data.txt", "", "empty"),
        ("data.txt", "no tokenizer here", "tokenizer"),
    ],
)
def test_bad_data_is_refused(out, tmp_path, name, content, message):
    """Data that the model cannot take is the caller's fault, not OUT's."""
    (tmp_path / name).write_text(content)
    with pytest.raises(CoterieError, match=message):
        verify(out, data=tmp_path / name)


def test_bad_folders_are_refused(out, source, tmp_path):
    """Without OUT, or with something else than a mixture of experts to compare with, nothing can be verified."""
    with pytest.raises(CoterieError, match="no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(CoterieError, match="no such folder"):
        verify(out, against=tmp_path / "nowhere")
    dense = tiny.write(tmp_path / "dense", {"lm_head.weight": np.ones((2, 2), np.float32)}, {"model_type": "llama"})
    with pytest.raises(CoterieError, match="dense"):
        verify(out, against=dense)


# --- faults -------------------------------------------------------------------------------------------------------


def test_a_changed_byte_is_found(out, source):
    """One flipped bit in one kept tensor is found and the tensor named."""
    tensor = Checkpoint.open(out).tensors["model.layers.2.self_attn.q_proj.weight"]
    with (out / tensor.file).open("r+b") as file:
        file.seek(tensor.start + 1001)
        byte = file.read(1)[0]
        file.seek(tensor.start + 1001)
        file.write(bytes([byte ^ 1]))
    assert faults(verify(out, against=source))[BYTES] == f"other bytes in {tensor.name}"


def test_a_missing_tensor_is_found(out, source):
    """A tensor that is gone is missed by name, by the plan and by transformers."""
    name = "model.layers.0.input_layernorm.weight"
    rewrite(out, lambda tensors: tensors.pop(name))
    found = faults(verify(out, against=source))
    assert set(found) == {BYTES, LOADS}
    assert found[BYTES] == f"missing: {name}"
    assert found[LOADS] == f"missing keys: {name}"


def test_an_incomplete_expert_is_found(out, source):
    """An expert without one of its matrices differs from its neighbours."""
    rewrite(out, lambda tensors: tensors.pop(EXPERT.format(3, "up")))
    found = faults(verify(out, against=source))
    assert "expert 3 differs from expert 0 (up_proj.weight: missing, there " in found[FILES]
    assert {BYTES, LOADS} <= set(found)


def test_a_surplus_tensor_is_found(out, source):
    """A tensor that the plan does not make is named."""
    rewrite(out, lambda tensors: tensors.update({"model.extra.weight": np.ones(3, np.float32)}))
    found = faults(verify(out, against=source))
    assert found[BYTES] == "not meant to be there: model.extra.weight"
    assert "unexpected keys: model.extra.weight" in found[LOADS]


def swap_experts(tensors):
    for part in ("gate", "up", "down"):
        a, b = EXPERT.format(0, part), EXPERT.format(4, part)
        tensors[a], tensors[b] = tensors[b], tensors[a]


def test_swapped_experts_are_found(out, source):
    """Two experts in each other's place load well, but have other bytes and other logits."""
    rewrite(out, swap_experts)
    found = faults(verify(out, against=source))
    assert set(found) == {BYTES, LOGITS}
    assert EXPERT.format(0, "down") in found[BYTES]
    assert "differ by up to" in found[LOGITS]


def test_swapped_experts_with_their_rows_are_found(out, source):
    """With their router rows swapped too, the function is the same but for rounding; only the bytes tell."""
    rewrite(out, swap_experts)
    order = [4, 1, 2, 3, 0, 5]
    name = "model.layers.1.mlp.gate.weight"
    rewrite(out, lambda tensors: tensors.update({name: tensors[name][order]}))
    result = verify(out, against=source)
    assert set(faults(result)) == {BYTES}
    assert "equal" in details(result)[LOGITS]


def test_a_wrong_count_is_found(out, source):
    """A config that counts other experts than the files hold is found before and by loading."""
    counts = {"num_experts", "num_local_experts"}
    edit(out / "config.json", lambda config: config.update(dict.fromkeys(counts & config.keys(), 5)))
    found = faults(verify(out, against=source))
    assert set(found) >= {FILES, BYTES, LOADS}
    assert "the config counts 5 experts" in found[FILES]
    assert "config.json is not the original's with new counts" in found[BYTES]
    assert "mismatched keys" in found[LOADS]


def test_a_wrong_shape_is_found(out, source):
    """A tensor of another shape is named by the plan's account and by transformers."""
    rewrite(out, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][:100].copy()}))
    found = faults(verify(out, against=source))
    assert found[BYTES] == "of another shape or dtype: lm_head.weight"
    assert found[LOADS] == "mismatched keys: lm_head.weight"


def test_a_plan_of_other_experts_is_found(out, source):
    """A plan that keeps as many experts, but not these, does not account for the bytes nor for the logits."""

    def change(record):
        layer = record["plan"]["layers"]["1"]
        layer["kept"] = sorted(set(range(8)) - set(layer["kept"]) | set(layer["kept"][:4]))
        layer.pop("clusters", None)

    edit(out / "coterie.json", change)
    assert set(faults(verify(out, against=source))) == {BYTES, LOGITS}


def test_a_plan_of_another_count_is_found(out):
    """A plan that keeps more experts than OUT holds is found without the original."""
    edit(out / "coterie.json", lambda record: record["plan"]["layers"].update({"2": {"kept": [0, 1, 2, 3, 4, 5, 6]}}))
    assert faults(verify(out))[FILES] == "layer 2 has 6 experts; the plan in coterie.json keeps 7"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"plan": {"layers": {"1": {"kept": [3, 2]}}}}', "\xff"])
def test_a_broken_plan_is_a_fault(out, source, content):
    """A coterie.json that cannot be read is OUT's fault, reported and not raised."""
    (out / "coterie.json").write_text(content, encoding="latin-1")
    assert {FILES, BYTES, LOGITS} <= set(faults(verify(out, against=source)))


def test_without_a_plan_nothing_can_be_accounted_for(out, source):
    """Comparing with an original needs to know what was meant."""
    (out / "coterie.json").unlink()
    assert "no coterie.json" in faults(verify(out, against=source))[BYTES]


def test_another_original_is_found(out, source, tmp_path):
    """OUT is not accounted for by a model that it was not made from, however similar."""
    other = shutil.copytree(source, tmp_path / "other")
    rewrite(other, lambda tensors: tensors["lm_head.weight"].__iadd__(1))
    assert "is not what OUT was made from" in faults(verify(out, against=other))[BYTES]


def test_damaged_numbers_are_found(out):
    """Logits that are not finite are a fault."""
    rewrite(out, lambda tensors: tensors["model.norm.weight"].__setitem__(0, np.nan))
    assert "logits are NaN or infinite" in faults(verify(out))[COMPUTES]


def test_a_truncated_file_ends_the_checks(out, source):
    """A file that cannot be opened is one fault; what needs it is not tried."""
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = verify(out, against=source)
    assert list(faults(result)) == [FILES]
    assert len(result["checks"]) == 1


def test_an_index_that_leaves_a_tensor_out_is_found(out):
    """A tensor that the index does not list would be skipped by loaders that trust it."""
    names = list(Checkpoint.open(out).tensors)
    index = {"weight_map": dict.fromkeys(names[1:], "model.safetensors")}
    (out / INDEX).write_text(json.dumps(index))
    assert f"leaves out {names[0]}" in faults(verify(out))[FILES]


def test_a_wrong_table_is_found(tiny_checkpoint, tmp_path):
    """A table of token -> expert that names another expert than the plan's stand-in changes bytes and logits."""
    source = tiny_checkpoint("deepseek_v4")
    prune(source, tmp_path / "out", ratio=0.25)
    checkpoint = Checkpoint.open(tmp_path / "out")
    name = next(n for n in checkpoint.tensors if n.endswith("tid2eid"))
    rewrite(tmp_path / "out", lambda tensors: tensors.update({name: (tensors[name] + 1) % 6}))
    assert set(faults(verify(tmp_path / "out", against=source))) == {BYTES, LOGITS}


def test_a_comparison_that_masks_nothing_is_a_fault(out, source, monkeypatch):
    """If the original's routers are never seen at work, the comparison could not have failed and does not count."""
    import torch

    monkeypatch.setattr(masked.MaskedRouting, "_linear", staticmethod(torch.nn.functional.linear))
    found = faults(verify(out, against=source))
    assert found[LOGITS].startswith("not a comparison: the router of layer 0, layer 1, layer 2 and 1 more")


def test_masks_need_their_router(source, pruned):
    """A model in which the router cannot be found by its values cannot be masked."""
    import torch
    from transformers import AutoModelForCausalLM

    from coterie.edits.plan import read_plan

    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight += 1
    original = Model.open(source)
    with pytest.raises(CoterieError, match=r"nothing equal to 'model.layers.1.mlp.gate.weight'"):
        masked.mask_experts(model, original, read_plan(pruned))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe"])
def test_masking_logits_alone_is_not_removal(tiny_checkpoint, tmp_path, monkeypatch, model_type):
    """Where a bias joins the selection after a sigmoid or softmax, the biases must be masked as well: without, logits
    differ from those of the pruned model."""
    source = tiny_checkpoint(model_type)
    prune(source, tmp_path / "out", ratio=0.25)
    assert faults(verify(tmp_path / "out", against=source)) == {}
    original = masked.twin
    keep = []

    def copied(model, checkpoint, block, name):
        keep.append(original(model, checkpoint, block, name))
        return keep[-1].clone() if name.endswith("bias") else keep[-1]

    monkeypatch.setattr(masked, "twin", copied)
    assert "differ by up to" in faults(verify(tmp_path / "out", against=source))[LOGITS]
