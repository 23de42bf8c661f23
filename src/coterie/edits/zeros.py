"""Whether pruned tensors are the original's with zeros in them, and as many as their plan records. Serves `verify`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import numpy as np

from coterie.edits import beside
from coterie.edits.budget import num_weights
from coterie.edits.outputs import plan_outputs, planned
from coterie.edits.plan import Plan
from coterie.errors import CoterieError
from coterie.model.experts import expert_weights
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint

CHUNK = 4 << 20  # bytes compared at a time; a multiple of every width
TOLERANCE = 1e-9  # of a recorded share, which is one quotient of two whole numbers


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


def zero_faults(
    out: Checkpoint, source: Model, plan: Plan, *, corrected: bool, without: Collection[str] = ()
) -> tuple[set[str], list[str]]:
    """The tensors that hold zeros, and what is wrong with them.

    corrected: the rule also changed the weights that stayed (SparseGPT), so that only zeros can be counted.
    without: tensors whose bytes are lost; they are left out, and so are the shares that they count in.
    """
    view = planned(source, plan, plan_outputs(source, plan))
    tensors = pruned_tensors(view, plan)
    unknown = {tensors.pop(name) for name in without if name in tensors}
    zeros: Counter[tuple[str, str]] = Counter()
    faults = []
    for name, key in tensors.items():
        changed = 0
        for ours, theirs in _chunks(out, view.checkpoint, name):
            zero = (ours << 1) == 0  # of either sign
            zeros[key] += int(zero.sum())
            changed += int((~zero & (ours != theirs)).sum())
        if changed and not corrected:
            faults.append(f"{changed:,} weights of {name} are neither the original's nor zero")
    sizes = {(b.key, "expert"): num_weights(view.checkpoint, b) for b in view.main}
    for layer, kinds in plan.sparsity.items():
        for kind, share in kinds.items():
            if (layer, kind) in unknown:
                continue
            names = [n for n, key in tensors.items() if key == (layer, kind)]
            size = sizes.get((layer, kind)) or sum(out.tensors[n].num_parameters for n in names)
            found = zeros[layer, kind] / size if size else 0.0
            if abs(found - share) > TOLERANCE:
                faults.append(
                    f"layer {layer}: {100 * found:.4f} % of {kind} weights are zero, the plan records {share}"
                )
    return set(tensors), faults


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
