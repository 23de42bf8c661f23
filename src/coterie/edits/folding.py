"""A condensed block as one dense SwiGLU MLP: the shared expert and the kept ones side by side, gates in down's columns.

    down [act(gate x) * up x] = sum_i w_i down_i [act(gate_i x) * up_i x]

with the rows of all gates and ups one under the other, and the columns w_i down_i one beside the other: exact, but for
the one rounding when it is stored. Zero rows and columns fill it up to the model's one dense width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coterie.edits.plan import Condensed
from coterie.errors import CoterieError
from coterie.model.experts import expert_matrices, expert_shapes, hidden_size
from coterie.model.family import GATED
from coterie.model.layer import MoE, expert_names
from coterie.storage.checkpoint import FLOATS, Checkpoint
from coterie.storage.planned import scale_of

GATE, UP, DOWN = range(3)

Matrices = tuple[np.ndarray, np.ndarray, np.ndarray]  # gate (F, D), up (F, D), down (D, F), float32


def shared_names(block: MoE) -> tuple[tuple[str, str, str], str | None] | None:
    """The shared expert's (gate, up, down) tensors, and the vector of a gate of its own; None where there is none.

    A dense MLP that stands beside the block, not in it, is none of its business.
    Raises: CoterieError for a shared expert stored in a way we do not read.
    """
    names = [name for name in block.shared if is_inside(block, name)]
    if not names:
        return None
    own = next((n for n in names if n.endswith("_gate.weight")), None)
    for spelling in (GATED, (block.layout.gate, block.layout.up, block.layout.down)):
        found = [n for part in spelling for n in names if n.endswith(f".{part}.weight")]
        if len(found) == 3 and len(names) == 3 + (own is not None):
            return (found[GATE], found[UP], found[DOWN]), own
    raise CoterieError(f"{block.name}: its shared expert ({', '.join(names)}) is not one gate, up and down matrix")


def is_inside(block: MoE, name: str) -> bool:
    """Whether a tensor belongs to the block itself, and goes with it."""
    return name.startswith(tuple(block.prefix + first for first in block.layout.blocks))


def weights(block: MoE) -> tuple[str, ...]:
    """Some of the routed experts' tensors: those of the first, or the fused ones."""
    return tuple(block.experts[0].values()) if block.experts else block.fused


def natural_width(checkpoint: Checkpoint, block: MoE, condensed: Condensed) -> int:
    """The width of all parts together, before padding; 1 at least."""
    shared = shared_names(block) if condensed.shared_gate else None
    width = checkpoint.tensors[shared[0][UP]].shape[0] if shared else 0
    return max(1, width + len(condensed.experts) * expert_shapes(checkpoint, block)["up"][0])


def parts(checkpoint: Checkpoint, block: MoE, condensed: Condensed) -> Iterator[tuple[float, Matrices]]:
    """(constant gate, matrices) of the shared expert, unless its gate is 0, and of the kept ones in their order."""
    shared = shared_names(block)
    if shared and condensed.shared_gate:
        gate, up, down = (checkpoint.read(name).astype(np.float32, copy=False) for name in shared[0])
        yield condensed.shared_gate * scale_of(checkpoint), (gate, up, down)
    for e, constant in zip(condensed.experts, condensed.gates, strict=True):
        matrices = expert_matrices(checkpoint, block, e)
        assert matrices[GATE] is not None
        yield constant, matrices  # type: ignore[misc]


def folded(checkpoint: Checkpoint, block: MoE, condensed: Condensed, width: int, which: int) -> np.ndarray:
    """One matrix of the folded MLP, float32: gate or up (width, D), or down (D, width). Nothing is rounded here."""
    hidden = hidden_size(checkpoint, block)
    rows = np.zeros((width, hidden), np.float32)  # of down: its columns
    position = 0
    for constant, matrices in parts(checkpoint, block, condensed):
        part = matrices[which]
        last = position + matrices[UP].shape[0]
        rows[position:last] = np.float32(constant) * part.T if which == DOWN else part
        position = last
    return rows.T if which == DOWN else rows


def check_foldable(checkpoint: Checkpoint, block: MoE) -> None:
    """Raises: CoterieError for a block that one SwiGLU MLP cannot stand for."""
    fault = ""
    if block.mtp or block.attention:
        fault = "its experts are not those of an ordinary decoder layer"
    elif block.layout.gate is None:
        fault = "its experts have no gate"
    elif any("bias" in name for name in expert_names(block)):
        fault = "its experts have biases"
    elif block.whole:
        fault = f"{block.whole[0]} works on the sum of the experts"
    elif not block.layout.router.startswith(block.layout.blocks[0]):
        fault = "its experts stand in the decoder layer itself"
    if fault:
        raise CoterieError(f"{block.name}: {fault}; expected a block that one dense SwiGLU MLP can stand for")
    shared = shared_names(block)
    for name in (*expert_names(block), *(shared[0] if shared else ())):
        if checkpoint.tensors[name].dtype not in FLOATS:
            kind = checkpoint.tensors[name].dtype
            raise CoterieError(f"tensor {name!r}: {kind} weights cannot be folded; dequantise the checkpoint first")


def check_condensed(checkpoint: Checkpoint, block: MoE, condensed: Condensed) -> None:
    """Raises: CoterieError for a choice that does not fit its block."""
    check_foldable(checkpoint, block)
    if condensed.experts and max(condensed.experts) >= block.num_experts:
        raise CoterieError(
            f"plan: {block.name} condenses expert {max(condensed.experts)}, but its ids end at {block.num_experts - 1}"
        )
    if not condensed.experts and condensed.shared_gate and shared_names(block) is None:
        raise CoterieError(f"plan: {block.name} keeps no expert and has no shared one: nothing would be left")
