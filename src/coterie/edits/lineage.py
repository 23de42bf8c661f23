"""From which checkpoint another one was made, by which plans, and what became of the original's experts.

Read from `coterie.json`, step by step back: OUT may have been made from another result of ours. Used by `eval
--against` and `report`. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.edits.plan import Plan, read_plan
from coterie.errors import CoterieError
from coterie.storage.checkpoint import Checkpoint, resolve
from coterie.storage.record import record_of

LEVELS = ("removed", "kept", "average of a cluster", "always on (condensed)")
REMOVED, KEPT, MERGED, CONDENSED = range(len(LEVELS))
MOST_STEPS = 16  # a record that leads to itself would otherwise be followed for ever


@dataclass(frozen=True)
class Fate:
    """What became of the original's experts.

    levels: by original layer, for each original expert, an index into LEVELS.
    routed: by layer of the result that still routes, the original layer, and the original id of each expert that its
    router names.
    """

    levels: dict[str, tuple[int, ...]]
    routed: dict[str, tuple[str, tuple[int, ...]]]


def plan_of(out: Checkpoint) -> Plan:
    """The plan that OUT was made by. Raises: CoterieError where no record says, or it is damaged."""
    record = record_of(out.path)
    if record is None:
        raise CoterieError(f"{out.path}: no coterie.json, so nothing says what was done to the original")
    return read_plan(record)


def plans_between(out: str | Path, original_hash: str) -> list[Plan] | None:
    """The plans that led from the checkpoint with this fingerprint to `out`, in order; nothing if no record says so.

    Raises: CoterieError for a damaged checkpoint, record or plan on the way.
    """
    plans: list[Plan] = []
    folder = resolve(out)
    if Checkpoint.open(folder).hash == original_hash:
        return plans
    for _ in range(MOST_STEPS):
        record = record_of(folder)
        source = record.get("source") if record else None
        if record is None or not isinstance(source, dict):
            return None
        if record.get("command") != "recover":  # its plan repeats that of the model it trained
            plans.insert(0, read_plan(record))
        if source.get("hash") == original_hash:
            return plans
        found = _source_folder(source)
        if found is None:
            return None
        folder = found
    return None


def _source_folder(source: dict[str, Any]) -> Path | None:
    """Where a record says its source is, if that is still there and still the same."""
    path = source.get("path")
    if not isinstance(path, str) or not path:
        return None
    try:
        folder = Path(path)
        return folder if folder.is_dir() and Checkpoint.open(folder).hash == source.get("hash") else None
    except (CoterieError, OSError, ValueError):  # moved, changed or damaged since: it leads nowhere
        return None


def fate(plans: Sequence[Plan], num_experts: dict[str, int]) -> Fate:
    """Follows the original's experts (`num_experts` by layer key) through plans, each in terms of the one before.

    Raises: CoterieError for a plan that names experts or layers that are not there.
    """
    levels = {key: [KEPT] * n for key, n in num_experts.items()}
    routed = {key: (key, tuple(range(n))) for key, n in num_experts.items()}
    for plan in plans:
        routed = {key: _after(plan, key, *place, levels) for key, place in routed.items()}
        routed = {str(_shifted(plan, key)): place for key, place in routed.items() if place[1]}
    return Fate({key: tuple(found) for key, found in levels.items()}, routed)


def _after(
    plan: Plan, key: str, original: str, ids: tuple[int, ...], levels: dict[str, list[int]]
) -> tuple[str, tuple[int, ...]]:
    """The original layer and ids that one step leaves of a layer's experts; `levels` is brought up to date."""
    if int(key) not in plan.dropped and key not in plan.condensed and key not in plan.layers:
        return original, ids
    stays = _stays(plan, key)
    if max(stays, default=-1) >= len(ids):
        raise CoterieError(f"plan: layer {key!r} names expert {max(stays)}, but only {len(ids)} were there")
    for i, e in enumerate(ids):
        if stays.get(i) != KEPT:  # what is kept may have been an average before
            levels[original][e] = stays.get(i, REMOVED)
    if key not in plan.layers or int(key) in plan.dropped or key in plan.condensed:
        return original, ()
    whole = plan.layers[key].removed != "remove"  # the router goes on naming all
    return original, ids if whole else tuple(ids[i] for i in stays)


def _stays(plan: Plan, key: str) -> dict[int, int]:
    """Expert -> its level, of those in a layer that one plan does not remove, in their new order."""
    if int(key) in plan.dropped:
        return {}
    if key in plan.condensed:
        return dict.fromkeys(plan.condensed[key].experts, CONDENSED)
    choice = plan.layers[key]
    averaged = {k for k, c in zip(choice.kept, choice.clusters, strict=False) if choice.merged and len(c) > 1}
    return {e: MERGED if e in averaged else KEPT for e in choice.kept}


def _shifted(plan: Plan, key: str) -> int:
    """A layer's index once the plan's dropped layers are gone."""
    return int(key) - sum(dropped < int(key) for dropped in plan.dropped)
