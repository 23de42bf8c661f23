"""The streaming forward: a whole model's activations with one decoder layer, and of it one expert, in memory.

Decoder layers are transformers' own, built on the meta device and filled one at a time without their experts, by the
library's own weight conversion; rotary embeddings, masks and routing are therefore stock. A layer's forward is
suspended where it calls its experts, for every batch; the experts are then walked once, each loaded from disk, run on
all of its tokens and let go; the forwards resume with the sums. So each expert is read once per layer, and each
product sees as many tokens as there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch.utils._pytree import tree_leaves

from coterie import moe
from coterie.checkpoint import Checkpoint
from coterie.errors import CoterieError
from coterie.layer import Model, MoE
from coterie.skeleton import NO_DATA, decoder_layers, empty_model, fill, free, needed_outside, targets

Samples = Sequence[Sequence[int]]


@dataclass
class Batch:
    """Samples of one length between two layers: hidden states (B, T, D), and the layers' other arguments."""

    hidden: torch.Tensor
    arguments: list[tuple[tuple, dict[str, Any]]] = field(repr=False)  # per layer
    samples: tuple[int, ...] = ()  # which of the samples given to `embed` its rows are


@dataclass(frozen=True)
class Routed:
    """What a layer asks of its experts, over all batches: inputs (T, D), chosen ids and weights (T, K)."""

    block: MoE
    module: torch.nn.Module
    x: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor

    def by_expert(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(expert, its tokens' rows, their weights), ascending, for experts that were chosen at all."""
        flat = self.chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.block.num_experts)[: self.block.num_experts]
        weights, top_k = self.weights.flatten(), self.chosen.shape[1]
        for e, places in enumerate(order[: int(counts.sum())].split(counts.tolist())):
            if len(places):
                yield e, places // top_k, weights[places]


Walk = Callable[[Routed], torch.Tensor]  # -> the experts' weighted sum (T, D)


class Stream:
    """A model whose decoder layers pass through memory one after the other."""

    def __init__(self, source: Model, dtype: torch.dtype) -> None:
        """Builds the model without its weights.

        Raises: CoterieError for a model that transformers does not know, or whose experts or layers are closed to us.
        """
        moe.register(_suspend)
        self.source, self.checkpoint, self.dtype = source, source.checkpoint, dtype
        self.model = empty_model(source.checkpoint, dtype)
        self.decoder = self.model.get_decoder()
        self.layers = decoder_layers(self.decoder, str(source.checkpoint.path))
        self._blocks = self._check_layers()
        self._names = self._group_names()

    def _check_layers(self) -> dict[int, MoE]:
        """Layer index -> its MoE block. Raises: CoterieError unless exactly the MoE layers have experts, once."""
        blocks = {int(b.key): b for b in self.source.moe if not b.mtp and not b.attention}
        for block in self.source.moe:
            if not block.mtp and int(block.key) < len(self.layers):
                moe.refuse_undecorated(self.layers[int(block.key)], block.name)
        for index, layer in enumerate(self.layers):
            found = len(moe.experts_modules(layer))
            if found != (index in blocks):
                raise CoterieError(
                    f"{self.checkpoint.path}: layer {index} has {found} experts modules in transformers, but "
                    f"{int(index in blocks)} in the checkpoint; expected the same, one at most: {NO_DATA}"
                )
        return blocks

    def _group_names(self) -> dict[int | None, list[str]]:
        """Layer index (None: outside the layers) -> names of the tensors to load there; experts are left out.

        What the model has no place for outside its layers stays unread: multi-token prediction, vision towers of
        models that are built as text models. That nothing is missing is checked after loading.
        """
        root = next(name for name, module in self.model.named_modules() if module is self.layers)
        outside = needed_outside(self.model, self.decoder, self.layers)
        groups: dict[int | None, list[str]] = {}
        for name, target in targets(self.model, list(self.checkpoint.tensors)).items():
            if self.source.roles[name] == "expert":
                continue
            if target.startswith(root + "."):
                index = int(target[len(root) + 1 :].partition(".")[0])
                if index < len(self.layers):
                    groups.setdefault(index, []).append(name)
            elif target in outside:
                groups.setdefault(None, []).append(name)
        return groups

    def _load(self, index: int | None) -> None:
        """Fills one layer, or what is needed outside the layers. Raises: CoterieError when something stays empty."""
        fill(self.model, self.checkpoint, self._names.get(index, []), self.dtype)
        if index is None:
            self.model.tie_weights()
            empty = [n for n, p in needed_outside(self.model, self.decoder, self.layers).items() if p.is_meta]
        else:
            closed = {id(p) for m in moe.experts_modules(self.layers[index]) for p in m.parameters()}
            parameters = self.layers[index].named_parameters()
            empty = [f"layer {index}: {n}" for n, p in parameters if p.is_meta and id(p) not in closed]
        if empty:
            raise CoterieError(f"{self.checkpoint.path}: no tensor fills {empty[0]!r}; expected every parameter stored")

    @torch.no_grad()
    def embed(self, samples: Samples, tokens_per_batch: int = 2048) -> list[Batch]:
        """Token ids to the first layer's inputs; samples of equal length share batches.

        Raises: CoterieError for token ids that the model does not have, and for models whose layers pass each other
        more than hidden states.
        """
        self._load(None)
        self._check_tokens(samples)
        by_length: dict[int, list[int]] = {}
        for number, sample in enumerate(samples):
            by_length.setdefault(len(sample), []).append(number)
        batches = []
        for length, members in by_length.items():
            size = max(1, tokens_per_batch // length)
            for start in range(0, len(members), size):
                rows = members[start : start + size]
                ids = torch.tensor([list(samples[i]) for i in rows])
                batches.append(Batch(*self._capture(ids, changed=False), samples=tuple(rows)))
                if len(batches) == 1:
                    self._check_arguments(ids, batches[0])
        return batches

    def _check_tokens(self, samples: Samples) -> None:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        for number, sample in enumerate(samples):
            if not len(sample) or min(sample) < 0 or max(sample) >= vocabulary:
                found = next((f"token id {t}" for t in sample if not 0 <= t < vocabulary), "no tokens")
                raise CoterieError(f"sample {number}: {found}; expected one id or more, all below {vocabulary}")

    def _capture(self, ids: torch.Tensor, *, changed: bool) -> tuple[torch.Tensor, list[tuple[tuple, dict[str, Any]]]]:
        """The first layer's hidden states, and what else each layer is given.

        Runs the decoder with every layer replaced by the identity, or by one that changes the hidden states.
        """
        arguments: list[tuple[tuple, dict[str, Any]]] = []
        returned: list[torch.Tensor] = []
        first: list[torch.Tensor] = []

        def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if returned and hidden is not returned[-1]:
                raise CoterieError("something happens between the layers")
            first.append(hidden)
            kwargs.pop("past_key_values", None)
            arguments.append((args, kwargs))
            returned.append(hidden + 1 if changed else hidden)
            return returned[-1]

        for layer in self.layers:
            layer.forward = record  # type: ignore[method-assign, assignment]
        try:
            self.decoder(input_ids=ids, use_cache=False)
        except Exception as error:  # anything can go wrong where layers are expected to return more
            raise self._refusal(str(error)) from error
        finally:
            for layer in self.layers:
                del layer.forward
        if len(arguments) != len(self.layers):
            raise self._refusal(f"{len(arguments)} calls of {len(self.layers)} layers")
        return first[0], arguments

    def _check_arguments(self, ids: torch.Tensor, batch: Batch) -> None:
        """What layers are given beside hidden states must not depend on the hidden states of layers before."""
        _, again = self._capture(ids, changed=True)
        pairs = zip(tree_leaves(batch.arguments), tree_leaves(again), strict=True)
        if any(isinstance(a, torch.Tensor) and not torch.equal(a, b) for a, b in pairs):
            raise self._refusal("a layer's arguments depend on the layers before")

    def _refusal(self, reason: str) -> CoterieError:
        name = type(self.decoder).__name__
        return CoterieError(
            f"{self.checkpoint.path}: the layers of {name} pass each other more than hidden states ({reason}), which "
            f"the streaming forward cannot follow; {NO_DATA}"
        )

    def run(self, batches: list[Batch], walk: Walk, first: int = 0) -> Iterator[int]:
        """Advances the batches layer by layer (in place), yielding each finished layer's index."""
        for index in range(first, len(self.layers)):
            self._load(index)
            outputs = self._run_layer(index, batches, walk)
            for batch, output in zip(batches, outputs, strict=True):
                batch.hidden = output
            free(self.layers[index])
            yield index

    @torch.no_grad()
    def _run_layer(self, index: int, batches: list[Batch], walk: Walk) -> list[torch.Tensor]:
        """One layer over all batches, with its experts walked once."""
        layer, block = self.layers[index], self._blocks.get(index)

        def forward(batch: Batch) -> torch.Tensor:
            args, kwargs = batch.arguments[index]
            output = layer(batch.hidden, *args, **kwargs)
            if isinstance(output, tuple) and len(output) == 1:
                return output[0]
            if not isinstance(output, torch.Tensor):
                raise self._refusal(f"layer {index} returns {_described(output)}")
            return output

        running = [_Forward(forward) for _ in batches]
        results = [g.switch(batch) for g, batch in zip(running, batches, strict=True)]
        while not all(g.dead for g in running):
            assert block is not None and not any(g.dead for g in running)
            sums = walk(_gather(block, results)).split([len(x) for _, x, _, _ in results])
            results = [g.switch(y.view_as(r[1])) for g, y, r in zip(running, sums, results, strict=True)]
        return results

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """The model's head on the last layer's output, by stock code."""
        for layer in self.layers:
            layer.forward = lambda *args, **kwargs: batch.hidden  # type: ignore[method-assign, assignment]
        try:
            ids = torch.zeros(batch.hidden.shape[:2], dtype=torch.long)
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            for layer in self.layers:
                del layer.forward


class _Forward(greenlet):
    """A layer's forward over one batch, which stops where it calls its experts."""


def _suspend(module: torch.nn.Module, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Our experts implementation: hands the call to whoever runs the layer, and waits for the sums."""
    running = getcurrent()
    if not isinstance(running, _Forward):
        raise CoterieError("the experts implementation 'coterie' runs only inside a streaming forward")
    assert running.parent is not None
    return running.parent.switch((module, x, chosen, weights))


def _gather(block: MoE, calls: list[tuple]) -> Routed:
    modules, xs, chosen, weights = zip(*calls, strict=True)
    x, ids, gates = (torch.cat([t.reshape(-1, t.shape[-1]) for t in ts]) for ts in (xs, chosen, weights))
    return Routed(block, modules[0], x, ids, gates)


def _described(output: Any) -> str:
    return f"{len(output)} values" if isinstance(output, tuple) else type(output).__name__


def plain_walk(checkpoint: Checkpoint, dtype: torch.dtype) -> Walk:
    """The experts as they are: sum_k w_k expert_k(x)."""

    def walk(routed: Routed) -> torch.Tensor:
        total = torch.zeros_like(routed.x)
        for e, rows, weights in routed.by_expert():
            expert = moe.read_expert(checkpoint, routed.block, e, dtype)
            _, y = moe.expert_forward(routed.module, expert, routed.x[rows])
            total.index_add_(0, rows, (y * weights[:, None]).to(total.dtype))
        return total

    return walk
