"""Quantised weights as BF16, all of them, where a plan changes some and they cannot be written as they are stored.

    plan: {"dequantised": true}

Filled in when a plan is executed; whatever else it says is then said of the model in BF16 (`model/stored.py`). What is
only moved keeps its bytes: a plan that drops experts or layers has no such entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from coterie.edits.kinds.merge import averaged
from coterie.edits.plan import Keys, Kind, Plan
from coterie.errors import CoterieError
from coterie.methods.sparsify import corrects
from coterie.model.layer import Model
from coterie.model.stored import dense, in_experts, is_dense_view, outside, quantised
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.planned import root

KEY = "dequantised"


def read(where: str, content: Any) -> dict[str, object]:
    """That they are; nothing where the plan does not say so."""
    found = content.get(KEY, False)
    if not isinstance(found, bool):
        raise CoterieError(f"{where}: {KEY} must be true or false, found {found!r:.60}")
    return {KEY: True} if found else {}


def dequantised(model: Model, plan: Plan) -> Model:
    """The model that the plan speaks of."""
    return dense(model) if plan.at(KEY) and not is_dense_view(model.checkpoint) else model


def marked(model: Model, plan: Plan, zeroing: Mapping[str, object] | None = None) -> Plan:
    """The plan, saying so where it, or zeros made from data, change weights that cannot be written as they are stored.

    zeroing: the options of the command that makes zeros, if one does.
    """
    changed = [b for b in model.moe if (choice := plan.choice(b)) and averaged(choice)]
    changed += [b for b in model.main if b.key in plan.condensed]
    needed = is_dense_view(model.checkpoint) or plan.at(KEY) or bool(in_experts(model, changed))
    if zeroing is not None and not needed:
        needed = not _holds_zeros(model, zeroing)
    return replace(plan, entries={**plan.entries, KEY: True}) if needed else plan


def _holds_zeros(model: Model, options: Mapping[str, object]) -> bool:
    """Whether zeros can be written among the codes: of weights that have an element of their own, zero has the code 0;
    weights that a rule corrects, or compares without their scales, have to be plain."""
    found, tensors = in_experts(model, model.main), model.checkpoint.tensors
    if not found and not options.get("also"):
        return True
    if any(corrects(options.get(name)) for name in ("method", "second")):
        return not found
    if options.get("also") and quantised(model.checkpoint, outside(model)):
        return False
    return all(name in tensors and tensors[name].shape == matrix.shape for name, matrix in found.items())


def said(checkpoint: Checkpoint) -> str:
    """What becomes of the weights, and of the bytes."""
    before, after = root(checkpoint).num_bytes, checkpoint.num_bytes
    return (
        "weights that change cannot be written in the form that they are stored in, so that all quantised ones are "
        f"written as BF16: before anything is removed, {after:,} bytes instead of {before:,}"
    )


KIND = Kind(order=3, plan=Keys((KEY,), read))
