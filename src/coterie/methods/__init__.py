"""Compression methods: pure functions on arrays and statistics, one small file each, named by their file.

A folder holds the methods of one command and nothing else: a file put there is found, and its name, with `-` for `_`,
is what the command line calls it. What several methods share stands beside the folders.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType

from coterie.errors import check_choice


@dataclass(frozen=True)
class Folder:
    """The methods in one folder (`package`), which the command's option `flag` chooses from."""

    package: str
    flag: str = "--method"

    def names(self, *needs: str) -> list[str]:
        """Every method by its command-line name, or those whose NEEDS is one of the given things."""
        folder = importlib.import_module(self.package).__path__
        found = sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(folder))
        return [name for name in found if not needs or self.load(name).NEEDS in needs]

    def load(self, name: str) -> ModuleType:
        """The method's module. Raises: CoterieError for an unknown name."""
        check_choice(self.flag, name, self.names())
        return importlib.import_module(f"{self.package}.{name.replace('-', '_')}")
