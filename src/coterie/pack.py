"""`coterie pack` and `coterie unpack`: a checkpoint with zeros to one that does not store them, and back.

Data-free and exact: every byte comes back. Streamed, one matrix in memory; pack reads what it packs twice, once to
count, because a safetensors header names all sizes before the first value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coterie.apply import finished, left_behind, whole, write
from coterie.checkpoint import Checkpoint, Tensor
from coterie.errors import CoterieError
from coterie.experts import expert_weights
from coterie.layer import LAYER, Model
from coterie.numerics import decode
from coterie.plan import Plan, to_json
from coterie.report import Progress, Report, Stopwatch, model_card, no_progress, versions
from coterie.sparse import format as fmt
from coterie.sparse.view import Entry, dense_view, entries, is_sparse
from coterie.writer import Hole, Made, Output, Writer, check_out, partial_of

VALUES = ("as stored", "int8")
FLOATS = ("BF16", "F16", "F32")


def pack(
    dense: str | Path,
    out: str | Path,
    *,
    values: str = "as stored",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Progress = no_progress,
) -> Report:
    """Writes DENSE to OUT with its sparse matrices packed: one bit per weight, and the values that are not zero.

    Experts, and other matrices of decoder layers; each only where it takes fewer bytes.
    values: "as stored", which `unpack` restores exactly, or "int8", rounded with a scale per 128 columns, which it
    cannot.
    Raises: CoterieError, before anything is written, when no matrix would shrink.
    """
    clock, model = Stopwatch(), Model.open(dense)
    _check_dense(model.checkpoint)
    if values not in VALUES:
        raise CoterieError(f"--values {values!r:.40}: expected one of {', '.join(VALUES)}")
    stored, coding = _Coding(model.checkpoint), _Coding(model.checkpoint, "I8" if values == "int8" else None)
    tensors = model.checkpoint.tensors
    counts = _counts(stored, [t.name for t in _candidates(model)], on_progress)
    chosen = {n: c for n, c in counts.items() if stored.num_bytes(tensors[n], sum(c)) < tensors[n].num_bytes}
    if coding.dtype:  # zeros decide, but rounding makes more of them
        chosen = _counts(coding, list(chosen), on_progress)
    if not chosen:
        raise CoterieError(_nothing(model.checkpoint, counts))
    config = model.checkpoint.config | {"quantization_config": fmt.settings()}
    outputs = {shard: list(_packed_outputs(coding, shard, chosen)) for shard in model.checkpoint.shards}
    job = _Job(
        "pack", model.checkpoint, str(dense), outputs, config, _pack_numbers(model, coding, chosen), {"values": values}
    )
    return _execute(
        job, Path(out), clock, dry_run=dry_run, resume=resume, overwrite=overwrite, on_progress=on_progress,
        fill=lambda writer: _fill(coding, chosen, writer, on_progress),
    )  # fmt: skip


def unpack(
    packed: str | Path,
    dense: str | Path,
    *,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Progress = no_progress,
) -> Report:
    """Restores the dense checkpoint that `pack` packed: same tensors, same order, same bytes.

    Raises: CoterieError for a checkpoint that is not packed, or whose parts are damaged (then DENSE is not there).
    """
    clock, checkpoint = Stopwatch(), Checkpoint.open(packed)
    if not is_sparse(checkpoint):
        raise CoterieError(f"{packed}: nothing in it is packed (no quantization_config of ours in config.json)")
    view, found = dense_view(checkpoint), entries(checkpoint)
    rounded = next((entry.name for entry in found.values() if entry.num_groups), None)
    if rounded:
        raise CoterieError(
            f"{packed}: {rounded!r} was packed as int8, which rounds: there is no dense original to restore"
        )
    outputs: dict[str, list[Output]] = {shard: [] for shard in view.shards}
    for tensor in view.tensors.values():
        entry = found.get(tensor.name)
        outputs[tensor.file].append(_restored(entry) if entry else whole(tensor))
    numbers = {
        "before": {"parameters": view.num_parameters, "bytes": checkpoint.num_bytes},
        "after": {"parameters": view.num_parameters, "bytes": view.num_bytes},
        "unpacked_tensors": len(found),
    }
    job = _Job("unpack", checkpoint, str(packed), outputs, view.config, numbers)
    return _execute(
        job, Path(dense), clock, dry_run=dry_run, resume=resume, overwrite=overwrite, on_progress=on_progress
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
    *,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    on_progress: Progress,
    fill: Callable[[Writer], None] = lambda _: None,
) -> Report:
    """Checks OUT, writes it (unless dry_run), and reports."""
    source = job.source
    check_out(out, source.path, resume=resume, overwrite=overwrite)
    experts = {side: {**job.numbers[side], "experts": job.numbers.get("experts", "")} for side in ("before", "after")}
    report = Report(
        command=job.command,
        options=job.options,
        source={"path": job.path, "hash": None if dry_run else source.hash},
        plan=Plan(layers={}).as_dict(),
        report={**job.numbers, **experts, **clock.read(), "warnings": left_behind(source), "dry_run": dry_run},
        versions=versions(),
    )
    if dry_run:
        return report
    if resume and out.exists() and not partial_of(out).exists():
        return finished(out, report)
    with Writer(out, {"command": job.command, "options": job.options, "source": source.hash}, resume=resume) as writer:
        write(writer, source, job.outputs, job.config, on_progress)
        fill(writer)
        report.report.update(clock.read())
        writer.text("coterie.json", to_json(report.as_dict()))
        writer.text("README.md", model_card(source, report))
        writer.finish({s: {o.name: o for o in os} for s, os in job.outputs.items()}, source.indexed)
    return report


def _check_dense(checkpoint: Checkpoint) -> None:
    if is_sparse(checkpoint):
        raise CoterieError(f"{checkpoint.path}: is packed already")
    if checkpoint.config.get("quantization_config"):
        raise CoterieError(f"{checkpoint.path}: is quantised; expected plain floats: dequantise it first")
    if checkpoint.config.get("model_type") == "coterie":
        raise CoterieError(f"{checkpoint.path}: layers with different numbers of experts cannot be packed yet")
    ours = next((n for n in checkpoint.tensors if n.rpartition(".")[2] in fmt.PARTS), None)
    if ours:
        raise CoterieError(f"{checkpoint.path}: tensor {ours!r} is named like a part of a packed one; cannot pack it")


@dataclass(frozen=True)
class _Coding:
    """How the matrices of a checkpoint are packed: `dtype` of the stored values, None for their own."""

    checkpoint: Checkpoint
    dtype: str | None = None

    def kind(self, tensor: Tensor) -> tuple[str, tuple[int, ...]]:
        return self.dtype or tensor.dtype, tensor.shape

    def parts(self, tensor: Tensor, num_values: int) -> list[fmt.Part]:
        dtype, shape = self.kind(tensor)
        return fmt.parts(tensor.name, dtype, shape, num_values, fmt.num_groups(dtype, shape[-1]))

    def num_bytes(self, tensor: Tensor, num_values: int) -> int:
        return sum(part.num_bytes for part in self.parts(tensor, num_values))

    def raws(self, tensor: Tensor) -> Iterator[bytes]:
        """The dense bytes of each matrix of a tensor (O, I) or (E, O, I)."""
        count = tensor.shape[0] if len(tensor.shape) == 3 else 1
        size = tensor.num_bytes // count
        for e in range(count):
            yield self.checkpoint.raw(tensor.name, e * size, size)

    def packed(self, tensor: Tensor) -> Iterator[fmt.Packed]:
        """Each matrix, packed."""
        shape = tensor.shape[-2], tensor.shape[-1]
        for raw in self.raws(tensor):
            if self.dtype is None:
                yield fmt.encode(raw, tensor.dtype, shape)
                continue
            values = decode(raw, tensor.dtype, tensor.name).reshape(shape)
            if not np.isfinite(values).all():
                raise CoterieError(f"tensor {tensor.name!r}: holds NaN or infinity, which int8 has none of")
            codes, scales = fmt.quantise(values)
            yield fmt.encode(codes, self.dtype, shape, scales)

    def counts(self, tensor: Tensor) -> list[int]:
        """Kept values of each matrix."""
        if self.dtype is None:
            codes = fmt.CODES[tensor.dtype]
            return [int(np.count_nonzero(np.frombuffer(raw, codes))) for raw in self.raws(tensor)]
        return [len(packed.values) for packed in self.packed(tensor)]


def _candidates(model: Model) -> list[Tensor]:
    """Expert matrices, and the weights of other matrices in decoder layers but routers: what may have been pruned."""
    tensors = model.checkpoint.tensors
    experts = {n for b in model.moe if not b.attention for n in expert_weights(model.checkpoint, b)}
    found = []
    for name, tensor in tensors.items():
        other = model.roles[name] in ("shared", "other") and len(tensor.shape) == 2 and LAYER.fullmatch(name)
        if name in experts or (other and name.endswith("_proj.weight")):
            if tensor.dtype in FLOATS and len(tensor.shape) in (2, 3) and math.prod(tensor.shape) > 0:
                found.append(tensor)
    return found


def _counts(coding: _Coding, names: list[str], on_progress: Progress) -> dict[str, list[int]]:
    """Kept values of every matrix of the named tensors."""
    found = {}
    for done, name in enumerate(names):
        found[name] = coding.counts(coding.checkpoint.tensors[name])
        on_progress("counting zeros", done + 1, len(names))
    return found


def _nothing(checkpoint: Checkpoint, counts: dict[str, list[int]]) -> str:
    sizes = {n: checkpoint.tensors[n].num_parameters for n in counts}
    most = max((1 - sum(c) / sizes[n] for n, c in counts.items()), default=0.0)
    return (
        f"{checkpoint.path}: none of {len(counts)} matrices would shrink (at most {most:.1%} of one are zeros; "
        "bf16 needs 7 %): prune it first, for example with `coterie sparsify`"
    )


def _packed_outputs(coding: _Coding, shard: str, chosen: dict[str, list[int]]) -> Iterator[Output]:
    """What the shard holds: chosen tensors as holes for their parts, everything else as it is."""
    for tensor in coding.checkpoint.tensors.values():
        if tensor.file != shard:
            continue
        if tensor.name not in chosen:
            yield whole(tensor)
            continue
        for part in coding.parts(tensor, sum(chosen[tensor.name])):
            yield Output(part.name, part.dtype, part.shape, (Hole(part.num_bytes),))


def _fill(coding: _Coding, chosen: dict[str, list[int]], writer: Writer, on_progress: Progress) -> None:
    """Packs the chosen tensors into their holes, one matrix in memory."""
    for done, (name, counts) in enumerate(chosen.items()):
        tensor = coding.checkpoint.tensors[name]
        layout, at = [tensor.shape[-1], fmt.GROUP if coding.dtype else 0], dict.fromkeys(fmt.PARTS[1:], 0)
        for packed, count in zip(coding.packed(tensor), counts, strict=True):
            if len(packed.values) != count:
                raise CoterieError(
                    f"{coding.checkpoint.path}: tensor {name!r} changed while it was packed; start again"
                )
            layout.append(fmt.checksum(packed))
            for part in at:
                array = getattr(packed, part)
                if array is not None:
                    writer.put(f"{name}.{part}", at[part], array.tobytes())
                    at[part] += array.nbytes
        writer.put(f"{name}.layout", 0, np.array(layout, "<i8").tobytes())
        on_progress("packing", done + 1, len(chosen))
    writer.unit({"packed": len(chosen)})


def _pack_numbers(model: Model, coding: _Coding, chosen: dict[str, list[int]]) -> dict[str, Any]:
    """Sizes before and after, in all and of what is packed."""
    tensors = {n: model.checkpoint.tensors[n] for n in chosen}
    dense = sum(t.num_bytes for t in tensors.values())
    stored = sum(coding.num_bytes(t, sum(chosen[n])) for n, t in tensors.items())
    whole_bytes, parameters = model.checkpoint.num_bytes, model.checkpoint.num_parameters
    return {
        "before": {"parameters": parameters, "bytes": whole_bytes},
        "after": {"parameters": parameters, "bytes": whole_bytes - dense + stored},
        "experts": model.main[0].num_experts,
        "packed": {
            "tensors": len(chosen),
            "dense_bytes": dense,
            "bytes": stored,
            "ratio": stored / dense,
            "zeros": 1 - sum(map(sum, chosen.values())) / sum(t.num_parameters for t in tensors.values()),
        },
    }


def _restored(entry: Entry) -> Output:
    """The dense tensor, decoded one matrix at a time as it is written."""
    size = math.prod(entry.shape[-2:]) * fmt.CODES[entry.dtype].itemsize

    def made(e: int) -> Made:
        return Made(size, lambda: fmt.decode(entry.matrix(e)))

    return Output(entry.name, entry.dtype, entry.shape, tuple(made(e) for e in range(entry.num_matrices)))
