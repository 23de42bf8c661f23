"""transformers' own model without its weights, filled and emptied in parts by the library's own conversion.

What the streaming forward (`stream.py`) moves through memory. Parameters stand on the meta device until they are
filled; buffers are real from the beginning, because some (rotary frequencies) are computed and never stored.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from coterie.errors import CoterieError
from coterie.model import moe
from coterie.model.loading import NO_DATA, empty_stock, guarded, quiet_transformers
from coterie.model.opened import open_experts
from coterie.storage.checkpoint import FLOATS, Checkpoint
from coterie.storage.tensors import Maps, read, trim

MAPPED = 2**26  # bytes: a table of embeddings larger than this is mapped, since few of its rows are touched


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """transformers' model with its parameters on the meta device, and our experts implementation.

    Raises: CoterieError when transformers does not build it.
    """
    advice = f", so it cannot be calibrated; {NO_DATA}"
    model = empty_stock(checkpoint, dtype, advice=advice)
    open_experts(model)
    with guarded(checkpoint.path, "does not take our experts", advice):
        model.set_experts_implementation(moe.IMPLEMENTATION)
    return model.eval()


class Target(NamedTuple):
    """Where a stored tensor goes in the model, and whether the library converts it (splits, fuses, transposes)."""

    name: str
    converted: bool


def targets(model: Any, names: list[str]) -> dict[str, Target]:
    """Name of each stored tensor -> its place in the model, by the library's renaming."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping: Any = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:  # as the library's loader: it should not have been renamed
            target, pattern = rename_source_key(name, [], [], prefix, state)
        found[name] = Target(target, pattern is not None)
    return found


def modules_outside(model: Any, layers: torch.nn.ModuleList, parts: list[Any]) -> dict[str, torch.nn.Module]:
    """What the given parts of the model (the decoder, the head) hold beside the layers, by name."""
    inside = {id(m) for m in layers.modules()}
    needed = {id(m) for part in parts if part is not None for m in part.modules()}
    return {name: module for name, module in model.named_modules() if id(module) in needed - inside}


def own_tensors(modules: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The modules' own parameters and stored buffers, by name."""
    found = {}
    for prefix, module in modules.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if "." not in name:
                found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def fill(model: Any, checkpoint: Checkpoint, names: list[str], dtype: torch.dtype, maps: Maps | None = None) -> None:
    """Reads the named tensors into the model's parameters; given maps, large ones are mapped.

    Raises: CoterieError for a tensor that does not fit, or is quantised.
    """
    with _young():
        _convert(model, checkpoint, names, dtype, maps)


def _convert(model: Any, checkpoint: Checkpoint, names: list[str], dtype: torch.dtype, maps: Maps | None) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    mapping: Any = get_model_conversion_mapping(model)  # conversions keep state: a fresh one each time
    plan = model._get_dtype_plan(dtype)  # what the library keeps in float32 whatever is asked
    how = LoadStateDictConfig(weight_mapping=mapping, dtype=dtype, dtype_plan=plan, device_map={"": "cpu"})
    tensors = {name: _tensor(checkpoint, name, maps) for name in names}
    with quiet_transformers():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, how, None)
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


def _tensor(checkpoint: Checkpoint, name: str, maps: Maps | None) -> torch.Tensor:
    """A stored tensor as torch has it.

    Raises: CoterieError for small floats: quantised weights outside the experts need scales that we do not apply.
    """
    stored = checkpoint.tensors[name]
    if stored.dtype not in FLOATS and stored.dtype.startswith(("F", "U", "I8")):
        raise CoterieError(f"tensor {name!r} is {stored.dtype}, quantised outside the experts; dequantise it first")
    return maps.stored(checkpoint, name) if maps and stored.num_bytes >= MAPPED else read(checkpoint, name)
