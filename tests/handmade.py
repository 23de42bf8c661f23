"""Checkpoints made by hand from numpy arrays: small enough to check with a pencil, no model library needed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HIDDEN, WIDTH = 4, 3
MLP = ("gate_proj", "up_proj", "down_proj")


def save(folder: Path, config: dict[str, Any], shards: list[dict[str, np.ndarray]], *, index: bool = True) -> Path:
    """Writes config.json and the shards: one as model.safetensors, several numbered and with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt", "part": str(number)})
        weight_map |= dict.fromkeys(tensors, name)
    if index:
        total = sum(a.nbytes for tensors in shards for a in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def qwen_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": HIDDEN,
        "vocab_size": 5,
    } | changes


def block(prefix: str, router: np.ndarray, draw: np.random.Generator, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A router and its numbered experts, weights drawn at random."""
    tensors = {f"{prefix}mlp.gate.weight": router.astype(dtype)}
    for e in range(len(router)):
        for part in MLP:
            shape = (HIDDEN, WIDTH) if part == "down_proj" else (WIDTH, HIDDEN)
            tensors[f"{prefix}mlp.experts.{e}.{part}.weight"] = draw.normal(size=shape).astype(dtype)
    return tensors


def qwen(
    folder: Path,
    *,
    experts: int = 8,
    layers: int = 2,
    top_k: int = 2,
    routers: list[np.ndarray] | None = None,
    num_shards: int = 1,
    dtype: Any = np.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """A checkpoint with Qwen2-MoE's names: embedding, per layer attention, norm, router, experts, shared expert."""
    draw = np.random.default_rng(seed)
    parts: list[dict[str, np.ndarray]] = [{"model.embed_tokens.weight": draw.normal(size=(5, HIDDEN)).astype(dtype)}]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        router = draw.normal(size=(experts, HIDDEN)) if routers is None else routers[layer]
        tensors = block(prefix, router, draw, dtype)
        tensors[f"{prefix}self_attn.q_proj.weight"] = draw.normal(size=(HIDDEN, HIDDEN)).astype(dtype)
        tensors[f"{prefix}input_layernorm.weight"] = np.ones(HIDDEN, dtype)
        tensors[f"{prefix}mlp.shared_expert.up_proj.weight"] = draw.normal(size=(WIDTH, HIDDEN)).astype(dtype)
        tensors[f"{prefix}mlp.shared_expert_gate.weight"] = draw.normal(size=(1, HIDDEN)).astype(dtype)
        parts.append(tensors)
    shards: list[dict[str, np.ndarray]] = [{} for _ in range(num_shards)]
    everything = [item for tensors in parts for item in tensors.items()]
    size = math.ceil(len(everything) / num_shards)
    for position, (name, values) in enumerate(everything):
        shards[position // size][name] = values
    sizes = {"num_experts": experts, "num_hidden_layers": layers, "num_experts_per_tok": top_k}
    return save(folder, qwen_config(**sizes | config), shards)


def deepseek(folder: Path, *, experts: int = 16, groups: int = 4, top_groups: int = 2, top_k: int = 2) -> Path:
    """One layer with DeepSeek-V3's names: routing groups, and a bias per expert that only selects."""
    draw = np.random.default_rng(1)
    tensors = block("model.layers.0.", draw.normal(size=(experts, HIDDEN)), draw)
    tensors["model.layers.0.mlp.gate.e_score_correction_bias"] = np.arange(experts, dtype=np.float32)
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 1,
        "n_routed_experts": experts,
        "num_experts_per_tok": top_k,
        "n_group": groups,
        "topk_group": top_groups,
    }
    return save(folder, config, [tensors])


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, read by the safetensors library."""
    from safetensors.numpy import load_file

    return {name: values for path in sorted(folder.glob("*.safetensors")) for name, values in load_file(path).items()}


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, but for those that hold times and peak memory."""
    timed = ("coterie.json", "coterie.log", "README.md")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in timed}
