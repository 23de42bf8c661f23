"""Decoder layers that go, whole.

    plan: {"dropped": [3, 5], "drop_mtp": true}

The layers behind `dropped` ones move up, and the config counts fewer; `drop_mtp` takes all prediction layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from coterie.edits.outputs import patched_config
from coterie.edits.plan import Keys, Kind, Left, Numbers, Outcome, Outputs, Plan, are_ids
from coterie.errors import CoterieError
from coterie.model.family import LAYER_LISTS, NUM_LAYERS, lookup, num_layers
from coterie.model.layer import LAYER, Model, MoE, mtp_names, stack_of
from coterie.model.own import moved, renumber
from coterie.storage.shards import whole

INSTEAD = "drop the experts instead (--unit layer)"
NUMBER = re.compile("[0-9]{1,6}")
NOT_OF_LAYERS = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id")  # lists of whatever length


def read(where: str, content: Any) -> dict[str, object]:
    """Ascending layer numbers, and whether all prediction layers go."""
    dropped, drop_mtp = content.get("dropped", []), content.get("drop_mtp", False)
    if not isinstance(drop_mtp, bool):
        raise CoterieError(f"{where}: budget must be an object and drop_mtp a boolean")
    if not are_ids(dropped) or list(dropped) != sorted(set(dropped)):
        raise CoterieError(f"{where}: dropped must be ascending layer numbers and converted a model type")
    return {"drop_mtp": drop_mtp, "dropped": tuple(dropped)}


def check(model: Model, plan: Plan) -> None:
    """Raises: CoterieError for layers that do not exist, or whose going the config cannot say.

    Where transformers has a class, the layers that it builds before and after are compared, without their weights.
    """
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
    for key, _, value in lookup(config, model.family.layers.periods):
        if type(value) is int and value != 1 and not _spelled_out(config):
            raise CoterieError(
                f"config.json: {key} is {value}, so a layer's kind follows from its number, and dropping one would "
                f"change those behind it; {INSTEAD}"
            )
    _check_kinds(model, plan)


def _spelled_out(config: dict[str, Any]) -> bool:
    """Whether the config lists each layer's kind, so that periods are not read."""
    return any(isinstance(value, list) and value for _, _, value in lookup(config, ("layer_types", "mlp_layer_types")))


def _check_kinds(model: Model, plan: Plan) -> None:
    """Raises: CoterieError where a layer that moves up would become another one under its new number."""
    checkpoint, config = model.checkpoint, patched_config(model, plan)
    if not model.family.stock:
        return
    from coterie.model.anatomy import anatomies

    before, after = (anatomies(replace(checkpoint, config=said)) for said in (checkpoint.config, config))
    left = [i for i in range(len(before)) if i not in plan.dropped]
    if len(left) != len(after):
        raise CoterieError(
            f"{checkpoint.path}: {len(left)} layers would be left, but transformers would build {len(after)}, because "
            f"its config says how many otherwise than under a key that we know; {INSTEAD}"
        )
    moved_up = next((i for i, found in zip(left, after, strict=True) if before[i] != found), None)
    if moved_up is not None:
        raise CoterieError(
            f"{checkpoint.path}: layer {moved_up} would become another one under a lower number, because its config or "
            f"its class tells layers by their numbers; {INSTEAD}"
        )


def agree(blocks: tuple[MoE, ...], plan: Plan) -> None:
    left = [block.name for block in blocks if block.predicts and plan.drop_mtp]
    if left:
        raise CoterieError(f"{left[0]} is a multi-token-prediction layer; the plan in coterie.json drops those")


