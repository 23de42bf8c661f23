"""Which experts of a layer stay. A criterion is a file here with `score(layer, generator) -> (E,)`: the highest stay.

STUN (`stun.py`) clusters instead of scoring. The command's `--method router-norm` is the file `router_norm.py`.
"""

import importlib
import pkgutil
from types import ModuleType

from coterie.errors import CoterieError


def names() -> list[str]:
    """Every method by its command-line name."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The method's module. Raises: CoterieError for an unknown name."""
    if name not in names():
        raise CoterieError(f"--method {name!r}: unknown; expected one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
