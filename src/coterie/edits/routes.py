"""Our own layout's routers: a row for every original expert, while fewer experts are stored. Where each row leads.

    plan: {"kept": [...], "removed": "null" | "constant" | "alias"}  ->  config: {"coterie": {"routes": {layer: [...]}}}

`routes` gives, for every row, the stored expert (its new index), or -1 for none: then the token gets nothing of it, or
weight times a constant, a row of the layer's tensor `constants`. `alias` leads several rows to one stored expert. Used
by `apply`, which writes this, and `verify`; `model/routed.py` computes it. Axes: E expert, D hidden, R experts that are
removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from coterie.edits.plan import Choice, Plan
from coterie.errors import CoterieError
from coterie.model.experts import expert_shapes
from coterie.model.family import lookup
from coterie.model.layer import CONSTANTS, Model, MoE, expert_names
from coterie.model.own import own_section
from coterie.model.stats import Stats, mean
from coterie.storage.checkpoint import BITS, FLOATS, Checkpoint
from coterie.storage.shards import Made, Output

if TYPE_CHECKING:
    import numpy as np


def is_routed(choice: Choice | None, block: MoE) -> bool:
    """Whether the block's router stays as it is although experts go."""
    return choice is not None and choice.removed != "remove" and len(choice.kept) < block.num_experts


def routes_of(choice: Choice, num_experts: int) -> tuple[int, ...]:
    """For every original expert the stored one that its router row leads to, or -1."""
    index = choice.stand_ins(num_experts) if choice.removed == "alias" else {e: i for i, e in enumerate(choice.kept)}
    return tuple(index.get(e, -1) for e in range(num_experts))


def gone(choice: Choice, num_experts: int) -> list[int]:
    """The experts whose rows lead to none, ascending: the order of the constants."""
    return [e for e, stored in enumerate(routes_of(choice, num_experts)) if stored < 0]


def routed_blocks(model: Model, plan: Plan) -> Iterator[tuple[MoE, Choice]]:
    """The blocks that the plan routes so, in order."""
    for block in model.moe:
        choice = plan.choice(block)
        if choice and is_routed(choice, block) and not (block.mtp and plan.drop_mtp):
            yield block, choice


def check_routes(model: Model, plan: Plan) -> None:
    """Raises: CoterieError for what `coterie.load` could not read, and for a model that is routed so already."""
    already = next((block for block in model.moe if block.routes), None)
    if already:
        raise CoterieError(
            f"{model.checkpoint.path}: {already.name} has router rows without an expert of their own; a plan needs the "
            "model that it was made from"
        )
    routed, config = list(routed_blocks(model, plan)), model.checkpoint.config
    if not routed:
        return
    where = f"plan: {routed[0][0].name} keeps the router rows of removed experts ({routed[0][1].removed})"
    if not model.family.stock:
        raise CoterieError(f"{where}, but transformers has no class for {config.get('model_type')!r}; remove them")
    if any(holder is not config for _, holder, v in lookup(config, ("num_hidden_layers", "n_layers")) if v is not None):
        raise CoterieError(f"{where}; our own layout holds text models alone: use that one, or remove them")
    if plan.condensed or plan.sparsity:
        raise CoterieError(f"{where}, which excludes condensed layers and zeros; apply one plan after the other")
    for block, choice in routed:
        if block.attention or block.mtp:
            advice = "--drop-mtp, or remove them" if block.mtp else "remove them"
            raise CoterieError(f"plan: {block.name} cannot keep the router rows of removed experts; {advice}")
        left = gone(choice, block.num_experts)
        if choice.removed == "alias" and left:
            raise CoterieError(f"plan: {block.name} is routed by alias, but expert {left[0]} is in no cluster")
        if choice.removed == "constant" and not plan.constants:
            raise CoterieError(f"plan: {block.name} has constants, but the plan's `constants` do not say from where")


def say_routes(config: dict[str, Any], model: Model, plan: Plan) -> None:
    """Says in `config` (in place) where every router row leads."""
    routes = {b.key: list(routes_of(choice, b.num_experts)) for b, choice in routed_blocks(model, plan)}
    if not routes:
        return
    blocks = [b for b in model.moe if not b.attention and not (b.mtp and plan.drop_mtp)]
    stored = {b.key: len(c.kept) if (c := plan.choice(b)) else b.num_experts for b in blocks}
    own_section(config, num_experts=stored, routes=routes)


