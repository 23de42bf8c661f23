"""`coterie stun`: redundant experts out, then zeros inside the rest, at one exact total.

With s_e the share of expert weights that leaves with experts, the rest gets the share (S - s_e) / (1 - s_e) of zeros.
Source: Lee et al., STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning, arXiv 2409.06211.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from coterie.decide import experts
from coterie.decide.pruning import Lambda1, Lambda2, NoGuard, Pruning, Remaining, Statistics
from coterie.decide.pruning import check_options as check_dropping
from coterie.decide.zeros import Scoring, Workers, Zeroing, check_writable, idle, shares_of
from coterie.decide.zeros import check_options as check_zeroing
from coterie.edits import beside
from coterie.edits.budget import num_weights
from coterie.edits.counts import count
from coterie.edits.execution import Request
from coterie.edits.kinds.keep import fits_groups
from coterie.edits.outputs import planned
from coterie.edits.plan import Decision
from coterie.errors import CoterieError, check_choice
from coterie.forward.layerwise import Calibrated
from coterie.methods import sparsify as methods
from coterie.model.layer import Model
from coterie.options import Help, flat
from coterie.storage.record import Progress, no_progress

PRESETS = ("recommended", "paper")
SPLITS = (Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(1))  # of S, tried by `auto`
SPLITS_HERE = "--engine ray: the splits of --expert-ratio auto were tried on the driver's machine alone"
HELD_OUT = 4  # one sample in so many judges the splits


def parse_ratio(text: float | str | None) -> float | str | None:
    """A share from the command line as a number; "auto" as it is."""
    try:
        return text if text is None else float(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class Stunning:
    """What `stun` was asked for, with its defaults; recorded in coterie.json."""

    sparsity: Annotated[float, Help("Share of expert weights to remove or zero, exactly.")] = 0.4
    expert_ratio: Annotated[
        float | str | None,
        Help("Share of experts to remove, or auto [default: half of --sparsity].", given=str, read=parse_ratio),
    ] = None
    second: Annotated[str, Help(f"How weights are zeroed: {', '.join(methods.names())}.")] = "owl"
    preset: Annotated[str, Help("recommended: expert matrices only; paper: every linear map, as published.")] = (
        "recommended"
    )
    lambda1: Lambda1 = 1.0
    lambda2: Lambda2 = 0.0
    stats: Statistics = None
    no_guard: NoGuard = False
    scoring: Annotated[
        Scoring,
        {
            "min_tokens": Help(
                "Experts that fewer tokens reach are pruned by magnitude [default: 64; paper: 1].",
                given=int,
                default=None,
            )
        },
    ] = field(default_factory=Scoring)

    @property
    def paper(self) -> bool:
        """Whether all is to be as published."""
        return self.preset == "paper"

    @property
    def min_tokens(self) -> int:
        """Asked for, or what the preset takes."""
        found = self.scoring.min_tokens
        return (1 if self.paper else 64) if found is None else found

    def zeroing(self) -> Zeroing:
        """How the weights of the experts that stay are zeroed; how many follows later."""
        scoring = replace(self.scoring, min_tokens=self.min_tokens)
        scoring = replace(scoring, also=",".join(beside.KINDS)) if self.paper else scoring
        return Zeroing(method=self.second, sparsity=Fraction(0), weighted=not self.paper, scoring=scoring)

    def record(self) -> dict[str, object]:
        """The options as spelled on the command line."""
        return flat(self) | self.scoring.record() | {"min_tokens": self.min_tokens, "stats": self.stats or None}


def check_options(options: Stunning) -> None:
    """Raises: CoterieError for a value out of its range, or for two options that contradict or ignore each other."""
    sparsity, expert_ratio, also = options.sparsity, options.expert_ratio, options.scoring.also
    if not 0 <= sparsity < 1:
        raise CoterieError(f"--sparsity {sparsity}: the share of weights to remove or zero must be in [0, 1)")
    check_choice("--preset", options.preset, PRESETS)
    if options.paper and also:
        raise CoterieError("--also would be ignored: --preset paper prunes every linear map of a layer")
    if isinstance(expert_ratio, str) and expert_ratio != "auto":
        raise CoterieError(f"--expert-ratio {expert_ratio!r}: expected a share of experts in [0, 1), or auto")
    if expert_ratio == "auto" and (also or options.paper):
        raise CoterieError("--expert-ratio auto judges splits of the experts alone: drop --also and --preset paper")
    if isinstance(expert_ratio, int | float) and not 0 <= expert_ratio < 1:
        raise CoterieError(f"--expert-ratio {expert_ratio}: the share of experts to remove must be in [0, 1)")
    check_zeroing(options.zeroing())
    unused(options)


def unused(options: Stunning) -> tuple[str, ...]:
    """What to say of options that do nothing. Raises: CoterieError for data that do nothing."""
    return idle(options.zeroing()) if options.expert_ratio != "auto" else ()  # auto judges on data, whatever zeroes


def decided(source: Model, options: Stunning, request: Request) -> tuple[Decision, Zeroing]:
    """Which experts go, and how the weights of the others are zeroed.

    Raises: CoterieError where the weights cannot hold zeros, or the experts removed are more than the total already.
    """
    check_writable(source, Zeroing(method=options.second))
    recipe = StunRecipe(source, options, Fraction(str(options.sparsity)), request.writing.dry_run)
    kept, splits = recipe.kept(), list[Split]()
    if options.expert_ratio == "auto":
        splits = search(recipe, kept, request.out.parent, request.on_progress)
        kept = [min(splits, key=lambda split: split.loss).experts]
    decision, zeroing = recipe.plan(kept[0], request.on_progress)
    notes = (*decision.notes, *((SPLITS_HERE,) if splits and request.engine.spread else ()), *unused(options))
    tried = {"splits": [vars(split) for split in splits]} if splits else {}
    plan = replace(decision.plan, budget=decision.plan.budget | tried)
    return replace(decision, plan=plan, notes=notes), zeroing


@dataclass(frozen=True)
class StunRecipe:
    """What was asked for, from which a plan follows for any number of experts."""

    source: Model
    options: Stunning
    sparsity: Fraction
    dry_run: bool

    def kept(self) -> list[int]:
        """The numbers of experts per layer to try: one, unless the ratio is `auto`."""
        expert_ratio = self.options.expert_ratio
        num_experts = self.source.family.num_experts(self.source.checkpoint.config)
        if expert_ratio is None:
            return [self._valid(num_experts, self.sparsity / 2)]
        if expert_ratio == "auto":
            found = [self._valid(num_experts, self.sparsity * part) for part in SPLITS]
            return sorted(set(found), reverse=True)
        return [num_experts - math.floor(Fraction(str(expert_ratio)) * num_experts)]

    def _valid(self, num_experts: int, ratio: Fraction) -> int:
        """The fewest experts that removing at most the share `ratio` leaves, and that the routing can work with."""
        family, config = self.source.family, self.source.checkpoint.config
        top_k, groups = family.num_experts_per_token(config), family.groups(config)
        least = num_experts - math.floor(ratio * num_experts)
        fitting = (n for n in range(max(least, top_k), num_experts) if fits_groups(n, top_k, groups))
        return next(fitting, num_experts)

    def plan(self, kept: int, on_progress: Progress = no_progress) -> tuple[Decision, Zeroing]:
        """The decision which experts stay, and how their weights are to be zeroed.

        Raises: CoterieError where the experts removed are more than the total already.
        """
        options = self.options
        # Published, router distance mixed with co-activation is not normalised.
        mixed = options.paper and options.lambda1 and options.lambda2
        asked = Pruning(
            method="stun", remaining=Remaining(experts=kept), linkage="official" if options.paper else "complete",
            distance="raw" if mixed else "frobenius", lambda1=options.lambda1, lambda2=options.lambda2,
            stats=options.stats or None, no_guard=options.no_guard,
        )  # fmt: skip
        check_dropping(asked)
        decision = experts.decided(self.source, asked, dry_run=self.dry_run, on_progress=on_progress)
        plan = decision.plan
        view = planned(self.source, plan)
        before, after = (count(list(m.checkpoint.tensors.values()), m.roles)["experts"] for m in (self.source, view))
        removed, prunable = before - after, sum(num_weights(view.checkpoint, b) for b in view.main)
        zeros = round(self.sparsity * before) - removed
        if not 0 <= zeros <= prunable:
            raise CoterieError(
                f"--expert-ratio: keeping {kept} experts removes {removed / before:.4f} of the expert weights, which "
                f"zeros cannot bring to --sparsity {float(self.sparsity)}; remove fewer experts"
            )
        share = Fraction(zeros, prunable)
        budget = plan.budget | {"kind": "stun", "removed": removed / before, "zeros": float(share)}
        zeroing = replace(options.zeroing(), sparsity=share, total=None if options.paper else zeros)
        return replace(decision, plan=replace(plan, budget=budget)), zeroing


@dataclass(frozen=True)
class Split:
    """Experts per layer, shares removed and zeroed, and the mean negative log-likelihood of a held-out token."""

    experts: int
    removed: float
    zeros: float
    loss: float


def search(recipe: StunRecipe, kept: list[int], spill: Path, on_progress: Progress) -> list[Split]:
    """Prunes on three quarters of the samples, without writing, for each number of experts; judges on the rest."""
    found = []
    for number, experts_kept in enumerate(kept):
        decision, options = recipe.plan(experts_kept)
        plan, part = decision.plan, f"split {number + 1} of {len(kept)}: "
        scoring, view = options.scoring, planned(recipe.source, plan)
        calibration = Calibrated(view, scoring.calibration, scoring.dtype, spill)
        loss = held_out_loss(calibration, options, lambda stage, *done, part=part: on_progress(part + stage, *done))
        found.append(Split(experts_kept, plan.budget["removed"], plan.budget["zeros"], loss))
    return found


def held_out_loss(calibration: Calibrated, options: Zeroing, on_progress: Progress) -> float:
    """Mean negative log-likelihood of the held-out samples' tokens after pruning by the others."""
    stream, samples = calibration.stream, calibration.samples
    judges = [s for s in samples[HELD_OUT - 1 :: HELD_OUT] if len(s) > 1]
    if not judges:
        raise CoterieError(
            f"--expert-ratio auto: one sample in {HELD_OUT} is held out to judge by, and {len(samples)} were given; "
            "give more data or samples"
        )
    calibration.use([s for i, s in enumerate(samples) if i % HELD_OUT != HELD_OUT - 1])
    shares = shares_of(calibration, options, on_progress)
    workers = Workers.of(calibration.model, options, shares, lambda *_: None, calibration.dtype)
    workers.pruner.num_judged = sum(map(len, calibration.samples))
    taught, held = calibration.batches(), calibration.embed(judges)
    for index in workers.layers(stream, [*taught, *held]):
        on_progress("pruning layers", index + 1, len(stream.layers))
    return loss(stream.logits, held, judges)


def loss(logits: Callable[[Any], Any], batches: list[Any], samples: list[tuple[int, ...]]) -> float:
    """Mean over all tokens but each sample's first of -log p(token | those before)."""
    import torch
    import torch.nn.functional as F

    total, number = 0.0, 0
    for batch in batches:
        ids = torch.tensor([samples[i] for i in batch.samples])
        found = logits(batch).float()[:, :-1].flatten(0, 1)
        total += float(F.cross_entropy(found, ids[:, 1:].flatten(), reduction="sum"))
        number += ids[:, 1:].numel()
    return total / number
