"""`coterie prune`: choose the experts that stay, write the plan, execute it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from coterie.decide.experts import decided
from coterie.decide.pruning import Pruning, Remaining, check_options
from coterie.edits.execution import Request, Writing, execute
from coterie.edits.saving import savable
from coterie.engine import Engine
from coterie.forward.data import calibration_files
from coterie.forward.samples import Calibration, Data
from coterie.methods.prune import stun
from coterie.model.layer import Model
from coterie.model.stats import parse_weights
from coterie.storage.copying import check_io
from coterie.storage.record import Progress, Report, no_progress


@savable
def prune(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "stun",
    ratio: float | None = None,
    experts: int | None = None,
    budget: str = "uniform",
    linkage: str = "complete",
    distance: str = "frobenius",
    kappa: int = stun.MERGE_BELOW,
    min_experts: int | None = None,
    non_uniform: str = "round",
    threshold: float = 0.5,
    seed: int = 0,
    drop_mtp: bool = False,
    lambda1: float = 1.0,
    lambda2: float = 0.0,
    stats: str | Path | None = None,
    weights: str | Mapping[str, float] | None = None,
    no_guard: bool = False,
    base: str | Path | None = None,
    data: Data = (),
    samples: int = 128,
    seq_len: int = 2048,
    dtype: str = "auto",
    removed: str | None = None,
    save: str = "dense",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    engine: str = "local",
    ray_address: str | None = None,
    in_place: bool = False,
    on_progress: Progress = no_progress,
) -> Report:
    """Removes `floor(ratio * E)` routed experts per layer (default 0.25), or all but `experts`, by a method.

    method: stun (the default), a criterion of statistics (reap, frequency, ean, man, msan, mone), of outputs (naee,
    naee-greedy), of an earlier checkpoint (router-norm-change), or a control (random, first, router-norm, weight-norm).
    stats: a file that `collect` wrote of this model. Criteria of statistics need it; of two experts that stun finds
    alike, the one more used stays; naee knows super experts from it.
    weights: how often each domain counts, as "code=2,chat=0.5" or a dictionary (default 1).
    no_guard: super experts, whose outputs hold extreme values, may go like others. They are known from stats alone:
    without, none is guarded (the report's `guard` says so).
    removed: remove (experts go with their router rows, as if they had never been; the default), or, in our own layout,
    where routers stay as they are: null (a token that chose a removed expert gets nothing from it) or constant (it gets
    the expert's mean output over the calibration tokens routed to it, weighted as the expert would be; the default of
    mone). Then neither top-k nor routing groups bind how many experts stay, and layers that calibration does not see
    stay whole.
    base: the checkpoint before fine-tuning, for router-norm-change, which knows super experts from stats if given.
    data, samples, seq_len, seed, dtype: what naee runs every expert on, as in `collect`; seed is also of random.
    drop_mtp: leave multi-token-prediction layers out instead of cutting them like the others.
    save: dense, or sparse: zeros take one bit each (see `pack`).
    dry_run: decide and report; nothing is written. stun then reads headers and routers (and stats) alone.

    The rest shapes stun:
    budget: uniform (the same count everywhere) or global (one height cuts all layers' dendrograms).
    linkage: complete, or official (the published program's rules); threshold is where its search starts.
    distance: router rows' distance over ||W||_F (frobenius) or as it is (raw).
    kappa: a layer left with fewer clusters than this gets their means instead of representatives.
    min_experts: no layer keeps fewer under a global budget (default: top-k).
    non_uniform: what becomes of unequal counts: round, refuse, or write them in our own layout (coterie).
    lambda1, lambda2: the weights of the router rows' distance and of co-activation (needs stats) in its distance.
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    engine: local, or ray: the machines of a Ray cluster copy the bytes. What goes is decided here.
    ray_address: HOST:PORT of a cluster, or auto; without it one is started on this machine. All nodes have to see MODEL
    and OUT under the driver's paths. Not recorded: the bytes are the same.
    in_place: MODEL's own files become OUT's, one after the other, so that the disk needs room for one file at most, and
    MODEL is no more. On ext4 and XFS files are cut where they are, in milliseconds. A killed run can only be completed
    (resume), not undone.
    Raises: CoterieError, before anything is written.
    """
    where = Engine(engine, ray_address)
    files = data if isinstance(data, dict) else calibration_files(data)  # a dictionary's are checked when read
    options = Pruning(
        method=method, remaining=Remaining(ratio=ratio, experts=experts), budget=budget, linkage=linkage,
        distance=distance, kappa=kappa, min_experts=min_experts, non_uniform=non_uniform, threshold=threshold,
        seed=seed, drop_mtp=drop_mtp, lambda1=lambda1, lambda2=lambda2, stats=None if stats is None else str(stats),
        weights=parse_weights(weights), no_guard=no_guard, base=None if base is None else str(base),
        calibration=Calibration(data=files, samples=samples, seq_len=seq_len, seed=seed), dtype=dtype, removed=removed,
    )  # fmt: skip
    check_options(options)
    check_io(io)
    request = Request(
        command="prune", path=model, out=Path(out), options=options.record() | {"save": save},
        writing=Writing(save=save, dry_run=dry_run, resume=resume, overwrite=overwrite), io=io, engine=where,
        in_place=in_place, on_progress=on_progress,
    )  # fmt: skip
    if report := request.gone_on():
        return report
    source = Model.open(model)
    request.check(source.checkpoint)
    decision = decided(source, options, dry_run=dry_run, spill=Path(out).parent, on_progress=on_progress)
    return execute(source, decision, request)
