"""The streaming forward: a whole model's activations with one decoder layer, and of it one expert, in memory.

Decoder layers are transformers' own, built on the meta device and filled one at a time without their experts, by the
library's own weight conversion; rotary embeddings, masks and routing are therefore stock. A layer's forward is
suspended where it calls its experts, for every batch; the experts are then walked once, each loaded from disk, run on
all of its tokens and let go; the forwards resume with the sums. So each expert is read once per layer, and each
product sees as many tokens as there are.

Where the activations would be large they are mapped to files, and no forward is left suspended: a layer runs twice
(`replay.py`), first up to its experts, then, with their sums, to its end. The numbers are the same, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch.utils._pytree import tree_leaves

from coterie.errors import CoterieError
from coterie.forward.activations import Arguments, Batch, Piece, Routed, Walk, plain_walk, restore, save, shared
from coterie.forward.replay import Recording, unobserved
from coterie.forward.skeleton import empty_model, fill, free, modules_outside, own_tensors, targets
from coterie.model import moe
from coterie.model.layer import Model, MoE, expert_names
from coterie.model.loading import NO_DATA, decoder_layers
from coterie.storage.tensors import Maps

__all__ = ["Batch", "Piece", "Rehearse", "Routed", "Samples", "Stream", "Walk", "plain_walk", "restore", "save"]

Samples = Sequence[Sequence[int]]
Rehearse = Callable[[int, torch.nn.Module, Callable[[Walk], None]], None]  # (index, layer, forward)
Keep = Callable[[Batch, torch.Tensor], None]  # what to do with a layer's output
IN_MEMORY = 2**30  # bytes of activations that stay in memory
AT_ONCE = 5  # times the hidden states: those, what waits in the layers, the experts' inputs and sums, the outputs


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
        self._root = next(name for name, module in self.model.named_modules() if module is self.layers)
        self._blocks = self._check_layers()
        walked = {name for block in source.moe if not block.attention for name in expert_names(block)}
        self._targets = targets(self.model, [name for name in self.checkpoint.tensors if name not in walked])
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
        outside = own_tensors(self._outside(head=True))
        groups: dict[int | None, list[str]] = {}
        for name, (target, _) in self._targets.items():
            if target.startswith(self._root + "."):
                index = int(target[len(self._root) + 1 :].partition(".")[0])
                if index < len(self.layers):
                    groups.setdefault(index, []).append(name)
            elif target in outside:
                groups.setdefault(None, []).append(name)
        return groups

    def _outside(self, *, head: bool) -> dict[str, torch.nn.Module]:
        parts = [self.decoder, *([self.model.get_output_embeddings()] if head else [])]
        return modules_outside(self.model, self.layers, parts)

    def stored(self, index: int) -> dict[str, str]:
        """Parameter of a layer, as its `named_parameters` has it -> the checkpoint's tensor it equals.

        Left out: experts, and what transformers computes from stored tensors (fused, split or transposed ones).
        """
        prefix, names = f"{self._root}.{index}.", self._names.get(index, [])
        sources = Counter(self._targets[name].name for name in names)
        parameters = dict(self.layers[index].named_parameters())
        found = {}
        for name in names:
            target, converted = self._targets[name]
            parameter = parameters.get(target.removeprefix(prefix))
            alone = sources[target] == 1 and not converted
            if alone and parameter is not None and self.checkpoint.tensors[name].shape == tuple(parameter.shape):
                found[target.removeprefix(prefix)] = name
        return found

    def _load(self, index: int) -> None:
        """Fills one layer. Raises: CoterieError when something stays empty."""
        fill(self.model, self.checkpoint, self._names.get(index, []), self.dtype)
        closed = {id(p) for m in moe.experts_modules(self.layers[index]) for p in m.parameters()}
        parameters = self.layers[index].named_parameters()
        self._check_filled([f"layer {index}: {n}" for n, p in parameters if p.is_meta and id(p) not in closed])

    def _load_outside(self, maps: Maps | None = None, *, head: bool) -> None:
        """Fills what stands around the layers, with or without the head; given maps, large tables are mapped.

        Raises: CoterieError when something stays empty.
        """
        wanted = own_tensors(self._outside(head=head))
        names = [name for name in self._names.get(None, []) if self._targets[name].name in wanted]
        fill(self.model, self.checkpoint, names, self.dtype, maps)
        self.model.tie_weights()
        self._check_filled([n for n, p in own_tensors(self._outside(head=head)).items() if p.is_meta])

    def _check_filled(self, empty: list[str]) -> None:
        if empty:
            raise CoterieError(f"{self.checkpoint.path}: no tensor fills {empty[0]!r}; expected every parameter stored")

    @torch.no_grad()
    def embed(
        self,
        samples: Samples,
        tokens_per_batch: int = 2048,
        *,
        spill: Path | None = None,
        budget: int | None = None,
        copies: int = 1,
    ) -> list[Batch]:
        """Token ids to the first layer's inputs; samples of equal length share batches.

        When all activations (about five times the hidden states of all samples) exceed `budget` bytes (`IN_MEMORY`
        unless given), they go to unnamed files in the folder `spill` (the system's temporary folder, which may be
        memory, unless given), which has to have room for as much; results are the same bit for bit.
        copies: how many such sets of hidden states there will be, that pass through the layers together.
        Raises: CoterieError for token ids that the model does not have, for models whose layers pass each other more
        than hidden states, and when the folder has too little room.
        """
        tables = Maps()
        self._load_outside(tables, head=False)
        self._check_tokens(samples)
        batches: list[Batch] = []
        arguments: dict[int, Arguments] = {}  # by length
        for rows in _grouped(samples, tokens_per_batch):
            ids = torch.tensor([list(samples[i]) for i in rows])
            batch = Batch(*self._capture(ids, changed=False), rows)
            if not batches:
                self._check_arguments(ids, batch.arguments)
                places = _places(samples, batch.hidden, spill, IN_MEMORY if budget is None else budget, copies)
            length = ids.shape[1]
            batch.arguments = arguments[length] = shared(batch.arguments, arguments.get(length, []))
            if places:
                batch.move(*places)
                places = places[0], places[1][batch.num_tokens :]
            tables.release()
            batches.append(batch)
        free(self._outside(head=True).values())  # the head as well, which may be tied to the embeddings
        return batches

    def _check_tokens(self, samples: Samples) -> None:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        for number, sample in enumerate(samples):
            if not len(sample) or min(sample) < 0 or max(sample) >= vocabulary:
                found = next((f"token id {t}" for t in sample if not 0 <= t < vocabulary), "no tokens")
                raise CoterieError(f"sample {number}: {found}; expected one id or more, all below {vocabulary}")

    def _capture(self, ids: torch.Tensor, *, changed: bool) -> tuple[torch.Tensor, Arguments]:
        """The first layer's hidden states, and what else each layer is given.

        Runs the decoder with every layer replaced by the identity, or by one that changes the hidden states.
        """
        arguments: Arguments = []
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
            with unobserved(self.layers.modules()):
                self.decoder(input_ids=ids, use_cache=False)
        except Exception as error:  # anything can go wrong where layers are expected to return more
            raise self._refusal(str(error)) from error
        finally:
            for layer in self.layers:
                del layer.forward
        if len(arguments) != len(self.layers):
            raise self._refusal(f"{len(arguments)} calls of {len(self.layers)} layers")
        return first[0], arguments

    def _check_arguments(self, ids: torch.Tensor, arguments: Arguments) -> None:
        """What layers are given beside hidden states must not depend on the hidden states of layers before."""
        _, again = self._capture(ids, changed=True)
        pairs = zip(tree_leaves(arguments), tree_leaves(again), strict=True)
        if any(isinstance(a, torch.Tensor) and not torch.equal(a, b) for a, b in pairs):
            raise self._refusal("a layer's arguments depend on the layers before")

    def _refusal(self, reason: str) -> CoterieError:
        name = type(self.decoder).__name__
        return CoterieError(
            f"{self.checkpoint.path}: the layers of {name} pass each other more than hidden states ({reason}), which "
            f"the streaming forward cannot follow; {NO_DATA}"
        )

    def run(self, batches: list[Batch], walk: Walk, first: int = 0, rehearse: Rehearse | None = None) -> Iterator[int]:
        """Advances the batches layer by layer (in place), yielding each finished layer's index.

        rehearse: called as (index, layer, forward) with the layer loaded, before it runs. Its `forward(walk)` runs the
        layer over all batches, with that walk for its experts, and throws the outputs away; hooks on the layer's
        modules see each batch once in it, and must not change what passes. Parameters may be changed in place: the
        layer then runs with them.
        Raises: CoterieError for hidden states that are NaN or infinite, and whatever the walk raises; the batches are
        then of no more use.
        """
        for index in range(first, len(self.layers)):
            self._load(index)
            if rehearse:
                self._rehearse(index, batches, rehearse)
            self._run_layer(index, batches, walk, advance)
            free(self.layers[index].modules())
            yield index

    @contextmanager
    def loaded(self, index: int) -> Iterator[Callable[[list[Batch], Walk, Keep], None]]:
        """Layer `index` in memory: yields (batches, walk, keep), which runs it over any batches, any number of times.

        `keep(batch, output)` says what becomes of the outputs: `advance` moves the batches on.
        """
        self._load(index)
        try:
            with torch.no_grad():
                yield partial(self._run_layer, index)
        finally:
            free(self.layers[index].modules())

    @contextmanager
    def without_experts(self, index: int) -> Iterator[None]:
        """While entered, layer `index` is expected to compute without asking for its experts."""
        block = self._blocks.pop(index)
        try:
            yield
        finally:
            self._blocks[index] = block

    @torch.no_grad()
    def _rehearse(self, index: int, batches: list[Batch], rehearse: Rehearse) -> None:
        def forward(walk: Walk) -> None:
            self._run_layer(index, batches, walk, lambda batch, output: None)

        rehearse(index, self.layers[index], forward)

    @torch.no_grad()
    def _run_layer(self, index: int, batches: list[Batch], walk: Walk, keep: Keep) -> None:
        """One layer over all batches, with its experts walked once."""
        if any(batch.maps for batch in batches):
            self._run_twice(index, batches, walk, keep)
        else:
            self._run_together(index, batches, walk, keep)

    def _run_together(self, index: int, batches: list[Batch], walk: Walk, keep: Keep) -> None:
        """All batches wait inside the layer for their experts' sums."""
        running = [_Forward(self._forward) for _ in batches]
        results = [g.switch(index, batch) for g, batch in zip(running, batches, strict=True)]
        while not all(g.dead for g in running):
            assert index in self._blocks and not any(g.dead for g in running)
            sums = walk(_gather(self._blocks[index], results)).split([_rows(call) for call in results])
            results = [g.switch(y.view_as(r[1])) for g, y, r in zip(running, sums, results, strict=True)]
        for batch, output in zip(batches, results, strict=True):
            keep(batch, output)

    def _run_twice(self, index: int, batches: list[Batch], walk: Walk, keep: Keep) -> None:
        """One batch after the other up to the experts, then again to the end; maps hold what is in between."""
        maps = next(batch.maps for batch in batches if batch.maps)
        if index not in self._blocks:
            for batch in batches:
                keep(batch, self._forward(index, batch))
                maps.passed(batch.num_bytes)
            return
        recording = Recording(self.layers[index], sum(batch.num_tokens for batch in batches), maps)
        routed = self._record(index, batches, recording, maps)
        sums = walk(routed).view(routed.x.shape)
        for batch, rows in _rows_of(batches):
            running = _Forward(self._forward)
            with recording.second_run(rows):
                call, x, ids = running.switch(index, batch), maps.get(routed.x[rows]), routed.chosen[rows]
                if not (_same(call[1].reshape(x.shape), x) and _same(call[2].reshape(ids.shape), ids)):
                    raise self._unspillable(index, "gives its experts something else when it runs again")
                output = running.switch(maps.get(sums[rows]).view_as(call[1]))
            if not running.dead:
                raise self._unspillable(index, "calls its experts twice")
            keep(batch, output)
            maps.passed(batch.num_bytes)

    def _record(self, index: int, batches: list[Batch], recording: Recording, maps: Maps) -> Routed:
        """Runs every batch up to its experts and takes down what it asks of them."""
        calls: list[tuple] = []
        x = torch.empty(0)
        for batch, rows in _rows_of(batches):
            running = _Forward(self._forward)
            with recording.first_run(rows):
                call = running.switch(index, batch)
                if running.dead:
                    raise self._unspillable(index, "does not call its experts")
                running.throw()  # ends it there
            if _rows(call) != batch.num_tokens:
                raise self._unspillable(index, f"asks for {_rows(call)} rows of {batch.num_tokens} tokens")
            given = call[1].reshape(batch.num_tokens, -1)
            if not calls:
                x = maps.zeros((sum(b.num_tokens for b in batches), given.shape[1]), given.dtype)
            maps.put(x[rows], given)
            maps.passed(batch.num_bytes)
            calls.append((call[0], given.new_empty(0, given.shape[1]), call[2].clone(), call[3].clone()))
        rest = _gather(self._blocks[index], calls)
        return Routed(rest.block, rest.module, x, rest.chosen, rest.weights, maps)

    def _unspillable(self, index: int, reason: str) -> CoterieError:
        return CoterieError(
            f"{self.checkpoint.path}: layer {index} {reason}, so its activations cannot leave memory; calibrate on "
            "fewer or shorter samples"
        )

    def _forward(self, index: int, batch: Batch) -> torch.Tensor:
        args, kwargs = batch.arguments[index]
        output = self.layers[index](batch.loaded(), *args, **kwargs)
        if isinstance(output, tuple) and len(output) == 1:
            output = output[0]
        if not isinstance(output, torch.Tensor):
            raise self._refusal(f"layer {index} returns {_described(output)}")
        if not all(bound.isfinite() for bound in output.aminmax()):
            raise CoterieError(
                f"{self.checkpoint.path}: layer {index}: hidden states are NaN or infinite; the weights are damaged, "
                "or their range needs --dtype float32"
            )
        return output

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """The model's head on the last layer's output, by stock code."""
        if any(tensor.is_meta for tensor in own_tensors(self._outside(head=True)).values()):
            self._load_outside(head=True)
        for layer in self.layers:
            layer.forward = lambda *args, **kwargs: batch.loaded()  # type: ignore[method-assign, assignment]
        try:
            ids = torch.zeros(batch.hidden.shape[:2], dtype=torch.long)
            with unobserved(self.layers.modules()):
                return self.model(input_ids=ids, use_cache=False).logits
        finally:
            for layer in self.layers:
                del layer.forward


