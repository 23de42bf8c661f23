"""Merge experts that give alike on average: agglomerate their mean outputs, whatever tokens the router would send.

    o_e = mean of f_e(x) over all calibration tokens x, chosen or not
    d(A, B) = mean over a in A, b in B of ||o_a - o_b||_2, the nearest two clusters join until as many are left

and a cluster becomes sum_i f_i W_i / sum_i f_i, f_i the tokens routed to expert i.

Source: HC-SMoE, ICML 2025: hierarchical clustering, expert outputs, average linkage, frequency weights.
Deviates: clusters stay inside routing groups, equally many in each; the router is merged too unless it is aliased.
The published scripts spell their clustering so that k-means runs; this is the clustering of the paper.
"""

import numpy as np

from coterie.methods.prune.stun import Clusters, dendrogram, pairwise

SUMS = ("num_tokens", "all_outputs")


def cluster(num_clusters: int, num_tokens: np.ndarray, all_outputs: np.ndarray) -> Clusters:
    """Clusters of E experts, from the number of all tokens () and each expert's sum of outputs over them (E, D)."""
    means = all_outputs / max(float(num_tokens), 1.0)
    return dendrogram(pairwise(means), "average").cut(num_clusters)
