"""Packed checkpoints end to end: pack, load in transformers, generate, save, unpack; and what is refused on the way."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from coterie.codecs.bits import GROUP, quantise
from coterie.codecs.open import coded, opened
from coterie.errors import CoterieError
from coterie.kernels import run as kernels
from coterie.model.hook import install
from coterie.model.moe import IMPLEMENTATION
from coterie.model.sparse import SparseExperts
from coterie.storage.checkpoint import Checkpoint, read_header
from coterie.verbs.pack import pack
from coterie.verbs.sparsify import sparsify
from coterie.verbs.unpack import unpack

install()
FAMILIES = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3"]


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint, tmp_path_factory):
    """`pruned(model_type, fused)`: a tiny checkpoint with half of its expert weights zero, made once."""
    home, made = tmp_path_factory.mktemp("pruned"), {}

    def get(model_type, fused=False):
        name = f"{model_type}-{fused}"
        if name not in made:
            made[name] = home / name
            sparsify(tiny_checkpoint(model_type, fused), made[name], method="magnitude", sparsity=0.5)
        return made[name]

    return get


@pytest.fixture(scope="module")
def packed(pruned, tmp_path_factory):
    """The same, packed."""
    home, made = tmp_path_factory.mktemp("packed"), {}

    def get(model_type, fused=False):
        name = f"{model_type}-{fused}"
        if name not in made:
            made[name] = home / name
            pack(pruned(model_type, fused), made[name])
        return made[name]

    return get


def load(folder, **options):
    """The model, of whose tensors none may be missing or left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **{"dtype": torch.float32, **options}
    )
    assert not any(info.values()), info
    return model.eval()


def tokens(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(3, tiny.VOCABULARY, shape))


