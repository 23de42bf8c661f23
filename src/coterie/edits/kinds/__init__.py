"""The kinds of entry that a plan may hold: one file each, found by its name. To add one, write one file with

    KIND = Kind(layer=Keys(("scale",), read), check=check, outputs=outputs, patch=patch, unlike=unlike)

`Kind` (in `edits/plan.py`) says what each part does; all may be left out. An entry that `Plan` has no attribute for is
in `plan.entries[key]`: under a key of the whole plan, or of a layer ({layer: entry}). `read` raises `CoterieError` for
what is no entry; numbers, texts, tuples and dataclasses of these are written without more ado.
"""

import importlib
import pkgutil
from types import ModuleType


def modules() -> list[ModuleType]:
    """The files of this folder, by name."""
    return [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
