"""Parameters counted on the bases that a report gives shares of."""

from __future__ import annotations

from coterie.model.layer import LAYER
from coterie.storage.checkpoint import Tensor

NO_MATRICES = ("table", "constant")  # roles of tensors with two axes that multiply nothing


def count(tensors: list[Tensor], roles: dict[str, str]) -> dict[str, int]:
    """Parameters: all stored, those of routed experts, and those of matrices inside decoder layers."""
    inside = [t for t in tensors if len(t.shape) > 1 and LAYER.fullmatch(t.name)]
    linears = [t for t in inside if roles.get(t.name) not in NO_MATRICES]
    return {
        "all": sum(t.num_parameters for t in tensors),
        "experts": sum(t.num_parameters for t in tensors if roles.get(t.name) == "expert"),
        "linears": sum(t.num_parameters for t in linears),
    }


def removed_shares(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """1 - after / before on each base: experts, linears, all."""
    return {base: 1 - after[base] / before[base] if before[base] else 0.0 for base in ("experts", "linears", "all")}
