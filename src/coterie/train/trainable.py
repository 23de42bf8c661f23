"""The weights of a loaded model that are trained: where they stand in it, and where they come from and go on disk.

Training changes float32 copies ("masters"), which begin as what is stored; the model computes with them as rounded to
its own dtype. Importing this module imports torch.
Axes: E expert, D hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coterie.errors import CoterieError
from coterie.model import moe
from coterie.model.experts import Matrices, expert_matrices, store_expert
from coterie.model.layer import MoE
from coterie.model.loading import decoder_layers
from coterie.model.targets import targets
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.numerics import encode

Tensors = dict[str, torch.Tensor]
Stored = Iterator[tuple[str, int, bytes]]  # (tensor, offset in it, bytes)


@dataclass(frozen=True, eq=False)
class Part:
    """Parameters of the model by name, their masters, and how masters are stored."""

    parameters: dict[str, torch.nn.Parameter]
    masters: Tensors  # float32
    stored: Callable[[Tensors], Stored]

    def round(self) -> None:
        """Gives the model what the masters are now."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.masters[name])


def mlp(model: Any, checkpoint: Checkpoint, names: tuple[str, str, str]) -> Part:
    """The three matrices of one dense MLP, or of a shared expert.

    Raises: CoterieError where the loaded model does not hold them as they are stored.
    """
    places = targets(model, list(names))
    known, parameters, masters = dict(model.named_parameters()), {}, {}
    for name in names:
        place = places[name]
        if place.converted or place.name not in known:
            raise CoterieError(f"tensor {name!r}: transformers keeps it in another form, which cannot be trained yet")
        parameters[place.name] = known[place.name]
        masters[place.name] = torch.tensor(checkpoint.read(name).astype(np.float32))

    def stored(values: Tensors) -> Stored:
        for name, place in places.items():
            yield name, 0, encode(values[place.name].cpu().numpy(), checkpoint.tensors[name].dtype, name)

    return _checked(Part(parameters, masters, stored), checkpoint)


def routed(model: Any, checkpoint: Checkpoint, block: MoE) -> Part:
    """All experts of one block: in the model one parameter of gates and ups, and one of downs.

    Raises: CoterieError where transformers holds them otherwise.
    """
    layer = decoder_layers(model.get_decoder(), str(checkpoint.path))[int(block.key)]
    found = moe.experts_modules(layer)
    if len(found) != 1:
        raise CoterieError(f"{block.name}: transformers holds its experts in {len(found)} modules; expected one")
    module: Any = found[0]
    names = {id(p): name for name, p in model.named_parameters()}
    first, down = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    parameters = {names[id(p)]: p for p in (first, down)}
    matrices = [_placed(module, *expert_matrices(checkpoint, block, e)) for e in range(block.num_experts)]
    masters = dict(zip(parameters, map(torch.stack, zip(*matrices, strict=True)), strict=True))

    def stored(values: Tensors) -> Stored:
        for e, pair in enumerate(zip(*(values[name].cpu() for name in parameters), strict=True)):
            yield from store_expert(checkpoint, block, e, _taken(module, *pair))

    return _checked(Part(parameters, masters, stored), checkpoint)


def _placed(
    module: Any, gate: np.ndarray | None, up: np.ndarray, down: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate_up, down) of one expert as the module holds them, from canonical (out, in) matrices."""
    first = torch.from_numpy(up.copy())
    if gate is not None:
        pair = [torch.from_numpy(gate.copy()), first]
        first = torch.cat(pair) if module.is_concatenated else torch.stack(pair, 1).flatten(0, 1)
    second = torch.from_numpy(down.copy())
    return (first.T, second.T) if module.is_transposed else (first, second)


def _taken(module: Any, first: torch.Tensor, down: torch.Tensor) -> Matrices:
    """The inverse of `_placed`."""
    if module.is_transposed:
        first, down = first.T, down.T
    if not module.has_gate:
        return None, first.numpy(), down.numpy()
    gate, up = first.chunk(2) if module.is_concatenated else (first[0::2], first[1::2])
    return gate.numpy(), up.numpy(), down.numpy()


def _checked(part: Part, checkpoint: Checkpoint) -> Part:
    """The part, its masters beside the parameters. Raises: CoterieError unless the model holds what is stored."""
    for name, parameter in part.parameters.items():
        master = part.masters[name].to(parameter.device).contiguous()
        part.masters[name] = master
        if not torch.isfinite(master).all():
            raise CoterieError(f"{checkpoint.path}: {name!r} holds NaN or infinite weights; expected finite ones")
        if master.shape != parameter.shape or not torch.equal(master.to(parameter.dtype), parameter.detach()):
            raise CoterieError(f"{checkpoint.path}: {name!r} is not loaded as it is stored, so it cannot be trained")
    return part
