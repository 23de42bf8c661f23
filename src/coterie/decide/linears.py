"""Unstructured pruning outside the experts: attention, shared experts, dense MLPs and routers.

The published programs prune every linear map of a decoder layer. Ours leaves these alone unless asked: they are few
and run for every token, and the router decides what the experts see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from coterie.edits.beside import by_layer
from coterie.errors import CoterieError
from coterie.methods.masks import choose
from coterie.model.experts import zeroed
from coterie.model.layer import LAYER, Model

if TYPE_CHECKING:
    import torch

    from coterie.forward.activations import Walk
    from coterie.forward.stream import Stream


@dataclass
class Linears:
    """Prunes such matrices layer by layer: floor(S * I) zeros in each row, as published."""

    model: Model
    method: ModuleType
    also: tuple[str, ...]
    shares: dict[str, Fraction]  # S by layer
    put: Callable[[str, int, bytes], None]
    zeros: Counter[tuple[str, str]] = field(default_factory=Counter)  # (layer, kind) -> zeros

    def prune(self, name: str, kind: str, norms: np.ndarray | None) -> np.ndarray:
        """Writes one matrix with its zeros, and returns where they are; norms (I,) of what it multiplies, if known."""
        checkpoint = self.model.checkpoint
        weight = checkpoint.read(name).astype(np.float32, copy=False)
        layer = LAYER.fullmatch(name)["index"]  # type: ignore[index]
        if not (np.isfinite(weight).all() and (norms is None or np.isfinite(norms).all())):
            raise CoterieError(f"tensor {name!r}: weights or activations are NaN or infinite; expected finite")
        rows, columns = weight.shape
        count = int(self.shares[layer] * columns)
        mask = choose(weight, partial(self.method.score, norms=norms), np.full(rows, count))
        self.put(name, 0, zeroed(checkpoint.raw(name), mask, name))
        self.zeros[layer, kind] += weight.size - int(np.count_nonzero(np.where(mask, 0, weight)))
        return mask

    def prune_all(self) -> None:
        for layer in by_layer(self.model, self.also).values():
            for name, kind in layer.items():
                self.prune(name, kind, None)

    def rehearse(self, stream: Stream, walk: Walk) -> Callable[..., None]:
        """For `Stream.run`: measures a layer's matrices while it runs densely, then prunes them in it and on disk."""
        chosen = by_layer(self.model, self.also)

        def run(index: int, layer: torch.nn.Module, forward: Callable[[Walk], None]) -> None:
            import torch

            wanted = parameters(stream, index, layer, chosen.get(index, {}))
            with watched(layer, wanted) as norms:
                forward(walk)
            for parameter, name in wanted.items():
                mask = self.prune(name, chosen[index][name], norms[name])
                layer.get_parameter(parameter).data[torch.from_numpy(mask)] = 0

        return run


def sizes(model: Model, also: tuple[str, ...]) -> Counter[tuple[str, str]]:
    """How many weights such matrices have, by layer and kind."""
    found: Counter[tuple[str, str]] = Counter()
    for index, names in by_layer(model, also).items():
        for name, kind in names.items():
            found[str(index), kind] += model.checkpoint.tensors[name].num_parameters
    return found


def parameters(stream: Stream, index: int, layer: torch.nn.Module, names: dict[str, str]) -> dict[str, str]:
    """Parameter of the layer -> tensor, for the tensors to prune.

    Raises: CoterieError for one that transformers makes something else of.
    """
    stored = {tensor: parameter for parameter, tensor in stream.stored(index).items()}
    missing = [n for n in names if n not in stored or not stored[n].endswith("weight")]
    if missing:
        raise CoterieError(
            f"tensor {missing[0]!r}: {type(layer).__name__} holds it in another form, so it cannot be pruned on its "
            f"own; leave {names[missing[0]]!r} out of --also"
        )
    return {stored[n]: n for n in names}


@contextmanager
def watched(layer: torch.nn.Module, wanted: dict[str, str]) -> Iterator[dict[str, np.ndarray]]:
    """Gives ||X_j|| (I,) by tensor of what entered the modules of a layer's parameters (parameter -> tensor).

    While entered, squares are summed, and what it gives is empty. Raises: CoterieError where nothing passed.
    """
    import torch

    squares, norms = dict[str, torch.Tensor](), dict[str, np.ndarray]()

    def see(name: str, columns: int, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not inputs or inputs[0].shape[-1] != columns:
            raise CoterieError(f"tensor {name!r}: its module is given something else than rows of {columns}")
        found = inputs[0].reshape(-1, columns).float().square().sum(0, dtype=torch.float64)
        squares[name] = squares.get(name, 0) + found

    with ExitStack() as hooks:
        for parameter, name in wanted.items():
            module = layer.get_submodule(parameter.rpartition(".")[0])
            hook = partial(see, name, layer.get_parameter(parameter).shape[1])
            hooks.enter_context(module.register_forward_pre_hook(hook))
        yield norms
    for name in wanted.values():
        if name not in squares:
            raise CoterieError(f"tensor {name!r}: nothing passed through it, so there is nothing to judge it by")
        norms[name] = squares[name].sqrt().numpy()
