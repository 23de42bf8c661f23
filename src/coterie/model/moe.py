"""The experts' computation: gate, up, activation, down, for every family alike.

transformers calls it through its public registry of experts implementations, with the hidden states, the chosen
expert ids and their weights; routing, activation and everything around the experts stay stock. Calibration and
analysis (one dense `Expert` at a time) and packed models (`sparse.py`) share it; only their products differ.
Axes: T token, D hidden, F expert hidden, K top-k, E expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from coterie.errors import CoterieError
from coterie.kernels.products import padded
from coterie.model.experts import expert_biases, expert_matrices, expert_storage
from coterie.model.layer import MoE
from coterie.storage.checkpoint import FLOATS, Checkpoint
from coterie.storage.tensors import read, read_into, stored_dtype

IMPLEMENTATION = "coterie"  # our name in the registry
Answer = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")  # the parameters of an experts module that hold matrices
PLAIN = FLOATS[1:]  # stored so, weights need no arithmetic but a cast
MOST_TOKENS = 1024  # of one expert at a time: what lies between its matrices stays small, and near the processor


class Products(Protocol):
    """An expert's two products, biases added: all that its computation asks of the weights, however they are stored."""

    @property
    def has_gate(self) -> bool: ...

    def up_product(self, x: torch.Tensor) -> torch.Tensor:
        """Gate above up, or up alone: (T, D) -> (T, 2F) or (T, F)."""

    def down_product(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, F) -> (T, D)."""


@dataclass
class Expert:
    """One expert's weights: `gate_up` (2F, D) with gate above up (or `up` alone), `down` (D, F), and biases."""

    gate_up: torch.Tensor
    down: torch.Tensor
    has_gate: bool
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def matrices(self) -> dict[str, torch.Tensor]:
        """Views (out, in) by role: changing one in place changes the expert."""
        if not self.has_gate:
            return {"up": self.gate_up, "down": self.down}
        gate, up = self.gate_up.chunk(2)
        return {"gate": gate, "up": up, "down": self.down}

    def up_product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.gate_up, self.gate_up_bias)

    def down_product(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.down, self.down_bias)


def read_expert(checkpoint: Checkpoint, block: MoE, e: int, dtype: torch.dtype) -> Expert:
    """Expert e from disk, whatever the layout there."""
    gate_up, down = (m.to(dtype).contiguous() for m in _stored(checkpoint, block, e) or _decoded(checkpoint, block, e))
    first, second = (None if b is None else torch.tensor(b, dtype=dtype) for b in expert_biases(checkpoint, block, e))
    return Expert(gate_up, down, block.layout.gate is not None, first, second)


def read_experts(checkpoint: Checkpoint, block: MoE, experts: Iterable[int], dtype: torch.dtype) -> Iterator[Expert]:
    """Experts in the order asked for; each is read while the one before it is in use, so two are in memory."""
    with ThreadPoolExecutor(1) as pool:
        ahead: Future[Expert] | None = None
        for e in experts:
            reading = pool.submit(read_expert, checkpoint, block, e, dtype)
            if ahead:
                yield ahead.result()
            ahead = reading
        if ahead:
            yield ahead.result()


def _decoded(checkpoint: Checkpoint, block: MoE, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate_up, down) of expert e in float32, by the reader that knows every layout."""
    gate, up, down = (None if m is None else torch.from_numpy(m.copy()) for m in expert_matrices(checkpoint, block, e))
    assert up is not None and down is not None
    return (up if gate is None else torch.cat([gate, up])), down


def _stored(checkpoint: Checkpoint, block: MoE, e: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(gate_up, down) of expert e in the dtype they are stored in, straight from the file.

    None where there is arithmetic to do (scales, 4-bit blocks) or the layout is unusual: `_decoded` knows them all.
    """
    found = expert_storage(checkpoint, block, e)
    if len({matrix.dtype for matrix in found}) != 1 or not all(m.verbatim and m.dtype in PLAIN for m in found):
        return None
    if block.layout.lists and block.experts:
        return None
    names = [matrix.name for matrix in found]
    if block.fused:
        return _read_fused(checkpoint, block, e, names)
    up, down, *gate = names
    return _read_numbered(checkpoint, [*gate, up, down])


