"""What a checkpoint with condensed or dropped layers must compute, from the original and the plan alone.

Used by `verify`: the original streams, its condensed blocks replaced by the sum of their parts, each computed on its
own, and its dropped layers skipped. Nothing here is folded. Importing this module imports torch.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from coterie.decide.always_on import Blocks
from coterie.edits.outputs import planned
from coterie.edits.plan import Plan
from coterie.forward.stream import advance
from coterie.model.layer import Model


def explicit_logits(source: Model, plan: Plan, sequences: list[list[int]], dtype: str) -> list[torch.Tensor]:
    """Logits of each sequence, (T, vocabulary) float32, computed in a dtype.

    source: the original as the type that OUT has.

    Raises: CoterieError for a model that cannot be streamed.
    """
    if plan.layers or plan.attention:
        pruned = replace(plan, condensed={}, dropped=(), converted=None, budget={"layout": "coterie"})
        source = planned(source, pruned)
    blocks = Blocks(source, getattr(torch, dtype))
    batches = blocks.stream.embed(sequences)
    for index in range(blocks.num_layers):
        if index in plan.dropped:
            continue
        with blocks.stream.loaded(index) as go:
            condensed = plan.condensed.get(str(index))
            if condensed is None:
                blocks.run(go, index, batches, None)
            else:
                with blocks.replaced(index, blocks.explicit(index, condensed)):
                    go(batches, blocks.walk, advance)
    rows = {i: row for b in batches for i, row in zip(b.samples, blocks.stream.logits(b).float(), strict=True)}
    return [rows[i] for i in range(len(sequences))]
