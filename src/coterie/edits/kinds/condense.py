"""Layers whose MoE block becomes one dense MLP: by the family's stock config where it can say so, else in our layout.

    plan: {"layers": {"3": {"condensed": {"experts": [7, 2], "gates": [0.3, 0.2], "shared_gate": 1.0}}}}

Stock configs hold one width for all dense layers, so those that exist already are padded too. In our own layout every
layer has its own width, and only `coterie.load` reads it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from coterie.edits.folding import DOWN, UP, check_condensed, folded, is_inside, natural_width, weights
from coterie.edits.outputs import experts_left
from coterie.edits.plan import CONDENSED, Condensed, Keys, Kind, Left, Outcome, Outputs, Plan, are_ids
from coterie.errors import CoterieError
from coterie.model.experts import hidden_size
from coterie.model.family import GATED, NUM_LAYERS, Dense, lookup, num_layers
from coterie.model.layer import Model, MoE, expert_names
from coterie.model.own import is_own, own_layout, own_section
from coterie.storage.checkpoint import Checkpoint, Tensor
from coterie.storage.numerics import encode
from coterie.storage.shards import Output, computed, whole

LARGEST = 1e300  # of a gate; Python's integers go beyond any float


def read(at: str, value: Any) -> dict[str, object]:
    """The experts that stay, always on, and their gates."""
    found = value["condensed"]
    if len(value) > 1 or not isinstance(found, dict) or set(found) - {"experts", "gates", "shared_gate"}:
        raise CoterieError(
            f"{at}: expected `condensed` alone, with the keys experts, gates and shared_gate, found {value!r:.120}"
        )
    experts, gates, shared = found.get("experts"), found.get("gates"), found.get("shared_gate", 1.0)
    if not isinstance(experts, list) or not are_ids(experts) or len(set(experts)) != len(experts):
        raise CoterieError(f"{at}: `experts` must be distinct expert ids, found {experts!r:.120}")
    numbers: list[Any] = [*gates, shared] if isinstance(gates, list) else []
    if len(numbers) != len(experts) + 1 or not all(type(n) in (int, float) and abs(n) < LARGEST for n in numbers):
        raise CoterieError(f"{at}: `gates` must give one number per expert and `shared_gate` one, found {found!r:.120}")
    return {"condensed": Condensed(tuple(experts), tuple(map(float, numbers[:-1])), float(shared))}


def dense_layers(model: Model, plan: Plan) -> list[int]:
    """The decoder layers without experts once the plan is executed, ascending."""
    sparse = {int(b.key) for b in model.main if b.key not in plan.condensed}
    return [i for i in range(num_layers(model.checkpoint.config)) if i not in sparse]


def is_stock(model: Model, plan: Plan) -> bool:
    """Whether the family's stock config can say which layers the plan leaves dense."""
    dense, layers = model.family.dense, dense_layers(model, plan)
    if dense is None or is_own(model.checkpoint.config):
        return False
    return dense.kind != "prefix" or layers == list(range(len(layers)))


def widths(model: Model, plan: Plan) -> dict[str, int]:
    """The width of each condensed layer's MLP by key: its own in our layout, else the largest of all dense ones."""
    checkpoint = model.checkpoint
    found = {b.key: natural_width(checkpoint, b, plan.condensed[b.key]) for b in model.main if b.key in plan.condensed}
    if found and is_stock(model, plan):
        existing = [checkpoint.tensors[names[UP]].shape[0] for names in dense_mlps(model)]
        found = dict.fromkeys(found, max([*found.values(), *existing]))
    return found


def dense_mlps(model: Model) -> list[tuple[str, str, str]]:
    """The (gate, up, down) tensors of the decoder layers that are dense already, as the stock config has them."""
    tensors, dense = model.checkpoint.tensors, model.family.dense
    assert dense
    root, found = model.main[0].stack, []
    places = {dense.mlp, model.main[0].layout.blocks[0]}  # some files say "block_sparse_moe." of dense layers as well
    for index in range(num_layers(model.checkpoint.config)):
        for place in places if all(b.key != str(index) for b in model.main) else ():
            gate, up, down = (f"{root}.{index}.{place}{part}.weight" for part in dense.names)
            if {gate, up, down} <= tensors.keys():
                found.append((gate, up, down))
    return found


def outputs(model: Model, plan: Plan, made: Outputs) -> Outputs:
    """Nothing, or the tensors of a condensed or padded MLP."""
    checkpoint, wanted = model.checkpoint, widths(model, plan)
    if not wanted:
        return {}
    stock = model.family.dense if is_stock(model, plan) else None
    result: Outputs = {}
    for names in dense_mlps(model) if stock else ():
        width = next(iter(wanted.values()))
        result |= {n: (_padded(checkpoint, checkpoint.tensors[n], i, width),) for i, n in enumerate(names)}
    for block in model.main:
        if block.key in wanted:
            result |= dict.fromkeys(_dissolved(block), ())
            condensed = plan.condensed[block.key]
            result[weights(block)[0]] = _mlp(checkpoint, block, condensed, wanted[block.key], stock)
    return result


def _dissolved(block: MoE) -> list[str]:
    """Every tensor that goes with the block."""
    shared = [name for name in block.shared if is_inside(block, name)]
    return [block.router, *block.rows, *block.tables, *expert_names(block), *shared]


