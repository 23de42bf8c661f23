"""A decoder layer of transformers, run up to its experts, and on with their sums.

A forward cannot wait halfway, so it runs twice. The first run ends where the layer calls its experts, by an exception
that carries what it asks of them; the second returns the sums there and goes on to the layer's end. What the layer's
parts (attention, norms, router, shared experts) put out in the first run is kept, in memory or in maps, and given out
again in the second, so that little is computed twice. A part's forward hooks are called in the run in which it
computes, all others in the second. The numbers are those of an ordinary forward, bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from coterie.model import moe
from coterie.storage.tensors import Maps

Module = torch.nn.Module
Run = Callable[[], torch.Tensor]  # the layer's forward over one batch


class ExpertsCall(NamedTuple):
    """What a layer asks of its experts for a batch: their module, inputs (T, D), chosen ids and weights (T, K)."""

    module: Module
    x: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor


class _Reached(BaseException):  # no error, so that no `except Exception` on the way out takes it for one
    """Carries what a layer asks out of its forward."""

    def __init__(self, asked: ExpertsCall) -> None:
        self.asked = asked


def asked_by(run: Run, experts: Sequence[Module]) -> ExpertsCall | torch.Tensor:
    """Runs a layer, or a part of one, up to its experts: what it asks of them, or its output if it asks nothing."""

    def reached(module: Module, *tensors: torch.Tensor) -> torch.Tensor:
        raise _Reached(ExpertsCall(module, *(t.reshape(-1, t.shape[-1]) for t in tensors)))

    with moe.answering(experts, reached):
        try:
            return run()
        except _Reached as stop:
            return stop.asked


class Unrepeatable(Exception):
    """Says of a layer why its second run would not be the first one's end."""


class Held(NamedTuple):
    """A kept output in memory, and how often it had been changed in place by then."""

    values: torch.Tensor
    version: int


class Mapped(NamedTuple):
    """A kept output in a map, and an empty tensor of its shape and strides, on which last bits of products depend."""

    values: torch.Tensor
    form: torch.Tensor


