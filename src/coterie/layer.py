"""The MoE blocks of a checkpoint in canonical form: which tensor is what, and each expert's matrices.

Axes: L layer, E expert, K top-k, T token, D hidden, F expert hidden, O/I out/in.
`find_blocks` claims every tensor of a checkpoint by exactly one rule of its family, or refuses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coterie.checkpoint import Checkpoint, Tensor
from coterie.errors import CoterieError
from coterie.family import Family, Layout, lookup

if TYPE_CHECKING:
    import numpy as np

LAYER = re.compile(r"(?P<prefix>(?:.+?\.)?(?:layers|blocks)\.(?P<index>\d{1,6})\.)(?P<rest>.+)", re.DOTALL)
EXPERT_LIKE = re.compile(r"(^|[._])(experts?|router)([._]|$)")
ROLES = ("expert", "shared", "router", "row", "table", "other")


@dataclass(frozen=True, eq=False)  # compared and hashed as the one block it is
class MoE:
    """One MoE block: the names of its tensors by role. Exactly one of `experts` and `fused` is filled."""

    key: str  # of the layer in plans: "3", or "mtp.0"
    attention: bool  # the block is made of attention experts
    mtp: bool  # of a multi-token-prediction layer, which stock inference leaves out
    prefix: str  # "model.layers.3."
    layout: Layout
    num_experts: int
    router: str
    rows: tuple[str, ...]
    tables: tuple[str, ...]
    experts: tuple[dict[str, str], ...]  # per expert: "gate_proj.weight" -> full name
    fused: tuple[str, ...]
    shared: tuple[str, ...]
    whole: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"layer {self.key}" + (" (attention)" if self.attention else "")


@dataclass(frozen=True)
class Blocks:
    """What `find_blocks` found: the MoE blocks in file order, and every tensor's role."""

    moe: tuple[MoE, ...]
    roles: dict[str, str] = field(repr=False)


def find_blocks(checkpoint: Checkpoint, family: Family) -> Blocks:
    """Claims every tensor by one rule. Raises: CoterieError for an unclaimed one, or a block that is not whole."""
    num_experts = family.num_experts(checkpoint.config)
    layers: dict[str, dict[str, str]] = {}
    roles: dict[str, str] = {}
    for name in checkpoint.tensors:
        match = LAYER.fullmatch(name)
        if match:
            layers.setdefault(match["prefix"], {})[match["rest"]] = name
        else:
            _refuse_expert_like(name, name)
            roles[name] = "other"
    found = []
    for prefix, names in layers.items():
        claimed: dict[str, str] = {}
        blocks = []
        for attention, layouts in ((False, family.layouts), (True, family.attention)):
            layout = next((lay for lay in layouts if lay.router in names), None)
            if layout:
                block = _block(checkpoint, family, prefix, layout, names, attention, num_experts)
                _check_block(checkpoint, block, num_experts)
                claimed |= _claims(block)
                blocks.append(block)
        below = tuple(b for block in blocks for b in block.layout.blocks)
        for rest, name in names.items():
            if name not in claimed:
                if rest.startswith(below) if below else False:
                    raise CoterieError(
                        f"tensor {name!r} stands in a MoE block, but no rule of family {family.name} claims it; "
                        "refusing to guess: report it, or add it to the family's record"
                    )
                _refuse_expert_like(rest, name)
                claimed[name] = "other"
        roles |= claimed
        found += blocks
    if not any(not block.mtp for block in found):
        raise CoterieError(
            f"{checkpoint.path}: no layer has a router named like {family.layouts[0].router!r}; "
            f"a dense model, or a spelling that family {family.name} does not know"
        )
    return Blocks(tuple(sorted(found, key=lambda b: (b.mtp, _order(b.key), b.attention))), roles)


def _order(key: str) -> int:
    return int(key.rpartition(".")[2])


def _refuse_expert_like(rest: str, name: str) -> None:
    if EXPERT_LIKE.search(rest) and "shared" not in rest:
        raise CoterieError(
            f"tensor {name!r} is named like an expert's or a router's, but belongs to no MoE block that we know; "
            "refusing to skip it"
        )


