"""`coterie apply`: executes a plan that was saved, or edited by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coterie.edits.convert import converted
from coterie.edits.execution import Request, Writing, execute
from coterie.edits.plan import Decision, command_of, read_plan
from coterie.edits.saving import savable
from coterie.engine import Engine
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.storage.record import OBJECT, Progress, Report, no_progress


@savable
def apply(
    model: str | Path,
    plan: str | Path | dict[str, Any],
    out: str | Path,
    *,
    save: str = "dense",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    engine: str = "local",
    ray_address: str | None = None,
    in_place: bool = False,
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
        options={"plan": str(plan) if not isinstance(plan, dict) else OBJECT, "save": save},
        writing=Writing(save=save, dry_run=dry_run, resume=resume, overwrite=overwrite), io=io,
        engine=Engine(engine, ray_address), in_place=in_place, on_progress=on_progress,
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
    return execute(converted(Model.open(model), read.converted), Decision(read), request)
