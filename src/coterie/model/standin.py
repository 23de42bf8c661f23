"""The dense MLP that stands in for a MoE block, in a stock model whose own classes have none.

Used to load our own layout; `block_of` also where blocks are measured, replaced or taught.
Importing this module imports torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from coterie.errors import CoterieError
from coterie.model import moe
from coterie.model.family import GATED


class StandIn(torch.nn.Module):
    """down [act(gate x) * up x], with the activation of the experts that it replaces."""

    def __init__(self, experts: torch.nn.Module, hidden: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        for name, sizes in zip(GATED, ((hidden, width), (hidden, width), (width, hidden)), strict=True):
            self.add_module(name, torch.nn.Linear(*sizes, bias=False, dtype=dtype, device="meta"))
        self._experts = (experts,)  # in a tuple, so that it is no part of this module

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(..., D) -> (..., D); what else a block is given, such as token ids, is of no use here."""
        gate, up, down = (getattr(self, name).weight for name in GATED)
        experts: Any = self._experts[0]
        return F.linear(experts._apply_gate(F.linear(x, torch.cat([gate, up]))), down)


def block_of(layer: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str, torch.nn.Module]:
    """(parent, attribute, experts) of a decoder layer's MoE block: what is called with hidden states, and its experts.

    Raises: CoterieError unless the layer has exactly one such block of its own.
    """
    experts = moe.experts_modules(layer)
    block = moe.place(layer, experts[0])[0] if len(experts) == 1 else layer
    if block is layer or experts[0].has_post_expert_norm:
        raise CoterieError(f"{name}: no block of its own holds its experts, so no dense MLP can stand in for it")
    return *moe.place(layer, block), experts[0]


def replace_block(layer: torch.nn.Module, hidden: int, width: int, dtype: torch.dtype, name: str) -> None:
    """Puts an empty dense MLP in the place of a layer's MoE block."""
    parent, attribute, experts = block_of(layer, name)
    setattr(parent, attribute, StandIn(experts, hidden, width, dtype))
