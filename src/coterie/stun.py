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

from coterie.applying.checks import fits_groups
from coterie.applying.execution import execute
from coterie.applying.outputs import plan_outputs, planned
from coterie.engine import Engine
from coterie.errors import CoterieError
from coterie.layer import Model
from coterie.plan import Plan
from coterie.prune import Options as Dropping
from coterie.prune import check_options as check_dropping
from coterie.prune import decided
from coterie.report import Progress, Report, Stopwatch, count, no_progress
from coterie.saving import savable
from coterie.sparsify import parse_also
from coterie.writing.copying import check_io
from coterie.writing.writer import check_out
from coterie.zeroing import linears
from coterie.zeroing.budget import num_weights
from coterie.zeroing.job import Calibration, Options, check_options, idle, prepared, prune_layers, workers

PRESETS = ("recommended", "paper")
SPLITS = (Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(1))  # of S, tried by `auto`
SPLITS_HERE = "--engine ray: the splits of --expert-ratio auto were tried on the driver's machine alone"
HELD_OUT = 4  # one sample in so many judges the splits


@savable
def stun(
    model: str | Path,
    out: str | Path,
    *,
    sparsity: float = 0.4,
    expert_ratio: float | str | None = None,
    second: str = "owl",
    preset: str = "recommended",
    lambda1: float = 1.0,
    lambda2: float = 0.0,
    stats: str | Path | None = None,
    no_guard: bool = False,
    one_pass: bool = False,
    also: str = "",
    data: dict[str, Path] | list[str] | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    min_tokens: int | None = None,
    outliers: float = 3.0,
    dtype: str = "auto",
    save: str = "dense",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    engine: str = "local",
    ray_address: str | None = None,
    on_progress: Progress = no_progress,
) -> Report:
    """Removes or zeroes exactly the share `sparsity` of the routed experts' weights: first experts, then weights.

    expert_ratio: share of experts to remove (default: half of `sparsity`, floored to a count that works); "auto" tries
    0, 1/4, 1/2, 3/4 and all of it on held-out samples and keeps the best.
    second: owl, wanda, sparsegpt, moe-pruner or magnitude zeroes weights inside the experts that stay.
    preset: recommended, or paper: every linear map of a layer is pruned (routers too), floor(S * I) weights in each
    row, with OWL's unweighted ratios and the published program's clustering; the total is then met approximately.
    lambda1, lambda2, stats, no_guard: as in `prune` (super experts are guarded where stats are given; the report's
    `guard` says so); the others as in `sparsify`.
    min_tokens: 64 by default; paper: 1.
    save: dense, or sparse: zeros take one bit each (see `pack`).
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    engine: local, or ray: experts are pruned and bytes copied by the machines of a Ray cluster.
    ray_address: HOST:PORT of a cluster, or auto; without it one is started on this machine. All nodes have to see MODEL
    and OUT under the driver's paths. Not recorded: the bytes are the same.
    Raises: CoterieError, before anything is written.
    """
    from coterie.data import calibration_files

    clock, where = Stopwatch(), Engine(engine, ray_address)
    files = calibration_files(data)
    _check(sparsity, expert_ratio, preset, also)
    paper = preset == "paper"
    zeroing = Options(
        second, Fraction(0), None, None, one_pass, linears.KINDS if paper else parse_also(also), not paper, files,
        samples, seq_len, seed, (1 if paper else 64) if min_tokens is None else min_tokens, outliers, dtype,
    )  # fmt: skip
    check_options(zeroing)
    unused = idle(zeroing) if expert_ratio != "auto" else ()  # auto judges on data, whatever zeroes
    check_io(io)
    source = Model.open(model)
    check_out(Path(out), source.checkpoint.path, resume=resume, overwrite=overwrite)  # before what may take hours
    recipe = Recipe(
        source, Fraction(str(sparsity)), preset, lambda1, lambda2, str(stats) if stats else None, no_guard, zeroing,
        dry_run,
    )  # fmt: skip
    kept = recipe.kept(expert_ratio)
    splits = []
    if expert_ratio == "auto":
        splits = search(recipe, kept, Path(out).parent, on_progress)
        kept = [min(splits, key=lambda s: s["loss"])["experts"]]
    plan, options, warnings, findings = recipe.plan(kept[0], on_progress)
    if splits:
        plan = replace(plan, budget=plan.budget | {"splits": splits})
        warnings += (SPLITS_HERE,) if where.spread else ()
    asked = {
        "sparsity": sparsity, "expert_ratio": expert_ratio, "second": second, "preset": preset, "lambda1": lambda1,
        "lambda2": lambda2, "stats": recipe.stats, "no_guard": no_guard, "one_pass": one_pass, "also": also,
        "data": {name: str(file) for name, file in files.items()}, "samples": samples, "seq_len": seq_len,
        "seed": seed, "min_tokens": options.min_tokens, "outliers": outliers, "dtype": dtype, "save": save,
    }  # fmt: skip
    return execute(
        source, plan, Path(out), command="stun", path=model, options=asked, clock=clock, warnings=(*warnings, *unused),
        dry_run=dry_run, resume=resume, overwrite=overwrite, io=io, engine=where, on_progress=on_progress,
        prepare=prepared(options, source, plan, Path(out).parent, on_progress, where), findings=findings,
    )  # fmt: skip


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
class Recipe:
    """What was asked for, from which a plan follows for any number of experts."""

    source: Model
    sparsity: Fraction
    preset: str
    lambda1: float
    lambda2: float
    stats: str | None
    no_guard: bool
    zeroing: Options
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

    def plan(
        self, kept: int, on_progress: Progress = no_progress
    ) -> tuple[Plan, Options, tuple[str, ...], dict[str, Any]]:
        """The plan, how its experts are to be zeroed, what should be said aloud, and what goes into the report.

        Raises: CoterieError where the experts removed are more than the total already.
        """
        linkage = "official" if self.preset == "paper" else "complete"
        # Published, router distance mixed with co-activation is not normalised.
        mixed = linkage == "official" and self.lambda1 and self.lambda2
        asked = Dropping(
            experts=kept, linkage=linkage, distance="raw" if mixed else "frobenius",
            lambda1=self.lambda1, lambda2=self.lambda2, stats=self.stats,
            no_guard=self.no_guard,
        )  # fmt: skip
        check_dropping(asked)
        plan, warnings, findings = decided(self.source, asked, dry_run=self.dry_run, on_progress=on_progress)
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
        return replace(plan, budget=budget), replace(self.zeroing, sparsity=share, total=total), warnings, findings


