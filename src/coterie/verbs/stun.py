"""`coterie stun`: redundant experts out, then zeros inside the rest, at one exact total.

With s_e the share of expert weights that leaves with experts, the rest gets the share (S - s_e) / (1 - s_e) of zeros.
Source: Lee et al., STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning, arXiv 2409.06211.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from coterie.decide.stun import SPLITS_HERE, Recipe, _check, search
from coterie.decide.zeros import Zeroing, check_options, idle, parse_also, prepared
from coterie.edits import beside
from coterie.edits.execution import execute
from coterie.edits.saving import savable
from coterie.engine import Engine
from coterie.model.layer import Model
from coterie.storage.copying import check_io
from coterie.storage.folders import check_out
from coterie.storage.record import Progress, Report, Stopwatch, no_progress


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
    from coterie.forward.data import calibration_files

    clock, where = Stopwatch(), Engine(engine, ray_address)
    files = calibration_files(data)
    _check(sparsity, expert_ratio, preset, also)
    paper = preset == "paper"
    zeroing = Zeroing(
        second, Fraction(0), None, None, one_pass, beside.KINDS if paper else parse_also(also), not paper, files,
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
