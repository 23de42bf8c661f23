"""A criterion on a whole model: what each layer's experts score, which are guarded, and how stable the choice is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coterie.decide.guard import super_experts
from coterie.edits.plan import Choice
from coterie.errors import CoterieError
from coterie.forward.samples import Calibration, compute_dtype, read_samples
from coterie.methods import prune as methods
from coterie.model.experts import Layer, read_layer
from coterie.model.layer import Model, MoE
from coterie.model.stats import KNOWN, Stats, stability
from coterie.storage.folders import existing
from coterie.storage.record import Progress, no_progress

UNMEASURED = (
    "prediction layers, second models and attention experts are never measured: there the longest router rows stay"
)


@dataclass(frozen=True)
class Task:
    """The blocks' layers, and how many experts stay of each, equally many of its routing groups."""

    layers: dict[MoE, Layer]
    kept: int
    num_groups: int
    weights: Mapping[str, float] = field(default_factory=dict)  # of domains

    @property
    def measured(self) -> list[MoE]:
        """The blocks that calibration sees."""
        return [b for b in self.layers if not b.mtp and not b.attention]


@dataclass(frozen=True)
class Selected:
    """Choices, what goes into the plan's budget and into the report, and what should be said aloud."""

    choices: dict[MoE, Choice]
    budget: dict[str, object] = field(default_factory=dict)
    findings: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Scores = dict[MoE, np.ndarray]
Guarded = dict[MoE, list[int]]


# --- statistics --------------------------------------------------------------------------------------------


def read_stats(model: Model, path: str, names: Iterable[str]) -> Stats:
    """Of the statistics at a path, what these methods and the guard read.

    Raises: CoterieError when they are of another model.
    """
    sums = {"tokens", "output_max"}.union(*(getattr(methods.load(name), "SUMS", ()) for name in names))
    stats = Stats.load(path, only=sums)
    stats.check_model(model.checkpoint.hash, path)
    return stats


def measured(
    model: Model,
    calibration: Calibration,
    dtype: str,
    spill: Path | None,
    on_progress: Progress,
    extra: Collection[str] = (),
) -> tuple[Stats, list[str]]:
    """What `collect` would measure on the data, and what should be said aloud.

    spill: the folder for activations that are too large for memory. extra: names in `stats.MERGING`.
    """
    from coterie.forward.measure import measure  # imports torch

    samples, notes = read_samples(model, calibration)
    stats = measure(model, samples, compute_dtype(model, dtype), on_progress, extra, spill=spill and existing(spill))
    return stats, [*notes, *stats.notes]


def total(stats: Stats, block: MoE, name: str, weights: Mapping[str, float] | None = None) -> np.ndarray:
    """A sum over the weighted domains, of the axes that it has. Raises: CoterieError for other numbers of experts."""
    found = stats.get(block.key, name, weights)
    if any(n != block.num_experts for axis, n in zip(KNOWN[name][0], found.shape, strict=True) if axis == "E"):
        raise CoterieError(
            f"{block.name}: {name!r} has shape {found.shape} in the statistics; the layer has {block.num_experts} "
            "experts: collect them again on this model"
        )
    return found


def tokens_of(stats: Stats, block: MoE, weights: Mapping[str, float]) -> np.ndarray:
    """Tokens routed to each expert (E,). Raises: CoterieError where there are none at all."""
    found = total(stats, block, "tokens", weights)
    if not found.any():
        raise CoterieError(f"{block.name}: the statistics, as weighted, hold no token; collect more samples")
    return found


def origin(stats: Stats, path: str | None) -> dict[str, object]:
    """Which statistics decided, for a plan's budget: those of a file, or of data that the options name."""
    measured: dict[str, object] = {"samples": stats.samples}
    return {"stats": {"path": path, "model": stats.model} | measured} if path else measured


def how_stable(
    stats: Stats, what: str, choose: Callable[[Stats], dict[str, Collection[int]]]
) -> tuple[dict[str, object] | None, tuple[str, ...]]:
    """What halves of the data choose in common, as `stats.stability` has it; or None, and what to say of it."""
    try:
        return stability(stats, choose), ()
    except CoterieError as error:
        return None, (f"how stable {what} was not measured: from half of the data, {error}",)


