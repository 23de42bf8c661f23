"""Weights that became zero, by tensor role: a record of what a command made from data, which no plan can repeat.

    plan: {"layers": {"0": {"sparsity": {"expert": 0.5}}}}

`verify` counts them: pruned tensors are the original's with zeros in them, and as many as the plan records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from coterie.edits import beside
from coterie.edits.budget import num_weights
from coterie.edits.outputs import planned
from coterie.edits.plan import Keys, Kind, Plan, Verified, Written
from coterie.errors import CoterieError
from coterie.methods.sparsify import corrects
from coterie.model.experts import expert_weights
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint

CHUNK = 4 << 20  # bytes compared at a time; a multiple of every width
TOLERANCE = 1e-9  # of a recorded share, which is one quotient of two whole numbers


def read(at: str, value: Any) -> dict[str, object]:
    """Shares from 0 to 1 by tensor role."""
    found = value["sparsity"]
    given = found if isinstance(found, dict) else {}
    if not given or not all(type(v) in (int, float) and 0 <= v <= 1 for v in given.values()):
        raise CoterieError(f"{at}: `sparsity` must give the share of zeros by tensor role, found {found!r:.120}")
    return {"sparsity": {str(role): float(share) for role, share in given.items()}}


def pruned_tensors(view: Model, plan: Plan) -> dict[str, tuple[str, str]]:
    """Tensor -> (layer, kind) for everything that the plan says holds zeros."""
    found: dict[str, tuple[str, str]] = {}
    for block in view.main:
        if "expert" in plan.sparsity.get(block.key, {}):
            found |= dict.fromkeys(expert_weights(view.checkpoint, block), (block.key, "expert"))
    for index, names in beside.by_layer(view, beside.KINDS).items():
        kinds = plan.sparsity.get(str(index), {})
        found |= {name: (str(index), kind) for name, kind in names.items() if kind in kinds}
    return found


def verify(written: Written, source: Model, plan: Plan) -> Verified:
    """Counts zeros, and compares the weights that stayed unless the rule corrected them (SparseGPT).

    Tensors whose bytes are lost are left out, and so are the shares that they count in.
    """
    if not plan.sparsity:
        return Verified()
    out, view = written.checkpoint, planned(source, plan)
    tensors = pruned_tensors(view, plan)
    unknown = {tensors.pop(name) for name in written.lost if name in tensors}
    zeros: Counter[tuple[str, str]] = Counter()
    corrected = any(corrects(written.options.get(name)) for name in ("method", "second"))
    faults = []
    for name, key in tensors.items():
        changed = 0
        for ours, theirs in _chunks(out, view.checkpoint, name):
            zero = (ours << 1) == 0  # of either sign
            zeros[key] += int(zero.sum())
            changed += int((~zero & (ours != theirs)).sum())
        if changed and not corrected:
            faults.append(f"{changed:,} weights of {name} are neither the original's nor zero")
    sizes = Counter({(b.key, "expert"): num_weights(view.checkpoint, b) for b in view.main})
    for name, key in tensors.items():
        sizes[key] += 0 if key[1] == "expert" else out.tensors[name].num_parameters
    for layer, kinds in plan.sparsity.items():
        for kind, share in kinds.items():
            found = zeros[layer, kind] / (sizes[layer, kind] or 1)
            if (layer, kind) not in unknown and abs(found - share) > TOLERANCE:
                faults.append(
                    f"layer {layer}: {100 * found:.4f} % of {kind} weights are zero, the plan records {share}"
                )
    note = f", {len(tensors):,} with zeros, as many as recorded" if tensors else ""
    return Verified(tensors.keys(), faults=tuple(faults), note=note)


def _chunks(out: Checkpoint, view: Checkpoint, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The stored bits of both, piece by piece. Raises: CoterieError for weights that share bytes."""
    tensor = out.tensors[name]
    width, rest = divmod(tensor.num_bytes, tensor.num_parameters)
    if rest or width not in (1, 2, 4, 8):
        raise CoterieError(f"tensor {name!r}: {tensor.dtype} weights share bytes; zeros cannot be told")
    for start in range(0, tensor.num_bytes, CHUNK):
        length = min(CHUNK, tensor.num_bytes - start)
        a, b = (np.frombuffer(c.raw(name, start, length), f"<u{width}") for c in (out, view))
        yield a, b


def unlike(plan: Plan) -> str:
    return "weights were zeroed; every byte that stayed was" if plan.sparsity else ""


KIND = Kind(order=5, layer=Keys(("sparsity",), read), verify=verify, unlike=unlike)
