"""Experts one at a time, in canonical form, whatever the layout on disk: `experts[e] -> (gate, up, down)`.

One layer of the largest models holds 30 GB of experts, so the expert, not the layer, is the unit of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from coterie.codecs import Coded, Place
from coterie.codecs.open import matrices_at
from coterie.errors import CoterieError
from coterie.model.family import lookup
from coterie.model.layer import MoE, is_columns, shared_by
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.numerics import encode

QUANTISATION = "quantization_config"  # the entry of config.json
Matrices = tuple[np.ndarray | None, np.ndarray, np.ndarray]  # of an expert: gate (F, D), up (F, D), down (D, F)


@dataclass(frozen=True)
class Experts(Sequence):
    """The experts of one block, read from disk one at a time: `experts[e] -> (gate, up, down)`.

    Matrices are float32 (out, in): gate and up (F, D), down (D, F); gate is None where the family has none.
    Quantised experts are dequantised exactly where a codec knows how (`codecs/`); other codings are refused.
    """

    checkpoint: Checkpoint
    block: MoE

    def __len__(self) -> int:
        return self.block.num_experts

    def __getitem__(self, e: int) -> Matrices:  # type: ignore[override]
        if not 0 <= e < len(self):
            raise IndexError(e)
        return expert_matrices(self.checkpoint, self.block, e)

    def flat(self, e: int) -> np.ndarray:
        """All weights of expert e as one float32 vector: gate, up, down. Raises: CoterieError for NaN or infinity."""
        found = np.concatenate([m.ravel() for m in self[e] if m is not None])
        if not np.isfinite(found).all():
            raise CoterieError(
                f"{self.checkpoint.path}: {self.block.name}: expert {e} holds NaN or infinite weights; expected finite"
            )
        return found


@dataclass(frozen=True, eq=False)
class Layer:
    """What a pruning method sees of one block: the router's rows, and the experts, both read when asked for."""

    experts: Experts

    @property
    def key(self) -> str:
        return self.experts.block.key

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def router(self) -> np.ndarray:
        """(E, D) float32. Raises: CoterieError for NaN or infinite rows."""
        return _router(self)

    @cached_property
    def norms(self) -> np.ndarray:
        """||row||_2 of every router row, (E,) float64; they stay in memory, as rows do not."""
        return np.linalg.norm(self.router.astype(np.float64), axis=1)

    def check_router(self) -> None:
        """Raises: CoterieError for NaN or infinite rows."""
        _ = self.norms


@lru_cache(maxsize=1)  # methods go layer by layer; of all layers at once, routers alone can be a gigabyte
def _router(layer: Layer) -> np.ndarray:
    checkpoint, block = layer.experts.checkpoint, layer.experts.block
    values = read_rows(checkpoint, block, block.router).astype(np.float32, copy=False)
    num_rows = block.zero_rows.stop
    if values.size == 0 or values.size != num_rows * values.shape[-1]:
        raise CoterieError(
            f"{checkpoint.path}: router {block.router!r} has shape {list(values.shape)}; "
            f"expected one row for each of {num_rows} experts"
        )
    router = values.reshape(num_rows, -1)[: block.num_experts]
    if not np.isfinite(router).all():
        raise CoterieError(f"{checkpoint.path}: router {block.router!r} holds NaN or infinite values; expected finite")
    return router


def read_layer(checkpoint: Checkpoint, block: MoE) -> Layer:
    """The block as methods see it; nothing is read yet."""
    return Layer(Experts(checkpoint, block))


def read_rows(checkpoint: Checkpoint, block: MoE, name: str) -> np.ndarray:
    """The router (rows, D), or what one of `rows` or `tables` has of this block, as computation wants it."""
    values = checkpoint.read(name)
    if is_columns(block, name):
        return values.T
    return values[block.layout.segment[0]] if shared_by(block, name) > 1 else values


def hidden_size(checkpoint: Checkpoint, block: MoE) -> int:
    """D, of what the block's router sees."""
    shape = checkpoint.tensors[block.router].shape
    return shape[0] if is_columns(block, block.router) else shape[-1]


def expert_matrices(checkpoint: Checkpoint, block: MoE, e: int) -> Matrices:
    """(gate, up, down) of expert e as float32 (out, in) matrices, whatever the layout on disk."""
    layout = block.layout
    if block.experts and not layout.lists:
        up, down, *gate = (matrix.rows(0) for matrix in expert_storage(checkpoint, block, e))
        return (gate[0] if gate else None), up, down
    first, *rest = (matrix.rows(0 if block.experts else e) for matrix in expert_storage(checkpoint, block, e))
    if len(rest) == 2:  # gate (F, D), up (F, D), and down
        return first, rest[0], rest[1].T if layout.transposed_down else rest[1]
    down = rest[0]
    if layout.transposed:
        first, down = first.T, down.T
    if layout.gate is None:
        return None, first, down
    if len(first) % 2:
        raise CoterieError(f"{block.name}: {len(first)} fused rows per expert; expected gate and up, an even number")
    if layout.interleaved:
        return first[0::2], first[1::2], down
    gate_rows, up = np.split(first, 2)
    return gate_rows, up, down


