"""STUN on a whole model: distances to clusters under a budget, one expert of each, and how much of it data decided.

Between the verb (`verbs/prune.py`), which says how many experts stay, and the method (`methods/prune/stun.py`), which
is about one layer's arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from coterie.decide.pruning import Pruning
from coterie.edits.plan import Choice
from coterie.errors import CoterieError
from coterie.methods.prune import stun
from coterie.model.experts import Layer
from coterie.model.layer import Model, MoE
from coterie.model.stats import Stats, stability
from coterie.storage.record import Progress, no_progress

FAR = 1e3  # times the largest distance: of guarded experts


@dataclass(frozen=True)
class Task:
    """What STUN is asked: the blocks' layers, and how many experts to keep of each (`num_groups` routing groups).

    guarded: super experts by block: each is a cluster of its own as long as there are others to join.
    """

    layers: dict[MoE, Layer]
    options: Pruning
    uniform: int
    floor: int
    num_groups: int
    dry_run: bool
    guarded: dict[MoE, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """What statistics say of one block: tokens routed to each expert (E,), and to both of two (E, E)."""

    tokens: np.ndarray
    pairs: np.ndarray | None  # read where they count


def read_stats(model: Model, path: str | None) -> Stats | None:
    """The statistics asked for. Raises: CoterieError when they are of another model."""
    if path is None:
        return None
    stats = Stats.load(path, only=("tokens", "coactivation", "output_max"))
    stats.check_model(model.checkpoint.hash, path)
    return stats


def decide(
    task: Task, stats: Stats | None, on_progress: Progress
) -> tuple[dict[MoE, Choice], dict[str, Any], tuple[str, ...]]:
    """STUN's choices, what the budget and the statistics came to, and what should be said aloud."""
    nearest = cache(lambda layer, members: stun.representative(members, layer.experts, layer.router))

    def choose(given: Stats | None, on_progress: Progress) -> tuple[dict[MoE, Choice], dict[str, Any]]:
        usage = _usage(task, given)
        clusters, found = _cluster(task, usage)
        return _representatives(task, clusters, usage, nearest, on_progress), found

    choices, found = choose(stats, on_progress)
    if stats is None:
        return choices, found, ()
    found["stats"] = {"path": task.options.stats, "model": stats.model, "samples": stats.samples}
    measured = _measured(task)
    notes = ["multi-token-prediction layers are never measured: router rows alone decide there"]
    notes = notes if any(b.mtp for b in task.layers) else []
    try:
        found["stability"] = stability(
            stats, lambda half: {b.key: c.kept for b, c in choose(half, no_progress)[0].items() if b in measured}
        )
    except CoterieError as error:
        notes.append(f"how stable the choice is was not measured: from half of the data, {error}")
    return choices, found, tuple(notes)


def _measured(task: Task) -> list[MoE]:
    """The blocks that calibration sees."""
    return [b for b in task.layers if not b.mtp and not b.attention]


def _usage(task: Task, stats: Stats | None) -> dict[MoE, Usage]:
    """By measured block. Raises: CoterieError for a layer that the statistics do not hold, or without any token."""
    if stats is None:
        return {}
    found = {}
    for block in _measured(task):
        pairs = _sum(stats, block, "coactivation", task.options.weights) if task.options.lambda2 else None
        found[block] = Usage(_sum(stats, block, "tokens", task.options.weights), pairs)
        if not found[block].tokens.any():
            raise CoterieError(f"{block.name}: the statistics, as weighted, hold no token; collect more samples")
    return found


def _sum(stats: Stats, block: MoE, name: str, weights: dict[str, float]) -> np.ndarray:
    total = stats.get(block.key, name, weights)
    if set(total.shape) != {block.num_experts}:
        raise CoterieError(
            f"{block.name}: {name!r} has shape {total.shape} in the statistics; the layer has {block.num_experts} "
            "experts: collect them again on this model"
        )
    return total


