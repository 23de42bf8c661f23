"""The same model under another model type, whose stock config can say more: exact, or refused.

    plan: {"converted": "qwen2_moe"}, of which everything else is said in terms of the converted model

    mixtral      -> qwen2_moe      names and keys; the shared expert is one neuron of zeros
    deepseek     -> qwen2_moe      DeepSeekMoE-16B v1, which no stock class reads: attention as Llama's, softmax and
                                   top-k; its shared expert has no gate, so it is doubled under a gate of 1/2
    deepseek_v3  -> glm4_moe_lite  keys only

The result is a checkpoint to read from and to plan on, not yet written (`storage/planned.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from coterie.edits.plan import Keys, Kind
from coterie.errors import CoterieError
from coterie.model.family import registry
from coterie.model.layer import LAYER, Model, find_blocks
from coterie.storage.checkpoint import BITS, Checkpoint, Tensor
from coterie.storage.numerics import encode
from coterie.storage.planned import resolved, view
from coterie.storage.shards import Output, computed, whole

Config = MutableMapping[str, Any]  # config.json, changed in place


@dataclass(frozen=True)
class Conversion:
    """To which type, what keeps it from being exact ("" if nothing), and how keys and tensors change."""

    target: str
    architecture: str
    obstacle: Callable[[Mapping[str, Any]], str]
    patch: Callable[[Config, Model], None]
    tensors: Callable[[Model, Tensor], tuple[Output, ...]]
    shared_scale: float = 1.0  # what the target multiplies the source's shared expert by, for the same sum


def conversion(config: Mapping[str, Any]) -> Conversion | None:
    """How a model of this config can be repackaged exactly, if it can."""
    found = CONVERSIONS.get(str(config.get("model_type")))
    return found if found and not found.obstacle(config) else None


def converted(model: Model, target: str | None) -> Model:
    """The model as another type. Raises: CoterieError where that would not be exact."""
    if target is None:
        return model
    config = model.checkpoint.config
    found = CONVERSIONS.get(str(config.get("model_type")))
    if found is None or found.target != target or found.obstacle(config):
        reason = f" ({found.obstacle(config)})" if found and found.obstacle(config) else ""
        raise CoterieError(
            f"{model.checkpoint.path}: {config.get('model_type')!r} cannot be repackaged as {target!r}{reason}"
        )
    shards: dict[str, list[Output]] = {shard: [] for shard in model.checkpoint.shards}
    for tensor in model.checkpoint.tensors.values():
        shards[tensor.file] += found.tensors(model, tensor)
    changed = copy.deepcopy(config)
    found.patch(changed, model)
    changed |= {"model_type": target, "architectures": [found.architecture]}
    changed.pop("auto_map", None)  # names code that we neither run nor copy
    shards = resolved(model.checkpoint, shards)
    return find_blocks(view(model.checkpoint, shards, changed, found.shared_scale), registry()[target])


def zeros(name: str, dtype: str, shape: tuple[int, ...]) -> Output:
    return computed(name, dtype, shape, lambda: bytes(math.prod(shape) * BITS[dtype] // 8))


def _patch(
    config: Config, renamed: Mapping[str, str], defaults: Mapping[str, object], removed: tuple[str, ...] = ()
) -> None:
    """defaults: what the source's class assumes where its config is silent; the target's class assumes otherwise."""
    for old, new in renamed.items():
        if old in config:
            config[new] = config.pop(old)
    for key, value in defaults.items():
        config.setdefault(key, value)
    for key in removed:
        config.pop(key, None)


def read(where: str, content: Any) -> dict[str, object]:
    """The model type, or none."""
    if not isinstance(content.get("converted"), str | None):
        raise CoterieError(f"{where}: dropped must be ascending layer numbers and converted a model type")
    return {"converted": content.get("converted")}


KIND = Kind(order=3, plan=Keys(("converted",), read))


# --- to qwen2_moe ----------------------------------------------------------------------------------------------


def _to_qwen2(config: Config, model: Model, theta: float) -> None:
    """What both conversions to qwen2_moe say alike."""
    sparse = {int(b.key) for b in model.main}
    _patch(config, {}, {} if config.get("rope_parameters") else {"rope_theta": theta}, ("layer_types",))
    config.update({
        "mlp_only_layers": [i for i in range(config["num_hidden_layers"]) if i not in sparse],
        "decoder_sparse_step": 1,
        "qkv_bias": True,  # some loaders hard-code it, so zeros are stored
        "use_sliding_window": False,
        "output_router_logits": False,
    })  # fmt: skip


def _biased(tensor: Tensor) -> tuple[Output, ...]:
    """A projection to queries, keys or values, and the zero bias that qwen2_moe adds to it."""
    return whole(tensor), zeros(tensor.name.removesuffix("weight") + "bias", tensor.dtype, tensor.shape[:1])


def _is_qkv(name: str) -> bool:
    return LAYER.fullmatch(name) is not None and name.endswith((".q_proj.weight", ".k_proj.weight", ".v_proj.weight"))


def _coded_obstacle(config: Mapping[str, Any]) -> str:
    return "its weights are quantised" if config.get("quantization_config") else ""


def _head_dim_obstacle(config: Mapping[str, Any]) -> str:
    given, heads = config.get("head_dim"), config.get("num_attention_heads")
    if not all(type(config.get(key)) is int for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")):
        return "its config does not say its sizes"
    if given not in (None, config["hidden_size"] // heads):
        return f"its head_dim is {given}"
    return _coded_obstacle(config)


def _mixtral_obstacle(config: Mapping[str, Any]) -> str:
    if config.get("sliding_window") is not None:
        return f"its attention has a sliding window of {config['sliding_window']}"
    return _head_dim_obstacle(config)


def _patch_mixtral(config: Config, model: Model) -> None:
    _to_qwen2(config, model, 1e6)
    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096 * 32, "num_key_value_heads": 8}
    _patch(config, {"num_local_experts": "num_experts"}, defaults, ("head_dim",))
    config.update({
        "moe_intermediate_size": config["intermediate_size"],
        "shared_expert_intermediate_size": 1,
        "norm_topk_prob": True,
    })  # fmt: skip


PARTS = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}


def _mixtral_tensors(model: Model, tensor: Tensor) -> tuple[Output, ...]:
    name = tensor.name
    if _is_qkv(name):
        return _biased(tensor)
    if not LAYER.fullmatch(name):
        return (whole(tensor),)
    name = name.replace(".block_sparse_moe.", ".mlp.")
    if ".experts." in name:
        name = next((name.replace(old, new) for old, new in PARTS.items() if old in name), name)
    if name.endswith(".mlp.gate.weight"):
        return whole(tensor, name), *_no_shared_expert(tensor, name.removesuffix("gate.weight"))
    return (whole(tensor, name),)


def _no_shared_expert(router: Tensor, mlp: str) -> tuple[Output, ...]:
    """A shared expert of one neuron that gives nothing: vLLM does not know the names where the width is 0."""
    hidden = router.shape[-1]
    shapes = {
        "shared_expert.gate_proj.weight": (1, hidden),
        "shared_expert.up_proj.weight": (1, hidden),
        "shared_expert.down_proj.weight": (hidden, 1),
        "shared_expert_gate.weight": (1, hidden),
    }
    return tuple(zeros(mlp + part, router.dtype, shape) for part, shape in shapes.items())


def _deepseek_obstacle(config: Mapping[str, Any]) -> str:
    if config.get("attention_bias"):
        return "its attention has biases on all projections"
    if config.get("rope_scaling"):
        return f"its rope_scaling is {config['rope_scaling']!r:.60}"
    if config.get("scoring_func", "softmax") != "softmax":
        return f"its scoring_func is {config['scoring_func']!r}"
    return _head_dim_obstacle(config)


DEEPSEEK_DEFAULTS = {
    "moe_intermediate_size": 1407, "norm_topk_prob": False, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}  # fmt: skip
DEEPSEEK_ONLY = (
    "n_shared_experts", "first_k_dense_replace", "moe_layer_freq", "scoring_func", "seq_aux", "rope_scaling",
    "head_dim", "attention_bias", "pretraining_tp", "ep_size", "routed_scaling_factor",
)  # fmt: skip


def _patch_deepseek(config: Config, model: Model) -> None:
    _to_qwen2(config, model, 1e4)
    shared, defaults = config.get("n_shared_experts"), {"num_key_value_heads": config["num_attention_heads"]}
    renamed = {"n_routed_experts": "num_experts", "aux_loss_alpha": "router_aux_loss_coef"}
    _patch(config, renamed, DEEPSEEK_DEFAULTS | defaults, DEEPSEEK_ONLY)
    config["shared_expert_intermediate_size"] = shared * config["moe_intermediate_size"] if shared else 1


def _deepseek_tensors(model: Model, tensor: Tensor) -> tuple[Output, ...]:
    name = tensor.name.replace(".mlp.shared_experts.", ".mlp.shared_expert.")
    if _is_qkv(name):
        return _biased(tensor)
    if name.endswith(".mlp.shared_expert.down_proj.weight"):
        return (_doubled(model.checkpoint, tensor, name),)
    if not name.endswith(".mlp.gate.weight"):
        return (whole(tensor, name),)
    mlp = name.removesuffix("gate.weight")
    block = next(b for b in model.moe if b.router == tensor.name)
    if not block.shared:
        return whole(tensor), *_no_shared_expert(tensor, mlp)
    return whole(tensor), zeros(f"{mlp}shared_expert_gate.weight", tensor.dtype, (1, tensor.shape[1]))


def _doubled(checkpoint: Checkpoint, tensor: Tensor, name: str) -> Output:
    """Twice the tensor: exact in every float type, unless it overflows."""

    def make() -> bytes:
        return encode(2 * checkpoint.read(tensor.name), tensor.dtype, tensor.name)

    return computed(name, tensor.dtype, tensor.shape, make)


# --- deepseek_v3 to glm4_moe_lite ------------------------------------------------------------------------------


V3_DEFAULTS = {
    "rms_norm_eps": 1e-6, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "max_position_embeddings": 4096,
    "num_experts_per_tok": 8, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256,
}  # fmt: skip


def _patch_v3(config: Config, model: Model) -> None:
    sparse = {int(b.key) for b in model.main}
    _patch(config, {}, V3_DEFAULTS if config.get("rope_parameters") else V3_DEFAULTS | {"rope_theta": 1e4})
    config["mlp_layer_types"] = ["sparse" if i in sparse else "dense" for i in range(config["num_hidden_layers"])]


CONVERSIONS = {
    "mixtral": Conversion("qwen2_moe", "Qwen2MoeForCausalLM", _mixtral_obstacle, _patch_mixtral, _mixtral_tensors),
    "deepseek": Conversion(
        "qwen2_moe", "Qwen2MoeForCausalLM", _deepseek_obstacle, _patch_deepseek, _deepseek_tensors, shared_scale=0.5
    ),
    "deepseek_v3": Conversion(
        "glm4_moe_lite", "Glm4MoeLiteForCausalLM", _coded_obstacle, _patch_v3, lambda model, tensor: (whole(tensor),)
    ),
}
