"""`coterie stun`: redundant experts out, then zeros inside the rest, at one exact total.

With s_e the share of expert weights that leaves with experts, the rest gets the share (S - s_e) / (1 - s_e) of zeros.
Source: Lee et al., STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning, arXiv 2409.06211.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from coterie.decide.stun import SPLITS_HERE, Recipe, _check, search
from coterie.decide.zeros import Scoring, Zeroing, check_options, idle, prepared
from coterie.edits import beside
from coterie.edits.execution import Request, Writing, execute
from coterie.edits.saving import savable
from coterie.engine import Engine
from coterie.forward.data import calibration_files
from coterie.forward.samples import Calibration
from coterie.model.layer import Model
from coterie.options import flat
from coterie.storage.record import Progress, Report, no_progress


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
    where = Engine(engine, ray_address)
    files = calibration_files(data)
    _check(sparsity, expert_ratio, preset, also)
    paper = preset == "paper"
    scoring = Scoring(
        one_pass=one_pass, also=",".join(beside.KINDS) if paper else also, outliers=outliers, dtype=dtype,
        calibration=Calibration(data=files, samples=samples, seq_len=seq_len, seed=seed),
        min_tokens=(1 if paper else 64) if min_tokens is None else min_tokens,
    )  # fmt: skip
    zeroing = Zeroing(method=second, sparsity=Fraction(0), weighted=not paper, scoring=scoring)
    check_options(zeroing)
    unused = idle(zeroing) if expert_ratio != "auto" else ()  # auto judges on data, whatever zeroes
    source = Model.open(model)
    recipe = Recipe(
        source=source, sparsity=Fraction(str(sparsity)), preset=preset, lambda1=lambda1, lambda2=lambda2,
        stats=str(stats) if stats else None, no_guard=no_guard, zeroing=zeroing, dry_run=dry_run,
    )  # fmt: skip
    asked = {
        "sparsity": sparsity, "expert_ratio": expert_ratio, "second": second, "preset": preset, "lambda1": lambda1,
        "lambda2": lambda2, "stats": recipe.stats, "no_guard": no_guard, **flat(scoring), "also": also,
        "data": {name: str(file) for name, file in files.items()}, "save": save,
    }  # fmt: skip
    request = Request(
        command="stun", path=model, out=Path(out), options=asked,
        writing=Writing(save=save, dry_run=dry_run, resume=resume, overwrite=overwrite), io=io, engine=where,
        on_progress=on_progress,
    )  # fmt: skip
    request.check(source.checkpoint)
    kept = recipe.kept(expert_ratio)
    splits = []
    if expert_ratio == "auto":
        splits = search(recipe, kept, Path(out).parent, on_progress)
        kept = [min(splits, key=lambda s: s["loss"])["experts"]]
    decision, options = recipe.plan(kept[0], on_progress)
    plan, notes = decision.plan, decision.notes
    if splits:
        plan = replace(plan, budget=plan.budget | {"splits": splits})
        notes += (SPLITS_HERE,) if where.spread else ()
    decision = replace(decision, plan=plan, notes=(*notes, *unused))
    return execute(source, decision, request, prepare=prepared(options, source, plan, request))