def search(recipe: Recipe, kept: list[int], spill: Path, on_progress: Progress) -> list[dict[str, Any]]:
    """Prunes on three quarters of the samples, without writing, for each number of experts; judges on the rest.

    -> experts per layer, shares removed and zeroed, and the mean negative log-likelihood of a held-out token.
    """
    found = []
    for number, experts_kept in enumerate(kept):
        plan, options, *_ = recipe.plan(experts_kept)
        view = planned(recipe.source, plan, plan_outputs(recipe.source, plan))
        calibration = Calibration(view, options, spill)
        loss = held_out_loss(calibration, _part(on_progress, f"split {number + 1} of {len(kept)}: "))
        shares = {key: plan.budget[key] for key in ("removed", "zeros")}
        found.append({"experts": experts_kept, **shares, "loss": loss})
    return found


def _part(on_progress: Progress, prefix: str) -> Progress:
    return lambda stage, done, total: on_progress(prefix + stage, done, total)


def held_out_loss(calibration: Calibration, on_progress: Progress) -> float:
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
    pruner, others = workers(calibration.view, calibration.options, shares, _discard, calibration.dtype)
    pruner.num_judged = sum(map(len, calibration.samples))
    taught, held = calibration.batches(), calibration.embed(judges)
    for index in prune_layers(stream, [*taught, *held], pruner, others):
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
