"""STUN: redundant experts out, then zeros inside the rest, at one exact total.

Example: coterie stun MODEL OUT --sparsity 0.40 --data code=code.txt --data prose=prose.txt
"""

from __future__ import annotations

from pathlib import Path

from coterie.decide.stun import Stunning, check_options, decided
from coterie.decide.zeros import prepared
from coterie.edits.execution import Io, Request, Writing, execute
from coterie.edits.kinds.dequantise import dequantised, marked
from coterie.edits.plan import Plan
from coterie.edits.saving import savable
from coterie.engine import Cluster, Engine
from coterie.model.layer import Model
from coterie.options import ModelPath, OutPath, public
from coterie.pages.terminal import show_report as show
from coterie.storage.record import Progress, Report, no_progress

__all__ = ["show", "stun"]


@public
@savable()
def stun(
    model: ModelPath,
    out: OutPath,
    *,
    stunning: Stunning,
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
    dry_run: headers, routers, data and stats are read, experts are not (auto: the model runs). Of three or more experts
    alike the tie rule then says who stays; zeros, and the bytes that packing makes of them, follow from their number.
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    engine: local, or ray: experts are pruned and bytes copied by the machines of a Ray cluster.
    ray_address: HOST:PORT of a cluster, or auto; without it one is started on this machine. All nodes have to see MODEL
    and OUT under the driver's paths. Not recorded: the bytes are the same.
    Raises: CoterieError, before anything is written.
    """
    engine = Engine.of(cluster)
    check_options(stunning)
    source = Model.open(model)
    request = Request(
        command="stun", path=model, out=Path(out), options=stunning.record() | {"save": writing.save},
        writing=writing, io=io, engine=engine, on_progress=on_progress,
    )  # fmt: skip
    request.check(source.checkpoint)
    source = dequantised(source, marked(source, Plan({}), request.options))
    decision, zeroing = decided(source, stunning, request)
    plan = marked(source, decision.plan, request.options)
    return execute(source, decision, request, prepare=prepared(zeroing, source, plan, request))
