"""`coterie merge`: experts that do alike become one, their weighted mean; the plan is written and executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from coterie.decide.merging import Merging, check_options, decided
from coterie.decide.pruning import Remaining
from coterie.edits.execution import Request, Writing, execute
from coterie.edits.saving import savable
from coterie.forward.data import calibration_files
from coterie.forward.samples import Calibration, Data
from coterie.model.layer import Model
from coterie.model.stats import parse_weights
from coterie.storage.record import Progress, Report, no_progress


@savable
def merge(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "hc-smoe",
    ratio: float | None = None,
    experts: int | None = None,
    router: str = "mean",
    align: bool = False,
    stats: str | Path | None = None,
    weights: str | Mapping[str, float] | None = None,
    data: Data = (),
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    dtype: str = "auto",
    save: str = "dense",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Progress = no_progress,
) -> Report:
    """Merges the routed experts of every layer into E - `floor(ratio * E)` (default 0.25), or into `experts`.

    A cluster becomes sum_i f_i W_i / sum_i f_i, f_i the calibration tokens routed to expert i; so do its router rows.
    method: hc-smoe (by mean outputs, which takes every expert on every token) or m-smoe (by router logits).
    router: mean, which stock software loads, or alias: the router stays as it is, and the rows of a cluster lead to its
    one expert, as published; only `coterie.load` reads that.
    align: put each member's neurons in the order that is nearest to the most used member's before averaging.
    stats: a file that `collect` wrote of this model with `merging`, instead of data.
    weights: how often each domain counts, as "code=2,chat=0.5" or a dictionary (default 1).
    data, samples, seq_len, seed, dtype: what to measure on, as in `collect`.
    save: dense, or sparse: zeros take one bit each (see `pack`).
    dry_run: measure, decide and report; nothing is written.
    Raises: CoterieError, before anything is written.
    """
    files = calibration_files(data)
    options = Merging(
        method=method, remaining=Remaining(ratio=ratio, experts=experts), router=router, align=align,
        stats=None if stats is None else str(stats), weights=parse_weights(weights),
        calibration=Calibration(data=files, samples=samples, seq_len=seq_len, seed=seed), dtype=dtype,
    )  # fmt: skip
    check_options(options)
    request = Request(
        command="merge", path=model, out=Path(out), options=options.record() | {"save": save},
        writing=Writing(save=save, dry_run=dry_run, resume=resume, overwrite=overwrite), on_progress=on_progress,
    )  # fmt: skip
    source = Model.open(model)
    request.check(source.checkpoint)
    return execute(source, decided(source, options, request.out.parent, on_progress), request)