def _cluster(task: Task, usage: dict[MoE, Usage]) -> tuple[dict[MoE, stun.Clusters], dict[str, Any]]:
    """Each block's clusters under the budget, and what the budget came to."""
    layers, options, uniform, size = task.layers, task.options, task.uniform, task.num_groups
    matrices = {
        b: _apart(_distance(b, layer, options, usage.get(b)), task.guarded.get(b, [])) for b, layer in layers.items()
    }
    if options.linkage == "official":
        return _official(matrices, options, uniform, size)
    trees = {b: [stun.dendrogram(d) for d in _per_group(m, size)] for b, m in matrices.items()}
    counts = dict.fromkeys(layers, uniform)
    heights = {b: [sum(hs) for hs in zip(*(t.heights for t in ts), strict=True)] for b, ts in trees.items()}
    found: dict[str, Any] = {"cost": _cost(heights, counts, size)}
    if options.budget == "global":
        main = [b for b in layers if not b.mtp]
        merges = [heights[b] for b in main]
        limits = [(len(layers[b].router) - task.floor) // size for b in main]
        wanted = sum(len(layers[b].router) - uniform for b in main) // size
        cut = stun.cut_globally(merges, wanted, limits)
        asked = {b: len(layers[b].router) - n * size for b, n in zip(main, cut, strict=True)}
        found |= {"global": {b.name: n for b, n in asked.items()}, "global_cost": _cost(heights, asked, size)}
        counts |= _settle(asked, options, found)
    clusters = {b: _join(t, counts[b] // size, len(layers[b].router) // size) for b, t in trees.items()}
    return clusters, found


def _settle(asked: dict[MoE, int], options: Pruning, found: dict[str, Any]) -> dict[MoE, int]:
    """What becomes of unequal counts. Stock configs hold one count."""
    if len(set(asked.values())) == 1 or options.non_uniform == "round":
        found["rounded"] = len(set(asked.values())) > 1
        return {}
    if options.non_uniform == "refuse":
        low, high = min(asked.values()), max(asked.values())
        raise CoterieError(
            f"--non-uniform refuse: the budget keeps {low} to {high} experts; stock configs hold one count"
        )
    if any(b.attention for b in asked):
        raise CoterieError("--non-uniform coterie: attention experts share the config's one count; use round")
    found["layout"] = "coterie"
    return asked


def _cost(heights: dict[MoE, list[float]], counts: dict[MoE, int], size: int) -> float:
    """The sum of the heights of all merges made: what the clustering gives up."""
    return float(sum(sum(heights[b][: len(heights[b]) + 1 - n // size]) for b, n in counts.items()))


def _distance(block: MoE, layer: Layer, options: Pruning, usage: Usage | None) -> np.ndarray:
    """STUN's distance; of router rows alone where nothing is measured."""
    pairs = usage.pairs if usage else None
    lambda1, lambda2 = (1.0, 0.0) if pairs is None else (options.lambda1, options.lambda2)
    how: dict[str, Any] = {"lambda1": lambda1, "lambda2": lambda2, "normalise": options.distance == "frobenius"}
    if options.linkage == "official":
        dtype = layer.experts.checkpoint.tensors[block.router].dtype
        return stun.official_distances(layer.router, dtype, pairs, **how)
    return stun.distances(layer.router, pairs, **how)


def _apart(matrix: np.ndarray, guarded: list[int]) -> np.ndarray:
    """Distances (E, E) by which guarded experts are far from all others, so that those join first."""
    if not guarded:
        return matrix
    result, far = matrix.copy(), FAR * (1 + np.abs(matrix).max())
    result[guarded, :] = result[:, guarded] = far
    result[guarded, guarded] = matrix[guarded, guarded]
    return result


def _per_group(matrix: Any, num_groups: int) -> list[Any]:
    """The diagonal blocks: experts may only merge inside their routing group."""
    size = len(matrix) // num_groups
    return [matrix[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(num_groups)]


def _join(trees: list[stun.Dendrogram], per_group: int, size: int) -> stun.Clusters:
    return [[g * size + e for e in c] for g, tree in enumerate(trees) for c in tree.cut(per_group)]


def _official(
    matrices: dict[MoE, Any], options: Pruning, uniform: int, num_groups: int
) -> tuple[dict[MoE, stun.Clusters], dict[str, Any]]:
    """The published program: single linkage at a fixed count, or its threshold search for a total."""
    found: dict[str, Any] = {}
    searched: dict[MoE, stun.Clusters] = {}
    if options.budget == "global":
        if num_groups > 1:
            raise CoterieError("--linkage official --budget global knows no routing groups; use --linkage complete")
        main = [b for b in matrices if not b.mtp]
        lists = stun.official_global([matrices[b] for b in main], uniform * len(main), options.threshold)
        asked = {b: len(c) for b, c in zip(main, lists, strict=True)}
        found["global"] = {b.name: n for b, n in asked.items()}
        _settle(asked, options, found)
        searched = {} if found.get("rounded") else dict(zip(main, lists, strict=True))
    clusters = {}
    for block, matrix in matrices.items():
        size, parts = len(matrix) // num_groups, _per_group(matrix, num_groups)
        merges = size - uniform // num_groups
        clusters[block] = [
            [g * size + e for e in c] for g, m in enumerate(parts) for c in stun.official_clusters(m, np.inf, merges)
        ]
    return clusters | searched, found


def _representatives(
    task: Task,
    clusters: dict[MoE, stun.Clusters],
    usage: dict[MoE, Usage],
    nearest: Callable[[Layer, tuple[int, ...]], int],
    on_progress: Progress,
) -> dict[MoE, Choice]:
    """One expert of each cluster; `nearest` finds the one nearest to the mean of three or more."""
    choices = {}
    for done, (block, layer) in enumerate(task.layers.items()):
        tokens = usage[block].tokens if block in usage else None

        guarded = set(task.guarded.get(block, []))
        _check_guarded(block, clusters[block], guarded)

        def stays(
            cluster: list[int],
            layer: Layer = layer,
            tokens: np.ndarray | None = tokens,
            guarded: set[int] = guarded,
        ) -> int:
            if guarded & set(cluster):
                return min(guarded & set(cluster))
            if task.dry_run or len(cluster) < 3:  # a dry run reads no weights: the tie rule stands in
                return stun.pair_winner(cluster, layer.router, tokens)
            return nearest(layer, tuple(cluster))

        kappa = 0 if any(guarded & set(c) and len(c) > 1 for c in clusters[block]) else task.options.kappa
        choices[block] = _choose(clusters[block], stays, kappa)
        on_progress("choosing representatives", done + 1, len(task.layers))
    return choices


def _check_guarded(block: MoE, clusters: stun.Clusters, guarded: set[int]) -> None:
    """Raises: CoterieError where more super experts than clusters leave two in one."""
    if any(len(guarded & set(c)) > 1 for c in clusters):
        raise CoterieError(
            f"{block.name}: more super experts than the {len(clusters)} experts that stay (or than those of a routing "
            "group); keep more, or --no-guard"
        )


def _choose(clusters: stun.Clusters, stays: Callable[[list[int]], int], kappa: int) -> Choice:
    """One representative per cluster, ascending; means instead where fewer than kappa clusters are left."""
    kept = [stays(c) for c in clusters]
    order = sorted(range(len(kept)), key=kept.__getitem__)
    merged = len(clusters) < kappa and any(len(c) > 1 for c in clusters)
    return Choice(tuple(kept[i] for i in order), tuple(tuple(clusters[i]) for i in order), merged)
