"""Makes checkpoints with the names, shapes, dtypes, shards and config of published models, and weights of no meaning.

    python benchmarks/synthetic.py kimi-k2-bf16 OUT --sparse           # 2 TB to look at, a few hundred MB on disk
    python benchmarks/synthetic.py mixtral-8x7b OUT --layers 4 --intermediate 3584

Sparse: headers are real and weights are holes in the files; only routers and selection biases hold numbers, so that
expert pruning has something to plan with. Full: every weight is a number of sensible size (std near 1/sqrt(fan-in),
norms 1), so that a forward pass stays finite; one block of random numbers is repeated, from another place each time.
Sizes can be changed; attention heads shrink with the hidden size.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coterie.storage.checkpoint import BITS, INDEX
from coterie.storage.numerics import round_to_bf16
from coterie.storage.shards import Hole, Output, header_bytes

SHARD = 5_000_000_000  # bytes
BLOCK = 2**22 - 3  # random numbers to repeat; a prime, so that equal rows do not stand below each other
ONE = 0x3F80  # in bf16


@dataclass(frozen=True)
class Spec:
    """A tensor to write. kind: weight, plain (a weight that stays bf16 in FP8 models), norm, router, bias or scale."""

    name: str
    shape: tuple[int, ...]
    kind: str = "weight"
    dtype: str = "BF16"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


Config = dict[str, Any]
GATED = ("gate_proj", "up_proj", "down_proj")
MIXTRAL_NAMES = ("w1", "w3", "w2")


# --- what stands in each family's checkpoints ---------------------------------------------------------------------


def outside(c: Config) -> Iterator[Spec]:
    """Embeddings, last norm and head."""
    yield Spec("model.embed_tokens.weight", (c["vocab_size"], c["hidden_size"]), "plain")
    yield Spec("model.norm.weight", (c["hidden_size"],), "norm")
    yield Spec("lm_head.weight", (c["vocab_size"], c["hidden_size"]), "plain")


def norms(prefix: str, *names: str, size: int) -> Iterator[Spec]:
    for name in names:
        yield Spec(f"{prefix}{name}.weight", (size,), "norm")


def mlp(prefix: str, hidden: int, width: int, names: tuple[str, str, str] = GATED) -> Iterator[Spec]:
    """An expert's, or a dense MLP's, three matrices (out, in)."""
    for name, shape in zip(names, ((width, hidden), (width, hidden), (hidden, width)), strict=True):
        yield Spec(f"{prefix}.{name}.weight", shape)


def attention(prefix: str, c: Config) -> Iterator[Spec]:
    """Grouped-query attention."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    size = c.get("head_dim", hidden // heads)
    for name, count in (("q", heads), ("k", c["num_key_value_heads"]), ("v", c["num_key_value_heads"])):
        yield Spec(f"{prefix}{name}_proj.weight", (count * size, hidden))
    yield Spec(f"{prefix}o_proj.weight", (hidden, heads * size))


def latent_attention(prefix: str, c: Config) -> Iterator[Spec]:
    """DeepSeek's multi-head latent attention; small models leave the queries' latent out."""
    hidden, heads, rope = c["hidden_size"], c["num_attention_heads"], c["qk_rope_head_dim"]
    queries, keys, nope, values = c["q_lora_rank"], c["kv_lora_rank"], c["qk_nope_head_dim"], c["v_head_dim"]
    if queries is None:
        yield Spec(f"{prefix}q_proj.weight", (heads * (nope + rope), hidden))
    else:
        yield Spec(f"{prefix}q_a_proj.weight", (queries, hidden))
        yield from norms(prefix, "q_a_layernorm", size=queries)
        yield Spec(f"{prefix}q_b_proj.weight", (heads * (nope + rope), queries))
    yield Spec(f"{prefix}kv_a_proj_with_mqa.weight", (keys + rope, hidden))
    yield from norms(prefix, "kv_a_layernorm", size=keys)
    yield Spec(f"{prefix}kv_b_proj.weight", (heads * (nope + values), keys))
    yield Spec(f"{prefix}o_proj.weight", (hidden, heads * values))


