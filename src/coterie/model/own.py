"""Our own layout in config.json: what no stock config can say of a model, layer by layer. Read and written here alone.

    {"model_type": "coterie",
     "coterie": {"format": 1, "model_type": the stock one,
                 "num_experts": {layer: stored experts},
                 "routes": {layer: [the stored expert of every router row, or -1]},
                 "dense": {layer: width of the MLP in the place of its block}}, ...: as the stock config}

Stock software refuses the model type aloud, instead of loading a model with random weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coterie.errors import CoterieError
from coterie.model.family import MAX_EXPERTS, Config, lookup, num_layers

OWN = "coterie"  # the model type, and the section's key
FORMAT = 1
MAX_WIDTH = 2**31
KEY = re.compile(r"([a-z]+\.)?(0|[1-9][0-9]{0,5})")  # of a layer; those beyond the decoder's are of prediction layers
LAYERED = {"num_experts", "routes", "dense"}


@dataclass(frozen=True)
class OwnLayout:
    """The section, checked; all by layer. Empty for a stock config."""

    model_type: str = ""  # the stock one
    counts: dict[str, int] = field(default_factory=dict)  # stored experts
    routes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of every router row; -1: leads to none
    dense: dict[str, int] = field(default_factory=dict)  # widths


def is_own(config: Config) -> bool:
    """Whether a config says that its checkpoint is in our own layout."""
    return config.get("model_type") == OWN


def own_layout(config: Config) -> OwnLayout:
    """What a config says of our own layout.

    Raises: CoterieError for a section without the model type or the reverse, and for everything that we do not write.
    """
    section = config.get(OWN)
    if section is None and not is_own(config):
        return OwnLayout()
    if not isinstance(section, dict) or not is_own(config):
        raise CoterieError(
            f"config.json: model_type {config.get('model_type')!r:.60}, {OWN} {section!r:.60}; expected "
            f'"model_type": "{OWN}" and an object under "{OWN}", or neither'
        )
    model_type, version = section.get("model_type"), section.get("format", FORMAT)
    if not isinstance(model_type, str) or model_type in ("", OWN):
        raise CoterieError(f"config.json: {OWN}.model_type is {model_type!r:.60}; expected the stock model's")
    if type(version) is not int or version != FORMAT:
        raise CoterieError(f"config.json: {OWN}.format is {version!r:.40}; this version reads {FORMAT}: update Coterie")
    counts = _by_layer(section, "num_experts", f"1 to {MAX_EXPERTS} experts", lambda n: _is_count(n, MAX_EXPERTS))
    dense = _by_layer(section, "dense", f"a width of 1 to {MAX_WIDTH}", lambda n: _is_count(n, MAX_WIDTH))
    routes = _by_layer(section, "routes", "a stored expert or -1 for every router row", _is_row)
    for key in (*dense, *routes):
        if not key.isdecimal() or int(key) >= num_layers(config):
            raise CoterieError(f"config.json: {OWN} speaks of layer {key}; the decoder has {num_layers(config)}")
    for key in dense.keys() & counts.keys():
        raise CoterieError(f"config.json: {OWN} says that layer {key} is dense, and how many experts it has")
    for key, row in routes.items():
        if set(row) - {-1} != set(range(counts.get(key, 0))):
            raise CoterieError(
                f"config.json: {OWN}.routes of layer {key} must lead to each of its {counts.get(key, 0)} stored "
                f"experts; found {row!r:.80}"
            )
    return OwnLayout(model_type, counts, {key: tuple(row) for key, row in routes.items()}, dense)


def _by_layer(section: Config, name: str, expected: str, fits: Callable[[Any], bool]) -> dict[str, Any]:
    """An entry of the section, checked value by value."""
    found = section.get(name, {})
    if not isinstance(found, dict):
        raise CoterieError(f"config.json: {OWN}.{name} must be an object with an entry per layer, found {found!r:.80}")
    for key, value in found.items():
        if not KEY.fullmatch(key) or not fits(value):
            raise CoterieError(
                f"config.json: {OWN}.{name} must give {expected}, by the layer's number; found {value!r:.80} for layer "
                f"{key!r:.40}"
            )
    return found


def _is_count(value: Any, largest: int) -> bool:
    return type(value) is int and 0 < value <= largest


def _is_row(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_EXPERTS and all(type(i) is int for i in value)


def own_section(config: dict[str, Any], **entries: Config) -> None:
    """Makes `config` (in place) one of our own layout, with these entries and those that it had."""
    model_type = next(v for _, _, v in lookup(config, (f"{OWN}.model_type", "model_type")) if isinstance(v, str))
    config[OWN] = {"format": FORMAT, "model_type": model_type} | config.get(OWN, {}) | entries
    config["model_type"] = OWN


def renumber(config: dict[str, Any], dropped: tuple[int, ...]) -> None:
    """Moves the section's layers up, if there is one, in the place of those that go (in place)."""
    section = config.get(OWN, {})
    for name in LAYERED & section.keys():
        left = {key: value for key, value in section[name].items() if key not in map(str, dropped)}
        section[name] = {moved(key, dropped): value for key, value in left.items()}


def moved(key: str, dropped: tuple[int, ...]) -> str:
    """A layer's key once the dropped ones are left out."""
    return str(int(key) - sum(d < int(key) for d in dropped)) if key.isdecimal() else key
