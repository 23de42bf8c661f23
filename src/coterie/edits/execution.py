"""Carries out a plan: checks, sizes, bytes, record. What every verb that writes a checkpoint ends in.

Kept experts are copied verbatim, never decoded: memory stays flat whatever the model's size. Everything that a
plan could get wrong is checked before a byte is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from coterie.codecs.open import check_coded, opened
from coterie.edits.coding import estimated
from coterie.edits.counts import count, removed_shares
from coterie.edits.kinds.dequantise import dequantised, marked, said
from coterie.edits.naming import Renumbering, renumbered_files
from coterie.edits.outputs import (
    check_plan,
    experts_left,
    patched_config,
    plan_outputs,
    planned,
    prunable,
    sealed,
    with_holes,
)
from coterie.edits.plan import Decision, Numbers, Plan, kinds, read_plan
from coterie.engine import Engine
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.model.stored import is_dense_view
from coterie.options import Help, Resume
from coterie.storage.card import SOURCE_CARD, card, public, source_of
from coterie.storage.checkpoint import PICKLES, Checkpoint, Tensor, leads_outside, load_json
from coterie.storage.copying import IO, check_io
from coterie.storage.folders import check_out, left_over, partial_of, tidy
from coterie.storage.in_place import UsedUp, check_in_place, consume, went_on
from coterie.storage.movers import mover
from coterie.storage.planned import root
from coterie.storage.record import (
    Progress,
    Report,
    Stopwatch,
    no_progress,
    object_at,
    record_of,
    to_json,
    versions,
)  # fmt: skip
from coterie.storage.resumable import Resumable
from coterie.storage.shards import Output, num_copied
from coterie.storage.writer import Writer

logger = logging.getLogger(__name__)

COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
MAX_COPIED = 2**30  # bytes of a file that travels along; a sparse one can claim any size
OURS = ("coterie.json", "coterie.log", "README.md", "report.html")


@dataclass(frozen=True)
class Writing:
    """How OUT is written: dense or with zeros as bits, only planned, gone on with, or in place of an earlier one."""

    save: Annotated[str, Help("dense, or sparse: zeros take one bit each, as `coterie pack` stores them.")] = "dense"
    dry_run: Annotated[
        bool, Help("Write nothing: check, and show sizes. Reads headers and routers, and data only to decide by.")
    ] = False
    resume: Resume = False
    overwrite: Annotated[bool, Help("Replace OUT, if coterie wrote it.")] = False
    public: Annotated[bool, Help("Write names instead of local paths into coterie.json.")] = False


Io = Annotated[str, Help(f"How bytes are copied, instead of the first way that works: {', '.join(IO)}.")]
InPlace = Annotated[bool, Help("Make OUT of MODEL's own files: no second copy, and MODEL is no more.")]


@dataclass(frozen=True)
class Request:
    """What a command was asked to write, and how.

    path: the model, as given. options: what is recorded of the command's options.
    engine: where units of work run; not part of what a resume must repeat, since the bytes are the same.
    in_place: MODEL's files become OUT's (`storage/in_place.py`).
    """

    command: str
    path: str | Path
    out: Path
    options: dict[str, Any]
    writing: Writing = field(default_factory=Writing)
    io: str = "auto"
    engine: Engine = field(default_factory=Engine)
    in_place: bool = False
    on_progress: Progress = no_progress
    clock: Stopwatch = field(default_factory=Stopwatch)

    def check(self, source: Checkpoint) -> None:
        """Raises: CoterieError where OUT cannot be written as asked, before what may take hours."""
        check_io(self.io)
        check_out(self.out, source.path, resume=self.writing.resume, overwrite=self.writing.overwrite)

    @property
    def begun(self) -> Path | None:
        """OUT of a run that may go on; None where it starts anew."""
        return self.out if self.writing.resume else None

    @property
    def is_complete(self) -> bool:
        """Whether a resume finds nothing left to do."""
        return self.writing.resume and self.out.exists() and not partial_of(self.out).exists()

    def deciding(self, source: Checkpoint) -> Resumable:
        """OUT.partial, for what a decision that takes long finds on its way; `execute` goes on in it."""
        asked = {"command": self.command, "options": self.options, "source": source.hash}
        return Resumable(self.out, asked, resume=self.writing.resume, replace=self.writing.overwrite)

    def recorded(self) -> Decision:
        """What a complete OUT was made by."""
        return Decision(read_plan(object_at(record_of(self.out), "plan")))

    def gone_on(self) -> Report | None:
        """What an interrupted run in place left to do, completed; None where there is no such run.

        Raises: CoterieError where options exclude each other, or that run was asked for something else.
        """
        writing = self.writing
        if self.in_place:
            check_in_place(io=self.io, engine=self.engine.name, overwrite=writing.overwrite)
        if not self.in_place or not writing.resume or writing.dry_run:
            return None
        return went_on(self.out, self.command, self.options, self.path, self.clock, self.on_progress)


@dataclass(frozen=True)
class Filled:
    """What became of the weights: shares of zeros by layer and role, zeros by the report's bases, and more for it."""

    sparsity: dict[str, dict[str, float]]
    zeros: dict[str, int]  # by the bases of `edits/counts.py`
    report: dict[str, Any]
    notes: list[str]


