"""Merge experts that the router likes alike: the most used stay dominant, each other one joins the most similar.

    s(i, j) = sum_x z_i(x) z_j(x) / (||z_i|| ||z_j||),  z_e(x) the router's logit of expert e, x all calibration tokens

and a cluster becomes sum_i f_i W_i / sum_i f_i, f_i the tokens routed to expert i.

Source: Li et al., MC-SMoE, ICLR 2024: dominant experts by usage, router-logit similarity, frequency weights.
Deviates: every layer (and every routing group) has equally many dominant experts, the most used of its own. The
published program ranks the usage of all layers together, which leaves counts that no stock config can say. The low rank
compression that follows there is another step.
"""

import numpy as np

from coterie.methods.prune.stun import Clusters

SUMS = ("tokens", "logit_products")


def cluster(num_clusters: int, tokens: np.ndarray, logit_products: np.ndarray) -> Clusters:
    """Clusters of E experts, from tokens routed to each (E,) and sums of z_i z_j over all tokens (E, E).

    Of equal usage the lower id is dominant, and of equally similar dominant experts the one with the lower id is
    joined; an expert without logits is like none, by 0.
    """
    dominant = sorted(np.argsort(-tokens, kind="stable")[:num_clusters].tolist())
    near = cosines(logit_products)[:, dominant].argmax(axis=1)
    members = {leader: [leader] for leader in dominant}
    for e in range(len(tokens)):
        if e not in members:
            members[dominant[near[e]]].append(e)
    return sorted(sorted(found) for found in members.values())


def cosines(products: np.ndarray) -> np.ndarray:
    """Cosines (E, E) of columns from their inner products (E, E); 0 beside a column of zeros."""
    norms = np.sqrt(np.maximum(np.diag(products), 0.0))
    scale = np.outer(norms, norms)
    return np.divide(products, scale, out=np.zeros_like(products, dtype=np.float64), where=scale > 0)
