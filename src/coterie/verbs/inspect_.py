"""Show what is inside: family, experts per layer, bytes by role. Reads headers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from coterie.codecs.open import coded
from coterie.decide.abilities import abilities
from coterie.edits.kinds.convert import conversion
from coterie.model.layer import ROLES, Model
from coterie.options import ModelPath, public
from coterie.pages.terminal import Asked, table


@public
def inspect(model: ModelPath) -> dict[str, Any]:
    """Family, routing, experts per layer, parameters and bytes by role and by dtype. Reads headers only.

    Returns `{"path", "family", "model_type", "stock", "moe_layers", "mtp_layers", "experts" (per layer),
    "experts_per_token", "groups", "parameters", "bytes", "roles": {role: {"parameters", "bytes", "tensors"}},
    "dtypes", "shards", "expert_bytes", "packed", "can": {verb: true, or the reason why not}, "condensed_as"}`.
    Parameters are those of the dense checkpoint; bytes are those on the disk; `packed` counts the tensors that are
    packed, and their bytes; `can` is of each verb's default method, by headers.
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
        "mtp_layers": sum(b.predicts for b in source.moe),
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
        "can": abilities(source),
        "condensed_as": _condensed_as(source),
    }


def _condensed_as(model: Model) -> str:
    """Of what type the result of `condense` is."""
    if repackaged := conversion(model.checkpoint.config):
        return f"after repackaging as {repackaged.target}"
    kind = model.checkpoint.config.get("model_type")
    return f"stays {kind}" if model.family.dense else "in a layout that `coterie.load` reads"


SAID = {
    ("prune", "apply"): "experts dropped by editing files",
    ("verify",): "files and bytes, and what the model computes where transformers loads it",
    ("unpack",): "back to the dense checkpoint, byte for byte",
    ("pack",): "zeros stored as bits, where there are enough",
    ("collect", "analyze", "sparsify", "stun", "merge", "drop"): "on data, one layer in memory at a time",
    ("eval", "report", "generate", "bench"): "transformers computes it",
    ("condense",): "layers become dense MLPs",
}  # what people read of commands that go well


def _lines(can: Mapping[str, bool | str], condensed_as: str) -> Iterator[tuple[str, str]]:
    """What works, in groups; then why the rest does not, each reason once."""
    for verbs, what in SAID.items():
        if able := [verb for verb in verbs if can[verb] is True]:
            yield "can", f"{', '.join(able)}: {what}" + (f" ({condensed_as})" if verbs == ("condense",) else "")
    reasons: dict[str, list[str]] = {}
    for verb, reason in can.items():
        if isinstance(reason, str) and verb not in ("pack", "unpack"):
            reasons.setdefault(reason, []).append(verb)
    yield from (("cannot", f"{', '.join(verbs)}: {reason}") for reason, verbs in reasons.items())


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
    rows += _lines(found["can"], found["condensed_as"])
    return table(f"{found['path']}: {found['model_type']}", rows)
