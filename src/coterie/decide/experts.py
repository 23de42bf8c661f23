"""`coterie prune`: from what was asked to a decision, which experts stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from coterie.decide import criteria
from coterie.decide.clusters import Clusterer
from coterie.decide.criteria import Guarded, Selected, Task
from coterie.decide.pruning import OURS, READ_BY, Pruning, Remaining
from coterie.edits.kinds.keep import check_count, fits_groups
from coterie.edits.plan import Choice, Decision, Plan
from coterie.errors import CoterieError
from coterie.methods import prune as methods
from coterie.model.experts import read_layer
from coterie.model.layer import Model, MoE, mtp_names
from coterie.model.stats import Stats
from coterie.storage.record import Progress, no_progress


def num_kept(asked: Remaining, num_experts: int) -> int:
    """The uniform count: E - floor(ratio * E), or the count asked for."""
    if asked.experts is not None:
        if not 0 < asked.experts <= num_experts:
            raise CoterieError(f"--experts {asked.experts}: the model has {num_experts}; expected 1 to {num_experts}")
        return asked.experts
    ratio = Decimal("0.25") if asked.ratio is None else Decimal(str(asked.ratio))
    return num_experts - int(ratio * num_experts)


def count_kept(model: Model, remaining: Remaining, blocks: list[MoE], *, routers_cut: bool = True) -> int:
    """How many experts stay of each block. Raises: CoterieError where the routing, or a block, cannot have as many.

    routers_cut: whether routers lose the rows of the experts that go, so that top-k and routing groups must fit.
    """
    family, config = model.family, model.checkpoint.config
    uniform = num_kept(remaining, family.num_experts(config))
    ratio = 0.25 if remaining.ratio is None else remaining.ratio
    asked = f"--experts {uniform}" if remaining.experts else f"--ratio {ratio}"
    if routers_cut:
        check_count(uniform, family.num_experts_per_token(config), family.groups(config), asked)
    small = min(blocks, key=lambda b: b.num_experts)
    if small.num_experts < uniform:
        raise CoterieError(f"{asked}: keeps {uniform} experts, but {small.name} has {small.num_experts}; keep fewer")
    return uniform


def decided(
    model: Model,
    options: Pruning,
    *,
    dry_run: bool = False,
    spill: Path | None = None,
    on_progress: Progress = no_progress,
) -> Decision:
    """The plan, what should be said aloud about it, and what the decision found, for the report.

    Reads routers, and weights only where a method needs them.
    spill: the folder for activations that are too large for memory (default: the system's temporary folder).
    """
    if options.drop_mtp and not mtp_names(model):
        raise CoterieError("--drop-mtp: the model has no multi-token-prediction layers to leave out")
    family, config, cut = model.family, model.checkpoint.config, options.fate == "remove"
    blocks = [b for b in model.moe if not (b.predicts and options.drop_mtp)] if cut else model.main
    kept = count_kept(model, options.remaining, blocks, routers_cut=cut)
    num_groups = family.groups(config).num_groups if cut else 1
    task = Task({b: read_layer(model.checkpoint, b) for b in blocks}, kept, num_groups, options.weights)
    stats, said = _statistics(model, options, spill, on_progress)
    guarded, unknown = _guarded(task, options, stats)
    question = Question(model, options, task, stats, guarded, dry_run, spill, on_progress)
    found = DECIDE[options.needs](question)
    notes = [*said, *found.notes, *([f"no super expert is guarded: {unknown}"] if unknown else [])]
    if cut and kept % 8 and kept != family.num_experts(config):
        notes.insert(0, f"{kept} experts is not a multiple of 8: some serving kernels and expert parallelism want that")
    fate = f"cut to {kept} experts by the same rule" if cut else "kept whole"
    if any(b.aside for b in model.moe):
        notes.append(f"the second model's experts ({family.side}N) are {fate}")
    if any(b.predicts for b in model.moe):
        notes.append(f"multi-token-prediction layers are {'left out' if options.drop_mtp else fate}")
    choices = found.choices if cut else _routed(found.choices, options.fate)
    plan = Plan(
        layers={b.key: c for b, c in choices.items() if not b.attention},
        attention={b.key: c for b, c in choices.items() if b.attention},
        budget={"kind": options.budget, "experts": kept} | found.budget,
        drop_mtp=options.drop_mtp,
        constants={"stats": options.stats, "weights": options.weights} if options.fate == "constant" else {},
    )
    findings: dict[str, object] = {
        "guard": f"off: {unknown}" if unknown else _guard(options),
        "guarded": criteria.listed(guarded, stats),
        "stability": found.budget.get("stability"),
    }
    return Decision(plan, tuple(notes), findings | found.findings, "" if cut else OURS)


def _statistics(
    model: Model, options: Pruning, spill: Path | None, on_progress: Progress
) -> tuple[Stats | None, list[str]]:
    """What --stats hold, or what --data show, measured now; and what should be said aloud of how is decided."""
    said = [options.why] if options.why else []
    if options.stats:
        return criteria.read_stats(model, options.stats, [options.criterion]), said
    if not options.has_stats:
        return None, said
    stats, notes = criteria.measured(model, options.calibration, options.dtype, spill, on_progress)
    return stats, [*said, *notes]


def _routed(choices: dict[MoE, Choice], fate: str) -> dict[MoE, Choice]:
    """The choices for routers that stay as they are."""
    return {b: replace(c, removed=fate) if len(c.kept) < b.num_experts else c for b, c in choices.items()}


def _guard(options: Pruning) -> str:
    """Whether super experts are guarded, and why not."""
    if options.no_guard:
        return "off: --no-guard"
    if options.needs not in READ_BY["no_guard"]:
        return f"off: {options.criterion} reads no statistics, from which super experts are known"
    return "on" if options.has_stats else "off: without statistics no super experts are known"


def _guarded(task: Task, options: Pruning, stats: Stats | None) -> tuple[Guarded, str]:
    """The super experts; where clustering, which needs less of the statistics, can do without, why none is known."""
    try:
        return criteria.guard(task, None if options.no_guard else stats), ""
    except CoterieError as error:
        if options.needs != "clusters":
            raise
        return {}, str(error.__cause__)


# --- by what a method needs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What a method is asked, and all that it may decide from."""

    model: Model
    options: Pruning
    task: Task
    stats: Stats | None
    guarded: Guarded
    dry_run: bool
    spill: Path | None
    on_progress: Progress


def _by_weights(asked: Question) -> Selected:
    for layer in asked.task.layers.values():  # a router that computes nothing is refused, by methods that ignore it too
        layer.check_router()
    scores = criteria.by_weights(asked.task, asked.options.criterion, asked.options.seed, asked.on_progress)
    return Selected(criteria.keep(asked.task, scores))


def _by_base(asked: Question) -> Selected:
    assert asked.options.base, "checked"
    scores = criteria.by_base(asked.task, asked.options.criterion, asked.model, asked.options.base)
    return Selected(criteria.keep(asked.task, scores, asked.guarded))


def _by_stats(asked: Question) -> Selected:
    task, options, stats, guarded = asked.task, asked.options, asked.stats, asked.guarded
    assert stats, "checked"

    def choose(some: Stats) -> dict[MoE, Choice]:
        return criteria.keep(task, criteria.by_stats(task, options.criterion, some), guarded)

    scores = criteria.by_stats(task, options.criterion, stats)
    choices, unguarded = criteria.keep(task, scores, guarded), criteria.keep(task, scores)
    spared = [f"{b.name} expert {e}" for b, ids in guarded.items() for e in ids if e not in unguarded[b].kept]
    notes = [f"super experts that score low stay all the same: {', '.join(spared)} (--no-guard)"] if spared else []
    notes += [criteria.UNMEASURED] if len(task.measured) < len(task.layers) else []
    stable, unstable = criteria.how_stable(stats, "the choice is", lambda half: criteria.kept_of(task, choose(half)))
    notes += [*unstable, *(_never_chosen(choices, task, stats) if options.fate == "constant" else ())]
    budget = criteria.origin(stats, options.stats) | ({"stability": stable} if stable else {})
    return Selected(choices, budget, {"scores": {b.key: scores[b].tolist() for b in task.measured}}, tuple(notes))


def _never_chosen(choices: dict[MoE, Choice], task: Task, stats: Stats) -> tuple[str, ...]:
    """What to say of removed experts without a mean output."""
    number = 0
    for block, choice in choices.items():
        gone = sorted(set(range(block.num_experts)) - set(choice.kept))
        number += int((criteria.total(stats, block, "tokens", task.weights)[gone] == 0).sum())
    said = f"{number} removed experts were chosen by no calibration token: their constants are zero"
    return (said,) if number else ()


def _by_outputs(asked: Question) -> Selected:
    from coterie.decide import reconstruct  # imports torch

    options = asked.options
    trial = reconstruct.Trial(asked.task, methods.load(options.criterion), asked.guarded)
    found = reconstruct.decide(asked.model, trial, options.calibration, options.dtype, asked.spill, asked.on_progress)
    said = () if asked.stats else ("super experts are known from --stats alone: none is guarded",)
    return replace(found, notes=(*found.notes, *said))


def _by_clusters(asked: Question) -> Selected:
    """STUN's choices; where there are statistics, around the super experts."""
    clusterer = Clusterer(asked.task, asked.options, asked.guarded, _floor(asked), asked.dry_run)
    found = clusterer.decide(asked.stats, asked.on_progress)
    listed = criteria.listed(asked.guarded, asked.stats)
    names = ", ".join(f"layer {key} expert {e}" for key, e, _ in listed)
    said = f"super experts are clusters of their own, whatever they are near: {names} (--no-guard)"
    return replace(found, notes=(*found.notes, said)) if listed else found


def _floor(asked: Question) -> int:
    """The fewest experts that a global budget may leave in a layer."""
    family, config = asked.model.family, asked.model.checkpoint.config
    top_k, least = family.num_experts_per_token(config), asked.options.min_experts
    least = top_k if least is None else least
    if least < top_k:
        raise CoterieError(f"--min-experts {least}: {top_k} are chosen per token; ask for at least those")
    allowed = range(least, asked.task.kept + 1)
    floor = next((n for n in allowed if fits_groups(n, top_k, family.groups(config))), None)
    if floor is None:
        raise CoterieError(
            f"--min-experts {least}: the budget keeps {asked.task.kept} experts on average; ask for fewer"
        )
    return floor


DECIDE: dict[str, Callable[[Question], Selected]] = {
    "router": _by_weights,
    "weights": _by_weights,
    "stats": _by_stats,
    "base": _by_base,
    "outputs": _by_outputs,
    "clusters": _by_clusters,
}
