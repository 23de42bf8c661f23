"""From which checkpoint another one was made, by which plans, and what became of the original's experts.

Read from `coterie.json`, step by step back: OUT may have been made from another result of ours. Used by `eval
--against`, `report` and `verify`. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.edits.plan import KEPT, REMOVED, Outcome, Plan, kinds, read_plan
from coterie.errors import CoterieError
from coterie.storage.checkpoint import Checkpoint, resolve
from coterie.storage.record import record_of

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


def _source_folder(source: Mapping[str, object]) -> Path | None:
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
        before, routed = routed, {}
        for key, (original, ids) in before.items():
            outcome = _outcome(plan, key, len(ids))
            for i, e in enumerate(ids):
                if outcome.levels.get(i) != KEPT:  # what is kept may have been an average before
                    levels[original][e] = outcome.levels.get(i, REMOVED)
            if outcome.routed:
                routed[outcome.moved] = original, tuple(ids[i] for i in outcome.routed)
    return Fate({key: tuple(found) for key, found in levels.items()}, routed)


def _outcome(plan: Plan, key: str, num_experts: int) -> Outcome:
    """What one plan makes of a layer's experts."""
    outcome = Outcome(key, key, num_experts, dict.fromkeys(range(num_experts), KEPT), tuple(range(num_experts)))
    for kind in kinds():
        outcome = kind.trace(plan, outcome)
    if max(outcome.levels, default=-1) >= num_experts:
        raise CoterieError(f"plan: layer {key!r} names expert {max(outcome.levels)}, but only {num_experts} were there")
    return outcome
