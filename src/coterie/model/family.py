"""What Coterie knows about model families: data, one record per family, one file per group that agrees.

A `Family` says by which names a checkpoint keeps its routers, experts and shared experts, under which keys
its config counts them, and what its routing demands. Code elsewhere never asks for a model's name.
To add a family, add a file to `families/` (see CONTRIBUTING.md); the tests find it by themselves.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from coterie.errors import CoterieError

MAX_EXPERTS = 8192  # of a layer; some methods hold a number for every pair
Config = Mapping[str, object]  # of config.json, to be read
TEXTS = ("text_config", "language_config", "llm_config")  # of the text model inside another
MODELS = ("thinker_config", "talker_config")  # of two models in one
NUM_LAYERS = ("num_hidden_layers", "n_layers", "num_layers")
LAYER_LISTS = ("layers_block_type",)  # what stands in their place


@dataclass(frozen=True)
class Layout:
    """Where one spelling of a family keeps the tensors of a MoE block; names are relative to `...layers.N.`.

    `experts` is followed by an expert's number: everything below it belongs to that expert. `fused` tensors
    hold all experts along their first axis (dbrx: E blocks of rows), with any suffix such as `_bias`.
    `rows` hold one entry per expert beside the router: biases, scales. `tables` map tokens to expert ids.
    Every tensor below one of `blocks` must be claimed by one of these rules. The names given here are what most
    families use.
    """

    blocks: tuple[str, ...]
    router: str = "gate.weight"
    experts: str = "experts."
    rows: tuple[str, ...] = ()
    fused: tuple[str, ...] = ("experts.gate_up_proj", "experts.down_proj")
    shared: tuple[str, ...] = ("shared_expert.", "shared_experts.", "shared_expert_gate.")
    tables: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()  # belongs to the block but not to any expert: kept as it is
    gate: str | None = "gate_proj"  # None: the experts have no gate
    up: str = "up_proj"
    down: str = "down_proj"
    transposed: bool | None = False  # fused matrices are (E, in, out); None: as shapes say, both are published
    transposed_down: bool = False  # of three fused matrices, down is (F, D) as gate and up are
    lists: tuple[str, ...] = ()  # of gate and up in one, and of down, each expert's by number: `experts.LIST.3.weight`
    interleaved: bool = False  # gate and up alternate along the output axis instead of standing side by side
    columns: bool = False  # the router is (in, out): an expert is a column
    segment: tuple[int, int] = (0, 1)  # of stacks that share one list of experts, and `rows`: which, of how many

    @classmethod
    def under(cls, block: str, **changes: Any) -> Layout:
        """A layout whose names all stand below `block`."""

        def below(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(block + name for name in names)

        named = cls((block,), **changes)
        return replace(
            named,
            router=block + named.router,
            experts=block + named.experts,
            rows=below(named.rows),
            fused=below(named.fused),
            shared=below(named.shared),
            tables=below(named.tables),
            whole=below(named.whole),
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of an expert's matrices: gate, where there is one, up and down; or its places in the lists."""
        return self.lists or tuple(part for part in (self.gate, self.up, self.down) if part)

    def expert(self, e: int, key: str) -> str:
        """The name of a tensor of the expert that files number e, called `key` of each."""
        part, _, rest = key.partition(".")
        return f"{self.experts}{part}.{e}.{rest}" if part in self.lists else f"{self.experts}{e}.{key}"

    def is_fused(self, name: str) -> bool:
        """Whether a tensor holds all experts, or something beside one that does."""
        return any(name == fused or name.startswith((f"{fused}_", f"{fused}.")) for fused in self.fused)


GATED = ("gate_proj", "up_proj", "down_proj")  # how most files name a SwiGLU MLP's matrices


@dataclass(frozen=True)
class Dense:
    """How a stock config says which decoder layers are dense, and where such a layer keeps its SwiGLU MLP.

    kind: "ids" (a list of the dense layers' indices), "others" (a list of all other layers' indices), "types" ("dense"
    or "sparse" for every layer), or "prefix" (how many of the first layers are dense). One width, under `width`, serves
    all dense layers of a model.
    """

    kind: str
    key: str
    mlp: str = "mlp."  # relative to `...layers.N.`
    names: tuple[str, str, str] = GATED
    width: str = "intermediate_size"


