"""How a matrix is stored: one file a way, found by its name; `open.py` picks among them.

A file here has one record, `CODEC`, whose `read` answers with the matrices that a tensor holds if they are stored its
way, and with None if they are not. There are two kinds:

- A codec without a `method` reads matrices where a family's record, or a linear layer, has them (floats, FP8 with
  scales, 4-bit integers with scales in groups): the checkpoint is read and rewritten as it is, part by part, and only
  the numbers are decoded.
- A codec with a `method` is named by config.json (`"quantization_config": {"quant_method": method}`) and keeps a tensor
  NAME under other names, NAME + part (zeros as bits). A checkpoint that names it is opened as the dense one that it
  stands for, with tensors NAME and without that entry, so that nothing else has to know of it.

To add one, add a file; CONTRIBUTING.md shows one that works.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from coterie.errors import CoterieError
from coterie.storage.checkpoint import FLOATS, Checkpoint, Tensor
from coterie.storage.planned import Coded
from coterie.storage.shards import Output


@dataclass(frozen=True)
class Place:
    """A tensor of matrices, and what is known of it from around: names, and what config.json says.

    name: of the tensor, or what it would be called in one piece. key: the same below the expert, or below the layer.
    num_matrices: E of a fused tensor, along its first axis; 0 for a matrix of its own.
    beside: the tensors among which its scales may stand, by key. weights: which of those keys, without ".weight", are
    weights. transposed: whether matrices are (in, out). gate_above_up: whether each is two, one above the other.
    settings: the entry quantization_config of config.json, wherever it stands.
    """

    name: str
    key: str = ""
    num_matrices: int = 0
    beside: Mapping[str, str] = field(default_factory=dict, repr=False)
    weights: tuple[str, ...] = ()
    transposed: bool = False
    gate_above_up: bool = False
    settings: object = field(default_factory=dict)

    @property
    def said(self) -> Mapping[str, object]:
        """The settings; none where what stands there is no object."""
        return self.settings if isinstance(self.settings, dict) else {}


@dataclass(frozen=True)
class Codec:
    """One way to store matrices.

    parts: what the names of the tensors on the disk add to the matrix's own (or, beginning with a point, to that of its
    linear layer), the first of them the one in whose place the decoded tensor stands. read: (checkpoint, place) -> the
    matrices there, or None; it looks at headers, and at no more values than it takes to know shapes.
    encode: (name, dtype, shape, bytes) of a dense tensor -> its parts, to be written; None where we only read.
    method, settings: `quant_method` in config.json, and the whole entry. check: raises for a checkpoint that names the
    method but is not in order.
    """

    parts: tuple[str, ...]
    read: Callable[[Checkpoint, Place], Coded | None]
    encode: Callable[[str, str, tuple[int, ...], bytes], list[Output]] | None = None
    method: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    check: Callable[[Checkpoint], None] = lambda checkpoint: None

    @property
    def mark(self) -> str:
        """How the name of a linear layer's tensor ends if it is stored this way."""
        return self.parts[0] if self.parts[0].startswith(".") else f".weight{self.parts[0]}"


@dataclass(frozen=True, eq=False)
class Codes:
    """A matrix (O, I) of integers, as kernels multiply it: values (u - 2^(bits - 1)) * scale.

    bits: 2, 3, 4 or 8, or 0 of zeros that are not stored. codes: (O, I bits / 32) uint32, a row's codes u end to end
    from the lowest bit of its first word on. scales: (O, G) of `scale_type`, as float32 or as 16 bits each.
    """

    bits: int
    shape: tuple[int, int]
    codes: np.ndarray
    scales: np.ndarray
    scale_type: str


MULTIPLIED = ((2, 3, 4, 8), (32, 64, 128), ("BF16", "F16", "F32"))  # bits, columns per scale and its types, in `Codes`


def found_parts(checkpoint: Checkpoint, stem: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Which of a matrix's parts, STEM + part, there are."""
    return {part: tensor for part in parts if (tensor := checkpoint.tensors.get(stem + part))}


def in_parts(
    place: Place,
    shape: tuple[int, int],
    parts: Iterable[Tensor],
    rows: Callable[[], np.ndarray],
    check: Callable[[], object],
) -> Coded:
    """A matrix of its own (O, I) that several tensors hold: its values, and what its headers must agree on."""
    parts = tuple(parts)
    names, num_bytes = tuple(t.name for t in parts), sum(t.num_bytes for t in parts)
    return Coded(place.name, "F32", shape, names, num_bytes, lambda e: rows(), check=check)


def refusal(name: str, found: object, expected: str) -> CoterieError:
    """Says of parts that they are not what a codec knows."""
    return CoterieError(f"tensor {name!r}: found {found!s:.200}; expected {expected}; dequantise the checkpoint first")


def in_groups(numbers: np.ndarray, factors: np.ndarray, group_of: np.ndarray | None = None) -> np.ndarray:
    """numbers (O, I) times factors (O or 1, G), one for each of G equal groups of columns, as float32.

    group_of: the group of every column (I,), where they do not stand in order.
    """
    factors = factors.astype(np.float32, copy=False)
    if group_of is not None:
        return np.multiply(numbers, factors[:, group_of], dtype=np.float32)
    rows, columns = numbers.shape
    grouped = numbers.reshape(rows, factors.shape[1], -1)
    return np.multiply(grouped, factors[..., None], dtype=np.float32).reshape(rows, columns)


def check_scales(name: str, scales: Tensor | None, rows: int, columns: int) -> None:
    """Raises: CoterieError unless these are floats (rows, G) of G groups that divide the columns."""
    shape = scales.shape if scales else ()
    fits = len(shape) == 2 and shape[0] == rows and shape[1] > 0 and columns % shape[1] == 0
    if not scales or scales.dtype not in FLOATS or not fits:
        found = f"scales {scales.dtype} {list(shape)}" if scales else "no scales"
        raise refusal(name, found, f"floats for {rows} rows and groups that divide {columns} columns")


LAST = ("fp8", "plain")  # which take what no other claims


@cache
def codecs() -> tuple[Codec, ...]:
    """All of them, in the order in which they are asked."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "open"]
    ordered = sorted(names, key=lambda name: (LAST.index(name) + 1 if name in LAST else 0, name))
    return tuple(importlib.import_module(f"{__name__}.{name}").CODEC for name in ordered)