def expert_shapes(checkpoint: Checkpoint, block: MoE) -> dict[str, tuple[int, int]]:
    """(out, in) of an expert's matrices by part ("gate", "up", "down"), from the headers."""
    layout = block.layout
    if block.experts and not layout.lists:
        parts = {"gate": layout.gate, "up": layout.up, "down": layout.down}
        held = _held(checkpoint, block, 0)
        shapes = {part: matrix.shape for part, name in parts.items() if name and (matrix := held[name])}
        return {part: (shape[0], shape[1]) for part, shape in shapes.items()}
    stored = [matrix.shape for matrix in expert_storage(checkpoint, block, 0)]
    num_blocks = block.num_experts if block.fused else 1  # of rows, where matrices stand one after the other
    first, *rest = ((shape[-2] // (1 if len(shape) == 3 else num_blocks), shape[-1]) for shape in stored)
    if len(rest) == 2:
        return {"gate": first, "up": rest[0], "down": rest[1][::-1] if layout.transposed_down else rest[1]}
    (rows, columns), down = (s[::-1] if layout.transposed else s for s in (first, rest[0]))
    if layout.gate is None:
        return {"up": (rows, columns), "down": down}
    return {"gate": (rows // 2, columns), "up": (rows // 2, columns), "down": down}


def expert_weights(checkpoint: Checkpoint, block: MoE) -> list[str]:
    """The tensors that hold the experts' matrices, without scales and biases.

    Of one that is packed in several, the name that it would have alone: a checkpoint has no such tensor.
    """
    if block.experts:
        parts = block.layout.parts
        return [name for expert in block.experts for name in _weights(expert, parts)]
    return [matrix.name for matrix in expert_storage(checkpoint, block, 0)]


def _weights(expert: dict[str, str], parts: tuple[str, ...]) -> list[str]:
    """Those of an expert that is stored under its number, in the file's order."""
    alone = [name for key, name in expert.items() if key.removesuffix(".weight") in parts]
    if len(alone) == len(parts) or not expert:
        return alone
    key, name = next(iter(expert.items()))
    return [f"{name.removesuffix(key)}{part}.weight" for part in parts]


def expert_storage(checkpoint: Checkpoint, block: MoE, e: int) -> list[Coded]:
    """How the matrices of expert e are stored: up, down and, where there is one, gate; or the fused tensors, in the
    layout's order, in which matrix e is its own. Raises: CoterieError where one is stored in no way that we know."""
    found = _held(checkpoint, block, e)
    stored = [matrix for matrix in found.values() if matrix]
    if len(stored) == len(found):
        return stored
    if block.fused:
        raise CoterieError(f"{block.name}: expected fused weights {', '.join(block.layout.fused)}; dequantise first")
    part = next(part for part, matrix in found.items() if not matrix)
    known = ", ".join(sorted(block.experts[e]))
    where = f"{block.prefix}{block.layout.experts}{block.first + e}"
    raise CoterieError(f"{where} ({known}): no {part!r} weight in a form that we know; dequantise the checkpoint first")


def _held(checkpoint: Checkpoint, block: MoE, e: int) -> dict[str, Coded | None]:
    """Expert e's matrices by the layout's name: stored as `name.weight` or as `name`, fused ones as `name`."""
    layout = block.layout
    if block.fused:
        return {name: matrices_at(checkpoint, _place(checkpoint, block, e, name)) for name in layout.fused}
    found: dict[str, Coded | None] = {}
    for part in layout.lists or (layout.up, layout.down, layout.gate):
        if part:
            places = (_place(checkpoint, block, e, key) for key in (f"{part}.weight", part))
            found[part] = next((matrix for place in places if (matrix := matrices_at(checkpoint, place))), None)
    return found


def quantisation(checkpoint: Checkpoint) -> object:
    """What config.json says of how weights are stored; an empty object where it says nothing."""
    said = (value for _, _, value in lookup(checkpoint.config, (QUANTISATION,)) if value is not None)
    return next(said, {})


def _place(checkpoint: Checkpoint, block: MoE, e: int, key: str) -> Place:
    """What a codec has to know of a tensor: `key` is its name below the expert's, or below the layer's."""
    layout, settings = block.layout, quantisation(checkpoint)
    if block.experts:
        name = block.prefix + layout.expert(block.first + e, key)
        return Place(name, key, 0, block.experts[e], layout.parts, settings=settings)
    beside = {name.removeprefix(block.prefix): name for name in block.fused}
    weights = tuple(name.removesuffix(".weight") for name in layout.fused)
    two = layout.gate and not layout.transposed and not layout.interleaved and len(layout.fused) == 2
    return Place(
        block.prefix + key,
        key,
        block.num_experts,
        beside,
        weights,
        transposed=bool(layout.transposed),
        gate_above_up=bool(two and key == layout.fused[0]),
        settings=settings,
    )


def expert_biases(checkpoint: Checkpoint, block: MoE, e: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Biases of expert e as float32: of gate above up (2F,), and of down (D,); None where there are none."""
    layout = block.layout
    if block.experts and not layout.lists:
        names = block.experts[e]
        parts = [p for p in (layout.gate, layout.up) if p and f"{p}.bias" in names]
        first = [checkpoint.read(names[f"{p}.bias"]).astype(np.float32) for p in parts]
        down = names.get(f"{layout.down}.bias")
        return (np.concatenate(first) if first else None), (checkpoint.read(down).astype(np.float32) if down else None)
    if layout.lists and block.experts:
        own = [block.experts[e].get(f"{name}.bias") for name in layout.lists]
        rows = [checkpoint.read(n).astype(np.float32) if n else None for n in own]
    else:
        found = [f"{block.prefix}{name}_bias" for name in layout.fused]
        known = [n if n in checkpoint.tensors else None for n in found]
        rows = [checkpoint.read_rows(n, e, e + 1)[0].astype(np.float32) if n else None for n in known]
    first_row = rows[0]
    if first_row is not None and layout.interleaved:
        first_row = np.concatenate([first_row[0::2], first_row[1::2]])
    return first_row, rows[-1]


def store_expert(checkpoint: Checkpoint, block: MoE, e: int, matrices: Matrices) -> list[tuple[str, int, bytes]]:
    """(tensor name, offset in it, bytes) of expert e's changed (gate, up, down): the inverse of `expert_matrices`."""
    found = [(n, encode(m, checkpoint.tensors[n].dtype, n)) for n, m in _as_stored(block, e, matrices)]
    return [(n, 0 if block.experts else e * len(raw), raw) for n, raw in found]


def zero_expert(checkpoint: Checkpoint, block: MoE, e: int, masks: Matrices) -> list[tuple[str, int, bytes]]:
    """As `store_expert`, of expert e's stored bytes with zeros where the masks (gate, up, down) are true.

    Bytes that stay are never decoded, so quantised weights (FP8) keep their scales.
    """
    found = []
    for name, mask in _as_stored(block, e, masks):
        tensor = checkpoint.tensors[name]
        size = tensor.num_bytes if block.experts else tensor.num_bytes // block.num_experts
        offset = 0 if block.experts else e * size
        found.append((name, offset, zeroed(checkpoint.raw(name, offset, size), mask, name)))
    return found


def zeroed(raw: bytes, mask: np.ndarray, name: str) -> bytes:
    """Stored elements with zero bytes where the mask, in the stored order, is true."""
    width, rest = divmod(len(raw), mask.size)
    if rest or width not in (1, 2, 4, 8):
        raise CoterieError(f"tensor {name!r}: several weights share a byte; dequantise the checkpoint first")
    values = np.frombuffer(raw, f"<u{width}").copy()
    values[mask.reshape(-1)] = 0
    return values.tobytes()


def _fused(block: MoE) -> list[str]:
    return [block.prefix + name for name in block.layout.fused]


def _as_stored(block: MoE, e: int, matrices: Matrices) -> list[tuple[str, np.ndarray]]:
    """(tensor name, its matrix or its part of expert e) of canonical (gate, up, down)."""
    layout, (gate, up, down) = block.layout, matrices
    if block.experts and not layout.lists:
        pairs = [(layout.gate, gate), (layout.up, up), (layout.down, down)]
        names = block.experts[e]
        if packed := next((p for p, m in pairs if m is not None and not {p, f"{p}.weight"} & names.keys()), None):
            raise CoterieError(f"expert tensors {', '.join(sorted(names))}: {packed!r} is packed; dequantise it first")
        return [(names.get(f"{p}.weight") or names[str(p)], m) for p, m in pairs if m is not None]
    stored = [block.experts[e][f"{name}.weight"] for name in layout.lists] if block.experts else _fused(block)
    if len(stored) == 3:
        parts = [gate, up, down.T if layout.transposed_down else down]
    elif gate is None:
        parts = [up, down]
    elif layout.interleaved:
        parts = [np.stack([gate, up], 1).reshape(-1, gate.shape[1]), down]
    else:
        parts = [np.concatenate([gate, up]), down]
    if layout.transposed:
        parts = [p.T for p in parts if p is not None]
    return [(n, p) for n, p in zip(stored, parts, strict=True) if p is not None]
