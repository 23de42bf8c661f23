"""What each command can do to a checkpoint, from its headers: by the checks that the command itself begins with.

Of commands with a choice of methods the default one counts; others may need less, as messages say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coterie.decide.condensing import Condensing, target_type
from coterie.decide.condensing import check_model as check_condensing
from coterie.decide.drop import Dropping
from coterie.decide.drop import check_model as check_dropping
from coterie.decide.quantizing import Quantising, decided
from coterie.decide.zeros import Zeroing, check_writable
from coterie.edits.kinds.convert import converted
from coterie.edits.kinds.dequantise import dequantised, marked
from coterie.edits.kinds.merge import check_plain
from coterie.edits.outputs import check_plan
from coterie.edits.pack import check_dense, check_packed
from coterie.edits.plan import Plan
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.model.layered import check_layers, check_single
from coterie.model.loadable import check_whole
from coterie.model.stored import in_floats
from coterie.storage.planned import root


def _anything(model: Model) -> None:
    """Experts move as they are stored."""


def _zeroes(model: Model) -> None:
    check_writable(dequantised(model, marked(model, Plan({}), {"method": Zeroing().method})), Zeroing())
    check_layers(model)


def _merges(model: Model) -> None:
    check_layers(model)
    source = in_floats(model)
    check_plain(source.checkpoint, source.moe)


def _condenses(model: Model) -> None:
    source = in_floats(converted(model, target_type(model, 1)))
    check_condensing(source, Condensing(layers=1))
    check_layers(source)


def _drops(model: Model) -> None:
    source = in_floats(converted(model, target_type(model, 1)))
    check_dropping(source, Dropping())
    check_layers(source)


def _quantizes(model: Model) -> None:
    check_plan(model, decided(model, Quantising()).plan)


def _computes(model: Model) -> None:
    check_whole(model.checkpoint)


def _packs(model: Model) -> None:
    check_dense(root(model.checkpoint))


def _unpacks(model: Model) -> None:
    check_packed(root(model.checkpoint), model.checkpoint)


CHECKS: Mapping[str, Callable[[Model], None]] = {
    "prune": _anything, "apply": _anything, "verify": _anything, "collect": check_layers, "analyze": check_single,
    "sparsify": _zeroes, "stun": _zeroes, "quantize": _quantizes, "merge": _merges, "condense": _condenses,
    "drop": _drops, "eval": _computes, "report": _computes, "generate": _computes, "bench": _computes, "pack": _packs,
    "unpack": _unpacks,
}  # fmt: skip


def obstacle(model: Model, verb: str) -> str:
    """Why the verb refuses this checkpoint; empty if it does not."""
    try:
        CHECKS[verb](model)
    except CoterieError as error:
        return str(error).removeprefix(f"{model.checkpoint.path}: ")
    return ""


def abilities(model: Model) -> dict[str, bool | str]:
    """True, or the reason why not, by verb."""
    return {verb: obstacle(model, verb) or True for verb in CHECKS}
