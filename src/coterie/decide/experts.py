"""`coterie prune`: choose the experts that stay, write the plan, execute it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from coterie.decide import clusters, criteria
from coterie.decide.criteria import Decision
from coterie.edits.kinds.keep import check_count, fits_groups
from coterie.edits.plan import Choice, Plan
from coterie.errors import CoterieError
from coterie.methods import prune as methods
from coterie.methods.prune import stun
from coterie.model.experts import Layer, read_layer
from coterie.model.family import Groups
from coterie.model.layer import Model, MoE, mtp_names
from coterie.model.stats import Stats
from coterie.storage.record import Progress, no_progress

CHOICES = {
    "budget": ("uniform", "global"),
    "linkage": ("complete", "official"),
    "distance": ("frobenius", "raw"),
    "non_uniform": ("round", "refuse", "coterie"),
}
REMOVED = ("remove", "null", "constant")
READ_BY = {  # option: the NEEDS of the methods that read it
    "stats": ("stats", "outputs", "base"),
    "weights": ("stats", "outputs"),
    "no_guard": ("stats", "outputs", "base"),
    "base": ("base",),
    "data": ("outputs",),
    "samples": ("outputs",),
    "seq_len": ("outputs",),
    "dtype": ("outputs",),
}


@dataclass(frozen=True)
class Pruning:
    """What `prune` was asked for, with its defaults; recorded in coterie.json."""

    method: str = "stun"
    ratio: float | None = None
    experts: int | None = None
    budget: str = "uniform"
    linkage: str = "complete"
    distance: str = "frobenius"
    kappa: int = stun.MERGE_BELOW
    min_experts: int | None = None
    non_uniform: str = "round"
    threshold: float = 0.5
    seed: int = 0
    drop_mtp: bool = False
    lambda1: float = 1.0
    lambda2: float = 0.0
    stats: str | None = None
    weights: dict[str, float] = field(default_factory=dict)  # of domains; those not named count 1
    no_guard: bool = False
    base: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    samples: int = 128
    seq_len: int = 2048
    dtype: str = "auto"
    removed: str | None = None

    @property
    def fate(self) -> str:
        """What becomes of removed experts' router rows: asked for, or the method's own way."""
        return self.removed or ("constant" if self.method == "mone" else "remove")

    @property
    def needs(self) -> str:
        """What the method decides from, as `methods/prune/__init__.py` has it."""
        return methods.load(self.method).NEEDS

    def record(self) -> dict[str, Any]:
        """As they are spelled on the command line, without those that only other kinds of methods read."""
        weights = ",".join(f"{name}={weight}" for name, weight in self.weights.items())
        data = {name: str(file) for name, file in self.data.items()}
        others = [n for n in ("base", "data", "samples", "seq_len", "dtype") if self.needs not in READ_BY[n]]
        found = vars(self) | {"weights": weights or None, "data": data, "removed": self.fate}
        return {n: v for n, v in found.items() if n not in others}


def check_options(options: Pruning) -> None:
    """Raises: CoterieError for a value out of its range, or for two options that contradict or ignore each other."""
    methods.load(options.method)
    for name, allowed in CHOICES.items():
        if getattr(options, name) not in allowed:
            flag = f"--{name.replace('_', '-')}"
            raise CoterieError(f"{flag} {getattr(options, name)!r}: unknown; expected one of {', '.join(allowed)}")
    if options.ratio is not None and options.experts is not None:
        raise CoterieError("--ratio and --experts say the same thing twice; give one of them")
    if options.ratio is not None and not 0 <= options.ratio < 1:
        raise CoterieError(f"--ratio {options.ratio}: the share of experts to remove must be in [0, 1)")
    if options.kappa < 0:
        raise CoterieError(f"--kappa {options.kappa}: expected a number of clusters, 0 or more")
    if options.min_experts is not None and options.min_experts < 1:
        raise CoterieError(f"--min-experts {options.min_experts}: expected at least 1")
    default = Pruning()
    shaping: tuple[str, ...] = ("budget", "linkage", "distance", "kappa", "min_experts", "non_uniform", "threshold")
    shaping += ("lambda1", "lambda2")
    given = [n for n in shaping if getattr(options, n) != getattr(default, n)]
    if options.method != "stun" and given:
        flag = f"--{given[0].replace('_', '-')}"
        raise CoterieError(f"{flag} shapes the method stun and would be ignored by {options.method}")
    if options.min_experts is not None and options.budget != "global":
        raise CoterieError("--min-experts is the floor of a global budget and would be ignored; add --budget global")
    if options.non_uniform != default.non_uniform and options.budget != "global":
        raise CoterieError("--non-uniform is about a global budget and would be ignored; add --budget global")
    if options.threshold != default.threshold and (options.linkage, options.budget) != ("official", "global"):
        raise CoterieError("--threshold would be ignored; it belongs to --linkage official --budget global")
    if options.seed != default.seed and options.method != "random" and options.needs != "outputs":
        raise CoterieError(f"--seed is of the method random and would be ignored by {options.method}")
    if options.min_experts is not None and options.linkage == "official":
        raise CoterieError("--min-experts: the published program knows no floor; use --linkage complete")
    _check_distance(options)
    _check_needs(options)


def _check_needs(options: Pruning) -> None:
    """What a criterion decides from must be given, and nothing else."""
    default, method = Pruning(), options.method
    _check_removed(options)
    for name, needs in READ_BY.items():
        of_stun = name in ("stats", "weights", "no_guard")
        if getattr(options, name) != getattr(default, name) and not (of_stun and method == "stun"):
            if options.needs not in needs:
                readers = ", ".join([*(("stun",) if of_stun else ()), *methods.names(*needs)])
                raise CoterieError(f"--{name.replace('_', '-')} would be ignored by {method}; it is of {readers}")
    if options.needs == "stats" and not options.stats:
        raise CoterieError(
            f"--method {method} decides by statistics; add --stats FILE, which `coterie collect MODEL FILE` writes"
        )
    if options.needs == "base" and not options.base:
        raise CoterieError(
            f"--method {method} compares with an earlier checkpoint; add --base MODEL, before fine-tuning"
        )
    if options.no_guard and not options.stats:
        raise CoterieError("--no-guard would be ignored: without --stats no super experts are known")


def _check_removed(options: Pruning) -> None:
    """Whether the method's choice is one for routers that stay as they are."""
    if options.fate not in REMOVED:
        raise CoterieError(f"--removed {options.fate!r}: unknown; expected one of {', '.join(REMOVED)}")
    if options.fate != "remove" and (options.method == "stun" or options.needs == "outputs"):
        raise CoterieError(
            f"--removed {options.fate}: {options.method} chooses experts that take over for those that go, which a "
            "router that still chooses these does not let them; use --removed remove, or another method"
        )
    if options.fate == "constant" and options.needs != "stats":
        raise CoterieError(
            "--removed constant needs mean outputs, which are in the statistics: use a method that reads them, "
            f"{', '.join(methods.names('stats'))}"
        )


