"""Experts behind a router that knows more of them than are stored: what `edits/routes.py` writes, computed.

Put in the place of the stock experts module by `model/loading.py`, once its weights are there. Importing this module
imports torch. Axes: T token, K top-k, D hidden, E expert that the router knows, R expert that is removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from coterie.errors import CoterieError
from coterie.model.moe import experts_modules


class Routed(torch.nn.Module):
    """sum over the chosen e of g_e f_{routes[e]}(x); where routes[e] is -1, g_e c_e instead, or nothing.

    routes: (E,) stored experts or -1; constants: (R, D) in the order of the experts that are gone, or None.
    """

    routes: torch.Tensor
    rows: torch.Tensor  # (E,), of constants, where the route is -1
    constants: torch.Tensor | None

    def __init__(self, experts: torch.nn.Module, routes: Sequence[int], constants: torch.Tensor | None = None) -> None:
        super().__init__()
        self.experts = experts
        table = torch.tensor(routes)
        self.register_buffer("routes", table)
        self.register_buffer("rows", torch.cumsum(table < 0, 0) - 1)
        self.register_buffer("constants", constants)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x (T, D), chosen (T, K) original ids, weights (T, K) -> (T, D)."""
        stored = self.routes[chosen]
        if bool((stored >= 0).all()):
            return self.experts(x, stored, weights)
        total = torch.zeros_like(x)
        # Each (token, expert) of what is stored becomes a token with one expert. By slot, then token, and added up by
        # expert: the order of the stock loop over experts, so that its last bits are the same.
        slots, tokens = torch.where((stored >= 0).T)
        if len(tokens):
            ids = stored[tokens, slots]
            y = self.experts(x[tokens], ids[:, None], weights[tokens, slots][:, None])
            order = ids.argsort(stable=True)
            total.index_add_(0, tokens[order], y[order].to(total.dtype))
        if self.constants is not None:
            slots, tokens = torch.where((stored < 0).T)
            values = self.constants[self.rows[chosen[tokens, slots]]] * weights[tokens, slots][:, None]
            total.index_add_(0, tokens, values.to(total.dtype))
        return total


def _experts(layer: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str, torch.nn.Module]:
    """(parent, attribute, experts module) of a decoder layer.

    Raises: CoterieError unless it has exactly one that transformers hands ids and weights.
    """
    found = experts_modules(layer)
    if len(found) != 1:
        raise CoterieError(
            f"{name}: the experts of {type(layer).__name__} are not open to transformers' registry, so a router that "
            "knows removed experts cannot be served; use --removed remove"
        )
    path = next(path for path, module in layer.named_modules() if module is found[0])
    above, _, attribute = path.rpartition(".")
    return layer.get_submodule(above), attribute, found[0]


def shrink(layer: torch.nn.Module, num_stored: int, name: str) -> None:
    """Leaves room for fewer experts in an empty layer; its router stays. Raises: CoterieError, as `_experts`."""
    experts: Any = _experts(layer, name)[2]
    num_experts = experts.num_experts
    for part, parameter in list(experts.named_parameters(recurse=False)):
        if parameter.shape[:1] == (num_experts,):
            smaller = torch.empty(num_stored, *parameter.shape[1:], dtype=parameter.dtype, device="meta")
            experts.register_parameter(part, torch.nn.Parameter(smaller, requires_grad=False))
    experts.num_experts = num_stored


def install(layer: torch.nn.Module, routes: Sequence[int], constants: torch.Tensor | None, name: str) -> None:
    """Puts `Routed` in the place of a layer's experts, which keep their weights."""
    parent, attribute, experts = _experts(layer, name)
    setattr(parent, attribute, Routed(experts, routes, constants))