Fill = Callable[[Writer], Filled]


@dataclass(frozen=True)
class Filling:
    """What changes the weights once they are written, and how many of each tensor will be zero, as far as is known."""

    fill: Fill
    zeros: Mapping[str, int] = field(default_factory=dict)


Prepare = Callable[[Model], Filling]


@dataclass(frozen=True)
class Execution:
    """A plan that was checked, the tensors that it makes of the model, by file, and the report that will be written.

    view: the model as planned. small: what files other than weights hold, where they change. fill: changes the weights
    once they are written.
    """

    model: Model
    plan: Plan
    outputs: dict[str, list[Output]]
    view: Model
    small: dict[str, str]
    fill: Fill | None
    report: Report

    @property
    def notes(self) -> list[str]:
        """The report's, to be added to."""
        found: list[str] = self.report.report["warnings"]
        return found


def execute(model: Model, decision: Decision, request: Request, *, prepare: Prepare | None = None) -> Report:
    """Checks the plan against the checkpoint, writes OUT (unless it is a dry run), and reports.

    prepare: given the model as planned, checks everything and returns what changes its weights once they are written.
    Raises: CoterieError, before anything is written, where plan, model and OUT do not fit.
    """
    if decision.begun:
        request = replace(request, writing=replace(request.writing, resume=True, overwrite=False))
    request.check(model.checkpoint)
    execution = _checked(model, decision, request, prepare)
    if decision.announced:
        logger.warning(decision.announced)
    if request.in_place:
        return _consumed(execution, request)
    if request.writing.dry_run:
        return execution.report
    if request.is_complete:
        return finished(request.out, execution.report)
    return _written(execution, request, ("command", "options", *(() if decision.begun else ("plan",))))


def _checked(model: Model, decision: Decision, request: Request, prepare: Prepare | None) -> Execution:
    """What is to be done, after everything that could be wrong with it was looked at."""
    plan = marked(model, decision.plan, request.options if prepare else None)
    model = dequantised(model, plan)
    check_plan(model, plan)
    plan = sealed(model, plan)
    outputs = plan_outputs(model, plan)
    notes = [*decision.notes, *left_behind(model.checkpoint)]
    notes += [said(model.checkpoint)] if is_dense_view(model.checkpoint) else []
    notes += left_over(request.out) if request.options.get("save") == "dense" else []
    view = planned(model, plan, outputs) if prepare else model
    config, beside = patched_config(model, plan), filter(_travels, model.checkpoint.other_files())
    small = {"config.json": to_json(config)} | renumbered_files(model, plan, beside)
    filling = prepare(view) if prepare else None
    numbers = _foreseen(model, plan, outputs, view, filling.zeros if filling else {})
    # A dry run reads headers and routers only; the fingerprint reads a few blocks of every shard.
    fingerprint = None if request.writing.dry_run else model.checkpoint.hash
    source = source_of(request.path, root(model.checkpoint).path, fingerprint)
    said_of = public if request.writing.public else dict
    report = Report(request.command, said_of(request.options), said_of(source), plan.as_dict(), {}, versions())
    report.report.update(numbers | request.clock.read() | {"cold_experts": [], "warnings": notes})
    report.report.update({"dry_run": request.writing.dry_run} | decision.findings)
    return Execution(model, plan, outputs, view, small, filling.fill if filling else None, report)


def _consumed(execution: Execution, request: Request) -> Report:
    """Makes OUT of the model's own files."""
    checkpoint = execution.model.checkpoint
    if is_dense_view(checkpoint):
        raise CoterieError(f"{request.path}: --in-place moves bytes; here {said(checkpoint)}; leave --in-place out")
    recipe = UsedUp.of(checkpoint, execution.outputs, execution.report, request.out)
    execution.notes.append(recipe.note)
    if request.writing.dry_run:
        return execution.report
    small = partial(_write_small, checkpoint=checkpoint, small=execution.small)
    return consume(
        recipe, request.out, request.clock, resume=request.writing.resume, prepare=small,
        on_progress=request.on_progress,
    )  # fmt: skip


