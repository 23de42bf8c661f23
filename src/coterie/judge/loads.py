"""Whether OUT loads in stock transformers, or in our own classes where only those read it. A check of `verify`."""

from __future__ import annotations

import copy
import re
from typing import Any

from coterie.codecs.bits import CLOSED
from coterie.codecs.open import coded
from coterie.errors import CoterieError
from coterie.judge.files import Answer, first
from coterie.model.family import detect
from coterie.model.loadable import settings_of
from coterie.model.own import OwnLayout, is_own, own_layout
from coterie.storage.checkpoint import Checkpoint

NUMBER = re.compile(r"\d+")
ALIGNMENT = 64  # bytes, of what torch allocates


def check_loads(out: Checkpoint, original: Checkpoint | None = None) -> Answer:
    """Stock transformers fills its model from OUT exactly: nothing missing, unexpected or of another shape.

    What transformers cannot read here, or no better from the original, is no fault: the answer begins with "not".
    """
    short, own = float32_short(out), is_own(out.config)
    if reason := _unread(out, own, short):
        return True, f"not loaded: {reason}", None
    model, fault, signs = _attempt(out, "meta" if short else "cpu")
    if fault and CLOSED in fault and coded(out):  # what is in the files is fine
        return True, f"not loaded: {fault}", None
    if fault:
        excuse = "" if own else _excuse(out, original, signs)
        return bool(excuse), f"not loaded: {excuse} ({fault})" if excuse else fault, None
    if own:
        return True, f"not loaded: {_only_ours(own_layout(out.config))}, which only `coterie.load` reads", model
    fits = f"{type(model).__name__}: no key missing, unexpected or of another shape"
    return True, fits + (f"; values were not read ({short})" if short else ""), None if short else model


def _unread(out: Checkpoint, own: bool, short: str) -> str:
    """Why nothing is loaded at all; empty if something can be."""
    if own:
        return f"{_only_ours(own_layout(out.config))}, which only `coterie.load` reads; it {short}" if short else ""
    family = detect(out.config, list(out.tensors))
    if not family.stock:
        return (
            f"transformers has no causal language model for {family.name}; names, shapes and bytes were checked, but "
            "not that the model computes"
        )
    return short if coded(out) and short else unreadable(out)


def _only_ours(own: OwnLayout) -> str:
    """What keeps a model in our own layout from being a stock one."""
    if own.routes:
        return "routers keep rows that lead to no expert of their own"
    return (
        "condensed layers in a family without dense ones" if own.dense else "layers keep different numbers of experts"
    )


def unreadable(checkpoint: Checkpoint) -> str:
    """Why transformers cannot read the checkpoint's quantisation on this machine, and what to install; empty if it can.

    A config that it does not understand is not judged here: loading says what is wrong.
    """
    settings = settings_of(checkpoint)
    if settings is None:
        return ""
    from transformers import __version__
    from transformers.quantizers.auto import AutoHfQuantizer

    from coterie.model.loading import quiet_transformers

    try:
        with quiet_transformers():
            if not AutoHfQuantizer.supports_quant_method(settings):
                return f"transformers {__version__} does not read quant_method {settings.get('quant_method')!r:.60}"
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(dict(settings)), pre_quantized=True)
            quantizer.validate_environment(device_map="cpu", weights_only=True)
    except (ImportError, NotImplementedError, RuntimeError) as error:  # a package or a device that is not here
        return f"{str(error).strip().partition(chr(10))[0]:.400}"
    except Exception:
        return ""
    return ""


def _attempt(checkpoint: Checkpoint, device: str) -> tuple[Any, str, set[str]]:
    """The model, what is wrong with it ("" if nothing), and the same in signs that other experts of it would share."""
    try:
        model, faults = load_plain(checkpoint, device)
    except CoterieError as error:
        return None, str(error), {type(error.__cause__).__name__}
    said = "; ".join(f"{kind.replace('_', ' ')}: {first(keys)}" for kind, keys in faults.items())
    return model, said, {f"{kind}: {NUMBER.sub('N', key)}" for kind, keys in faults.items() for key in keys}


def _excuse(out: Checkpoint, original: Checkpoint | None, signs: set[str]) -> str:
    """Why what is wrong is no fault of OUT: the original has it too, or could have; empty if it is one."""
    if original is not None:
        found = _attempt(original, "meta" if float32_short(original) else "cpu")[2]
        return "the original does no better" if signs <= found else ""
    return unjudged(out) if not any(": " in sign for sign in signs) else ""


def unjudged(out: Checkpoint) -> str:
    """What is said of a quantised checkpoint that transformers stumbles over, where there is no original to try."""
    return "whether the original fares better is known with --against" if settings_of(out) is not None else ""


def float32_short(checkpoint: Checkpoint) -> str:
    """What is missing to load the model in float32; empty if nothing is, or if the system does not say."""
    from coterie.model.loading import memory_short

    return memory_short(4 * checkpoint.num_parameters)


def float64_short(checkpoint: Checkpoint) -> str:
    """The same of float64."""
    from coterie.model.loading import memory_short

    return memory_short(8 * checkpoint.num_parameters)


def load_plain(checkpoint: Checkpoint, device: str = "cpu", dtype: str = "float32") -> tuple[Any, dict[str, list[str]]]:
    """The model in one dtype, and what did not fit by kind; on the device "meta" a stock one has no values.

    The experts computation is the same for stock models and for our own layout.
    """
    from coterie.model.loading import load_ours, load_stock

    if is_own(checkpoint.config):
        model, faults = load_ours(checkpoint.path, dtype)
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")
    else:
        model, faults = load_stock(checkpoint.path, dtype, device_map=device, experts_implementation="eager")
    _align(model)
    return model, faults


def _align(model: Any) -> None:
    """Moves weights that lie unaligned in a mapped file: kernels add in another order there, which shows in the
    last bits of the logits."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
