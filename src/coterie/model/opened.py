"""Experts that transformers keeps to itself, opened: blocks of dbrx and others that ask for their sums.

Most families hand their experts' computation to transformers' registry of experts implementations. In these it
is written into the block, so that a model built for the streaming forward has its blocks changed: routing as theirs,
experts by the registry's implementation, as everywhere. Axes: T token, D hidden, F expert hidden, K top-k, E expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from coterie.model.moe import ask


class OpenExperts(torch.nn.Module):
    """In place of a block's experts: no weights, and the flags and signature of transformers' open modules.

    scales_inputs: experts see w x and count once, sum_k f(w_k x), instead of sum_k w_k f(x).
    """

    has_gate, is_concatenated, has_post_expert_norm = True, True, False

    def __init__(self, act_fn: Callable[[torch.Tensor], torch.Tensor], *, scales_inputs: bool = False) -> None:
        super().__init__()
        self.act_fn, self.scales_inputs = act_fn, scales_inputs

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return ask(self, x, chosen, weights)


def open_experts(model: torch.nn.Module) -> None:
    """Changes every block of these families in a model whose experts are not loaded."""
    for module in list(model.modules()):
        if opened := OPENED.get(type(module).__name__):
            opened(module)


def _change(block: Any, forward: Callable[..., torch.Tensor]) -> None:
    """Gives the block another forward by its class: callers may set one of their own on the block, and delete it."""
    block.__class__ = type(type(block).__name__, (type(block),), {"forward": forward})


def _dbrx(block: Any) -> None:
    block.experts = OpenExperts(block.experts.mlp.activation_fn)  # already called with ids and weights


def _llama4(layer: Any) -> None:
    """w = sigmoid(z) of the K largest logits z; it scales what experts see."""
    if not layer.is_moe_layer:
        return
    layer.is_moe_layer = False  # by which the layer's forward takes hidden states alone from the block
    block = layer.feed_forward
    num_experts, size = block.router.weight.shape
    like = {"device": block.router.weight.device, "dtype": block.router.weight.dtype}
    block.experts = OpenExperts(block.experts.act_fn, scales_inputs=True)
    block.router = torch.nn.Linear(size, num_experts, bias=False, **like)  # its output: logits, as in other families

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.reshape(-1, self.hidden_dim)
        best, chosen = self.router(x).topk(self.top_k, dim=1)
        routed = self.experts(x, chosen, best.float().sigmoid().to(x.dtype))
        return (self.shared_expert(x) + routed).view_as(hidden)

    _change(block, forward)


def _jetmoe(block: Any) -> None:
    """w = softmax over the K largest logits; a bias is added to the sum."""
    block.experts = OpenExperts(block.activation)
    del block.input_linear, block.output_linear

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        best, chosen = self.router(x)[-1].topk(self.router.top_k, dim=1)
        return self.experts(x, chosen, best.softmax(dim=1).type_as(x)).view_as(hidden) + self.bias

    _change(block, forward)


def _longcat(experts: Any) -> None:
    """Already called with ids and weights; those beyond the stored experts give x itself, times its weight."""
    del experts.gate_up_proj, experts.down_proj
    experts.has_gate, experts.is_concatenated, experts.has_post_expert_norm = True, True, False

    def apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return experts.act_fn(gate) * up

    def forward(self: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        identity = (weights * (chosen >= self.num_routed_experts)).sum(dim=-1, keepdim=True)
        return ask(self, x, chosen, weights) + (identity * x).to(x.dtype)

    experts._apply_gate = apply_gate
    _change(experts, forward)


def _step(experts: Any) -> None:
    """Already called with ids and weights; its activation has limits of its own."""
    del experts.gate_up_proj, experts.down_proj
    experts.has_gate, experts.is_concatenated, experts.has_post_expert_norm = True, True, False
    _change(experts, ask)


OPENED = {"DbrxFFN": _dbrx, "Llama4TextDecoderLayer": _llama4, "JetMoeMoE": _jetmoe}
OPENED |= {"LongcatFlashExperts": _longcat, "Step3p7Experts": _step}
