"""Execute a saved or hand-edited plan.

Example: coterie apply MODEL PRUNED/coterie.json OUT
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from coterie.edits.execution import InPlace, Io, Request, Writing, execute
from coterie.edits.kinds.convert import converted
from coterie.edits.plan import Decision, command_of, read_plan
from coterie.edits.saving import savable
from coterie.engine import Cluster, Engine
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.options import Help, ModelPath, OutPath, public
from coterie.pages.terminal import show_report as show
from coterie.storage.record import OBJECT, Progress, Report, no_progress

__all__ = ["apply", "show"]


@public
@savable()
def apply(
    model: ModelPath,
    plan: Annotated[str | Path | dict[str, Any], Help("A coterie.json, or its plan alone.", "PLAN.json", given=Path)],
    out: OutPath,
    *,
    writing: Writing,
    io: Io = "auto",
    cluster: Cluster,
    in_place: InPlace = False,
    on_progress: Progress = no_progress,
) -> Report:
    """Executes a saved (or hand-edited) plan on MODEL and writes OUT.

    plan: a `coterie.json`, its `plan` object, a file or folder holding one, or a dictionary.
    save: dense, or sparse: zeros take one bit each (see `pack`).
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    engine, ray_address: local, or ray: bytes are copied by the machines of a Ray cluster (see `prune`).
    in_place: MODEL's files become OUT's (see `prune`).
    Raises: CoterieError when plan and model do not fit, or OUT cannot be written; then nothing is written.
    """
    read = read_plan(plan)
    request = Request(
        command="apply", path=model, out=Path(out),
        options={"plan": str(plan) if not isinstance(plan, dict) else OBJECT, "save": writing.save}, writing=writing,
        io=io, engine=Engine.of(cluster), in_place=in_place, on_progress=on_progress,
    )  # fmt: skip
    if report := request.gone_on():
        return report
    if command_of(plan) == "recover":
        raise CoterieError("plan: of `coterie recover`, whose training no plan holds; give the condensed model's own")
    if read.sparsity:
        raise CoterieError(
            f"plan: layer {next(iter(read.sparsity))!r} records zeros inside the experts, which `coterie sparsify` or "
            "`coterie stun` make from data; to keep only the choice of experts, delete the `sparsity` entries"
        )
    if (scheme := read.at("quantized")) and scheme.from_data:
        raise CoterieError(
            "plan: records experts that `coterie quantize` made from data, which no plan holds; give that command the "
            "data again"
        )
    return execute(converted(Model.open(model), read.converted), Decision(read), request)
