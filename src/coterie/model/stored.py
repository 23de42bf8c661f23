"""Whether the matrices of a checkpoint, of experts and outside them, can be calculated with."""

from __future__ import annotations

from coterie.errors import CoterieError
from coterie.model.experts import expert_storage
from coterie.model.layer import LAYER, Model
from coterie.storage.checkpoint import FLOATS

ADVICE = "prune, drop and apply move such weights as they are; for anything else dequantise the checkpoint first"


def check_readable(model: Model) -> None:
    """Looks at headers. Raises: CoterieError where matrices cannot be calculated with, and says where they are."""
    for block in model.main:
        expert_storage(model.checkpoint, block, 0)
    for name, tensor in model.checkpoint.tensors.items():
        odd = tensor.dtype not in FLOATS and tensor.dtype.startswith(("F", "U", "I8"))
        if odd and model.roles[name] in ("shared", "other") and LAYER.fullmatch(name):
            raise CoterieError(f"tensor {name!r} is {tensor.dtype}, quantised outside the experts; {ADVICE}")
