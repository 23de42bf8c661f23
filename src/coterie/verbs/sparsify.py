"""`coterie sparsify`: zeros single weights inside the routed experts, by a rule, while the model streams."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from coterie.decide.zeros import Scoring, Zeroing, check_options, idle, parse_pattern, prepared
from coterie.edits import budget
from coterie.edits.execution import Request, Writing, execute
from coterie.edits.plan import Decision, Plan
from coterie.edits.saving import savable
from coterie.engine import Engine
from coterie.errors import CoterieError
from coterie.forward.data import calibration_files
from coterie.forward.samples import Calibration
from coterie.model.layer import Model
from coterie.options import flat
from coterie.storage.record import Progress, Report, no_progress

PER_ROW = ("magnitude", "wanda", "moe-pruner")  # as published: floor(S * I) zeros in every row


@savable
def sparsify(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "wanda",
    sparsity: float | None = None,
    pattern: str | None = None,
    one_pass: bool = False,
    also: str = "",
    data: dict[str, Path] | list[str] | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    min_tokens: int = 64,
    outliers: float = 3.0,
    dtype: str = "auto",
    save: str = "dense",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    engine: str = "local",
    ray_address: str | None = None,
    on_progress: Progress = no_progress,
) -> Report:
    """Zeroes the share `sparsity` (default 0.5) of the routed experts' weights by a rule.

    method: magnitude (needs no data), wanda, moe-pruner: floor(S * I) zeros in each row of a matrix with I inputs;
    owl, sparsegpt: round(S x all expert weights) zeros.
    pattern: "n:m" zeroes n of every m consecutive inputs instead of a share of a row.
    one_pass: score every layer on the dense model's activations (default: on those of the layers pruned before it).
    also: comma-separated kinds of further matrices to prune: attention, shared, dense, router.
    data: NAME=FILE (a text, JSON lines, Parquet, a folder, or hub:OWNER/NAME); without it, texts that ship.
    samples: sequences in all, spread evenly over the names; seq_len: tokens of each; seed: which of them.
    min_tokens: experts that fewer calibration tokens reach are pruned by magnitude and listed as cold.
    outliers: OWL's M. dtype: to compute in: auto (as the experts are stored), float32, bfloat16 or float16.
    save: dense, or sparse: zeros take one bit each (see `pack`).
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    engine: local, or ray: experts are pruned and bytes copied by the machines of a Ray cluster.
    ray_address: HOST:PORT of a cluster, or auto; without it one is started on this machine. All nodes have to see MODEL
    and OUT under the driver's paths. Not recorded: the bytes are the same.
    Raises: CoterieError, before anything is written.
    """
    where = Engine(engine, ray_address)
    files = calibration_files(data)
    groups = parse_pattern(pattern)
    if groups and sparsity is not None:
        raise CoterieError(f"--sparsity would be ignored: --pattern {pattern} zeroes {groups[0]} of every {groups[1]}")
    wanted = 0.5 if sparsity is None else sparsity
    if not 0 <= wanted < 1:
        raise CoterieError(f"--sparsity {wanted}: the share of zeros must be in [0, 1)")
    share = Fraction(*groups) if groups else Fraction(str(wanted))
    source = Model.open(model)
    weights = sum(budget.num_weights(source.checkpoint, block) for block in source.main)
    total = None if groups or method in PER_ROW else round(share * weights)
    scoring = Scoring(
        one_pass=one_pass, also=also, min_tokens=min_tokens, outliers=outliers, dtype=dtype,
        calibration=Calibration(data=files, samples=samples, seq_len=seq_len, seed=seed),
    )  # fmt: skip
    options = Zeroing(method=method, sparsity=share, total=total, pattern=groups, scoring=scoring)
    check_options(options)
    unused = idle(options)
    plan = Plan(layers={}, budget={"kind": "sparsity", "sparsity": float(share)})
    asked = {"method": method, "sparsity": None if groups else float(share), "pattern": pattern}  # one excludes another
    files_read = {"data": {name: str(file) for name, file in files.items()}}
    request = Request(
        command="sparsify", path=model, out=Path(out), options=asked | flat(scoring) | files_read | {"save": save},
        writing=Writing(save=save, dry_run=dry_run, resume=resume, overwrite=overwrite), io=io, engine=where,
        on_progress=on_progress,
    )  # fmt: skip
    return execute(source, Decision(plan, unused), request, prepare=prepared(options, source, plan, request))
