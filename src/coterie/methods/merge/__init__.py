"""Which experts of a layer become one, and how much of it each member is. A method is one file here.

It has `SUMS`, names in `stats.KNOWN`, and `cluster(num_clusters, *sums) -> clusters`, of the experts of one routing
group; neither sees a weight.
"""

from collections.abc import Sequence

import numpy as np

from coterie.methods import Folder

_folder = Folder(__name__)
names, load = _folder.names, _folder.load


def leader(cluster: Sequence[int], tokens: np.ndarray) -> int:
    """The member that stands for its cluster: the one most used; ties go to the lower id."""
    return min(cluster, key=lambda e: (-tokens[e], e))


def shares(cluster: Sequence[int], tokens: np.ndarray) -> tuple[float, ...]:
    """f_i / sum of f over the cluster, f the tokens routed to each expert; equal shares where no token came."""
    used = tokens[list(cluster)].astype(np.float64)
    found = used / used.sum() if used.any() else np.full(len(used), 1 / len(used))
    return tuple(found.tolist())
