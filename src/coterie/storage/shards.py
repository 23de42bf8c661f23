"""What a weight file will hold: tensors, the parts that their bytes are made of, and the header before them.

`edits` says which tensors a new checkpoint has in these terms; `writer` writes them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import CoterieError
from coterie.storage.checkpoint import MAX_HEADER, Tensor
from coterie.storage.copying import PAGE, Move, joined


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes `start:end` of a source shard, copied as they are."""

    file: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Made:
    """Bytes computed when their turn comes."""

    num_bytes: int
    make: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Hole:
    """Bytes that come later, through `Writer.put`."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write: its parts, end to end, are its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Run | Made | Hole, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def whole(tensor: Tensor, name: str | None = None) -> Output:
    """The tensor as it is, perhaps under another name."""
    return Output(name or tensor.name, tensor.dtype, tensor.shape, (Run(tensor.file, tensor.start, tensor.end),))


@dataclass(frozen=True)
class FileLayout:
    """What stands where in a file to be written."""

    header: bytes
    moves: list[Move]  # neighbouring runs of one source file as one
    made: list[tuple[int, Made]]  # from which byte on
    num_bytes: int

    @classmethod
    def of(cls, outputs: list[Output], metadata: dict[str, str], source: Path) -> FileLayout:
        """`source`: the folder that runs are of."""
        header = header_bytes(outputs, metadata)
        placed = [(len(header) + position, part) for position, part in _placed(outputs)]
        moves = [Move(source / p.file, p.start, p.end, to) for to, p in placed if isinstance(p, Run)]
        made = [(position, part) for position, part in placed if isinstance(part, Made)]
        return cls(header, joined(moves), made, len(header) + sum(output.num_bytes for output in outputs))


def _placed(outputs: list[Output]) -> Iterator[tuple[int, Run | Made | Hole]]:
    """All parts, with the byte of the data where each begins."""
    position = 0
    for part in (part for output in outputs for part in output.parts):
        yield position, part
        position += part.num_bytes


def num_bytes(outputs: Mapping[str, Iterable[Output]]) -> int:
    """Bytes of all tensors, by shard."""
    return sum(output.num_bytes for tensors in outputs.values() for output in tensors)


def num_copied(outputs: list[Output]) -> int:
    """Bytes that are there once the file is: all but the holes."""
    return sum(p.num_bytes for output in outputs for p in output.parts if not isinstance(p, Hole))


def header_bytes(outputs: list[Output], metadata: dict[str, str], length: int | None = None) -> bytes:
    """The length and JSON header of a safetensors file, of `length` bytes in all if it is shorter.

    Padded with spaces otherwise so that the most bytes keep their offset modulo 4096: page-aligned runs then stay
    page-aligned, a filesystem that shares blocks can share them, and the page cache can be passed by.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for output in outputs:
        end = position + output.num_bytes
        header[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * ((_offset(outputs) - 8 - len(text)) % PAGE if length is None else length - 8 - len(text))
    if len(text) > MAX_HEADER:
        raise CoterieError(f"the header to write has {len(text):,} bytes; readers take at most {MAX_HEADER:,}")
    return len(text).to_bytes(8, "little") + text


def _offset(outputs: list[Output]) -> int:
    """Where data should begin modulo a page: 0, or where most copied bytes stand as they do in their source."""
    votes: Counter[int] = Counter()
    for position, part in _placed(outputs):
        if isinstance(part, Run):
            votes[(part.start - position) % PAGE] += part.num_bytes
    return votes.most_common(1)[0][0] if votes else 0
