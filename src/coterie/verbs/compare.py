"""What each criterion would keep: how much they agree, and how much of it is chance. Writes nothing.

Example: coterie compare MODEL STATS --ratio 0.25
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from coterie.decide import criteria
from coterie.decide.clusters import Clusterer, nearest
from coterie.decide.criteria import Guarded, Task
from coterie.decide.experts import count_kept
from coterie.decide.pruning import NoGuard, Pruning, Remaining, Weights, check_options
from coterie.methods import prune as methods
from coterie.model.experts import read_layer
from coterie.model.layer import Model
from coterie.model.stats import Stats, agreement
from coterie.options import Help, ModelPath, public
from coterie.pages.terminal import Asked, table
from coterie.storage.record import Progress, Stopwatch, no_progress, versions

DRAWS = 5  # of the method random
LEFT_OUT = {
    "weights": "reads every weight: coterie prune --method",
    "base": "needs an earlier checkpoint: coterie prune --base",
    "outputs": "runs every expert on data: coterie prune --data",
}
Kept = Mapping[str, Collection[int]]  # by layer key


@public
def compare(
    model: ModelPath,
    stats: Annotated[str | Path, Help("What `coterie collect` measured on MODEL.", "STATS", given=Path)],
    *,
    remaining: Remaining,
    weights: Weights,
    no_guard: NoGuard = False,
    seed: Annotated[int, Help("Of the random control.")] = 0,
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """What each criterion would keep of every measured layer, and how far they agree; in seconds, writing nothing.

    ratio, experts, weights, no_guard: as in `prune`; ratio is 0.25 unless given. seed: of the random draws.
    Returns `{"model", "stats", "options", "guarded", "criteria", "overlap", "random", "left_out", "versions",
    "seconds", ...}`: `criteria[name]` holds "kept" by layer, "stability" between the halves of the data (None where
    the criterion reads no data, or half is too little, which "notes" says) and "seconds"; `overlap[a][b]` is the mean
    share of kept experts in common; `random["overlap"][name]` that with random draws, of which "expected" is the mean.
    Raises: CoterieError for statistics of another model, and for options that `prune` refuses.
    """
    clock = Stopwatch()
    options = Pruning(method="reap", remaining=remaining, stats=str(stats), weights=weights, no_guard=no_guard)
    contest = Contest.of(Model.open(model), options)
    kept, found = contest.task.kept, contest.stats
    named = [n for n in methods.names("stats", "router", "clusters") if getattr(methods.load(n), "COMPARED", True)]
    results = {}
    for done, name in enumerate(named):
        results[name] = contest.result(name)
        on_progress("scoring experts", done + 1, len(named))
    return {
        "model": {"path": str(model), "hash": found.model},
        "stats": str(stats),
        "options": {"experts": kept, "weights": dict(weights), "no_guard": no_guard, "seed": seed},
        "samples": found.samples,
        "notes": contest.notes,
        "guarded": criteria.listed(contest.guarded, found),
        "criteria": {name: vars(result) for name, result in results.items()},
        "overlap": {a: {b: _overlap(results[a].kept, results[b].kept) for b in named} for a in named},
        "random": _against_draws(contest, seed, results),
        "left_out": {name: LEFT_OUT[methods.load(name).NEEDS] for name in methods.names(*LEFT_OUT)},
        "versions": versions(),
        **clock.read(),
    }


@dataclass(frozen=True)
class Standing:
    """What a criterion keeps by layer, how stable that is (None where unknown), and the seconds it took."""

    kept: dict[str, list[int]]
    stability: dict[str, object] | None
    seconds: float


@dataclass
class Contest:
    """Criteria asked the same: of which layers how many experts stay, by which statistics."""

    task: Task
    options: Pruning
    stats: Stats
    guarded: Guarded
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: Model, options: Pruning) -> Contest:
        """Raises: CoterieError for options that `prune` refuses, and for statistics of another model."""
        check_options(options)
        num_groups = model.family.groups(model.checkpoint.config).num_groups
        layers = {b: read_layer(model.checkpoint, b) for b in model.main}
        task = Task(layers, count_kept(model, options.remaining, model.main), num_groups, options.weights)
        stats = criteria.read_stats(model, str(options.stats), methods.names("stats"))
        return cls(task, options, stats, criteria.guard(task, None if options.no_guard else stats))

    def result(self, name: str) -> Standing:
        """What a criterion keeps by layer, how stable that is, and the seconds it took."""
        began, needs = time.monotonic(), methods.load(name).NEEDS
        if needs == "router":
            scores = criteria.by_weights(self.task, name, 0)
            kept, stable = criteria.kept_of(self.task, criteria.keep(self.task, scores)), None
        else:
            choose = self._by_clusters if needs == "clusters" else partial(self._by_stats, name)
            kept = choose(self.stats)
            stable, unstable = criteria.how_stable(self.stats, f"{name} is", choose)
            self.notes += unstable
        seconds = round(time.monotonic() - began, 3)
        return Standing({key: list(ids) for key, ids in kept.items()}, stable, seconds)

    def drawn(self, seed: int) -> Kept:
        """Experts kept at random."""
        return criteria.kept_of(self.task, criteria.keep(self.task, criteria.by_weights(self.task, "random", seed)))

    def _by_stats(self, name: str, stats: Stats) -> dict[str, Collection[int]]:
        scores = criteria.by_stats(self.task, name, stats)
        return criteria.kept_of(self.task, criteria.keep(self.task, scores, self.guarded))

    def _by_clusters(self, stats: Stats) -> dict[str, Collection[int]]:
        """STUN by router rows, and by usage where two are alike: as a dry run of `prune`, without weights."""
        clusterer = Clusterer(self.task, self.options, self.guarded, dry_run=True)
        return criteria.kept_of(self.task, clusterer.choose(stats, nearest)[0])


def _against_draws(contest: Contest, seed: int, results: dict[str, Standing]) -> dict[str, object]:
    """How far what each criterion keeps agrees with random draws, and what is to be expected of that."""
    draws, measured = [contest.drawn(seed + i) for i in range(DRAWS)], contest.task.measured
    return {
        "draws": DRAWS,
        "expected": sum(contest.task.kept / b.num_experts for b in measured) / len(measured),
        "overlap": {name: sum(_overlap(found.kept, draw) for draw in draws) / DRAWS for name, found in results.items()},
    }


def _overlap(first: Kept, second: Kept) -> float:
    return agreement(first, second)["mean"]


def show(found: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    """A square of overlaps, criterion by criterion."""
    names = list(found["criteria"])
    yield "share of kept experts in common (and of the same criterion on two halves of the data)"
    yield from table(
        " " * 20 + "  ".join(f"{n:>18}" for n in names), [(name, _overlaps(found, name, names)) for name in names]
    )
    yield f"by chance: {found['random']['expected']:.2f}; {found['seconds']:.1f} s"


def _overlaps(found: Mapping[str, Any], name: str, names: list[str]) -> str:
    stable = found["criteria"][name]["stability"]
    own = f"({stable['mean']:.2f})" if stable else "(-)"
    return "  ".join(f"{own if other == name else format(found['overlap'][name][other], '.2f'):>18}" for other in names)
