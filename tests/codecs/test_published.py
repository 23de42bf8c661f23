"""Models in the forms they are published in are read as the dense models that they stand for, bit for bit."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import published
import tiny
from coterie import apply, condense, drop, prune, sparsify, verify
from coterie.errors import CoterieError
from coterie.forward.measure import measure
from coterie.model.experts import expert_matrices, expert_shapes
from coterie.model.layer import Model
from coterie.model.stored import check_readable, outside, quantised
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.numerics import unpacked
from coterie.storage.tensors import read

every_form = pytest.mark.parametrize("form", published.FORMS)


def sequences():
    draw = np.random.default_rng(0)
    return {"prose": [tuple(draw.integers(3, tiny.VOCABULARY, n).tolist()) for n in (9, 24, 9)]}


def twin(source, folder, dense):
    """The checkpoint in plain float32."""
    return tiny.write(folder, {n: np.ascontiguousarray(v) for n, v in dense.items()}, tiny.read(source)[1])


@every_form
def test_what_is_measured_is_what_the_dense_twin_gives(tiny_checkpoint, tmp_path, form):
    """Attention, shared experts, dense layers and routed experts in one form: every sum, in both dtypes."""
    wide = form.startswith(("nvfp4", "mxfp4"))  # blocks that do not fit into the others' matrices
    source = tiny_checkpoint("qwen3_moe" if wide else "qwen2_moe" if form == "awq" else "deepseek_v3")
    dense = published.write(source, tmp_path / "m", form)
    models = [Model.open(folder) for folder in (tmp_path / "m", twin(source, tmp_path / "twin", dense))]
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = (measure(model, sequences(), dtype).sums for model in models)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


@every_form
def test_experts_are_what_they_mean_weight_by_weight(tiny_checkpoint, tmp_path, form):
    """Shapes from headers, values by the form's formula in a loop."""
    dense = published.write(tiny_checkpoint("qwen3_moe"), tmp_path / "m", form)
    model = Model.open(tmp_path / "m")
    for block in model.main:
        assert expert_shapes(model.checkpoint, block) == {
            "gate": (tiny.EXPERT_HIDDEN, tiny.HIDDEN), "up": (tiny.EXPERT_HIDDEN, tiny.HIDDEN),
            "down": (tiny.HIDDEN, tiny.EXPERT_HIDDEN),
        }  # fmt: skip
        for e in (0, tiny.NUM_EXPERTS - 1):
            for part, found in zip(tiny.GATED, expert_matrices(model.checkpoint, block, e), strict=True):
                expected = dense[f"{block.prefix}mlp.experts.{e}.{part}.weight"]
                assert found.dtype == np.float32 and np.array_equal(found, expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_stand_end_to_end_in_words(bits):
    """Against Python's integers, of any length of rows."""
    values = np.random.default_rng(bits).integers(0, 2**bits, (3, 37))
    rows = np.array([published.words(row.tolist(), bits) for row in values], np.int32)
    assert np.array_equal(unpacked(rows, bits, 37), values)


# --- against the libraries' own ----------------------------------------------------------------------------------


def stored_matrices(source, folder, form):
    """(the stored parts by what they add to the module's name, our values) of every matrix outside the experts."""
    published.write(source, folder, form, lambda name, values: published.is_linear(name, values) and "attn" in name)
    model = Model.open(folder)
    for name, matrix in quantised(model.checkpoint, outside(model)).items():
        stem = name.removesuffix("weight")
        yield {part.removeprefix(stem): read(model.checkpoint, part) for part in matrix.parts}, matrix.rows(0)


@pytest.mark.parametrize("form", ["fp8-rows"])
def test_fp8_as_transformers_dequantises_it(tiny_checkpoint, tmp_path, form):
    """Its own operation, in float32."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    for parts, ours in stored_matrices(tiny_checkpoint("qwen3_moe"), tmp_path / "m", form):
        theirs = Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["weight_scale"], torch.float32)
        assert np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("form", ["int4", "int8", "int3", "nvfp4", "mxfp4"])
def test_integers_and_nvfp4_as_compressed_tensors_decompresses_them(tiny_checkpoint, tmp_path, form):
    """Its own compressors; the scales are made float32, which its products then are. Of NVFP4 they are bf16."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationScheme

    names = {"nvfp4": "NVFP4PackedCompressor", "mxfp4": "MXFP4PackedCompressor"}
    scheme = QuantizationScheme(**published.FORMS[form][1]["config_groups"]["group_0"])
    for parts, ours in stored_matrices(tiny_checkpoint("qwen3_moe"), tmp_path / "m", form):
        parts |= {"weight_scale": parts["weight_scale"].float()} if form not in names else {}
        compressor = getattr(compressors, names.get(form, "PackedQuantizationCompressor"))
        theirs = compressor.decompress(parts, scheme)["weight"].float().numpy()
        assert np.allclose(ours, theirs, rtol=2**-7, atol=0) if form in names else np.array_equal(ours, theirs)


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_as_bitsandbytes_packs_it(tmp_path, nested):
    """What it quantised and says that it means."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))  # else its CPU code mixes blocks up
    codes, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4", compress_statistics=nested)
    tensors = {f"x.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file({"x.weight": codes, **tensors}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = quantised(Checkpoint.open(tmp_path), ["x.weight", *tensors])["x.weight"]
    assert np.array_equal(found.rows(0), functional.dequantize_4bit(codes, state).numpy())


# --- what is written ----------------------------------------------------------------------------------------------

CONDENSED = {"experts": [6, 1], "gates": [0.4, 0.3], "shared_gate": 1.0}
PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]
MERGED = {"kept": [0, 3, 4, 6], "clusters": PAIRS, "merged": True}
CHANGES = {
    "merged": {str(layer): MERGED for layer in range(4)},
    "condensed": {"1": {"condensed": CONDENSED}},
}
changing_forms = pytest.mark.parametrize("form", ["fp8", "int4", "gptq", "awq", "nf4-nested"])


def in_bf16(source, folder, dense):
    """The checkpoint with what was quantised in BF16, the rest as it was."""
    tensors, config = tiny.read(source)
    changed = {n for n, v in dense.items() if not np.array_equal(v, tensors[n])}
    stored = {n: torch.tensor(v).to(torch.bfloat16 if n in changed else torch.float32) for n, v in dense.items()}
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same(ours, theirs):
    """Tensors, bytes and config."""
    ours, theirs = Checkpoint.open(ours), Checkpoint.open(theirs)
    assert ours.config == theirs.config and "quantization_config" not in ours.config
    assert {n: (t.dtype, t.shape) for n, t in ours.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in theirs.tensors.items()
    }
    assert all(ours.raw(name) == theirs.raw(name) for name in theirs.tensors)


@every_form
def test_dropping_keeps_bytes(tiny_checkpoint, tmp_path, form):
    """Every part of a kept expert, and of everything beside; the form is still the config's."""
    source = tmp_path / "m"
    published.write(tiny_checkpoint("qwen3_moe"), source, form)
    report = prune(source, tmp_path / "out", method="router-norm", experts=5)
    before, after = Model.open(source), Model.open(tmp_path / "out")
    assert after.checkpoint.config["quantization_config"] == before.checkpoint.config["quantization_config"]
    assert "dequantised" not in report.plan
    for old, new in zip(before.main, after.main, strict=True):
        for i, e in enumerate(report.plan["layers"][old.key]["kept"]):
            assert old.experts[e].keys() == new.experts[i].keys()
            for key, name in old.experts[e].items():
                assert before.checkpoint.raw(name) == after.checkpoint.raw(new.experts[i][key])
    others = [name for name in before.checkpoint.tensors if before.roles[name] == "other"]
    assert others and all(before.checkpoint.raw(name) == after.checkpoint.raw(name) for name in others)


@changing_forms
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_written_in_bf16_as_of_the_twin_and_said(tiny_checkpoint, tmp_path, form, change):
    """All that was quantised, so that one config is true of all; `verify` knows it, and the plan applies again."""
    original, source = tiny_checkpoint("qwen2_moe"), tmp_path / "m"
    dense = published.write(original, source, form)
    report = apply(source, {"layers": CHANGES[change]}, tmp_path / "out")
    apply(in_bf16(original, tmp_path / "twin", dense), {"layers": CHANGES[change]}, tmp_path / "theirs")
    assert_same(tmp_path / "out", tmp_path / "theirs")
    assert report.plan["dequantised"] is True and any("written as BF16" in w for w in report.report["warnings"])
    assert verify(tmp_path / "out", against=source)["ok"]
    apply(source, tmp_path / "out", tmp_path / "again")
    assert_same(tmp_path / "again", tmp_path / "out")


def test_mxfp4_experts_change_as_those_that_transformers_makes_of_them(tmp_path):
    """Fused, transposed, gate and up in turn; biases keep their dtype."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    draw, prefix = torch.Generator().manual_seed(0), "model.layers.0.mlp."
    plain = {f"{prefix}router.weight": torch.randn(4, 64, generator=draw), f"{prefix}router.bias": torch.zeros(4)}
    packed, dense = {}, {}
    for name, shape in (("gate_up_proj", (4, 64, 2)), ("down_proj", (4, 64, 1))):
        blocks = torch.randint(0, 256, (*shape, 16), generator=draw).to(torch.uint8)
        scales = torch.randint(120, 130, shape, generator=draw).to(torch.uint8)
        packed |= {f"{prefix}experts.{name}_blocks": blocks, f"{prefix}experts.{name}_scales": scales}
        dense[f"{prefix}experts.{name}"] = convert_moe_packed_tensors(blocks, scales).contiguous()
        plain[f"{prefix}experts.{name}_bias"] = torch.randn(4, 64, generator=draw)
    config = {"model_type": "gpt_oss", "num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 1}
    for folder, tensors, said in (
        ("m", packed, {"quantization_config": {"quant_method": "mxfp4"}}),
        ("twin", dense, {}),
    ):
        (tmp_path / folder).mkdir()
        save_file(plain | tensors, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(config | said))
        plan = {"layers": {"0": {"kept": [0, 3], "clusters": [[0, 1], [2, 3]], "merged": True}}}
        apply(tmp_path / folder, plan, tmp_path / f"{folder}-out")
    assert_same(tmp_path / "m-out", tmp_path / "twin-out")


def calibration(folder):
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"input_ids": list(s)}) for s in sequences()["prose"] * 3))
    return {"data": {"prose": folder / "data.jsonl"}, "samples": 8, "seq_len": 9}


@pytest.mark.parametrize(("method", "form"), [("magnitude", "int4"), ("magnitude", "nf4"), ("sparsegpt", "fp8")])
def test_zeros_that_the_form_does_not_take_are_written_in_bf16(tiny_checkpoint, tmp_path, method, form):
    """Packed weights, and those that a rule corrects."""
    original, source = tiny_checkpoint("qwen3_moe"), tmp_path / "m"
    dense = published.write(original, source, form)
    how = {"method": method, "sparsity": 0.5}
    how |= {} if method == "magnitude" else calibration(tmp_path) | {"min_tokens": 1}
    sparsify(source, tmp_path / "out", **how)
    sparsify(in_bf16(original, tmp_path / "twin", dense), tmp_path / "theirs", **how)
    assert_same(tmp_path / "out", tmp_path / "theirs")
    assert verify(tmp_path / "out", against=source)["ok"]


def test_a_plan_may_ask_for_bf16_alone(tiny_checkpoint, tmp_path):
    """The whole model in plain floats, and nothing else."""
    original, source = tiny_checkpoint("qwen3_moe"), tmp_path / "m"
    dense = published.write(original, source, "awq")
    apply(source, {"layers": {}, "dequantised": True}, tmp_path / "out")
    assert_same(tmp_path / "out", in_bf16(original, tmp_path / "twin", dense))
    with pytest.raises(CoterieError, match="dequantised must be true or false, found 'yes'"):
        apply(source, {"layers": {}, "dequantised": "yes"}, tmp_path / "other")


@pytest.mark.parametrize("verb", [condense, drop])
def test_layers_become_dense_in_bf16_where_experts_are_packed(tiny_checkpoint, tmp_path, verb):
    """Condensed, or dropped: the shared expert is packed too."""
    source = tmp_path / "m"
    published.write(tiny_checkpoint("qwen2_moe"), source, "gptq")
    how = {"layer_ids": [1]} if verb is condense else {"unit": "layer", "count": 1}
    report = verb(source, tmp_path / "out", **how, **calibration(tmp_path))
    assert report.plan["dequantised"] and verify(tmp_path / "out", against=source)["ok"]
    assert "quantization_config" not in Checkpoint.open(tmp_path / "out").config


def test_what_cannot_stay_where_it_is_is_not_changed_in_place(tiny_checkpoint, tmp_path):
    """MODEL is whole afterwards."""
    source = tmp_path / "m"
    published.write(tiny_checkpoint("qwen3_moe"), source, "int4")
    before = Checkpoint.open(source).hash
    with pytest.raises(CoterieError, match=r"--in-place moves bytes; here .*BF16"):
        apply(source, {"layers": CHANGES["merged"]}, tmp_path / "out", in_place=True)
    assert Checkpoint.open(source).hash == before and not list(tmp_path.glob("out*"))


# --- what cannot be read -----------------------------------------------------------------------------------------


def changed(folder, change):
    """Changes the tensors of a folder in place; nothing else."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return Model.open(folder)


UNREADABLE = {
    "a second scale": ("fp8", ".weight_scale_inv", ".scale_2"),
    "no zeros": ("gptq", ".qzeros", None),
    "words of another type": ("awq", ".qweight", torch.int64),
    "scales that do not divide": ("int4", ".weight_scale", slice(3)),
    "no such state": ("nf4", ".weight.quant_state.bitsandbytes__nf4", None),
    "a table cut short": ("nf4", ".weight.quant_map", slice(3)),
    "no global scale": ("nvfp4", ".weight_global_scale", None),
    "packed in an unknown way": ("gptq", ".qweight", ".W_q"),
}


@pytest.mark.parametrize("where", ["experts", "attention"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_refused_once_for_the_checkpoint(tiny_checkpoint, tmp_path, case, where):
    """One sentence says where it is, what was found and what can be done all the same; headers are enough."""
    form, part, instead = UNREADABLE[case]
    inside = "experts." if where == "experts" else "self_attn."

    def only(name, values):
        return published.is_linear(name, values) and inside in name

    published.write(tiny_checkpoint("qwen3_moe"), tmp_path / "m", form, only)

    def change(tensors):
        for name in [n for n in tensors if n.endswith(part)]:
            tensor = tensors.pop(name)
            if isinstance(instead, str):
                tensors |= {name: tensor.clone()} if instead == ".scale_2" else {}
                tensors[name.removesuffix(part) + instead] = tensor
            elif isinstance(instead, slice):
                tensors[name] = tensor[..., instead]
            elif instead:
                tensors[name] = tensor.to(instead)

    model, inside = changed(tmp_path / "m", change), re.escape(inside)
    with pytest.raises(CoterieError, match=rf"stored in a way that we cannot read .*{inside}.*prune") as told:
        check_readable(model)
    assert (": experts are" in str(told.value)) == (where == "experts")
    assert (": layers outside the experts are" in str(told.value)) == (where == "attention")
    with pytest.raises(CoterieError, match="cannot read"):
        measure(model, sequences(), torch.float32)


def test_both_places_are_named(tiny_checkpoint, tmp_path):
    """Attention that is quantised too is no surprise after the experts were dequantised."""
    published.write(tiny_checkpoint("qwen3_moe"), tmp_path / "m", "gptq")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"gptq"', '"aqlm"'))
    with pytest.raises(CoterieError, match=r"experts and layers outside the experts .*experts\..*self_attn\..*prune"):
        check_readable(Model.open(tmp_path / "m"))


def test_every_readable_form_passes(tiny_checkpoint, tmp_path):
    """And so does a plain checkpoint."""
    check_readable(Model.open(tiny_checkpoint("qwen3_moe")))
    for form in ("fp8", "int4", "gptq"):
        published.write(tiny_checkpoint("qwen3_moe"), tmp_path / form, form)
        check_readable(Model.open(tmp_path / form))