@dataclass(frozen=True)
class PerLayer:
    """Under which keys configs say something of each decoder layer. Keys with dots are nested.

    entries: a list with an entry for each layer, a string with a letter for each, or an object by layer number; what
    stands behind the decoder's is of prediction layers. numbers: of some layers, from 0; ordinals: the same from 1.
    leading: how many of the first layers; last: the number of a last one. periods: how often a kind comes again.
    Families spell alike what they say at all, so that one record serves those that need no other.
    """

    entries: tuple[str, ...] = (
        "layer_types", "mlp_layer_types", "layers_block_type", "layer_block_type", "hybrid_override_pattern",
        "hybrid_layer_pattern", "attn_type_list", "indexer_types", "index_topk_pattern", "compress_ratios",
        "moe_layer_freq", "no_rope_layers", "layer_rope_theta", "num_attention_heads_per_layer", "per_layer_config",
        "moe_intermediate_size", "num_shared_expert",
    )  # fmt: skip
    numbers: tuple[str, ...] = ("mlp_only_layers", "moe_layers", "moe_layers_enum", "full_attn_idxs")
    ordinals: tuple[str, ...] = ("linear_attn_config.full_attn_layers", "linear_attn_config.kda_layers")
    leading: tuple[str, ...] = (
        "first_k_dense_replace", "num_dense_layers", "num_hash_layers", "moe_layer_start_index",
    )  # fmt: skip
    last: tuple[str, ...] = ("moe_layer_end_index",)
    periods: tuple[str, ...] = (
        "decoder_sparse_step", "moe_layer_freq", "moe_layer_frequency", "expert_layer_period", "attn_layer_period",
        "interleave_moe_layer_step", "moe_layer_interval", "sliding_window_pattern", "full_attention_interval",
    )  # fmt: skip


@dataclass(frozen=True)
class RoutingGroups:
    """Group-limited routing: experts stand in `num_groups` equal groups, of which the best `top_groups` compete."""

    num_groups: int
    top_groups: int
    min_per_group: int


@dataclass(frozen=True)
class Family:
    """One or more `model_type`s that agree on names, config keys and routing. Keys with dots are nested.

    A list under `count` or `top_k` stands for one number if all entries are equal; for one of each decoder layer where
    `per_layer` says so.
    """

    model_types: tuple[str, ...]
    layouts: tuple[Layout, ...] = (Layout.under("mlp."),)
    attention: tuple[Layout, ...] = ()  # of families whose attention has experts of its own
    count: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    top_k: tuple[str, ...] = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")
    group_keys: tuple[str, str] = ("n_group", "topk_group")
    min_per_group: int = 2  # sigmoid routers score a group by the sum of its two best
    group_switch: tuple[str, str] | None = None  # (key, value): groups matter only under this setting
    zero_count: str = ""  # key of how many experts are the identity: router rows after those of the stored ones
    mtp_count: tuple[str, ...] = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
    per_layer: bool = False  # counts and top-k may differ from layer to layer
    side: str = ""  # where a second model with experts stands: "talker."; layer 3 of it is "talker.3" in plans
    within: tuple[Layout, ...] = ()  # where that second model's experts stand in the same layers
    stock: bool = True  # transformers has a class for it
    layers: PerLayer = PerLayer()
    dense: Dense | None = None  # None: its config cannot say that some layers are dense

    @property
    def name(self) -> str:
        return self.model_types[0]

    def num_experts(self, config: Config, layer: int | None = None) -> int:
        """The routed experts of a layer; without one, the most of any.

        Raises: CoterieError when no key says, or two models inside differ.
        """
        found = [self._positive(scope, self.count, layer) for scope in self._models(config)]
        if len(set(found)) > 1:
            counts = f"{found[0]} experts in one model, {found[1]} in {self.side!r}"
            raise CoterieError(f"config.json ({self.name}): {counts}; expected as many in both")
        return found[0]

    def num_experts_per_token(self, config: Config, layer: int | None = None) -> int:
        """Top-k of a layer; without one, the largest, of two models too. Raises: CoterieError when no key says."""
        return max(self._positive(scope, self.top_k, layer) for scope in self._models(config))

    def _models(self, config: Config) -> list[Config]:
        """The config, or those of the two models inside."""
        inside = [config[key] for key in MODELS if self.side and key in config]
        return [scope for scope in inside if isinstance(scope, dict)] or [config]

    def lists(self, config: Config, keys: tuple[str, ...]) -> bool:
        """Whether the config gives one of these numbers for each layer."""
        return self.per_layer and any(isinstance(value, list) for _, _, value in lookup(config, keys))

    def _positive(self, config: Config, keys: tuple[str, ...], layer: int | None = None) -> int:
        said = {key: value for key, _, value in lookup(config, keys) if value is not None}
        if not said:
            raise CoterieError(f"config.json ({self.name}): none of the keys {', '.join(keys)}; expected one of them")
        found = [self._of_layer(value, layer) for value in said.values()]
        value = found[0]
        if type(value) is not int or not 0 < value <= MAX_EXPERTS or found.count(value) < len(found):
            expected = "one positive integer" + (" for each layer" if self.per_layer else "")
            raise CoterieError(f"config.json ({self.name}): expected {expected}, found {said!r:.200}")
        return value

    def _of_layer(self, value: object, layer: int | None) -> object:
        """What a list stands for: its equal entries, a layer's, or the largest; anything else as it is."""
        if not isinstance(value, list) or not value or not all(type(n) is int for n in value):
            return value
        if len(set(value)) == 1:
            return value[0]
        if not self.per_layer or (layer or 0) >= len(value):
            return value
        return max(value) if layer is None else value[layer]

    def groups(self, config: Config) -> RoutingGroups:
        """The routing groups; one group of all experts where the family or the config knows none."""
        if self.group_switch:
            key, value = self.group_switch
            if next((v for _, _, v in lookup(config, (key,))), None) != value:
                return RoutingGroups(1, 1, 1)
        num_groups, top_groups = (whole_number(config, (key,), 1) for key in self.group_keys)
        if num_groups <= 1:
            return RoutingGroups(1, 1, 1)
        if self.num_experts(config) % num_groups or top_groups < 1:
            raise CoterieError(
                f"config.json ({self.name}): {self.num_experts(config)} experts in {num_groups} routing groups, of "
                f"which {top_groups} compete; expected equal groups and at least one"
            )
        return RoutingGroups(num_groups, top_groups, self.min_per_group)