# --- scores ------------------------------------------------------------------------------------------------


def by_weights(task: Task, method: str, seed: int, on_progress: Progress = no_progress) -> Scores:
    """Scores of a criterion that sees router rows and weights."""
    score, generator = methods.load(method).score, np.random.default_rng(seed)
    found = {}
    for done, (block, layer) in enumerate(task.layers.items()):
        found[block] = np.asarray(score(layer, generator), dtype=np.float64)
        on_progress("scoring experts", done + 1, len(task.layers))
    return found


def by_base(task: Task, method: str, model: Model, where: str) -> Scores:
    """Scores of a criterion that compares with an earlier checkpoint of the same model, in the folder `where`.

    Raises: CoterieError for a checkpoint of another model type, or one that lacks a layer.
    """
    base = Model.open(where)
    kinds = [m.checkpoint.config.get("model_type") for m in (model, base)]
    if kinds[0] != kinds[1]:
        raise CoterieError(f"--base {where}: is {kinds[1]!r}, not {kinds[0]!r}; expected this model before fine-tuning")
    score, blocks = methods.load(method).score, {(b.key, b.attention): b for b in base.moe}
    found = {}
    for block, layer in task.layers.items():
        other = blocks.get((block.key, block.attention))
        if other is None:
            raise CoterieError(f"--base {where}: has no {block.name}; expected this model before its fine-tuning")
        found[block] = score(layer, read_layer(base.checkpoint, other))
    return found


def by_stats(task: Task, method: str, stats: Stats) -> Scores:
    """Scores of a criterion of statistics; of the longest router rows where nothing is measured."""
    module, found = methods.load(method), {}
    for block, layer in task.layers.items():
        if block in task.measured:
            tokens_of(stats, block, task.weights)
            found[block] = module.score(*(total(stats, block, name, task.weights) for name in module.SUMS))
        else:
            found[block] = layer.norms
    return found


# --- choices -----------------------------------------------------------------------------------------------


def keep(task: Task, scores: Scores, guarded: Guarded | None = None) -> dict[MoE, Choice]:
    """The highest scores of each routing group stay, guarded experts before them; ties go to the lower id.

    Raises: CoterieError where more are guarded than stay.
    """
    per_group, found = task.kept // task.num_groups, {}
    for block, score in scores.items():
        ranked = score.astype(np.float64)
        ranked[(guarded or {}).get(block, [])] = np.inf
        groups = ranked.reshape(task.num_groups, -1)
        if (np.isinf(groups).sum(axis=1) > per_group).any():
            raise CoterieError(
                f"{block.name}: more super experts than the {per_group} experts that stay of a routing group; keep "
                "more, or --no-guard"
            )
        best = np.argsort(-groups, axis=1, kind="stable")[:, :per_group]
        found[block] = Choice(tuple(sorted(g * groups.shape[1] + int(e) for g, row in enumerate(best) for e in row)))
    return found


def guard(task: Task, stats: Stats | None) -> Guarded:
    """The super experts of every measured block; none are known without statistics.

    Raises: CoterieError for statistics that do not hold the largest outputs.
    """
    if stats is None:
        return {}
    try:
        largest = [total(stats, block, "output_max") for block in task.measured]
    except CoterieError as error:
        raise CoterieError(f"super experts cannot be told ({error}), or give --no-guard") from error
    return dict(zip(task.measured, super_experts(largest), strict=True))


def listed(guarded: Guarded, stats: Stats | None) -> list[list[Any]]:
    """[layer, expert, its largest output] of every guarded expert, as the report has them."""
    if stats is None:
        return []
    return [[b.key, e, float(total(stats, b, "output_max")[e])] for b, ids in guarded.items() for e in ids]


def kept_of(task: Task, choices: dict[MoE, Choice]) -> dict[str, Collection[int]]:
    """Kept experts by layer key, of the measured blocks."""
    return {block.key: choices[block].kept for block in task.measured}
