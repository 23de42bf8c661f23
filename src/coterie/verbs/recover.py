"""`coterie recover`: light fine-tuning of condensed layers, from the original's outputs or from text alone.

    local     each condensed MLP is fitted to its layer's MoE block in the original: the down projection in closed form,
              then all three matrices by gradient
    lm        the language modelling loss, as published
    distill   the divergence from the original's logits

Only the condensed MLPs change; every other tensor keeps its bytes. Rows and columns of zeros that pad an MLP to the
model's one dense width stay zero: their gradients are.
Source: CD-MoE, arXiv 2412.00069 (lm: only the condensed layers learn, AdamW, linear decay).
Deviates: float32 masters, no padding in the loss, no balancing loss of the layers that still route; the constant gates
are folded into the MLPs, and so learn with them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from coterie.decide.condense import parse_ids
from coterie.edits.execution import finished, left_behind, write
from coterie.edits.saving import savable
from coterie.errors import CoterieError
from coterie.forward.data import calibration_files
from coterie.forward.samples import Data
from coterie.model.loading import DTYPES
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.copying import check_io
from coterie.storage.record import Progress, Report, Stopwatch, no_progress, to_json, versions
from coterie.storage.steps import left_over
from coterie.storage.writer import Writer, check_out, partial_of
from coterie.train.trainee import STAGES, Job, Training, make_job, memory_bytes, num_trained


@savable
def recover(
    model: str | Path,
    out: str | Path,
    *,
    teacher: str | Path | None = None,
    data: Data = (),
    stage: str = "all",
    layer_ids: list[int] | str | None = None,
    steps: int = 200,
    lr: float | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    seq_len: int = 256,
    samples: int = 2048,
    seed: int = 0,
    dtype: str = "auto",
    save_every: int = 100,
    save: str = "dense",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
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
    clock, checkpoint = Stopwatch(), Checkpoint.open(model)
    options = Training(
        teacher=None if teacher is None else str(teacher), data=calibration_files(data), stage=stage,
        layer_ids=parse_ids(layer_ids), steps=steps, lr=lr, batch_size=batch_size, accumulate=accumulate,
        seq_len=seq_len, samples=samples, seed=seed, dtype=dtype,
    )  # fmt: skip
    check_options(options, save_every)
    check_io(io)
    check_out(Path(out), checkpoint.path, resume=resume, overwrite=overwrite)
    job = make_job(checkpoint, options)
    report = started(job, str(model), clock, dry_run=dry_run)
    report.options["save"] = save
    report.report["warnings"] += left_over(Path(out)) if save == "dense" else []
    if dry_run:
        return report
    if resume and Path(out).exists() and not partial_of(Path(out)).exists():
        return finished(Path(out), report)
    from coterie.train.course import STATE, Course

    course = Course(job, save_every, on_progress)
    report.report["warnings"] += course.notes
    identity = {"command": "recover", "options": report.options, "plan": report.plan, "source": checkpoint.hash}
    identity |= {"teacher": job.teacher.hash if job.teacher else ""}
    with Writer(Path(out), identity, resume=resume, io=io, replace=overwrite) as writer:
        write(writer, checkpoint, job.outputs, checkpoint.config, on_progress)
        report.plan.update(job.plan.as_dict())
        report.report.update(course.teach(writer))
        report.report.update(clock.read())
        report.report["io"] = writer.io
        report.report["warnings"] += writer.copier.notes
        writer.text("coterie.json", to_json(report.as_dict()))
        writer.text("README.md", card(checkpoint, report))
        (writer.partial / STATE).unlink(missing_ok=True)
        writer.finish({s: {o.name: o for o in os} for s, os in job.outputs.items()}, checkpoint.indexed)
    return report


# --- what was asked for ----------------------------------------------------------------------------------------


def check_options(options: Training, save_every: int = 1) -> None:
    """Raises: CoterieError for a value out of its range, or options that contradict or ignore each other."""
    if options.stage not in STAGES:
        raise CoterieError(f"--stage {options.stage!r}: unknown; expected one of {', '.join(STAGES)}")
    least = {"steps": 0 if options.stage == "local" else 1, "batch_size": 1, "accumulate": 1, "save_every": 1}
    for name, low in least.items():
        value = save_every if name == "save_every" else getattr(options, name)
        if type(value) is not int or value < low:
            raise CoterieError(f"--{name.replace('_', '-')} {value!r}: expected a whole number, at least {low}")
    if options.lr is not None and not (isinstance(options.lr, (int, float)) and 0 < options.lr < 1):
        raise CoterieError(f"--lr {options.lr!r}: expected a learning rate between 0 and 1, such as 1e-4")
    if options.dtype not in DTYPES or options.dtype == "float16":
        raise CoterieError(f"--dtype {options.dtype!r}: expected auto, float32 or bfloat16")
    if options.layer_ids is not None and options.stage != "lm":
        raise CoterieError("--layer-ids is for --stage lm alone: the other stages train what was condensed")
    if options.teacher is None and options.stage != "lm":
        raise CoterieError(f"--stage {options.stage}: needs --teacher, the model that was condensed; lm needs none")


# --- the record ------------------------------------------------------------------------------------------------


def started(job: Job, path: str, clock: Stopwatch, *, dry_run: bool) -> Report:
    """The report before training: sizes, which change nothing, and what will be trained."""
    model, checkpoint, teacher = job.model, job.model.checkpoint, job.teacher
    experts = {b.key: b.num_experts for b in model.main}
    same = len(set(experts.values())) <= 1
    size = {"parameters": checkpoint.num_parameters, "bytes": checkpoint.num_bytes}
    size |= {"experts": next(iter(experts.values()), 0) if same else experts}  # type: ignore[dict-item]
    options = vars(job.options) | {"data": {n: str(f) for n, f in job.options.data.items()}}
    return Report(
        command="recover",
        options=options,
        source={"path": path, "hash": None if dry_run else checkpoint.hash},
        plan=replace(job.plan, sparsity={}).as_dict(),
        report={
            "before": size, "after": size, "sparsity": {"experts": 0.0, "linears": 0.0, "all": 0.0},
            **clock.read(),
            "cold_experts": [],
            "warnings": [*job.notes, *left_behind(checkpoint)],
            "dry_run": dry_run,
            "recovered": {key: job.record[key] for key in ("command", "source") if key in job.record},
            "teacher": teacher and {"path": str(teacher.path), "hash": None if dry_run else teacher.hash},
            "trained": {
                "layers": sorted([*job.mlps, *job.blocks]),
                "tensors": job.tensors,
                "parameters": num_trained(job),
            },
            "memory_bytes": memory_bytes(job),
        },
        versions=versions(),
    )  # fmt: skip


def card(source: Checkpoint, report: Report) -> str:
    """README.md of the result: what was trained, and what it brought."""
    found = report.report
    names = list(dict.fromkeys(name for stage in found["stages"] for name in stage["after"]))
    rows = "\n".join(
        f"| {stage['stage']} | {' | '.join(f'{stage[side][n]:.4f}' for n in names for side in ('before', 'after'))} |"
        for stage in found["stages"]
    )
    heads = " | ".join(f"{name} {side}" for name in names for side in ("before", "after"))
    return f"""---
tags: [mixture-of-experts, compressed]
---
# {source.path.name}, recovered by `coterie recover`

Trained: layers {", ".join(map(str, found["trained"]["layers"]))}, {found["trained"]["parameters"]:,} of
{found["after"]["parameters"]:,} parameters; every other tensor is as it was in `{report.source["path"]}`
(fingerprint `{report.source["hash"][:16]}`). On held-out samples (nats per token; local: share of the layers' output):

| stage | {heads} |
|---|{"---|" * 2 * len(names)}
{rows}

`coterie.json` holds every option, decision and number.
The licence is the source model's.
"""
