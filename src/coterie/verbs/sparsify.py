"""Zero single weights inside the routed experts; all experts stay.

Example: coterie sparsify MODEL OUT --method owl --sparsity 0.5 --data code=code.txt
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated

from coterie.decide.zeros import Scoring, Zeroing, check_options, idle, parse_pattern, prepared
from coterie.edits import budget
from coterie.edits.execution import Io, Request, Writing, execute
from coterie.edits.kinds.dequantise import dequantised, marked
from coterie.edits.plan import Decision, Plan
from coterie.edits.saving import savable
from coterie.engine import Cluster, Engine
from coterie.errors import CoterieError
from coterie.methods import sparsify as methods
from coterie.model.layer import Model
from coterie.options import Help, ModelPath, OutPath, public
from coterie.pages.terminal import show_report as show
from coterie.storage.record import Progress, Report, no_progress

__all__ = ["show", "sparsify"]


@public
@savable()
def sparsify(
    model: ModelPath,
    out: OutPath,
    *,
    method: Annotated[str, Help(f"How weights are chosen: {', '.join(methods.names())}.")] = "wanda",
    sparsity: Annotated[float | None, Help("Share of expert weights to zero [default: 0.5].")] = None,
    pattern: Annotated[str | None, Help("Zero N of every M consecutive inputs, instead of --sparsity.", "N:M")] = None,
    scoring: Scoring,
    writing: Writing,
    io: Io = "auto",
    cluster: Cluster,
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
    outliers: OWL's M. dtype: to compute in: auto (as the experts are stored, or float32 where that is
    faster), float32, bfloat16 or float16.
    save: dense, or sparse: zeros take one bit each (see `pack`).
    dry_run: headers and data are read, experts are not: zeros, and the bytes that packing makes of them, follow from
    their number.
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    engine: local, or ray: experts are pruned and bytes copied by the machines of a Ray cluster.
    ray_address: HOST:PORT of a cluster, or auto; without it one is started on this machine. All nodes have to see MODEL
    and OUT under the driver's paths. Not recorded: the bytes are the same.
    Raises: CoterieError, before anything is written.
    """
    engine, groups = Engine.of(cluster), parse_pattern(pattern)
    if groups and sparsity is not None:
        raise CoterieError(f"--sparsity would be ignored: --pattern {pattern} zeroes {groups[0]} of every {groups[1]}")
    wanted = 0.5 if sparsity is None else sparsity
    if not 0 <= wanted < 1:
        raise CoterieError(f"--sparsity {wanted}: the share of zeros must be in [0, 1)")
    share = Fraction(*groups) if groups else Fraction(str(wanted))
    source = Model.open(model)
    weights = sum(budget.num_weights(source.checkpoint, block) for block in source.main)
    total = None if groups or getattr(methods.load(method), "PER_ROW", True) else round(share * weights)
    options = Zeroing(method=method, sparsity=share, total=total, pattern=groups, scoring=scoring)
    check_options(options)
    plan = Plan(layers={}, budget={"kind": "sparsity", "sparsity": float(share)})
    asked = {"method": method, "sparsity": None if groups else float(share), "pattern": pattern}  # one excludes another
    request = Request(
        command="sparsify", path=model, out=Path(out), options=asked | scoring.record() | {"save": writing.save},
        writing=writing, io=io, engine=engine, on_progress=on_progress,
    )  # fmt: skip
    plan = marked(source, plan, request.options)
    source = dequantised(source, plan)
    prepare = prepared(options, source, plan, request)
    return execute(source, Decision(plan, idle(options)), request, prepare=prepare)
