"""A checkpoint as it will be, before it is written: tensors made of byte runs of another one, and of computed parts.

Lets one step plan on the result of the step before, and calibration read it, with nothing written in between.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from coterie.storage.checkpoint import Checkpoint, Tensor, read_bytes
from coterie.storage.shards import Hole, Made, Output, Run

if TYPE_CHECKING:
    import numpy as np

Shards = dict[str, list[Output]]


@dataclass(frozen=True, eq=False)
class Coded:
    """A tensor of matrices, however it is stored (see `codecs/`), one matrix at a time.

    dtype, shape: of the tensor once decoded, ([E,] O, I). parts: the tensors in the file; num_bytes: of all of them.
    rows: number of a matrix -> its values (O, I) in float32, as they are oriented in the tensor.
    verbatim: the tensor's bytes are those values. exact: decoding gives back the bytes that were encoded.
    stored: dtype of the values in the file, where it is another. dense: number of a matrix -> its bytes once decoded,
    where they are not simply its rows rounded. packed: number of a matrix -> what its codec holds of it, checked.
    check: raises CoterieError where headers show already that it cannot be decoded.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    num_bytes: int
    rows: Callable[[int], np.ndarray] = field(repr=False)
    verbatim: bool = False
    exact: bool = True
    stored: str = ""
    dense: Callable[[int], bytes] | None = field(default=None, repr=False)
    packed: Callable[[int], Any] | None = field(default=None, repr=False)
    check: Callable[[], object] = field(default=lambda: None, repr=False)

    @property
    def num_matrices(self) -> int:
        return math.prod(self.shape[:-2])

    def raw(self, e: int) -> bytes:
        """Matrix e's bytes once decoded."""
        from coterie.storage.numerics import encode

        return self.dense(e) if self.dense else encode(self.rows(e), self.dtype, self.name)


@dataclass(frozen=True)
class Planned(Checkpoint):
    """A checkpoint that is not on the disk, and reads as if it were: yet to be written, or stored in another way."""

    source: Checkpoint = field(kw_only=True)
    outputs: dict[str, Output] = field(kw_only=True, repr=False)
    coded: Mapping[str, Coded] = field(kw_only=True, repr=False, default_factory=dict)  # stored in parts in the source
    shared_scale: float = field(default=1.0, kw_only=True)  # times the shared experts stored here: those of the source

    @property
    def hash(self) -> str:  # type: ignore[override]
        """That of the checkpoint on the disk: the rest follows from it."""
        return self.source.hash

    @property
    def by_shard(self) -> Shards:
        """What every shard is made of, tensor by tensor."""
        return {s: [self.outputs[t.name] for t in self.tensors.values() if t.file == s] for s in self.shards}

    def raw(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        length = self.tensors[name].num_bytes - start if length is None else length
        return b"".join(self._part(name, part) for part in self.parts(name, start, length))

    def parts(self, name: str, start: int, length: int) -> Iterator[Run | Made | Hole]:
        """What the tensor's bytes `start:start + length` are made of, in terms of the source."""
        position = 0
        for part in self.outputs[name].parts:
            first, last = max(start, position), min(start + length, position + part.num_bytes)
            if first < last:
                yield _cut(part, first - position, last - position)
            position += part.num_bytes

    def _part(self, name: str, part: Run | Made | Hole) -> bytes:
        if isinstance(part, Made):
            return part.make()
        assert isinstance(part, Run)
        return read_bytes(self.source.path / part.file, part.start, part.num_bytes, name)


def view(
    checkpoint: Checkpoint,
    outputs: Shards,
    config: dict[str, Any],
    shared_scale: float = 1.0,
    coded: Mapping[str, Coded] | None = None,
) -> Planned:
    """The checkpoint that `outputs` (byte runs of files that exist) and `config` make of another one."""
    tensors = {}
    for shard, group in outputs.items():
        position = 0
        for o in group:
            tensors[o.name] = Tensor(o.name, o.dtype, o.shape, shard, position, position + o.num_bytes)
            position += o.num_bytes
    by_name = {o.name: o for group in outputs.values() for o in group}
    metadata = {shard: checkpoint.metadata[shard] for shard in outputs}
    return Planned(
        checkpoint.path, config, tuple(outputs), tensors, metadata, checkpoint.indexed, source=root(checkpoint),
        outputs=by_name, shared_scale=shared_scale * scale_of(checkpoint), coded=coded or {},
    )  # fmt: skip


def scale_of(checkpoint: Checkpoint) -> float:
    """What the checkpoint's shared experts are multiplied by to be those of the files."""
    return checkpoint.shared_scale if isinstance(checkpoint, Planned) else 1.0


def root(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint on the disk behind a planned one, or itself."""
    return checkpoint.source if isinstance(checkpoint, Planned) else checkpoint


def resolved(checkpoint: Checkpoint, outputs: Shards) -> Shards:
    """Outputs that name byte runs of a planned checkpoint, in terms of the files that exist."""
    if not isinstance(checkpoint, Planned):
        return outputs
    places = _places(checkpoint)
    return {shard: [_resolved(checkpoint, o, places) for o in group] for shard, group in outputs.items()}


def _places(checkpoint: Planned) -> dict[str, list[Tensor]]:
    """The planned tensors of each shard, in the order of their bytes."""
    found: dict[str, list[Tensor]] = {}
    for tensor in checkpoint.tensors.values():
        found.setdefault(tensor.file, []).append(tensor)
    return found


def _resolved(checkpoint: Planned, output: Output, places: dict[str, list[Tensor]]) -> Output:
    parts: list[Run | Made | Hole] = []
    for part in output.parts:
        parts += _traced(checkpoint, part, places) if isinstance(part, Run) else [part]
    return replace(output, parts=tuple(parts))


def _traced(checkpoint: Planned, run: Run, places: dict[str, list[Tensor]]) -> Iterator[Run | Made | Hole]:
    """The parts behind a run of planned bytes: runs name whole tensors, or rows of one."""
    group = places[run.file]
    first_beyond = bisect_right(group, run.start, key=lambda tensor: tensor.end)  # that ends beyond the run's beginning
    for tensor in group[first_beyond:]:
        if tensor.start >= run.end:
            break
        first, last = max(run.start, tensor.start), min(run.end, tensor.end)
        yield from checkpoint.parts(tensor.name, first - tensor.start, last - first)


def _cut(part: Run | Made | Hole, first: int, last: int) -> Run | Made | Hole:
    """Bytes first:last of a part."""
    if isinstance(part, Run):
        return Run(part.file, part.start + first, part.start + last)
    if isinstance(part, Hole):
        return Hole(last - first)
    return part if last - first == part.num_bytes else Made(last - first, lambda: part.make()[first:last])
