"""A layer that runs twice, first up to its experts and then, with their sums, to its end, computes little twice.

What its parts (attention, norms, shared experts) put out in the first run is kept in maps, and given out again in the
second. A part's forward hooks are called in the run in which it computes, all others in the second.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from coterie.errors import CoterieError
from coterie.model import moe
from coterie.storage.tensors import Maps

Module = torch.nn.Module


class Kept(NamedTuple):
    """An output's values, and an empty tensor of its shape and strides, on which the last bits of products depend."""

    values: torch.Tensor
    form: torch.Tensor


class Recording:
    """Outputs of one layer's parts for all tokens, batch by batch."""

    def __init__(self, layer: Module, num_tokens: int, maps: Maps) -> None:
        self._layer, self._num_tokens, self._maps = layer, num_tokens, maps
        self._parts = list(dict.fromkeys(_parts(layer, set(moe.experts_modules(layer)))))
        self._places: dict[tuple, torch.Tensor] = {}
        self._calls: dict[tuple[Module, int], list[tuple[list[Any], Any]]] = {}  # (part, first row) -> outputs

    @contextmanager
    def first_run(self, rows: slice) -> Iterator[None]:
        """While entered, parts compute the batch of these rows, and their outputs are kept."""
        inside = {module for part in self._parts for module in part.modules()}
        with (
            unobserved(module for module in self._layer.modules() if module not in inside),
            _instead({part: self._keeping(part, rows) for part in self._parts}),
        ):
            yield

    @contextmanager
    def second_run(self, rows: slice) -> Iterator[None]:
        """While entered, parts that computed the batch in its first run give their outputs out again."""
        done = [part for part in self._parts if (part, rows.start) in self._calls]
        with unobserved(done), _instead({part: self._repeating(part, rows) for part in done}):
            yield

    def _keeping(self, part: Module, rows: slice) -> Callable[..., Any]:
        original = part.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            calls = self._calls.setdefault((part, rows.start), [])
            leaves, form = tree_flatten(output)
            calls.append(([self._keep((part, len(calls), i), leaf, rows) for i, leaf in enumerate(leaves)], form))
            return output

        return forward

    def _keep(self, key: tuple, leaf: Any, rows: slice) -> Any:
        count = rows.stop - rows.start
        if not isinstance(leaf, torch.Tensor) or leaf.numel() % count:
            return leaf
        key, size = (*key, leaf.numel() // count, leaf.dtype), leaf.numel() // count
        if key not in self._places:
            self._places[key] = self._maps.zeros((self._num_tokens, size), leaf.dtype)
        self._maps.put(self._places[key][rows], leaf.reshape(count, size))
        return Kept(self._places[key][rows], torch.empty_like(leaf, device="meta"))

    def _repeating(self, part: Module, rows: slice) -> Callable[..., Any]:
        calls, original = iter(self._calls[part, rows.start]), part.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = next(calls, None)
            if call is None and not _has_matrices(part):
                return original(*args, **kwargs)
            if call is None:
                raise CoterieError(
                    f"{type(part).__name__} runs before and after the experts, so activations cannot leave memory; "
                    "calibrate on fewer or shorter samples"
                )
            leaves, form = call
            return tree_unflatten([self._again(leaf) for leaf in leaves], form)

        return forward

    def _again(self, leaf: Any) -> Any:
        if not isinstance(leaf, Kept):
            return leaf
        values = self._maps.get(leaf.values).view(leaf.form.shape)
        return values if leaf.form.is_contiguous() else torch.empty_like(leaf.form, device="cpu").copy_(values)


def _parts(module: Module, experts: set[Module]) -> Iterator[Module]:
    """The largest modules below that hold parameters and no experts."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict) or not experts.isdisjoint(child.modules()):
            yield from _parts(child, experts) if child not in experts else ()
        elif next(child.parameters(), None) is not None:
            yield child


def _has_matrices(part: Module) -> bool:
    """A norm may run before the experts and after them; what holds matrices may not, since hooks see it once."""
    return any(parameter.dim() > 1 for parameter in part.parameters())


@contextmanager
def _instead(forwards: dict[Module, Callable[..., Any]]) -> Iterator[None]:
    """While entered, modules compute by other functions."""
    own = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward_before in own.items():
            del module.__dict__["forward"]
            if forward_before is not None:
                module.__dict__["forward"] = forward_before


@contextmanager
def unobserved(modules: Iterable[Module]) -> Iterator[None]:
    """While entered, the modules' forward hooks are not called: what they count must be counted once."""
    kept = [(module, module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for module, _, _ in kept:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, before, after in kept:
            module._forward_pre_hooks, module._forward_hooks = before, after
