"""Experts in few bits, loaded: codes stay packed in memory, and give what the explicitly dequantised model gives."""

import numpy as np
import pytest
import torch

import coterie
import tiny
from coterie.codecs.open import coded, opened_packed
from coterie.errors import CoterieError
from coterie.kernels import run as kernels
from coterie.model.sparse import SparseExperts
from coterie.storage.checkpoint import Checkpoint

BITS = (2, 3, 4, 8)
WIDE = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "mlp_only_layers": []}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random qwen3_moe whose rows divide into groups of 32, in float32."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "source"
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**tiny.SIZES | WIDE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantised(source, tmp_path_factory):
    """`quantised(bits)`: (the model in so many bits, the dense folder of its values in float32), made once."""
    home, made = tmp_path_factory.mktemp("quantised"), {}

    def get(bits):
        if bits not in made:
            out = home / f"int{bits}"
            coterie.quantize(source, out, bits=bits, method="round")
            view = opened_packed(Checkpoint.open(out))
            arrays = {name: view.read(name) for name in view.tensors}
            made[bits] = out, tiny.write(home / f"dense{bits}", arrays, view.config)
        return made[bits]

    return get


def logits(model, shape):
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, tiny.VOCABULARY, shape))
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("level", kernels.available())
@pytest.mark.parametrize("bits", BITS)
def test_logits_equal_those_of_the_dequantised_model(quantised, monkeypatch, level, bits):
    """To 2e-6 in float32, for one token, a few, and many per expert; no expert has a dense weight in memory."""
    monkeypatch.setenv("COTERIE_KERNELS", level)
    packed, dense = (coterie.load(folder, dtype="float32") for folder in quantised(bits))
    held = [m for m in packed.modules() if isinstance(getattr(m, "coterie", None), SparseExperts)]
    assert held and all(m.down_proj is None and m.gate_up_proj is None for m in held)
    for shape in ((1, 1), (1, 5), (3, 40)):
        assert torch.allclose(logits(packed, shape), logits(dense, shape), rtol=0, atol=2e-6)


def test_generated_text_equals_that_of_the_dequantised_model(quantised):
    """Token for token in float32, batch 1 and 3."""
    packed, dense = (coterie.load(folder, dtype="float32") for folder in quantised(4))
    for batch in (1, 3):
        ids = torch.arange(3, 9).repeat(batch, 1)
        texts = [m.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0) for m in (packed, dense)]
        assert torch.equal(*texts)


def test_bf16_computes_with_the_same_codes(quantised):
    """What a bf16 model rounds are activations: codes and scales stay as they are stored."""
    folder, dense = quantised(4)
    rough = coterie.load(folder, dtype="bfloat16")
    assert rough.dtype == torch.bfloat16
    assert torch.allclose(logits(rough, (2, 9)).float(), logits(coterie.load(dense), (2, 9)), atol=0.05)


@pytest.mark.parametrize("bits", BITS)
def test_experts_take_the_bytes_in_memory_that_they_take_in_the_file(quantised, bits):
    """All but the 16 bytes that say a matrix's shape."""
    folder, _ = quantised(bits)
    stored = sum(found.num_bytes - 16 for found in coded(opened_packed(Checkpoint.open(folder))).values())
    model = coterie.load(folder)
    assert sum(m.coterie.num_bytes for m in model.modules() if hasattr(m, "coterie")) == stored


def test_integers_that_the_kernels_do_not_know_are_left_to_the_library(quantised, tmp_path):
    """One scale for a whole row of 64 and 32 columns is still a group; for every 16 columns is not."""
    arrays, config = tiny.read(quantised(4)[0])
    finer = {n: np.repeat(a, 2, 1) if n.endswith("_scale") else a for n, a in arrays.items()}
    assert opened_packed(Checkpoint.open(tiny.write(tmp_path / "finer", finer, config))) is None


def test_scales_that_do_not_fit_are_refused_by_name(quantised, tmp_path):
    """Before anything computes an address from them."""
    arrays, config = tiny.read(quantised(4)[0])
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    arrays[name] = arrays[name][:-1].copy()
    with pytest.raises(CoterieError, match=r"layers\.1\.mlp\.experts\.3\.up_proj.*rows"):
        coterie.load(tiny.write(tmp_path / "wrong", arrays, config))


def test_what_is_loaded_so_is_not_saved(quantised, tmp_path):
    """The folder is there to be copied."""
    with pytest.raises(CoterieError, match="copy"):
        coterie.load(quantised(4)[0]).save_pretrained(tmp_path / "saved")