def _check_distance(options: Pruning) -> None:
    """What router rows, co-activation and statistics demand of each other."""
    lambda1, lambda2 = options.lambda1, options.lambda2
    for name, value in (("lambda1", lambda1), ("lambda2", lambda2)):
        if not 0 <= value < math.inf:
            raise CoterieError(f"--{name} {value}: expected a finite number, 0 or more")
    if lambda2 and not options.stats:
        raise CoterieError(
            "--lambda2 weighs co-activation, which only data show; "
            "add --stats FILE, which `coterie collect MODEL FILE` writes"
        )
    if lambda1 != 1 and not lambda2:
        raise CoterieError("--lambda1 weighs router distance against co-activation and would be ignored; add --lambda2")
    if options.distance != "frobenius" and not lambda1:
        raise CoterieError("--distance is of router rows and would be ignored with --lambda1 0")
    if options.weights and not options.stats and options.needs != "outputs":
        raise CoterieError("--weights are of the statistics' domains and would be ignored; add --stats")
    if options.linkage == "official" and not stun.is_official(
        lambda1, lambda2, normalise=options.distance == "frobenius"
    ):
        raise CoterieError(
            "--linkage official knows --lambda1 and --lambda2 as 1 and 0, as 0 and 1, or as 1 and any number with "
            "--distance raw; use one of these, or --linkage complete"
        )


def num_kept(options: Pruning, num_experts: int) -> int:
    """The uniform count: E - floor(ratio * E), or the count asked for."""
    if options.experts is not None:
        if not 0 < options.experts <= num_experts:
            raise CoterieError(f"--experts {options.experts}: the model has {num_experts}; expected 1 to {num_experts}")
        return options.experts
    ratio = Decimal("0.25") if options.ratio is None else Decimal(str(options.ratio))
    return num_experts - int(ratio * num_experts)


def count_kept(model: Model, options: Pruning, blocks: list[MoE]) -> int:
    """How many experts stay of each block. Raises: CoterieError where the routing, or a block, cannot have as many."""
    family, config = model.family, model.checkpoint.config
    uniform = num_kept(options, family.num_experts(config))
    asked = f"--experts {uniform}" if options.experts else f"--ratio {0.25 if options.ratio is None else options.ratio}"
    if options.fate == "remove":
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
) -> tuple[Plan, tuple[str, ...], dict[str, Any]]:
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
    uniform = count_kept(model, options, chosen)
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
    return plan, warnings, said | decision.findings


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


def _by_clusters(model: Model, task: clusters.Task, on_progress: Progress) -> Decision:
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
        return Decision(
            choices, found, {"guard": f"off: {unknown}"}, (*notes, f"no super expert is guarded: {unknown}")
        )
    listed = criteria.listed(guarded, stats)
    if listed:
        names = ", ".join(f"layer {key} expert {e}" for key, e, _ in listed)
        notes += (f"super experts are clusters of their own, whatever they are near: {names} (--no-guard)",)
    return Decision(choices, found, {"guarded": listed}, notes)


def _floor(options: Pruning, uniform: int, top_k: int, groups: Groups) -> int:
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
) -> Decision:
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
        return Decision(criteria.keep(task, scores, guarded), findings={"guarded": criteria.listed(guarded, stats)})
    return Decision(criteria.keep(task, criteria.by_weights(task, options.method, options.seed, on_progress)))


def _never_chosen(choices: dict[MoE, Choice], task: criteria.Task, stats: Stats) -> tuple[str, ...]:
    """What to say of removed experts without a mean output."""
    number = 0
    for block, choice in choices.items():
        gone = sorted(set(range(block.num_experts)) - set(choice.kept))
        number += int((criteria.total(stats, block, "tokens", task.weights)[gone] == 0).sum())
    said = f"{number} removed experts were chosen by no calibration token: their constants are zero"
    return (said,) if number else ()
