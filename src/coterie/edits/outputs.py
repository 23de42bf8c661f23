"""What a plan makes of every tensor, as runs of the original's bytes, and of config.json: kind by kind.

Kept experts are never decoded; only means of experts, tables, constants and condensed layers are computed, when they
are written.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from coterie.edits.naming import Renumbering
from coterie.edits.plan import Left, Outputs, Plan, kinds
from coterie.errors import CoterieError
from coterie.model.experts import expert_weights
from coterie.model.layer import Model, MoE, find_blocks
from coterie.storage.planned import resolved, view
from coterie.storage.shards import Hole, Output, whole


def check_plan(model: Model, plan: Plan) -> None:
    """Everything that would fail at load, or load and compute something else. Raises: CoterieError."""
    known = {(block.key, block.attention) for block in model.moe}
    for key, attention in (place for place in plan.choices if place not in known):
        experts = "attention experts" if attention else "experts"
        raise CoterieError(f"plan: layer {key!r} has no {experts} in {model.checkpoint.path}")
    for kind in reversed(kinds()):
        kind.check(model, plan)


def sealed(model: Model, plan: Plan) -> Plan:
    """The plan with everything that is filled in when it is executed. Raises: CoterieError where it cannot be."""
    for kind in kinds():
        plan = kind.seal(model, plan)
    return plan


def experts_left(model: Model, plan: Plan) -> dict[MoE, Left]:
    """The blocks that still have experts once the plan is executed, and how many, in the model's order."""
    left = {block: Left(block.num_experts, block.num_experts) for block in model.moe}
    for kind in kinds():
        kind.leave(plan, left)
    return left


def plan_outputs(model: Model, plan: Plan) -> dict[str, list[Output]]:
    """What every output shard holds, tensor by tensor, in the source's order. A shard left empty is left out."""
    checkpoint, made = model.checkpoint, Outputs()
    for kind in kinds():
        made |= kind.outputs(model, plan, made)
    shards: dict[str, list[Output]] = {shard: [] for shard in checkpoint.shards}
    for name, tensor in checkpoint.tensors.items():
        shards[tensor.file] += made.get(name, (whole(tensor),))
    return resolved(checkpoint, {shard: outputs for shard, outputs in shards.items() if outputs})


def patched_config(model: Model, plan: Plan) -> dict[str, Any]:
    """config.json with what the plan changes, and everything else as it was.

    Raises: CoterieError for settings of modules by number that cannot be renumbered.
    """
    config = copy.deepcopy(model.checkpoint.config)
    for kind in kinds():
        kind.patch(config, model, plan)
    renamed: dict[str, Any] = Renumbering(model, plan).json(config, "config.json", settings=False)
    return renamed


def planned(model: Model, plan: Plan, outputs: dict[str, list[Output]] | None = None) -> Model:
    """The model that the plan makes, to read from as if it had been written."""
    outputs = plan_outputs(model, plan) if outputs is None else outputs
    return find_blocks(view(model.checkpoint, outputs, patched_config(model, plan)), model.family)


def with_holes(outputs: dict[str, list[Output]], view: Model) -> dict[str, list[Output]]:
    """The outputs with the main layers' expert matrices left open, to be filled by `Writer.put`."""
    weights = set(prunable(view))
    return {
        shard: [replace(o, parts=(Hole(o.num_bytes),)) if o.name in weights else o for o in group]
        for shard, group in outputs.items()
    }


def prunable(model: Model) -> list[str]:
    """The tensors that hold the expert matrices of the ordinary layers."""
    return [name for block in model.main for name in expert_weights(model.checkpoint, block)]