def _mlp(
    checkpoint: Checkpoint, block: MoE, condensed: Condensed, width: int, stock: Dense | None
) -> tuple[Output, ...]:
    """The three tensors of the folded MLP, of the routed experts' dtype, computed when their turn comes."""
    place, names = (stock.mlp, stock.names) if stock else (block.layout.blocks[0], GATED)
    hidden, like = hidden_size(checkpoint, block), checkpoint.tensors[weights(block)[-1]]

    def make(which: int, name: str) -> bytes:
        return encode(folded(checkpoint, block, condensed, width, which), like.dtype, name)

    outputs = []
    for which, part in enumerate(names):
        name = f"{block.prefix}{place}{part}.weight"
        shape = (hidden, width) if which == DOWN else (width, hidden)
        outputs.append(computed(name, like.dtype, shape, partial(make, which, name)))
    return tuple(outputs)


def _padded(checkpoint: Checkpoint, tensor: Tensor, which: int, width: int) -> Output:
    """A dense layer's matrix with zero rows (gate, up) or columns (down) up to the width."""
    rows, columns = tensor.shape
    shape = (rows, width) if which == DOWN else (width, columns)
    if shape == tensor.shape:
        return whole(tensor)

    def make() -> bytes:
        values = np.zeros(shape, np.float32)
        values[:rows, :columns] = checkpoint.read(tensor.name)
        return encode(values, tensor.dtype, tensor.name)

    return computed(tensor.name, tensor.dtype, shape, make)


def leave(plan: Plan, left: dict[MoE, Left]) -> None:
    for block in list(left):
        if block.key in plan.condensed and not block.attention:
            del left[block]


def count(model: Model, plan: Plan, counts: dict[str, int]) -> None:
    """What stays, always on, is neither removed nor zero."""
    for block in model.main:
        if block.key in plan.condensed:
            routed = sum(model.checkpoint.tensors[n].num_parameters for n in expert_names(block))
            counts["experts"] += routed // block.num_experts * len(plan.condensed[block.key].experts)


def patch(config: dict[str, Any], model: Model, plan: Plan) -> None:
    """Which layers are dense now, and how wide."""
    wanted = widths(model, plan)
    if wanted and is_stock(model, plan):
        _say_dense(config, model, plan, next(iter(wanted.values())))
    elif wanted:
        rows = {block.key: left.rows for block, left in experts_left(model, plan).items() if not block.attention}
        own_section(config, num_experts=rows, dense=own_layout(config).dense | wanted)


def _say_dense(config: dict[str, Any], model: Model, plan: Plan, width: int) -> None:
    """In the family's own words."""
    dense, layers = model.family.dense, dense_layers(model, plan)
    assert dense
    holder = next(holder for _, holder, value in lookup(config, NUM_LAYERS) if type(value) is int)
    is_dense = [i in layers for i in range(num_layers(model.checkpoint.config))]
    leading = (*is_dense, False).index(False)
    holder[dense.width] = width
    if dense.kind == "ids":
        holder[dense.key] = layers
    elif dense.kind == "others":
        holder[dense.key] = [i for i, d in enumerate(is_dense) if not d]
    elif dense.kind == "prefix":
        holder[dense.key] = leading
    else:
        holder[dense.key] = ["dense" if d else "sparse" for d in is_dense]
        if "first_k_dense_replace" in holder:  # older spellings of the same, which some loaders read
            holder["first_k_dense_replace"] = leading
        if "moe_layers_enum" in holder:
            holder["moe_layers_enum"] = ",".join(str(i) for i, d in enumerate(is_dense) if not d)
        if isinstance(holder.get("moe_layer_freq"), list):
            holder["moe_layer_freq"] = [int(not d) for d in is_dense]


def check_writable(model: Model, plan: Plan) -> None:
    """Raises: CoterieError where neither a stock config nor our own layout can hold the condensed layers."""
    config = model.checkpoint.config
    inner = next((k for k, holder, v in lookup(config, NUM_LAYERS) if type(v) is int and holder is not config), None)
    if plan.condensed and inner and not is_stock(model, plan):
        raise CoterieError(
            f"{model.checkpoint.path}: a text model inside {config.get('model_type')!r}, whose config cannot say that "
            "these layers are dense; our own layout holds text models alone: condense that one"
        )


def check(model: Model, plan: Plan) -> None:
    """Raises: CoterieError for a condensed layer that has no experts, or a choice that does not fit it."""
    check_writable(model, plan)
    blocks = {b.key: b for b in model.main}
    for key, condensed in plan.condensed.items():
        if key not in blocks:
            raise CoterieError(
                f"plan: layer {key!r} has no experts to condense; those with experts: {', '.join(blocks)}"
            )
        if key in plan.layers:
            raise CoterieError(f"plan: layer {key!r} is condensed, so it cannot keep a choice of routed experts too")
        check_condensed(model.checkpoint, blocks[key], condensed)


def agree(blocks: tuple[MoE, ...], plan: Plan) -> None:
    whole = next((block.key for block in blocks if block.key in plan.condensed and not block.attention), None)
    if whole is not None:
        raise CoterieError(f"layer {whole} has experts; the plan in coterie.json condenses it")


def trace(plan: Plan, before: Outcome) -> Outcome:
    if before.key not in plan.condensed:
        return before
    return replace(before, levels=dict.fromkeys(plan.condensed[before.key].experts, CONDENSED), routed=())


KIND = Kind(
    order=6, layer=Keys(("condensed",), read), check=check, leave=leave, outputs=outputs, patch=patch, count=count,
    trace=trace, agree=agree,
)  # fmt: skip
