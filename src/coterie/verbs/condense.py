"""CD-MoE: turn MoE layers into small dense ones: the shared expert and a few experts, always on.

Example: coterie condense MODEL OUT --layers 9 --data prose=prose.txt
"""

from __future__ import annotations

from pathlib import Path

from coterie.decide.condense import decided
from coterie.decide.condensing import Condensing, check_options, target_type
from coterie.edits.execution import Io, Request, Writing, execute
from coterie.edits.kinds.convert import converted
from coterie.edits.saving import savable
from coterie.model.layer import Model
from coterie.model.stored import in_floats
from coterie.options import ModelPath, OutPath, flat, public
from coterie.pages.terminal import show_report as show
from coterie.storage.record import Progress, Report, no_progress

__all__ = ["condense", "show"]


@public
@savable()
def condense(
    model: ModelPath,
    out: OutPath,
    *,
    condensing: Condensing,
    writing: Writing,
    io: Io = "auto",
    on_progress: Progress = no_progress,
) -> Report:
    """Replaces MoE layers by dense MLPs: the shared expert and `keep` routed ones, always on, with constant gates.

    layers: how many, searched for; or layer_ids: which, as decoder indices. `layers=0` only repackages a model whose
    type no stock class reads (deepseek).
    keep: experts of each condensed layer (default: the model's top-k); 0 keeps the shared expert alone.
    select: least-squares (gates and experts fitted to the layers' outputs), official (CD-MoE as published) or routing
    (the experts that the router gives most weight).
    layer_search: greedy (the default), one-shot or beam; judged by the divergence of logits on held-out samples, or,
    for official, of the last hidden states.
    samples: sequences in all (default 128; official 100).
    save: dense, or sparse: zeros take one bit each (see `pack`).
    dry_run: sizes only: layers, experts and gates come from data, so they stay open.
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    Raises: CoterieError, before anything is written.
    """
    original = Model.open(model)
    check_options(condensing)
    request = Request(
        command="condense", path=model, out=Path(out),
        options=flat(condensing) | {"data": condensing.calibration.named, "save": writing.save},
        writing=writing, io=io, on_progress=on_progress,
    )  # fmt: skip
    request.check(original.checkpoint)
    target = target_type(original, condensing.layers, condensing.layer_ids)
    source = in_floats(converted(original, target))
    return execute(source, decided(original, source, target, condensing, request), request)
