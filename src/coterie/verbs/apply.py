"""`coterie apply`: executes a plan that was saved, or edited by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coterie.edits.execution import execute
from coterie.edits.kinds.convert import converted
from coterie.edits.plan import command_of, read_plan
from coterie.edits.saving import savable
from coterie.engine import Engine
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.storage.in_place import check_in_place, went_on
from coterie.storage.record import OBJECT, Progress, Report, Stopwatch, no_progress


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
    clock, read, where = Stopwatch(), read_plan(plan), Engine(engine, ray_address)
    options = {"plan": str(plan) if not isinstance(plan, dict) else OBJECT, "save": save}
    if in_place:
        check_in_place(io=io, engine=engine, overwrite=overwrite)
        if resume and not dry_run and (report := went_on(Path(out), "apply", options, model, clock, on_progress)):
            return report
    if command_of(plan) == "recover":
        raise CoterieError("plan: of `coterie recover`, whose training no plan holds; give the condensed model's own")
    if read.sparsity:
        raise CoterieError(
            f"plan: layer {next(iter(read.sparsity))!r} records zeros inside the experts, which `coterie sparsify` or "
            "`coterie stun` make from data; to keep only the choice of experts, delete the `sparsity` entries"
        )
    return execute(
        converted(Model.open(model), read.converted), read, Path(out), command="apply", path=model,
        options=options, clock=clock, dry_run=dry_run, resume=resume, overwrite=overwrite, io=io, engine=where,
        in_place=in_place, on_progress=on_progress,
    )  # fmt: skip
