"""Whether the files of OUT agree with each other, with config.json and with the plan. Checks of `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coterie.codecs.open import check_coded, codec_of, coded, inexact, opened
from coterie.edits.plan import Plan, kinds, read_plan
from coterie.errors import CoterieError
from coterie.model.family import detect
from coterie.model.layer import Model, MoE, has_routers
from coterie.storage.checkpoint import INDEX, Checkpoint, load_json
from coterie.storage.planned import root
from coterie.storage.record import Progress, no_progress, record_of

Answer = tuple[bool, str, Any]  # ok, detail, what later checks need


def is_packed(folder: Path) -> bool:
    """Whether config.json says so; what cannot be read is a fault of the files."""
    try:
        return codec_of(Checkpoint.open(folder)) is not None
    except CoterieError:
        return False


def check_packed(folder: Path, on_progress: Progress = no_progress) -> tuple[bool, str, Checkpoint]:
    """The version is ours; of each packed matrix mask, counts, values and checksum agree."""
    view = opened(Checkpoint.open(folder))
    check_coded(view, on_progress)
    matrices = sum(found.num_matrices for found in coded(view).values())
    rounded = f", {len(inexact(view)):,} rounded to few bits" if inexact(view) else ""
    return True, f"{matrices:,} matrices of {len(coded(view)):,} tensors agree with their checksums{rounded}", view


def check_files(out: Checkpoint) -> tuple[bool, str, Checkpoint | None]:
    """Headers, index, tensor names and expert counts agree with each other, with config.json and with the plan."""
    try:
        if out.indexed:
            _check_index(root(out))
        record = record_of(out.path)
        plan = Plan({}) if record is None else read_plan(record)
        blocks = () if _all_condensed(out, plan) else Model.of(out).moe
        planned = "no coterie.json" if record is None else _check_counts(blocks, plan)
    except CoterieError as error:
        return False, str(error), out
    counts = sorted({block.num_experts for block in blocks}) or [0]
    return True, (
        f"{len(out.tensors):,} tensors in {len(out.shards)} file(s); {len(blocks)} MoE blocks "
        f"of {' to '.join(map(str, sorted({counts[0], counts[-1]})))} experts; {planned}"
    ), out  # fmt: skip


def _all_condensed(out: Checkpoint, plan: Plan) -> bool:
    """Whether the plan left no layer with experts, and none has a router."""
    return not has_routers(out, detect(out.config)) and bool(plan.condensed)


def _check_index(out: Checkpoint) -> None:
    """Raises: CoterieError for a tensor that the index leaves out (`Checkpoint.open` has seen to the reverse)."""
    unlisted = set(out.tensors) - set(load_json(out.path / INDEX)["weight_map"])
    if unlisted:
        raise CoterieError(f"{out.path / INDEX}: leaves out {first(unlisted)}; loaders would not see them")


def _check_counts(blocks: tuple[MoE, ...], plan: Plan) -> str:
    """Raises: CoterieError unless every block holds the experts that the plan keeps."""
    for kind in kinds():
        kind.agree(blocks, plan)
    return "as the plan in coterie.json says"


def was_trained(folder: Path) -> bool:
    """Whether the folder says that `recover` wrote it; what cannot be read is a fault that the checks find."""
    try:
        return (record_of(folder) or {}).get("command") == "recover"
    except CoterieError:
        return False


def first(names: Any, limit: int = 3) -> str:
    """The first few names and how many there are: `a, b, c and 4 more`."""
    ordered = sorted(map(str, names))
    more = f" and {len(ordered) - limit:,} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
