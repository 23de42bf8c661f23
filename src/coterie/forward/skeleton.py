"""transformers' own model without its weights, filled and emptied in parts by the library's own conversion.

What the streaming forward (`stream.py`) moves through memory. Parameters stand on the meta device until they are
filled; buffers are real from the beginning, because some (rotary frequencies) are computed and never stored.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from coterie.errors import CoterieError
from coterie.model import moe
from coterie.model.layer import Model, MoE, expert_names, unused_names
from coterie.model.layered import check_layers
from coterie.model.loading import NO_DATA, convert, decoder_layers, empty_stock, guarded, quiet_transformers
from coterie.model.opened import open_experts
from coterie.model.stored import outside, quantised
from coterie.model.targets import targets
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.tensors import Maps, read, trim

MAPPED = 2**26  # bytes: a table of embeddings larger than this is mapped, since few of its rows are touched


class Skeleton:
    """A model whose decoder layers, without their experts, and what stands around them are filled and emptied."""

    def __init__(self, source: Model, dtype: torch.dtype) -> None:
        """Builds the model without its weights.

        Raises: CoterieError for a model that transformers does not know, or whose experts are closed to us.
        """
        check_layers(source)
        self.checkpoint, self.dtype = source.checkpoint, dtype
        self.model = empty_model(source.checkpoint, dtype)
        self.decoder = self.model.get_decoder()
        self.layers = decoder_layers(self.decoder, str(source.checkpoint.path))
        self.blocks = self._check_layers(source)  # layer index -> its MoE block
        blocks = [block for block in source.moe if not block.attention]
        walked = {name for block in blocks for name in (*expert_names(block), *unused_names(block))}
        stored = [name for name in self.checkpoint.tensors if name not in walked]
        # Quantised matrices, by the names of the plain weights that they are here.
        self._coded = quantised(self.checkpoint, outside(source))
        parts = {name for matrix in self._coded.values() for name in matrix.parts}
        self._targets = targets(self.model, [*(name for name in stored if name not in parts), *self._coded])
        self._root = next(name for name, module in self.model.named_modules() if module is self.layers)
        self._names = self._group_names()

    def _check_layers(self, source: Model) -> dict[int, MoE]:
        """Layer index -> the MoE block that text sees. Raises: CoterieError unless exactly the MoE layers have experts,
        once, or in as many stacks as the family says."""
        stacks = 1 + bool(source.family.within)
        blocks = {int(b.key): b for b in source.moe if not b.mtp and not b.attention}
        for block in source.moe:
            if not block.mtp and int(block.key) < len(self.layers):
                moe.refuse_undecorated(self.layers[int(block.key)], block.name)
        for index, layer in enumerate(self.layers):
            found = len(moe.experts_modules(layer))
            if found != stacks * (index in blocks):
                raise CoterieError(
                    f"{self.checkpoint.path}: layer {index} has {found} experts modules in transformers, but "
                    f"{stacks * (index in blocks)} in the checkpoint; expected the same, {stacks} at most: {NO_DATA}"
                )
        return blocks

    def _group_names(self) -> dict[int | None, list[str]]:
        """Layer index (None: outside the layers) -> names of the tensors to load there; experts are left out.

        What the model has no place for outside its layers stays unread: multi-token prediction, vision towers of
        models that are built as text models. That nothing is missing is checked after loading.
        """
        outside = own_tensors(self.outside(head=True))
        groups: dict[int | None, list[str]] = {}
        for name, (target, _) in self._targets.items():
            if target.startswith(self._root + "."):
                index = int(target[len(self._root) + 1 :].partition(".")[0])
                if index < len(self.layers):
                    groups.setdefault(index, []).append(name)
            elif target in outside:
                groups.setdefault(None, []).append(name)
        return groups

    def outside(self, *, head: bool) -> dict[str, torch.nn.Module]:
        """The modules around the layers by name, with or without the head."""
        parts = [self.decoder, *([self.model.get_output_embeddings()] if head else [])]
        inside = {id(m) for m in self.layers.modules()}
        needed = {id(m) for part in parts if part is not None for m in part.modules()} - inside
        return {name: module for name, module in self.model.named_modules() if id(module) in needed}

    def stored(self, index: int) -> dict[str, str]:
        """Parameter of a layer, as its `named_parameters` has it -> the checkpoint's tensor it equals.

        Left out: experts, quantised weights, and what transformers computes (fused, split or transposed ones).
        """
        prefix, names = f"{self._root}.{index}.", self._names.get(index, [])
        sources = Counter(self._targets[name].name for name in names)
        parameters = dict(self.layers[index].named_parameters())
        found = {}
        for name in names:
            target, converted = self._targets[name]
            parameter = parameters.get(target.removeprefix(prefix))
            alone = sources[target] == 1 and not converted and name not in self._coded
            if alone and parameter is not None and self.checkpoint.tensors[name].shape == tuple(parameter.shape):
                found[target.removeprefix(prefix)] = name
        return found

    def router(self, index: int) -> str | None:
        """The parameter of a layer that its router became, transposed or not; None where it is none of the layer's."""
        place = self._targets[self.blocks[index].router].name.removeprefix(f"{self._root}.{index}.")
        return place if place in dict(self.layers[index].named_parameters()) else None

    def load(self, index: int) -> None:
        """Fills one layer. Raises: CoterieError when something stays empty."""
        self._fill(self._names.get(index, []))
        closed = {id(p) for m in moe.experts_modules(self.layers[index]) for p in m.parameters(recurse=False)}
        parameters = self.layers[index].named_parameters()
        self._check_filled([f"layer {index}: {n}" for n, p in parameters if p.is_meta and id(p) not in closed])

    def load_outside(self, maps: Maps | None = None, *, head: bool) -> None:
        """Fills what stands around the layers, with or without the head; given maps, large tables are mapped.

        Raises: CoterieError when something stays empty.
        """
        wanted = own_tensors(self.outside(head=head))
        names = [name for name in self._names.get(None, []) if self._targets[name].name in wanted]
        self._fill(names, maps)
        self.model.tie_weights()
        self._check_filled([n for n, p in own_tensors(self.outside(head=head)).items() if p.is_meta])

    def _fill(self, names: list[str], maps: Maps | None = None) -> None:
        """Given maps, large tables are mapped."""

        def tensor(name: str) -> torch.Tensor:
            if matrix := self._coded.get(name):
                return torch.from_numpy(np.ascontiguousarray(matrix.rows(0)))
            large = maps is not None and self.checkpoint.tensors[name].num_bytes >= MAPPED
            return maps.stored(self.checkpoint, name) if maps and large else read(self.checkpoint, name)

        fill(self.model, self.checkpoint, names, self.dtype, tensor)

    def _check_filled(self, empty: list[str]) -> None:
        if empty:
            raise CoterieError(f"{self.checkpoint.path}: no tensor fills {empty[0]!r}; expected every parameter stored")


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """transformers' model with its parameters on the meta device, and our experts implementation.

    Raises: CoterieError when transformers does not build it.
    """
    advice = f", so it cannot be calibrated; {NO_DATA}"
    model = empty_stock(checkpoint, dtype, advice=advice)
    open_experts(model)
    with guarded(checkpoint.path, "does not take our experts", advice):
        moe.enter(model)
    return model.eval()


