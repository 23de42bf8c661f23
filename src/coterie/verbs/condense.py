"""`coterie condense`: chosen MoE layers become small dense ones, the same for every token.

Measures the experts, chooses those that stay on and their gates, chooses the layers (unless they are named), and
executes the plan. Everything is decided before anything is written.
"""

from __future__ import annotations

from pathlib import Path

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
    original = Model.open(model)
    files = calibration_files(data)
    options = Condensing(
        layers=layers, layer_ids=parse_ids(layer_ids), keep=keep, select=select, layer_search=layer_search,
        calibration=Calibration(data=files, samples=samples, seq_len=seq_len, seed=seed), dtype=dtype,
    )  # fmt: skip
    check_options(options)
    request = Request(
        command="condense", path=model, out=Path(out),
        options=flat(options) | {"data": {name: str(file) for name, file in files.items()}, "save": save},
        writing=Writing(save=save, dry_run=dry_run, resume=resume, overwrite=overwrite), io=io, on_progress=on_progress,
    )  # fmt: skip
    request.check(original.checkpoint)
    target = target_type(original, options.layers, options.layer_ids)
    source = converted(original, target)
    keep, notes = check_model(source, options)
    by_domain, said = ({}, []) if dry_run or layers == 0 else _samples(source, options)
    notes += [*said, *_unused(options)]
    _announce(original, source, options)
    if dry_run:
        size_only = "a dry run computes sizes; which layers, experts and gates comes from data"
        decision = Decision(_size_plan(source, options, keep, target), (size_only,))
    else:
        decision = decide(source, options, keep, target, by_domain, Path(out).parent, on_progress)
    findings = dict(decision.findings)
    if target:
        findings["converted"] = {"from": original.checkpoint.config["model_type"], "to": target}
    return execute(source, Decision(decision.plan, (*notes, *decision.notes), findings), request)
