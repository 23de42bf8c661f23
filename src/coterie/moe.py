"""The experts' computation: gate, up, activation, down, one expert at a time, for every family alike.

transformers calls it through its public registry of experts implementations, with the hidden states, the chosen
expert ids and their weights; routing, activation and everything around the experts stay stock. Calibration, and
later sparse and offloaded inference, share `expert_forward`.
Axes: T token, D hidden, F expert hidden, K top-k, E expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from coterie.errors import CoterieError
from coterie.experts import expert_biases, expert_matrices
from coterie.layer import MoE

if TYPE_CHECKING:
    from coterie.checkpoint import Checkpoint

IMPLEMENTATION = "coterie"  # our name in the registry
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # token counts are padded up to these, then to multiples of 512


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


def read_expert(checkpoint: Checkpoint, block: MoE, e: int, dtype: torch.dtype) -> Expert:
    """Expert e from disk, whatever the layout there."""
    gate, up, down = (
        None if m is None else torch.tensor(m, dtype=dtype) for m in expert_matrices(checkpoint, block, e)
    )
    assert up is not None and down is not None
    first, second = (None if b is None else torch.tensor(b, dtype=dtype) for b in expert_biases(checkpoint, block, e))
    gate_up = up.contiguous() if gate is None else torch.cat([gate, up])
    return Expert(gate_up, down.contiguous(), gate is not None, first, second)


def padded(num_tokens: int) -> int:
    """The bucket a token count is padded to. oneDNN compiles a kernel for every new shape, so there must be few."""
    return next((b for b in BUCKETS if num_tokens <= b), -(-num_tokens // BUCKETS[-1]) * BUCKETS[-1])


def expert_hidden(module: Any, expert: Expert, x: torch.Tensor) -> torch.Tensor:
    """What enters the down projection: act(gate(x)) * up(x), or act(up(x)) without a gate; (T, D) -> (T, F).

    The activation is the module's own (`_apply_gate`, `act_fn`), which knows clamps and interleaving.
    """
    h = F.linear(x, expert.gate_up, expert.gate_up_bias)
    if not expert.has_gate:
        return module.act_fn(h)
    if not module.is_concatenated:  # its `_apply_gate` wants gate and up alternating
        h = torch.stack(h.chunk(2, dim=-1), dim=-1).flatten(-2)
    return module._apply_gate(h)


def expert_forward(module: Any, expert: Expert, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden (T, F), output (T, D)) of one expert for its tokens x (T, D), which are padded for the products."""
    num_tokens = len(x)
    x = F.pad(x, (0, 0, 0, padded(num_tokens) - num_tokens))
    hidden = expert_hidden(module, expert, x)
    output = F.linear(hidden, expert.down, expert.down_bias)
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)
    return hidden[:num_tokens], output[:num_tokens]


def register(forward: Callable[..., torch.Tensor]) -> None:
    """Makes `forward(module, hidden_states, top_k_index, top_k_weights)` the implementation named `coterie`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


def experts_modules(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """The decorated experts modules of a decoder layer, known by the flags that transformers sets on them."""
    return [m for m in layer.modules() if hasattr(m, "is_concatenated") and hasattr(m, "has_gate")]


def refuse_undecorated(layer: torch.nn.Module, name: str) -> None:
    """Raises: CoterieError for a MoE layer whose experts transformers does not hand to the registry."""
    if not experts_modules(layer):
        raise CoterieError(
            f"{name}: the experts of {type(layer).__name__} are not open to transformers' registry of experts "
            "implementations, so calibration cannot see them; use a method that needs no data"
        )