class Suspended:
    """One layer between the two runs of its batches, each known by its tokens' rows among those of all batches."""

    def __init__(self, layer: Module, num_tokens: int, maps: Maps | None = None) -> None:
        """num_tokens: of all batches. maps: where outputs are kept, if not in memory."""
        self._num_tokens, self._maps = num_tokens, maps
        self._experts = moe.experts_modules(layer)
        self._parts = list(dict.fromkeys(_parts(layer, set(self._experts))))
        inside = {module for part in self._parts for module in part.modules()}
        self._others = [module for module in layer.modules() if module not in inside]
        self._places: dict[tuple, torch.Tensor] = {}  # (what, its size per token, dtype) -> all rows
        self._calls: dict[tuple[Module, int], list[tuple[list[Any], Any]]] = {}  # (part, first row) -> outputs
        self._asked: list[ExpertsCall] = []

    def start(self, rows: slice, run: Run) -> torch.Tensor | None:
        """Runs a batch up to its experts and takes down what it asks of them; the layer's output if it asks nothing.

        Raises: Unrepeatable for a layer that asks for more or fewer tokens than it was given.
        """
        keeping = {part: self._keeping(part, rows) for part in self._parts}
        with unobserved(self._others), instead(keeping):
            found = asked_by(run, self._experts)
        if not isinstance(found, ExpertsCall):
            return found
        module, x, chosen, weights = found
        num_tokens = rows.stop - rows.start
        if len(x) != num_tokens:
            raise Unrepeatable(f"asks for {len(x)} rows of {num_tokens} tokens")
        if self._maps:
            x, chosen, weights = self._put("x", x, rows), chosen.clone(), weights.clone()
        self._asked.append(ExpertsCall(module, x, chosen, weights))
        return None

    def asked(self) -> ExpertsCall | None:
        """What all batches that were started ask of the experts; None if nothing."""
        if not self._asked:
            return None
        modules, xs, chosen, weights = zip(*self._asked, strict=True)
        x = next(v for k, v in self._places.items() if k[0] == "x") if self._maps else torch.cat(xs)
        self._asked = [ExpertsCall(modules[0], x, torch.cat(chosen), torch.cat(weights))]
        return self._asked[0]

    def finish(self, rows: slice, run: Run, sums: torch.Tensor) -> torch.Tensor:
        """A batch's output, given the experts' sums (T, D) for all that was asked.

        Raises: Unrepeatable for a layer that does not do again what it did in its first run.
        """
        (asked,) = self._asked
        x, y = asked.x[rows], sums.view(asked.x.shape)[rows]
        left = [self._maps.get(y) if self._maps else y]

        def answer(_: Module, given: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            if not left:
                raise Unrepeatable("calls its experts twice")
            if not (_same(given, self._maps.get(x) if self._maps else x) and _same(chosen, asked.chosen[rows])):
                raise Unrepeatable("gives its experts something else when it runs again")
            return left.pop().view_as(given)

        done = [part for part in self._parts if (part, rows.start) in self._calls]
        repeating = {part: self._repeating(part, rows) for part in done}
        with unobserved(done), instead(repeating), moe.answering(self._experts, answer):
            return run()

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
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if self._maps is None:
            return Held(leaf.clone(), 0) if leaf.is_inference() else Held(leaf, leaf._version)
        count = rows.stop - rows.start
        if leaf.numel() % count:
            return leaf
        return Mapped(self._put(key, leaf.reshape(count, -1), rows), torch.empty_like(leaf, device="meta"))

    def _put(self, what: object, values: torch.Tensor, rows: slice) -> torch.Tensor:
        """The place in a map of these rows' values (T, C), which are written there."""
        assert self._maps
        key = what, values.shape[1], values.dtype
        if key not in self._places:
            self._places[key] = self._maps.zeros((self._num_tokens, values.shape[1]), values.dtype)
        place = self._places[key][rows]
        self._maps.put(place, values)
        return place

    def _repeating(self, part: Module, rows: slice) -> Callable[..., Any]:
        calls, original = iter(self._calls.pop((part, rows.start))), part.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = next(calls, None)
            if call is None and _has_matrices(part):
                raise Unrepeatable(f"cannot repeat: {type(part).__name__} runs before and after the experts")
            if call is None or any(_is_changed(leaf) for leaf in call[0]):
                return original(*args, **kwargs)
            leaves, form = call
            return tree_unflatten([self._again(leaf) for leaf in leaves], form)

        return forward

    def _again(self, leaf: Any) -> Any:
        if isinstance(leaf, Held):
            return leaf.values
        if not isinstance(leaf, Mapped):
            return leaf
        assert self._maps is not None
        values = self._maps.get(leaf.values).view(leaf.form.shape)
        return values if leaf.form.is_contiguous() else torch.empty_like(leaf.form, device="cpu").copy_(values)


def _is_changed(leaf: Any) -> bool:
    """Whether the layer changed a part's output in place afterwards, so that it has to be computed again."""
    return isinstance(leaf, Held) and not leaf.values.is_inference() and leaf.values._version != leaf.version


def _parts(module: Module, experts: set[Module]) -> Iterator[Module]:
    """The largest modules below that hold parameters and no experts."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict) or not experts.isdisjoint(child.modules()):
            yield from _parts(child, experts) if child not in experts else ()
        elif next(child.parameters(), None) is not None:
            yield child


def _has_matrices(part: Module) -> bool:
    """A norm may run before and after the experts; what holds matrices may not, since its hooks are called once."""
    return any(parameter.dim() > 1 for parameter in part.parameters())


@contextmanager
def instead(forwards: dict[Module, Callable[..., Any]]) -> Iterator[None]:
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


def _same(found: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether a tensor (..., C) holds the same bits, NaN included, as the first run's, of the same rows."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.itemsize]
    rows = found.reshape(-1, found.shape[-1])
    return found.dtype == first.dtype and torch.equal(rows.contiguous().view(whole), first.contiguous().view(whole))
