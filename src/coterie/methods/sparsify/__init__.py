"""Which weights inside an expert become zero. A rule is a file here with `score(weight, norms) -> scores`, one per
weight: the lowest of each output row go (`select.py`). It is called with a few rows at a time, so the scores of a row
depend on that row alone. The command's `--method moe-pruner` is the file `moe_pruner.py`.

A rule says in `NEEDS` what it wants to know of an expert's tokens: "nothing", "norms" (||X_j|| of each input channel),
"gated norms" (tokens multiplied by the router's weight), or "hessian" (sum x x^T); a rule of the last kind also
changes the weights that stay, and has `prune(weight, hessian, num_zeros)` instead of `score`.
"""

import importlib
import pkgutil
from types import ModuleType

from coterie.errors import CoterieError


def names() -> list[str]:
    """Every rule by its command-line name."""
    found = (module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if name != "select")


def load(name: str) -> ModuleType:
    """The rule's module. Raises: CoterieError for an unknown name."""
    if name not in names():
        raise CoterieError(f"--method {name!r}: unknown; expected one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
