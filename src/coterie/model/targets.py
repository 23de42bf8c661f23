"""Where stored tensors go in a model of transformers: names in memory differ from those on disk by family."""

from __future__ import annotations

from typing import Any, NamedTuple


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