def lookup(config: Config, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Every place where one of `keys` stands, as (key, the dictionary holding it, value): top level first,
    then the nested text config of multimodal wrappers."""
    models = [config, *(config[n] for n in MODELS if n in config)]
    scopes = [s for m in models if isinstance(m, dict | Mapping) for s in (m, *(m[n] for n in TEXTS if n in m))]
    for scope in scopes:
        for key in keys:
            *path, last = key.split(".")
            holder: Any = scope
            for part in path:
                holder = holder.get(part) if isinstance(holder, dict) else None
            if isinstance(holder, dict) and last in holder:
                yield key, holder, holder[last]


def whole_number(config: Config, keys: tuple[str, ...], default: int) -> int:
    """The first whole number that stands under one of the keys."""
    return next((value for _, _, value in lookup(config, keys) if type(value) is int), default)


def num_layers(config: Config) -> int:
    """Decoder layers, from the config. Raises: CoterieError when no key says."""
    for _, _, value in lookup(config, (*NUM_LAYERS, *LAYER_LISTS)):
        if type(value) is int or (isinstance(value, list) and value):
            return value if isinstance(value, int) else len(value)
    raise CoterieError(f"config.json: none of the keys {', '.join(NUM_LAYERS)}; expected the number of layers")


@cache
def registry() -> dict[str, Family]:
    """Every known family by `model_type`, collected from the files of `coterie.model.families`."""
    package = importlib.import_module("coterie.model.families")
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(package.__path__):
        for family in importlib.import_module(f"coterie.model.families.{module.name}").FAMILIES:
            for model_type in family.model_types:
                assert model_type not in found, f"two records for {model_type}"
                found[model_type] = family
    return found


def unable(config: Config, what: str) -> str:
    """The model type, if its layers are built so that `what` (see `families.UNABLE`) cannot be; else nothing."""
    types = importlib.import_module("coterie.model.families").UNABLE[what]
    return next((str(v) for _, _, v in lookup(config, ("coterie.model_type", "model_type")) if v in types), "")


def names_experts(names: Iterable[str]) -> bool:
    """Whether any tensor's name is of a mixture of experts; else the model is dense, of whatever family."""
    return any(re.search(r"experts?\b|router|moe", name) for name in names)


def detect(config: Config, names: Collection[str] = ()) -> Family:
    """The family of a checkpoint. Raises: CoterieError for a dense or an unknown one."""
    types = [v for _, _, v in lookup(config, ("coterie.model_type", "model_type")) if isinstance(v, str)]
    for model_type in types:
        if model_type in registry():
            return registry()[model_type]
    shown = repr(types[0])[:60] if types else "no model_type"
    if names and not names_experts(names):
        raise CoterieError(
            f"config.json: {shown} is dense (no tensor of an expert); expected a mixture-of-experts model"
        )
    reasons = importlib.import_module("coterie.model.families").NO_FAMILY
    if reason := next((reasons[model_type] for model_type in types if model_type in reasons), None):
        raise CoterieError(f"config.json: {shown} is no family of ours: {reason}")
    near = difflib.get_close_matches(types[0][:60], registry(), n=3, cutoff=0.3) if types else []
    hint = f"; the nearest known ones are {', '.join(near)}" if near else ""
    raise CoterieError(
        f"config.json: {shown} is not a family we know{hint}. Adding one is a file in coterie/model/families "
        "(CONTRIBUTING.md says how)"
    )
