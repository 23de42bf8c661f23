"""`coterie condense`: chosen MoE layers become small dense ones, the same for every token.

Measures the experts, chooses those that stay on and their gates, chooses the layers (unless they are named), and
executes the plan. Everything is decided before anything is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coterie.decide.condense import (
    Condensing,
    _announce,
    _samples,
    _size_plan,
    _unused,
    check_model,
    check_options,
    decide,
    parse_ids,
    target_type,
)
from coterie.edits.execution import execute
from coterie.edits.kinds.convert import converted
from coterie.edits.saving import savable
from coterie.forward.data import calibration_files
from coterie.forward.samples import Data
from coterie.model.layer import Model
from coterie.storage.copying import check_io
from coterie.storage.record import Progress, Report, Stopwatch, no_progress
from coterie.storage.writer import check_out


@savable
def condense(
    model: str | Path,
    out: str | Path,
    *,
    layers: int | None = None,
    layer_ids: list[int] | str | None = None,
    keep: int | None = None,
    select: str = "least-squares",
    layer_search: str | None = None,
    data: Data = (),
    samples: int | None = None,
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
    clock, original = Stopwatch(), Model.open(model)
    files = calibration_files(data)
    options = Condensing(layers, parse_ids(layer_ids), keep, select, layer_search, files, samples, seq_len, seed, dtype)
    check_options(options)
    check_io(io)
    check_out(Path(out), original.checkpoint.path, resume=resume, overwrite=overwrite)
    target = target_type(original, options)
    source = converted(original, target)
    keep, notes = check_model(source, options)
    by_domain, said = ({}, []) if dry_run or layers == 0 else _samples(source, options)
    notes += [*said, *_unused(options)]
    _announce(original, source, options)
    if dry_run:
        plan, findings = _size_plan(source, options, keep, target), dict[str, Any]()
        notes.append("a dry run computes sizes; which layers, experts and gates comes from data")
    else:
        plan, findings = decide(source, options, keep, target, by_domain, Path(out).parent, on_progress)
        notes += findings.pop("notes")
    if target:
        findings["converted"] = {"from": original.checkpoint.config["model_type"], "to": target}
    asked = vars(options) | {"data": {name: str(file) for name, file in files.items()}, "save": save}
    return execute(
        source, plan, Path(out), command="condense", path=model, options=asked,
        clock=clock, warnings=tuple(notes), dry_run=dry_run, resume=resume, overwrite=overwrite,
        io=io, on_progress=on_progress, findings=findings,
    )  # fmt: skip
