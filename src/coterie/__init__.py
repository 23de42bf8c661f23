"""Coterie: a few good experts. Makes mixture-of-experts language models small and cheap to run.

Every command of the program is a function here, with the same options. Names load on first use, so that
`import coterie` and `coterie --help` cost nothing; but once transformers is imported, it reads our sparse format.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from coterie.model.hook import install

VERBS = {  # name: file; one underscore at its end is not of the name
    file.stem.removesuffix("_"): file
    for file in sorted((Path(__file__).parent / "verbs").glob("*.py"))
    if file.stem != "__init__"
}
_HOMES = {
    "Checkpoint": "coterie.storage.checkpoint",
    "CoterieError": "coterie.errors",
    "Family": "coterie.model.family",
    "Plan": "coterie.edits.plan",
    "Report": "coterie.storage.record",
    "load": "coterie.model.loading",
    "read_expert": "coterie.model.read",
} | {name: f"coterie.verbs.{file.stem}" for name, file in VERBS.items()}
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
