"""`coterie stun`: redundant experts out, then zeros inside the rest, at one exact total.

With s_e the share of expert weights that leaves with experts, the rest gets the share (S - s_e) / (1 - s_e) of zeros.
Source: Lee et al., STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning, arXiv 2409.06211.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from coterie.decide.experts import decided
from coterie.decide.pruning import Pruning, Remaining
from coterie.decide.pruning import check_options as check_dropping
from coterie.decide.zeros import Calibrated, Workers, Zeroing
from coterie.edits.budget import num_weights
from coterie.edits.checks import fits_groups
from coterie.edits.counts import count
from coterie.edits.outputs import plan_outputs, planned
from coterie.edits.plan import Decision
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.storage.record import Progress, no_progress

PRESETS = ("recommended", "paper")
SPLITS = (Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(1))  # of S, tried by `auto`
SPLITS_HERE = "--engine ray: the splits of --expert-ratio auto were tried on the driver's machine alone"
HELD_OUT = 4  # one sample in so many judges the splits


def _check(sparsity: float, expert_ratio: float | str | None, preset: str, also: str) -> None:
    if not 0 <= sparsity < 1:
        raise CoterieError(f"--sparsity {sparsity}: the share of weights to remove or zero must be in [0, 1)")
    if preset not in PRESETS:
        raise CoterieError(f"--preset {preset!r}: unknown; expected one of {', '.join(PRESETS)}")
    if preset == "paper" and also:
        raise CoterieError("--also would be ignored: --preset paper prunes every linear map of a layer")
    if isinstance(expert_ratio, str) and expert_ratio != "auto":
        raise CoterieError(f"--expert-ratio {expert_ratio!r}: expected a share of experts in [0, 1), or auto")
    if expert_ratio == "auto" and (also or preset == "paper"):
        raise CoterieError("--expert-ratio auto judges splits of the experts alone: drop --also and --preset paper")
    if isinstance(expert_ratio, int | float) and not 0 <= expert_ratio < 1:
        raise CoterieError(f"--expert-ratio {expert_ratio}: the share of experts to remove must be in [0, 1)")


@dataclass(frozen=True)
class StunRecipe:
    """What was asked for, from which a plan follows for any number of experts."""

    source: Model
    sparsity: Fraction
    preset: str
    lambda1: float
    lambda2: float
    stats: str | None
    no_guard: bool
    zeroing: Zeroing
    dry_run: bool

    def kept(self, expert_ratio: float | str | None) -> list[int]:
        """The numbers of experts per layer to try: one, unless the ratio is `auto`."""
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
        return next(
            n
            for n in range(least, num_experts + 1)
            if n == num_experts or (n >= top_k and fits_groups(n, top_k, groups))
        )

    def plan(self, kept: int, on_progress: Progress = no_progress) -> tuple[Decision, Zeroing]:
        """The decision which experts stay, and how their weights are to be zeroed.

        Raises: CoterieError where the experts removed are more than the total already.
        """
        linkage = "official" if self.preset == "paper" else "complete"
        # Published, router distance mixed with co-activation is not normalised.
        mixed = linkage == "official" and self.lambda1 and self.lambda2
        asked = Pruning(
            remaining=Remaining(experts=kept), linkage=linkage, distance="raw" if mixed else "frobenius",
            lambda1=self.lambda1, lambda2=self.lambda2, stats=self.stats,
            no_guard=self.no_guard,
        )  # fmt: skip
        check_dropping(asked)
        decision = decided(self.source, asked, dry_run=self.dry_run, on_progress=on_progress)
        plan = decision.plan
        view = planned(self.source, plan, plan_outputs(self.source, plan))
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
        total = None if self.preset == "paper" else zeros
        zeroing = replace(self.zeroing, sparsity=share, total=total)
        return replace(decision, plan=replace(plan, budget=budget)), zeroing


def search(recipe: StunRecipe, kept: list[int], spill: Path, on_progress: Progress) -> list[dict[str, Any]]:
    """Prunes on three quarters of the samples, without writing, for each number of experts; judges on the rest.

    -> experts per layer, shares removed and zeroed, and the mean negative log-likelihood of a held-out token.
    """
    found = []
    for number, experts_kept in enumerate(kept):
        decision, options = recipe.plan(experts_kept)
        plan = decision.plan
        view = planned(recipe.source, plan, plan_outputs(recipe.source, plan))
        calibration = Calibrated(view, options, spill)
        loss = held_out_loss(calibration, _part(on_progress, f"split {number + 1} of {len(kept)}: "))
        shares = {key: plan.budget[key] for key in ("removed", "zeros")}
        found.append({"experts": experts_kept, **shares, "loss": loss})
    return found


def _part(on_progress: Progress, prefix: str) -> Progress:
    return lambda stage, done, total: on_progress(prefix + stage, done, total)


def held_out_loss(calibration: Calibrated, on_progress: Progress) -> float:
    """Mean negative log-likelihood of the held-out samples' tokens after pruning by the others."""
    stream, samples = calibration.stream, calibration.samples
    judges = [s for s in samples[HELD_OUT - 1 :: HELD_OUT] if len(s) > 1]
    if not judges:
        raise CoterieError(
            f"--expert-ratio auto: one sample in {HELD_OUT} is held out to judge by, and {len(samples)} were given; "
            "give more data or samples"
        )
    calibration.use([s for i, s in enumerate(samples) if i % HELD_OUT != HELD_OUT - 1])
    shares = calibration.shares(on_progress)
    workers = Workers.of(calibration.view, calibration.options, shares, _discard, calibration.dtype)
    workers.pruner.num_judged = sum(map(len, calibration.samples))
    taught, held = calibration.batches(), calibration.embed(judges)
    for index in workers.layers(stream, [*taught, *held]):
        on_progress("pruning layers", index + 1, len(stream.layers))
    return loss(stream.logits, held, judges)


def _discard(name: str, offset: int, data: bytes) -> None:
    """A trial writes nothing."""


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