def as_bf16(folder, out):
    """The same checkpoint, stored in bf16."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    for path in out.glob("*.safetensors"):
        save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path, {"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {"dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("fused", [False, True], ids=["numbered", "fused"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_equal_those_of_the_zero_filled_model(pruned, packed, model_type, fused):
    """For one token, a few, and many per expert: kernels and tiles; no expert has a dense weight in memory."""
    dense, sparse = load(pruned(model_type, fused), experts_implementation="eager"), load(packed(model_type, fused))
    held = [m for m in sparse.modules() if isinstance(getattr(m, "coterie", None), SparseExperts)]
    assert held and all(m.down_proj is None and m.gate_up_proj is None for m in held)
    for shape in ((1, 1), (1, 5), (3, 40)):
        with torch.inference_mode():
            wanted, found = (m(input_ids=tokens(*shape), use_cache=False).logits for m in (dense, sparse))
        assert torch.allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("level", kernels.available())
def test_generated_text_equals_that_of_the_zero_filled_model(pruned, packed, monkeypatch, level):
    """Token for token in float32, at every level, batch 1 and 3."""
    dense = load(pruned("qwen3_moe"))
    monkeypatch.setenv("COTERIE_KERNELS", level)
    sparse = load(packed("qwen3_moe"))
    for batch in (1, 3):
        texts = [
            m.generate(tokens(batch, 6), max_new_tokens=24, do_sample=False, pad_token_id=0) for m in (dense, sparse)
        ]
        assert torch.equal(*texts)


def test_float32_computes_in_float32_from_values_stored_in_bf16(pruned, tmp_path):
    """`dtype=torch.float32` gives the float32 model of the stored values, not one that rounds on the way."""
    source = as_bf16(pruned("qwen3_moe"), tmp_path / "bf16")
    pack(source, tmp_path / "packed")
    dense, sparse = load(source), load(tmp_path / "packed")
    held = next(m.coterie for m in sparse.modules() if isinstance(getattr(m, "coterie", None), SparseExperts))
    assert held.down.matrices[0].dtype == "BF16"
    with torch.inference_mode():
        wanted, found = (m(input_ids=tokens(2, 9), use_cache=False).logits for m in (dense, sparse))
    assert torch.allclose(found, wanted, atol=2e-5)
    rough = load(tmp_path / "packed", dtype="auto")
    assert rough.dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.allclose(rough(input_ids=tokens(2, 9)).logits.float(), wanted, atol=0.2)


@pytest.mark.parametrize("fused", [False, True], ids=["numbered", "fused"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_unpack_restores_every_byte(pruned, packed, tmp_path, model_type, fused):
    """The same tensors in the same order with the same bytes, in the same files, and the same config."""
    unpack(packed(model_type, fused), tmp_path / "out")
    before, after = Checkpoint.open(pruned(model_type, fused)), Checkpoint.open(tmp_path / "out")
    assert list(before.tensors) == list(after.tensors) and before.config == after.config
    assert all(before.raw(name) == after.raw(name) for name in before.tensors)
    assert before.metadata == after.metadata and before.shards == after.shards


def test_minus_zeros_and_dense_tensors_survive(pruned, tmp_path):
    """-0.0 is kept as a value; a tensor without zeros stays dense; only what shrinks is packed."""
    shutil.copytree(pruned("qwen3_moe"), tmp_path / "in")
    arrays, config = tiny.read(tmp_path / "in")
    names = [n for n in arrays if "experts" in n]
    arrays[names[0]][...] = np.where(arrays[names[0]] == 0, np.float32(-0.0), arrays[names[0]])
    tiny.write(tmp_path / "in", arrays, config)
    pack(tmp_path / "in", tmp_path / "packed")
    found = coded(opened(Checkpoint.open(tmp_path / "packed")))
    assert names[0] not in found and names[1] in found and "lm_head.weight" not in found
    unpack(tmp_path / "packed", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "in" / "model.safetensors").read_bytes()
    with torch.inference_mode():
        wanted, out = (load(tmp_path / f)(input_ids=tokens(1, 9)).logits for f in ("in", "packed"))
    assert torch.allclose(out, wanted, atol=2e-5)


def test_pruned_linear_layers_are_packed_too(pruned, tmp_path):
    """Attention and dense matrices with zeros become sparse linear layers; routers and embeddings never do."""
    shutil.copytree(pruned("deepseek_v3"), tmp_path / "in")
    arrays, config = tiny.read(tmp_path / "in")
    for array in arrays.values():
        if array.ndim == 2:
            array[np.abs(array) < np.median(np.abs(array))] = 0
    tiny.write(tmp_path / "in", arrays, config)
    pack(tmp_path / "in", tmp_path / "packed")
    found = coded(opened(Checkpoint.open(tmp_path / "packed")))
    assert any("self_attn" in n for n in found) and any("shared" in n for n in found)
    assert not any(part in n for n in found for part in ("gate.weight", "embed", "lm_head", "norm"))
    with torch.inference_mode():
        wanted, out = (load(tmp_path / f)(input_ids=tokens(2, 9)).logits for f in ("in", "packed"))
    assert torch.allclose(out, wanted, atol=2e-5)


def rounded(folder, out):
    """The checkpoint with its experts' weights rounded to int8 and back."""

    def edit(arrays, _):
        for name, array in arrays.items():
            if ".experts." in name:
                codes, scales = quantise(array.reshape(-1, array.shape[-1]))
                spread = np.repeat(scales, GROUP, 1)[:, : array.shape[-1]]
                arrays[name] = (codes * spread).astype(np.float32).reshape(array.shape)

    return rewrite(folder, out, edit)


