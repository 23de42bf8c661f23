"""`coterie drop`: the published baselines that condensing is measured against.

A layer's MoE block goes where it changes the hidden states least (its dense MLP gives zero), or a whole decoder layer.
Source: He et al., Demystifying the Compression of Mixture-of-Experts, arXiv 2406.02500 (layer drop and block drop).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.decide.condense import Condensing, target_type
from coterie.edits.execution import execute
from coterie.edits.kinds.convert import converted
from coterie.edits.saving import savable
from coterie.forward.data import calibration_files
from coterie.forward.samples import Data
from coterie.model.layer import Model
from coterie.storage.copying import check_io
from coterie.storage.record import Progress, Report, Stopwatch, no_progress
from coterie.storage.writer import check_out

if TYPE_CHECKING:
    pass
from coterie.decide.drop import Dropping, check_kinds, check_model, check_options, make_plan, rank


@savable
def drop(
    model: str | Path,
    out: str | Path,
    *,
    unit: str = "layer",
    count: int = 1,
    data: Data = (),
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    dtype: str = "auto",
    save: str = "dense",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    on_progress: Progress = no_progress,
) -> Report:
    """Removes `count` MoE blocks (unit "layer") or decoder layers (unit "block"): those that change least.

    Ranked by the mean cosine, over tokens, of the hidden states before and after: of h and h + MoE(norm(h)), or of a
    decoder layer's input and output. A dropped MoE block becomes a dense MLP of zeros, as narrow as configs allow.
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    save: dense, or sparse: zeros take one bit each (see `pack`).
    Raises: CoterieError, before anything is written.
    """
    clock, original = Stopwatch(), Model.open(model)
    files = calibration_files(data)
    options = Dropping(unit, count, files, samples, seq_len, seed, dtype)
    check_options(options)
    check_io(io)
    check_out(Path(out), original.checkpoint.path, resume=resume, overwrite=overwrite)
    target = target_type(original, Condensing(layers=count)) if unit == "layer" else None
    source = converted(original, target)
    candidates = check_model(source, options)
    findings: dict[str, Any] = {"converted": {"from": original.checkpoint.config["model_type"], "to": target}}
    findings = findings if target else {}
    if dry_run:
        plan = make_plan(source, options, candidates, target)
        notes = ["a dry run computes sizes; which layers go comes from data"]
    else:
        order, found, notes = rank(source, options, candidates, Path(out).parent, on_progress)
        plan, findings = make_plan(source, options, order, target), findings | found
    check_kinds(source, plan)
    asked = vars(options) | {"data": {name: str(file) for name, file in files.items()}, "save": save}
    return execute(
        source, plan, Path(out), command="drop", path=model, options=asked,
        clock=clock, warnings=tuple(notes), dry_run=dry_run, resume=resume, overwrite=overwrite,
        io=io, on_progress=on_progress, findings=findings,
    )  # fmt: skip