def _read_numbered(checkpoint: Checkpoint, names: list[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
    *above, down = names
    shapes = [checkpoint.tensors[name].shape for name in above]
    if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        return None
    rows = [shape[0] for shape in shapes]
    gate_up = torch.empty(sum(rows), shapes[0][1], dtype=stored_dtype(checkpoint, down))
    for name, part in zip(above, gate_up.split(rows), strict=True):
        read_into(part, checkpoint, name)
    return gate_up, read(checkpoint, down)


def _read_fused(
    checkpoint: Checkpoint, block: MoE, e: int, names: list[str]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As `_stored`, of fused tensors (E, rows, columns) or (E * rows, columns); None for other shapes."""
    layout, parts = block.layout, []
    for name in names:
        shape = checkpoint.tensors[name].shape
        if (
            len(shape) not in (2, 3)
            or shape[0] % block.num_experts
            or (len(shape) == 3 and shape[0] != block.num_experts)
        ):
            return None
        part = torch.empty(shape[0] // block.num_experts, *shape[1:], dtype=stored_dtype(checkpoint, name))
        read_into(part, checkpoint, name, e * part.nbytes)
        parts.append(part.view(-1, shape[-1]).T if layout.transposed else part.view(-1, shape[-1]))
    if len(parts) != 2 or (layout.gate and len(parts[0]) % 2):
        return None
    gate_up, down = parts
    return (torch.cat([gate_up[0::2], gate_up[1::2]]) if layout.gate and layout.interleaved else gate_up), down


def expert_hidden(module: Any, expert: Products, x: torch.Tensor) -> torch.Tensor:
    """What enters the down projection: act(gate(x)) * up(x), or act(up(x)) without a gate; (T, D) -> (T, F).

    The activation is the module's own (`_apply_gate`, `act_fn`), which knows clamps and interleaving.
    """
    h = expert.up_product(x)
    if not expert.has_gate:
        return module.act_fn(h).to(x.dtype)
    if not module.is_concatenated:  # its `_apply_gate` wants gate and up alternating
        h = torch.stack(h.chunk(2, dim=-1), dim=-1).flatten(-2)
    return module._apply_gate(h).to(x.dtype)


def expert_output(module: Any, expert: Products, hidden: torch.Tensor) -> torch.Tensor:
    """down(hidden), and the norm behind it where the family has one; (T, F) -> (T, D)."""
    y = expert.down_product(hidden)
    return module.post_expert_norm(y.to(hidden.dtype)).to(y.dtype) if module.has_post_expert_norm else y


def expert_forward(module: Any, expert: Expert, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden (T, F), output (T, D)) of one expert for its tokens x (T, D), which are padded for the products."""
    num_tokens = len(x)
    if more := padded(num_tokens, x.dtype) - num_tokens:
        x = F.pad(x, (0, 0, 0, more))
    hidden = expert_hidden(module, expert, x)
    return hidden[:num_tokens], expert_output(module, expert, hidden)[:num_tokens]


def enter(model: Any) -> None:
    """Makes the model's experts modules ask us for their sums, through transformers' registry of implementations.

    Each module is answered by what its own attribute `coterie` holds, so that models do not know of each other.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, ask)
    model.set_experts_implementation(IMPLEMENTATION)


def ask(module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The experts' weighted sums (T, D) for hidden states (T, D), expert ids and weights (T, K).

    Raises: CoterieError for a module that nobody answers.
    """
    answer: Answer | None = getattr(module, "coterie", None)
    if answer is None:
        raise CoterieError("the experts implementation 'coterie' runs only inside a streaming forward")
    return answer(module, x, chosen, weights)


@contextmanager
def answering(modules: Sequence[Any], answer: Answer) -> Iterator[None]:
    """While entered, these experts modules' sums come from `answer(module, x, chosen, weights)`."""
    before = [getattr(module, "coterie", None) for module in modules]
    for module in modules:
        module.coterie = answer
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.coterie = own


def experts_modules(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """The decorated experts modules of a decoder layer, known by the flags that transformers sets on them.

    Of two stacks, the one that text sees comes first.
    """
    return [m for m in layer.modules() if hasattr(m, "is_concatenated") and hasattr(m, "has_gate")]


def place(layer: torch.nn.Module, module: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """(parent, attribute) of a module below a layer."""
    above, _, attribute = next(path for path, m in layer.named_modules() if m is module).rpartition(".")
    return layer.get_submodule(above), attribute


def refuse_undecorated(layer: torch.nn.Module, name: str) -> None:
    """Raises: CoterieError for a MoE layer whose experts transformers does not hand to the registry."""
    if not experts_modules(layer):
        raise CoterieError(
            f"{name}: the experts of {type(layer).__name__} are not open to transformers' registry of experts "
            "implementations, so calibration cannot see them; use a method that needs no data"
        )
