"""The streaming forward: a whole model's activations with one decoder layer, and of it one expert, in memory.

Decoder layers are transformers' own, built on the meta device and filled one at a time without their experts, by the
library's own weight conversion; rotary embeddings, masks and routing are therefore stock. A layer's forward is
suspended where it calls its experts, for every batch; the experts are then walked once, each loaded from disk, run on
all of its tokens and let go; the forwards resume with the sums. So each expert is read once per layer, and each
product sees as many tokens as there are.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from coterie import moe
from coterie.checkpoint import Checkpoint
from coterie.errors import CoterieError
from coterie.layer import LAYER, Model, MoE

Samples = Sequence[Sequence[int]]


@dataclass
class Batch:
    """Samples of one length between two layers: hidden states (B, T, D), and the layers' other arguments."""

    hidden: torch.Tensor
    arguments: list[tuple[tuple, dict[str, Any]]] = field(repr=False)  # per layer


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
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        moe.register(_suspend)
        self.source, self.checkpoint, self.dtype = source, source.checkpoint, dtype
        config = _stock_config(source.checkpoint.config)
        with init_empty_weights(include_buffers=False):  # rotary buffers are computed, not loaded: they must be real
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model.eval().set_experts_implementation(moe.IMPLEMENTATION)
        self.decoder = self.model.get_decoder()
        self.layers = _decoder_layers(self.decoder, self.model.config)
        self._names = self._group_names()

    def _group_names(self) -> dict[int | None, list[str]]:
        """Layer index (None: outside the layers) -> names of the tensors to load there; experts are left out."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping: Any = get_model_conversion_mapping(self.model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        state = self.model.state_dict()
        groups: dict[int | None, list[str]] = {}
        for name in self.checkpoint.tensors:
            target, _ = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
            match = LAYER.fullmatch(target)
            index = int(match["index"]) if match else None
            if self.source.roles[name] != "expert" and (index is None or index < len(self.layers)):
                groups.setdefault(index, []).append(name)
        return groups

    def _load(self, index: int | None) -> None:
        """Fills one layer (or all that is outside the layers) through the library's own conversion."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        mapping: Any = get_model_conversion_mapping(self.model)  # conversions keep state: a fresh one each time
        how = LoadStateDictConfig(weight_mapping=mapping, dtype=self.dtype, device_map={"": "cpu"})
        tensors = {name: _tensor(self.checkpoint, name) for name in self._names.get(index, [])}
        info, _ = convert_and_load_state_dict_in_model(self.model, tensors, how, None)
        faults = {*info.unexpected_keys, *info.mismatched_keys, *info.conversion_errors}
        if faults:
            raise CoterieError(f"{self.checkpoint.path}: transformers does not take {sorted(map(str, faults))[0]!r}")

    def embed(self, samples: Samples, tokens_per_batch: int = 2048) -> list[Batch]:
        """Token ids to the first layer's inputs; samples of equal length share batches."""
        self._load(None)
        self.model.tie_weights()
        by_length: dict[int, list[Sequence[int]]] = {}
        for sample in samples:
            by_length.setdefault(len(sample), []).append(sample)
        batches = []
        for length, members in by_length.items():
            size = max(1, tokens_per_batch // length)
            for start in range(0, len(members), size):
                batches.append(self._capture(torch.tensor(members[start : start + size])))
        return batches

    def _capture(self, ids: torch.Tensor) -> Batch:
        """Runs the decoder with every layer replaced by the identity, recording what each is given."""
        given: list[tuple[tuple, dict[str, Any]]] = []
        first: list[torch.Tensor] = []

        def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            first.append(hidden)
            kwargs.pop("past_key_values", None)
            given.append((args, kwargs))
            return hidden

        for layer in self.layers:
            layer.forward = record  # type: ignore[method-assign, assignment]
        try:
            self.decoder(input_ids=ids, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
        return Batch(first[0], given)

    def run(self, batches: list[Batch], walk: Walk, first: int = 0) -> Iterator[int]:
        """Advances the batches layer by layer (in place), yielding each finished layer's index."""
        blocks = {int(b.key): b for b in self.source.moe if not b.mtp and not b.attention}
        for index in range(first, len(self.layers)):
            self._load(index)
            if index in blocks:
                moe.refuse_undecorated(self.layers[index], blocks[index].name)
            outputs = self._run_layer(index, batches, blocks.get(index), walk)
            for batch, output in zip(batches, outputs, strict=True):
                batch.hidden = output
            self.layers[index].to("meta")
            yield index

    def _run_layer(self, index: int, batches: list[Batch], block: MoE | None, walk: Walk) -> list[torch.Tensor]:
        """One layer over all batches, with its experts walked once."""
        layer = self.layers[index]

        def forward(batch: Batch) -> torch.Tensor:
            args, kwargs = batch.arguments[index]
            output = layer(batch.hidden, *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        running = [greenlet(forward) for _ in batches]
        results = [g.switch(batch) for g, batch in zip(running, batches, strict=True)]
        while not all(g.dead for g in running):
            assert block is not None and not any(g.dead for g in running)
            sums = walk(_gather(block, results)).split([len(x) for _, x, _, _ in results])
            results = [g.switch(y.view_as(r[1])) for g, y, r in zip(running, sums, results, strict=True)]
        return results

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


def _suspend(module: torch.nn.Module, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Our experts implementation: hands the call to whoever runs the layer, and waits for the sums."""
    runner = getcurrent().parent
    if runner is None:
        raise CoterieError("the experts implementation 'coterie' runs only inside a streaming forward")
    return runner.switch((module, x, chosen, weights))


def _gather(block: MoE, calls: list[tuple]) -> Routed:
    modules, xs, chosen, weights = zip(*calls, strict=True)
    flat = [x.reshape(-1, x.shape[-1]) for x in xs]
    return Routed(block, modules[0], torch.cat(flat), torch.cat(chosen), torch.cat(weights))


def _stock_config(config: dict[str, Any]) -> Any:
    """The library's config object, read by its own reader (which knows how it spells infinities)."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return AutoConfig.from_pretrained(folder)


def _decoder_layers(decoder: Any, config: Any) -> Any:
    wanted = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList)]
    return next(m for m in lists if len(m) == wanted)


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A stored tensor as torch has it, without a copy of its values in another type."""
    from safetensors.torch import _TYPES  # the library's own table of names

    stored = checkpoint.tensors[name]
    dtype: Any = _TYPES[stored.dtype]
    return torch.frombuffer(bytearray(checkpoint.raw(name)), dtype=dtype).view(stored.shape)


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