def qwen3(c: Config) -> Iterator[Spec]:
    hidden = c["hidden_size"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield from attention(f"{prefix}self_attn.", c)
        yield from norms(f"{prefix}self_attn.", "q_norm", "k_norm", size=c["head_dim"])
        yield from norms(prefix, "input_layernorm", "post_attention_layernorm", size=hidden)
        yield Spec(f"{prefix}mlp.gate.weight", (c["num_experts"], hidden), "router")
        for e in range(c["num_experts"]):
            yield from mlp(f"{prefix}mlp.experts.{e}", hidden, c["moe_intermediate_size"])
    yield from outside(c)


def mixtral(c: Config) -> Iterator[Spec]:
    hidden = c["hidden_size"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield from attention(f"{prefix}self_attn.", c)
        yield from norms(prefix, "input_layernorm", "post_attention_layernorm", size=hidden)
        yield Spec(f"{prefix}block_sparse_moe.gate.weight", (c["num_local_experts"], hidden), "router")
        for e in range(c["num_local_experts"]):
            yield from mlp(f"{prefix}block_sparse_moe.experts.{e}", hidden, c["intermediate_size"], MIXTRAL_NAMES)
    yield from outside(c)


def arctic(c: Config) -> Iterator[Spec]:
    """Mixtral with a dense MLP, as wide as the hidden states, beside the experts."""
    yield from mixtral(c)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield from mlp(f"{prefix}residual_mlp", c["hidden_size"], c["hidden_size"], MIXTRAL_NAMES)
        yield from norms(prefix, "residual_layernorm", size=c["hidden_size"])


def deepseek(c: Config) -> Iterator[Spec]:
    """Dense layers, layers with experts, and then those of multi-token prediction."""
    hidden, num_layers = c["hidden_size"], c["num_hidden_layers"]
    for layer in range(num_layers + c.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer}."
        yield from latent_attention(f"{prefix}self_attn.", c)
        yield from norms(prefix, "input_layernorm", "post_attention_layernorm", size=hidden)
        if layer < c["first_k_dense_replace"]:
            yield from mlp(f"{prefix}mlp", hidden, c["intermediate_size"])
        else:
            yield from deepseek_experts(f"{prefix}mlp.", c)
        if layer >= num_layers:
            yield Spec(f"{prefix}eh_proj.weight", (hidden, 2 * hidden), "plain")
            yield from norms(prefix, "enorm", "hnorm", "shared_head.norm", size=hidden)
            yield Spec(f"{prefix}embed_tokens.weight", (c["vocab_size"], hidden), "plain")
            yield Spec(f"{prefix}shared_head.head.weight", (c["vocab_size"], hidden), "plain")
    yield from outside(c)


def deepseek_experts(prefix: str, c: Config) -> Iterator[Spec]:
    hidden, width, count = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
    yield Spec(f"{prefix}gate.weight", (count, hidden), "router")
    if c["topk_method"] == "noaux_tc":
        yield Spec(f"{prefix}gate.e_score_correction_bias", (count,), "bias", "F32")
    yield from mlp(f"{prefix}shared_experts", hidden, width * c["n_shared_experts"])
    for e in range(count):
        yield from mlp(f"{prefix}experts.{e}", hidden, width)


def gpt_oss(c: Config) -> Iterator[Spec]:
    """Attention with sinks and biases; experts in one tensor each, as MXFP4: 16 bytes and one scale for 32 weights."""
    hidden, width, count = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    heads, keys, size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", heads), ("k", keys), ("v", keys)):
            yield Spec(f"{prefix}self_attn.{name}_proj.weight", (rows * size, hidden), "plain")
            yield Spec(f"{prefix}self_attn.{name}_proj.bias", (rows * size,), "norm")
        yield Spec(f"{prefix}self_attn.o_proj.weight", (hidden, heads * size), "plain")
        yield Spec(f"{prefix}self_attn.o_proj.bias", (hidden,), "norm")
        yield Spec(f"{prefix}self_attn.sinks", (heads,), "norm")
        yield from norms(prefix, "input_layernorm", "post_attention_layernorm", size=hidden)
        yield Spec(f"{prefix}mlp.router.weight", (count, hidden), "router")
        yield Spec(f"{prefix}mlp.router.bias", (count,), "norm")
        for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            yield Spec(f"{prefix}mlp.experts.{name}_blocks", (count, rows, columns // 32, 16), dtype="U8")
            yield Spec(f"{prefix}mlp.experts.{name}_scales", (count, rows, columns // 32), "scale", "U8")
            yield Spec(f"{prefix}mlp.experts.{name}_bias", (count, rows), "plain")
    yield from outside(c)


def in_fp8(specs: Iterator[Spec]) -> Iterator[Spec]:
    """Weights as FP8 with a scale for each block of 128 x 128, as DeepSeek and Kimi publish them."""
    for spec in specs:
        if spec.kind != "weight":
            yield spec
            continue
        rows, columns = (-(-n // 128) for n in spec.shape)
        yield Spec(spec.name, spec.shape, "weight", "F8_E4M3")
        yield Spec(f"{spec.name}_scale_inv", (rows, columns), "scale", "F32")


# --- the models ---------------------------------------------------------------------------------------------------

COMMON: Config = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
QWEN3_30B: Config = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "bos_token_id": 151643, "eos_token_id": 151645, "vocab_size": 151936, "decoder_sparse_step": 1, "head_dim": 128,
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "norm_topk_prob": True, "num_attention_heads": 32,
    "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "output_router_logits": False, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
MIXTRAL_8X7B: Config = COMMON | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2,
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": None,
}  # fmt: skip
ARCTIC: Config = COMMON | {
    "architectures": ["ArcticForCausalLM"], "model_type": "arctic", "bos_token_id": 31998, "eos_token_id": 31999,
    "vocab_size": 32000, "hidden_size": 7168, "intermediate_size": 4864, "max_position_embeddings": 4096,
    "moe_layer_frequency": 1, "moe_token_dropping": False, "num_attention_heads": 56, "num_key_value_heads": 8,
    "num_local_experts": 128, "num_experts_per_tok": 2, "num_hidden_layers": 35, "parallel_attn_mlp_res": True,
    "rms_norm_eps": 1e-5, "rope_theta": 10000, "router_aux_loss_coef": 0.001, "use_residual": True,
}  # fmt: skip
YARN: Config = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
DEEPSEEK_V3: Config = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
    "bos_token_id": 0, "eos_token_id": 1, "vocab_size": 129280, "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "topk_group": 4,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_attention_heads": 128,
    "num_key_value_heads": 128, "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": YARN,
}  # fmt: skip
KIMI_K2: Config = DEEPSEEK_V3 | {
    "model_type": "kimi_k2", "bos_token_id": 163584, "eos_token_id": 163585, "vocab_size": 163840,
    "first_k_dense_replace": 1, "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "num_attention_heads": 64,
    "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.827, "rope_theta": 50000.0,
    "max_position_embeddings": 131072, "rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
}  # fmt: skip
DEEPSEEK_V2_LITE: Config = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "attention_bias": False,
    "bos_token_id": 100000, "eos_token_id": 100001, "vocab_size": 102400, "first_k_dense_replace": 1,
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy", "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_hidden_layers": 27, "q_lora_rank": None, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
GPT_OSS_20B: Config = COMMON | {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64,
    "eos_token_id": 200002, "pad_token_id": 199999, "vocab_size": 201088, "hidden_size": 2880,
    "intermediate_size": 2880, "initial_context_length": 4096, "max_position_embeddings": 131072,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 24, "num_local_experts": 32,
    "num_experts_per_tok": 4, "experts_per_token": 4, "output_router_logits": False, "rms_norm_eps": 1e-5,
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
    },
}  # fmt: skip
FP8: Config = {
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }
}  # fmt: skip

MODELS: dict[str, tuple[Config, Callable[[Config], Iterator[Spec]]]] = {
    "qwen3-30b-a3b": (QWEN3_30B, qwen3),
    "mixtral-8x7b": (MIXTRAL_8X7B, mixtral),
    "arctic": (ARCTIC, arctic),
    "deepseek-v2-lite": (DEEPSEEK_V2_LITE, deepseek),
    "gpt-oss-20b": (GPT_OSS_20B, gpt_oss),
    "deepseek-v3": (DEEPSEEK_V3 | FP8, lambda c: in_fp8(deepseek(c))),
    "deepseek-v3-bf16": (DEEPSEEK_V3, deepseek),
    "kimi-k2": (KIMI_K2 | FP8, lambda c: in_fp8(deepseek(c))),
    "kimi-k2-bf16": (KIMI_K2, deepseek),
}


def resized(
    config: Config,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    experts: int | None = None,
    intermediate: int | None = None,
    vocabulary: int | None = None,
) -> Config:
    """The config with other sizes; what depends on them (heads, top-k, dense layers, prediction layers) follows."""
    c = dict(config)
    if layers:
        c["num_hidden_layers"] = layers
        if "layer_types" in c:
            c["layer_types"] = c["layer_types"][:layers]
        dependent = {"first_k_dense_replace": min(c.get("first_k_dense_replace", 0), layers - 1)}
        dependent["num_nextn_predict_layers"] = 0  # transformers knows it by the real model's layer number
        c |= {key: value for key, value in dependent.items() if key in c}
    if hidden:
        c["num_attention_heads"] = max(1, c["num_attention_heads"] * hidden // c["hidden_size"])
        c["num_key_value_heads"] = math.gcd(c["num_key_value_heads"], c["num_attention_heads"])
        if "moe_intermediate_size" in c:  # else it is the experts'
            c["intermediate_size"] = max(1, c["intermediate_size"] * hidden // c["hidden_size"])
        c["hidden_size"] = hidden
    if experts:
        c[next(k for k in ("num_experts", "num_local_experts", "n_routed_experts") if k in c)] = experts
        groups = c["n_group"] = math.gcd(c.get("n_group", 1), experts)
        c["topk_group"] = min(c.get("topk_group", 1), groups)
        c["num_experts_per_tok"] = min(c["num_experts_per_tok"], experts // groups * c["topk_group"])
    if intermediate:
        c["moe_intermediate_size" if "moe_intermediate_size" in c else "intermediate_size"] = intermediate
    if vocabulary:
        c["vocab_size"] = vocabulary
    return c


# --- writing ------------------------------------------------------------------------------------------------------


class Numbers:
    """Where the weights come from: the same for the same seed, and different for each tensor."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        draw = np.random.default_rng(seed)
        normal = draw.standard_normal(BLOCK, dtype=np.float32)
        normal[np.abs(normal) < 2.0**-30] = 2.0**-30  # exponents will be made smaller, and must not run under
        self.normal = round_to_bf16(normal)
        self.codes = draw.integers(0, 255, BLOCK, dtype=np.uint8)
        self.codes[self.codes == 0x7F] = 0  # E4M3's NaN are 0x7F and 0xFF
        self._scaled: dict[int, np.ndarray] = {}

    def of(self, spec: Spec, number: int) -> Iterator[np.ndarray]:
        """The tensor's stored values, in pieces."""
        draw = np.random.default_rng([self.seed, number])
        if spec.kind == "norm":
            yield np.full(spec.shape, ONE, np.uint16)
        elif spec.kind == "router":
            yield round_to_bf16(draw.standard_normal(spec.shape, dtype=np.float32) / math.sqrt(spec.shape[1]))
        elif spec.kind == "bias":
            yield draw.standard_normal(spec.shape, dtype=np.float32) * np.float32(0.01)
        elif spec.kind == "scale" and spec.dtype == "U8":  # powers of two, from 2^-127 on
            yield np.full(spec.shape, 127 - round(math.log2(6 * math.sqrt(32 * spec.shape[-1]))), np.uint8)
        elif spec.kind == "scale":  # codes that are all equally likely have a standard deviation near 110
            yield np.full(spec.shape, 1 / 110 / math.sqrt(128 * spec.shape[1]), np.float32)
        else:
            block = self.codes if spec.dtype in ("F8_E4M3", "U8") else self._normal(spec.shape[1])
            yield from repeated(block, int(draw.integers(BLOCK)), math.prod(spec.shape))

    def _normal(self, fan_in: int) -> np.ndarray:
        """The block in bf16, divided by the power of two nearest to sqrt(fan_in): a lower exponent, and no rounding."""
        halvings = round(math.log2(fan_in) / 2)
        if halvings not in self._scaled:
            self._scaled[halvings] = self.normal - np.uint16(halvings << 7)
        return self._scaled[halvings]


def repeated(block: np.ndarray, start: int, count: int) -> Iterator[np.ndarray]:
    """`count` values: the block from `start`, and around."""
    while count:
        piece = block[start : start + count]
        yield piece
        start, count = 0, count - len(piece)


def shards(specs: list[Spec], limit: int) -> list[list[Spec]]:
    """Tensors in order, cut where the next would make a file too large; inside a file by size of dtype, then name."""
    found: list[list[Spec]] = [[]]
    filled = 0
    for spec in specs:
        if found[-1] and filled + spec.num_bytes > limit:
            found.append([])
            filled = 0
        found[-1].append(spec)
        filled += spec.num_bytes
    return [sorted(shard, key=lambda s: (-BITS[s.dtype], s.name)) for shard in found]


def write_shard(path: Path, specs: list[Spec], numbers: Numbers, first: int, *, sparse: bool) -> None:
    """One safetensors file; `first` numbers its first tensor. A sparse one has holes but for routers and biases."""
    outputs = [Output(s.name, s.dtype, s.shape, (Hole(s.num_bytes),)) for s in specs]
    with path.open("wb", buffering=0) as file:
        file.write(header_bytes(outputs, {"format": "pt"}))
        position = file.tell()
        for number, spec in enumerate(specs, first):
            if not sparse or spec.kind in ("router", "bias"):
                file.seek(position)
                for piece in numbers.of(spec, number):
                    file.write(np.ascontiguousarray(piece).data)
            position += spec.num_bytes
        file.truncate(position)


def make(
    model: str, folder: Path, *, sparse: bool = False, seed: int = 0, shard_bytes: int = SHARD, **sizes: int | None
) -> Path:
    """Writes a checkpoint of one of `MODELS`, resized, into a folder that it makes; returns the folder."""
    config, tensors = MODELS[model]
    config = resized(config, **sizes)
    files = shards(list(tensors(config)), shard_bytes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    numbers, written, weight_map = Numbers(seed), 0, {}
    for i, specs in enumerate(files, 1):
        name = f"model-{i:05}-of-{len(files):05}.safetensors"
        write_shard(folder / name, specs, numbers, written, sparse=sparse)
        weight_map |= {spec.name: name for spec in specs}
        written += len(specs)
    total = sum(spec.num_bytes for specs in files for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return folder


def write_data(path: Path, *, vocabulary: int, samples: int = 128, seq_len: int = 2048, seed: int = 0) -> Path:
    """Calibration data that need no tokenizer: JSONL of `{"input_ids": [...]}`, one sample per line."""
    draw = np.random.default_rng(seed)
    rows = (draw.integers(0, vocabulary, seq_len).tolist() for _ in range(samples))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sparse", action="store_true", help="holes instead of weights")
    parser.add_argument("--seed", type=int, default=0)
    for size in ("layers", "hidden", "experts", "intermediate", "vocabulary"):
        parser.add_argument(f"--{size}", type=int, help="instead of the published number")
    parser.add_argument("--data", type=Path, metavar="FILE", help="also write calibration data of token ids")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    options = vars(parser.parse_args())
    model, out, data = options.pop("model"), options.pop("out"), options.pop("data")
    samples, seq_len = options.pop("samples"), options.pop("seq_len")
    make(model, out, **options)
    if data:
        vocabulary = json.loads((out / "config.json").read_text())["vocab_size"]
        write_data(data, vocabulary=vocabulary, samples=samples, seq_len=seq_len, seed=options["seed"])


if __name__ == "__main__":
    main()
