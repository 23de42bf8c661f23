"""Decisions as data: what `prune` and its sisters decide, and `apply` executes. JSON, so it can be read and edited."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError
from coterie.model.layer import MoE
from coterie.storage.checkpoint import load_json

REMOVED = ("remove", "null", "constant", "alias")  # what becomes of the router rows of experts that go

LARGEST = 1e300  # of a gate; Python's integers go beyond any float


@dataclass(frozen=True)
class Choice:
    """What happens to the experts of one block. `kept` ascends; `clusters[i]` are the experts `kept[i]` stands for.

    removed: what becomes of the others' router rows. "remove": they go too. The rest is for our own layout, where the
    router stays as it was: a token that chooses a removed expert gets nothing of it ("null"), a constant ("constant"),
    or the stored expert that stands for it ("alias", by `clusters`).
    constants: the SHA-256 of the constants' bytes as stored; "" is filled in when the plan is executed.
    """

    kept: tuple[int, ...]
    clusters: tuple[tuple[int, ...], ...] = ()
    merged: bool = False  # kept[i] becomes the mean of clusters[i]; its router row, but for alias, the mean of theirs
    shares: tuple[tuple[float, ...], ...] = ()  # of each member of clusters[i] in that mean; none: equal
    aligned: bool = False  # each member's neurons are put in the order of kept[i]'s before
    removed: str = "remove"
    constants: str = ""

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
        if self.shares:
            result["shares"] = [list(s) for s in self.shares]
        if self.aligned:
            result["aligned"] = True
        if self.removed != "remove":
            result["removed"] = self.removed
        if self.constants:
            result["constants"] = self.constants
        return result


@dataclass(frozen=True)
class Condensed:
    """A MoE block that becomes one dense MLP: experts always on, each with a constant gate, beside the shared one.

    `gates[i]` belongs to `experts[i]`; `shared_gate` is 1 where nothing scales the shared expert, or there is none.
    """

    experts: tuple[int, ...]
    gates: tuple[float, ...]
    shared_gate: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        return {"experts": list(self.experts), "gates": list(self.gates), "shared_gate": self.shared_gate}


@dataclass(frozen=True)
class Plan:
    """Choices per layer (and per layer with attention experts), what was asked for, and whether MTP layers go.

    sparsity: per layer, the share of weights that became zero, by tensor role; a record of what `sparsify` did.
    condensed: the layers that become dense; dropped: decoder layers that go, whole; converted: the model type to say
    the result in, where the model's own cannot.
    constants: where those of `Choice.removed` come from: {"stats": path, "weights": {domain: weight}}.
    """

    layers: dict[str, Choice]
    attention: dict[str, Choice] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    drop_mtp: bool = False
    sparsity: dict[str, dict[str, float]] = field(default_factory=dict)
    condensed: dict[str, Condensed] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()
    converted: str | None = None
    constants: dict[str, Any] = field(default_factory=dict)

    def choice(self, block: MoE) -> Choice | None:
        return (self.attention if block.attention else self.layers).get(block.key)

    def as_dict(self) -> dict[str, Any]:
        layers: dict[str, Any] = {key: choice.as_dict() for key, choice in self.layers.items()}
        for key, choice in self.attention.items():
            layers.setdefault(key, {})["attention"] = choice.as_dict()
        for key, shares in self.sparsity.items():
            layers.setdefault(key, {})["sparsity"] = shares
        layers |= {key: {"condensed": condensed.as_dict()} for key, condensed in self.condensed.items()}
        result: dict[str, Any] = {"layers": layers, "budget": self.budget}
        extra: dict[str, Any] = {"drop_mtp": self.drop_mtp, "dropped": list(self.dropped), "converted": self.converted}
        extra["constants"] = self.constants
        return result | {key: value for key, value in extra.items() if value}


@dataclass(frozen=True)
class Decision:
    """A plan, and what is known of it besides.

    notes: what should be said aloud; findings: what was measured, for the report; announced: what must be known before
    the work begins, if nothing is refused.
    """

    plan: Plan
    notes: tuple[str, ...] = ()
    findings: dict[str, Any] = field(default_factory=dict)
    announced: str = ""


def command_of(source: str | Path | dict[str, Any]) -> str | None:
    """The command that a record names; nothing for a plan alone."""
    content = source if isinstance(source, dict) else load_json(_file(source))
    found = content.get("command")
    return found if isinstance(found, str) else None


def _file(source: str | Path) -> Path:
    """The record in a folder, or the file itself."""
    path = Path(source)
    folder = os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for names that are too long
    return path / "coterie.json" if folder else path


def read_plan(source: str | Path | dict[str, Any]) -> Plan:
    """A plan from a `coterie.json`, from its `plan` object alone, or from such a dictionary.

    Raises: CoterieError naming the layer and what is wrong with it.
    """
    if isinstance(source, dict):
        where, content = "plan", source
    else:
        where, content = str(source), load_json(_file(source))
    content = content.get("plan", content)
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, dict):
        raise CoterieError(f"{where}: no `layers` object; expected a coterie.json or its `plan`")
    known = {"layers", "budget", "drop_mtp", "dropped", "converted", "constants"}
    if set(content) - known:
        raise CoterieError(f"{where}: unknown keys {sorted(set(content) - known)}; expected {sorted(known)}")
    experts, attention, sparsity, condensed = {}, {}, {}, {}
    for key, value in layers.items():
        at = f"{where}: layer {key!r}"
        if not isinstance(value, dict):
            raise CoterieError(f"{at}: expected an object, found {value!r:.60}")
        if "condensed" in value:
            condensed[key] = _condensed(at, value)
            continue
        if set(value) - {"attention", "sparsity"}:
            experts[key] = _choice(at, {k: v for k, v in value.items() if k not in ("attention", "sparsity")})
        if "attention" in value:
            attention[key] = _choice(f"{at} (attention)", value["attention"])
        if "sparsity" in value:
            sparsity[key] = _shares(at, value["sparsity"])
    budget = content.get("budget", {})
    if not isinstance(budget, dict) or not isinstance(content.get("drop_mtp", False), bool):
        raise CoterieError(f"{where}: budget must be an object and drop_mtp a boolean")
    dropped, converted = content.get("dropped", []), content.get("converted")
    if not _ids(dropped) or list(dropped) != sorted(set(dropped)) or not isinstance(converted, str | None):
        raise CoterieError(f"{where}: dropped must be ascending layer numbers and converted a model type")
    constants = _source_of_constants(where, content.get("constants", {}))
    return Plan(
        experts, attention, budget, content.get("drop_mtp", False), sparsity, condensed, tuple(dropped), converted,
        constants,
    )  # fmt: skip


def _choice(at: str, value: Any) -> Choice:
    known = ("kept", "clusters", "merged", "shares", "aligned", "removed", "constants")
    if not isinstance(value, dict) or set(value) - set(known):
        raise CoterieError(f"{at}: expected the keys {', '.join(known)} and sparsity, found {value!r:.120}")
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
    shares, aligned = _means(at, value, clusters, merged)
    removed, constants = _removed(at, value, clusters)
    return Choice(tuple(kept), tuple(tuple(c) for c in clusters), merged, shares, aligned, removed, constants)


def _removed(at: str, value: dict[str, Any], clusters: list[Any]) -> tuple[str, str]:
    """What becomes of the removed experts' router rows, and the fingerprint of the constants in their place."""
    removed, constants = value.get("removed", "remove"), value.get("constants", "")
    if removed not in REMOVED:
        raise CoterieError(f"{at}: `removed` is {removed!r:.60}; expected one of {', '.join(REMOVED)}")
    if removed != "remove" and bool(clusters) != (removed == "alias"):
        raise CoterieError(f"{at}: `removed` is {removed!r}; alias needs `clusters`, and null and constant have none")
    is_hash = isinstance(constants, str) and len(constants) == 64 and set(constants) <= set("0123456789abcdef")
    if constants != "" and not (is_hash and removed == "constant"):
        raise CoterieError(
            f"{at}: `constants` is {constants!r:.80}; expected a SHA-256 beside `removed`: 'constant', or none"
        )
    return removed, constants


