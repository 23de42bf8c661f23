"""Fine-tune the condensed layers, and nothing else.

Example: coterie recover OUT OUT2 --teacher MODEL --data prose=prose.txt
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from coterie.edits.execution import Io, Request, Writing, finished, left_behind, one_or_all, write
from coterie.edits.saving import savable
from coterie.options import Help, flat, public
from coterie.pages.terminal import show_report as show
from coterie.storage.card import card, source_of
from coterie.storage.card import public as public_of
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.folders import left_over
from coterie.storage.record import Progress, Report, no_progress, to_json, versions
from coterie.storage.writer import Writer
from coterie.train.trainee import Trainee, Training, check_options, compute_dtype, memory_bytes, num_trained, trainee_of

__all__ = ["recover", "show"]


@public
@savable(makes_zeros=False)
def recover(
    model: Annotated[str | Path, Help("A folder that `coterie condense` wrote.", "OUT", given=str)],
    out: Annotated[str | Path, Help("The folder to write; must not exist.", "OUT2", given=Path)],
    *,
    training: Training,
    save_every: Annotated[int, Help("Steps between two states that --resume goes on from.")] = 100,
    writing: Writing,
    io: Io = "auto",
    on_progress: Progress = no_progress,
) -> Report:
    """Trains the condensed layers of MODEL a little, and nothing else.

    teacher: the original; stage lm needs none, and only measures the divergence from it.
    stage: all (local, then distill), local, lm or distill.
    layer_ids: with stage lm, these layers of any model instead: their dense MLPs, or all routed experts and the shared
    one (routers stay); so the uncompressed model can be given the same fine-tuning.
    steps, lr: optimiser steps of each stage, and their highest learning rate (default: 0.25 over the hidden size, 1e-3
    at most); `stage="local", steps=0` is the closed form alone.
    batch_size, accumulate: each step takes batch_size x accumulate samples, batch_size of them at a time.
    samples, seq_len, seed: as elsewhere; every 8th sample is held out, and measured before and after each stage.
    dtype: to compute in: auto (bfloat16 where weights are stored so and the processor has it, else float32), float32
    or bfloat16. Masters are float32.
    save_every: steps between saved states in OUT.partial, from which `resume` goes on.
    save: dense, or sparse: zeros take one bit each (see `pack`).
    Both models stand in memory whole, with 16 bytes for every weight that is trained; see `memory_bytes` of the report.
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    Raises: CoterieError, before anything is written; later only where the loss becomes infinite, or the disk is full.
    """
    checkpoint = Checkpoint.open(model)
    check_options(training, save_every)
    request = Request(
        command="recover", path=model, out=Path(out), options=flat(training) | {"data": training.calibration.named},
        writing=writing, io=io, on_progress=on_progress,
    )  # fmt: skip
    request.check(checkpoint)
    trainee = trainee_of(checkpoint, training)
    report = started(trainee, request)
    if writing.dry_run:
        return report
    if request.is_complete:
        return finished(request.out, report)
    from coterie.train.course import STATE, Course

    course = Course(trainee, save_every, on_progress)
    report.report["warnings"] += course.notes
    identity = {"command": "recover", "options": report.options, "plan": report.plan, "source": checkpoint.hash}
    identity |= {"teacher": trainee.teacher.hash if trainee.teacher else "", "dtype": compute_dtype(trainee)}
    with Writer(request.out, identity, resume=writing.resume, io=io, replace=writing.overwrite) as writer:
        write(writer, checkpoint, trainee.outputs, {"config.json": to_json(checkpoint.config)}, on_progress)
        report.plan.update(trainee.plan.as_dict())
        report.report.update({**course.teach(writer), **request.clock.read()})
        report.report["io"] = writer.io
        report.report["warnings"] += writer.copier.notes
        writer.text("coterie.json", to_json(report.as_dict()))
        writer.text("README.md", card(checkpoint.path, report, checkpoint.config, measured(report)))
        (writer.partial / STATE).unlink(missing_ok=True)
        writer.finish()
    return report


# --- the record ------------------------------------------------------------------------------------------------


def started(trainee: Trainee, request: Request) -> Report:
    """The report before training: sizes, which change nothing, and what will be trained."""
    model, checkpoint, teacher = trainee.model, trainee.model.checkpoint, trainee.teacher
    experts = one_or_all({b.key: b.num_experts for b in model.main})
    size = {"parameters": checkpoint.num_parameters, "bytes": checkpoint.num_bytes, "experts": experts}
    writing, notes = request.writing, [*trainee.notes, *left_behind(checkpoint)]
    notes += left_over(request.out) if writing.save == "dense" else []
    said_of = public_of if writing.public else dict
    return Report(
        command="recover",
        options=said_of(request.options | {"save": writing.save}),
        source=said_of(source_of(request.path, checkpoint.path, None if writing.dry_run else checkpoint.hash)),
        plan=replace(trainee.plan, sparsity={}).as_dict(),
        report={
            "before": size, "after": size, "sparsity": {"experts": 0.0, "linears": 0.0, "all": 0.0},
            **request.clock.read(),
            "cold_experts": [],
            "warnings": notes,
            "dry_run": writing.dry_run,
            "recovered": {key: trainee.record[key] for key in ("command", "source") if key in trainee.record},
            "teacher": teacher and {"path": str(teacher.path), "hash": None if writing.dry_run else teacher.hash},
            "trained": {
                "layers": sorted([*trainee.mlps, *trainee.blocks]),
                "tensors": trainee.tensors,
                "parameters": num_trained(trainee),
            },
            "memory_bytes": memory_bytes(trainee),
        },
        versions=versions(),
    )  # fmt: skip


def measured(report: Report) -> str:
    """For README.md: what was trained, and what it brought."""
    found = report.report
    names = list(dict.fromkeys(name for stage in found["stages"] for name in stage["after"]))
    rows = "\n".join(
        f"| {stage['stage']} | {' | '.join(f'{stage[side][n]:.4f}' for n in names for side in ('before', 'after'))} |"
        for stage in found["stages"]
    )
    heads = " | ".join(f"{name} {side}" for name in names for side in ("before", "after"))
    return f"""
Trained: layers {", ".join(map(str, found["trained"]["layers"]))}, {found["trained"]["parameters"]:,} of
{found["after"]["parameters"]:,} parameters; every other tensor is as it was. On held-out samples (nats per token;
local: share of the layers' output):

| stage | {heads} |
|---|{"---|" * 2 * len(names)}
{rows}
"""
