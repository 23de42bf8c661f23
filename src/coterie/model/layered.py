"""Whether a checkpoint's layers can be computed one at a time: what headers and config say.

Asked by what streams (`forward/skeleton.py`) before it starts, and by `inspect`, which promises no more.
"""

from __future__ import annotations

from coterie.errors import CoterieError
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
        raise CoterieError(f"{path}: transformers has no class for {family.name}; {NO_DATA}")
    if not family.layered:
        kind = model.checkpoint.config.get("model_type")
        raise CoterieError(
            f"{path}: the layers of {kind!r} pass each other more than hidden states, which the streaming forward "
            f"cannot follow; {NO_DATA}"
        )
    check_readable(model)
