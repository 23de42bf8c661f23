"""Merging, slow and obvious: what clusters, shares and merged weights are tested against.

The whole stock model is in memory; every expert sees every token, one expert at a time. Nothing of coterie is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

import slow_criteria

Clusters = list[list[int]]


@dataclass
class Seen:
    """Of one layer: each expert's mean output over all tokens, the tokens that chose it, its logit on every one."""

    means: np.ndarray  # (E, D)
    tokens: np.ndarray  # (E,)
    logits: np.ndarray  # (T, E)


def seen(folder: Path, samples: list[tuple[int, ...]]) -> dict[str, Seen]:
    """What calibration should find, by layer."""
    model = slow_criteria.load(folder)
    blocks = slow_criteria.blocks(model)
    calls = slow_criteria.seen(model, {key: block.experts for key, block in blocks.items()}, samples)
    return {key: _layer(block, calls[key]) for key, block in blocks.items()}


def _layer(block, calls) -> Seen:
    num_experts = len(block.experts.down_proj)
    router = getattr(block, "gate", None) or block.router
    bias = 0.0 if getattr(router, "bias", None) is None else router.bias.detach().double().numpy()
    outputs, logits, tokens = [[] for _ in range(num_experts)], [], np.zeros(num_experts)
    for inputs, chosen, _ in calls:
        with torch.inference_mode():
            for e in range(num_experts):
                ids, ones = torch.full((len(inputs), 1), e), torch.ones(len(inputs), 1)
                outputs[e].append(block.experts.forward(inputs, ids, ones).double().numpy())
            logits.append((inputs.double() @ router.weight.double().T).numpy() + bias)
        for ids in chosen.tolist():
            tokens[ids] += 1
    return Seen(np.array([np.concatenate(found).mean(axis=0) for found in outputs]), tokens, np.concatenate(logits))


def hc_smoe(means: np.ndarray, num_clusters: int) -> Clusters:
    """Joins the two clusters whose members are nearest on average, until as many are left."""
    clusters = [[e] for e in range(len(means))]
    while len(clusters) > num_clusters:
        gaps = {
            (i, j): np.mean([np.linalg.norm(means[a] - means[b]) for a in clusters[i] for b in clusters[j]])
            for i in range(len(clusters))
            for j in range(i)
        }
        i, j = min(gaps, key=gaps.get)
        clusters[j] += clusters.pop(i)
    return sorted(sorted(c) for c in clusters)


def m_smoe(tokens: np.ndarray, logits: np.ndarray, num_clusters: int) -> Clusters:
    """The most used experts, each with those whose logits point most nearly its way."""
    dominant = sorted(sorted(range(len(tokens)), key=lambda e: (-tokens[e], e))[:num_clusters])
    clusters = {e: [e] for e in dominant}
    for e in range(len(tokens)):
        if e not in clusters:
            cosine = {
                d: logits[:, e] @ logits[:, d] / (np.linalg.norm(logits[:, e]) * np.linalg.norm(logits[:, d]))
                for d in dominant
            }
            clusters[max(cosine, key=cosine.get)].append(e)
    return sorted(sorted(c) for c in clusters.values())


def clusters(layer: Seen, method: str, num_clusters: int, num_groups: int = 1) -> Clusters:
    """Of a layer, equally many of each group of neighbours."""
    size, found = len(layer.tokens) // num_groups, []
    for g in range(num_groups):
        part = slice(g * size, (g + 1) * size)
        if method == "hc-smoe":
            some = hc_smoe(layer.means[part], num_clusters // num_groups)
        else:
            some = m_smoe(layer.tokens[part], layer.logits[:, part], num_clusters // num_groups)
        found += [[g * size + e for e in c] for c in some]
    return found


def average(values: list[np.ndarray], tokens: list[float]) -> np.ndarray:
    """sum f_i W_i / sum f_i; the plain mean where no token came."""
    tokens = tokens if sum(tokens) else [1.0] * len(tokens)
    total = np.zeros(values[0].shape)
    for value, f in zip(values, tokens, strict=True):
        total += f * value.astype(np.float64)
    return total / sum(tokens)


def best_order(reference: np.ndarray, other: np.ndarray) -> tuple[int, ...]:
    """The permutation of other's neurons that comes nearest to the reference's, by trying all of them."""
    return min(permutations(range(len(other))), key=lambda p: np.linalg.norm(reference - other[list(p)]))
