"""The MoE blocks of a checkpoint in canonical form: which tensor is what (`experts.py` reads their matrices).

Axes: L layer, E expert, K top-k, T token, D hidden, F expert hidden, O/I out/in.
`find_blocks` claims every tensor of a checkpoint by exactly one rule of its family, or refuses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from coterie.codecs.open import opened
from coterie.errors import CoterieError
from coterie.model.alike import check_alike
from coterie.model.counts import check_counts
from coterie.model.family import NUM_LAYERS, Config, Family, Layout, detect, whole_number
from coterie.model.own import OwnLayout, own_layout
from coterie.storage.checkpoint import Checkpoint

LAYER = re.compile(r"(?P<prefix>(?:.+?\.)?(?:layers|blocks)\.(?P<index>[0-9]{1,6})\.)(?P<rest>.+)", re.DOTALL)
MTP = re.compile(r"(^|[._])(mtp|nextn)")
CONSTANTS = "constants"  # of our own layout, under the experts' name
EXPERT_LIKE = re.compile(r"(^|[._])(experts?|router)([._]|$)")
MAX_ROUTER = 2**29  # bytes; routers are read whole, and the largest have 11 MB
ROLES = ("expert", "constant", "shared", "router", "row", "table", "other")


@dataclass(frozen=True, eq=False)  # compared and hashed as the one block it is
class MoE:
    """One MoE block: the names of its tensors by role. Exactly one of `experts` and `fused` is filled."""

    key: str  # of the layer in plans: "3", "mtp.0", or "talker.3"
    attention: bool  # the block is made of attention experts
    mtp: bool  # of a multi-token-prediction layer, or of a second model: stock inference of text leaves them out
    prefix: str  # "model.layers.3."
    layout: Layout
    num_experts: int
    num_zero: int  # rows of the router, after the experts', that lead to the identity
    router: str
    rows: tuple[str, ...]
    tables: tuple[str, ...]
    experts: tuple[dict[str, str], ...]  # per expert: "gate_proj.weight" -> full name
    fused: tuple[str, ...]
    shared: tuple[str, ...]
    whole: tuple[str, ...] = ()
    unused: tuple[dict[str, str], ...] = ()  # what may be stored for identity experts, which compute nothing with it
    routes: tuple[int, ...] = ()  # the stored expert that each router row leads to, -1 for none; (): one row for each
    constants: str | None = None  # (R, D): what the R rows that lead to none give instead

    @property
    def num_rows(self) -> int:
        """How many experts the router knows."""
        return len(self.routes) or self.num_experts + self.num_zero

    @property
    def aside(self) -> bool:
        """Whether the block is of a second model beside the one that writes text."""
        return not self.key.isdecimal() and not self.key.startswith("mtp.")

    @property
    def predicts(self) -> bool:
        """Whether the block is of a multi-token-prediction layer."""
        return self.mtp and not self.aside

    @property
    def first(self) -> int:
        """The number that files give the first expert."""
        return self.layout.segment[0] * self.num_experts

    @property
    def zero_rows(self) -> range:
        """The rows of the router that lead to the identity, which stay whatever goes."""
        return range(self.num_experts, self.num_experts + self.num_zero)

    @property
    def stack(self) -> str:
        """What stands before the layer's number: "model.layers"."""
        return stack_of(self.prefix)

    @property
    def name(self) -> str:
        return f"layer {self.key}" + (" (attention)" if self.attention else "")


@dataclass(frozen=True)
class Model:
    """A checkpoint understood: its family, its MoE blocks in order, and every tensor's role."""

    checkpoint: Checkpoint
    family: Family
    moe: tuple[MoE, ...]
    roles: dict[str, str] = field(repr=False)

    @property
    def main(self) -> list[MoE]:
        """The blocks of ordinary layers: neither attention experts nor multi-token prediction."""
        return [b for b in self.moe if not b.mtp and not b.attention]

    @classmethod
    def open(cls, model: str | Path) -> Model:
        """MODEL, a folder or a hub id. Raises: CoterieError for what is damaged, dense, unknown or not whole."""
        return cls.of(Checkpoint.open(model))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Model:
        """A checkpoint that is open already, or a view of one. Raises: CoterieError as `open`."""
        checkpoint = opened(checkpoint)
        found = find_blocks(checkpoint, detect(checkpoint.config, list(checkpoint.tensors)))
        if main := found.main:
            same = [block for block in main if block.stack == main[0].stack]
            check_counts(
                checkpoint, found.family, main[0].stack, sparse=[_order(block.key) for block in same],
                rows=min(block.num_rows for block in same), expert=_matrices(main[0]),
            )  # fmt: skip
        return found


