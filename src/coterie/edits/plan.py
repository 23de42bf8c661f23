"""Decisions as data: what `prune` and its sisters decide, and `apply` executes. JSON, so it can be read and edited.

A plan holds entries of several kinds. Whatever concerns one kind, from reading its entries to verifying what they made,
stands in one file of `kinds/` and is collected in a `Kind`; what concerns a whole plan is a loop over the kinds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from coterie.edits.kinds import modules
from coterie.errors import CoterieError
from coterie.model.layer import Model, MoE
from coterie.storage.checkpoint import Checkpoint, load_json
from coterie.storage.shards import Output

LEVELS = ("removed", "kept", "average of a cluster", "always on (condensed)")  # what may become of an expert
REMOVED, KEPT, MERGED, CONDENSED = range(len(LEVELS))


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
        """The choice as JSON, without what has its default."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {f.name: as_json(found[f.name]) for f in fields(self) if found[f.name] != f.default}


@dataclass(frozen=True)
class Condensed:
    """A MoE block that becomes one dense MLP: experts always on, each with a constant gate, beside the shared one.

    `gates[i]` belongs to `experts[i]`; `shared_gate` is 1 where nothing scales the shared expert, or there is none.
    """

    experts: tuple[int, ...]
    gates: tuple[float, ...]
    shared_gate: float = 1.0


@dataclass(frozen=True)
class Plan:
    """Choices per layer (and per layer with attention experts), what was asked for, and whether MTP layers go.

    sparsity: per layer, the share of weights that became zero, by tensor role; a record of what `sparsify` did.
    condensed: the layers that become dense; dropped: decoder layers that go, whole; converted: the model type to say
    the result in, where the model's own cannot.
    constants: where those of `Choice.removed` come from: {"stats": path, "weights": {domain: weight}}.
    entries: those of all other kinds, by their keys; of a key that stands in layers, by layer.
    """

    layers: dict[str, Choice]
    attention: dict[str, Choice] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    drop_mtp: bool = False
    sparsity: dict[str, dict[str, float]] = field(default_factory=dict)
    condensed: dict[str, Condensed] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()
    converted: str | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    entries: Mapping[str, Any] = field(default_factory=dict)

    @property
    def choices(self) -> dict[tuple[str, bool], Choice]:
        """All, by layer and whether they are of its attention experts."""
        found = {(key, False): choice for key, choice in self.layers.items()}
        return found | {(key, True): choice for key, choice in self.attention.items()}

    def choice(self, block: MoE) -> Choice | None:
        return (self.attention if block.attention else self.layers).get(block.key)

    def chosen(self, model: Model) -> Iterator[tuple[MoE, Choice]]:
        """The blocks with a choice, but for those that go whole with their prediction layer."""
        for block in model.moe:
            choice = self.choice(block)
            if choice and not (block.predicts and self.drop_mtp):
                yield block, choice

    def at(self, key: str) -> Any:
        """The entries under a key; nothing where there are none."""
        return getattr(self, key) if key in NAMED else self.entries.get(key, {})

    def as_dict(self) -> dict[str, Any]:
        layers = {key: choice.as_dict() for key, choice in self.layers.items()}
        for key, choice in self.attention.items():
            layers.setdefault(key, {})["attention"] = choice.as_dict()
        for name in (name for kind in kinds() for name in kind.layer.names):
            for key, entry in self.at(name).items():
                layers.setdefault(key, {})[name] = as_json(entry)
        whole = {name: as_json(self.at(name)) for kind in kinds() for name in kind.plan.names}
        return {"layers": layers, "budget": self.budget} | {name: value for name, value in whole.items() if value}


NAMED = {f.name for f in fields(Plan)}


def as_json(value: object) -> Any:
    """Tuples as lists, dataclasses as objects."""
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    if is_dataclass(value):
        return {f.name: as_json(getattr(value, f.name)) for f in fields(value)}
    return value


