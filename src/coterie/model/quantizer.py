"""Packed checkpoints in transformers: an entry quantization_config that names coterie.

`AutoModelForCausalLM.from_pretrained(OUT)` builds the stock model, leaves the packed experts and linear layers without
weights, lets the library load the rest, and then puts the packed matrices in, each checked. Importing this module
registers it; `coterie.model.hook` imports it when transformers needs it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from coterie.codecs import Coded
from coterie.codecs.bits import (
    CLOSED,
    METHOD,
    NOTICE,
    Packed,
    check_settings,
    encode,
    is_named,
    joined,
    shrinks,
)
from coterie.codecs.open import coded, opened_packed
from coterie.errors import CoterieError
from coterie.kernels.integers import IntegerMatrix
from coterie.kernels.memory import TORCH, Arena, Matrix, Stack, load
from coterie.model.experts import expert_matrices
from coterie.model.layer import Model, MoE, expert_names
from coterie.model.loading import decoder_layers
from coterie.model.moe import WEIGHTS, enter, experts_modules
from coterie.model.sparse import SparseExperts, SparseLinear, stock
from coterie.model.targets import targets
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.numerics import encode as encode_values


@dataclass
class Placed:
    """What becomes sparse: a module, and the tensors on disk that fill each of its stacks, per expert."""

    name: str  # of the module
    module: Any
    stacks: list[list[str]]  # per stack, one tensor name per expert, or one for all of a fused tensor
    block: MoE | None = None  # of experts whose layout on disk is not the one in memory


class CoterieConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of config.json. Raises: CoterieError for another version of the format."""

    def __init__(self, format: Any = None, **_: Any) -> None:
        check_settings({"format": format}, "config.json (quantization_config)")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format

    def to_dict(self) -> dict[str, Any]:
        """The entry as it is written."""
        return {**NOTICE, "format": self.format}


class CoterieQuantizer(HfQuantizer):
    """Loads and saves packed weights; changes nothing else about a model."""

    quantization_config: CoterieConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise CoterieError("a dense checkpoint cannot be packed while it is loaded: use `coterie pack DENSE OUT`")
        self.placed: list[Placed] = []
        self.packed: Mapping[str, Coded] = {}

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        """Takes the weights that are packed out of the model, so that the library neither loads nor invents them."""
        if not checkpoint_files:
            raise CoterieError("a packed checkpoint is loaded from its folder; no files were given")
        self.checkpoint = Checkpoint.open(Path(checkpoint_files[0]).parent)
        view = opened_packed(self.checkpoint)
        if view is None:
            raise CoterieError(f"{self.checkpoint.path}: holds no packed matrices that can be multiplied as they are")
        self.view, self.packed = view, coded(view)
        names = self._place_experts(model)
        self._place_linears(model, [name for name in self.packed if name not in names])
        enter(model)
        found: list[Any] = experts_modules(model)
        for module in found:
            module.coterie = stock  # until its packed experts are there, if it has any
        modules = "|".join(re.escape(p.name.removeprefix(f"{model.base_model_prefix}.")) for p in self.placed)
        parts = {part.removeprefix(name) for name, found in self.packed.items() for part in found.parts}
        ignored = {rf"({'|'.join(map(re.escape, sorted(parts)))})$", rf"(^|\.)({modules})\.({'|'.join(WEIGHTS)})$"}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored

    def _place_experts(self, model: Any) -> set[str]:
        """Finds the experts modules of blocks with packed weights; returns the names of all their weights."""
        found = Model.of(self.view)
        layers = decoder_layers(model.get_decoder(), str(self.checkpoint.path))
        paths = {id(m): n for n, m in model.named_modules()}
        claimed = {name for block in found.moe for name in expert_names(block)}
        for block in found.main:
            if not any(name in self.packed for name in expert_names(block)):
                continue
            modules = experts_modules(layers[int(block.key)])
            if len(modules) != 1:
                raise CoterieError(
                    f"{self.checkpoint.path}: {block.name}: {type(model).__name__} {CLOSED}; "
                    "restore the dense checkpoint first: `coterie unpack`"
                )
            module = modules[0]
            for weight in WEIGHTS:
                if getattr(module, weight, None) is not None:
                    setattr(module, weight, None)
            module.__dict__["_is_hf_initialized"] = True  # or the library would fill what is not there
            stacks = _stacks(block)
            self.placed.append(Placed(paths[id(module)], module, stacks or [], None if stacks else block))
        return claimed

    def _place_linears(self, model: Any, names: list[str]) -> None:
        """Puts packed linear layers where the other packed weights belong. Raises: CoterieError for other modules."""
        state = model.state_dict()
        for name, (target, _) in targets(model, names).items():
            path, _, leaf = target.rpartition(".")
            module = model.get_submodule(path) if target in state else None
            if leaf != "weight" or type(module) is not torch.nn.Linear:
                raise CoterieError(
                    f"{self.checkpoint.path}: packed tensor {name!r} is not the weight of a linear layer of "
                    f"{type(model).__name__}; unpack the checkpoint first"
                )
            sparse = SparseLinear(module.in_features, module.out_features, module.bias)
            model.set_submodule(path, sparse)
            self.placed.append(Placed(path, sparse, [[name]]))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Reads, checks and places every packed matrix."""
        arena = Arena()
        for place in self.placed:
            stacks = (
                self._canonical(place.block, arena) if place.block else [self._read(s, arena) for s in place.stacks]
            )
            _check_shapes(place, stacks)
            if isinstance(place.module, SparseLinear):
                place.module.coterie = stacks[0]
            else:
                place.module.coterie = SparseExperts(tuple(stacks[:-1]), stacks[-1])
        model.requires_grad_(False)

    def _read(self, names: list[str], arena: Arena) -> Stack:
        """The matrices of one role: packed ones as they are, dense ones packed in passing."""

        def one(name: str) -> Any:
            if name in self.packed:
                found = self.packed[name]
                assert found.packed
                return map(found.packed, range(found.num_matrices))
            tensor = self.checkpoint.tensors[name]
            rows, columns = tensor.shape[-2:]
            size, count = tensor.num_bytes // math.prod(tensor.shape[:-2]), math.prod(tensor.shape[:-2])
            raws = (self.checkpoint.raw(name, e * size, size) for e in range(count))
            return (encode(raw, tensor.dtype, (rows, columns)) for raw in raws)

        return load((packed for name in names for packed in one(name)), arena)

    def _canonical(self, block: MoE, arena: Arena) -> list[Stack]:
        """gate, up and down of layouts that hold them transposed or interleaved, packed anew."""
        dtype = next(self.packed[name].dtype for name in expert_names(block) if name in self.packed)

        def one(m: np.ndarray) -> Packed:
            return encode(encode_values(m, dtype, block.name), dtype, (m.shape[0], m.shape[1]))

        rows: list[list[Packed]] = []
        for e in range(block.num_experts):
            rows.append([one(m) for m in expert_matrices(self.view, block, e) if m is not None])
        return [load(column, arena) for column in zip(*rows, strict=True)]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Everything dense as it is, and the packed tensors under the names that they had on disk."""
        state = model.state_dict()
        for place in self.placed:
            if place.block or any(isinstance(m, IntegerMatrix) for stack in _held(place) for m in stack.matrices):
                why = "its layout in memory is not the one on disk" if place.block else "holds integers"
                raise CoterieError(
                    f"{place.name}: {why}, so that it cannot be saved; copy {self.checkpoint.path} instead"
                )
            stacks = _held(place)
            for names, stack in zip(place.stacks, stacks, strict=True):
                share = len(stack.matrices) // len(names)
                for i, name in enumerate(names):
                    state |= stored(name, stack.matrices[i * share : (i + 1) * share], self._num_axes(name))
        return state, {}

    def _num_axes(self, name: str) -> int:
        return len(self.packed[name].shape if name in self.packed else self.checkpoint.tensors[name].shape)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _held(place: Placed) -> list[Stack]:
    """What fills it."""
    held = place.module.coterie
    return [held] if isinstance(held, Stack) else [*held.first, held.down]