def find_blocks(checkpoint: Checkpoint, family: Family) -> Model:
    """Claims every tensor by one rule. Raises: CoterieError for an unclaimed one, or a block that is not whole."""
    found: list[MoE] = []
    own = own_layout(checkpoint.config)
    roles: dict[str, str] = {}
    for prefix, names in _by_layer(checkpoint).items():
        blocks = []
        for attention, layouts in ((False, family.layouts), (True, family.attention), (False, family.within)):
            layout = _layout(layouts, names) if prefix else None
            if layout:
                settled = _settled(checkpoint, layout, names)
                blocks.append(_block(checkpoint, family, own, prefix, settled, names, attention))
                _check_block(checkpoint, blocks[-1])
        roles |= _claim(family, blocks, names)
        found += blocks
    seen: dict[tuple[str, bool], MoE] = {}
    for block in found:
        twin = seen.setdefault((block.key, block.attention), block)
        if twin is not block:
            raise CoterieError(
                f"{checkpoint.path}: {twin.prefix!r} and {block.prefix!r} are both {block.name}; expected each once"
            )
    if all(block.mtp for block in found):
        raise CoterieError(
            f"{checkpoint.path}: no layer has a router named like {family.layouts[0].router!r}; "
            f"a dense model, or a spelling that family {family.name} does not know"
        )
    return Model(checkpoint, family, tuple(sorted(found, key=lambda b: (b.mtp, _order(b.key), b.attention))), roles)


