"""Keep the experts whose router rows grew most in fine-tuning: those that learned what the task needs.

S_e = ||w_e||_2 - ||w0_e||_2, w0 the rows before fine-tuning; signed, so the smallest, perhaps negative, go.

Source: Chowdhury et al., arXiv 2405.16646, and its program: neither absolute nor the norm of the difference.
Deviates: the program keeps the columns of removed experts in the router, and their tokens get zero from them: here that
is `--removed null`, in our own layout; by default they go, and their tokens choose others.
"""

import numpy as np

from coterie.errors import CoterieError
from coterie.model.experts import Layer

NEEDS = "base"


def score(layer: Layer, base: Layer) -> np.ndarray:
    """||w_e|| - ||w0_e||, (E,). Raises: CoterieError for rows of other sizes, or whose norms are all as they were."""
    if layer.router.shape != base.router.shape:
        raise CoterieError(
            f"layer {layer.key}: its router has shape {layer.router.shape}, in --base {base.router.shape}; expected "
            "the checkpoint before fine-tuning"
        )
    change = layer.norms - base.norms
    if not change.any():
        raise CoterieError(
            f"layer {layer.key}: no router row's norm differs from --base: the router did not train (as with most "
            "adapters), so nothing can be told from it; use another method"
        )
    return change
