"""Tiny random float32 checkpoints of every family in the registry: hidden 32, 8 experts, top-2, 2 to 4 layers.

`save("qwen3_moe", folder)` writes one as the hub spells it, `fused=True` as transformers holds it in memory. A
new family needs nothing here if transformers has it and names its sizes as others do; else add to `SPECIAL`
(config values), `TOWERS` (vision towers around text models) or `HAND_MADE` (families without a stock class).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from coterie.model.family import registry

NUM_EXPERTS, TOP_K, HIDDEN, EXPERT_HIDDEN, VOCABULARY = 8, 2, 32, 16, 128
NUM_ZERO = 4  # experts that are the identity

# Every spelling of a size that configs use; a config class takes the ones it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), HIDDEN),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), TOP_K),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), EXPERT_HIDDEN),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"), 24),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "max_seq_len"), VOCABULARY),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("ssm_state_size", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_d_conv", "mamba_dt_rank", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "mamba_expand", "linear_num_key_heads", "index_n_heads", "num_layers"), 2),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "decoder_sparse_step"), 1),
    **dict.fromkeys(("index_topk", "sliding_window"), 64),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "q_bias": False,
    **dict.fromkeys(("moe_layer_start_index", "moe_layer_interval", "expert_layer_offset", "attn_layer_offset"), 1),
    **dict.fromkeys(("expert_layer_period", "attn_layer_period", "eos_token_id"), 2),
    "moe_layer_end_index": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
LATENT_ATTENTION = {"num_key_value_heads": 4}  # as many as attention heads
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64}
INDEXER["indexer_compress_ratio"] = 4
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), LATENT_ATTENTION),
    **dict.fromkeys(("mistral4", "mistral_large4_text"), LATENT_ATTENTION),
    "deepseek_v2": {**LATENT_ATTENTION, "topk_method": "group_limited_greedy"},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8},
    "dots3_note_text": {
        **LATENT_ATTENTION,
        "layer_types": ["full_attention"] * 4,
        "shared_experts_intermediate_size": 24,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": EXPERT_HIDDEN, "moe_num_experts": NUM_EXPERTS, "moe_top_k": TOP_K},
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "deepseek_ocr2_text": {"topk_method": "greedy", "mlp_layer_types": ["dense", *["sparse"] * 3]},
    "unlimited_ocr_text": {"topk_method": "greedy"},
    "longcat_flash": {**LATENT_ATTENTION, "num_layers": 2, "zero_expert_num": NUM_ZERO},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [EXPERT_HIDDEN, 8],
        "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]},
    },
    "glm4v_moe_text": {"rope_parameters": MROPE},
    "glm5_next_text": {**LATENT_ATTENTION, "qk_rope_head_dim": 0, "linear_num_heads": 4, "linear_head_dim": 8},
    "muse_spark_text": {"moe_hidden_size": HIDDEN},
    "qwen3_omni_moe_text": {"rope_parameters": MROPE},
    "qwen3_omni_moe_talker_text": {"rope_parameters": MROPE},
    "qwen3_vl_moe_text": {"moe_intermediate_size": 24},  # gate above up is square otherwise, and says nothing
    "qwen4_exp_text": {**INDEXER, "hc_lowrank": 8},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "moe_shared_expert_intermediate_size": 24,
    },
}


def model_types() -> list[str]:
    """Every model type of the registry."""
    return sorted(registry())


def spellings() -> list[tuple[str, bool]]:
    """(model type, fused) of every checkpoint that `save` writes."""
    fused = [t for t in model_types() if t not in HAND_MADE and t not in NEVER_FUSED]
    return [(t, False) for t in model_types()] + [(t, True) for t in fused]


def save(model_type: str, folder: Path, *, fused: bool = False) -> Path:
    """Writes a tiny checkpoint and returns its folder. Raises: LookupError when nothing here can build the family."""
    if model_type in HAND_MADE:
        assert not fused, f"{model_type} has one spelling"
        tensors, config = HAND_MADE[model_type]()
        write(folder, tensors, {"model_type": model_type, **config})
    else:
        model = build(model_type)
        model.save_pretrained(folder, save_original_format=not fused)
        if model_type in PUBLISHED and not fused:
            tensors, config = read(folder)
            write(folder, PUBLISHED[model_type](tensors), config)
    return folder


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    """A checkpoint folder from arrays and a config, in one unindexed file."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A float32 checkpoint's arrays and config: what `write` takes, to be changed in between."""
    from safetensors.numpy import load_file

    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors, json.loads((folder / "config.json").read_text())