def _by_layer(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Layer prefix -> the layer's tensors (relative name -> full name); "" holds what stands outside layers."""
    layers: dict[str, dict[str, str]] = {}
    for name in checkpoint.tensors:
        match = LAYER.fullmatch(name)
        layers.setdefault(match["prefix"] if match else "", {})[match["rest"] if match else name] = name
    return layers


def _layout(layouts: tuple[Layout, ...], names: dict[str, str]) -> Layout | None:
    """The spelling whose router stands in the layer; of several that name it alike, the one whose experts do."""
    fits = [layout for layout in layouts if layout.router in names]
    for layout in fits if len(fits) > 1 else ():
        if any(rest.startswith((f"{layout.experts}0.", *layout.fused)) for rest in names):
            return layout
    return fits[0] if fits else None


def _settled(checkpoint: Checkpoint, layout: Layout, names: dict[str, str]) -> Layout:
    """The layout with `transposed` decided where files may hold either: down is (E, F, D) then, else (E, D, F)."""
    if layout.transposed is not None:
        return layout
    down = names.get(layout.fused[-1])
    shape = checkpoint.tensors[down].shape if down else ()
    size = checkpoint.tensors[names[layout.router]].shape[-1]
    return replace(layout, transposed=len(shape) == 3 and shape[1] != size == shape[2])


def _claim(family: Family, blocks: list[MoE], names: dict[str, str]) -> dict[str, str]:
    """The role of every tensor of a layer. Raises: CoterieError for an expert-like one that no rule claims."""
    roles: dict[str, str] = {}
    for block in blocks:
        roles |= _claims(block)
    below = tuple(b for block in blocks for b in block.layout.blocks)
    for rest, name in names.items():
        if name in roles:
            continue
        if below and rest.startswith(below):
            raise CoterieError(
                f"tensor {name!r} stands in a MoE block, but no rule of family {family.name} claims it; "
                "refusing to guess: report it, or add it to the family's record"
            )
        if EXPERT_LIKE.search(rest) and "shared" not in rest:
            raise CoterieError(
                f"tensor {name!r} is named like an expert's or a router's, but belongs to no MoE block that family "
                f"{family.name} knows; refusing to skip it"
            )
        roles[name] = "other"
    return roles


def _order(key: str) -> int:
    return int(key.rpartition(".")[2])


def _block(
    checkpoint: Checkpoint,
    family: Family,
    own: OwnLayout,
    prefix: str,
    layout: Layout,
    names: dict[str, str],
    attention: bool,
) -> MoE:
    """Sorts a layer's tensors (`names`: relative -> full) into the block's roles."""
    index = int(LAYER.fullmatch(prefix + "x")["index"])  # type: ignore[index]
    aside = bool(family.side) and (prefix.startswith(family.side) or layout in family.within)
    key = f"{family.side if aside else 'mtp.' if MTP.search(prefix) else ''}{index}"
    num_experts = own.counts.get(key) or family.num_experts(checkpoint.config, index)
    num_zero = whole_number(checkpoint.config, (family.zero_count,), 0)
    experts = _numbered(layout, names, num_experts + num_zero)
    numbered = {name for expert in experts for name in expert.values()}
    named: dict[str, list[str]] = {"fused": [], "shared": [], "whole": [], "": []}
    for rest, name in names.items():
        if name not in numbered:
            named[_role(layout, rest)].append(name)
    routes = () if attention else own.routes.get(key, ())
    return MoE(
        key=key,
        attention=attention,
        mtp=aside or is_mtp(prefix + "x", checkpoint.config),
        prefix=prefix,
        layout=layout,
        num_experts=num_experts,
        num_zero=num_zero,
        router=names[layout.router],
        rows=tuple(names[row] for row in layout.rows if row in names),
        tables=tuple(names[table] for table in layout.tables if table in names),
        experts=experts[:num_experts],
        unused=experts[num_experts:],
        fused=tuple(named["fused"]),
        shared=tuple(named["shared"]),
        whole=tuple(named["whole"]),
        routes=routes,
        constants=names.get(f"{layout.experts}{CONSTANTS}") if routes else None,
    )


def _numbered(layout: Layout, names: dict[str, str], num_experts: int) -> tuple[dict[str, str], ...]:
    """The tensors of each expert that is stored under its number; () where none is.

    Raises: CoterieError for a number beyond the last, of all stacks that share the list.
    """
    which, stacks = layout.segment
    lists = "|".join(re.escape(name) for name in layout.lists)
    pattern = re.compile(re.escape(layout.experts) + rf"((?:{lists})\.)?(\d{{1,6}})\.(.+)", re.DOTALL)
    experts: list[dict[str, str]] = [{} for _ in range(num_experts)]
    for rest, name in names.items():
        if match := pattern.fullmatch(rest):
            stack, number = divmod(int(match[2]), num_experts)
            if stack >= stacks or match[2] != str(int(match[2])):
                counted = f"{num_experts} experts" + (f" in each of {stacks} stacks" if stacks > 1 else "")
                raise CoterieError(f"tensor {name!r}: expert {match[2]}, but the config counts {counted}")
            if stack == which:
                experts[number][(match[1] or "") + match[3]] = name
    return tuple(experts) if any(experts) else ()


def _role(layout: Layout, name: str) -> str:
    """Which of a block's lists a tensor without an expert's number stands in; "" for none."""
    if layout.is_fused(name):
        return "fused"
    if name.startswith(layout.shared):
        return "shared"
    return "whole" if name.startswith(layout.whole) else ""


def _matrices(block: MoE) -> list[str]:
    """The weights of the first expert, or of all in one."""
    if block.experts:
        return [name for part, name in block.experts[0].items() if part.removesuffix(".weight") in block.layout.parts]
    return [name for name in block.fused if name.removeprefix(block.prefix) in block.layout.fused]


def expert_names(block: MoE) -> list[str]:
    """Every tensor of the routed experts."""
    return [name for expert in block.experts for name in expert.values()] + list(block.fused)


def unused_names(block: MoE) -> list[str]:
    """Every tensor of the identity experts."""
    return [name for expert in block.unused for name in expert.values()]


def _claims(block: MoE) -> dict[str, str]:
    claims = [(block.router, "router"), *((n, "row") for n in block.rows), *((n, "table") for n in block.tables)]
    claims += [(n, "expert") for n in expert_names(block)]
    claims += [(block.constants, "constant")] if block.constants else []
    claims += [(n, "other") for n in unused_names(block)]
    claims += [(n, "shared") for n in block.shared] + [(n, "other") for n in block.whole]
    assert len({n for n, _ in claims}) == len(claims), f"{block.name}: a tensor claimed twice"
    return dict(claims)


def _check_block(checkpoint: Checkpoint, block: MoE) -> None:
    """The block is whole: one spelling, all experts alike, one router row and one entry of each kind per expert."""
    where = f"{checkpoint.path}: {block.name}"
    tensors, num_experts = checkpoint.tensors, block.num_experts
    if bool(block.experts) == bool(block.fused):
        fault = "experts both fused and by number" if block.fused else "a router but no experts"
        raise CoterieError(f"{where}: found {fault}; expected one of the two spellings")
    check_alike(where, block.layout, block.experts, tensors)
    held, weights = stacked(checkpoint, block), {block.prefix + name for name in block.layout.fused}
    for name in block.fused:
        shape = tensors[name].shape
        odd = name in weights and block.num_zero and shape[:1] != (num_experts,)
        if odd or (name not in held and (name in weights or shape[:1] not in ((), (1,)))):
            raise CoterieError(f"{where}: {name!r} has shape {list(shape)}, which {num_experts} experts cannot share")
    for name in (block.router, *block.rows, *block.tables):
        if not 0 < tensors[name].num_bytes <= MAX_ROUTER:
            raise CoterieError(f"{where}: {name!r} has {tensors[name].num_bytes:,} bytes; expected 1 to {MAX_ROUTER:,}")
    for name in (block.router, *block.rows):
        shape = tensors[name].shape
        if expert_axis(block, name, shape) is None:
            raise CoterieError(f"{where}: {name!r} has shape {list(shape)}; the config counts {block.num_rows} experts")
    if block.constants and tensors[block.constants].shape[:1] != (block.routes.count(-1),):
        found, gone = list(tensors[block.constants].shape), block.routes.count(-1)
        raise CoterieError(f"{where}: {block.constants!r} has shape {found}; {gone} router rows lead to no expert")


def stacked(checkpoint: Checkpoint, block: MoE) -> list[str]:
    """The fused tensors that hold something of every expert; the others, such as static scales, serve all of them."""
    lengths = ((name, checkpoint.tensors[name].shape[:1]) for name in block.fused)
    return [name for name, length in lengths if length and length[0] > 0 and length[0] % block.num_experts == 0]


def has_routers(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether any layer has a router; none has where every layer was condensed."""
    rest = {match["rest"] for name in checkpoint.tensors if (match := LAYER.fullmatch(name))}
    return not rest.isdisjoint(layout.router for layout in family.layouts)


def mtp_names(model: Model) -> list[str]:
    """All tensors of the multi-token-prediction layers, with what stands beside them (`mtp.fc.weight`)."""
    stacks = {block.stack for block in model.moe if not block.mtp}  # other stacks, such as vision, are longer
    found = []
    for name in model.checkpoint.tensors:
        match = LAYER.fullmatch(name)
        beyond = match is not None and stack_of(match["prefix"]) in stacks
        if is_mtp(name, model.checkpoint.config if beyond else {}):
            found.append(name)
    return found


def stack_of(prefix: str) -> str:
    """`model.layers` of a layer's prefix `model.layers.3.`."""
    return prefix.rstrip(".").rpartition(".")[0]


def is_mtp(name: str, config: Config) -> bool:
    """Whether a tensor, by its name or by a layer index beyond the config's count, belongs to such a layer."""
    if MTP.search(name):
        return True
    match = LAYER.fullmatch(name)
    return match is not None and 0 < whole_number(config, NUM_LAYERS, 0) <= int(match["index"])


def expert_axis(block: MoE, name: str, shape: tuple[int, ...]) -> int | None:
    """The axis that counts experts, of the router or one of `rows`.

    Everything before it has length 1 (so that rows are byte ranges), but in routers that are (in, out), and in rows
    that stacks share: (stacks, experts).
    """
    if is_columns(block, name) or shared_by(block, name) > 1:
        expected = (shape[0] if is_columns(block, name) else shared_by(block, name), block.num_rows) if shape else ()
        return 1 if shape == expected else None
    for axis, length in enumerate(shape):
        if length == block.num_rows:
            return axis
        if length != 1:
            return None
    return None


def is_columns(block: MoE, name: str) -> bool:
    """Whether a tensor is a router with a column for each expert."""
    return block.layout.columns and name == block.router


def shared_by(block: MoE, name: str) -> int:
    """Of how many stacks a tensor of `rows` has a row; 1 for all others."""
    return block.layout.segment[1] if name in block.rows else 1
