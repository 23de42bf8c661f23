"""Carries out a plan: checks, sizes, bytes, record. What every verb that writes a checkpoint ends in.

Kept experts are copied verbatim, never decoded: memory stays flat whatever the model's size. Everything that a
plan could get wrong is checked before a byte is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from coterie.edits.counts import count, removed_shares
from coterie.edits.outputs import check_plan, experts_left, patched_config, plan_outputs, planned, sealed, with_holes
from coterie.edits.plan import Plan, kinds, read_plan
from coterie.engine import Engine
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.storage.checkpoint import PICKLES, Checkpoint, Tensor, leads_outside, load_json
from coterie.storage.copying import check_io
from coterie.storage.in_place import Recipe, consume
from coterie.storage.movers import mover
from coterie.storage.planned import root
from coterie.storage.record import Progress, Report, Stopwatch, model_card, no_progress, to_json, versions
from coterie.storage.steps import left_over
from coterie.storage.writer import Output, Writer, check_out, num_copied, partial_of, tidy

logger = logging.getLogger(__name__)

COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
MAX_COPIED = 2**30  # bytes of a file that travels along; a sparse one can claim any size
OURS = ("coterie.json", "coterie.log", "README.md", "report.html")


def execute(
    model: Model,
    plan: Plan,
    out: Path,
    *,
    command: str,
    path: str | Path,
    options: dict[str, Any],
    clock: Stopwatch,
    warnings: tuple[str, ...] = (),
    aloud: str = "",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    engine: Engine | None = None,
    in_place: bool = False,
    on_progress: Progress = no_progress,
    prepare: Prepare | None = None,
    findings: dict[str, Any] | None = None,
) -> Report:
    """Checks the plan against the checkpoint, writes OUT (unless dry_run), and reports.

    findings: what the decision measured, for the report.
    aloud: what must be known before the work begins, if nothing is refused.
    prepare: given the model as planned, checks everything and returns what changes its weights once they are written.
    engine: where units of work run; not part of what a resume must repeat, since the bytes are the same.
    in_place: MODEL's files become OUT's (`in_place.py`).
    """
    checkpoint, engine = model.checkpoint, engine or Engine()
    check_io(io)
    check_out(out, checkpoint.path, resume=resume, overwrite=overwrite)
    check_plan(model, plan)
    plan = sealed(model, plan)
    outputs = plan_outputs(model, plan)
    numbers, notes = _numbers(model, plan, outputs), [*warnings, *left_behind(checkpoint)]
    notes += left_over(out) if options.get("save") == "dense" else []
    view = planned(model, plan, outputs) if prepare else model
    fill = prepare(view) if prepare else None
    report = Report(
        command=command,
        options=options,
        # A dry run reads headers and routers only; the fingerprint reads a few blocks of every shard.
        source={"path": str(path), "hash": None if dry_run else checkpoint.hash},
        plan=plan.as_dict(),
        report={
            **numbers,
            **clock.read(),
            "cold_experts": [],
            "warnings": notes,
            "dry_run": dry_run,
            **(findings or {}),
        },
        versions=versions(),
    )
    if aloud:
        logger.warning(aloud)
    if in_place:
        recipe = Recipe.of(checkpoint, outputs, report, out)
        notes.append(recipe.note)
        if not dry_run:
            small = partial(_write_small, checkpoint=checkpoint, config=patched_config(model, plan))
            return consume(recipe, out, clock, resume=resume, prepare=small, on_progress=on_progress)
    if dry_run:
        return report
    identity = {"command": command, "options": options, "plan": report.plan, "source": checkpoint.hash}
    if resume and out.exists() and not partial_of(out).exists():
        return finished(out, report)
    if fill:
        outputs = with_holes(outputs, view)
    with engine.connected(), Writer(out, identity, resume=resume, io=io, replace=overwrite) as writer:
        with engine.opened(writer.partial):
            if engine.spread:
                writer.move = mover(engine, writer.copier, root(checkpoint))
            write(writer, checkpoint, outputs, patched_config(model, plan), on_progress)
            filled = fill(writer) if fill else None
        report.report["io"] = writer.io
        notes += [*writer.copier.notes, *engine.notes]
        if engine.spread:
            report.report["engine"] = engine.summary
        if filled:
            report.plan.update(replace(plan, sparsity=filled.sparsity).as_dict())
            report.report.update(filled.report | _numbers(model, plan, outputs, filled.zeros))
            notes += filled.notes
        report.report.update(clock.read())
        writer.text("coterie.json", to_json(report.as_dict()))
        writer.text("README.md", model_card(checkpoint.path.name, report))
        writer.finish({s: {o.name: o for o in os} for s, os in outputs.items()}, checkpoint.indexed)
    return report


@dataclass(frozen=True)
class Filled:
    """What became of the weights: shares of zeros by layer and role, zeros by the report's bases, and more for it."""

    sparsity: dict[str, dict[str, float]]
    zeros: dict[str, int]  # by the bases of `report.count`
    report: dict[str, Any]
    notes: list[str]


Fill = Callable[[Writer], Filled]
Prepare = Callable[[Model], Fill]


