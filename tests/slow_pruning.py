"""Unstructured pruning, slow and obvious: what the streamed, one-expert-at-a-time pruning is tested against.

The whole model is in memory, by stock transformers in float32, with its experts un-fused: a loop over tokens and the
experts they chose. For every layer the whole model runs again on all samples, the layers before it pruned. Nothing of
coterie is used; the names of tensors are written by hand.
"""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

PARTS = ("gate", "up", "down")
QWEN = ("model.layers.{}.mlp.experts.{}.{}.weight", ("gate_proj", "up_proj", "down_proj"))
NAMES = {
    "mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.{}.weight", ("w1", "w3", "w2")),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"), QWEN),
}
FIRST = {"deepseek_v3": 1}  # the layers before it are dense
EXACT = ("owl", "sparsegpt")  # these meet the total over all experts; the others zero floor(S C) of every row
NEAR = 1e-5


def read_experts(folder: Path, model_type: str, num_layers: int, num_experts: int) -> dict:
    """(layer, expert, part) -> its matrix (out, in) as float32; for gpt-oss also (layer, expert, part + " bias")."""
    tensors = {n: t.float().numpy() for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}
    found = {}
    for layer in range(FIRST.get(model_type, 0), num_layers):
        for e in range(num_experts):
            if model_type in NAMES:
                template, spelled = NAMES[model_type]
                matrices = [tensors[template.format(layer, e, name)] for name in spelled]
            else:
                fused = f"model.layers.{layer}.mlp.experts."
                gate_up, down = tensors[fused + "gate_up_proj"][e], tensors[fused + "down_proj"][e]
                if model_type == "mixtral fused":  # gate above up
                    matrices = [gate_up[: len(gate_up) // 2], gate_up[len(gate_up) // 2 :], down]
                else:  # gpt-oss: (in, out), gate and up by turns
                    matrices = [gate_up[:, 0::2].T, gate_up[:, 1::2].T, down.T]
                    bias = tensors[fused + "gate_up_proj_bias"][e]
                    found[layer, e, "gate bias"], found[layer, e, "up bias"] = bias[0::2], bias[1::2]
                    found[layer, e, "down bias"] = tensors[fused + "down_proj_bias"][e]
            found |= {(layer, e, part): m for part, m in zip(PARTS, matrices, strict=True)}
    return found


class SlowModel:
    """A stock model whose experts are a loop over tokens, with whatever weights a run is given."""

    def __init__(self, folder: Path, model_type: str, num_experts: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        num_layers, self.num_experts = self.model.config.num_hidden_layers, num_experts
        self.layers = range(FIRST.get(model_type, 0), num_layers)
        self.dense = read_experts(folder, model_type, num_layers, num_experts)
        self.stored = next(iter(load_file(next(folder.glob("*.safetensors"))).values())).dtype
        self.is_gpt_oss = model_type == "gpt_oss"
        for layer in self.layers:
            self.model.model.layers[layer].mlp.experts.forward = partial(self._experts, layer)

    @torch.no_grad()
    def run(self, weights: dict, samples: list[list[int]]) -> tuple[dict, list]:
        """What each expert saw: (layer, expert) -> [(input, router weight, input of down)]; and the logits."""
        self.weights, self.seen = weights, defaultdict(list)
        logits = [self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy() for ids in samples]
        return self.seen, logits

    def _experts(self, layer: int, hidden_states, top_k_index, top_k_weights):
        total = np.zeros(hidden_states.shape)
        for t, x in enumerate(hidden_states.double().numpy()):
            for e, g in zip(top_k_index[t].tolist(), top_k_weights[t].tolist(), strict=True):
                hidden = self._hidden(layer, e, x)
                total[t] += g * self._linear(layer, e, "down", hidden)
                self.seen[layer, e].append((x, g, hidden))
        return torch.tensor(total, dtype=hidden_states.dtype)

    def _linear(self, layer: int, e: int, part: str, x: np.ndarray) -> np.ndarray:
        return self.weights[layer, e, part] @ x + self.weights.get((layer, e, part + " bias"), 0)

    def _hidden(self, layer: int, e: int, x: np.ndarray) -> np.ndarray:
        gate, up = self._linear(layer, e, "gate", x), self._linear(layer, e, "up", x)
        if self.is_gpt_oss:
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
        return gate / (1 + np.exp(-gate)) * up


def prune(
    slow: SlowModel,
    samples: list[list[int]],
    method: str,
    sparsity: str,
    found: dict,
    *,
    one_pass: bool = False,
    pattern: tuple[int, int] | None = None,
    min_tokens: int = 64,
) -> tuple[dict, list, dict]:
    """All experts' weights after pruning, [layer, expert, tokens] of those with too few, and the layers' sparsities.

    found: the weights to compare with; where scores are closer than NEAR, relatively, what is zero there is taken, as
    sums in another order may decide either way.
    """
    needs_data = method != "magnitude"
    dense_run = slow.run(slow.dense, samples)[0] if one_pass or method == "owl" else defaultdict(list)
    shares = dict.fromkeys(slow.layers, Fraction(sparsity))
    if method == "owl":
        shares = owl_shares(slow, dense_run, float(sparsity))
    totals = matrix_totals(slow, shares, Fraction(sparsity)) if method in EXACT and not pattern else {}
    weights, cold = dict(slow.dense), []
    for layer in slow.layers:
        seen = slow.run(weights, samples)[0] if needs_data and not one_pass else dense_run
        for e in range(slow.num_experts):
            visits = seen[layer, e]
            if needs_data and len(visits) < min_tokens:
                cold.append([str(layer), e, len(visits)])
                visits = []
            for part in PARTS:
                key = layer, e, part
                w, given = slow.dense[key], found[key]
                if visits and method == "sparsegpt":
                    pruned = sparsegpt(w, inputs_of(visits, part), totals.get(key), pattern, given)
                    weights[key] = torch.from_numpy(pruned).to(slow.stored).float().numpy()
                    continue
                counts = zeros_of_rows(w.shape, Fraction(sparsity), totals.get(key))
                scores = np.abs(w) * norms(visits, part, gated=method == "moe-pruner") if visits else np.abs(w)
                weights[key] = zeroed(w, scores, counts, pattern, given, NEAR if visits else 0)
    return weights, cold, shares


def inputs_of(visits: list, part: str) -> np.ndarray:
    """(tokens, in): what the matrix was multiplied with."""
    return np.array([hidden if part == "down" else x for x, _, hidden in visits])


def norms(visits: list, part: str, *, gated: bool = False) -> np.ndarray:
    """Of each input channel over the expert's tokens; gated: each token times the router's weight."""
    squares = 0
    for x, (_, g, _) in zip(inputs_of(visits, part), visits, strict=True):
        squares = squares + (g * x if gated else x) ** 2
    return np.sqrt(squares)


def zeros_of_rows(shape: tuple[int, int], sparsity: Fraction, total: int | None) -> list[int]:
    """floor(S C) zeros each; of a given total, the first rows take what does not divide."""
    rows, columns = shape
    if total is None:
        return [int(sparsity * columns)] * rows
    return [total // rows + (r < total % rows) for r in range(rows)]


def zeroed(w: np.ndarray, scores: np.ndarray, counts: list[int], pattern, given: np.ndarray, tolerance) -> np.ndarray:
    """The matrix without the lowest scores of each row, or of each group of a pattern."""
    pruned, columns = w.copy(), w.shape[1]
    for r, count in enumerate(counts):
        groups, n = [range(columns)], count
        if pattern:
            groups, n = [range(c, c + pattern[1]) for c in range(0, columns, pattern[1])], pattern[0]
        for group in groups:
            for c in lowest([(scores[r, c], c, given[r, c] == 0) for c in group], n, tolerance):
                pruned[r, c] = 0
    return pruned


def lowest(candidates: list[tuple], count: int, tolerance: float) -> list:
    """The places of the `count` lowest of (score, place, is zero elsewhere); of equal scores the lower places.

    Where scores lie within the tolerance of the last that goes, those that are zero elsewhere go first.
    """
    if not count:
        return []
    limit = sorted(candidates)[count - 1][0]
    clear = [c for c in candidates if c[0] < limit * (1 - tolerance)]
    doubtful = [c for c in candidates if limit * (1 - tolerance) <= c[0] <= limit * (1 + tolerance)]
    doubtful.sort(key=lambda c: (not (tolerance and c[2]), c))
    return [place for _, place, _ in (clear + doubtful)[:count]]


def matrix_totals(slow: SlowModel, shares: dict, sparsity: Fraction) -> dict:
    """(layer, expert, part) -> zeros: round(S n) of all n weights, handed out in proportion to the layers' shares so
    that what was handed out so far is always the rounded running target."""
    sizes = {key: m.size for key, m in slow.dense.items() if key[2] in PARTS}
    weighted = sum(shares[layer] * size for (layer, _, _), size in sizes.items())
    totals, target, done = {}, Fraction(0), 0
    for key, size in sizes.items():  # by layer, expert, part
        target += shares[key[0]] * size / weighted * round(sparsity * sum(sizes.values()))
        # Where layers differ, their shares are rounded numbers, which must not decide.
        assert len(set(shares.values())) == 1 or abs(target % 1 - Fraction(1, 2)) > 1e-6
        totals[key] = round(target) - done
        done = round(target)
    return totals


def owl_shares(slow: SlowModel, seen: dict, sparsity: float, m: float = 3.0, spread: float = 0.08) -> dict:
    """The layers' sparsities: S + mean(r) - r, the mean over parameters; r is linear in the shares of outliers."""
    outliers, sizes = [], []
    for layer in slow.layers:
        scores, size = [], 0
        for e in range(slow.num_experts):
            for part in PARTS:
                w = slow.dense[layer, e, part]
                size += w.size
                if seen[layer, e]:
                    scores += (np.abs(w) * norms(seen[layer, e], part)).ravel().tolist()
        limit = m * np.mean(scores)
        outliers.append(100 * sum(s > limit for s in scores) / len(scores))
        sizes.append(size)
    d = np.array(outliers)
    assert d.max() > d.min()
    r = 2 * spread * (d - d.min()) / (d.max() - d.min())
    shares = sparsity + np.average(r, weights=sizes) - r
    assert shares.min() > 0 and shares.max() < 1  # nothing is clipped
    return {layer: Fraction(float(s)) for layer, s in zip(slow.layers, shares, strict=True)}


def sparsegpt(weight: np.ndarray, inputs: np.ndarray, num_zeros: int, pattern, given: np.ndarray) -> np.ndarray:
    """Algorithm 1 by Gaussian elimination: after column j, row and column j of H^-1 are eliminated."""
    w, columns = weight.astype(np.float64), weight.shape[1]
    hessian = sum(np.outer(x, x) for x in inputs)
    assert (np.diag(hessian) > 0).all()  # no dead channels
    inverse = np.linalg.inv(hessian + 0.01 * np.diag(hessian).mean() * np.eye(columns))
    steps = []  # row j of the inverse when columns 0..j-1 are eliminated
    for j in range(columns):
        steps.append(inverse[j].copy())
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    pivots = [steps[j][j] for j in range(columns)]
    going: set[tuple[int, int]] = set()

    def choose(places: list[tuple[int, int]], count: int) -> None:
        going.update(lowest([(w[p] ** 2 / pivots[p[1]], p, given[p] == 0) for p in places], count, NEAR))

    for j in range(columns):
        if pattern and j % pattern[1] == 0:
            for r in range(len(w)):
                choose([(r, c) for c in range(j, j + pattern[1])], pattern[0])
        if not pattern and j % 128 == 0:
            stop = min(j + 128, columns)
            wanted = num_zeros * stop // columns - num_zeros * j // columns
            choose([(r, c) for r in range(len(w)) for c in range(j, stop)], wanted)
        for r in range(len(w)):
            if (r, j) in going:
                w[r, j + 1 :] -= w[r, j] / pivots[j] * steps[j][j + 1 :]
                w[r, j] = 0
    return w
