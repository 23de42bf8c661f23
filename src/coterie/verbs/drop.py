"""`coterie drop`: the published baselines that condensing is measured against.

A layer's MoE block goes where it changes the hidden states least (its dense MLP gives zero), or a whole decoder layer.
Source: He et al., Demystifying the Compression of Mixture-of-Experts, arXiv 2406.02500 (layer drop and block drop).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie.decide.condense import target_type
from coterie.decide.drop import Dropping, check_kinds, check_model, check_options, decided, make_plan
from coterie.edits.convert import converted
from coterie.edits.execution import Request, Writing, execute
from coterie.edits.plan import Decision
from coterie.edits.saving import savable
from coterie.forward.data import calibration_files
from coterie.forward.samples import Calibration, Data
from coterie.model.layer import Model
from coterie.options import flat
from coterie.storage.record import Progress, Report, no_progress


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
    original = Model.open(model)
    files = calibration_files(data)
    calibration = Calibration(data=files, samples=samples, seq_len=seq_len, seed=seed)
    options = Dropping(unit=unit, count=count, calibration=calibration, dtype=dtype)
    check_options(options)
    request = Request(
        command="drop", path=model, out=Path(out),
        options=flat(options) | {"data": {name: str(file) for name, file in files.items()}, "save": save},
        writing=Writing(save=save, dry_run=dry_run, resume=resume, overwrite=overwrite), io=io, on_progress=on_progress,
    )  # fmt: skip
    request.check(original.checkpoint)
    target = target_type(original, count) if unit == "layer" else None
    source = converted(original, target)
    candidates = check_model(source, options)
    findings: dict[str, Any] = {"converted": {"from": original.checkpoint.config["model_type"], "to": target}}
    findings = findings if target else {}
    if dry_run:
        said = "a dry run computes sizes; which layers go comes from data"
        decision = Decision(make_plan(source, options, candidates, target), (said,))
    else:
        decision = decided(source, options, candidates, target, request.out.parent, on_progress)
    check_kinds(source, decision.plan)
    return execute(source, replace(decision, findings=findings | decision.findings), request)
