"""Copying as units of work: what `Writer.shard` copies, cut into windows that any node can fill.

Called by `edits/execution.py` where the engine spreads work. A window is an aligned part of one target file, so two
units never write to one page, and each copies in whichever way its node allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from coterie.engine import Engine, Unit
from coterie.errors import CoterieError, writing
from coterie.storage.checkpoint import Checkpoint, load_json
from coterie.storage.copying import Copier, Move, OnBytes
from coterie.storage.files import fsync

WINDOW = 64 << 20  # bytes of a target file per unit; a multiple of every page size
SOURCE = "source.json"
UNIT = "coterie.storage.movers:copy"


def mover(engine: Engine, copier: Copier, source: Checkpoint) -> Callable[[Path, list[Move], OnBytes], None]:
    """In place of `copier.move`: the same bytes, carried by units. `copier` goes on counting."""
    describe_source(engine.scratch, source)
    common = {"scratch": str(engine.scratch), "io": copier.io}

    def move(target: Path, moves: list[Move], on_bytes: OnBytes) -> None:
        fsync(target)  # its header and length, before other machines open it
        units = (
            Unit(UNIT, common | {"target": str(target.absolute()), "moves": _places(window)})
            for window in windows(moves, WINDOW)
        )
        for moved in engine.run(units):
            copier.moved.update(moved)
            on_bytes(sum(moved.values()))

    return move


def _places(moves: list[Move]) -> list[list[Any]]:
    return [[str(move.source.absolute()), move.start, move.end, move.to] for move in moves]


def windows(moves: list[Move], size: int) -> Iterator[list[Move]]:
    """The moves, cut at multiples of `size` of the target; ascending, and none empty."""
    found: dict[int, list[Move]] = {}
    for move in moves:
        stop, at = move.to + move.num_bytes, move.to
        while at < stop:
            end = min(stop, (at // size + 1) * size)
            found.setdefault(at // size, []).append(move.cut(at, end))
            at = end
    for number in sorted(found):
        yield found[number]


def copy(scratch: str, target: str, io: str, moves: list[list[Any]]) -> dict[str, int]:
    """The unit: fills one window of a file that exists, and gives the bytes by the way they went."""
    check_source(scratch)
    copier = Copier(io)
    copier.move(Path(target), [Move(Path(source), *place) for source, *place in moves], lambda _: None)
    fsync(Path(target))
    return dict(copier.moved)


def describe_source(scratch: Path, source: Checkpoint) -> None:
    """Says to the nodes which checkpoint is read."""
    content = json.dumps({"path": str(source.path.absolute()), "hash": source.hash})
    with writing(scratch):
        (scratch / SOURCE).write_text(content)


@cache
def check_source(scratch: str) -> None:
    """Raises: CoterieError, once per process, where this node has another checkpoint under the driver's path."""
    said = load_json(Path(scratch) / SOURCE)
    if Checkpoint.open(said["path"]).hash != said["hash"]:
        raise CoterieError(f"{said['path']}: is another checkpoint than on the driver's machine; share one folder")
