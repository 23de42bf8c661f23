"""Coterie: a few good experts. Makes mixture-of-experts language models small and cheap to run.

Every command of the program is a function here, with the same options. Names load on first use, so that
`import coterie` and `coterie --help` cost nothing; but once transformers is imported, it reads our sparse format.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from coterie.sparse.hook import install

_HOMES = {
    "Checkpoint": "coterie.checkpoint",
    "CoterieError": "coterie.errors",
    "Family": "coterie.family",
    "Plan": "coterie.plan",
    "Report": "coterie.report",
    "analyze": "coterie.analyze",
    "apply": "coterie.apply",
    "bench": "coterie.bench",
    "collect": "coterie.collect",
    "compare": "coterie.compare",
    "condense": "coterie.condense",
    "drop": "coterie.drop",
    "eval": "coterie.evaluate",
    "generate": "coterie.generate",
    "inspect": "coterie.inspect",
    "load": "coterie.loading",
    "merge": "coterie.merge",
    "pack": "coterie.pack",
    "prune": "coterie.prune",
    "recover": "coterie.recover",
    "report": "coterie.summary",
    "sparsify": "coterie.sparsify",
    "status": "coterie.status",
    "stun": "coterie.stun",
    "unpack": "coterie.pack",
    "verify": "coterie.verify",
}
__all__ = [*sorted(_HOMES), "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'coterie' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), "evaluate" if name == "eval" else name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Importing the module `coterie.apply` would bind it to the name of the function `coterie.apply`: not here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return __all__


install()