def logits(folder: Path) -> np.ndarray:
    """What stock transformers computes from a folder on a fixed batch: (2, 24, vocabulary) float32."""
    import torch
    from transformers import AutoConfig

    auto = auto_class(AutoConfig.from_pretrained(folder))
    model = auto.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    tokens = np.random.default_rng(1).integers(3, VOCABULARY, (2, 24))
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()


def build(model_type: str, seed: int = 0) -> Any:
    """The stock model with random weights. Raises: LookupError naming what to add for a family it cannot build."""
    import torch

    config = tiny_config(model_type)
    auto = auto_class(config)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # for what `_randomise` leaves alone
            model = auto.from_config(config, dtype=torch.float32).eval()
    except Exception as error:
        raise LookupError(f"{model_type}: {error}; add sizes to SPECIAL in tests/tiny.py") from error
    _randomise(model, torch.Generator().manual_seed(seed))
    return model


def auto_class(config: Any) -> Any:
    """The auto class of a model: of text alone, or of images and text (also text models that only this one knows)."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text = config.model_type not in TOWERS and type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if text else AutoModelForImageTextToText


def tiny_config(model_type: str) -> Any:
    """The family's config with every size small."""
    from transformers import AutoConfig

    try:
        known = _fields(type(AutoConfig.for_model(model_type)))
    except ValueError as error:
        raise LookupError(f"{model_type}: not in transformers; add it to HAND_MADE in tests/tiny.py") from error
    if model_type in TOWERS:
        text, vision = TOWERS[model_type]
        others = BESIDE.get(model_type, {})
        return AutoConfig.for_model(model_type, text_config=tiny_config(text).to_dict(), vision_config=vision, **others)
    sizes = {key: value for key, value in SIZES.items() if key in known}
    aliases = type(AutoConfig.for_model(model_type)).attribute_map
    sizes = {key: value for key, value in sizes.items() if aliases.get(key) not in sizes}
    return AutoConfig.for_model(model_type, **{**sizes, **SPECIAL.get(model_type, {})})


def _fields(config_class: type) -> set[str]:
    annotated = {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    return annotated | set(getattr(config_class, "attribute_map", {}))


def _randomise(model: Any, generator: Any) -> None:
    """Weights large enough that losing an expert shows in the logits, biases that change the selection."""
    import torch

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):  # zeros by default, by which any mapping would pass
                tensor.copy_(_table(tensor.shape, generator))
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if "bias" in name:
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                if is_parameter or any(part in name for part in ("correction_bias", "expert_bias", "router_bias")):
                    tensor.copy_(0.1 * values)
            elif isinstance(tensor, torch.nn.Parameter) and tensor.dim() >= 2:
                scale = 0.5 if "router" in name or "gate.weight" in name else 0.6 / tensor.shape[-1] ** 0.5
                tensor.copy_(scale * values)


def _table(shape: tuple[int, ...], generator: Any) -> Any:
    """Token -> distinct expert ids, spread over all experts."""
    import torch

    return torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[: shape[1]] for _ in range(shape[0])])


