"""Which experts of a layer become one, and how much of it each member is. A method is one file here.

It has `SUMS`, names in `stats.KNOWN`, and `cluster(num_clusters, *sums) -> clusters`, of the experts of one routing
group; neither sees a weight. `align.py` is no method: it lines up the neurons of experts before they are averaged.
The command's `--method hc-smoe` is the file `hc_smoe.py`.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from coterie.errors import CoterieError

METHODS = ("hc-smoe", "m-smoe")


def names() -> list[str]:
    """Every method by its command-line name."""
    return list(METHODS)


def load(name: str) -> ModuleType:
    """The method's module. Raises: CoterieError for an unknown name."""
    if name not in METHODS:
        raise CoterieError(f"--method {name!r}: unknown; expected one of {', '.join(METHODS)}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def leader(cluster: Sequence[int], tokens: np.ndarray) -> int:
    """The member that stands for its cluster: the one most used; ties go to the lower id."""
    return min(cluster, key=lambda e: (-tokens[e], e))


def shares(cluster: Sequence[int], tokens: np.ndarray) -> tuple[float, ...]:
    """f_i / sum of f over the cluster, f the tokens routed to each expert; equal shares where no token came."""
    used = tokens[list(cluster)].astype(np.float64)
    found = used / used.sum() if used.any() else np.full(len(used), 1 / len(used))
    return tuple(found.tolist())
