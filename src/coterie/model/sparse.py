"""Packed weights in a model: a MoE layer's experts, which answer for its experts module, and linear layers.

Axes: T token, K top-k, S = T K chosen pairs, D hidden, F expert hidden, E expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coterie.errors import CoterieError
from coterie.kernels.jobs import Pairs
from coterie.kernels.memory import Stack
from coterie.kernels.multiply import multiply
from coterie.model.moe import expert_hidden, expert_output


@dataclass(frozen=True)
class SparseExperts:
    """A layer's experts: the stacks that give gate and up (or up alone), and down."""

    first: tuple[Stack, ...]
    down: Stack

    @property
    def num_bytes(self) -> int:
        return sum(s.num_bytes for s in (*self.first, self.down))

    def __call__(self, module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """sum_k w_k * down_k(act(gate_k x) * up_k x) for x (T, D), chosen and weights (T, K): the module's answer."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise CoterieError(
                "packed experts are for inference: they have no gradients; unpack the checkpoint to train it"
            )
        if len(x) == 1:
            return self._one_token(module, x, chosen, weights)
        num_tokens, top_k = chosen.shape
        ids = chosen.reshape(-1).cpu().numpy()
        order = np.argsort(ids, kind="stable")
        places = torch.from_numpy(order).to(x.device)
        y = self._outputs(module, Pairs.of(ids[order]), x[places // top_k])
        y = y * weights.reshape(-1)[places, None]
        total = torch.empty_like(y)
        total[places] = y
        return total.view(num_tokens, top_k, -1).sum(1).to(x.dtype)

    def _one_token(self, module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The answer for a single token, whose experts all differ, in as few operations as it takes."""
        ids = chosen[0].cpu().numpy()
        y = self._outputs(module, Pairs(ids, np.arange(len(ids)), np.ones(len(ids), np.int64)), x)
        return (weights.to(y.dtype) @ y).to(x.dtype)

    def _outputs(self, module: Any, pairs: Pairs, x: torch.Tensor) -> torch.Tensor:
        """Every pair's output (S, D), before the router's weights."""
        chosen = _Chosen(self, module, pairs)
        return expert_output(module, chosen, expert_hidden(module, chosen, x))


@dataclass(frozen=True)
class _Chosen:
    """The products of some pairs, each row with its own expert's matrices, as `moe.expert_hidden` asks for them."""

    experts: SparseExperts
    module: Any
    pairs: Pairs

    @property
    def has_gate(self) -> bool:
        return self.module.has_gate

    def up_product(self, x: torch.Tensor) -> torch.Tensor:
        """(S, D), or (1, D) for all, -> gate above up (S, 2F), or up alone (S, F)."""
        y = multiply(self.experts.first, self.pairs, x)
        if not self.module.has_bias:
            return y
        bias = self._bias(self.module.gate_up_proj_bias if self.has_gate else self.module.up_proj_bias)
        if self.has_gate and not self.module.is_concatenated:  # in the module, gate and up alternate
            bias = bias.unflatten(-1, (-1, 2)).mT.flatten(-2)
        return y + bias

    def down_product(self, hidden: torch.Tensor) -> torch.Tensor:
        y = multiply([self.experts.down], self.pairs, hidden)
        return y + self._bias(self.module.down_proj_bias) if self.module.has_bias else y

    def _bias(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[torch.from_numpy(np.repeat(self.pairs.ids, self.pairs.counts)).to(rows.device)]


def stock(module: Any, *arguments: torch.Tensor) -> torch.Tensor:
    """The answer for a module whose experts are not packed: the library's own default."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *arguments)


class SparseLinear(torch.nn.Module):
    """A linear layer whose packed weight is multiplied without being expanded."""

    def __init__(self, in_features: int, out_features: int, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        self.coterie: Stack | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.coterie is not None
        rows = x.reshape(-1, self.in_features)
        y = multiply([self.coterie], Pairs.of(np.zeros(len(rows), np.int64)), rows).to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)
