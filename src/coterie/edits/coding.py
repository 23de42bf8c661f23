"""From dense tensors to packed ones: which may be packed, how much each keeps, and their parts, put where they belong.

`edits/pack.py` decides and writes with it. Streamed: one matrix in memory, read twice, because a safetensors header
names all sizes before the first value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from coterie.codecs import bits as fmt
from coterie.errors import CoterieError
from coterie.model.experts import expert_weights
from coterie.model.layer import LAYER, Model
from coterie.model.own import is_own
from coterie.storage.checkpoint import Checkpoint, Tensor
from coterie.storage.numerics import decode
from coterie.storage.record import Progress
from coterie.storage.shards import Output
from coterie.storage.writer import Writer


@dataclass(frozen=True)
class Coding:
    """How the matrices of a checkpoint are packed: `dtype` of the stored values, None for their own."""

    checkpoint: Checkpoint
    dtype: str | None = None

    def parts(self, tensor: Tensor, num_values: int) -> list[Output]:
        """What the file holds for a tensor of which so many values are kept, still empty."""
        return fmt.parts(tensor.name, self.dtype or tensor.dtype, tensor.shape, num_values)

    def num_bytes(self, tensor: Tensor, num_values: int) -> int:
        return sum(part.num_bytes for part in self.parts(tensor, num_values))

    def shrinks(self, tensor: Tensor, num_values: int) -> bool:
        """Whether the packed form takes fewer bytes."""
        return self.num_bytes(tensor, num_values) < tensor.num_bytes

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


def candidates(model: Model) -> list[Tensor]:
    """Expert matrices, and the weights of other matrices in decoder layers but routers: what may have been pruned."""
    tensors = model.checkpoint.tensors
    experts = {n for b in model.moe if not b.attention for n in expert_weights(model.checkpoint, b)}
    found = []
    for name, tensor in tensors.items():
        other = model.roles[name] in ("shared", "other") and len(tensor.shape) == 2 and LAYER.fullmatch(name)
        if name in experts or (other and name.endswith("_proj.weight")):
            if tensor.dtype in fmt.CODES and len(tensor.shape) in (2, 3) and math.prod(tensor.shape) > 0:
                found.append(tensor)
    return found


def counted(coding: Coding, names: list[str], on_progress: Progress) -> dict[str, list[int]]:
    """Kept values of every matrix of the named tensors."""
    found = {}
    for done, name in enumerate(names):
        found[name] = coding.counts(coding.checkpoint.tensors[name])
        on_progress("counting zeros", done + 1, len(names))
    return found


def some_shrink(model: Model, on_progress: Progress) -> bool:
    """Whether any matrix would shrink; reads until one does."""
    coding, found = Coding(model.checkpoint), candidates(model)
    for done, tensor in enumerate(found):
        if coding.shrinks(tensor, sum(coding.counts(tensor))):
            return True
        on_progress("looking for zeros", done + 1, len(found))
    return False


def fill(coding: Coding, chosen: dict[str, list[int]], writer: Writer, on_progress: Progress) -> None:
    """Packs the chosen tensors, with these counts, into the holes that were left for their parts."""
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


def estimated(model: Model, zeros: Mapping[str, int]) -> int | None:
    """Bytes of a checkpoint, packed, of whose tensors so many values are zero; None where packing would not help.

    Parts end where 8 bytes are full, so that other zeros in the same number differ by less than that in each tensor.
    """
    checkpoint = model.checkpoint
    if is_own(checkpoint.config) or checkpoint.config.get("quantization_config"):
        return None
    coding, found = Coding(checkpoint), {t.name: t for t in candidates(model) if zeros.get(t.name)}
    kept = {name: [t.num_parameters - zeros[name]] for name, t in found.items()}
    chosen = {name: counts for name, counts in kept.items() if coding.shrinks(found[name], sum(counts))}
    return int(sizes(coding, chosen)["after"]) if chosen else None


def sizes(coding: Coding, chosen: dict[str, list[int]]) -> dict[str, Any]:
    """Bytes of the whole checkpoint before and after, and of the chosen tensors alone."""
    tensors = {n: coding.checkpoint.tensors[n] for n in chosen}
    dense = sum(t.num_bytes for t in tensors.values())
    stored = sum(coding.num_bytes(t, sum(chosen[n])) for n, t in tensors.items())
    before = coding.checkpoint.num_bytes
    return {
        "before": before,
        "after": before - dense + stored,
        "tensors": len(chosen),
        "dense_bytes": dense,
        "bytes": stored,
        "ratio": stored / dense,
        "zeros": 1 - sum(map(sum, chosen.values())) / sum(t.num_parameters for t in tensors.values()),
    }
