"""A merging method on a whole model: each layer's clusters, who stands for them, and how much of it data decided.

Between the verb (`merge.py`), which says how many experts stay, and the methods (`methods/merge/`), which are about the
sums of one routing group.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from coterie.errors import CoterieError
from coterie.layer import MoE
from coterie.methods import merge as methods
from coterie.plan import Choice
from coterie.selecting.criteria import Decision, Task, by_weights, guard, keep, total
from coterie.stats import KNOWN, Stats, stability

UNMEASURED = "multi-token-prediction layers and attention experts are never measured, so nothing is merged there: "
LONGEST, WHOLE = "the longest router rows stay", "they stay whole"
Clusters = list[list[int]]


def needed(method: str) -> list[str]:
    """The sums that a method and its report read."""
    return ["tokens", "output_max", *methods.load(method).SUMS]


def check_sums(stats: Stats, method: str, where: str) -> None:
    """Raises: CoterieError for statistics that were collected without what the method reads."""
    missing = sorted(set(needed(method)) - {name for _, _, name in stats.sums})
    if missing:
        also = "; ".join(["", *stats.notes])
        raise CoterieError(
            f"{where}: holds no {missing[0]!r}, which {method} decides by; measure it with `coterie collect "
            f"--merging`, or give --data instead{also}"
        )


def decide(task: Task, method: str, stats: Stats, *, align: bool = False, alias: bool = False) -> Decision:
    """The choices of a merging method: every measured block's clusters, merged.

    Blocks that calibration does not see are cut by their router rows or, where routers are aliased, stay whole.
    """
    clusters = {block: _clusters(task, block, method, stats) for block in task.measured}
    choices = {} if alias else keep(task, by_weights(_unmeasured(task), "router-norm", 0))
    for block, found in clusters.items():
        choices[block] = _choice(task, block, found, stats, align=align, removed="alias" if alias else "remove")
    notes = [UNMEASURED + (WHOLE if alias else LONGEST)] if len(task.measured) < len(task.layers) else []
    notes += _merged_super_experts(task, clusters, stats)
    budget: dict[str, Any] = {}
    try:
        budget["stability"] = stability(stats, lambda half: _pairs(task, method, half))
    except CoterieError as error:
        notes.append(f"how stable the clusters are was not measured: from half of the data, {error}")
    findings = {"largest_clusters": {block.key: max(map(len, found)) for block, found in clusters.items()}}
    return Decision({b: choices[b] for b in task.layers if b in choices}, budget, findings, tuple(notes))


def _unmeasured(task: Task) -> Task:
    return Task({b: layer for b, layer in task.layers.items() if b not in task.measured}, task.kept, task.num_groups)


def _clusters(task: Task, block: MoE, method: str, stats: Stats) -> Clusters:
    """Clusters in original ids, equally many of each routing group."""
    module, size = methods.load(method), block.num_experts // task.num_groups
    if not total(stats, block, "tokens", task.weights).any():
        raise CoterieError(f"{block.name}: the statistics, as weighted, hold no token; collect more samples")
    sums = [(KNOWN[name][0], stats.get(block.key, name, task.weights)) for name in module.SUMS]
    for (axes, values), name in zip(sums, module.SUMS, strict=True):
        if any(n != block.num_experts for axis, n in zip(axes, values.shape, strict=True) if axis == "E"):
            raise CoterieError(
                f"{block.name}: {name!r} has shape {values.shape} in the statistics; the layer has "
                f"{block.num_experts} experts: collect them again on this model"
            )
    found: Clusters = []
    for first in range(0, block.num_experts, size):
        members = slice(first, first + size)
        parts = [values[tuple(members if axis == "E" else slice(None) for axis in axes)] for axes, values in sums]
        found += [[first + e for e in c] for c in module.cluster(task.kept // task.num_groups, *parts)]
    return found


def _choice(task: Task, block: MoE, clusters: Clusters, stats: Stats, *, align: bool, removed: str) -> Choice:
    """Clusters in the order of the members that stand for them."""
    tokens = total(stats, block, "tokens", task.weights)
    ordered = sorted((methods.leader(cluster, tokens), tuple(cluster)) for cluster in clusters)
    if all(len(cluster) == 1 for cluster in clusters):
        return Choice(tuple(kept for kept, _ in ordered))
    return Choice(
        tuple(kept for kept, _ in ordered),
        tuple(cluster for _, cluster in ordered),
        merged=True,
        shares=tuple(methods.shares(cluster, tokens) for _, cluster in ordered),
        aligned=align,
        removed=removed,
    )


def _pairs(task: Task, method: str, stats: Stats) -> dict[str, Collection[int]]:
    """Every pair of experts that share a cluster, as one number, by key of the layers that merge anything."""
    found: dict[str, Collection[int]] = {}
    for block in task.measured:
        clusters = _clusters(task, block, method, stats)
        if len(clusters) < block.num_experts:
            found[block.key] = [a * block.num_experts + b for c in clusters for a in c for b in c if a < b]
    return found


def _merged_super_experts(task: Task, clusters: dict[MoE, Clusters], stats: Stats) -> list[str]:
    """What to say of experts with extreme outputs that no longer stand alone."""
    guarded = guard(task, stats)
    merged = {b: {e for cluster in found if len(cluster) > 1 for e in cluster} for b, found in clusters.items()}
    lost = [f"{b.name} expert {e}" for b, ids in guarded.items() for e in ids if e in merged[b]]
    return [f"super experts are averaged with others, which may cost much: {', '.join(lost)}"] if lost else []
