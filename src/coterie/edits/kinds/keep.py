"""Experts that stay. The others go, with their rows in the router and their places in tables.

    plan: {"layers": {"0": {"kept": [0, 2], "clusters": [[0, 1], [2, 3]]}}}

`clusters[i]` are those that `kept[i]` stands for; where it is left out, nothing stands for those that go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from coterie.edits.outputs import experts_left
from coterie.edits.plan import KEPT, Choice, Keys, Kind, Left, Numbers, Outcome, Outputs, Plan, are_ids
from coterie.errors import CoterieError
from coterie.model.experts import read_rows
from coterie.model.family import RoutingGroups, lookup
from coterie.model.layer import Model, MoE, expert_axis, is_columns, shared_by, stacked
from coterie.model.own import OWN, is_own, own_layout, own_section
from coterie.storage.checkpoint import Checkpoint, Tensor
from coterie.storage.shards import Output, Run, computed, whole


def read(at: str, value: Any) -> dict[str, object]:
    """Kept ids, ascending, and their clusters."""
    kept, clusters = value.get("kept"), value.get("clusters", [])
    if not are_ids(kept) or not kept or list(kept) != sorted(set(kept)):
        raise CoterieError(f"{at}: `kept` must be ascending, distinct expert ids, found {kept!r:.120}")
    if not isinstance(clusters, list) or not all(are_ids(c) for c in clusters):
        raise CoterieError(f"{at}: `clusters` must be lists of expert ids and `merged` a boolean")
    if clusters and (len(clusters) != len(kept) or any(k not in c for k, c in zip(kept, clusters, strict=True))):
        raise CoterieError(f"{at}: `clusters` must name, for each kept expert, the cluster it belongs to")
    members = [e for c in clusters for e in c]
    if len(set(members)) != len(members):
        raise CoterieError(f"{at}: an expert stands in two clusters")
    return {"kept": tuple(kept), "clusters": tuple(tuple(c) for c in clusters)}


# --- checks ------------------------------------------------------------------------------------------------------


def check(model: Model, plan: Plan) -> None:
    """Raises: CoterieError for experts that are not there, and for counts that routing or the config cannot take."""
    config, family = model.checkpoint.config, model.family
    groups = family.groups(config)
    blocks = experts_left(model, plan)
    for block, left in blocks.items():
        if choice := plan.choice(block):  # of all rows, the router chooses as before, whatever is stored
            _check_choice(block, choice, groups.num_groups if left.rows < block.num_experts else 1)
    for block, left in blocks.items():
        top_k = family.num_experts_per_token(config, None if block.mtp else int(block.key))
        check_count(left.rows, top_k, groups, f"plan: {block.name}")
    counts = {left.rows for left in blocks.values()}
    own = plan.budget.get("layout") == "coterie" or is_own(config)
    if len(counts) > 1 and not own and not family.lists(config, family.count):
        raise CoterieError(
            f"plan: layers keep different numbers of experts ({min(counts)} to {max(counts)}), "
            'which no stock config can say; make them equal, or set "layout": "coterie" in the plan\'s budget '
            "(--non-uniform coterie)"
        )
    if own and family.within:
        raise CoterieError(
            f"plan: each layer has two stacks of experts (the other is {family.side}N), which our own layout cannot "
            "say; keep equally many everywhere"
        )


def _check_choice(block: MoE, choice: Choice, num_groups: int) -> None:
    named = {*choice.kept, *(e for c in choice.clusters for e in c)}
    if max(named) >= block.num_experts:
        raise CoterieError(f"plan: {block.name} names expert {max(named)}, but its ids end at {block.num_experts - 1}")
    size = block.num_experts // num_groups
    per_group = [sum(e // size == g for e in choice.kept) for g in range(num_groups)]
    if len(set(per_group)) > 1:
        raise CoterieError(
            f"plan: {block.name} keeps {per_group} experts in its {num_groups} routing groups; expected equal numbers, "
            "or the router would compute something else"
        )


def check_count(num_kept: int, top_k: int, groups: RoutingGroups, where: str) -> None:
    """Whether a layer can run with this many experts. Raises: CoterieError naming the nearest counts that work."""
    if num_kept < top_k:
        raise CoterieError(f"{where}: keeps {num_kept} experts, but {top_k} are chosen per token; keep at least those")
    if not fits_groups(num_kept, top_k, groups):
        near = sorted(range(1, 4 * num_kept + 8), key=lambda n: abs(n - num_kept))
        works = sorted([n for n in near if n >= top_k and fits_groups(n, top_k, groups)][:2])
        raise CoterieError(
            f"{where}: {num_kept} experts break routing in {groups.num_groups} groups (equal numbers, at least "
            f"{groups.min_per_group} per group, {top_k} within {groups.top_groups} groups); nearest that work: "
            f"{' and '.join(map(str, works))}"
        )


def fits_groups(num_kept: int, top_k: int, groups: RoutingGroups) -> bool:
    """Whether so many experts make equal routing groups that hold enough for the router to choose from."""
    per_group, rest = divmod(num_kept, groups.num_groups)
    return rest == 0 and per_group >= groups.min_per_group and groups.top_groups * per_group >= min(top_k, num_kept)


def agree(blocks: tuple[MoE, ...], plan: Plan) -> None:
    found = {(block.key, block.attention): block.num_experts for block in blocks}
    for (key, attention), choice in plan.choices.items():
        count = found.get((key, attention))
        if count != len(choice.kept):
            where = f"layer {key}" + (" (attention)" if attention else "")
            shown = "no experts" if count is None else f"{count} experts"
            raise CoterieError(f"{where} has {shown}; the plan in coterie.json keeps {len(choice.kept)}")


# --- bytes and config --------------------------------------------------------------------------------------------


def leave(plan: Plan, left: dict[MoE, Left]) -> None:
    for block in left:
        if choice := plan.choice(block):
            left[block] = Left(len(choice.kept), len(choice.kept))


def outputs(model: Model, plan: Plan, made: Outputs) -> Outputs:
    result: Outputs = {}
    for block, choice in plan.chosen(model):
        if len(choice.kept) < block.num_experts:
            result |= _of_experts(model.checkpoint, block, choice.kept)
            for name in (block.router, *block.rows):
                result[name] = (_of_rows(model.checkpoint, block, choice.kept, name, result.get(name, ())),)
            result |= {name: (_table(model.checkpoint, block, choice, name),) for name in block.tables}
    return result


def _of_experts(checkpoint: Checkpoint, block: MoE, kept: tuple[int, ...]) -> Outputs:
    """The kept experts under their new numbers, and what all experts share cut to theirs."""
    tensors, index = checkpoint.tensors, {e: i for i, e in enumerate(kept)}
    first = block.layout.segment[0] * len(kept)  # all stacks keep equally many
    result: Outputs = {}
    for e, names in enumerate(block.experts):
        for key, name in names.items():
            renamed = block.prefix + block.layout.expert(first + index.get(e, 0), key)
            result[name] = (whole(tensors[name], renamed),) if e in index else ()
    for e, names in enumerate(block.unused):
        for key, name in names.items():
            result[name] = (whole(tensors[name], block.prefix + block.layout.expert(len(kept) + e, key)),)
    for name in stacked(checkpoint, block):
        result[name] = (_cut(tensors[name], kept, block.num_experts, 0),)
    return result


def _of_rows(checkpoint: Checkpoint, block: MoE, kept: tuple[int, ...], name: str, above: tuple[Output, ...]) -> Output:
    """The router, or one of `rows`, cut to the kept experts. above: what stacks before this one left, if they share."""
    tensor, rows = checkpoint.tensors[name], (*kept, *block.zero_rows)
    if is_columns(block, name):
        shape = (tensor.shape[0], len(rows))
        return computed(name, tensor.dtype, shape, lambda: _columns(checkpoint, tensor, rows))
    if (stacks := shared_by(block, name)) > 1:
        which, size = block.layout.segment[0], tensor.num_bytes // stacks
        start = tensor.start + which * size
        cut = _cut(replace(tensor, shape=tensor.shape[1:], start=start, end=start + size), rows, block.num_experts, 0)
        return replace(cut, shape=(which + 1, len(rows)), parts=(*(p for o in above for p in o.parts), *cut.parts))
    axis = expert_axis(block, name, tensor.shape)
    assert axis is not None
    return _cut(tensor, rows, block.zero_rows.stop, axis)


def _columns(checkpoint: Checkpoint, tensor: Tensor, columns: tuple[int, ...]) -> bytes:
    """Some columns of a matrix, as stored."""
    raw = checkpoint.raw(tensor.name)
    values = np.frombuffer(raw, f"V{len(raw) // tensor.num_parameters}").reshape(tensor.shape)
    return values[:, list(columns)].tobytes()


def _cut(tensor: Tensor, kept: tuple[int, ...], num_experts: int, axis: int) -> Output:
    """A tensor that holds all experts along one axis, cut to the kept ones: a whole byte range of each, since every
    axis before it has length 1 (of fused tensors, the first axis is E blocks of rows)."""
    rows = tensor.shape[axis] // num_experts
    size, rest = divmod(tensor.num_bytes, num_experts)
    if rest:
        raise CoterieError(
            f"tensor {tensor.name!r}: {tensor.num_bytes} bytes do not divide among {num_experts} experts"
        )
    parts = tuple(Run(tensor.file, tensor.start + e * size, tensor.start + (e + 1) * size) for e in kept)
    return Output(tensor.name, tensor.dtype, (*tensor.shape[:axis], len(kept) * rows, *tensor.shape[axis + 1 :]), parts)


def _table(checkpoint: Checkpoint, block: MoE, choice: Choice, name: str) -> Output:
    tensor = checkpoint.tensors[name]
    if tensor.dtype not in ("I64", "I32", "I16", "I8", "U8"):
        raise CoterieError(f"tensor {name!r}: a table of expert ids as {tensor.dtype}; expected integers")
    return computed(name, tensor.dtype, tensor.shape, lambda: renumbered(checkpoint, block, choice, name).tobytes())


def renumbered(checkpoint: Checkpoint, block: MoE, choice: Choice, name: str) -> np.ndarray:
    """A table of token -> expert ids, with a dropped id replaced by its cluster's representative, or (where the plan
    has no clusters) by the kept expert with the nearest router row."""
    ids = checkpoint.read(name)
    if ids.size and (ids.min() < 0 or ids.max() >= block.num_experts):
        raise CoterieError(f"tensor {name!r}: names expert {ids.max()}, but {block.num_experts} exist")
    index = choice.stand_ins(block.num_experts)
    router = read_rows(checkpoint, block, block.router).astype(np.float64)
    for e in set(range(block.num_experts)) - set(index):
        index[e] = int(np.linalg.norm(router[list(choice.kept)] - router[e], axis=1).argmin())
    return np.array([index[e] for e in range(block.num_experts)], dtype=ids.dtype)[ids]


def patch(config: dict[str, Any], model: Model, plan: Plan) -> None:
    """The new expert count under the keys the source used; counts that differ, in our own layout."""
    rows = {block.key: left.rows for block, left in experts_left(model, plan).items() if not block.attention}
    for key, holder, value in list(lookup(config, model.family.count)):
        if value is not None and rows:
            holder[key.rpartition(".")[2]] = _counted(value, rows, model.family.per_layer)
    own, differ = own_layout(config), len(set(rows.values())) > 1 and not model.family.lists(config, model.family.count)
    if differ or own.dense or own.routes:
        own_section(config, num_experts=rows)
    elif own.model_type:  # a stock config can say it again
        config["model_type"] = own.model_type
        del config[OWN]


def _counted(value: object, rows: Mapping[str, int], per_layer: bool) -> object:
    """One count; or a list as long as before, of each layer's where these may differ."""
    if not isinstance(value, list):
        return max(rows.values())
    return [rows.get(str(i), n) if per_layer else max(rows.values()) for i, n in enumerate(value)]


def numbers(model: Model, plan: Plan, old: Numbers) -> Numbers | None:
    keys = {old.layer, f"{model.family.side}{old.layer}" if model.family.within else None}  # of one list of experts
    choices = [(b, choice) for b, choice in plan.chosen(model) if b.key in keys and not b.attention]
    if not choices or old.expert is None:
        return old
    for block, choice in choices:
        if (expert := old.expert - block.first) in choice.kept:
            return replace(old, expert=block.layout.segment[0] * len(choice.kept) + choice.kept.index(expert))
    return None


def trace(plan: Plan, before: Outcome) -> Outcome:
    choice = plan.layers.get(before.key)
    return replace(before, levels=dict.fromkeys(choice.kept, KEPT), routed=choice.kept) if choice else before


KIND = Kind(
    order=0, block=Keys(("kept", "clusters"), read), check=check, leave=leave, outputs=outputs, patch=patch,
    renumber=numbers, trace=trace, agree=agree,
)  # fmt: skip
