"""Routed experts in few bits: of one width for all, in compressed-tensors' format `pack-quantized`, which transformers
and vLLM read; or of a width each, in our own (`codecs/integers.py`), where 0 bits stand for an expert that gives
nothing.

    plan: {"layers": {"0": {"bits": 4}}, "quantized": {"format": ..., "group_size": 64, "method": "search"}}
          {"layers": {"0": {"bits": [3, 0, 2, 4]}}, ...}    by expert, in our own format alone

In the former, a matrix NAME.weight (O, I) becomes tensors in its place, codes q being stored as q + 2^(b-1):

    NAME.weight_packed  I32 (O, I b / 32)     a row's codes end to end, from the lowest bit of its first word on
    NAME.weight_scale   (O, I / group)        of the matrix's own dtype
    NAME.weight_shape   I64 (2,)              O, I

What a rule without data makes is computed when it is written, and again by `verify`. What was made from data is held
against a checksum of each expert in the record (`report.checksums`), and against the original's weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from coterie.codecs.integers import CODEC as INTEGERS
from coterie.codecs.integers import Arrangement
from coterie.codecs.open import opened
from coterie.edits.plan import Keys, Kind, Outputs, Plan, Verified, Written
from coterie.errors import CoterieError
from coterie.methods import quantize as methods
from coterie.methods.levels import Levels, Quantised
from coterie.model.experts import expert_shapes, expert_storage
from coterie.model.layer import Model, MoE, find_blocks
from coterie.model.own import is_own
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.numerics import encode, packed
from coterie.storage.planned import Coded
from coterie.storage.record import object_at, record_of
from coterie.storage.shards import Hole, Output, computed

FORMAT = "compressed-tensors"
OWN = "coterie"
FORMATS = (FORMAT, OWN)
PARTS_OF = {FORMAT: ("_packed", "_scale"), OWN: (".codes", ".scales", ".widths")}  # a checksum is of the first two
WIDTHS = (2, 3, 4, 8)
Bits = int | list[int]  # of a layer's experts: of all, or of each
GROUPS = (128, 64, 32)
MOST_FAULTS = 5  # that are named
MOST_CHANGED = 1.0  # of a matrix's norm: how far rounding may move it before it is called damage


@dataclass(frozen=True)
class Scheme:
    """What a plan says of all its quantised layers: one format, group size and rule."""

    format: str
    group_size: int
    method: str
    from_data: bool = False  # what no plan can repeat


def read_bits(at: str, value: Any) -> dict[str, object]:
    found = value["bits"]
    each = found if isinstance(found, list) and found else [found]
    known = (0, *WIDTHS) if isinstance(found, list) else WIDTHS
    if any(type(bits) is not int or bits not in known for bits in each):
        raise CoterieError(
            f"{at}: `bits` must be one of {', '.join(map(str, WIDTHS))}, or a list of those and 0, one for each "
            f"expert; found {found!r:.60}"
        )
    return {"bits": found}


def width_of(bits: Bits, e: int) -> int:
    """How many bits expert e of a layer gets."""
    return bits if isinstance(bits, int) else bits[e]


def read_scheme(where: str, content: Any) -> dict[str, object]:
    found = content.get("quantized")
    if found is None:
        return {}
    try:
        scheme = Scheme(**found)
    except TypeError:
        raise CoterieError(
            f"{where}: `quantized` must have format, group_size and method, found {found!r:.120}"
        ) from None
    known = scheme.format in FORMATS and scheme.group_size in GROUPS and scheme.method in methods.names()
    if type(scheme.from_data) is not bool or not known:
        raise CoterieError(
            f"{where}: `quantized` is {found!r:.120}; expected the format {' or '.join(FORMATS)}, groups of "
            f"{', '.join(map(str, GROUPS))} and a method among {', '.join(methods.names())}"
        )
    return {"quantized": scheme}


def check(model: Model, plan: Plan) -> None:
    """Raises: CoterieError for layers or matrices that the format cannot hold, or other changes beside it."""
    bits, scheme = plan.at("bits"), plan.at("quantized")
    if not bits and not scheme:
        return
    where = model.checkpoint.path
    if not bits or not scheme:
        raise CoterieError("plan: `bits` of layers and `quantized` belong together; one of them is missing")
    if plan.choices or plan.condensed or plan.dropped or plan.converted or plan.sparsity:
        raise CoterieError("plan: `bits` exclude other changes; apply one plan after the other")
    _check_widths(quantised_blocks(model), bits, scheme)
    if model.checkpoint.config.get("quantization_config"):
        raise CoterieError(f"{where}: is quantised already; expected plain floats: dequantise it first")
    if is_own(model.checkpoint.config):
        raise CoterieError(f"{where}: is in our own layout, which no format of few bits can say; quantise it before")
    for block in quantised_blocks(model):
        if not block.experts or block.layout.lists or block.unused:
            kept = "identity experts among the others" if block.unused else "all experts in one tensor, or in lists"
            raise CoterieError(
                f"{where}: {block.name} keeps {kept}; {scheme.format} wants matrices under each expert's number"
            )
        check_group(model.checkpoint, block, scheme.group_size)


def _check_widths(blocks: list[MoE], bits: dict[str, Bits], scheme: Scheme) -> None:
    """Raises: CoterieError unless every layer has a width, or one for each of its experts, that the format can say."""
    keys = [block.key for block in blocks]
    if set(bits) != set(keys):
        raise CoterieError(f"plan: `bits` must be given of the layers {', '.join(keys)}, found {bits!r:.160}")
    if scheme.format == FORMAT and (len({*map(str, bits.values())}) != 1 or isinstance(bits[keys[0]], list)):
        raise CoterieError(
            f"plan: {FORMAT} knows one width for the experts of all layers ({', '.join(keys)}), found {bits!r:.160}"
        )
    for block in blocks:
        found = bits[block.key]
        if isinstance(found, list) and len(found) != block.num_experts:
            raise CoterieError(
                f"plan: layer {block.key!r} has `bits` of {len(found)} experts, expected {block.num_experts}"
            )


def check_group(checkpoint: Checkpoint, block: MoE, group_size: int) -> None:
    for part, (_, columns) in expert_shapes(checkpoint, block).items():
        if columns % group_size:
            raise CoterieError(
                f"{block.name}: {part} has rows of {columns} weights, which groups of {group_size} do not divide; "
                f"expected {', '.join(map(str, GROUPS))}, the same for all"
            )


def quantised_blocks(model: Model) -> list[MoE]:
    """The blocks whose experts get few bits: all of routed experts, those of prediction layers too."""
    return [block for block in model.moe if not block.attention]


def levels_of(matrix: Coded, bits: int, group_size: int) -> Levels:
    """The levels of one matrix, whose scales are of its own dtype."""
    return Levels(bits, group_size, matrix.dtype)


# --- bytes -------------------------------------------------------------------------------------------------------


def outputs(model: Model, plan: Plan, made: Outputs) -> Outputs:
    """Nothing, or each matrix's parts: computed when their turn comes, or holes where they are made from data."""
    bits, scheme, result = plan.at("bits"), plan.at("quantized"), Outputs()
    for block in quantised_blocks(model) if bits else ():
        rule = "search" if methods.load(scheme.method).NEEDS == "hessian" else scheme.method  # layers without data
        for e in range(block.num_experts):
            width = width_of(bits[block.key], e)
            for matrix in expert_storage(model.checkpoint, block, e):
                levels = levels_of(matrix, width, scheme.group_size)
                make = None if scheme.from_data and not block.mtp and width else partial(_quantised, rule, levels)
                result[matrix.name] = tuple((_parts if scheme.format == FORMAT else _own_parts)(matrix, levels, make))
    return result


