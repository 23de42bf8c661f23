"""Decoder layers that go, whole.

    plan: {"dropped": [3, 5], "drop_mtp": true}

The layers behind `dropped` ones move up, and the config counts fewer; `drop_mtp` takes all prediction layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coterie.edits.plan import Keys, Kind, Left, Numbers, Outcome, Outputs, Plan, are_ids
from coterie.errors import CoterieError
from coterie.model.family import NUM_LAYERS, lookup, num_layers
from coterie.model.layer import LAYER, Model, MoE, mtp_names, stack_of
from coterie.model.own import moved, renumber
from coterie.storage.shards import whole

INDICES = ("mlp_only_layers",)  # lists of layer numbers
LEADING = ("first_k_dense_replace", "num_dense_layers")  # how many of the first layers are of a kind
PERIODS = (
    "decoder_sparse_step", "moe_layer_freq", "expert_layer_period", "attn_layer_period", "interleave_moe_layer_step",
    "moe_layer_interval", "sliding_window_pattern", "full_attention_interval",
)  # fmt: skip


def read(where: str, content: Any) -> dict[str, object]:
    """Ascending layer numbers, and whether all prediction layers go."""
    dropped, drop_mtp = content.get("dropped", []), content.get("drop_mtp", False)
    if not isinstance(drop_mtp, bool):
        raise CoterieError(f"{where}: budget must be an object and drop_mtp a boolean")
    if not are_ids(dropped) or list(dropped) != sorted(set(dropped)):
        raise CoterieError(f"{where}: dropped must be ascending layer numbers and converted a model type")
    return {"drop_mtp": drop_mtp, "dropped": tuple(dropped)}


def check(model: Model, plan: Plan) -> None:
    """Raises: CoterieError for layers that do not exist, or whose going a config that counts in periods cannot say."""
    if not plan.dropped:
        return
    config = model.checkpoint.config
    total = num_layers(config)
    if plan.dropped[-1] >= total:
        raise CoterieError(f"plan: drops layer {plan.dropped[-1]}, but the model's {total} end at {total - 1}")
    if plan.layers or plan.attention or plan.condensed or plan.drop_mtp or any(plan.entries.values()):
        raise CoterieError("plan: `dropped` layers exclude other changes; apply one plan after the other")
    if {int(b.key) for b in model.main} <= set(plan.dropped):
        raise CoterieError("plan: drops every layer with experts; keep at least one")
    for key, _, value in lookup(config, PERIODS):
        if type(value) is int and value != 1 and not _spelled_out(config):
            raise CoterieError(
                f"config.json: {key} is {value}, so a layer's kind follows from its number, and dropping one would "
                "change those behind it; drop the experts instead (--unit layer)"
            )


def _spelled_out(config: dict[str, Any]) -> bool:
    """Whether the config lists each layer's kind, so that periods are not read."""
    return any(isinstance(value, list) and value for _, _, value in lookup(config, ("layer_types", "mlp_layer_types")))


def agree(blocks: tuple[MoE, ...], plan: Plan) -> None:
    left = [block.name for block in blocks if block.mtp and plan.drop_mtp]
    if left:
        raise CoterieError(f"{left[0]} is a multi-token-prediction layer; the plan in coterie.json drops those")


def leave(plan: Plan, left: dict[MoE, Left]) -> None:
    for block, experts in list(left.items()):
        if block.mtp and plan.drop_mtp:
            del left[block]
        elif not block.mtp and int(block.key) in plan.dropped:
            left[block] = replace(experts, stored=0)


def outputs(model: Model, plan: Plan, made: Outputs) -> Outputs:
    """Nothing, or the same bytes under the number that the layer has then."""
    result: Outputs = dict.fromkeys(mtp_names(model) if plan.drop_mtp else (), ())
    stack = model.main[0].stack
    for name, tensor in model.checkpoint.tensors.items() if plan.dropped else ():
        match = LAYER.fullmatch(name)
        if match and stack_of(match["prefix"]) == stack:
            gone = int(match["index"]) in plan.dropped
            renamed = f"{stack}.{moved(match['index'], plan.dropped)}.{match['rest']}"
            result[name] = () if gone else (whole(tensor, renamed),)
    return result


def patch(config: dict[str, Any], model: Model, plan: Plan) -> None:
    """Counts fewer layers, and cuts every list that has an entry per layer."""
    for key, holder, _ in list(lookup(config, model.family.mtp_count)) if plan.drop_mtp else ():
        holder[key] = 0
    if not plan.dropped:
        return
    total = num_layers(model.checkpoint.config)
    left = [i for i in range(total) if i not in plan.dropped]
    for key, holder, value in list(lookup(config, NUM_LAYERS)):
        if type(value) is int:
            holder[key] = len(left)
            _cut_lists(holder, left, total)
    for key, holder, value in list(lookup(config, INDICES)):
        holder[key] = [left.index(i) for i in value or [] if i in left]
    for key, holder, value in list(lookup(config, LEADING)):
        if type(value) is int:
            holder[key] = sum(i < value for i in left)
    renumber(config, plan.dropped)


def _cut_lists(holder: dict[str, Any], left: list[int], total: int) -> None:
    for key, value in holder.items():
        if key not in INDICES and "layer" in key and isinstance(value, list) and len(value) == total:
            holder[key] = [value[i] for i in left]


def numbers(model: Model, plan: Plan, old: Numbers) -> Numbers | None:
    gone = {str(index) for index in plan.dropped} | {b.key for b in model.moe if b.mtp and plan.drop_mtp}
    return None if old.layer in gone else replace(old, layer=moved(old.layer or "", plan.dropped))


def trace(plan: Plan, before: Outcome) -> Outcome:
    gone = int(before.key) in plan.dropped
    found = replace(before, levels={}, routed=()) if gone else before
    return replace(found, moved=moved(before.key, plan.dropped))


KIND = Kind(
    order=2, plan=Keys(("drop_mtp", "dropped"), read), check=check, leave=leave, outputs=outputs, patch=patch,
    renumber=numbers, trace=trace, agree=agree,
)  # fmt: skip