def _block(
    checkpoint: Checkpoint,
    family: Family,
    prefix: str,
    layout: Layout,
    names: dict[str, str],
    attention: bool,
    num_experts: int,
) -> MoE:
    """Sorts a layer's tensors (`names`: relative -> full) into the block's roles."""
    index = int(LAYER.fullmatch(prefix + "x")["index"])  # type: ignore[index]
    num_layers = next((v for _, _, v in lookup(checkpoint.config, ("num_hidden_layers", "n_layers", "num_layers"))), 0)
    mtp_prefix = "mtp" in prefix or "nextn" in prefix
    mtp = mtp_prefix or (type(num_layers) is int and 0 < num_layers <= index)
    numbered = re.compile(re.escape(layout.experts) + r"(\d{1,6})\.(.+)", re.DOTALL)
    experts: list[dict[str, str]] = [{} for _ in range(num_experts)]
    fused, shared, whole = [], [], []
    for rest, name in names.items():
        match = numbered.fullmatch(rest)
        if match:
            number = int(match[1])
            if number >= num_experts or match[1] != str(number):
                raise CoterieError(f"tensor {name!r}: expert {match[1]}, but the config counts {num_experts} experts")
            experts[number][match[2]] = name
        elif any(rest == f or rest.startswith((f + "_", f + ".")) for f in layout.fused):
            fused.append(name)
        elif rest.startswith(layout.shared):
            shared.append(name)
        elif rest.startswith(layout.whole) if layout.whole else False:
            whole.append(name)
    return MoE(
        key=f"mtp.{index}" if mtp_prefix else str(index),
        attention=attention,
        mtp=mtp,
        prefix=prefix,
        layout=layout,
        num_experts=num_experts,
        router=names[layout.router],
        rows=tuple(names[r] for r in layout.rows if r in names),
        tables=tuple(names[t] for t in layout.tables if t in names),
        experts=tuple(experts) if any(experts) else (),
        fused=tuple(fused),
        shared=tuple(shared),
        whole=tuple(whole),
    )


def _claims(block: MoE) -> dict[str, str]:
    claims = [(block.router, "router"), *((n, "row") for n in block.rows), *((n, "table") for n in block.tables)]
    claims += [(n, "expert") for expert in block.experts for n in expert.values()]
    claims += [(n, "expert") for n in block.fused]
    claims += [(n, "shared") for n in block.shared] + [(n, "other") for n in block.whole]
    assert len({n for n, _ in claims}) == len(claims), f"{block.name}: a tensor claimed twice"
    return dict(claims)


def _check_block(checkpoint: Checkpoint, block: MoE, num_experts: int) -> None:
    """The block is whole: one spelling, all experts alike, one router row and one entry of each kind per expert."""
    where = f"{checkpoint.path}: {block.name}"
    tensors = checkpoint.tensors
    if bool(block.experts) == bool(block.fused):
        fault = "experts both fused and by number" if block.fused else "a router but no experts"
        raise CoterieError(f"{where}: found {fault}; expected one of the two spellings")
    for number, expert in enumerate(block.experts):
        if {k: _kind(tensors[n]) for k, n in expert.items()} != {k: _kind(tensors[n]) for k, n in block.experts[0].items()}:
            odd = sorted(set(expert) ^ set(block.experts[0])) or ["shapes"]
            raise CoterieError(f"{where}: expert {number} differs from expert 0 in {', '.join(odd)}; expected all alike")
    for name in block.fused:
        shape = tensors[name].shape
        if not shape or shape[0] == 0 or shape[0] % num_experts:
            raise CoterieError(f"{where}: {name!r} has shape {list(shape)}, which {num_experts} experts cannot share")
    for name in (block.router, *block.rows):
        shape = tensors[name].shape
        if expert_axis(shape, num_experts) is None:
            raise CoterieError(f"{where}: {name!r} has shape {list(shape)}; the config counts {num_experts} experts")


def _kind(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.shape


def expert_axis(shape: tuple[int, ...], num_rows: int) -> int | None:
    """The axis that counts experts, if everything before it has length 1 (so that rows are byte ranges)."""
    for axis, length in enumerate(shape):
        if length == num_rows:
            return axis
        if length != 1:
            return None
    return None


@dataclass(frozen=True)
class Experts(Sequence):
    """The experts of one block, read from disk one at a time: `experts[e] -> (gate, up, down)`.

    Matrices are float32 (out, in): gate and up (F, D), down (D, F); gate is None where the family has none.
    Quantised experts (FP8 with scales, MXFP4) are dequantised exactly; other codings are refused.
    """

    checkpoint: Checkpoint
    block: MoE

    def __len__(self) -> int:
        return self.block.num_experts

    def __getitem__(self, e: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:  # type: ignore[override]
        from coterie.numerics import expert_matrices

        if not 0 <= e < len(self):
            raise IndexError(e)
        return expert_matrices(self.checkpoint, self.block, e)

    def flat(self, e: int) -> np.ndarray:
        """All weights of expert e as one float32 vector: gate, up, down."""
        import numpy as np

        return np.concatenate([m.ravel() for m in self[e] if m is not None])


@dataclass(frozen=True, eq=False)
class Layer:
    """What a pruning method sees of one block: the router's rows, and the experts on demand."""

    key: str
    router: np.ndarray  # (E, D) float32
    experts: Experts
    num_groups: int = 1

    @property
    def num_experts(self) -> int:
        return len(self.router)


def read_layer(checkpoint: Checkpoint, block: MoE, num_groups: int = 1) -> Layer:
    """Reads the block's router (and nothing else). Raises: CoterieError for NaN or infinite rows."""
    import numpy as np

    values = checkpoint.read(block.router).astype(np.float32, copy=False)
    router = values.reshape(-1, values.shape[-1])[: block.num_experts]
    if not np.isfinite(router).all():
        raise CoterieError(f"{checkpoint.path}: router {block.router!r} holds NaN or infinite values; expected finite ones")
    return Layer(block.key, router, Experts(checkpoint, block), num_groups)
