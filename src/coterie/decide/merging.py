"""A merging method on a whole model: each layer's clusters, who stands for them, and how much of it data decided.

Between the verb (`verbs/merge.py`), which says how many experts stay, and the methods (`methods/merge/`), which are
about the sums of one routing group.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from coterie.decide import merging
from coterie.decide.criteria import Selected, Task, by_weights, guard, keep, total
from coterie.decide.experts import count_kept, num_kept
from coterie.decide.pruning import Remaining, Weights
from coterie.edits.plan import Choice, Decision, Plan
from coterie.errors import CoterieError
from coterie.forward.samples import Calibration, Dtype, compute_dtype, read_samples
from coterie.methods import merge as methods
from coterie.model.experts import read_layer
from coterie.model.layer import Model, MoE
from coterie.model.loading import check_routable
from coterie.model.stats import KNOWN, MERGING, Stats, stability
from coterie.options import Help, as_text, flat
from coterie.storage.folders import existing
from coterie.storage.record import Progress, no_progress

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


def decide(task: Task, method: str, stats: Stats, *, align: bool = False, alias: bool = False) -> Selected:
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
    return Selected({b: choices[b] for b in task.layers if b in choices}, budget, findings, tuple(notes))


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


ROUTERS = ("mean", "alias")
OURS = "--router alias: several router rows lead to one expert, which only `coterie.load` reads; stock software refuses"


@dataclass(frozen=True)
class Merging:
    """What `merge` was asked for, with its defaults; recorded in coterie.json."""

    method: Annotated[str, Help(f"Which experts are alike: {', '.join(methods.names())}.")] = "hc-smoe"
    remaining: Annotated[
        Remaining,
        {
            "ratio": Help("Share of experts to lose per layer [default: 0.25]."),
            "experts": Help("Experts to have per layer, instead of --ratio."),
        },
    ] = field(default_factory=Remaining)
    router: Annotated[str, Help("mean: rows are merged too; alias: rows stay, several lead to one (our layout).")] = (
        "mean"
    )
    align: Annotated[bool, Help("Line neurons up before they are averaged.")] = False
    stats: Annotated[
        str | None,
        Help("What `coterie collect --merging` measured, instead of --data.", "STATS", given=Path, read=as_text),
    ] = None
    weights: Weights = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    dtype: Dtype = "auto"

    def record(self) -> dict[str, Any]:
        """As they are spelled on the command line, without those of calibration where statistics were given."""
        weights = ",".join(f"{name}={weight}" for name, weight in self.weights.items())
        found = flat(self) | {"weights": weights or None, "data": self.calibration.named}
        others = ("data", "samples", "seq_len", "seed", "dtype") if self.stats else ("stats",)
        return {name: value for name, value in found.items() if name not in others}


def check_options(options: Merging) -> None:
    """Raises: CoterieError for a value out of its range, or for two options that contradict or ignore each other."""
    methods.load(options.method)
    if options.router not in ROUTERS:
        raise CoterieError(f"--router {options.router!r}: unknown; expected one of {', '.join(ROUTERS)}")
    options.remaining.check()
    asked, default, data = flat(options), flat(Merging()), options.calibration.data
    given = [name for name in ("data", "samples", "seq_len", "seed", "dtype") if asked[name] != default[name]]
    absent = set(options.weights) - set(data) if data else set()
    if absent:
        raise CoterieError(f"--weights: domain {sorted(absent)[0]!r} is not in the data: {', '.join(data)}")
    if options.stats and given:
        flag = f"--{given[0].replace('_', '-')}"
        raise CoterieError(f"{flag} is of calibration and would be ignored: --stats were measured already; give one")


def decided(model: Model, options: Merging, spill: Path, on_progress: Progress = no_progress) -> Decision:
    """The plan, what should be said aloud about it, and what the decision found. Reads routers and statistics, or
    measures them; where activations are large they go to the folder `spill`."""
    alias = options.router == "alias"
    # An aliased router is whole, whatever it leads to: routing groups and top-k do not bind what is stored.
    groups = 1 if alias else model.family.groups(model.checkpoint.config).num_groups
    if alias:
        kept = num_kept(options.remaining, min(block.num_experts for block in model.main))
        check_routable(model.checkpoint, [block.key for block in model.main])
    else:
        kept = count_kept(model, options.remaining, list(model.moe))
    task = Task({b: read_layer(model.checkpoint, b) for b in model.moe}, kept, groups, options.weights)
    stats, notes = _read(model, options) if options.stats else _measured(model, options, spill, on_progress)
    decision = merging.decide(task, options.method, stats, align=options.align, alias=alias)
    origin = {"stats": {"path": options.stats, "model": stats.model, "samples": stats.samples}}
    budget: dict[str, Any] = {"kind": "uniform", "experts": kept}
    budget |= (origin if options.stats else {"samples": stats.samples}) | decision.budget
    said = [OURS] if alias else []
    return Decision(_plan(decision, budget), (*said, *notes, *decision.notes), decision.findings)


def _plan(decision: Selected, budget: dict[str, Any]) -> Plan:
    return Plan(
        layers={b.key: c for b, c in decision.choices.items() if not b.attention},
        attention={b.key: c for b, c in decision.choices.items() if b.attention},
        budget=budget,
    )


def _read(model: Model, options: Merging) -> tuple[Stats, list[str]]:
    """The statistics given. Raises: CoterieError when they are of another model, or lack what the method reads."""
    assert options.stats
    stats = Stats.load(options.stats, only=merging.needed(options.method))
    stats.check_model(model.checkpoint.hash, options.stats)
    merging.check_sums(stats, options.method, options.stats)
    return stats, []


def _measured(model: Model, options: Merging, spill: Path, on_progress: Progress) -> tuple[Stats, list[str]]:
    """Statistics of the data given, and what should be said aloud."""
    from coterie.forward.measure import measure

    dtype = compute_dtype(model, options.dtype)
    samples, notes = read_samples(model, options.calibration)
    extra = [name for name in methods.load(options.method).SUMS if name in MERGING]
    stats = measure(model, samples, dtype, on_progress, extra=extra, spill=existing(spill))
    merging.check_sums(stats, options.method, str(model.checkpoint.path))
    return stats, [*notes, *stats.notes]
