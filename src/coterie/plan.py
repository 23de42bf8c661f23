"""Decisions as data: what `prune` and its sisters decide, and `apply` executes. JSON, so it can be read and edited."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coterie.checkpoint import load_json
from coterie.errors import CoterieError
from coterie.layer import MoE


@dataclass(frozen=True)
class Choice:
    """What happens to the experts of one block. `kept` ascends; `clusters[i]` are the experts `kept[i]` stands for."""

    kept: tuple[int, ...]
    clusters: tuple[tuple[int, ...], ...] = ()
    merged: bool = False  # kept[i] becomes the mean of clusters[i], its router row the mean of theirs

    def stand_ins(self, num_experts: int) -> dict[int, int]:
        """Original id -> new index, for kept experts and for the dropped ones that a cluster covers."""
        index = {e: i for i, e in enumerate(self.kept)}
        for i, cluster in enumerate(self.clusters):
            index |= dict.fromkeys((e for e in cluster if 0 <= e < num_experts), i)
        return index

    def as_dict(self) -> dict[str, Any]:
        result: dict[str, Any] = {"kept": list(self.kept)}
        if self.clusters:
            result["clusters"] = [list(c) for c in self.clusters]
        if self.merged:
            result["merged"] = True
        return result


@dataclass(frozen=True)
class Plan:
    """Choices per layer (and per layer with attention experts), what was asked for, and whether MTP layers go."""

    layers: dict[str, Choice]
    attention: dict[str, Choice] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    drop_mtp: bool = False

    def choice(self, block: MoE) -> Choice | None:
        return (self.attention if block.attention else self.layers).get(block.key)

    def as_dict(self) -> dict[str, Any]:
        layers: dict[str, Any] = {key: choice.as_dict() for key, choice in self.layers.items()}
        for key, choice in self.attention.items():
            layers.setdefault(key, {})["attention"] = choice.as_dict()
        result: dict[str, Any] = {"layers": layers, "budget": self.budget}
        return result | ({"drop_mtp": True} if self.drop_mtp else {})


def read_plan(source: str | Path | dict[str, Any]) -> Plan:
    """A plan from a `coterie.json`, from its `plan` object alone, or from such a dictionary.

    Raises: CoterieError naming the layer and what is wrong with it.
    """
    if isinstance(source, dict):
        where, content = "plan", source
    else:
        where, path = str(source), Path(source)
        folder = os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for names that are too long
        content = load_json(path / "coterie.json" if folder else path)
    content = content.get("plan", content)
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, dict):
        raise CoterieError(f"{where}: no `layers` object; expected a coterie.json or its `plan`")
    known = {"layers", "budget", "drop_mtp"}
    if set(content) - known:
        raise CoterieError(f"{where}: unknown keys {sorted(set(content) - known)}; expected {sorted(known)}")
    experts, attention = {}, {}
    for key, value in layers.items():
        at = f"{where}: layer {key!r}"
        if not isinstance(value, dict):
            raise CoterieError(f"{at}: expected an object, found {value!r:.60}")
        if set(value) - {"attention"}:
            experts[key] = _choice(at, {k: v for k, v in value.items() if k != "attention"})
        if "attention" in value:
            attention[key] = _choice(f"{at} (attention)", value["attention"])
    budget = content.get("budget", {})
    if not isinstance(budget, dict) or not isinstance(content.get("drop_mtp", False), bool):
        raise CoterieError(f"{where}: budget must be an object and drop_mtp a boolean")
    return Plan(experts, attention, budget, content.get("drop_mtp", False))


def _choice(at: str, value: Any) -> Choice:
    if not isinstance(value, dict) or set(value) - {"kept", "clusters", "merged"}:
        raise CoterieError(f"{at}: expected the keys kept, clusters and merged, found {value!r:.120}")
    kept, clusters, merged = value.get("kept"), value.get("clusters", []), value.get("merged", False)
    if not _ids(kept) or not kept or list(kept) != sorted(set(kept)):
        raise CoterieError(f"{at}: `kept` must be ascending, distinct expert ids, found {kept!r:.120}")
    if not isinstance(clusters, list) or not all(_ids(c) for c in clusters) or not isinstance(merged, bool):
        raise CoterieError(f"{at}: `clusters` must be lists of expert ids and `merged` a boolean")
    if clusters and (len(clusters) != len(kept) or any(k not in c for k, c in zip(kept, clusters, strict=True))):
        raise CoterieError(f"{at}: `clusters` must name, for each kept expert, the cluster it belongs to")
    members = [e for c in clusters for e in c]
    if len(set(members)) != len(members):
        raise CoterieError(f"{at}: an expert stands in two clusters")
    if merged and not clusters:
        raise CoterieError(f"{at}: merged experts need their clusters")
    return Choice(tuple(kept), tuple(tuple(c) for c in clusters), merged)


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def to_json(value: Any) -> str:
    """Indented JSON in which lists of numbers stay on one line."""
    import re

    text = json.dumps(value, indent=2, ensure_ascii=False)
    # Strings hold no line breaks once encoded, so what has them is a list.
    return re.sub(r"\[\n\s*([-\d.,\s]+?)\n\s*\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n"