def _source_of_constants(where: str, value: Any) -> dict[str, Any]:
    """Where constants come from. Raises: CoterieError for anything but a path and weights."""
    given = value if isinstance(value, dict) else {"": value}
    weights = given.get("weights", {})
    numbers: list[Any] = list(weights.values()) if isinstance(weights, dict) else [None]
    known = not set(given) - {"stats", "weights"} and isinstance(given.get("stats"), str)
    if given and not (known and all(type(n) in (int, float) and 0 <= n < math.inf for n in numbers)):
        raise CoterieError(
            f"{where}: `constants` must say of which `stats` (a path) and with which `weights` of domains, found "
            f"{value!r:.120}"
        )
    return given


def _means(at: str, value: dict[str, Any], clusters: list[Any], merged: bool) -> tuple[tuple[Any, ...], bool]:
    """How merged experts are averaged: the members' shares, and whether their neurons are aligned."""
    shares, aligned = value.get("shares", []), value.get("aligned", False)
    if not isinstance(aligned, bool) or ((shares or aligned) and not merged):
        raise CoterieError(f"{at}: `shares` and `aligned` (a boolean) are of merged experts")
    if not isinstance(shares, list) or (shares and [len(c) for c in clusters] != _lengths(shares)):
        raise CoterieError(f"{at}: `shares` must give one number for every member of every cluster")
    numbers = [n for s in shares for n in s]
    if not all(type(n) in (int, float) and 0 <= n <= 1 for n in numbers) or any(abs(sum(s) - 1) > 1e-6 for s in shares):
        raise CoterieError(f"{at}: `shares` must be numbers from 0 to 1 that sum to 1 in every cluster")
    return tuple(tuple(map(float, s)) for s in shares), aligned


