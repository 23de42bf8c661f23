"""Attacks on the header of a safetensors file: its length, its JSON, its ranges, its shapes, its names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attacks.corpus import ESCAPE, JSON_BOMBS, MB, TB, add_all, shard, with_shard, with_tensors

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EXPERT = "model.layers.0.mlp.experts.0.up_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"


def entry(**changes: Any) -> bytes:
    """A file of one tensor with eight bytes, its entry changed."""
    return shard({"a": A | changes}, bytes(8))


def renamed(old: str, new: str | Callable[[], str]) -> Any:
    def change(header: dict[str, Any]) -> None:
        header[new if isinstance(new, str) else new()] = header.pop(old)

    return with_tensors(change)


def sparse_router() -> Any:
    """A model of a hole: a router of a terabyte that takes no room on the disk."""
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(8) for p in ("gate", "up", "down")]
    header = {n: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}
    end = 4 * len(names)
    header[ROUTER] = {"dtype": "F32", "shape": [8, TB // 32], "data_offsets": [end, end + TB]}
    raw = shard(header)
    return with_shard(raw, len(raw) + end + TB)


def hollow(layers: int, experts: int) -> bytes:
    """A file without data: every layer has a router and as many experts as the config says, of no bytes at all."""
    header = {}
    for layer in range(layers):
        for name, width in (("gate.weight", 0), ("experts.gate_up_proj", 0), ("experts.down_proj", 0)):
            shape = [experts, width]
            header[f"model.layers.{layer}.mlp.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    return shard(header)


OVERLAP = {"a": A, "b": A | {"data_offsets": [4, 12]}}
HOLE = {"a": A, "b": A | {"data_offsets": [16, 24]}}
TWINS = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}'
WIDE = {"a": A, "__metadata__": {"k": ["v"]}}

add_all(
    "model",
    {
        "header-length-wraps": ("A length of 2^64 - 1, to wrap an addition.", with_shard(b"\xff" * 8 + b"{}")),
        "header-length-signed": (
            "A length of 2^63, negative to who reads it signed.",
            with_shard(shard({}, b"", 1 << 63)),
        ),
        "header-length-allocates": (
            "A header of 100 GB in a sparse file, to be allocated before it is looked at.",
            with_shard(shard(b"{", b"", 100 << 30), TB),
        ),
        "header-of-spaces": (
            "A header of 99 MB of null bytes in a sparse file, within the limit.",
            with_shard(shard(b"{}", b"", 99 * MB), 99 * MB + 8),
        ),
        "header-cut": ("A file that ends within its header.", with_shard(shard({"a": A})[:30])),
        "file-empty": ("A weight file without a byte.", with_shard(b"")),
        "overlapping-ranges": ("Two tensors that share bytes.", with_shard(shard(OVERLAP, bytes(12)))),
        "hole-between-ranges": (
            "Bytes that no tensor accounts for, to hide something.",
            with_shard(shard(HOLE, bytes(24))),
        ),
        "trailing-bytes": ("A second file behind the data.", with_shard(entry() + b"PK\x03\x04")),
        "range-beyond-the-file": ("A range that ends behind the file.", with_shard(shard({"a": A}, bytes(4)))),
        "range-backwards": ("A range that ends before it begins.", with_shard(entry(data_offsets=[8, 0]))),
        "range-negative": ("A range that begins before the file.", with_shard(entry(data_offsets=[-8, 0]))),
        "range-of-floats": ("Offsets as floats.", with_shard(entry(data_offsets=[0.0, 8.0]))),
        "range-of-booleans": (
            "Offsets as booleans, which are integers in Python.",
            with_shard(entry(data_offsets=[False, 8])),
        ),
        "shape-overflows-64-bits": (
            "A shape whose product is 2 modulo 2^64.",
            with_shard(entry(shape=[2**63 + 1, 2])),
        ),
        "shape-wraps-to-nothing": (
            "A shape whose product is 0 modulo 2^64, over no bytes.",
            with_shard(shard({"a": {"dtype": "U8", "shape": [2**32, 2**32], "data_offsets": [0, 0]}})),
        ),
        "shape-of-many-axes": ("A million axes.", with_shard(lambda: entry(shape=[1] * 10**6))),
        "shape-explodes": (
            "Sixty axes of 2^62, whose product is a number of 1,100 digits.",
            with_shard(entry(shape=[2**62] * 60)),
        ),
        "shape-negative": ("Two negative axes, whose product is positive.", with_shard(entry(shape=[-1, -2]))),
        "shape-of-half-bytes": (
            "Three values of 4 bits.",
            with_shard(shard({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"a")),
        ),
        "dtype-unhashable": ("A list where the dtype stands.", with_shard(entry(dtype=["F32"]))),
        "dtype-of-megabytes": (
            "A dtype of 10 MB, to flood the error message.",
            with_shard(lambda: entry(dtype="F" * 10 * MB)),
        ),
        "metadata-nested": ("Metadata that are no strings.", with_shard(shard(WIDE, bytes(8)))),
        "tensor-twice": ("One name for two ranges.", with_shard(shard(TWINS, bytes(8)))),
        "name-escapes": (
            "A tensor in a MoE block whose name holds escape sequences for the terminal.",
            renamed(EXPERT, f"model.layers.0.mlp.{ESCAPE}"),
        ),
        "name-breaks-lines": (
            "A name with line breaks, to forge a second line of output.",
            renamed(EXPERT, "model.layers.0.mlp.x\nok     done\r\x85\u2028"),
        ),
        "name-of-megabytes": (
            "A name of 20 MB, to flood the error message.",
            renamed(EXPERT, lambda: "model.layers.0.mlp." + "x" * 20 * MB),
        ),
        "name-of-dots": (
            "A name of 5 million dots, to make a pattern go back and forth.",
            renamed(EXPERT, lambda: "layers." * 10**6 + "model.layers.0.mlp." + "." * 5 * 10**6),
        ),
        "expert-beyond-the-count": (
            "An expert with the number 999999.",
            renamed(EXPERT, EXPERT.replace("experts.0", "experts.999999")),
        ),
        "expert-with-zeros": ("Expert 00 beside expert 0.", renamed(EXPERT, EXPERT.replace("experts.0", "experts.00"))),
        "expert-in-other-digits": (
            "An expert's number in Arabic digits, equal to another's.",
            renamed(EXPERT, EXPERT.replace("experts.0", "experts.\u0661")),
        ),
        "expert-missing": (
            "A model without expert 3's up projection.",
            with_tensors(lambda h: h.update({"x": h.pop(EXPERT)})),
        ),
        "router-of-a-terabyte": ("A router of a terabyte in a sparse file, to be read at once.", sparse_router()),
    },
)
add_all(
    "model",
    {
        f"header-{name}": (f"Header: {tries}", with_shard(lambda raw=raw: shard(raw())))
        for name, (tries, raw) in JSON_BOMBS.items()
    },
)
