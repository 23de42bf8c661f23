"""A merging method on a whole model: each layer's clusters, who stands for them, and how much of it data decided."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from coterie.decide.criteria import Task, by_weights, guard, how_stable, keep, measured, origin, tokens_of, total
from coterie.decide.experts import count_kept, num_kept
from coterie.decide.pruning import Remaining, Weights, check_weights, spelled
from coterie.edits.kinds.merge import check_plain
from coterie.edits.plan import Choice, Decision, Plan
from coterie.errors import CoterieError, check_choice
from coterie.forward.samples import Calibration, Dtype
from coterie.methods import merge as methods
from coterie.methods.prune.stun import Clusters
from coterie.model.experts import read_layer
from coterie.model.layer import Model, MoE
from coterie.model.loading import check_routable
from coterie.model.stats import KNOWN, MERGING, Stats
from coterie.model.stored import in_floats
from coterie.options import Help, as_text, flag_of, flat
from coterie.storage.record import Progress, no_progress

UNMEASURED = "prediction layers, second models and attention experts are never measured, so nothing is merged there: "
LONGEST, WHOLE = "the longest router rows stay", "they stay whole"
ROUTERS = ("mean", "alias")
OURS = "--router alias: several router rows lead to one expert, which only `coterie.load` reads; stock software refuses"
OF_CALIBRATION = ("data", "samples", "seq_len", "seed", "dtype")


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

    def record(self) -> dict[str, object]:
        """The options as spelled on the command line, without those of calibration where statistics were given."""
        found = flat(self) | {"weights": spelled(self.weights), "data": self.calibration.named}
        others = OF_CALIBRATION if self.stats else ("stats",)
        return {name: value for name, value in found.items() if name not in others}


def check_options(options: Merging) -> None:
    """Raises: CoterieError for a value out of its range, or for two options that contradict or ignore each other."""
    methods.load(options.method)
    check_choice("--router", options.router, ROUTERS)
    options.remaining.check()
    asked, default = flat(options), flat(Merging())
    given = [name for name in OF_CALIBRATION if asked[name] != default[name]]
    check_weights(options.weights, options.calibration.data)
    if options.stats and given:
        raise CoterieError(
            f"{flag_of(given[0])} is of calibration and would be ignored: --stats were measured already; give one"
        )


def decided(model: Model, options: Merging, spill: Path, on_progress: Progress = no_progress) -> Decision:
    """The plan, what should be said aloud about it, and what the decision found.

    Blocks that calibration does not see are cut by their router rows or, where routers are aliased, stay whole.
    Reads routers and statistics, or measures them; where activations are large they go to the folder `spill`.
    """
    floats = in_floats(model)
    check_plain(floats.checkpoint, floats.moe)
    alias = options.router == "alias"
    # An aliased router is whole, whatever it leads to: routing groups and top-k do not bind what is stored.
    groups = 1 if alias else model.family.groups(model.checkpoint.config).num_groups
    if alias:
        kept = num_kept(options.remaining, min(block.num_experts for block in model.main))
        check_routable(model.checkpoint, [block.key for block in model.main])
    else:
        kept = count_kept(model, options.remaining, list(model.moe))
    task = Task({b: read_layer(model.checkpoint, b) for b in model.moe}, kept, groups, options.weights)
    stats, notes = _stats(model, options, spill, on_progress)
    clusters = {block: _clusters(task, block, options.method, stats) for block in task.measured}
    rest = replace(task, layers={b: layer for b, layer in task.layers.items() if b not in clusters})
    choices = {} if alias else keep(rest, by_weights(rest, "router-norm", 0))
    choices |= {block: _choice(task, block, found, stats, options) for block, found in clusters.items()}
    stable, unstable = how_stable(stats, "the clusters are", lambda half: _pairs(task, options.method, half))
    plan = Plan(
        layers={b.key: choices[b] for b in task.layers if b in choices and not b.attention},
        attention={b.key: choices[b] for b in task.layers if b in choices and b.attention},
        budget={"kind": "uniform", "experts": kept}
        | origin(stats, options.stats)
        | ({"stability": stable} if stable else {}),
    )
    averaged = {b: {e for cluster in found if len(cluster) > 1 for e in cluster} for b, found in clusters.items()}
    lost = [f"{b.name} expert {e}" for b, ids in guard(task, stats).items() for e in ids if e in averaged[b]]
    said = [
        *([OURS] if alias else []),
        *notes,
        *([UNMEASURED + (WHOLE if alias else LONGEST)] if rest.layers else []),
        *([f"super experts are averaged with others, which may cost much: {', '.join(lost)}"] if lost else []),
        *unstable,
    ]
    findings = {"largest_clusters": {block.key: max(map(len, found)) for block, found in clusters.items()}}
    return Decision(plan, tuple(said), findings)


def _stats(model: Model, options: Merging, spill: Path, on_progress: Progress) -> tuple[Stats, list[str]]:
    """The statistics given, or those of the data given, and what should be said aloud.

    Raises: CoterieError when they are of another model, or were collected without what the method reads.
    """
    needed = ("tokens", "output_max", *methods.load(options.method).SUMS)
    notes: list[str] = []
    if options.stats:
        stats = Stats.load(options.stats, only=needed)
        stats.check_model(model.checkpoint.hash, options.stats)
    else:
        extra = [name for name in needed if name in MERGING]
        stats, notes = measured(model, options.calibration, options.dtype, spill, on_progress, extra)
    missing = sorted(set(needed) - {name for _, _, name in stats.sums})
    if missing:
        also = "; ".join(["", *stats.notes])
        raise CoterieError(
            f"{options.stats or model.checkpoint.path}: holds no {missing[0]!r}, which {options.method} decides by; "
            f"measure it with `coterie collect --merging`, or give --data instead{also}"
        )
    return stats, notes


def _clusters(task: Task, block: MoE, method: str, stats: Stats) -> Clusters:
    """Clusters in original ids, equally many of each routing group."""
    module, size = methods.load(method), block.num_experts // task.num_groups
    tokens_of(stats, block, task.weights)
    sums = [(KNOWN[name][0], total(stats, block, name, task.weights)) for name in module.SUMS]
    found: Clusters = []
    for first in range(0, block.num_experts, size):
        members = slice(first, first + size)
        parts = [values[tuple(members if axis == "E" else slice(None) for axis in axes)] for axes, values in sums]
        found += [[first + e for e in c] for c in module.cluster(task.kept // task.num_groups, *parts)]
    return found


def _choice(task: Task, block: MoE, clusters: Clusters, stats: Stats, options: Merging) -> Choice:
    """Clusters in the order of the members that stand for them."""
    tokens = total(stats, block, "tokens", task.weights)
    kept, members = zip(*sorted((methods.leader(c, tokens), tuple(c)) for c in clusters), strict=True)
    if all(len(cluster) == 1 for cluster in clusters):
        return Choice(kept)
    shares = tuple(methods.shares(cluster, tokens) for cluster in members)
    removed = "alias" if options.router == "alias" else "remove"
    return Choice(kept, members, merged=True, shares=shares, aligned=options.align, removed=removed)


def _pairs(task: Task, method: str, stats: Stats) -> dict[str, Collection[int]]:
    """Every pair of experts that share a cluster, as one number, by key of the layers that merge anything."""
    found: dict[str, Collection[int]] = {}
    for block in task.measured:
        clusters = _clusters(task, block, method, stats)
        if len(clusters) < block.num_experts:
            found[block.key] = [a * block.num_experts + b for c in clusters for a in c for b in c if a < b]
    return found
