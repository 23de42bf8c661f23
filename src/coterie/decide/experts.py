"""`coterie prune`: choose the experts that stay, write the plan, execute it."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from coterie.decide import clusters, criteria
from coterie.decide.criteria import Selected
from coterie.decide.pruning import OURS, READ_BY, Pruning, Remaining
from coterie.edits.checks import check_count, fits_groups
from coterie.edits.plan import Choice, Decision, Plan
from coterie.errors import CoterieError
from coterie.model.experts import Layer, read_layer
from coterie.model.family import RoutingGroups
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
    family, config = model.family, model.checkpoint.config
    groups, top_k, total = family.groups(config), family.num_experts_per_token(config), family.num_experts(config)
    if options.drop_mtp and not mtp_names(model):
        raise CoterieError("--drop-mtp: the model has no multi-token-prediction layers to leave out")
    remove = options.fate == "remove"
    chosen = [b for b in model.moe if not (b.mtp and options.drop_mtp)] if remove else model.main
    uniform = count_kept(model, options.remaining, chosen, routers_cut=remove)
    num_groups = groups.num_groups if remove else 1
    layers = {b: read_layer(model.checkpoint, b) for b in chosen}
    budget: dict[str, Any] = {"kind": options.budget, "experts": uniform}
    if options.method == "stun":
        floor = _floor(options, uniform, top_k, groups)
        task = clusters.Task(layers, options, uniform, floor, num_groups, dry_run)
        decision = _by_clusters(model, task, on_progress)
    else:
        decision = _by_criterion(model, layers, options, uniform, num_groups, spill, on_progress)
    warnings = (*(_awkward(uniform, total) if remove else ()), *decision.notes)
    choices = decision.choices if remove else _routed(decision.choices, options.fate)
    plan = Plan(
        layers={b.key: c for b, c in choices.items() if not b.attention},
        attention={b.key: c for b, c in choices.items() if b.attention},
        budget=budget | decision.budget,
        drop_mtp=options.drop_mtp,
        constants={"stats": options.stats, "weights": options.weights} if options.fate == "constant" else {},
    )
    if any(b.mtp for b in model.moe):
        cut = f"cut to {uniform} experts by the same rule" if remove else "kept whole"
        warnings = (*warnings, f"multi-token-prediction layers are {'left out' if options.drop_mtp else cut}")
    said: dict[str, Any] = {"guard": _guard(options), "guarded": [], "stability": decision.budget.get("stability")}
    announced = OURS if options.fate != "remove" else ""
    return Decision(plan, warnings, said | decision.findings, announced)


def _routed(choices: dict[MoE, Choice], fate: str) -> dict[MoE, Choice]:
    """The choices for routers that stay as they are."""
    return {b: replace(c, removed=fate) if len(c.kept) < b.num_experts else c for b, c in choices.items()}


def _guard(options: Pruning) -> str:
    """Whether super experts are guarded, and why not."""
    if options.no_guard:
        return "off: --no-guard"
    if options.needs not in READ_BY["no_guard"] and options.method != "stun":
        return f"off: {options.method} reads no statistics, from which super experts are known"
    return "on" if options.stats else "off: without --stats no super experts are known"


def _by_clusters(model: Model, task: clusters.Task, on_progress: Progress) -> Selected:
    """STUN's choices; where there are statistics, around the super experts."""
    options = task.options
    stats = clusters.read_stats(model, options.stats)
    guarded, unknown = criteria.Guarded(), ""
    if stats and not options.no_guard:
        try:
            guarded = criteria.guard(criteria.Task(task.layers, task.uniform, task.num_groups), stats)
        except CoterieError as error:  # clusters need less of the statistics, and say themselves what they miss
            unknown = str(error.__cause__)
    choices, found, notes = clusters.decide(replace(task, guarded=guarded), stats, on_progress)
    if unknown:
        return Selected(
            choices, found, {"guard": f"off: {unknown}"}, (*notes, f"no super expert is guarded: {unknown}")
        )
    listed = criteria.listed(guarded, stats)
    if listed:
        names = ", ".join(f"layer {key} expert {e}" for key, e, _ in listed)
        notes += (f"super experts are clusters of their own, whatever they are near: {names} (--no-guard)",)
    return Selected(choices, found, {"guarded": listed}, notes)


def _floor(options: Pruning, uniform: int, top_k: int, groups: RoutingGroups) -> int:
    """The fewest experts that a global budget may leave in a layer."""
    least = top_k if options.min_experts is None else options.min_experts
    if least < top_k:
        raise CoterieError(f"--min-experts {least}: {top_k} are chosen per token; ask for at least those")
    floor = next((n for n in range(least, uniform + 1) if fits_groups(n, top_k, groups)), None)
    if floor is None:
        raise CoterieError(f"--min-experts {least}: the budget keeps {uniform} experts on average; ask for fewer")
    return floor


def _awkward(count: int, before: int) -> tuple[str, ...]:
    if count % 8 and count != before:
        return (f"{count} experts is not a multiple of 8: some serving kernels and expert parallelism want that",)
    return ()


def _by_criterion(
    model: Model,
    layers: dict[MoE, Layer],
    options: Pruning,
    uniform: int,
    num_groups: int,
    spill: Path | None,
    on_progress: Progress,
) -> Selected:
    """The choices of any method but stun, by what it needs."""
    task = criteria.Task(layers, uniform, num_groups, options.weights)
    stats = criteria.read_stats(model, options.stats, [options.method]) if options.stats else None
    if options.needs == "outputs":
        from coterie.decide import reconstruct

        return reconstruct.decide(model, task, options, stats, spill, on_progress)
    if options.needs == "stats":
        assert stats and options.stats, "checked"
        decision = criteria.decide_by_stats(task, options.method, stats, options.stats, no_guard=options.no_guard)
        said = _never_chosen(decision.choices, task, stats) if options.fate == "constant" else ()
        return replace(decision, notes=(*decision.notes, *said))
    if options.base:
        scores = criteria.by_base(task, options.method, model, Model.open(options.base), options.base)
        guarded = criteria.guard(task, None if options.no_guard else stats)
        return Selected(criteria.keep(task, scores, guarded), findings={"guarded": criteria.listed(guarded, stats)})
    return Selected(criteria.keep(task, criteria.by_weights(task, options.method, options.seed, on_progress)))


def _never_chosen(choices: dict[MoE, Choice], task: criteria.Task, stats: Stats) -> tuple[str, ...]:
    """What to say of removed experts without a mean output."""
    number = 0
    for block, choice in choices.items():
        gone = sorted(set(range(block.num_experts)) - set(choice.kept))
        number += int((criteria.total(stats, block, "tokens", task.weights)[gone] == 0).sum())
    said = f"{number} removed experts were chosen by no calibration token: their constants are zero"
    return (said,) if number else ()
