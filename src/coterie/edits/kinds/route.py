"""Our own layout's routers: a row for every original expert, while fewer experts are stored. Where each row leads.

    plan: {"layers": {"0": {"kept": [...], "removed": "null" | "constant" | "alias", "constants": SHA-256}},
           "constants": {"stats": path, "weights": {domain: weight}}}
    config: {"coterie": {"routes": {"0": [...]}}}

`routes` gives, for every row, the stored expert (its new index), or -1 for none: then the token gets nothing of it, or
weight times a constant, a row of the layer's tensor `constants`. `alias` leads several rows to one stored expert.
`model/routed.py` computes it. Axes: E expert, D hidden, R experts that are gone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from coterie.edits.outputs import experts_left
from coterie.edits.plan import Choice, Keys, Kind, Left, Outcome, Outputs, Plan, Verified, Written
from coterie.errors import CoterieError, check_choice
from coterie.model.experts import hidden_size
from coterie.model.family import lookup
from coterie.model.layer import CONSTANTS, Model, MoE, expert_names
from coterie.model.own import own_section
from coterie.model.stats import Stats, mean
from coterie.storage.checkpoint import FLOATS, Checkpoint
from coterie.storage.numerics import encode
from coterie.storage.shards import Output, computed, whole

ROWS = ("remove", "null", "constant", "alias")  # what becomes of the router rows of experts that go


def read(at: str, value: Any) -> dict[str, object]:
    """What becomes of the removed experts' router rows, and the fingerprint of the constants in their place."""
    removed, constants, clusters = value.get("removed", "remove"), value.get("constants", ""), value.get("clusters", [])
    check_choice(f"{at}: `removed`", removed, ROWS)
    if removed != "remove" and bool(clusters) != (removed == "alias"):
        raise CoterieError(f"{at}: `removed` is {removed!r}; alias needs `clusters`, and null and constant have none")
    is_hash = isinstance(constants, str) and len(constants) == 64 and set(constants) <= set("0123456789abcdef")
    if constants != "" and not (is_hash and removed == "constant"):
        raise CoterieError(
            f"{at}: `constants` is {constants!r:.80}; expected a SHA-256 beside `removed`: 'constant', or none"
        )
    return {"removed": removed, "constants": constants}


def read_source(where: str, content: Any) -> dict[str, object]:
    """Where constants come from. Raises: CoterieError for anything but a path and weights."""
    value = content.get("constants", {})
    given = value if isinstance(value, dict) else {"": value}
    weights = given.get("weights", {})
    numbers: list[Any] = list(weights.values()) if isinstance(weights, dict) else [None]
    known = not set(given) - {"stats", "weights"} and isinstance(given.get("stats"), str)
    if given and not (known and all(type(n) in (int, float) and 0 <= n < math.inf for n in numbers)):
        raise CoterieError(
            f"{where}: `constants` must say of which `stats` (a path) and with which `weights` of domains, found "
            f"{value!r:.120}"
        )
    return {"constants": given}


def is_routed(choice: Choice, block: MoE) -> bool:
    """Whether the block's router stays as it is although experts go."""
    return choice.removed != "remove" and len(choice.kept) < block.num_experts


def routes_of(choice: Choice, num_experts: int) -> tuple[int, ...]:
    """For every original expert the stored one that its router row leads to, or -1."""
    index = choice.stand_ins(num_experts) if choice.removed == "alias" else {e: i for i, e in enumerate(choice.kept)}
    return tuple(index.get(e, -1) for e in range(num_experts))


def gone(choice: Choice, num_experts: int) -> list[int]:
    """The experts whose rows lead to none, ascending: the order of the constants."""
    return [e for e, stored in enumerate(routes_of(choice, num_experts)) if stored < 0]


def routed_blocks(model: Model, plan: Plan) -> Iterator[tuple[MoE, Choice]]:
    """The blocks that the plan routes so, in order."""
    return ((block, choice) for block, choice in plan.chosen(model) if is_routed(choice, block))


def check(model: Model, plan: Plan) -> None:
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
        raise CoterieError(
            f"{where}, but transformers has no causal language model for {config.get('model_type')!r}; remove them"
        )
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


def leave(plan: Plan, left: dict[MoE, Left]) -> None:
    for block in left:
        choice = plan.choice(block)
        if choice and is_routed(choice, block):
            left[block] = Left(left[block].stored, block.num_experts)


def patch(config: dict[str, Any], model: Model, plan: Plan) -> None:
    """Where every router row leads."""
    routes = {b.key: list(routes_of(choice, b.num_experts)) for b, choice in routed_blocks(model, plan)}
    if routes:
        stored = {b.key: left.stored for b, left in experts_left(model, plan).items() if not b.attention}
        own_section(config, num_experts=stored, routes=routes)


