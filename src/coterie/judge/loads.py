"""Whether OUT loads in stock transformers, or in our own classes where only those read it. A check of `verify`."""

from __future__ import annotations

from typing import Any

from coterie.codecs.bits import CLOSED
from coterie.codecs.open import coded
from coterie.errors import CoterieError
from coterie.judge.files import Answer, first
from coterie.model.family import detect
from coterie.model.own import is_own, own_layout
from coterie.storage.checkpoint import Checkpoint

ALIGNMENT = 64  # bytes, of what torch allocates


def check_loads(out: Checkpoint) -> Answer:
    """Stock transformers fills its model from OUT exactly: nothing missing, unexpected or of another shape."""
    short = float32_short(out)
    if is_own(out.config):
        own = own_layout(out.config)
        model, faults = (None, {}) if short else load_float32(out)
        if faults:
            raise CoterieError(f"the weights do not fit the config: {first(next(iter(faults.values())))}")
        kind = "condensed layers in a family without dense ones"
        if not own.dense:
            kind = "layers keep different numbers of experts"
        if own.routes:
            kind = "routers keep rows that lead to no expert of their own"
        return True, f"not loaded: {kind}, which only `coterie.load` reads", model
    family = detect(out.config, list(out.tensors))
    if not family.stock:
        return True, (
            f"not loaded: transformers has no class for {family.name}; names, shapes and bytes were "
            "checked, but not that the model computes"
        ), None  # fmt: skip
    if coded(out) and short:
        return True, f"not loaded: {short}", None
    try:
        model, faults = load_float32(out, device="meta" if short else "cpu")
    except CoterieError as error:
        if coded(out) and CLOSED in str(error):  # what is in the files is fine
            return True, f"not loaded: {error}", None
        raise
    if faults:
        return False, "; ".join(f"{kind.replace('_', ' ')}: {first(keys)}" for kind, keys in faults.items()), None
    fits = f"{type(model).__name__}: no key missing, unexpected or of another shape"
    return True, fits + (f"; values were not read ({short})" if short else ""), None if short else model


def float32_short(checkpoint: Checkpoint) -> str:
    """What is missing to load the model in float32; empty if nothing is, or if the system does not say."""
    from coterie.model.loading import memory_short

    return memory_short(4 * checkpoint.num_parameters)


def load_float32(checkpoint: Checkpoint, device: str = "cpu") -> tuple[Any, dict[str, list[str]]]:
    """The model in float32, and what did not fit by kind; of a stock one on the device "meta", names and shapes alone.

    The experts computation is the same for stock models and for our own layout.
    """
    from coterie.model.loading import load_ours, load_stock

    if is_own(checkpoint.config):
        model, faults = load_ours(checkpoint.path, "float32")
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")
    else:
        model, faults = load_stock(checkpoint.path, "float32", device_map=device, experts_implementation="eager")
    _align(model)
    return model, faults


def _align(model: Any) -> None:
    """Moves weights that lie unaligned in a mapped file: kernels add in another order there, which shows in the
    last bits of the logits."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
