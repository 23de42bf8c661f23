"""What `condense` can be asked for, what its options demand of each other, and whether a model fits them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Annotated

from coterie.codecs.open import coded
from coterie.edits.folding import check_foldable, shared_names
from coterie.edits.kinds.condense import check_writable, is_stock
from coterie.edits.kinds.convert import CONVERSIONS, conversion
from coterie.edits.plan import Condensed, Plan
from coterie.errors import CoterieError, check_choice
from coterie.forward.samples import Calibration, Dtype
from coterie.methods import condense as methods
from coterie.methods.layer_search import SEARCHES
from coterie.model.family import num_layers, unable
from coterie.model.layer import Model
from coterie.options import Help, flag_of, flat
from coterie.storage.planned import Planned

logger = logging.getLogger("coterie")
logger.addHandler(logging.NullHandler())  # a library says nothing unless it is asked to


def parse_ids(given: list[int] | str | None) -> list[int] | None:
    """Layer numbers from a list, or from text as in "3,5,11"."""
    if given is None:
        return None
    parts = given.split(",") if isinstance(given, str) else list(given)
    try:
        return [part if type(part) is int else int(str(part)) for part in parts]
    except ValueError as error:
        raise CoterieError(f"--layer-ids {given!r}: expected decoder layer numbers such as 3,5,11") from error


@dataclass(frozen=True)
class Condensing:
    """What `condense` was asked for, with its defaults; recorded in coterie.json."""

    layers: Annotated[int | None, Help("How many layers to condense; which is searched for.")] = None
    layer_ids: Annotated[
        list[int] | None, Help("Which decoder layers, instead of --layers.", "A,B,...", given=str, read=parse_ids)
    ] = None
    keep: Annotated[int | None, Help("Experts always on in each, beside the shared one [default: top-k].")] = None
    select: Annotated[str, Help(f"How experts are chosen: {', '.join(methods.names())}.")] = "least-squares"
    layer_search: Annotated[str | None, Help(f"How layers are chosen: {', '.join(SEARCHES)} [default: greedy].")] = None
    calibration: Annotated[
        Calibration,
        {"samples": Help("Calibration sequences in all [default: 128; official: 100].", given=int, default=None)},
    ] = field(default_factory=lambda: Calibration(samples=None))
    dtype: Dtype = "auto"


def check_options(options: Condensing) -> None:
    """Raises: CoterieError for a value out of its range, or for two options that contradict or ignore each other."""
    if (options.layers is None) == (options.layer_ids is None):
        found = "neither" if options.layers is None else "both"
        raise CoterieError(f"--layers N or --layer-ids A,B,...: found {found}; give one of them")
    methods.load(options.select)
    if options.layer_search is not None:
        check_choice("--layer-search", options.layer_search, SEARCHES)
    if options.layer_search is not None and options.layer_ids is not None:
        raise CoterieError("--layer-search would be ignored: --layer-ids names the layers")
    if options.layers is not None and options.layers < 0:
        raise CoterieError(f"--layers {options.layers}: expected a number of layers, 0 or more")
    if options.keep is not None and options.keep < 0:
        raise CoterieError(f"--keep {options.keep}: expected a number of experts, 0 or more")


def unused(options: Condensing) -> list[str]:
    """What to say of options that shape what `--layers 0` does not do."""
    asked, default = flat(options), flat(Condensing())
    idle = [name for name in asked if options.layers == 0 and asked[name] != default[name] and name != "layers"]
    return [f"{flag_of(name)} had no effect: --layers 0 condenses none, it repackages" for name in idle]


def target_type(model: Model, layers: int | None, layer_ids: list[int] | None = None) -> str | None:
    """The model type to convert to, so that a stock config can say what is condensed; None where none is needed."""
    config = model.checkpoint.config
    found = CONVERSIONS.get(str(config.get("model_type")))
    if found is None:
        return None
    if not model.family.stock:
        obstacle = found.obstacle(config)
        if obstacle:
            raise CoterieError(
                f"{model.checkpoint.path}: transformers has no causal language model for {config['model_type']!r}, "
                f"and it cannot be repackaged as {found.target} ({obstacle})"
            )
        return found.target
    fits = layer_ids is not None and is_stock(model, plan_of(layer_ids))
    everything = layers == len(model.main) and model.family.dense is not None
    return None if fits or everything or layers == 0 or conversion(config) is None else found.target


def plan_of(layer_ids: list[int], condensed: Condensed | None = None, target: str | None = None) -> Plan:
    """The plan that condenses these layers alike: to nothing, where only which they are matters."""
    condensed = condensed or Condensed((), ())
    return Plan({}, condensed={str(index): condensed for index in layer_ids}, converted=target)


def check_model(model: Model, options: Condensing) -> tuple[int, list[str]]:
    """The experts to keep, and what should be said aloud. Raises: CoterieError where model and options do not fit."""
    path, indices = model.checkpoint.path, [int(block.key) for block in model.main]
    wanted = options.layer_ids or []
    for index in wanted:
        if index not in indices:
            total = num_layers(model.checkpoint.config)
            fault = "it is dense already" if 0 <= index < total else f"the model's {total} layers end at {total - 1}"
            raise CoterieError(f"--layer-ids {index}: {fault}; layers with experts: {', '.join(map(str, indices))}")
    if len(set(wanted)) != len(wanted) or (options.layer_ids is not None and not wanted):
        raise CoterieError(f"--layer-ids {wanted}: expected distinct layers, one at least")
    count = len(wanted) if options.layers is None else options.layers
    if count > len(indices):
        raise CoterieError(f"--layers {count}: {path} has {len(indices)} layers with experts; expected at most those")
    if count == 0 and (coded(model.checkpoint) or not isinstance(model.checkpoint, Planned)):
        raise CoterieError("--layers 0: there is nothing to do; it only serves types that need repackaging (deepseek)")
    num_experts = min(block.num_experts for block in model.main)
    keep = options.keep
    if keep is None:
        keep = min(model.family.num_experts_per_token(model.checkpoint.config), num_experts)
    if keep > num_experts:
        raise CoterieError(f"--keep {keep}: the layers have {num_experts} experts; keep at most those")
    check_writable(model, plan_of(wanted or indices[len(indices) - count :]))  # no search can know that it spares those
    if count and (kind := unable(model.checkpoint.config, "fold")):
        raise CoterieError(
            f"{path}: blocks of {kind!r} do more than add a shared expert to the experts' weighted sum, so no dense "
            "MLP can stand for them"
        )
    for block in model.main if count else ():
        check_foldable(model.checkpoint, block)
        if keep == 0 and shared_names(block) is None:
            raise CoterieError(
                f"--keep 0: {block.name} of family {model.family.name} has no shared expert, so nothing would be left; "
                "keep at least 1"
            )
    said = f"all {count} layers with experts are condensed: the result is a dense model"
    return keep, [said] if count == len(indices) else []


def announce(original: Model, source: Model, options: Condensing) -> None:
    """Says before the work starts what the result will be, where that is not the model's own type."""
    kind, target = original.checkpoint.config.get("model_type"), source.checkpoint.config.get("model_type")
    if kind != target:
        logger.warning("converted to %s: %s has no stock config that says which layers are dense", target, kind)
        return
    if options.layer_ids is not None and is_stock(source, plan_of(options.layer_ids)):
        return
    dense = source.family.dense
    if dense is None or options.layer_ids is not None:
        logger.warning("no stock config of %s says this: written in a layout that `coterie.load` reads", kind)
    elif dense.kind == "prefix":
        logger.warning(
            "stock configs of %s can only say that the first layers are dense: unless those are chosen, the result is "
            "written in a layout that `coterie.load` reads", kind,
        )  # fmt: skip
