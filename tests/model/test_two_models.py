"""Thinker and talker: two models with experts in one checkpoint, whose layers have the same numbers."""

import pytest
import torch
from transformers import AutoConfig, Qwen3OmniMoeForConditionalGeneration

import tiny
from coterie.edits.lineage import plan_of
from coterie.edits.masked import MaskedRouting
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.prune import prune

PREDICTOR = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
PREDICTOR |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32, "num_code_groups": 4}
VOICE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VOICE |= {"num_key_value_heads": 2, "codebook_size": 8, "num_quantizers": 4, "decoder_dim": 16}
VOICE |= {"upsample_rates": [2], "upsampling_ratios": [2]}


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    """A tiny one, as transformers saves it in the hub's spelling."""
    talker = tiny.tiny_config("qwen3_omni_moe_talker_text").to_dict() | {"shared_expert_intermediate_size": 24}
    config = AutoConfig.for_model(
        "qwen3_omni_moe",
        thinker_config=tiny.tiny_config("qwen3_omni_moe_thinker").to_dict(),
        talker_config={
            "text_config": talker,
            "code_predictor_config": PREDICTOR,
            "thinker_hidden_size": tiny.HIDDEN,
            "num_code_groups": 4,
            "accept_hidden_layer": 2,
            "spatial_merge_size": 2,
        },
        code2wav_config=VOICE,
    )
    model = Qwen3OmniMoeForConditionalGeneration(config)
    tiny._randomise(model, torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("omni") / "model"
    model.save_pretrained(folder)
    return folder


def loaded(folder):
    """By transformers' own class, which finds every tensor once."""
    model, info = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, experts_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.inference_mode()
def outputs(model):
    """The thinker's logits, and what the talker's decoder makes of the same hidden states."""
    ids = torch.arange(3, 27)[None]
    states = torch.randn(1, 24, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    spoken = model.talker.model(inputs_embeds=states, use_cache=False)
    return model.thinker(input_ids=ids, use_cache=False).logits, spoken.last_hidden_state


def test_layers_of_both_are_told_apart(omni):
    """Blocks of the second model have its name before their number, and are none of the decoder's that writes text."""
    model = Model.open(omni)
    assert [block.key for block in model.main] == ["0", "1", "2", "3"]
    assert [block.key for block in model.moe if block.aside] == [f"talker.{i}" for i in range(4)]


def test_both_are_cut(omni, tmp_path):
    """Each by its own router; transformers loads the result, and both compute what they do with the experts masked."""
    prune(omni, tmp_path / "out", ratio=0.25)
    plan, source = plan_of(Checkpoint.open(tmp_path / "out")), Model.open(omni)
    assert plan.layers["1"].kept != plan.layers["talker.1"].kept
    whole, routing = loaded(omni), MaskedRouting()
    for block in source.moe:
        stack = whole.talker.model if block.aside else whole.thinker.get_decoder()
        router = stack.layers[int(block.key.rpartition(".")[2])].mlp.gate.weight
        routing.hide(block.name, router, plan.choice(block).kept)
    before = outputs(whole)
    with routing:
        expected = outputs(whole)
    for found, masked, plain in zip(outputs(loaded(tmp_path / "out")), expected, before, strict=True):
        assert torch.equal(found, masked)
        assert not torch.allclose(masked, plain, atol=1e-3)


def test_different_numbers_of_experts_are_refused(omni, tmp_path):
    """One count has to serve both models."""
    tensors, config = tiny.read(omni)
    config["talker_config"]["text_config"]["num_local_experts"] = 4
    with pytest.raises(CoterieError, match=r"8 experts in one model, 4 in 'talker.'; expected as many in both"):
        Model.open(tiny.write(tmp_path / "model", tensors, config)).family.num_experts(config)
