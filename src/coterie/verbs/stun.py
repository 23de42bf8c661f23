"""STUN: redundant experts out, then zeros inside the rest, at one exact total.

Example: coterie stun MODEL OUT --sparsity 0.40 --data code=code.txt --data prose=prose.txt
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from coterie.decide.pruning import Lambda1, Lambda2, NoGuard, Statistics
from coterie.decide.stun import SPLITS_HERE, StunRecipe, _check, search
from coterie.decide.zeros import Scoring, Zeroing, check_options, idle, prepared
from coterie.edits import beside
from coterie.edits.execution import Io, Request, Writing, execute
from coterie.edits.saving import savable
from coterie.engine import Cluster, Engine
from coterie.methods import sparsify as methods
from coterie.model.layer import Model
from coterie.options import Help, ModelPath, OutPath, public
from coterie.pages.terminal import show_report as show
from coterie.storage.record import Progress, Report, no_progress

__all__ = ["show", "stun"]


def parse_ratio(text: float | str | None) -> float | str | None:
    """A share from the command line as a number; "auto" as it is."""
    try:
        return text if text is None else float(text)
    except ValueError:
        return text


@public
@savable()
def stun(
    model: ModelPath,
    out: OutPath,
    *,
    sparsity: Annotated[float, Help("Share of expert weights to remove or zero, exactly.")] = 0.4,
    expert_ratio: Annotated[
        float | str | None,
        Help("Share of experts to remove, or auto [default: half of --sparsity].", given=str, read=parse_ratio),
    ] = None,
    second: Annotated[str, Help(f"How weights are zeroed: {', '.join(methods.names())}.")] = "owl",
    preset: Annotated[
        str, Help("recommended: expert matrices only; paper: every linear map, as published.")
    ] = "recommended",
    lambda1: Lambda1 = 1.0,
    lambda2: Lambda2 = 0.0,
    stats: Statistics = None,
    no_guard: NoGuard = False,
    scoring: Annotated[
        Scoring,
        {
            "min_tokens": Help(
                "Experts that fewer tokens reach are pruned by magnitude [default: 64; paper: 1].",
                given=int,
                default=None,
            )
        },
    ],
    writing: Writing,
    io: Io = "auto",
    cluster: Cluster,
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
    engine, paper = Engine.of(cluster), preset == "paper"
    _check(sparsity, expert_ratio, preset, scoring.also)
    if scoring.min_tokens is None:
        scoring = replace(scoring, min_tokens=1 if paper else 64)
    everything = replace(scoring, also=",".join(beside.KINDS)) if paper else scoring
    zeroing = Zeroing(method=second, sparsity=Fraction(0), weighted=not paper, scoring=everything)
    check_options(zeroing)
    unused = idle(zeroing) if expert_ratio != "auto" else ()  # auto judges on data, whatever zeroes
    source = Model.open(model)
    recipe = StunRecipe(
        source=source, sparsity=Fraction(str(sparsity)), preset=preset, lambda1=lambda1, lambda2=lambda2,
        stats=stats or None, no_guard=no_guard, zeroing=zeroing, dry_run=writing.dry_run,
    )  # fmt: skip
    asked = {
        "sparsity": sparsity, "expert_ratio": expert_ratio, "second": second, "preset": preset, "lambda1": lambda1,
        "lambda2": lambda2, "stats": recipe.stats, "no_guard": no_guard, **scoring.record(), "save": writing.save,
    }  # fmt: skip
    request = Request(
        command="stun", path=model, out=Path(out), options=asked, writing=writing, io=io, engine=engine,
        on_progress=on_progress,
    )  # fmt: skip
    request.check(source.checkpoint)
    kept = recipe.kept(expert_ratio)
    splits = []
    if expert_ratio == "auto":
        splits = search(recipe, kept, request.out.parent, on_progress)
        kept = [min(splits, key=lambda s: s["loss"])["experts"]]
    decision, options = recipe.plan(kept[0], on_progress)
    plan, notes = decision.plan, decision.notes
    if splits:
        plan = replace(plan, budget=plan.budget | {"splits": splits})
        notes += (SPLITS_HERE,) if engine.spread else ()
    decision = replace(decision, plan=plan, notes=(*notes, *unused))
    return execute(source, decision, request, prepare=prepared(options, source, plan, request))
