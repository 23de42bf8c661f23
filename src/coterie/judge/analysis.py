"""What `coterie analyze` measures of each MoE layer, put together: outputs and routing, then weights and routers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from coterie.judge import alignment
from coterie.judge.advice import redundancy
from coterie.judge.numbers import Found, at, listed, number
from coterie.judge.probe import probe
from coterie.judge.similarity import compare_router, compare_weights
from coterie.model.experts import Experts, expert_shapes, read_layer
from coterie.model.layer import Model, MoE
from coterie.storage.record import Progress
from coterie.storage.resumable import Resumable


def measure(
    source: Model,
    by_domain: dict[str, list[tuple[int, ...]]],
    dtype: torch.dtype,
    seed: int,
    on_progress: Progress,
    spill: Path | None,
    run: Resumable | None = None,
) -> list[Found]:
    """The entries of all MoE layers, in order, as `analyze` describes them.

    spill: as in `Stream.embed`. run: where entries are kept, to go on from.
    """

    def finish(block: MoE, probed: Found) -> Found:
        return _entry(source, block, probed, seed)

    found = probe(source, by_domain, dtype, finish, seed=seed, run=run, on_progress=on_progress, spill=spill)
    return [entry for _, entry in found]


def _entry(source: Model, block: MoE, probed: Found, seed: int) -> Found:
    """What the forward showed of a layer, with what needs none: weights, router rows, neurons in their best order."""
    experts, shapes = Experts(source.checkpoint, block), expert_shapes(source.checkpoint, block)
    weights = compare_weights(experts)
    rows, r2 = compare_router(read_layer(source.checkpoint, block), weights.means)
    aligned = alignment.look(experts, (shapes["up"][0], len(shapes) * shapes["up"][1]), seed)
    cosines = {name: listed(values) for name, values in {**weights.cosines, "router": rows}.items()}
    cosines |= at(probed, "cosine")
    return {
        "layer": block.key,
        "num_experts": block.num_experts,
        "chosen": probed["chosen"],
        "cosine": cosines,
        "router": {"r2": {part: number(value) for part, value in r2.items()}},
        "alignment": aligned[0] if aligned else None,
        "energy": aligned[1] if aligned else None,
        "redundancy": redundancy(np.array(cosines["outputs"]), np.array(cosines["router"])),
        **{name: value for name, value in probed.items() if name not in ("chosen", "cosine")},
    }


def limits(source: Model, layers: Sequence[Found]) -> list[str]:
    """Notes: what was left out, and what was done on less than all."""
    notes = []
    if len(source.main) < len(source.moe):
        notes.append("multi-token-prediction layers, attention experts and second models are not analyzed")
    probed = max(at(entry, "probe tokens") for entry in layers)
    notes.append(f"outputs of all experts are compared on {probed:,} tokens per layer, spread evenly over all")
    aligned = [len(at(entry, "alignment experts") or ()) for entry in layers]
    if not all(aligned):
        notes.append("experts are too large, or alone, so their neurons were not aligned: no barycentre is measured")
    elif any(some < at(entry, "num_experts") for some, entry in zip(aligned, layers, strict=True)):
        notes.append(
            f"neurons are aligned between {min(aligned)} experts of a layer, not all: more would take too long"
        )
    if any(at(entry, "norms score_norm") is None for entry in layers):
        notes.append("some routers' logits could not be seen: what needs scores of experts not chosen is left out")
    return notes
