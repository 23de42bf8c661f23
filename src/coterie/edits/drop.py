"""Decoder layers that go, whole: the ones behind them move up, and the config counts fewer."""

from __future__ import annotations

from typing import Any

from coterie.edits.dense import num_layers
from coterie.edits.plan import Plan
from coterie.errors import CoterieError
from coterie.model.family import NUM_LAYERS, lookup
from coterie.model.layer import LAYER, Model, stack_of
from coterie.model.own import renumber
from coterie.storage.shards import Output, whole

INDICES = ("mlp_only_layers",)  # lists of layer numbers
LEADING = ("first_k_dense_replace", "num_dense_layers")  # how many of the first layers are of a kind
PERIODS = (
    "decoder_sparse_step", "moe_layer_freq", "expert_layer_period", "attn_layer_period", "interleave_moe_layer_step",
    "moe_layer_interval", "sliding_window_pattern", "full_attention_interval",
)  # fmt: skip


def check_dropped(model: Model, plan: Plan) -> None:
    """Raises: CoterieError for layers that do not exist, or whose going a config that counts in periods cannot say."""
    if not plan.dropped:
        return
    total, config = num_layers(model), model.checkpoint.config
    if plan.dropped[-1] >= total:
        raise CoterieError(f"plan: drops layer {plan.dropped[-1]}, but the model's {total} end at {total - 1}")
    if plan.layers or plan.attention or plan.condensed or plan.drop_mtp:
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


def dropped_outputs(model: Model, plan: Plan) -> dict[str, tuple[Output, ...]]:
    """Source tensor -> nothing, or the same bytes under the number that its layer has then."""
    if not plan.dropped:
        return {}
    stack = model.main[0].stack
    result: dict[str, tuple[Output, ...]] = {}
    for name, tensor in model.checkpoint.tensors.items():
        match = LAYER.fullmatch(name)
        if not match or stack_of(match["prefix"]) != stack:
            continue
        index = int(match["index"])
        renamed = f"{stack}.{index - sum(d < index for d in plan.dropped)}.{match['rest']}"
        result[name] = () if index in plan.dropped else (whole(tensor, renamed),)
    return result


def patch_dropped(config: dict[str, Any], model: Model, plan: Plan) -> None:
    """Counts fewer layers in `config` (in place), and cuts every list that has an entry per layer."""
    if not plan.dropped:
        return
    total = num_layers(model)
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
