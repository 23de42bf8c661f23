"""Merge experts that do alike into their weighted mean: HC-SMoE or M-SMoE.

Example: coterie merge MODEL OUT --experts 24 --data prose=prose.txt
"""

from __future__ import annotations

from pathlib import Path

from coterie.decide.merging import Merging, check_options, decided
from coterie.edits.execution import Request, Writing, execute
from coterie.edits.saving import savable
from coterie.model.layer import Model
from coterie.options import ModelPath, OutPath, public
from coterie.pages.terminal import show_report as show
from coterie.storage.record import Progress, Report, no_progress

__all__ = ["merge", "show"]


def no_stock_layout(*, merging: Merging, **_: object) -> str:
    """Why what is asked for cannot be packed; nothing where it can."""
    own = "--router alias is written in our own layout, which cannot be packed"
    return own if merging.router == "alias" else ""


@public
@savable(makes_zeros=False, obstacle=no_stock_layout)
def merge(
    model: ModelPath, out: OutPath, *, merging: Merging, writing: Writing, on_progress: Progress = no_progress
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
    check_options(merging)
    request = Request(
        command="merge", path=model, out=Path(out), options=merging.record() | {"save": writing.save}, writing=writing,
        on_progress=on_progress,
    )  # fmt: skip
    source = Model.open(model)
    request.check(source.checkpoint)
    return execute(source, decided(source, merging, request.out.parent, on_progress), request)
