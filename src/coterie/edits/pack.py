"""`coterie pack` and `coterie unpack`: a checkpoint with zeros to one that does not store them, and back.

Data-free and exact: every byte comes back. What a verb recorded about the checkpoint (`coterie.json`) goes with it, so
that `verify`, `apply` and `recover` know a packed folder as they know the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coterie.codecs import bits as fmt
from coterie.codecs import codecs
from coterie.codecs.open import check_coded, codec_of, inexact, opened
from coterie.edits.coding import Coding, candidates, counted, fill, sizes
from coterie.edits.execution import Writing, finish_record, finished, left_behind, write
from coterie.edits.plan import Plan
from coterie.errors import CoterieError, check_choice
from coterie.model.layer import Model
from coterie.model.own import is_own
from coterie.storage.card import card, public, source_of, stored_as
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.folders import check_out, partial_of
from coterie.storage.planned import Planned
from coterie.storage.record import (
    Progress,
    Report,
    Stopwatch,
    object_at,
    record_of,
    to_json,
    versions,
)
from coterie.storage.shards import Output, whole
from coterie.storage.writer import Writer

VALUES = ("as stored", "int8")
OURS = ("pack", "unpack")  # commands that decide nothing about a model


def pack(
    dense: str | Path,
    out: Path,
    *,
    values: str = "as stored",
    writing: Writing,
    on_progress: Progress,
) -> Report:
    """Writes DENSE to OUT with its sparse matrices packed; see `verbs/pack.py`.

    Raises: CoterieError, before anything is written, when no matrix would shrink.
    """
    clock, checkpoint = Stopwatch(), Checkpoint.open(dense)
    check_dense(checkpoint)
    check_choice("--values", values, VALUES)
    check_out(out, checkpoint.path, resume=writing.resume, overwrite=writing.overwrite)
    model = Model.of(checkpoint)
    coding, chosen = _choose(model, values, on_progress)
    outputs = {shard: list(_packed_outputs(coding, shard, chosen)) for shard in checkpoint.shards}
    packed = sizes(coding, chosen) | {"values": values}
    size = {"parameters": checkpoint.num_parameters, "experts": model.main[0].num_experts}
    numbers = {
        "before": size | {"bytes": packed["before"]},
        "after": size | {"bytes": packed["after"]},
        "packed": packed,
    }
    config = checkpoint.config | {"quantization_config": fmt.SETTINGS}
    job = _Job("pack", checkpoint, str(dense), outputs, config, numbers, {"values": values})
    return _execute(job, out, clock, writing, on_progress, lambda writer: fill(coding, chosen, writer, on_progress))


def unpack(packed: str | Path, dense: Path, *, writing: Writing, on_progress: Progress) -> Report:
    """Restores the dense checkpoint that `pack` packed: same tensors, same order, same bytes.

    Raises: CoterieError for a checkpoint that is not packed, or whose parts are damaged; nothing is written then.
    """
    clock, checkpoint = Stopwatch(), Checkpoint.open(packed)
    view = opened(checkpoint)
    check_packed(checkpoint, view)
    assert isinstance(view, Planned)
    check_out(dense, checkpoint.path, resume=writing.resume, overwrite=writing.overwrite)
    check_coded(view, on_progress)  # here, so that damage is found before anything is written
    outputs = view.by_shard
    size = {"parameters": view.num_parameters, "experts": ""}
    numbers = {
        "before": size | {"bytes": checkpoint.num_bytes},
        "after": size | {"bytes": view.num_bytes},
        "unpacked": {"before": checkpoint.num_bytes, "after": view.num_bytes, "tensors": len(view.coded)},
    }
    job = _Job("unpack", checkpoint, str(packed), outputs, view.config, numbers)
    return _execute(job, dense, clock, writing, on_progress)


def check_packed(checkpoint: Checkpoint, view: Checkpoint) -> None:
    """Raises: CoterieError unless `view`, the checkpoint opened, is one that was there before it was packed."""
    if codec_of(checkpoint) is not fmt.CODEC:
        raise CoterieError(
            f"{checkpoint.path}: nothing in it is packed (no quantization_config of ours in config.json)"
        )
    if rounded := inexact(view):
        name = min(rounded)
        raise CoterieError(
            f"{checkpoint.path}: {name!r} was rounded when it was packed: there is no dense original to restore"
        )


@dataclass(frozen=True)
class _Job:
    command: str
    source: Checkpoint
    path: str
    outputs: dict[str, list[Output]]
    config: dict[str, Any]
    numbers: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


def _execute(
    job: _Job,
    out: Path,
    clock: Stopwatch,
    writing: Writing,
    on_progress: Progress,
    finish: Callable[[Writer], None] = lambda _: None,
) -> Report:
    """Checks OUT, writes it (unless dry_run), and reports."""
    source = job.source
    fingerprint = None if writing.dry_run else source.hash
    made = _made_by(source)
    report = _kept(job, made, fingerprint) if made else _own(job, fingerprint)
    if writing.public:
        names = {part: public(getattr(report, part)) for part in ("options", "source", "report")}
        report = replace(report, **names)
    report.report.update(clock.read() if not made else {})
    report.report["warnings"] = [*report.report.get("warnings", []), *left_behind(source)]
    report.report["dry_run"] = writing.dry_run
    if writing.dry_run:
        return report
    if writing.resume and out.exists() and not partial_of(out).exists():
        return _repeated(out, job, fingerprint) if made else finished(out, report)
    identity = {"command": job.command, "options": job.options, "source": source.hash}
    with Writer(out, identity, resume=writing.resume, replace=writing.overwrite) as writer:
        write(writer, source, job.outputs, {"config.json": to_json(job.config)}, on_progress)
        finish(writer)
        report.report.update(clock.read() if not made else {})
        finish_record(writer, report, _card(job, report))
    return report


# --- the record ------------------------------------------------------------------------------------------------


def _made_by(source: Checkpoint) -> Report | None:
    """What another command recorded of the checkpoint; None where none did.

    Raises: CoterieError for a coterie.json that is no record: what it meant would be lost.
    """
    found = record_of(source.path)
    if found is None:
        return None
    objects = {key: found.get(key) for key in ("options", "source", "plan", "report", "versions")}
    warnings = object_at(found, "report").get("warnings", [])
    whole = all(isinstance(value, dict) for value in objects.values()) and isinstance(warnings, list)
    if not whole or not isinstance(found.get("command"), str):
        path = source.path / "coterie.json"
        raise CoterieError(f"{path}: is not a record of coterie (no command, plan or report); remove it, or restore it")
    return None if found["command"] in OURS else Report(found["command"], **objects)  # type: ignore[arg-type]


def _own(job: _Job, fingerprint: str | None) -> Report:
    """The report on a checkpoint that no command of ours made."""
    source = source_of(job.path, job.source.path, fingerprint)
    return Report(job.command, job.options, source, Plan(layers={}).as_dict(), dict(job.numbers), versions())


def _kept(job: _Job, made: Report, fingerprint: str | None) -> Report:
    """The report of the command that made the checkpoint, with the bytes that it has now."""
    earlier = ("packed", "packed_from", "unpacked", "unpacked_from")
    found = {key: value for key, value in made.report.items() if key not in earlier}
    found["after"] = object_at(found, "after") | {"bytes": job.numbers["after"]["bytes"]}
    found |= {key: job.numbers[key] for key in ("packed", "unpacked") if key in job.numbers}
    found[f"{job.command}ed_from"] = {"path": job.path, "hash": fingerprint}
    return Report(made.command, made.options, made.source, made.plan, found, made.versions)


def _repeated(out: Path, job: _Job, fingerprint: str | None) -> Report:
    """The report of a complete OUT, if it was made from this very checkpoint with these options."""
    found = _made_by(Checkpoint.open(out))
    report = found.report if found else {}
    same = object_at(report, f"{job.command}ed_from").get("hash") == fingerprint
    if job.command == "pack":
        same = same and object_at(report, "packed").get("values") == job.options["values"]
    if found is None or not same:
        raise CoterieError(f"{out}: is complete, but was made with another source, plan or option; choose another OUT")
    return found


PACKED_CARD = """
## Packed