def _grouped(samples: Samples, tokens_per_batch: int) -> Iterator[tuple[int, ...]]:
    """Numbers of samples that share a batch: of equal length, in the order given."""
    by_length: dict[int, list[int]] = {}
    for number, sample in enumerate(samples):
        by_length.setdefault(len(sample), []).append(number)
    for length, members in by_length.items():
        size = max(1, tokens_per_batch // length)
        for start in range(0, len(members), size):
            yield tuple(members[start : start + size])


def _places(
    samples: Samples, hidden: torch.Tensor, spill: Path | None, budget: int, copies: int
) -> tuple[Maps, torch.Tensor] | None:
    """Where hidden states like the given ones (B, T, ...) go, token after token; None: they stay in memory."""
    num_tokens = sum(map(len, samples))
    if AT_ONCE * copies * num_tokens * hidden[0, 0].nbytes <= budget:
        return None
    maps = Maps(spill, budget)
    return maps, maps.zeros((num_tokens, *hidden.shape[2:]), hidden.dtype)


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


def _rows(call: tuple) -> int:
    """How many tokens a call to the experts brings."""
    return call[1].numel() // call[1].shape[-1]


def _rows_of(batches: list[Batch]) -> Iterator[tuple[Batch, slice]]:
    """Every batch, and where its tokens are among those of all."""
    start = 0
    for batch in batches:
        yield batch, slice(start, start + batch.num_tokens)
        start += batch.num_tokens


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in every bit, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def advance(batch: Batch, output: torch.Tensor) -> None:
    """The layer's output becomes the next one's input."""
    batch.hidden = output


def _described(output: Any) -> str:
    return f"{len(output)} values" if isinstance(output, tuple) else type(output).__name__
