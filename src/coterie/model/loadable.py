"""Whether transformers loads a checkpoint on this machine: what its config and the packages that are here say.

Asked by what loads one (`loading.py`) before it starts, and by `inspect`, which imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from coterie.codecs.open import opened_packed
from coterie.errors import CoterieError
from coterie.model.experts import quantisation
from coterie.model.family import lookup, registry
from coterie.model.own import is_own
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.planned import root

# quant_method -> the packages without which transformers does not load it on a CPU; it loads no others.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "coterie": (),
    "compressed-tensors": ("compressed_tensors",),
    "fp8": (),
    "gptq": ("optimum", "gptqmodel"),
    "hqq": ("hqq",),
    "mxfp4": (),
    "quanto": ("optimum.quanto",),
    "quark": ("quark",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}


def settings_of(checkpoint: Checkpoint) -> Mapping[str, object] | None:
    """How config.json, as it stands in the folder, says that weights are stored; None where it says nothing."""
    found = quantisation(root(checkpoint))
    return found if isinstance(found, dict) and found else None


def stays_packed(checkpoint: Checkpoint) -> bool:
    """Whether `coterie.load` multiplies the weights as they are stored, so that transformers need not read them."""
    stored = root(checkpoint)
    return not is_own(stored.config) and opened_packed(stored) is not None


def check_whole(checkpoint: Checkpoint) -> None:
    """Raises: CoterieError where transformers has no class for the family, or cannot read its weights here, which it
    need not if they stay packed."""
    path, types = checkpoint.path, [value for _, _, value in lookup(checkpoint.config, ("model_type",))]
    known = [registry()[found] for found in types if isinstance(found, str) and found in registry()]
    if known and not known[0].stock:
        raise CoterieError(f"{path}: transformers has no causal language model for {known[0].name}")
    settings = settings_of(checkpoint)
    method = settings.get("quant_method") if settings else None
    if not isinstance(method, str) or stays_packed(checkpoint):
        return
    if method not in PACKAGES:
        raise CoterieError(f"{path}: transformers does not read quant_method {method!r:.60}; dequantise it first")
    missing = [package for package in PACKAGES[method] if not is_installed(package)]
    if missing:
        names = " ".join(package.replace("_", "-") for package in missing)
        raise CoterieError(f"{path}: stored as {method}, which transformers reads with {names}; pip install {names}")


def is_installed(package: str) -> bool:
    """Whether a package is here, without importing it."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the one that it is in
        return False