def _written(execution: Execution, request: Request, asked: tuple[str, ...]) -> Report:
    """Writes OUT: tensors, then what changes them, then the record. asked: what of it a resume must repeat."""
    report, outputs, engine, writing = execution.report, execution.outputs, request.engine, request.writing
    checkpoint = execution.model.checkpoint
    if execution.fill:
        outputs = with_holes(outputs, execution.view)
    # Of a repackaged model, what is stored in parts is the original's. Damage is found before anything is written.
    check_coded(opened(root(checkpoint)), request.on_progress, _needed(execution.model, execution.plan))
    identity = {name: getattr(report, name) for name in asked} | {"source": checkpoint.hash}
    with (
        engine.connected(),
        Writer(request.out, identity, resume=writing.resume, io=request.io, replace=writing.overwrite) as writer,
    ):
        with engine.opened(writer.partial):
            if engine.spread:
                writer.move = mover(engine, writer.copier, root(checkpoint))
            write(writer, checkpoint, outputs, execution.small, request.on_progress)
            filled = execution.fill(writer) if execution.fill else None
        report.report["io"] = writer.io
        execution.notes.extend([*writer.copier.notes, *engine.notes])
        if engine.spread:
            report.report["engine"] = engine.summary
        if filled:
            _add_filled(execution, filled, outputs)
        report.report.update(request.clock.read())
        finish_record(writer, report, card(root(checkpoint).path, report, load_json(writer.partial / "config.json")))
    return report


def _needed(model: Model, plan: Plan) -> Callable[[str, int], bool]:
    """Whether a matrix, by the source's name and its number there, is of an expert and a layer that are read at all."""
    renumbering = Renumbering(model, plan)
    fused = {name: block.key for block in model.main for name in block.fused}

    def needed(name: str, e: int) -> bool:
        if any(choice.merged for choice in plan.choices.values()):  # those that go are read for their cluster's mean
            return True
        if name in fused:
            return renumbering.numbers(Numbers(fused[name], e)) is not None
        return renumbering.text(name, "names", settings=False) is not None

    return needed


def _add_filled(execution: Execution, filled: Filled, outputs: dict[str, list[Output]]) -> None:
    """What became of the weights, for the record."""
    report, plan = execution.report, execution.plan
    report.plan.update(replace(plan, sparsity=filled.sparsity).as_dict())
    report.report.update(filled.report | _numbers(execution.model, plan, outputs, filled.zeros))
    execution.notes.extend(filled.notes)


def finish_record(writer: Writer, report: Report, card: str) -> None:
    """Writes the record and the model card, and gives OUT its name."""
    writer.text("coterie.json", to_json(report.as_dict()))
    writer.text("README.md", card)
    writer.finish()


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
    small: Mapping[str, str],
    on_progress: Progress,
) -> None:
    """Begins OUT and writes its shards and the files beside them; not the record. small: name -> content, of those that
    are not copied as they are."""
    writer.begin(root(checkpoint), outputs)
    total, done = sum(map(num_copied, outputs.values())), 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_progress("writing", done, total)

    for shard in outputs:
        writer.shard(shard, advance)
    _write_small(writer, checkpoint, small)


def _write_small(writer: Writer, checkpoint: Checkpoint, small: Mapping[str, str]) -> None:
    """config.json with other files that change, and those that travel along as they are."""
    for name, text in small.items():
        writer.text(name, text)
    for path in checkpoint.other_files():
        if _travels(path) and path.name not in small:
            writer.copy(path)
    readme = checkpoint.path / "README.md"
    if readme.is_file() and not leads_outside(readme) and record_of(checkpoint.path) is None:
        writer.text(SOURCE_CARD, readme.read_text(encoding="utf-8", errors="replace"))


def _travels(path: Path) -> bool:
    """Tokenizer, generation config, chat template and licence travel; code, pickles and old cards do not."""
    if path.name in OURS or path.name.endswith(".index.json") or leads_outside(path):
        return False
    return path.name == SOURCE_CARD or path.suffix in COPIED_SUFFIXES or path.name.upper().startswith(COPIED_NAMES)


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
            "parameters": (checkpoint if is_dense_view(checkpoint) else opened(root(checkpoint))).num_parameters,
            "bytes": root(checkpoint).num_bytes,
            "experts": one_or_all({b.key: b.num_experts for b in model.main}),
        },
        "after": {
            "parameters": counts[1]["all"],
            "bytes": sum(t.num_bytes for t in after),
            "experts": one_or_all(left),
        },
        "sparsity": removed_shares(counts[0], {base: n - (zeros or {}).get(base, 0) for base, n in counts[1].items()}),
    }


def _foreseen(
    model: Model, plan: Plan, outputs: dict[str, list[Output]], view: Model, zeros: Mapping[str, int]
) -> dict[str, Any]:
    """The numbers of a plan, with the zeros that weights will hold, and the bytes that packing would make of them."""
    if not zeros:
        return _numbers(model, plan, outputs)
    inside, everything = sum(zeros.get(name, 0) for name in prunable(view)), sum(zeros.values())
    numbers = _numbers(model, plan, outputs, {"experts": inside, "linears": everything, "all": everything})
    share = inside / sum(view.checkpoint.tensors[name].num_parameters for name in prunable(view))
    return numbers | {"expert_zeros": inside, "expert_zero_share": share, "packed_estimate": estimated(view, zeros)}


def one_or_all(counts: dict[str, int]) -> int | dict[str, int]:
    """One number where all layers agree, else the number of each."""
    return next(iter(counts.values()), 0) if len(set(counts.values())) <= 1 else counts