def _quantised(method: str, levels: Levels, matrix: Coded) -> Quantised:
    weight = matrix.rows(0)
    check_finite(matrix.name, weight)
    if not levels.bits:
        groups = weight.shape[1] // levels.group
        return Quantised(levels, np.zeros(weight.shape, np.int8), np.zeros((len(weight), groups), np.float32))
    found: Quantised = methods.load(method).quantise(weight, levels, None)
    return found


def check_finite(name: str, weight: np.ndarray) -> None:
    if not np.isfinite(weight).all():
        raise CoterieError(f"tensor {name!r}: holds NaN or infinite weights, which no scale covers; expected finite")


def _parts(matrix: Coded, levels: Levels, make: Callable[[Coded], Quantised] | None) -> Iterator[Output]:
    """The tensors in a matrix's place. make: None where they are holes."""
    stem, (rows, columns) = matrix.name.removesuffix("weight"), matrix.shape
    shapes = {
        f"{stem}weight_packed": ("I32", (rows, columns * levels.bits // 32)),
        f"{stem}weight_scale": (levels.scale_dtype, (rows, columns // levels.group)),
    }
    latest = lru_cache(maxsize=1)(lambda: dict(encoded(make(matrix), stem)) if make else {})  # for both parts

    def raw(name: str) -> bytes:
        return latest()[name]

    for name, (dtype, shape) in shapes.items():
        part = computed(name, dtype, shape, partial(raw, name))
        yield part if make else Output(name, dtype, shape, (Hole(part.num_bytes),))
    yield computed(f"{stem}weight_shape", "I64", (2,), np.array([rows, columns], "<i8").tobytes)


def _own_parts(matrix: Coded, levels: Levels, make: Callable[[Coded], Quantised] | None) -> Iterator[Output]:
    """The same in our own format. make: None where they are holes."""
    layout = Arrangement(matrix.shape, levels.group, levels.scale_dtype, (levels.bits,))
    latest = lru_cache(maxsize=1)(lambda: dict(own_encoded(make(matrix), matrix.name)) if make else {})

    def raw(name: str) -> bytes:
        return latest()[name]

    for part, (dtype, shape) in layout.parts.items():
        name = matrix.name + part
        output = computed(name, dtype, shape, partial(raw, name))
        yield output if make else Output(name, dtype, shape, (Hole(output.num_bytes),))


def own_encoded(found: Quantised, name: str) -> Iterator[tuple[str, bytes]]:
    """(tensor, bytes) of a matrix called `name` in our own format: codes, scales, and the header that has their
    checksum; of no bits: nothing but the header."""
    levels, codes, scales = found.levels, b"", b""
    if levels.bits:
        codes = packed((found.codes.astype(np.int16) - levels.lowest), levels.bits).tobytes()
        scales = encode(found.scales, levels.scale_dtype, f"{name}.scales")
    layout = Arrangement(found.codes.shape, levels.group, levels.scale_dtype, (levels.bits,))
    yield f"{name}.codes", codes
    yield f"{name}.scales", scales
    yield f"{name}.widths", layout.header([checksum([codes, scales])])


def encoder(scheme: Scheme) -> Callable[[Quantised, str], Iterator[tuple[str, bytes]]]:
    """What writes a matrix, by its whole name, in the plan's format."""
    return own_encoded if scheme.format == OWN else lambda found, name: encoded(found, name.removesuffix("weight"))


def encoded(found: Quantised, stem: str) -> Iterator[tuple[str, bytes]]:
    """(tensor, bytes) of a matrix in few bits: its codes and its scales. stem: its name without "weight"."""
    levels = found.levels
    yield f"{stem}weight_packed", packed((found.codes.astype(np.int16) - levels.lowest), levels.bits).tobytes()
    yield f"{stem}weight_scale", encode(found.scales, levels.scale_dtype, f"{stem}weight_scale")


# --- config and counts -------------------------------------------------------------------------------------------


def patch(config: dict[str, Any], model: Model, plan: Plan) -> None:
    """The entry that engines look for; experts alone match its targets, which want an expert's number."""
    if not plan.at("bits"):
        return
    bits, scheme = next(iter(plan.at("bits").values())), plan.at("quantized")
    if scheme.format == OWN:
        config["quantization_config"] = dict(INTEGERS.settings)
        return
    names = sorted({part for block in quantised_blocks(model) for part in block.layout.parts})
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": scheme.group_size}
    group = {
        "targets": [rf"re:.*\.experts\.\d+\.({'|'.join(names)})$"],
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": weights | {"dynamic": False},
    }
    config["quantization_config"] = {
        "quant_method": FORMAT,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {"experts": group},
    }


def correct(model: Model, plan: Plan, counts: dict[str, int]) -> None:
    """A weight counts as one whatever its bits, and words and scales as none."""
    bits, scheme = plan.at("bits"), plan.at("quantized")
    header = 5 if scheme and scheme.format == OWN else 2  # numbers that say a matrix's shape
    for block in quantised_blocks(model) if bits else ():
        for rows, columns in expert_shapes(model.checkpoint, block).values():
            for e in range(block.num_experts):
                width = width_of(bits[block.key], e)
                groups = columns // scheme.group_size if width else 0
                stored = rows * (columns * width // 32 + groups)
                counts["experts"] += rows * columns
                counts["linears"] += rows * columns - stored
                counts["all"] += rows * columns - stored - header


# --- verify ------------------------------------------------------------------------------------------------------


def verify(written: Written, source: Model, plan: Plan) -> Verified:
    """Of experts that were made from data: each expert's checksum, and how far its weights are from the original's."""
    bits, scheme = plan.at("bits"), plan.at("quantized")
    if not bits or not scheme.from_data:
        return Verified()
    recorded = object_at(record_of(written.checkpoint.path), "report", "checksums")
    tensors, faults, view = set[str](), list[str](), opened(written.checkpoint)
    for block, ours in zip(source.main, find_blocks(view, source.family).main, strict=True):
        sums = recorded.get(block.key)
        for e in range(block.num_experts):
            where, raw = f"{block.name}, expert {e}", list[bytes]()
            theirs = expert_storage(source.checkpoint, block, e)
            for found, matrix in zip(expert_storage(view, ours, e), theirs, strict=True):
                width = width_of(bits[block.key], e)
                names = [matrix.name + part for part in PARTS_OF[scheme.format]]
                tensors.update(names)
                raw += [written.checkpoint.raw(name) for name in names[:2]]
                weight = matrix.rows(0) if width else np.zeros(matrix.shape, np.float32)
                changed = float(np.linalg.norm(found.rows(0) - weight)) / (float(np.linalg.norm(weight)) or 1.0)
                if not changed <= MOST_CHANGED:
                    faults.append(f"{where}: {matrix.name} is {changed:.1f} times its norm away from the original's")
            if not isinstance(sums, list) or sums[e : e + 1] != [checksum(raw)]:
                faults.append(f"{where}: its codes and scales are not those that were recorded")
    note = f", {len(tensors):,} with codes and scales as recorded"
    return Verified(tensors, faults=tuple(faults[:MOST_FAULTS]), note=note)


def checksum(raw: list[bytes]) -> int:
    """CRC-32 of an expert's parts, in the order of its matrices (`expert_storage`): codes, then scales."""
    crc = 0
    for part in raw:
        crc = zlib.crc32(part, crc)
    return crc


def unlike(plan: Plan) -> str:
    return "experts were rounded to few bits" if plan.at("bits") else ""


KIND = Kind(
    order=7, layer=Keys(("bits",), read_bits), plan=Keys(("quantized",), read_scheme), check=check, outputs=outputs,
    patch=patch, count=correct, verify=verify, unlike=unlike,
)  # fmt: skip