def own_tensors(modules: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The modules' own parameters and stored buffers, by name."""
    found = {}
    for prefix, module in modules.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if "." not in name:
                found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def fill(
    model: Any, checkpoint: Checkpoint, names: list[str], dtype: torch.dtype, tensor: Callable[[str], torch.Tensor]
) -> None:
    """Reads the named tensors into the model's parameters. Raises: CoterieError for one that does not fit."""
    with _young():
        plan = model._get_dtype_plan(dtype)  # what the library keeps in float32 whatever is asked
        tensors = {name: tensor(name) for name in names}
        with quiet_transformers():
            info = convert(model, tensors, dtype, plan)
        del tensors
    faults = {*info.unexpected_keys, *info.mismatched_keys, *info.conversion_errors}
    if faults:
        raise CoterieError(f"{checkpoint.path}: transformers does not take {sorted(map(str, faults))[0]!r}")


@contextmanager
def _young() -> Iterator[None]:
    """While entered, nothing is collected, and then at once what was made meanwhile: the library's loading leaves
    cycles behind that hold what was loaded, and to look for them among all objects takes a fifth of a second a layer.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.collect(0)


def free(modules: Iterable[torch.nn.Module]) -> None:
    """Empties the modules' own parameters; their buffers stay."""
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device="meta")
            module.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))
    trim()
