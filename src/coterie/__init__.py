"""Coterie: a few good experts. Makes mixture-of-experts language models small and cheap to run.

Every command of the program is a function here, with the same options. Names load on first use, so that
`import coterie` and `coterie --help` cost nothing; but once transformers is imported, it reads our sparse format.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from coterie.model.hook import install

_HOMES = {
    "Checkpoint": "coterie.storage.checkpoint",
    "CoterieError": "coterie.errors",
    "Family": "coterie.model.family",
    "Plan": "coterie.edits.plan",
    "Report": "coterie.storage.record",
    "analyze": "coterie.verbs.analyze",
    "apply": "coterie.verbs.apply",
    "bench": "coterie.verbs.bench",
    "collect": "coterie.verbs.collect",
    "compare": "coterie.verbs.compare",
    "condense": "coterie.verbs.condense",
    "drop": "coterie.verbs.drop",
    "eval": "coterie.verbs.eval",
    "generate": "coterie.verbs.generate",
    "inspect": "coterie.verbs.inspect_",
    "load": "coterie.model.loading",
    "merge": "coterie.verbs.merge",
    "pack": "coterie.edits.pack",
    "prune": "coterie.verbs.prune",
    "recover": "coterie.verbs.recover",
    "report": "coterie.verbs.report",
    "sparsify": "coterie.verbs.sparsify",
    "status": "coterie.verbs.status",
    "stun": "coterie.verbs.stun",
    "unpack": "coterie.edits.pack",
    "verify": "coterie.verbs.verify",
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
