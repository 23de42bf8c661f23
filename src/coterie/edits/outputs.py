"""What a plan makes of every tensor, as runs of the original's bytes, and of config.json.

Kept experts are never decoded; only means of experts, tables and constants are computed, when they are written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from coterie.edits.dense import dense_outputs, patch_dense
from coterie.edits.drop import dropped_outputs, patch_dropped
from coterie.edits.members import Members, mean
from coterie.edits.plan import Choice, Plan
from coterie.edits.routes import constants_output, is_routed, routed_blocks, say_routes
from coterie.errors import CoterieError
from coterie.model.experts import expert_weights
from coterie.model.family import lookup
from coterie.model.layer import Model, MoE, expert_axis, find_blocks, mtp_names
from coterie.model.own import OWN, own_layout, own_section
from coterie.storage.checkpoint import Checkpoint, Tensor
from coterie.storage.planned import resolved, view
from coterie.storage.shards import Hole, Made, Output, Run, whole


def plan_outputs(model: Model, plan: Plan) -> dict[str, list[Output]]:
    """What every output shard holds, tensor by tensor, in the source's order. A shard left empty is left out."""
    checkpoint, changed = model.checkpoint, dict[str, Output | None]()
    for block in model.moe:
        choice = plan.choice(block)
        if choice and len(choice.kept) < block.num_experts:
            changed |= block_outputs(checkpoint, block, choice)
    if plan.drop_mtp:
        changed |= dict.fromkeys(mtp_names(model))
    by_name: dict[str, tuple[Output, ...]] = {n: (output,) if output else () for n, output in changed.items()}
    by_name |= dense_outputs(model, plan) | dropped_outputs(model, plan)
    for block, choice in routed_blocks(model, plan):
        if choice.removed == "constant":
            router = whole(checkpoint.tensors[block.router])
            by_name[block.router] = (router, constants_output(checkpoint, block, choice, plan))
    shards: dict[str, list[Output]] = {shard: [] for shard in checkpoint.shards}
    for name, tensor in checkpoint.tensors.items():
        shards[tensor.file] += by_name.get(name, (whole(tensor),))
    return resolved(checkpoint, {shard: outputs for shard, outputs in shards.items() if outputs})


def block_outputs(checkpoint: Checkpoint, block: MoE, choice: Choice) -> dict[str, Output | None]:
    """Source name -> what becomes of it (None: dropped), for every tensor of the block that changes."""
    tensors = checkpoint.tensors
    result: dict[str, Output | None] = {}
    index = {e: i for i, e in enumerate(choice.kept)}
    members = Members(checkpoint, block, choice)
    for e, names in enumerate(block.experts):
        for key, name in names.items():
            if e not in index:
                result[name] = None
                continue
            renamed = f"{block.prefix}{block.layout.experts}{index[e]}.{key}"
            if _merged_cluster(choice, index[e]):
                part = _mean(tensors[name], partial(members.numbered, index[e], key), _shares(choice, index[e]))
                result[name] = Output(renamed, tensors[name].dtype, tensors[name].shape, (part,))
            else:
                result[name] = whole(tensors[name], renamed)
    routing = () if is_routed(choice, block) else (block.router, *block.rows)
    for name in (*block.fused, *routing):
        fused = members if name in block.fused else None
        result[name] = sliced(checkpoint, tensors[name], choice, block.num_experts, fused)
    for name in block.tables if routing else ():
        result[name] = _table(checkpoint, block, tensors[name], choice)
    return result


def _merged_cluster(choice: Choice, i: int) -> tuple[int, ...]:
    """The experts averaged into kept expert i; empty where it stays itself."""
    return choice.clusters[i] if choice.merged and len(choice.clusters[i]) > 1 else ()


def _shares(choice: Choice, i: int) -> tuple[float, ...]:
    return choice.shares[i] if choice.shares else ()


def _mean(
    tensor: Tensor, values: Callable[[], Iterable[Any]], shares: tuple[float, ...], num_bytes: int | None = None
) -> Made:
    """A mean accumulated in float64 and rounded once, computed when it is written."""

    def make() -> bytes:
        from coterie.storage.numerics import encode

        return encode(mean(values(), shares), tensor.dtype, tensor.name)

    return Made(tensor.num_bytes if num_bytes is None else num_bytes, make)