# Vision towers around text models: the text model's type, and what makes the tower small.
QWEN_VISION = {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": HIDDEN}
GLM_VISION = {**QWEN_VISION, "patch_size": 4, "image_size": 16}
OCR_VISION = {
    "sam_config": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "mlp_dim": 16,
        "output_channels": 8, "downsample_channels": [8, 16], "global_attn_indexes": [0],
    },
    "encoder_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PROJECTOR = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "aria": ("aria_text", {**VISION, "model_type": "idefics3_vision", "image_size": 28, "patch_size": 14}),
    "gemma4": ("gemma4_text", VISION),
    "kimi_k25": ("deepseek_v3", {**VISION, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4}),
    "llama4": ("llama4_text", {**VISION, **PROJECTOR, "image_size": 28}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"hidden_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": HIDDEN}),
    "deepseek_ocr2": ("deepseek_ocr2_text", OCR_VISION),
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe_text", {**QWEN_VISION, "patch_size": 4}),
    "glm4v_moe": ("glm4v_moe_text", GLM_VISION),
    "glm5_next": ("glm5_next_text", {**GLM_VISION, "projection_intermediate_size": 16}),
    "inkling2": ("inkling2_text", {**VISION, "text_hidden_size": HIDDEN}),
    "minimax_m3_vl": ("minimax_m3_vl_text", {**VISION, "image_size": 28}),
    "mistral_large4": ("mistral_large4_text", {**VISION, "image_size": 32}),
    "muse_spark": ("muse_spark_text", VISION),
    "qwen3_omni_moe_thinker": ("qwen3_omni_moe_text", {**QWEN_VISION, "deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", QWEN_VISION),
    "qwen4_exp": ("qwen4_exp_text", QWEN_VISION),
    "step3p7": ("step3p5", {**VISION, "image_size": 28}),
    "unlimited_ocr": ("unlimited_ocr_text", OCR_VISION),
}
# What a config needs besides text and vision.
HEARING = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
HEARING |= {"output_dim": HIDDEN, "downsample_hidden_size": 8, "num_mel_bins": 16}
BESIDE: dict[str, dict[str, Any]] = {
    "qwen3_omni_moe_thinker": {"audio_config": HEARING, "vision_start_token_id": 5},
    "muse_spark": {
        "out_hidden_size": HIDDEN,
        "projector_hidden_size": 16,
        "audio_config": {"out_hidden_size": HIDDEN, "hidden_sizes": [8] * 4, "depths": [1] * 4},
    },
}