# --- constants ---------------------------------------------------------------------------------------------------


def constants_name(block: MoE) -> str:
    return f"{block.prefix}{block.layout.experts}{CONSTANTS}"


def constants_output(checkpoint: Checkpoint, block: MoE, choice: Choice, plan: Plan) -> Output:
    """The tensor (R, D) of constants, computed from the statistics when its turn comes."""
    dtype, shape = _dtype(checkpoint, block), (len(gone(choice, block.num_experts)), _width(checkpoint, block))
    make = partial(constants, checkpoint, block, choice, plan)
    return Output(constants_name(block), dtype, shape, (Made(shape[0] * shape[1] * BITS[dtype] // 8, make),))


def constants(checkpoint: Checkpoint, block: MoE, choice: Choice, plan: Plan) -> bytes:
    """Stored bytes of c_e, e ascending over the experts that are gone: the mean of f_e(x) over the tokens routed to e.

    0 for an expert that no token chose. Rounded once, from float64.
    Raises: CoterieError for statistics that are gone, of another model, or not those that the plan was made from.
    """
    from coterie.storage.numerics import encode

    values = mean_outputs(checkpoint, block, plan.constants)[gone(choice, block.num_experts)]
    raw = encode(values, _dtype(checkpoint, block), constants_name(block))
    if choice.constants and hashlib.sha256(raw).hexdigest() != choice.constants:
        raise CoterieError(
            f"{plan.constants['stats']}: gives other constants for {block.name} than the plan was made with; give the "
            "statistics of then, or delete the layer's `constants` from the plan to take these"
        )
    return raw


def mean_outputs(checkpoint: Checkpoint, block: MoE, source: dict[str, Any]) -> np.ndarray:
    """The mean output of every expert over the tokens routed to it (E, D) in float64, domains weighted."""
    path, weights = source["stats"], source.get("weights", {})
    stats = Stats.load(path, only=("tokens", "outputs"), layers=(block.key,))
    stats.check_model(checkpoint.hash, path)
    tokens, outputs = (stats.get(block.key, name, weights) for name in ("tokens", "outputs"))
    expected = (block.num_experts, _width(checkpoint, block))
    if tokens.shape != expected[:1] or outputs.shape != expected:
        raise CoterieError(
            f"{path}: {block.name}: mean outputs have shape {outputs.shape}, expected {expected}; collect them again"
        )
    return mean(outputs, tokens[:, None])


def sealed(model: Model, plan: Plan) -> Plan:
    """The plan with the fingerprints of all its constants. Raises: CoterieError where one is known and differs."""
    layers = dict(plan.layers)
    for block, choice in routed_blocks(model, plan):
        if choice.removed == "constant":
            raw = constants(model.checkpoint, block, choice, plan)
            layers[block.key] = replace(choice, constants=hashlib.sha256(raw).hexdigest())
    return replace(plan, layers=layers)


def compared_constants(out: Checkpoint, model: Model, plan: Plan) -> tuple[set[str], list[str]]:
    """The constants of OUT whose fingerprints the plan holds, and those whose bytes have another.

    So they can be checked without the statistics that they come from.
    """
    compared, differing = set(), []
    for block, choice in routed_blocks(model, plan):
        if choice.constants:
            name = constants_name(block)
            compared.add(name)
            if hashlib.sha256(out.raw(name)).hexdigest() != choice.constants:
                differing.append(name)
    return compared, differing


def _dtype(checkpoint: Checkpoint, block: MoE) -> str:
    """That of the experts, or of the router where they are quantised."""
    found = [checkpoint.tensors[name].dtype for name in (*expert_names(block)[:1], block.router)]
    return next((dtype for dtype in found if dtype in FLOATS), "BF16")


def _width(checkpoint: Checkpoint, block: MoE) -> int:
    """D of an expert's output."""
    return expert_shapes(checkpoint, block)["down"][0]