@pytest.mark.parametrize("fused", [False, True], ids=["numbered", "fused"])
def test_int8_values_with_group_scales_load_and_save(pruned, tmp_path, fused):
    """Logits are those of the rounded weights in float32; saving keeps every byte; unpacking is refused."""
    report = pack(pruned("qwen3_moe", fused), tmp_path / "packed", values="int8").report
    assert report["packed"]["ratio"] < 0.3
    model = load(tmp_path / "packed")
    with torch.inference_mode():
        dense = load(rounded(pruned("qwen3_moe", fused), tmp_path / "rounded"))
        for shape in ((1, 1), (2, 30)):
            wanted, found = (m(input_ids=tokens(*shape)).logits for m in (dense, model))
            assert torch.allclose(found, wanted, atol=2e-5)
    model.save_pretrained(tmp_path / "saved")
    before, after = Checkpoint.open(tmp_path / "packed"), Checkpoint.open(tmp_path / "saved")
    assert all(before.raw(name) == after.raw(name) for name in before.tensors)
    with pytest.raises(CoterieError, match="was rounded when it was packed"):
        unpack(tmp_path / "packed", tmp_path / "out")
    with pytest.raises(CoterieError, match="--values"):
        pack(pruned("qwen3_moe", fused), tmp_path / "out", values="int3")


@pytest.mark.parametrize("fused", [False, True], ids=["numbered", "fused"])
def test_save_pretrained_writes_what_was_loaded(packed, tmp_path, fused):
    """The saved folder holds the same packed bytes under the same names, and loads again."""
    model = load(packed("mixtral", fused))
    model.save_pretrained(tmp_path / "saved")
    before, after = Checkpoint.open(packed("mixtral", fused)), Checkpoint.open(tmp_path / "saved")
    assert set(before.tensors) == set(after.tensors)
    assert all(before.raw(name) == after.raw(name) for name in before.tensors)
    with torch.inference_mode():
        again = load(tmp_path / "saved")(input_ids=tokens(1, 7)).logits
        assert torch.equal(again, model(input_ids=tokens(1, 7)).logits)


@pytest.mark.parametrize("model_type", ["gpt_oss", "aria_text", "nemotron_h", "granitemoe"])
def test_layouts_that_are_transposed_interleaved_or_without_a_gate(pruned, packed, model_type):
    """Biases, clamped activations and post-norms stay the module's own."""
    dense, sparse = load(pruned(model_type), experts_implementation="eager"), load(packed(model_type))
    with torch.inference_mode():
        wanted, found = (m(input_ids=tokens(2, 20), use_cache=False).logits for m in (dense, sparse))
    assert torch.allclose(found, wanted, atol=2e-5)


def test_experts_closed_to_other_implementations_are_refused(packed):
    """jetmoe packs and unpacks, but cannot be loaded packed: said by name."""
    with pytest.raises(CoterieError, match="`coterie unpack`"):
        load(packed("jetmoe"))