@dataclass(frozen=True)
class Decision:
    """A plan, and what is known of it besides.

    notes: what should be said aloud; findings: what was measured, for the report; announced: what must be known before
    the work begins, if nothing is refused; begun: whether OUT.partial holds what it was found by, and the plan follows
    from that.
    """

    plan: Plan
    notes: tuple[str, ...] = ()
    findings: dict[str, Any] = field(default_factory=dict)
    announced: str = ""
    begun: bool = False


# --- what a kind of entry is -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keys:
    """Keys of one JSON object that a kind owns. `read(where, object)` -> what each stands for; errors name `where`."""

    names: tuple[str, ...] = ()
    read: Callable[[str, Any], Mapping[str, object]] = lambda where, found: {}


@dataclass(frozen=True)
class Left:
    """How many experts of a block are stored afterwards, and how many its router chooses among."""

    stored: int  # 0: the layer goes, which config.json says last
    rows: int


@dataclass(frozen=True)
class Numbers:
    """A layer's key and an expert's number, as the name of a module has them; None: the name has no such number."""

    layer: str | None
    expert: int | None


@dataclass(frozen=True)
class Outcome:
    """What becomes of one layer's experts, numbered as before the plan.

    key, moved: the layer's, before and afterwards. levels: indices into LEVELS, of the experts that are not removed.
    routed: those that its router names afterwards, in their new order; none where it has no router then.
    """

    key: str
    moved: str
    num_experts: int
    levels: Mapping[int, int]
    routed: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """A written checkpoint, the options of the command that wrote it, and its tensors whose exact bytes are lost."""

    checkpoint: Checkpoint
    options: Mapping[str, object]
    lost: Set[str]


@dataclass(frozen=True)
class Verified:
    """What a kind found of the tensors that cannot be compared byte for byte with what is computed again.

    tensors: those that it looked at. differing: those of them with other bytes than recorded. added: those beyond the
    original's.
    """

    tensors: Set[str] = frozenset()
    differing: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    added: Set[str] = frozenset()
    note: str = ""


Outputs = dict[str, tuple[Output, ...]]  # source tensor -> what stands in its place


@dataclass(frozen=True)
class Kind:
    """One kind of entry. Every part is called for every plan, and has nothing to do where that has no such entry.

    order: in which kinds are read, written and executed, from the lowest; those of one order by name. What a later kind
    makes counts. Checks go from the last to the first: the later kind knows which others it excludes.
    block: keys of a `Choice`. layer: keys beside it in the layer's object. plan: keys of the whole plan.
    check: raises CoterieError for entries that do not fit the model, or exclude others that the plan has.
    seal: the plan with what is filled in when it is executed. Raises: CoterieError for what could not be loaded.
    leave: takes away the experts that go, or the whole block, in `left` (in place).
    outputs: source tensor -> what stands in its place, given what the kinds before made; others stay as they are.
    patch: says in `config` (in place) what changed.
    renumber: the numbers that a layer and an expert have afterwards; None where they go.
    count: corrects `counts` (in place): parameters of the outputs on the bases of `counts.py`, as their shapes say.
    trace: what becomes of a layer's experts, given what became of them by the kinds before.
    agree: raises CoterieError where the blocks that a written checkpoint has are not those that the plan leaves.
    verify: of tensors that are not to be computed again from the source, whether they are as they should be.
    unlike: why the written model's logits cannot be compared with the original's; "" where they can.
    """

    order: int = 100
    block: Keys = Keys()
    layer: Keys = Keys()
    plan: Keys = Keys()
    check: Callable[[Model, Plan], None] = lambda model, plan: None
    seal: Callable[[Model, Plan], Plan] = lambda model, plan: plan
    leave: Callable[[Plan, dict[MoE, Left]], None] = lambda plan, left: None
    outputs: Callable[[Model, Plan, Outputs], Outputs] = lambda model, plan, made: {}
    patch: Callable[[dict[str, Any], Model, Plan], None] = lambda config, model, plan: None
    renumber: Callable[[Model, Plan, Numbers], Numbers | None] = lambda model, plan, old: old
    count: Callable[[Model, Plan, dict[str, int]], None] = lambda model, plan, counts: None
    trace: Callable[[Plan, Outcome], Outcome] = lambda plan, before: before
    agree: Callable[[tuple[MoE, ...], Plan], None] = lambda blocks, plan: None
    verify: Callable[[Written, Model, Plan], Verified] = lambda written, source, plan: Verified()
    unlike: Callable[[Plan], str] = lambda plan: ""