def outputs(model: Model, plan: Plan, made: Outputs) -> Outputs:
    """The router with what belongs to it, uncut, and the constants behind it."""
    tensors, result = model.checkpoint.tensors, Outputs()
    for block, _ in routed_blocks(model, plan):
        result |= {name: (whole(tensors[name]),) for name in (block.router, *block.rows, *block.tables)}
    for block, _, output in constants(model, plan):
        result[block.router] += (output,)
    return result


def count(model: Model, plan: Plan, counts: dict[str, int]) -> None:
    """Constants have two axes, but multiply nothing."""
    counts["linears"] -= sum(math.prod(output.shape) for _, _, output in constants(model, plan))


def trace(plan: Plan, before: Outcome) -> Outcome:
    """The router goes on naming all."""
    choice = plan.layers.get(before.key)
    named = choice is not None and choice.removed != "remove"
    return replace(before, routed=tuple(range(before.num_experts))) if named else before


# --- constants ---------------------------------------------------------------------------------------------------


def constants_name(block: MoE) -> str:
    return f"{block.prefix}{block.layout.experts}{CONSTANTS}"


def constants(model: Model, plan: Plan) -> Iterator[tuple[MoE, Choice, Output]]:
    """The blocks with constants, and the tensor (R, D) of each, computed from the statistics when its turn comes."""
    for block, choice in routed_blocks(model, plan):
        if choice.removed == "constant":
            dtype = _dtype(model.checkpoint, block)
            shape = (len(gone(choice, block.num_experts)), hidden_size(model.checkpoint, block))
            make = partial(constant_bytes, model, block, choice, plan)
            yield block, choice, computed(constants_name(block), dtype, shape, make)


def constant_bytes(model: Model, block: MoE, choice: Choice, plan: Plan) -> bytes:
    """Stored bytes of c_e, e ascending over the experts that are gone: the mean of f_e(x) over the tokens routed to e.

    0 for an expert that no token chose. Rounded once, from float64.
    Raises: CoterieError for statistics that are gone, of another model, or not those that the plan was made from.
    """
    values = mean_outputs(model, block, plan.constants)[gone(choice, block.num_experts)]
    raw = encode(values, _dtype(model.checkpoint, block), constants_name(block))
    if choice.constants and hashlib.sha256(raw).hexdigest() != choice.constants:
        raise CoterieError(
            f"{plan.constants['stats']}: gives other constants for {block.name} than the plan was made with; give the "
            "statistics of then, or delete the layer's `constants` from the plan to take these"
        )
    return raw


def mean_outputs(model: Model, block: MoE, source: Mapping[str, Any]) -> np.ndarray:
    """The mean output of every expert over the tokens routed to it (E, D) in float64, domains weighted."""
    path, weights = source["stats"], source.get("weights", {})
    stats = Stats.load(path, only=("tokens", "outputs"), layers=(block.key,))
    stats.check_model(model.checkpoint.hash, path)
    tokens, outputs = (stats.get(block.key, name, weights) for name in ("tokens", "outputs"))
    expected = (block.num_experts, hidden_size(model.checkpoint, block))
    if tokens.shape != expected[:1] or outputs.shape != expected:
        raise CoterieError(
            f"{path}: {block.name}: mean outputs have shape {outputs.shape}, expected {expected}; collect them again"
        )
    return mean(outputs, tokens[:, None])


def seal(model: Model, plan: Plan) -> Plan:
    """The plan with the fingerprints of all its constants.

    Raises: CoterieError where one is known and differs, or transformers' class cannot be routed so.
    """
    if routed := [block.key for block, _ in routed_blocks(model, plan)]:
        from coterie.model.loading import check_routable

        check_routable(model.checkpoint, routed)
    layers = dict(plan.layers)
    for block, choice, _ in constants(model, plan):
        raw = constant_bytes(model, block, choice, plan)
        layers[block.key] = replace(choice, constants=hashlib.sha256(raw).hexdigest())
    return replace(plan, layers=layers)


def verify(written: Written, source: Model, plan: Plan) -> Verified:
    """Compares constants by the fingerprints that the plan holds, without the statistics that they come from."""
    added = {output.name: choice.constants for _, choice, output in constants(source, plan)}
    known = {name: recorded for name, recorded in added.items() if recorded}
    found = {name: hashlib.sha256(written.checkpoint.raw(name)).hexdigest() for name in known}
    return Verified(
        tensors=known.keys(),
        differing=tuple(name for name in known if found[name] != known[name]),
        added=added.keys(),
        note=f", {len(added):,} with constants added" if added else "",
    )


def _dtype(checkpoint: Checkpoint, block: MoE) -> str:
    """That of the experts, or of the router where they are quantised."""
    found = [checkpoint.tensors[name].dtype for name in (*expert_names(block)[:1], block.router)]
    return next((dtype for dtype in found if dtype in FLOATS), "BF16")


KIND = Kind(
    order=4, block=Keys(("removed", "constants"), read), plan=Keys(("constants",), read_source), check=check, seal=seal,
    leave=leave, outputs=outputs, patch=patch, count=count, trace=trace, verify=verify,
)  # fmt: skip
