"""Which experts of a layer stay. A criterion is one file here; `NEEDS` says what it decides from.

| NEEDS | what the file has |
|---|---|
| `router`, `weights` | `score(layer, generator) -> (E,)`, from router rows alone or from all weights too |
| `stats` | `SUMS`, names in `stats.SUMS`, and `score(*sums) -> (E,)` |
| `base` | `score(layer, base) -> (E,)`, the same layer in an earlier checkpoint |
| `outputs` | `check(...)` and `choose(error, groups, per_group) -> kept`, from what sets of experts give together |

The highest scores stay. STUN (`methods/prune/stun.py`) clusters instead of scoring. The command's `--method
router-norm` is the file `router_norm.py`.
"""

import importlib
import pkgutil
from types import ModuleType

from coterie.errors import CoterieError


def names(*needs: str) -> list[str]:
    """Every method by its command-line name, or those that need one of the given things."""
    found = sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))
    return [name for name in found if not needs or load(name).NEEDS in needs]


def load(name: str) -> ModuleType:
    """The method's module. Raises: CoterieError for an unknown name."""
    if name not in names():
        raise CoterieError(f"--method {name!r}: unknown; expected one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