@cache
def kinds() -> tuple[Kind, ...]:
    """All kinds, in their order."""
    return tuple(sorted((module.KIND for module in modules()), key=lambda kind: kind.order))


# --- reading -----------------------------------------------------------------------------------------------------


def command_of(source: str | Path | Mapping[str, Any]) -> str | None:
    """The command that a record names; nothing for a plan alone."""
    content = source if isinstance(source, Mapping) else load_json(_file(source))
    found = content.get("command")
    return found if isinstance(found, str) else None


def _file(source: str | Path) -> Path:
    """The record in a folder, or the file itself."""
    path = Path(source)
    folder = os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for names that are too long
    return path / "coterie.json" if folder else path


def read_plan(source: str | Path | Mapping[str, Any]) -> Plan:
    """A plan from a `coterie.json`, from its `plan` object alone, or from such a dictionary.

    Raises: CoterieError naming the layer and what is wrong with it.
    """
    if isinstance(source, Mapping):
        where, content = "plan", source
    else:
        where, content = str(source), load_json(_file(source))
    content = content.get("plan", content)
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, dict):
        raise CoterieError(f"{where}: no `layers` object; expected a coterie.json or its `plan`")
    known = {"layers", "budget"}.union(*(kind.plan.names for kind in kinds()))
    if set(content) - known:
        raise CoterieError(f"{where}: unknown keys {sorted(set(content) - known)}; expected {sorted(known)}")
    found: dict[str, Any] = {"layers": {}, "budget": content.get("budget", {})}
    for key, value in layers.items():
        for name, entry in _layer(f"{where}: layer {key!r}", value):
            found.setdefault(name, {})[key] = entry
    if not isinstance(found["budget"], dict):
        raise CoterieError(f"{where}: budget must be an object and drop_mtp a boolean")
    for kind in kinds():
        found |= kind.plan.read(where, content)
    named = {name: found.pop(name) for name in NAMED & found.keys()}
    return Plan(**named, entries=found)


def _layer(at: str, value: Any) -> Iterator[tuple[str, object]]:
    """(attribute or key of the plan, entry) of all that a layer's object holds."""
    if not isinstance(value, dict):
        raise CoterieError(f"{at}: expected an object, found {value!r:.60}")
    for kind in reversed(kinds()):
        if value.keys() & set(kind.layer.names):
            yield from kind.layer.read(at, value).items()
    beside = {"attention"}.union(*(kind.layer.names for kind in kinds()))
    if value.keys() - beside:
        yield "layers", _choice(at, {key: found for key, found in value.items() if key not in beside})
    if "attention" in value:
        yield "attention", _choice(f"{at} (attention)", value["attention"])


def _choice(at: str, value: Any) -> Choice:
    known = [name for kind in kinds() for name in kind.block.names]
    if not isinstance(value, dict) or set(value) - set(known):
        raise CoterieError(f"{at}: expected the keys {', '.join(known)} and sparsity, found {value!r:.120}")
    found: dict[str, Any] = {}
    for kind in kinds():
        found |= kind.block.read(at, value)
    return Choice(**found)


def are_ids(value: Any) -> bool:
    """Whether it is a list of whole numbers from 0 on."""
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
