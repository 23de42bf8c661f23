"""Whether OUT holds, byte for byte, what its plan makes of the original. Checks of `verify`."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from coterie.codecs.open import inexact
from coterie.edits.kinds.convert import converted
from coterie.edits.kinds.dequantise import dequantised
from coterie.edits.lineage import plan_of
from coterie.edits.outputs import check_plan, patched_config, plan_outputs
from coterie.edits.plan import Written, kinds
from coterie.errors import reading
from coterie.judge.files import Answer, first
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.planned import Planned, root
from coterie.storage.record import Progress, no_progress, object_at, record_of
from coterie.storage.shards import Hole, Made, Output, Run, whole

CHUNK = 4 << 20  # bytes compared at a time


def check_bytes(out: Checkpoint, source: Model, on_progress: Progress = no_progress) -> Answer:
    """Every tensor that the plan makes of the original is in OUT, byte for byte, and nothing else is."""
    plan, record = plan_of(out), record_of(out.path)
    if _was_packed_from(record, source.checkpoint):
        return _check_same(out, source.checkpoint, on_progress)
    if object_at(record, "source").get("hash") != source.checkpoint.hash:
        return False, f"{source.checkpoint.path} is not what OUT was made from (another fingerprint)", None
    source = dequantised(converted(source, plan.converted), plan)
    check_plan(source, plan)
    scheme = plan.at("quantized")
    if scheme and scheme.format == "coterie":  # what was planned are the parts themselves, not what they stand for
        out = root(out)
    lost = inexact(out)
    outputs = [o for shard in plan_outputs(source, plan).values() for o in shard if o.name not in lost]
    faults = _header_faults(out, outputs)
    config = patched_config(source, plan)
    wrong = [key for key in {*config, *out.config} if config.get(key) != out.config.get(key)]
    if wrong:
        faults.append(f"config.json is not the original's with new counts: {first(wrong)}")
    if faults:
        return False, "; ".join(faults), None
    written = Written(out, object_at(record, "options"), lost)
    found = [kind.verify(written, source, plan) for kind in kinds()]
    faults = [fault for verified in found for fault in verified.faults]
    if not faults:
        judged = {name for verified in found for name in verified.tensors}
        differing = [name for verified in found for name in verified.differing]
        same = [o for o in outputs if o.name not in judged]
        faults = _said_to_differ([*differing, *_differing(out, source.checkpoint, same, on_progress)])
    added = {name for verified in found for name in verified.added}
    tally = _tally(source.checkpoint, [o for o in outputs if o.name not in added])
    notes = "".join(verified.note for verified in found) + _said_of(lost)
    return not faults, "; ".join(faults) or tally + notes, None


def _said_of(rounded: set[str]) -> str:
    return f"; not compared: {len(rounded):,} that were rounded when they were packed" if rounded else ""


def _said_to_differ(names: Collection[str]) -> list[str]:
    return [f"other bytes in {first(names)}"] if names else []


def _was_packed_from(record: object, source: Checkpoint) -> bool:
    """Whether `coterie pack` (or unpack) made OUT from this very checkpoint, rather than a command before it."""
    return source.hash in (object_at(record, "report", f"{done}_from").get("hash") for done in ("packed", "unpacked"))


def _compared(out: Checkpoint, source: Checkpoint, on_progress: Progress) -> tuple[list[str], set[str], int]:
    """Faults of a copy in its names, shapes and config; else the tensors with other bytes; and how many there are."""
    rounded = inexact(out)
    outputs = [output for output in _whole(source) if output.name not in rounded]
    faults = _header_faults(out, outputs) + ([] if out.config == source.config else ["config.json is another"])
    return faults, set() if faults else set(_differing(out, source, outputs, on_progress)), len(outputs)


def _check_same(out: Checkpoint, source: Checkpoint, on_progress: Progress) -> Answer:
    """OUT stands for the very bytes of the dense checkpoint that it was packed from."""
    faults, differing, number = _compared(out, source, on_progress)
    faults += _said_to_differ(differing)
    return not faults, "; ".join(faults) or f"{number:,} kept as is" + _said_of(inexact(out)), None


def _whole(source: Checkpoint) -> list[Output]:
    """Every tensor as it is."""
    if isinstance(source, Planned):
        return list(source.outputs.values())
    return [whole(tensor) for tensor in source.tensors.values()]


def check_trained(out: Checkpoint, source: Checkpoint, on_progress: Progress = no_progress) -> Answer:
    """Every tensor of the model that `recover` was given is in OUT, and only those recorded as trained differ."""
    record = record_of(out.path)
    if _was_packed_from(record, source):
        return _check_same(out, source, on_progress)
    recorded, trained = object_at(record, "source"), object_at(record, "report", "trained")
    if recorded.get("hash") != source.hash:
        return False, f"{source.path} is not the model that was trained, {recorded.get('path')!s:.200}", None
    listed = trained.get("tensors")
    if not isinstance(listed, list) or not all(isinstance(name, str) and name in source.tensors for name in listed):
        fault = "coterie.json does not say which of the model's tensors were trained (report.trained.tensors)"
        return False, fault, None
    faults, differing, _ = _compared(out, source, on_progress)
    faults += _said_to_differ(differing - set(listed))
    rounded = inexact(out)
    same = len(source.tensors) - len({*listed, *rounded})
    said = f"{same:,} kept as is, {len(listed):,} trained, {len(differing):,} changed"
    return not faults, "; ".join(faults) or said + _said_of(rounded), None


def _header_faults(out: Checkpoint, outputs: list[Output]) -> list[str]:
    meant = {o.name: (o.dtype, o.shape) for o in outputs}
    found = {t.name: (t.dtype, t.shape) for t in out.tensors.values()}
    faults = {
        "missing": meant.keys() - found.keys(),
        "not meant to be there": found.keys() - meant.keys() - inexact(out),
        "of another shape or dtype": {n for n in meant.keys() & found.keys() if meant[n] != found[n]},
    }
    return [f"{fault}: {first(names)}" for fault, names in faults.items() if names]


def _differing(out: Checkpoint, source: Checkpoint, outputs: list[Output], on_progress: Progress) -> Iterator[str]:
    """The outputs whose bytes in OUT are not those meant; reads both sides once, a chunk at a time."""
    total, done = sum(o.num_bytes for o in outputs), 0
    with _Reader() as read:
        for output in outputs:
            position, at = 0, _stored(out, output.name, read)
            for part in output.parts:
                if not _same(part, source.path, read, at, position):
                    yield output.name
                    break
                position += part.num_bytes
            done += output.num_bytes
            on_progress("comparing bytes", done, total)


Bytes = Callable[[int, int], bytes]  # of a tensor: (first, how many)


def _stored(out: Checkpoint, name: str, read: _Reader) -> Bytes:
    """A tensor's bytes in OUT, decoded where it is packed."""
    tensor = out.tensors[name]
    if isinstance(out, Planned):
        return lambda first, length: out.raw(name, first, length)
    return lambda first, length: read(out.path / tensor.file, tensor.start + first, length)