def _stacks(block: MoE) -> list[list[str]] | None:
    """Tensor names of each stack; None where disk and memory disagree about what a matrix is."""
    layout = block.layout
    if layout.lists:
        return None
    if block.experts:
        keys = [next((k for k in (f"{r}.weight", r) if k in block.experts[0]), None) for r in layout.parts]
        return [[expert[str(key)] for expert in block.experts] for key in keys]
    plain = not layout.transposed and not layout.interleaved and len(layout.fused) == 2
    return [[block.prefix + name] for name in layout.fused] if plain else None


def _check_shapes(place: Placed, stacks: list[Stack]) -> None:
    """Raises: CoterieError where the matrices do not fit the model that config.json describes."""
    if isinstance(place.module, SparseLinear):
        fits = stacks[0].shape == (place.module.out_features, place.module.in_features) and len(stacks[0].matrices) == 1
    else:
        first, down = stacks[:-1], stacks[-1]
        hidden = sum(s.shape[0] for s in first) // (2 if place.module.has_gate else 1)
        fits = all(s.shape[1] == down.shape[0] for s in first) and hidden == down.shape[1]
        fits = fits and {len(s.matrices) for s in stacks} == {place.module.num_experts}
    if not fits:
        shapes = ", ".join(f"{len(s.matrices)} of {s.shape}" for s in stacks)
        raise CoterieError(f"{place.name}: packed matrices {shapes} do not fit the module that config.json describes")


def stored(name: str, matrices: Sequence[Matrix | IntegerMatrix], num_axes: int) -> dict[str, torch.Tensor]:
    """The tensors that `codecs/bits.py` has for one name, or the dense tensor where packing would not shrink it."""
    packed = [m.packed() for m in matrices if isinstance(m, Matrix)]
    shape = (*((len(packed),) if num_axes == 3 else ()), *packed[0].shape)
    dtype = packed[0].dtype
    if packed[0].scales is None and not shrinks(dtype, shape, sum(len(p.values) for p in packed)):
        return {name: torch.stack([m.rows(0, m.shape[0], TORCH[dtype]) for m in matrices]).view(shape)}
    tensors = {name + part: torch.from_numpy(array) for part, array in joined(packed, num_axes).items()}
    tensors[f"{name}.values"] = tensors[f"{name}.values"].view(TORCH[dtype])
    return tensors


def register() -> None:
    """Makes transformers know our format, which config.json names without a `quant_method`; a second call changes
    nothing."""
    if METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    register_quantization_config(METHOD)(CoterieConfig)
    register_quantizer(METHOD)(CoterieQuantizer)
    supports, from_dict = AutoHfQuantizer.supports_quant_method, AutoQuantizationConfig.from_dict

    def known(settings: dict[str, Any]) -> bool:
        return is_named(settings) or supports(settings)

    def read(_: type, settings: dict[str, Any]) -> QuantizationConfigMixin:
        return CoterieConfig(**settings) if is_named(settings) else from_dict(settings)

    AutoHfQuantizer.supports_quant_method = staticmethod(known)  # type: ignore[method-assign]
    AutoQuantizationConfig.from_dict = classmethod(read)  # type: ignore[method-assign, assignment]


register()
