"""Remove experts: those that do least on your data (REAP), or without data those that router rows find alike (STUN).

Example: coterie prune MODEL OUT --ratio 0.25 --data code=code.txt --data prose=prose.txt
"""

from __future__ import annotations

from pathlib import Path

from coterie.decide.experts import decided
from coterie.decide.pruning import Pruning, check_options
from coterie.edits.execution import InPlace, Io, Request, Writing, execute
from coterie.edits.saving import savable
from coterie.engine import Cluster, Engine
from coterie.model.layer import Model
from coterie.options import ModelPath, OutPath, public
from coterie.pages.terminal import show_report as show
from coterie.storage.copying import check_io
from coterie.storage.record import Progress, Report, no_progress

__all__ = ["prune", "show"]


@public
@savable(makes_zeros=False)
def prune(
    model: ModelPath,
    out: OutPath,
    *,
    pruning: Pruning,
    writing: Writing,
    io: Io = "auto",
    cluster: Cluster,
    in_place: InPlace = False,
    on_progress: Progress = no_progress,
) -> Report:
    """Removes `floor(ratio * E)` routed experts per layer (default 0.25), or all but `experts`, by a method.

    method: reap where there are data or stats; without them, or where an option shapes it, stun. Or another criterion
    of statistics (frequency, ean, man, msan, mone), of outputs (naee, naee-greedy), of an earlier checkpoint
    (router-norm-change), or a control (random, first, router-norm, weight-norm).
    data, samples, seq_len, seed, dtype: what is measured first, as in `collect`. Criteria decide by it; of two experts
    that stun finds alike, the one more used stays. naee runs every expert on it (without data, on texts that ship).
    seed is also of random.
    stats: a file that `collect` wrote of this model, instead of data. naee knows super experts from it.
    weights: how often each domain counts, as "code=2,chat=0.5" or a dictionary (default 1).
    no_guard: super experts, whose outputs hold extreme values, may go like others. They are known from data or stats
    alone: without, none is guarded (the report's `guard` says so).
    removed: remove (experts go with their router rows, as if they had never been; the default), or, in our own layout,
    where routers stay as they are: null (a token that chose a removed expert gets nothing from it) or constant (it gets
    the expert's mean output over the calibration tokens routed to it, weighted as the expert would be: read from stats;
    the default of mone). Then neither top-k nor routing groups bind how many experts stay, and layers that calibration
    does not see stay whole.
    base: the checkpoint before fine-tuning, for router-norm-change, which knows super experts from stats if given.
    drop_mtp: leave multi-token-prediction layers out instead of cutting them like the others.
    save: dense, or sparse: zeros take one bit each (see `pack`).
    dry_run: decide and report; nothing is written. stun then reads headers and routers (and data or stats) alone.

    The rest shapes stun:
    budget: uniform (the same count everywhere) or global (one height cuts all layers' dendrograms).
    linkage: complete, or official (the published program's rules); threshold is where its search starts.
    distance: router rows' distance over ||W||_F (frobenius) or as it is (raw).
    kappa: a layer left with fewer clusters than this gets their means instead of representatives.
    min_experts: no layer keeps fewer under a global budget (default: top-k).
    non_uniform: what becomes of unequal counts: round, refuse, or write them in our own layout (coterie).
    lambda1, lambda2: the weights of the router rows' distance and of co-activation (needs data or stats) in its
    distance.
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    engine: local, or ray: the machines of a Ray cluster copy the bytes. What goes is decided here.
    ray_address: HOST:PORT of a cluster, or auto; without it one is started on this machine. All nodes have to see MODEL
    and OUT under the driver's paths. Not recorded: the bytes are the same.
    in_place: MODEL's own files become OUT's, one after the other, so that the disk needs room for one file at most, and
    MODEL is no more. On ext4 and XFS files are cut where they are, in milliseconds. A killed run can only be completed
    (resume), not undone.
    Raises: CoterieError, before anything is written.
    """
    check_options(pruning)
    check_io(io)
    request = Request(
        command="prune", path=model, out=Path(out), options=pruning.record() | {"save": writing.save}, writing=writing,
        io=io, engine=Engine.of(cluster), in_place=in_place, on_progress=on_progress,
    )  # fmt: skip
    if report := request.gone_on():
        return report
    source = Model.open(model)
    request.check(source.checkpoint)
    decision = decided(source, pruning, dry_run=writing.dry_run, spill=request.out.parent, on_progress=on_progress)
    return execute(source, decision, request)