def _same(part: Run | Made | Hole, folder: Path, read: _Reader, at: Bytes, position: int) -> bool:
    """Whether the tensor holds the part at `position`."""
    if isinstance(part, Made):
        return part.make() == at(position, part.num_bytes)
    assert isinstance(part, Run), "plans have no holes"
    for skip in range(0, part.num_bytes, CHUNK):
        length = min(CHUNK, part.num_bytes - skip)
        if read(folder / part.file, part.start + skip, length) != at(position + skip, length):
            return False
    return True


class _Reader(contextlib.ExitStack):
    """Reads runs of bytes of any number of files, each opened once."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: dict[Path, int] = {}

    def __call__(self, path: Path, start: int, length: int) -> bytes:
        with reading(path):
            if path not in self._opened:
                self._opened[path] = os.open(path, os.O_RDONLY)
                self.callback(os.close, self._opened[path])
            return os.pread(self._opened[path], length, start)


def _tally(source: Checkpoint, outputs: list[Output]) -> str:
    """How many tensors had which fate."""
    originals = {output.name: output for output in _whole(source)}
    decoded = {part for output in originals.values() for part in output.parts if isinstance(part, Made)}
    fates = Counter(_fate(originals.get(output.name), output, decoded) for output in outputs)
    fates["dropped"] = max(0, len(source.tensors) - len(outputs))
    always = dict.fromkeys(("kept as is", "renamed", "row-sliced", "computed", "dropped"), 0)
    return ", ".join(f"{count:,} {fate}" for fate, count in (always | fates).items())


def _fate(original: Output | None, output: Output, decoded: set[Made]) -> str:
    """What became of one source tensor on its way to an output. `decoded`: what the source itself is made of."""
    if original and output.parts == original.parts:
        return "kept as is"
    if any(isinstance(part, Made) and part not in decoded for part in output.parts):
        return "computed"
    same_shape = original is None or original.shape == output.shape
    return "renamed" if same_shape and len(output.parts) == 1 else "row-sliced"