{tensors:,} matrices are stored as one bit per weight and the values that are not zero: {after:,} bytes instead of
{before:,}. After `import coterie`, `AutoModelForCausalLM.from_pretrained` loads them, and multiplies without expanding
them; without it, transformers refuses the folder. {end}
"""
EXACT = "`coterie unpack` restores every byte of the dense checkpoint."
ROUNDED = "Values were rounded to int8, with a scale per 128 columns; the dense checkpoint cannot be restored."


def _card(job: _Job, report: Report) -> str:
    """README.md: that of the command that made the checkpoint, and how it is stored now."""
    readme, packs = job.source.path / "README.md", job.command == "pack"
    text = ""
    if report.command not in OURS and readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace").split("\n## Packed\n")[0]
    text = stored_as(text, packs) or card(job.source.path, report, job.config)
    if not packs:
        return text
    packed = report.report["packed"]
    return text + PACKED_CARD.format(**packed, end=EXACT if packed["values"] == "as stored" else ROUNDED)


# --- what is packed --------------------------------------------------------------------------------------------


def check_dense(checkpoint: Checkpoint) -> None:
    """Raises: CoterieError for a checkpoint that is stored in another way already, or in our own layout."""
    if codec_of(checkpoint) is fmt.CODEC:
        raise CoterieError(f"{checkpoint.path}: is packed already")
    if checkpoint.config.get("quantization_config"):
        raise CoterieError(f"{checkpoint.path}: is quantised; expected plain floats: dequantise it first")
    if is_own(checkpoint.config):
        raise CoterieError(
            f"{checkpoint.path}: is in our own layout (layers that no stock config describes), which cannot be packed"
        )
    parts = tuple(part for codec in codecs() if codec.method == fmt.METHOD for part in codec.parts)
    ours = next((name for name in checkpoint.tensors if name.endswith(parts)), None)
    if ours:
        raise CoterieError(f"{checkpoint.path}: tensor {ours!r} is named like a part of a packed one; cannot pack it")


def _choose(model: Model, values: str, on_progress: Progress) -> tuple[Coding, dict[str, list[int]]]:
    """How matrices are packed, and the tensors that shrink with the kept values of each of their matrices."""
    stored, tensors = Coding(model.checkpoint), model.checkpoint.tensors
    counts = counted(stored, [t.name for t in candidates(model)], on_progress)
    chosen = {n: c for n, c in counts.items() if stored.shrinks(tensors[n], sum(c))}
    if not chosen:
        raise CoterieError(_nothing(model.checkpoint, counts))
    if values == "as stored":
        return stored, chosen
    coding = Coding(model.checkpoint, "I8")  # zeros decide, but rounding makes more of them
    return coding, counted(coding, list(chosen), on_progress)


def _nothing(checkpoint: Checkpoint, counts: dict[str, list[int]]) -> str:
    numbers = {n: checkpoint.tensors[n].num_parameters for n in counts}
    most = max((1 - sum(c) / numbers[n] for n, c in counts.items()), default=0.0)
    return (
        f"{checkpoint.path}: none of {len(counts)} matrices would shrink (at most {most:.1%} of one are zeros; "
        "bf16 needs 7 %): prune it first, for example with `coterie sparsify`"
    )


def _packed_outputs(coding: Coding, shard: str, chosen: dict[str, list[int]]) -> Iterator[Output]:
    """What the shard holds: chosen tensors as holes for their parts, everything else as it is."""
    for tensor in coding.checkpoint.tensors.values():
        if tensor.file != shard:
            continue
        if tensor.name in chosen:
            yield from coding.parts(tensor, sum(chosen[tensor.name]))
        else:
            yield whole(tensor)