def _lengths(lists: list[Any]) -> list[int]:
    """Of lists; -1 for what is none."""
    return [len(found) if isinstance(found, list) else -1 for found in lists]


def _condensed(at: str, value: dict[str, Any]) -> Condensed:
    found = value["condensed"]
    if len(value) > 1 or not isinstance(found, dict) or set(found) - {"experts", "gates", "shared_gate"}:
        raise CoterieError(
            f"{at}: expected `condensed` alone, with the keys experts, gates and shared_gate, found {value!r:.120}"
        )
    experts, gates, shared = found.get("experts"), found.get("gates"), found.get("shared_gate", 1.0)
    if not isinstance(experts, list) or not _ids(experts) or len(set(experts)) != len(experts):
        raise CoterieError(f"{at}: `experts` must be distinct expert ids, found {experts!r:.120}")
    numbers: list[Any] = [*gates, shared] if isinstance(gates, list) else []
    if len(numbers) != len(experts) + 1 or not all(type(n) in (int, float) and abs(n) < LARGEST for n in numbers):
        raise CoterieError(f"{at}: `gates` must give one number per expert and `shared_gate` one, found {found!r:.120}")
    return Condensed(tuple(experts), tuple(map(float, numbers[:-1])), float(shared))


def _shares(at: str, value: Any) -> dict[str, float]:
    given = value if isinstance(value, dict) else {}
    if not given or not all(type(v) in (int, float) and 0 <= v <= 1 for v in given.values()):
        raise CoterieError(f"{at}: `sparsity` must give the share of zeros by tensor role, found {value!r:.120}")
    return {str(role): float(share) for role, share in given.items()}


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