def finished(out: Path, asked: Report) -> Report:
    """The report of a complete OUT, if it is what was asked for; then what a killed run left in it goes."""
    found = load_json(out / "coterie.json")
    wanted = {key: value for key, value in asked.as_dict().items() if key in ("command", "options", "plan")}
    same = wanted == {key: _without_zeros(found.get(key)) if key == "plan" else found.get(key) for key in wanted}
    record = {key: found[key] for key in ("source", "report", "versions") if isinstance(found.get(key), dict)}
    if not same or len(record) < 3 or record["source"].get("hash") != asked.source["hash"]:
        raise CoterieError(f"{out}: is complete, but was made with another source, plan or option; choose another OUT")
    if not _readable(record["report"], asked.report):
        raise CoterieError(f"{out / 'coterie.json'}: its report is damaged; start anew with --overwrite")
    tidy(out)
    return Report(asked.command, asked.options, plan=found["plan"], **record)


def _readable(found: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a recorded report holds, in kind, what is shown of one."""
    shown = ("before", "after", "sparsity", "seconds", "peak_rss_bytes", "cold_experts", "warnings")
    kurtosis = found.get("kurtosis", {})
    if type(found.get("expert_zeros", 0)) is not int or not isinstance(kurtosis, dict):
        return False
    numbers = all(isinstance(value, int | float | None) for value in kurtosis.values())
    return numbers and all(_alike(found.get(key), asked[key]) for key in shown)


def _alike(found: Any, asked: Any) -> bool:
    if isinstance(asked, dict):
        return isinstance(found, dict) and all(_alike(found.get(key), value) for key, value in asked.items())
    if isinstance(asked, int | float):
        return isinstance(found, int | float)
    return type(found) is type(asked)


def _without_zeros(plan: Any) -> Any:
    """A recorded plan as it was before weights were zeroed."""
    try:
        return replace(read_plan(plan), sparsity={}).as_dict() if isinstance(plan, dict) else None
    except CoterieError:
        return None


def write(
    writer: Writer,
    checkpoint: Checkpoint,
    outputs: dict[str, list[Output]],
    config: dict[str, Any],
    on_progress: Progress,
) -> None:
    writer.begin(root(checkpoint), outputs)
    total, done = sum(map(num_copied, outputs.values())), 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_progress("writing", done, total)

    for shard, tensors in outputs.items():
        writer.shard(shard, tensors, checkpoint.metadata[shard], checkpoint, advance)
    _write_small(writer, checkpoint, config)


def _write_small(writer: Writer, checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """config.json, and the files that travel along."""
    writer.text("config.json", to_json(config))
    for path in checkpoint.other_files():
        if _travels(path):
            writer.copy(path)


def _travels(path: Path) -> bool:
    """Tokenizer, generation config, chat template and licence travel; code, pickles and old cards do not."""
    if path.name in OURS or path.name.endswith(".index.json") or leads_outside(path):
        return False
    return path.suffix in COPIED_SUFFIXES or path.name.upper().startswith(COPIED_NAMES)


def left_behind(checkpoint: Checkpoint) -> list[str]:
    """Files that do not travel and that somebody might miss."""
    for path in filter(_travels, checkpoint.other_files()):
        if path.stat().st_size > MAX_COPIED:
            size = f"{path.stat().st_size:,} bytes"
            raise CoterieError(
                f"{path}: {size} beside the weights, which would be copied; expected at most {MAX_COPIED:,}"
            )
    names = [p.name for p in checkpoint.other_files() if not _travels(p) and p.name not in OURS]
    missed = [n for n in names if n.endswith((".py", ".safetensors", *PICKLES)) or leads_outside(checkpoint.path / n)]
    missed += [f"{p.name}/" for p in sorted(checkpoint.path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    kinds = "code, pickles, unused weights, subfolders and links out of the folder never are"
    return [f"not copied ({kinds}): {', '.join(missed)}"] if missed else []


def _numbers(
    model: Model, plan: Plan, outputs: dict[str, list[Output]], zeros: dict[str, int] | None = None
) -> dict[str, Any]:
    """Sizes before and after, and the share removed or zero on all three bases."""
    after = [Tensor(o.name, o.dtype, o.shape, s, 0, o.num_bytes) for s, tensors in outputs.items() for o in tensors]
    checkpoint = model.checkpoint
    counts = [count(list(checkpoint.tensors.values()), model.roles), count(after, model.roles)]
    for kind in kinds():
        kind.count(model, plan, counts[1])
    left = {b.key: left.stored for b, left in experts_left(model, plan).items() if b in model.main and left.stored}
    return {
        "before": {
            "parameters": root(checkpoint).num_parameters,
            "bytes": root(checkpoint).num_bytes,
            "experts": _one_or_all({b.key: b.num_experts for b in model.main}),
        },
        "after": {
            "parameters": counts[1]["all"],
            "bytes": sum(t.num_bytes for t in after),
            "experts": _one_or_all(left),
        },
        "sparsity": removed_shares(counts[0], {base: n - (zeros or {}).get(base, 0) for base, n in counts[1].items()}),
    }


def _one_or_all(counts: dict[str, int]) -> int | dict[str, int]:
    """One number where all layers agree, else the number of each."""
    return next(iter(counts.values()), 0) if len(set(counts.values())) <= 1 else counts
