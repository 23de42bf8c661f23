"""What an attack is: one hostile file or folder, made where it is needed, with a sentence saying what it tries.

The attacks stand in `headers.py`, `folders.py`, `configs.py`, `plans.py`, `tables.py` and `texts.py`; `make.py` puts
them together. They are made by program, because most are large, sparse, no regular files, or have names that no
repository should hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handmade import qwen

MB, TB = 1 << 20, 1 << 40
ESCAPE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\x7f"  # clears a terminal, names its window, turns text around
Make = Callable[[Path], Path]  # given an empty folder, what to attack with


@dataclass(frozen=True)
class Attack:
    """`harmless`: the verbs that may accept it, because what it does is not theirs to see or does no harm there."""

    name: str
    kind: str  # what it pretends to be; `test_attacks.VERBS` says who reads that
    tries: str
    make: Make
    harmless: tuple[str, ...] = ()


ATTACKS: list[Attack] = []


def attack(kind: str, tries: str, *harmless: str) -> Callable[[Make], Make]:
    """Adds the decorated function to the corpus; its name is the attack's."""

    def add(make: Make) -> Make:
        ATTACKS.append(Attack(make.__name__.replace("_", "-"), kind, tries, make, harmless))
        return make

    return add


def add_all(kind: str, cases: dict[str, tuple[str, Make]], *harmless: str) -> None:
    """Adds many attacks of one form: name -> what it tries, how it is made."""
    ATTACKS.extend(Attack(name, kind, tries, make, harmless) for name, (tries, make) in cases.items())


Raw = bytes | Callable[[], bytes]  # of large ones, how they are made: nothing large is made before it is used


def made(raw: Raw) -> bytes:
    return raw if isinstance(raw, bytes) else raw()


def shard(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: the header's length (or a lie about it), the header, the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def with_shard(raw: Raw, size: int | None = None) -> Make:
    """A model whose only weight file holds these bytes, made `size` bytes long by a hole at its end."""

    def make(folder: Path) -> Path:
        model = qwen(folder / "model", layers=1)
        path = model / "model.safetensors"
        path.write_bytes(made(raw))
        if size:
            os.truncate(path, size)
        return model

    return make


def with_tensors(change: Callable[[dict[str, Any]], None], size: int | None = None, **config: Any) -> Make:
    """A model whose header was changed in place, after which every range is laid out anew over `size` bytes."""

    def make(folder: Path) -> Path:
        model = qwen(folder / "model", layers=1, **config)
        path = model / "model.safetensors"
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        change(header)
        path.write_bytes(shard(header, raw[start:]))
        if size:
            os.truncate(path, size)
        return model

    return make


def with_config(**changes: Any) -> Make:
    """A sound model but for these entries of its config."""
    return lambda folder: qwen(folder / "model", layers=1, **changes)


def with_file(name: str, raw: Raw) -> Make:
    """A sound model with this file in it, in place of its own."""

    def make(folder: Path) -> Path:
        model = qwen(folder / "model", layers=1, num_shards=2 if "index" in name else 1)
        (model / name).write_bytes(made(raw))
        return model

    return make


def alone(name: str, raw: Raw, size: int | None = None) -> Make:
    """One file with these bytes, made `size` bytes long by a hole at its end."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(made(raw))
        if size:
            os.truncate(path, size)
        return path

    return make


def pipe(name: str) -> Make:
    """A named pipe that nobody writes to."""

    def make(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return make


def link(name: str, target: str) -> Make:
    """A link to something that is no plain file."""

    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


# JSON that costs its reader more than it weighs; each is an object.
JSON_BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "many-lists": (
        "30 MB of empty lists, which become 25 times as much in memory.",
        lambda: b'{"a":[' + b"[]," * (10 * MB) + b"0]}",
    ),
    "many-objects": (
        "24 MB of small objects, which become 30 times as much in memory.",
        lambda: b'{"a":[' + b'{"b":0},' * (3 * MB) + b"0]}",
    ),
    "deep-lists": (
        "100,000 nested lists, to overflow the stack.",
        lambda: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ),
    "deep-objects": ("100,000 nested objects, never closed.", lambda: b'{"a":' * 100_000),
    "shallow-enough": (
        "Nesting that the parser takes, and that copying or writing again would not.",
        lambda: b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    ),
    "long-integer": (
        "A number of 5 million digits, whose conversion takes quadratic time.",
        lambda: b'{"a":' + b"9" * 5_000_000 + b"}",
    ),
    "duplicate-key": (
        "A key that comes twice, so that two readers see two files.",
        lambda: b'{"layers":{},"model_type":"a","layers":{},"model_type":"b"}',
    ),
    "half-surrogate": (
        "Half of a surrogate pair, which cannot be printed or written.",
        lambda: b'{"\\ud800":"\\udfff"}',
    ),
    "not-utf8": ("Bytes that are no UTF-8.", lambda: b'{"\xff\xfe":1}'),
    "null-bytes": ("Null bytes where JSON should be.", lambda: bytes(1000)),
    "a-list": ("A list where an object should be.", lambda: b"[]"),
}
