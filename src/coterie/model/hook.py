"""Registers the sparse format with transformers when transformers is imported, and not before.

`install()` is called by `import coterie`. If transformers' quantisers are loaded already, they are told at once; else a
finder that knows a single name, `transformers.quantizers.auto`, waits for them, tells them and takes itself out.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.quantizers.auto"


class _Finder(MetaPathFinder):
    """Finds one module as everybody else does, and has it followed by our registration."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The module's own loader, and then ours."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.own.exec_module(module)
        _register()


def _register() -> None:
    importlib.import_module("coterie.model.quantizer")


def install() -> None:
    """Imports neither torch nor transformers, unless transformers' quantisers are there already."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
