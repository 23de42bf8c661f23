"""The streaming forward: a whole model's activations with one decoder layer, and of it one expert, in memory.

Decoder layers are transformers' own, built on the meta device and filled one at a time without their experts
(`skeleton.py`), by the library's own weight conversion; rotary embeddings, masks and routing are therefore stock. A
layer runs up to its experts for every batch (`suspended.py`); the experts are then walked once, each loaded from disk,
run on all of its tokens and let go; the layer goes on with the sums. So each expert is read once per layer, and each
product sees as many tokens as there are.

Where the activations would be large they are mapped to files. The numbers are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from coterie.errors import CoterieError
from coterie.forward.activations import Arguments, Batch, Routed, Walk, shared
from coterie.forward.skeleton import Skeleton, free, own_tensors
from coterie.forward.suspended import Suspended, Unrepeatable, instead, unobserved
from coterie.model.layer import Model
from coterie.model.loading import NO_DATA
from coterie.storage.tensors import Maps

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
        self.source, self.checkpoint, self.dtype = source, source.checkpoint, dtype
        self._skeleton = skeleton = Skeleton(source, dtype)
        self.model, self.decoder, self.layers = skeleton.model, skeleton.decoder, skeleton.layers
        self.stored, self.router, self._blocks = skeleton.stored, skeleton.router, skeleton.blocks

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
        self._skeleton.load_outside(tables, head=False)
        self._check_tokens(samples)
        batches: list[Batch] = []
        arguments: dict[int, Arguments] = {}  # by length
        for rows in _grouped(samples, tokens_per_batch):
            ids = torch.tensor([list(samples[i]) for i in rows])
            hidden, given, _ = self._capture(ids, changed=False)
            batch = Batch(hidden, given, rows)
            if not batches:
                self._check_alone(ids, hidden, given)
                places = _places(samples, batch.hidden, spill, IN_MEMORY if budget is None else budget, copies)
            length = ids.shape[1]
            batch.arguments = arguments[length] = shared(batch.arguments, arguments.get(length, []))
            if places:
                batch.move(*places)
                places = places[0], places[1][batch.num_tokens :]
            tables.release()
            batches.append(batch)
        free(self._skeleton.outside(head=True).values())  # the head as well, which may be tied to the embeddings
        return batches

    def _check_tokens(self, samples: Samples) -> None:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        for number, sample in enumerate(samples):
            if not len(sample) or min(sample) < 0 or max(sample) >= vocabulary:
                found = next((f"token id {t}" for t in sample if not 0 <= t < vocabulary), "no tokens")
                raise CoterieError(f"sample {number}: {found}; expected one id or more, all below {vocabulary}")

    def _capture(self, ids: torch.Tensor, *, changed: bool) -> tuple[torch.Tensor, Arguments, torch.Tensor]:
        """The first layer's hidden states, what else each layer is given, and what the decoder makes of it all.

        Runs the decoder with every layer replaced by the identity, or by one that changes the hidden states; the last
        one gives the first one's again, either way.
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
            is_last = len(arguments) == len(self.layers)
            returned.append(first[0] if is_last else hidden + 1 if changed else hidden)
            return returned[-1]

        try:
            with unobserved(self.layers.modules()), instead(dict.fromkeys(self.layers, record)):
                output = self.decoder(input_ids=ids, use_cache=False)
        except Exception as error:  # anything can go wrong where layers are expected to return more
            raise self._refusal(str(error)) from error
        if len(arguments) != len(self.layers):
            raise self._refusal(f"{len(arguments)} calls of {len(self.layers)} layers")
        return first[0], arguments, output[0]

    def _check_alone(self, ids: torch.Tensor, hidden: torch.Tensor, arguments: Arguments) -> None:
        """Hidden states of layers before must reach neither what a layer is given beside its own, nor the end."""
        _, again, end = self._capture(ids, changed=True)
        pairs = zip(tree_leaves(arguments), tree_leaves(again), strict=True)
        if any(isinstance(a, torch.Tensor) and not torch.equal(a, b) for a, b in pairs):
            raise self._refusal("a layer's arguments depend on the layers before")
        through = dict.fromkeys(self.layers, lambda *args, **kwargs: hidden)
        with unobserved(self.layers.modules()), instead(through):
            alone = self.decoder(input_ids=torch.zeros_like(ids), use_cache=False)[0]
        if not torch.equal(end, alone):
            raise self._refusal("the end depends on more than the last layer")

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
            self._skeleton.load(index)
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
        self._skeleton.load(index)
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
        maps = next((batch.maps for batch in batches if batch.maps), None)
        if index not in self._blocks:
            for batch in batches:
                keep(batch, self._forward(index, batch))
                batch.passed()
            return
        layer = Suspended(self.layers[index], sum(batch.num_tokens for batch in batches), maps)
        try:
            for batch, rows in _rows_of(batches):
                output = layer.start(rows, partial(self._forward, index, batch))
                if output is not None and maps:
                    raise Unrepeatable("does not call its experts")
                if output is not None:
                    keep(batch, output)
                batch.passed()
            if not (asked := layer.asked()):
                return
            sums = walk(Routed(self._blocks[index], *asked, maps))
            for batch, rows in _rows_of(batches):
                keep(batch, layer.finish(rows, partial(self._forward, index, batch), sums))
                batch.passed()
        except Unrepeatable as reason:
            advice = "its activations cannot leave memory; calibrate on fewer or shorter samples"
            consequence = advice if maps else f"it cannot be calibrated; {NO_DATA}"
            raise CoterieError(f"{self.checkpoint.path}: layer {index} {reason}, so {consequence}") from None

    def _forward(self, index: int, batch: Batch) -> torch.Tensor:
        args, kwargs = batch.arguments[index]
        output = self.layers[index](batch.loaded(), *args, **kwargs)
        if isinstance(output, tuple) and len(output) == 1:
            output = output[0]
        if not isinstance(output, torch.Tensor):
            found = f"{len(output)} values" if isinstance(output, tuple) else type(output).__name__
            raise self._refusal(f"layer {index} returns {found}")
        if not all(bound.isfinite() for bound in output.aminmax()):
            raise CoterieError(
                f"{self.checkpoint.path}: layer {index}: hidden states are NaN or infinite; the weights are damaged, "
                "or their range needs --dtype float32"
            )
        return output

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """The model's head on the last layer's output, by stock code."""
        if any(tensor.is_meta for tensor in own_tensors(self._skeleton.outside(head=True)).values()):
            self._skeleton.load_outside(head=True)
        through = dict.fromkeys(self.layers, lambda *args, **kwargs: batch.loaded())
        ids = torch.zeros(batch.hidden.shape[:2], dtype=torch.long)
        with unobserved(self.layers.modules()), instead(through):
            return self.model(input_ids=ids, use_cache=False).logits


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


def _rows_of(batches: list[Batch]) -> Iterator[tuple[Batch, slice]]:
    """Every batch, and where its tokens are among those of all."""
    start = 0
    for batch in batches:
        yield batch, slice(start, start + batch.num_tokens)
        start += batch.num_tokens


def advance(batch: Batch, output: torch.Tensor) -> None:
    """The layer's output becomes the next one's input."""
    batch.hidden = output
