"""Drop whole MoE layers or decoder layers: the baselines that condensing is held against.

Example: coterie drop MODEL OUT --unit block --count 2 --data prose=prose.txt
"""

from __future__ import annotations

from pathlib import Path

from coterie.decide.condensing import target_type
from coterie.decide.drop import Dropping, check_options, decided
from coterie.edits.execution import Io, Request, Writing, execute
from coterie.edits.kinds.convert import converted
from coterie.edits.saving import savable
from coterie.model.layer import Model
from coterie.model.stored import in_floats
from coterie.options import ModelPath, OutPath, flat, public
from coterie.pages.terminal import show_report as show
from coterie.storage.record import Progress, Report, no_progress

__all__ = ["drop", "show"]


@public
@savable()
def drop(
    model: ModelPath,
    out: OutPath,
    *,
    dropping: Dropping,
    writing: Writing,
    io: Io = "auto",
    on_progress: Progress = no_progress,
) -> Report:
    """Removes `count` MoE blocks (unit "layer") or decoder layers (unit "block"): those that change least.

    Ranked by the mean cosine, over tokens, of the hidden states before and after: of h and h + MoE(norm(h)), or of a
    decoder layer's input and output. A dropped MoE block becomes a dense MLP of zeros, as narrow as configs allow.
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    save: dense, or sparse: zeros take one bit each (see `pack`).
    Raises: CoterieError, before anything is written.
    """
    original = Model.open(model)
    check_options(dropping)
    request = Request(
        command="drop", path=model, out=Path(out),
        options=flat(dropping) | {"data": dropping.calibration.named, "save": writing.save},
        writing=writing, io=io, on_progress=on_progress,
    )  # fmt: skip
    request.check(original.checkpoint)
    target = target_type(original, dropping.count) if dropping.unit == "layer" else None
    source = converted(original, target)
    source = in_floats(source) if dropping.unit == "layer" else source  # whose blocks become dense MLPs
    return execute(source, decided(original, source, target, dropping, request), request)
