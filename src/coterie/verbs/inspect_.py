"""Show what is inside: family, experts per layer, bytes by role. Reads headers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from coterie.codecs.open import coded
from coterie.edits.folding import check_foldable
from coterie.edits.kinds.convert import conversion
from coterie.errors import CoterieError
from coterie.model.layer import ROLES, Model
from coterie.options import ModelPath, public
from coterie.pages.terminal import Asked, table


@public
def inspect(model: ModelPath) -> dict[str, Any]:
    """Family, routing, experts per layer, parameters and bytes by role and by dtype. Reads headers only.

    Returns `{"path", "family", "model_type", "stock", "moe_layers", "mtp_layers", "experts" (per layer),
    "experts_per_token", "groups", "parameters", "bytes", "roles": {role: {"parameters", "bytes", "tensors"}},
    "dtypes", "shards", "expert_bytes", "packed", "can": [...]}`. Parameters are those of the dense checkpoint; bytes
    are those on the disk; `packed` counts the tensors that are packed, and their bytes.
    Raises: CoterieError for a dense, unknown or damaged checkpoint.
    """
    source = Model.open(model)
    checkpoint, family, packed = source.checkpoint, source.family, coded(source.checkpoint)
    groups = family.groups(checkpoint.config)
    roles = {role: {"tensors": 0, "parameters": 0, "bytes": 0} for role in ROLES}
    dtypes: dict[str, int] = {}
    for name, tensor in checkpoint.tensors.items():
        stored, dtype = tensor.num_bytes, tensor.dtype
        if name in packed:
            stored, dtype = packed[name].num_bytes, packed[name].stored or dtype
        found = roles[source.roles[name]]
        found["tensors"] += 1
        found["parameters"] += tensor.num_parameters
        found["bytes"] += stored
        dtypes[dtype] = dtypes.get(dtype, 0) + stored
    main = source.main
    num_experts = sum(b.num_experts for b in source.moe)
    return {
        "path": str(model),
        "family": family.name,
        "model_type": checkpoint.config.get("model_type"),
        "stock": family.stock,
        "moe_layers": len(main),
        "mtp_layers": sum(b.mtp and not b.aside for b in source.moe),
        "experts": {b.key: b.num_experts for b in main},
        "experts_per_token": family.num_experts_per_token(checkpoint.config),
        "groups": groups.num_groups,
        "parameters": checkpoint.num_parameters,
        "bytes": sum(dtypes.values()),
        "expert_bytes": roles["expert"]["bytes"] // num_experts,
        "roles": {role: found for role, found in roles.items() if found["tensors"]},
        "dtypes": dtypes,
        "shards": len(checkpoint.shards),
        "packed": {"tensors": len(packed), "bytes": sum(found.num_bytes for found in packed.values())},
        "can": _abilities(source, packed=bool(packed)),
    }


def _abilities(model: Model, *, packed: bool) -> list[str]:
    """What the commands can do to this checkpoint, and why they cannot where that is so."""
    config, kind = model.checkpoint.config, model.checkpoint.config.get("model_type")
    storing = "pack: zeros stored as bits, where there are enough"
    found = [
        "prune, apply: experts dropped by editing files",
        "unpack: back to the dense checkpoint, byte for byte" if packed else storing,
    ]
    if model.family.stock:
        found.append("collect, analyze, sparsify, stun, merge, drop, eval, generate, bench: transformers computes it")
    else:
        found.append("verify: files and bytes only (transformers has no class for this family)")
    repackaged = conversion(config)
    if not model.family.stock and not repackaged:
        return found
    try:
        for block in model.main:
            check_foldable(model.checkpoint, block)
    except CoterieError as error:
        return [*found, f"not condense: {error}"]
    said = f"after repackaging as {repackaged.target}" if repackaged else f"stays {kind}"
    said = said if repackaged or model.family.dense else "in a layout that `coterie.load` reads"
    return [*found, f"condense: layers become dense MLPs ({said})"]


def show(found: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    """One line per number; bytes by role, and what can be done."""
    counts, packed = set(found["experts"].values()), found["packed"]
    mtp = f" (+{found['mtp_layers']} MTP)" if found["mtp_layers"] else ""
    rows = [
        ("MoE layers", f"{found['moe_layers']}{mtp}"),
        ("experts per layer", " to ".join(map(str, sorted({min(counts), max(counts)})))),
        ("chosen per token", f"{found['experts_per_token']}"),
        ("parameters", f"{found['parameters']:,}"),
        ("bytes", f"{found['bytes']:,} in {found['shards']} file(s)"),
        ("bytes of one expert", f"{found['expert_bytes']:,}"),
    ]
    rows += [("packed", f"{packed['tensors']:,} tensors in {packed['bytes']:,} bytes")] if packed["tensors"] else []
    rows += [(f"  {n}", f"{role['bytes']:,} bytes, {role['tensors']:,} tensors") for n, role in found["roles"].items()]
    return table(f"{found['path']}: {found['model_type']}", [*rows, *(("can", ability) for ability in found["can"])])