def leave(plan: Plan, left: dict[MoE, Left]) -> None:
    stacks = {block.stack for block in left if not block.mtp}
    for block, experts in list(left.items()):
        if block.predicts and plan.drop_mtp:
            del left[block]
        elif block.stack in stacks and int(block.key.rpartition(".")[2]) in plan.dropped:
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
    """Counts fewer layers, and says of each that stays what was said of it.

    Raises: CoterieError for a list as long as the layers that the family's record does not know.
    """
    family, dropped, total = model.family, plan.dropped, num_layers(model.checkpoint.config) if plan.dropped else 0
    for key, holder, _ in list(lookup(config, family.mtp_count)) if plan.drop_mtp else ():
        holder[key] = 0
    if not dropped:
        return
    layers = family.layers
    counts = (*family.count, *family.top_k)
    entries = layers.entries if family.within else (*layers.entries, *counts)  # there, lists of them are of stacks
    _check_known(config, {*entries, *counts, *layers.numbers, *layers.ordinals, *layers.leading, *layers.last}, total)
    say: list[tuple[tuple[str, ...], Callable[[str, Any], Any]]] = [
        (NUM_LAYERS, lambda key, n: n - len(dropped) if type(n) is int else n),
        (entries, lambda key, value: _entries(key, value, dropped, total)),
        (layers.numbers, lambda key, value: _numbers(key, value, dropped, first=0)),
        (layers.ordinals, lambda key, value: _numbers(key, value, dropped, first=1)),
        (layers.leading, lambda key, value: _each(value, lambda n: n - sum(d < n for d in dropped))),
        (layers.last, lambda key, value: _each(value, lambda n: n - sum(d <= n for d in dropped))),
    ]
    for keys, after in say:
        for key, holder, value in list(lookup(config, keys)):
            holder[key.rpartition(".")[2]] = after(key, value)
    renumber(config, dropped)


def _each(value: Any, after: Callable[[int], int]) -> Any:
    """A number changed, or those of a list (of stacks, such as text's and images')."""
    if isinstance(value, list):
        return [_each(n, after) for n in value]
    return after(value) if type(value) is int else value


def _entries(key: str, value: Any, dropped: tuple[int, ...], total: int) -> Any:
    """A list, string or object without the entries of the layers that go; anything else as it is."""
    if isinstance(value, dict):
        if odd := next((number for number in value if not NUMBER.fullmatch(number)), None):
            raise CoterieError(f"config.json: {key} has a key {odd!r:.80}; expected layer numbers")
        return {moved(number, dropped): found for number, found in value.items() if number not in map(str, dropped)}
    if not isinstance(value, list | str) or not value:
        return value
    if len(value) < total:
        raise CoterieError(f"config.json: {key} has {len(value)} entries, for {total} layers; expected one for each")
    left = [entry for i, entry in enumerate(value) if i not in dropped]
    return left if isinstance(value, list) else "".join(left)


def _numbers(key: str, value: Any, dropped: tuple[int, ...], first: int) -> Any:
    """Layer numbers from `first` on, in a list or between commas, of the layers that stay."""
    if not value:
        return value
    found = value.split(",") if isinstance(value, str) else value
    if not isinstance(found, list) or not all(NUMBER.fullmatch(str(i).strip()) and int(i) >= first for i in found):
        raise CoterieError(f"config.json: {key} is {value!r:.80}; expected layer numbers from {first} on")
    left = [str(int(i) - first) for i in found if int(i) - first not in dropped]
    new = [int(moved(i, dropped)) + first for i in left]
    return ",".join(map(str, new)) if isinstance(value, str) else new


def _check_known(config: dict[str, Any], known: set[str], total: int) -> None:
    """Raises: CoterieError for a list as long as the layers, or a pattern, under a key that nobody knows."""
    holders = [("", holder) for _, holder, value in lookup(config, (*NUM_LAYERS, *LAYER_LISTS)) if value is not None]
    holders += [(f"{key}.", value) for _, h in holders for key, value in h.items() if isinstance(value, dict)]
    for prefix, holder in holders:
        for key, value in holder.items() if not prefix.startswith(("quant", "compress")) else ():
            listed = isinstance(value, list) or (isinstance(value, str) and "pattern" in key)
            if not listed or len(value) != total or prefix + key in known or key.startswith((*NOT_OF_LAYERS, "mtp")):
                continue
            raise CoterieError(
                f"config.json: {prefix}{key} has {total} entries, as many as there are layers, and our record of the "
                f"family does not say whether they speak of them; {INSTEAD}"
            )


def numbers(model: Model, plan: Plan, old: Numbers) -> Numbers | None:
    if not plan.dropped and not plan.drop_mtp:
        return old
    gone = {str(index) for index in plan.dropped} | {b.key for b in model.moe if b.predicts and plan.drop_mtp}
    return None if old.layer in gone else replace(old, layer=moved(old.layer or "", plan.dropped))


def trace(plan: Plan, before: Outcome) -> Outcome:
    gone = int(before.key) in plan.dropped
    found = replace(before, levels={}, routed=()) if gone else before
    return replace(found, moved=moved(before.key, plan.dropped))


KIND = Kind(
    order=2, plan=Keys(("drop_mtp", "dropped"), read), check=check, leave=leave, outputs=outputs, patch=patch,
    renumber=numbers, trace=trace, agree=agree,
)  # fmt: skip