def _transposed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fused experts (E, in, out) instead of (E, out, in)."""
    return {n: np.ascontiguousarray(v.swapaxes(1, 2)) if ".experts." in n else v for n, v in tensors.items()}


# Saved as in memory, its identity experts have weights that nothing uses, and no file published has.
NEVER_FUSED = {"longcat_flash"}

# What transformers reads as published, and saves otherwise.
PUBLISHED: dict[str, Any] = {"qwen3_vl_moe": _transposed}


# --- families without a stock class: their hub names, written directly ------------------------------------------


def _normal(seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    return lambda *shape: (0.2 * generator.standard_normal(shape)).astype(np.float32)


def _decoder(num_layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Embeddings, head, norms and attention of a llama-like decoder."""
    draw = _normal(1)
    yield "model.embed_tokens.weight", draw(VOCABULARY, HIDDEN)
    yield "model.norm.weight", np.ones(HIDDEN, np.float32)
    yield "lm_head.weight", draw(VOCABULARY, HIDDEN)
    for layer in range(num_layers):
        for part in "qkvo":
            yield f"model.layers.{layer}.self_attn.{part}_proj.weight", draw(HIDDEN, HIDDEN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", np.ones(HIDDEN, np.float32)


GATED = ("gate_proj", "up_proj", "down_proj")


def expert(prefix: str, draw: Any, names: tuple[str, str, str] = GATED) -> dict[str, np.ndarray]:
    """One expert's (or dense MLP's) three matrices under `prefix`."""
    gate, up, down = names
    return {
        f"{prefix}.{gate}.weight": draw(EXPERT_HIDDEN, HIDDEN),
        f"{prefix}.{up}.weight": draw(EXPERT_HIDDEN, HIDDEN),
        f"{prefix}.{down}.weight": draw(HIDDEN, EXPERT_HIDDEN),
    }


def _deepseek(*, bias: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """DeepSeekMoE: first layer dense, shared experts beside the routed ones; Kimi K2 adds the selection bias."""
    draw, tensors = _normal(), dict(_decoder(3))
    tensors |= expert("model.layers.0.mlp", draw)
    for layer in (1, 2):
        mlp = f"model.layers.{layer}.mlp"
        tensors |= {f"{mlp}.gate.weight": draw(NUM_EXPERTS, HIDDEN), **expert(f"{mlp}.shared_experts", draw)}
        if bias:
            tensors[f"{mlp}.gate.e_score_correction_bias"] = draw(NUM_EXPERTS)
        for e in range(NUM_EXPERTS):
            tensors |= expert(f"{mlp}.experts.{e}", draw)
    config = {"num_hidden_layers": 3, "n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}
    return tensors, {**config, "first_k_dense_replace": 1, **({"n_group": 1, "topk_group": 1} if bias else {})}


def _arctic() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arctic: a residual MLP in every layer, experts in every second one."""
    draw, tensors = _normal(), dict(_decoder(2))
    names = ("w1", "w3", "w2")
    for layer in (0, 1):
        tensors |= expert(f"model.layers.{layer}.residual_mlp", draw, names)
        tensors[f"model.layers.{layer}.residual_layernorm.weight"] = np.ones(HIDDEN, np.float32)
    tensors |= expert("model.layers.0.block_sparse_moe.mlp", draw, names)  # the dense layers' spelling
    tensors["model.layers.1.block_sparse_moe.gate.weight"] = draw(NUM_EXPERTS, HIDDEN)
    for e in range(NUM_EXPERTS):
        tensors |= expert(f"model.layers.1.block_sparse_moe.experts.{e}", draw, names)
    return tensors, {"num_hidden_layers": 2, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}


def _third_party(
    block: str,
    *,
    names: tuple[str, str, str] = GATED,
    router: str = "gate.weight",
    row: str = "",
    shared: str = "shared_experts",
    count: str = "num_experts",
    stack: str = "model.",
    beside: dict[str, tuple[int, ...]] | None = None,
    **config: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A dense layer and two of experts under `block`, as published by others; `beside`: shapes of the block's own."""
    draw, tensors = _normal(), dict(_decoder(3))
    tensors |= expert("model.layers.0.mlp", draw)
    for layer in (1, 2):
        mlp = f"model.layers.{layer}.{block}"
        tensors |= {f"{mlp}.{router}": draw(NUM_EXPERTS, HIDDEN)} | ({f"{mlp}.{row}": draw(NUM_EXPERTS)} if row else {})
        tensors |= expert(f"{mlp}.{shared}", draw) if shared else {}
        tensors |= {f"{mlp}.{name}": draw(*shape) for name, shape in (beside or {}).items()}
        for e in range(NUM_EXPERTS):
            tensors |= expert(f"{mlp}.experts.{e}", draw, names)
    sizes = {"num_hidden_layers": 3, count: NUM_EXPERTS, "num_experts_per_tok": TOP_K, "first_k_dense_replace": 1}
    return {stack + name.removeprefix("model."): values for name, values in tensors.items()}, sizes | config


def _within(key: str, made: tuple[dict[str, np.ndarray], dict[str, Any]], text: str) -> Any:
    """A text model inside another: its config under `key`."""
    return made[0], {key: {"model_type": text, **made[1]}}


def _step() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Step: one matrix a part for all experts, the shared expert beside the block."""
    tensors, _ = _third_party("moe", row="router_bias", shared="")
    numbered = [name for name in tensors if ".experts." in name]
    for layer in (1, 2):
        for part in GATED:
            values = [tensors[f"model.layers.{layer}.moe.experts.{e}.{part}.weight"] for e in range(NUM_EXPERTS)]
            tensors[f"model.layers.{layer}.moe.{part}.weight"] = np.stack(values)
        tensors |= expert(f"model.layers.{layer}.share_expert", _normal(layer))
    sizes = {"num_hidden_layers": 3, "moe_num_experts": NUM_EXPERTS, "moe_top_k": TOP_K, "moe_layers_enum": "1,2"}
    return {name: v for name, v in tensors.items() if name not in numbered}, sizes


def _omni() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Two decoders whose layers have the same numbers, and experts of their own."""
    thinker, sizes = _third_party("mlp", shared="", stack="thinker.model.")
    talker, _ = _third_party("mlp", shared="shared_expert", stack="talker.model.")
    draw = _normal(2)
    talker = {name: draw(*values.shape) for name, values in talker.items()}
    inner = {"thinker_config": {"text_config": sizes}, "talker_config": {"text_config": {**sizes}}}
    return thinker | talker, inner


def _ernie() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Two stacks of experts in one list, each with a router of columns, and of lists in the config one entry each."""
    tensors, _ = _third_party("mlp")
    draw = _normal(3)
    for layer in (1, 2):
        mlp = f"model.layers.{layer}.mlp"
        tensors |= {f"{mlp}.{name}": draw(HIDDEN, NUM_EXPERTS) for name in ("gate.weight", "gate.weight_1")}
        tensors[f"{mlp}.moe_statics.e_score_correction_bias"] = draw(2, NUM_EXPERTS)
        for e in range(NUM_EXPERTS, 2 * NUM_EXPERTS):
            image = expert(f"{mlp}.experts.{e}", draw)
            tensors |= {name: np.ascontiguousarray(v[: len(v) // 2]) for name, v in image.items() if "down" not in name}
            tensors |= {name: np.ascontiguousarray(v[:, ::2]) for name, v in image.items() if "down" in name}
    sizes = {"num_hidden_layers": 3, "moe_num_experts": [NUM_EXPERTS] * 2, "moe_k": TOP_K}
    sizes |= {"moe_intermediate_size": [EXPERT_HIDDEN, EXPERT_HIDDEN // 2]}
    return tensors, sizes | {"moe_layer_start_index": [1, 1], "moe_layer_end_index": [2, 2]}


SMALL = ("w1", "w3", "w2")
LATENT = {
    "gate.e_score_correction_bias": (NUM_EXPERTS,),
    "routed_expert_down_proj.weight": (HIDDEN, HIDDEN),
    "routed_expert_up_proj.weight": (HIDDEN, HIDDEN),
    "routed_expert_norm.weight": (HIDDEN,),
}
HAND_MADE: dict[str, Any] = {
    "arctic": _arctic,
    "bailing_moe": lambda: _third_party("mlp"),
    "bailing_moe_v2": lambda: _third_party("mlp", row="gate.expert_bias", n_group=2, topk_group=1),
    "deepseek": lambda: _deepseek(bias=False),
    "deepseek_vl_v2": lambda: _within(
        "language_config", _third_party("mlp", count="n_routed_experts", stack="language.model."), "deepseek_v2"
    ),
    "ernie4_5_moe_vl": _ernie,
    "hunyuan": lambda: _third_party("mlp", router="gate.wg.weight", shared="shared_mlp", moe_topk=TOP_K),
    "kimi_k2": lambda: _deepseek(bias=True),
    "kimi_k3": lambda: _within(
        "text_config", _third_party("block_sparse_moe", names=SMALL, beside=LATENT, stack="language_model.model."), "k3"
    ),
    "minimax_m1": lambda: _third_party("block_sparse_moe", names=SMALL, shared="", count="num_local_experts"),
    "minimax_text_01": lambda: _third_party("block_sparse_moe", names=SMALL, shared="", count="num_local_experts"),
    "qwen3_omni_moe": _omni,
    "step3p5": _step,
}


def as_lists(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """gpt-oss with one linear for every expert, and its router one as well."""
    made = {}
    for name, values in tensors.items():
        at, _, part = name.partition("experts.")
        if not part:
            made[name.replace("mlp.router.", "mlp.router.linear.")] = values
            continue
        kind, _, bias = part.partition("_proj")
        for e, own in enumerate(values):
            made[f"{at}experts.{kind}_projs.{e}.{bias[1:] or 'weight'}"] = np.ascontiguousarray(own.T)
    return made


def id_lines(path: Path, rows: int, length: int = 64) -> dict[str, Path]:
    """Calibration data: samples of token ids that tiny models know, always the same, in one file by its name."""
    ids = np.random.default_rng(0).integers(3, 120, (rows, length)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return {"a": path}
