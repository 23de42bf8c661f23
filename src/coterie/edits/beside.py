"""The matrices of decoder layers beside the routed experts, by kind: what unstructured pruning may take too."""

from __future__ import annotations

import re

from coterie.model.layer import LAYER, Model, is_mtp

KINDS = ("attention", "shared", "dense", "router")
ATTENTION, DENSE = re.compile(r"attn|attention"), re.compile(r"mlp|ffn|feed_forward|fc\d")


def kind_of(model: Model, name: str) -> str | None:
    """Which of KINDS a matrix of an ordinary decoder layer is, if any."""
    match, tensor = LAYER.fullmatch(name), model.checkpoint.tensors[name]
    if match is None or len(tensor.shape) != 2 or is_mtp(name, model.checkpoint.config):
        return None
    role = model.roles[name]
    if role in ("shared", "router"):
        return role
    rest = match["rest"]
    if role != "other" or "norm" in rest:
        return None
    return "attention" if ATTENTION.search(rest) else "dense" if DENSE.search(rest) else None


def by_layer(model: Model, also: tuple[str, ...]) -> dict[int, dict[str, str]]:
    """Layer index -> its matrices to prune (tensor -> kind)."""
    found: dict[int, dict[str, str]] = {}
    for name in model.checkpoint.tensors:
        kind = kind_of(model, name)
        if kind in also:
            match = LAYER.fullmatch(name)
            assert match and kind
            found.setdefault(int(match["index"]), {})[name] = kind
    return found
