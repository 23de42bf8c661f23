"""One expert's matrices as numbers, for whoever wants to look: whatever the layout and the coding on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coterie.errors import CoterieError
from coterie.model.experts import expert_matrices
from coterie.model.layer import Model


def read_expert(model: str | Path, layer: int | str, expert: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """(gate, up, down) of an expert, (F, D), (F, D) and (D, F) float32, as its codec decodes them; an expert of 0 bits
    is zeros. gate is None in families whose experts have none.

    layer: as `inspect` and plans call it: its number, or a key such as "vision.3". expert: its number there.
    Raises: CoterieError for a layer or an expert that is not there, and for weights that no codec of ours reads.
    """
    source = Model.open(model)
    block = next((block for block in source.moe if block.key == str(layer)), None)
    if block is None:
        known = ", ".join(block.key for block in source.moe)
        raise CoterieError(f"{model}: layer {layer!r:.40} has no routed experts; expected one of {known:.200}")
    if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < block.num_experts:
        raise CoterieError(f"{model}: expert {expert!r:.40}; expected 0 to {block.num_experts - 1}")
    gate, up, down = (
        None if matrix is None else np.ascontiguousarray(matrix, np.float32)
        for matrix in expert_matrices(source.checkpoint, block, expert)
    )
    assert up is not None and down is not None
    return gate, up, down
