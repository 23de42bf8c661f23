"""DeepSeekMoE-16B v1's forward in plain float32 tensor operations, and a tiny checkpoint of its shape.

transformers has no class for it; this is the reference that its repackaged form must equal. Llama's attention without
biases, a first dense layer, then: routed softmax top-k, not renormalised, beside ungated shared experts.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

import tiny

CONFIG = {
    "model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "hidden_act": "silu", "torch_dtype": "float32",
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}, "attention_bias": False,
    "hidden_size": 32, "intermediate_size": 56, "moe_intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False,
    "scoring_func": "softmax", "aux_loss_alpha": 0.001, "seq_aux": True, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": None, "max_position_embeddings": 128, "vocab_size": 128, "tie_word_embeddings": False,
    "pretraining_tp": 1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = ("gate_proj", "up_proj", "down_proj")


def save(folder, **changes):
    """The tiny checkpoint, in the released names."""
    config, draw = CONFIG | changes, np.random.default_rng(0)
    hidden, tensors = config["hidden_size"], {}
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]

    def put(name, *shape, scale=0.2):
        tensors[name] = (scale * draw.standard_normal(shape)).astype(np.float32)

    def mlp(prefix, width):
        for part in GATED:
            put(f"{prefix}.{part}.weight", *((hidden, width) if part == "down_proj" else (width, hidden)))

    put("model.embed_tokens.weight", config["vocab_size"], hidden)
    put("lm_head.weight", config["vocab_size"], hidden)
    put("model.norm.weight", hidden, scale=1.0)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for part, rows in (("q", heads), ("k", kv), ("v", kv), ("o", heads)):
            put(f"{at}.self_attn.{part}_proj.weight", hidden if part == "o" else rows * hidden // heads, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            put(f"{at}.{norm}.weight", hidden, scale=1.0)
        if layer < config["first_k_dense_replace"]:
            mlp(f"{at}.mlp", config["intermediate_size"])
            continue
        put(f"{at}.mlp.gate.weight", config["n_routed_experts"], hidden, scale=0.5)
        for e in range(config["n_routed_experts"]):
            mlp(f"{at}.mlp.experts.{e}", config["moe_intermediate_size"])
        if config["n_shared_experts"]:
            mlp(f"{at}.mlp.shared_experts", config["n_shared_experts"] * config["moe_intermediate_size"])
    return tiny.write(folder, tensors, config)


def logits(folder, ids, condensed=None):
    """(T, vocabulary) of one sequence; condensed: {layer: (experts, gates, shared gate)} always on instead."""
    arrays, config = tiny.read(folder)
    w = {name: torch.from_numpy(values) for name, values in arrays.items()}
    x = w["model.embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        x = x + attention(w, config, f"{at}.self_attn", norm(x, w[f"{at}.input_layernorm.weight"], config))
        h = norm(x, w[f"{at}.post_attention_layernorm.weight"], config)
        if f"{at}.mlp.gate.weight" not in w:
            x = x + mlp(w, f"{at}.mlp", h)
        elif layer in (condensed or {}):
            experts, gates, shared = condensed[layer]
            parts = [g * mlp(w, f"{at}.mlp.experts.{e}", h) for e, g in zip(experts, gates, strict=True)]
            x = x + shared * mlp(w, f"{at}.mlp.shared_experts", h) + sum(parts, torch.zeros_like(h))
        else:
            x = x + routed(w, config, f"{at}.mlp", h)
    return norm(x, w["model.norm.weight"], config) @ w["lm_head.weight"].T


def norm(x, weight, config):
    return weight * x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()


def mlp(w, at, x):
    return (F.silu(x @ w[f"{at}.gate_proj.weight"].T) * (x @ w[f"{at}.up_proj.weight"].T)) @ w[
        f"{at}.down_proj.weight"
    ].T


def routed(w, config, at, x):
    """S(x) + sum of the top-k experts, each times its softmax probability, token by token."""
    probabilities = (x @ w[f"{at}.gate.weight"].T).softmax(-1)
    rows = []
    for row, p in zip(x, probabilities, strict=True):
        best = p.topk(config["num_experts_per_tok"]).indices.tolist()
        scale = float(sum(p[e] for e in best)) if config["norm_topk_prob"] else 1.0
        rows.append(sum(p[e] / scale * mlp(w, f"{at}.experts.{e}", row) for e in best))
    shared = mlp(w, f"{at}.shared_experts", x) if config["n_shared_experts"] else 0
    return torch.stack(rows) + shared


def attention(w, config, at, x):
    """Causal, grouped heads, rotary positions by halves."""
    heads, kv, length = config["num_attention_heads"], config["num_key_value_heads"], len(x)
    size = config["hidden_size"] // heads
    q, k, v = (
        (x @ w[f"{at}.{part}_proj.weight"].T).view(length, n, size).transpose(0, 1)
        for part, n in (("q", heads), ("k", kv), ("v", kv))
    )
    frequency = config["rope_theta"] ** (-torch.arange(0, size, 2).float() / size)
    angle = torch.outer(torch.arange(length).float(), torch.cat([frequency, frequency]))

    def turned(z):
        half = size // 2
        return z * angle.cos() + torch.cat([-z[..., half:], z[..., :half]], -1) * angle.sin()

    q, k = turned(q), turned(k)
    k, v = (z.repeat_interleave(heads // kv, 0) for z in (k, v))
    scores = (q @ k.transpose(1, 2)) / size**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1) @ w[f"{at}.o_proj.weight"].T
