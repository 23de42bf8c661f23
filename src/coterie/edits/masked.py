"""A loaded model that routes as if some of its experts were gone: what its pruned checkpoint must compute.

Used by `verify`, and by criteria that try sets of experts (`decide/reconstruct.py`). Masking logits alone is not
removal: a bias that joins after a sigmoid can still choose a masked expert, and a table can name it, so those are
masked too. Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from coterie.edits.kinds.keep import renumbered
from coterie.edits.kinds.route import constants_name, is_routed, routed_blocks, routes_of
from coterie.edits.plan import Plan
from coterie.errors import CoterieError
from coterie.model.experts import read_rows
from coterie.model.layer import LAYER, Model, MoE
from coterie.model.routed import install
from coterie.storage.checkpoint import Checkpoint

SOFTMAXES = (F.softmax, torch.softmax, torch.Tensor.softmax)


class MaskedRouting(TorchFunctionMode):
    """While entered, routers give -inf for the experts that `hide` named; `hits` counts each block's router at work.

    Router products and softmaxes are computed of the kept columns alone: over all of them, the last bits of a sum
    depend on how many columns there are, and equality could not be told from a small fault.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hits: dict[str, int] = {}
        self._routers: dict[int, tuple[str, list[int]]] = {}  # by the weight's address: block, kept ids
        self._kept: list[int] = []  # of the router seen last
        self._width = 0

    def hide(self, name: str, router: torch.Tensor, kept: Sequence[int]) -> None:
        """From now on, the products of `router` (E, D) know only the experts `kept`."""
        self.hits[name] = 0
        self._routers[router.data_ptr()] = (name, list(kept))

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if function is F.linear:
            return self._linear(*args, **kwargs)
        if function in SOFTMAXES and self._is_masked(args[0]):
            return self._spread(function(args[0][..., self._kept], *args[1:], **kwargs), 0.0)
        return function(*args, **kwargs)

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        name, kept = self._routers.get(weight.data_ptr(), (None, []))
        if name is None:
            return F.linear(input, weight, bias)
        self.hits[name] += 1
        self._kept, self._width = kept, len(weight)
        return self._spread(F.linear(input, weight[kept], None if bias is None else bias[kept]), -torch.inf)

    def _spread(self, values: torch.Tensor, rest: float) -> torch.Tensor:
        """The kept columns among `rest`."""
        result = values.new_full((*values.shape[:-1], self._width), rest)
        index = torch.tensor(self._kept, device=values.device)
        return result.scatter_(-1, index.expand_as(values), values)

    def _is_masked(self, values: torch.Tensor) -> bool:
        """Whether all columns but the kept ones are -inf, so that leaving them out changes nothing but rounding."""
        if values.dim() == 0 or values.shape[-1] != self._width or self._width == len(self._kept):
            return False
        dropped = sorted(set(range(self._width)) - set(self._kept))
        return bool((values[..., dropped] == -torch.inf).all())


def mask_experts(model: Any, source: Model, plan: Plan) -> MaskedRouting:
    """The context in which `model`, loaded from `source`, routes without the experts that the plan drops.

    Selection biases and tables are changed in the model at once, and stay so.
    Raises: CoterieError when the model holds nothing equal to a router, bias or table of the checkpoint.
    """
    routing, checkpoint = MaskedRouting(), source.checkpoint
    for block in source.moe:
        choice = plan.choice(block)
        if block.mtp or choice is None or len(choice.kept) == block.num_experts or is_routed(choice, block):
            continue
        routing.hide(block.name, twin(model, checkpoint, block, block.router), (*choice.kept, *block.zero_rows))
        dropped = sorted(set(range(block.num_experts)) - set(choice.kept))
        with torch.no_grad():
            for name in block.rows:
                if "bias" in name.rpartition(".")[2]:  # others, such as scales, choose nothing
                    twin(model, checkpoint, block, name)[..., dropped] = -torch.inf
            for name in block.tables:  # of token -> expert, with original ids: the dropped ones' stand-ins
                table = np.array(choice.kept)[renumbered(checkpoint, block, choice, name)]
                loaded = twin(model, checkpoint, block, name)
                loaded.copy_(torch.from_numpy(table).reshape(loaded.shape))
    return routing


def twin(model: Any, checkpoint: Checkpoint, block: MoE, name: str) -> torch.Tensor:
    """The loaded parameter or buffer that a block's router, row or table became, found by layer, size and values.

    Names in memory differ from those on disk by family and by version of transformers; values do not.
    """
    match = LAYER.fullmatch(name)
    assert match, f"{name} is in no layer"
    values = torch.from_numpy(read_rows(checkpoint, block, name).copy()).reshape(-1)
    found = {}
    for other, tensor in (*model.named_parameters(), *model.named_buffers()):
        place = LAYER.fullmatch(other)
        if place and place["index"] == match["index"] and tensor.numel() == values.numel() and not tensor.is_meta:
            if torch.equal(tensor.detach().reshape(-1), values.to(tensor.dtype)):
                found[other] = tensor
    if not found:
        raise CoterieError(f"{checkpoint.path}: the loaded model holds nothing equal to {name!r}; cannot mask it")
    # Values may coincide, as those of biases that are still all zero: then the name's last part decides.
    same = [tensor for other, tensor in found.items() if other.rpartition(".")[2] == name.rpartition(".")[2]]
    return (same or list(found.values()))[0]


def route_original(model: Any, source: Model, plan: Plan, out: Checkpoint) -> int:
    """Makes the whole original compute what the plan's routers lead to, with OUT's constants; in how many blocks."""
    blocks = list(routed_blocks(source, plan))
    for block, choice in blocks:
        table = [choice.kept[i] if i >= 0 else -1 for i in routes_of(choice, block.num_experts)]
        constants = torch.tensor(out.read(constants_name(block))) if choice.removed == "constant" else None
        install(model.get_decoder().layers[int(block.key)], table, constants, block.name)
    return len(blocks)