def sliced(
    checkpoint: Checkpoint, tensor: Tensor, choice: Choice, num_experts: int, fused: Members | None = None
) -> Output:
    """A tensor that holds all experts along one axis, cut to the kept ones: whole byte ranges, since every axis
    before it has length 1 (fused tensors, given the block's members: the first axis, E blocks of rows)."""
    axis = 0 if fused else expert_axis(tensor.shape, num_experts)
    assert axis is not None
    rows = tensor.shape[axis] // num_experts
    size, rest = divmod(tensor.num_bytes, num_experts)
    if rest:
        raise CoterieError(
            f"tensor {tensor.name!r}: {tensor.num_bytes} bytes do not divide among {num_experts} experts"
        )

    def values(e: int) -> Any:
        from coterie.storage.numerics import decode

        return decode(checkpoint.raw(tensor.name, e * size, size), tensor.dtype, tensor.name)

    parts: list[Run | Made] = []
    for i, e in enumerate(choice.kept):
        cluster = _merged_cluster(choice, i)
        if cluster:
            each = partial(fused.fused, i, tensor.name) if fused else partial(map, values, cluster)
            parts.append(_mean(tensor, each, _shares(choice, i), size))
        else:
            parts.append(Run(tensor.file, tensor.start + e * size, tensor.start + (e + 1) * size))
    shape = (*tensor.shape[:axis], len(choice.kept) * rows, *tensor.shape[axis + 1 :])
    return Output(tensor.name, tensor.dtype, shape, tuple(parts))


def _table(checkpoint: Checkpoint, block: MoE, tensor: Tensor, choice: Choice) -> Output:
    """Token -> expert ids, with a dropped id replaced by its cluster's representative, or (where the plan has no
    clusters) by the kept expert with the nearest router row."""
    if tensor.dtype not in ("I64", "I32", "I16", "I8", "U8"):
        raise CoterieError(f"tensor {tensor.name!r}: a table of expert ids as {tensor.dtype}; expected integers")

    def make() -> bytes:
        import numpy as np

        ids = checkpoint.read(tensor.name)
        if ids.size and (ids.min() < 0 or ids.max() >= block.num_experts):
            raise CoterieError(f"tensor {tensor.name!r}: names expert {ids.max()}, but {block.num_experts} exist")
        index = choice.stand_ins(block.num_experts)
        router = checkpoint.read(block.router).astype(np.float64)
        for e in set(range(block.num_experts)) - set(index):
            index[e] = int(np.linalg.norm(router[list(choice.kept)] - router[e], axis=1).argmin())
        table = np.array([index[e] for e in range(block.num_experts)], dtype=ids.dtype)
        return table[ids].tobytes()

    return Output(tensor.name, tensor.dtype, tensor.shape, (Made(tensor.num_bytes, make),))


def patched_config(model: Model, plan: Plan) -> dict[str, Any]:
    """config.json with the new expert count under the keys the source used, and everything else as it was."""
    config = copy.deepcopy(model.checkpoint.config)
    kept = {
        b.key: len(c.kept) if (c := plan.choice(b)) and not is_routed(c, b) else b.num_experts
        for b in model.moe
        if not b.attention
    }
    if plan.drop_mtp:
        mtp = {b.key for b in model.moe if b.mtp}
        kept = {key: n for key, n in kept.items() if key not in mtp}
        for key, holder, _ in list(lookup(config, model.family.mtp_count)):
            holder[key] = 0
    kept = {key: n for key, n in kept.items() if key not in plan.condensed}
    for key, holder, value in list(lookup(config, model.family.count)):
        if value is not None and kept:
            holder[key.rpartition(".")[2]] = max(kept.values())
    own = own_layout(config)
    if len(set(kept.values())) > 1 or own.dense or own.routes:
        own_section(config, num_experts=kept)
    elif own.model_type:  # a stock config can say it again
        config["model_type"] = own.model_type
        del config[OWN]
    say_routes(config, model, plan)
    patch_dense(config, model, plan, kept)
    patch_dropped(config, model, plan)
    return config


def planned(model: Model, plan: Plan, outputs: dict[str, list[Output]]) -> Model:
    """The model that the plan makes, to read from as if it had been written."""
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