@pytest.mark.parametrize("first", ["transformers", "transformers.quantizers", "coterie"])
def test_registration_works_whichever_is_imported_first(packed, first):
    """And costs no import of torch before transformers wants it."""
    ours = "from coterie.model.hook import install; install()"
    early = f"{ours}\nimport transformers" if first == "coterie" else f"import {first}\n{ours}"
    code = (
        f"import sys\n{ours if first == 'coterie' else ''}\n"
        f"assert {first != 'coterie'} or not {{'torch', 'transformers'}} & set(sys.modules)\n{early}\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(packed('qwen3_moe'))!r})\n"
        f"assert m.config._experts_implementation == {IMPLEMENTATION!r}\n"
        "assert not [f for f in sys.meta_path if 'coterie' in type(f).__module__]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "Qwen3MoeForCausalLM", "AutoModel"])
@pytest.mark.parametrize("again", [False, True], ids=["packed", "saved"])
def test_without_coterie_transformers_refuses(packed, tmp_path, kind, again):
    """Never a model of random weights: neither of what `pack` wrote nor of what transformers saved, by any class."""
    folder = packed("qwen3_moe")
    if again:
        load(folder).save_pretrained(tmp_path / "saved")
        folder = tmp_path / "saved"
    code = (
        f"import sys, transformers\ntry:\n    transformers.{kind}.from_pretrained({str(folder)!r})\n"
        "except ValueError as error:\n    print(error)\n"
        "assert not any(name.startswith('coterie') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "has no `quant_method` attribute" in done.stdout, done.stderr[-2000:]
    assert "import coterie" in json.loads((folder / "config.json").read_text())["quantization_config"]["coterie"]


def test_folders_of_the_first_versions_are_read(packed, tmp_path):
    """They say `quant_method`: same logits, and what is saved says it in the new way."""
    shutil.copytree(packed("qwen3_moe"), tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "coterie", "format": 1}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    with torch.inference_mode():
        wanted = load(packed("qwen3_moe"))(input_ids=tokens(1, 5)).logits
        assert torch.equal(old(input_ids=tokens(1, 5)).logits, wanted)
    old.save_pretrained(tmp_path / "new")
    assert "quant_method" not in json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]


def test_gradients_are_refused(packed):
    """Nothing packed asks for a gradient; inputs that do are told why there is none."""
    model = load(packed("qwen3_moe"))
    assert not any(p.requires_grad for p in model.parameters())
    x = model.get_input_embeddings()(tokens(1, 3)).requires_grad_()
    with pytest.raises(CoterieError, match="for inference"):
        model(inputs_embeds=x)


def change(folder, out, name, edit):
    """A copy of the folder with the bytes of one stored tensor edited in place."""
    shutil.copytree(folder, out)
    tensor = Checkpoint.open(out).tensors[name]
    with (out / tensor.file).open("r+b") as file:
        file.seek(tensor.start)
        data = bytearray(file.read(tensor.num_bytes))
        edit(data)
        file.seek(tensor.start)
        file.write(data)
    return out


def flip(place):
    def edit(data):
        data[place] ^= 1

    return edit


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("part", "edit", "says"),
    [
        ("mask", flip(0), "keeps"),
        ("rows", flip(0), "values"),
        ("values", flip(0), "checksum"),
        ("layout", flip(0), "damaged"),
        ("layout", flip(8), "damaged"),
        ("layout", flip(16), "checksum"),
        ("layout", flip(23), "damaged"),
    ],
)
def test_a_changed_byte_is_found_by_name(packed, tmp_path, part, edit, says):
    """In mask, row counts, values or layout: neither loading nor unpacking gives anything."""
    wrong = change(packed("qwen3_moe"), tmp_path / "wrong", f"{NAME}.{part}", edit)
    with pytest.raises(CoterieError, match=says) as error:
        unpack(wrong, tmp_path / "out")
    assert NAME in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(CoterieError, match=says):
        load(wrong)


def rewrite(folder, out, edit):
    """A copy of the folder with its arrays and config edited."""
    shutil.copytree(folder, out)
    arrays, config = tiny.read(out)
    edit(arrays, config)
    return tiny.write(out, arrays, config)


def drop(part):
    return lambda arrays, _: arrays.pop(f"{NAME}.{part}")


def put(part, make):
    def edit(arrays, _):
        arrays[f"{NAME}.{part}"] = make(arrays[f"{NAME}.{part}"])

    return edit


