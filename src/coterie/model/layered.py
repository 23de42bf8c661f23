"""Whether a checkpoint's layers can be computed one at a time: what headers and config say.

Asked by what streams (`forward/skeleton.py`) before it starts, and by `inspect`, which promises no more.
"""

from __future__ import annotations

from coterie.errors import CoterieError
from coterie.model.experts import expert_shapes
from coterie.model.family import unable
from coterie.model.layer import Model
from coterie.model.loading import NO_DATA
from coterie.model.own import is_own
from coterie.model.stored import check_readable


def check_layers(model: Model) -> None:
    """Raises: CoterieError where layers cannot be computed one at a time, so that nothing is measured on data."""
    path, family = model.checkpoint.path, model.family
    if is_own(model.checkpoint.config):
        raise CoterieError(f"{path}: in our own layout, which only `coterie.load` reads; {NO_DATA}")
    if not family.stock:
        raise CoterieError(f"{path}: transformers has no causal language model for {family.name}; {NO_DATA}")
    if kind := unable(model.checkpoint.config, "stream"):
        raise CoterieError(
            f"{path}: the layers of {kind!r} pass each other more than hidden states, which the streaming forward "
            f"cannot follow; {NO_DATA}"
        )
    check_readable(model)
    for block in model.main:
        shapes = expert_shapes(model.checkpoint, block)
        if shapes["down"] != shapes["up"][::-1] or shapes.get("gate", shapes["up"]) != shapes["up"]:
            found = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
            raise CoterieError(f"{path}: {block.name}: experts of {found}; expected up as gate, and down the other way")


def check_single(model: Model) -> None:
    """Raises: CoterieError where single experts' outputs do not tell what a set of them gives."""
    check_layers(model)
    if kind := unable(model.checkpoint.config, "single"):
        raise CoterieError(
            f"{model.checkpoint.path}: the routers of {kind!r} scale what experts see, so that single outputs do not "
            "tell what a set of experts would give; criteria of statistics, such as reap, do without"
        )
