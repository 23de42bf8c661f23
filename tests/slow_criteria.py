"""Criteria, slow and obvious: what scores from sums, and errors from inner products, are tested against.

The whole stock model is in memory, one sample goes through it at a time, and every expert's output is had by giving the
stock experts module one token and one expert. Nothing of coterie is used.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def blocks(model: Any) -> dict[str, Any]:
    """The MoE blocks by layer."""
    return {str(i): layer.mlp for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}


def seen(model: Any, modules: dict[str, Any], samples: list[tuple[int, ...]]) -> dict[str, list[tuple]]:
    """What the modules are called with, sample by sample."""
    calls = defaultdict(list)
    handles = [
        m.register_forward_pre_hook(lambda _, args, key=key: calls[key].append(args)) for key, m in modules.items()
    ]
    with torch.inference_mode():
        for sample in samples:
            model(input_ids=torch.tensor([sample]), use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def fires(folder: Path, samples: list[tuple[int, ...]]) -> dict[str, list[list[tuple[float, np.ndarray]]]]:
    """By layer and expert: (routing weight, output) of every token that chose it."""
    model = load(folder)
    experts = {key: block.experts for key, block in blocks(model).items()}
    found = {}
    for key, calls in seen(model, experts, samples).items():
        found[key] = [[] for _ in range(len(experts[key].down_proj))]
        for tokens, chosen, weights in calls:
            for x, ids, gates in zip(tokens, chosen, weights, strict=True):
                for e, g in zip(ids.tolist(), gates.tolist(), strict=True):
                    with torch.inference_mode():
                        y = experts[key].forward(x[None], torch.tensor([[e]]), torch.ones(1, 1))[0]
                    found[key][e].append((g, y.double().numpy()))
    return found


def scores(folder: Path, samples: list[tuple[int, ...]]) -> dict[str, dict[str, np.ndarray]]:
    """By criterion and layer: (E,), by the formulas as they are printed."""
    found = defaultdict(dict)
    for key, experts in fires(folder, samples).items():
        norms = [[np.linalg.norm(y) for _, y in fired] for fired in experts]
        gated = [[g * np.linalg.norm(y) for g, y in fired] for fired in experts]
        found["frequency"][key] = np.array([len(fired) for fired in experts])
        found["ean"][key] = np.array([sum(n) for n in norms])
        found["reap"][key] = np.array([np.mean(n) if n else 0 for n in gated])
        found["man"][key] = np.array([np.mean(n) if n else 0 for n in norms])
        found["msan"][key] = np.array([np.mean(np.square(n)) if n else 0 for n in norms])
        found["mone"][key] = np.array([
            len(fired) * np.var([y for _, y in fired], axis=0).sum() if fired else 0 for fired in experts
        ])  # fmt: skip
        found["output_max"][key] = np.array([max((np.abs(y).max() for _, y in fired), default=0) for fired in experts])
    return found


def highest(scores: np.ndarray, count: int, num_groups: int = 1) -> list[int]:
    """The `count` experts of the highest scores, equally many of each group of neighbours; ties to lower ids."""
    size = len(scores) // num_groups
    kept = []
    for g in range(num_groups):
        members = range(g * size, (g + 1) * size)
        kept += sorted(members, key=lambda e: (-scores[e], e))[: count // num_groups]
    return sorted(kept)


def cut(block: Any, kept: tuple[int, ...], num_experts: int) -> Any:
    """A MoE block that has these experts alone: everything with one entry an expert is sliced."""
    smaller = copy.deepcopy(block)
    for module in (smaller.experts, getattr(smaller, "gate", None) or smaller.router):
        module.num_experts = len(kept)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.shape[:1] == (num_experts,):
                values = tensor.detach()[list(kept)]
                setattr(module, name, torch.nn.Parameter(values) if name in module._parameters else values)
    return smaller


def errors(folder: Path, samples: list[tuple[int, ...]], count: int) -> dict[str, dict[tuple[int, ...], float]]:
    """By layer and kept set: the squared change of the block's output on the unpruned model's inputs."""
    model = load(folder)
    found = {}
    for key, calls in seen(model, blocks(model), samples).items():
        block = blocks(model)[key]
        num_experts = len(block.experts.down_proj)
        with torch.inference_mode():
            before = [first(block(*args)).double() for args in calls]
            found[key] = {}
            for kept in combinations(range(num_experts), count):
                smaller = cut(block, kept, num_experts)
                after = [first(smaller(*args)).double() for args in calls]
                gap = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
                found[key][kept] = gap
    return found


def first(output: Any) -> torch.Tensor:
    """What a block returns, or the first of several."""
    return output[0] if isinstance(output, tuple) else output