def version(arrays, config):
    config["quantization_config"]["format"] = 9


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (drop("mask"), "expected layout, mask"),
        (drop("rows"), "rows"),
        (drop("values"), "expected layout, mask"),
        (drop("layout"), "beside it"),
        (put("rows", lambda a: a.astype(np.uint16)), "rows"),
        (put("mask", lambda a: a[:-1].copy()), "rows"),
        (put("values", lambda a: a[:-2].copy()), "are stored"),
        (put("values", lambda a: np.append(a, np.ones(2, a.dtype))), "are stored"),
        (put("rows", lambda a: np.where(np.arange(len(a)) == 0, 255, a).astype(a.dtype)), "are stored"),
        (put("layout", lambda a: np.array([2**40, *a[1:]])), "columns"),
        (put("layout", lambda a: np.array([a[0], 128, *a[2:]])), "damaged"),
        (version, "expected 1"),
    ],
)
def test_contradictions_in_a_file_are_refused_before_anything_is_read_by_them(packed, tmp_path, edit, says):
    """Missing, cut, longer or mistyped parts, counts out of range, and another version."""
    wrong = rewrite(packed("qwen3_moe"), tmp_path / "wrong", edit)
    for act in (lambda: unpack(wrong, tmp_path / "out"), lambda: load(wrong)):
        with pytest.raises(CoterieError, match=says):
            act()
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_refused(packed, tmp_path):
    """By the header, before any part is looked at."""
    shutil.copytree(packed("qwen3_moe"), tmp_path / "wrong")
    path = tmp_path / "wrong" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CoterieError, match="truncated"):
        unpack(tmp_path / "wrong", tmp_path / "out")


@pytest.mark.parametrize("seed", range(30))
def test_random_damage_never_reaches_a_kernel(packed, tmp_path, seed):
    """Bytes anywhere in a packed file replaced: refused, or every matrix that still decodes has its old bytes."""
    rng = np.random.default_rng(seed)
    source = Checkpoint.open(packed("qwen3_moe"))
    names = [n for n in source.tensors if n.startswith("model.layers.2.mlp.experts.5.")]

    def edit(data):
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)

    wrong = change(packed("qwen3_moe"), tmp_path / "wrong", names[rng.integers(len(names))], edit)
    try:
        view = opened(Checkpoint.open(wrong))
        found = {n: view.raw(n) for n in view.tensors}
    except CoterieError:
        return
    wanted = opened(source)
    assert all(found[n] == wanted.raw(n) for n in wanted.tensors)


def test_what_cannot_be_packed_or_unpacked_is_refused(tiny_checkpoint, packed, tmp_path):
    """Nothing to gain, packed already, not packed, and OUT in the way."""
    with pytest.raises(CoterieError, match="prune it first"):
        pack(tiny_checkpoint("qwen3_moe"), tmp_path / "out")
    with pytest.raises(CoterieError, match="packed already"):
        pack(packed("qwen3_moe"), tmp_path / "out")
    with pytest.raises(CoterieError, match="nothing in it is packed"):
        unpack(tiny_checkpoint("qwen3_moe"), tmp_path / "out")
    with pytest.raises(CoterieError, match="exists"):
        unpack(packed("qwen3_moe"), packed("mixtral"))
    assert not (tmp_path / "out").exists()


def test_a_killed_pack_resumes_to_the_same_bytes(pruned, packed, tmp_path):
    """Interrupted between two matrices, and repeated with resume."""

    def stop(stage, done, total):
        if (stage, done) == ("packing", 20):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(pruned("qwen3_moe"), tmp_path / "out", on_progress=stop)
    assert not (tmp_path / "out").exists()
    pack(pruned("qwen3_moe"), tmp_path / "out", resume=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (packed("qwen3_moe") / name).read_bytes()
    again = pack(pruned("qwen3_moe"), tmp_path / "out", resume=True)
    assert again.report["packed"]["tensors"] == 96


def test_the_report_says_what_was_gained(pruned, tmp_path):
    """Bytes of the packed matrices before and after, which are those on disk; a dry run writes nothing."""
    dry = pack(pruned("qwen3_moe"), tmp_path / "out", dry_run=True).report
    assert not (tmp_path / "out").exists()
    report = pack(pruned("qwen3_moe"), tmp_path / "out").report
    assert dry["packed"] == report["packed"] and 0.5 < report["packed"]["ratio"] < 0.6
    tensors, _ = read_header(tmp_path / "out" / "model.safetensors")
    assert report["after"]["bytes"] == sum(t.num_bytes for t in tensors.values())
    assert report["packed"]["zeros"] == pytest.approx(0.5, abs=0.01)
