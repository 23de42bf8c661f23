"""Whether a plan fits a checkpoint: everything that would fail at load, or load and compute something else."""

from __future__ import annotations

from typing import Any

from coterie.edits.dense import check_dense
from coterie.edits.drop import check_dropped
from coterie.edits.plan import Choice, Plan
from coterie.edits.routes import check_routes, is_routed
from coterie.errors import CoterieError
from coterie.model.layer import Model, MoE
from coterie.storage.checkpoint import FLOATS, Checkpoint


def check_plan(model: Model, plan: Plan) -> None:
    """Everything that would fail at load, or load and compute something else. Raises: CoterieError."""
    checkpoint, config = model.checkpoint, model.checkpoint.config
    known = {(b.key, b.attention) for b in model.moe}
    for keys, attention in ((plan.layers, False), (plan.attention, True)):
        for key in keys:
            if (key, attention) not in known:
                kind = "attention experts" if attention else "experts"
                raise CoterieError(f"plan: layer {key!r} has no {kind} in {checkpoint.path}")
    check_dense(model, plan)
    check_dropped(model, plan)
    check_routes(model, plan)
    groups, top_k = model.family.groups(config), model.family.num_experts_per_token(config)
    counts = {}
    for block in model.moe:
        choice = plan.choice(block)
        if (block.mtp and plan.drop_mtp) or (block.key in plan.condensed and not block.attention):
            continue
        routed = is_routed(choice, block)  # then the router chooses as before
        counts[block.name] = len(choice.kept) if choice and not routed else block.num_experts
        if choice:
            _check_choice(checkpoint, block, choice, 1 if routed else groups.num_groups)
    for name, num_kept in counts.items():
        check_count(num_kept, top_k, groups, f"plan: {name}")
    if len(set(counts.values())) > 1 and plan.budget.get("layout") != "coterie":
        raise CoterieError(
            f"plan: layers keep different numbers of experts ({min(counts.values())} to {max(counts.values())}), "
            'which no stock config can say; make them equal, or set "layout": "coterie" in the plan\'s budget '
            "(--non-uniform coterie)"
        )


def _check_choice(checkpoint: Checkpoint, block: MoE, choice: Choice, num_groups: int) -> None:
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
    if choice.merged:
        for name in [*(n for e in block.experts for n in e.values()), *block.fused, block.router]:
            if checkpoint.tensors[name].dtype not in FLOATS:
                raise CoterieError(
                    f"tensor {name!r}: {checkpoint.tensors[name].dtype} weights cannot be averaged; "
                    "dequantise the checkpoint first, or average none (prune: --kappa 0)"
                )


def check_count(num_kept: int, top_k: int, groups: Any, where: str) -> None:
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


def fits_groups(num_kept: int, top_k: int, groups: Any) -> bool:
    per_group, rest = divmod(num_kept, groups.num_groups)
    return rest == 0 and per_group >= groups.min_per_group and groups.top_groups * per_group >= min(top_k, num_kept)
