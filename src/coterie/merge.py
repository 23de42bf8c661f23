"""`coterie merge`: experts that do alike become one, their weighted mean; the plan is written and executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coterie.applying.execution import execute
from coterie.data import calibration_files
from coterie.errors import CoterieError
from coterie.experts import read_layer
from coterie.layer import Model
from coterie.loading import check_routable
from coterie.methods import merge as methods
from coterie.plan import Plan
from coterie.prune import Options as Counting
from coterie.prune import check_options as check_counts
from coterie.prune import count_kept, num_kept
from coterie.report import Progress, Report, Stopwatch, no_progress
from coterie.saving import savable
from coterie.selecting import merging
from coterie.selecting.criteria import Decision, Task
from coterie.stats import MERGING, Stats, parse_weights
from coterie.streaming.samples import Data
from coterie.writing.writer import check_out, existing

ROUTERS = ("mean", "alias")
OURS = "--router alias: several router rows lead to one expert, which only `coterie.load` reads; stock software refuses"


@dataclass(frozen=True)
class Options:
    """What `merge` was asked for, with its defaults; recorded in coterie.json."""

    method: str = "hc-smoe"
    ratio: float | None = None
    experts: int | None = None
    router: str = "mean"
    align: bool = False
    stats: str | None = None
    weights: dict[str, float] = field(default_factory=dict)  # of domains; those not named count 1
    data: dict[str, Any] = field(default_factory=dict)
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    dtype: str = "auto"

    def record(self) -> dict[str, Any]:
        """As they are spelled on the command line, without those of calibration where statistics were given."""
        weights = ",".join(f"{name}={weight}" for name, weight in self.weights.items())
        found = vars(self) | {"weights": weights or None, "data": {n: str(file) for n, file in self.data.items()}}
        others = ("data", "samples", "seq_len", "seed", "dtype") if self.stats else ("stats",)
        return {name: value for name, value in found.items() if name not in others}


@savable
def merge(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "hc-smoe",
    ratio: float | None = None,
    experts: int | None = None,
    router: str = "mean",
    align: bool = False,
    stats: str | Path | None = None,
    weights: str | Mapping[str, float] | None = None,
    data: Data = (),
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    dtype: str = "auto",
    save: str = "dense",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Progress = no_progress,
) -> Report:
    """Merges the routed experts of every layer into E - `floor(ratio * E)` (default 0.25), or into `experts`.

    A cluster becomes sum_i f_i W_i / sum_i f_i, f_i the calibration tokens routed to expert i; so do its router rows.
    method: hc-smoe (by mean outputs, which takes every expert on every token) or m-smoe (by router logits).
    router: mean, which stock software loads, or alias: the router stays as it is, and the rows of a cluster lead to its
    one expert, as published; only `coterie.load` reads that.
    align: put each member's neurons in the order that is nearest to the most used member's before averaging.
    stats: a file that `collect` wrote of this model with `merging`, instead of data.
    weights: how often each domain counts, as "code=2,chat=0.5" or a dictionary (default 1).
    data, samples, seq_len, seed, dtype: what to measure on, as in `collect`.
    save: dense, or sparse: zeros take one bit each (see `pack`).
    dry_run: measure, decide and report; nothing is written.
    Raises: CoterieError, before anything is written.
    """
    clock = Stopwatch()
    files = calibration_files(data)
    options = Options(
        method, ratio, experts, router, align, None if stats is None else str(stats), parse_weights(weights),
        files, samples, seq_len, seed, dtype,
    )  # fmt: skip
    check_options(options)
    source = Model.open(model)
    check_out(Path(out), source.checkpoint.path, resume=resume, overwrite=overwrite)
    plan, warnings, findings = decided(source, options, Path(out).parent, on_progress)
    return execute(
        source, plan, Path(out), command="merge", path=model,
        options=options.record() | {"save": save}, clock=clock, warnings=warnings, findings=findings,
        dry_run=dry_run, resume=resume, overwrite=overwrite, on_progress=on_progress,
    )  # fmt: skip


def check_options(options: Options) -> None:
    """Raises: CoterieError for a value out of its range, or for two options that contradict or ignore each other."""
    methods.load(options.method)
    if options.router not in ROUTERS:
        raise CoterieError(f"--router {options.router!r}: unknown; expected one of {', '.join(ROUTERS)}")
    check_counts(Counting(ratio=options.ratio, experts=options.experts))
    default = Options()
    given = [n for n in ("data", "samples", "seq_len", "seed", "dtype") if getattr(options, n) != getattr(default, n)]
    absent = set(options.weights) - set(options.data) if options.data else set()
    if absent:
        raise CoterieError(f"--weights: domain {sorted(absent)[0]!r} is not in the data: {', '.join(options.data)}")
    if options.stats and given:
        flag = f"--{given[0].replace('_', '-')}"
        raise CoterieError(f"{flag} is of calibration and would be ignored: --stats were measured already; give one")


def decided(
    model: Model, options: Options, spill: Path, on_progress: Progress = no_progress
) -> tuple[Plan, tuple[str, ...], dict[str, Any]]:
    """The plan, what should be said aloud about it, and what the decision found. Reads routers and statistics, or
    measures them; where activations are large they go to the folder `spill`."""
    alias, counting = options.router == "alias", Counting(ratio=options.ratio, experts=options.experts)
    # An aliased router is whole, whatever it leads to: routing groups and top-k do not bind what is stored.
    groups = 1 if alias else model.family.groups(model.checkpoint.config).num_groups
    if alias:
        kept = num_kept(counting, min(block.num_experts for block in model.main))
        check_routable(model.checkpoint, [block.key for block in model.main])
    else:
        kept = count_kept(model, counting, list(model.moe))
    task = Task({b: read_layer(model.checkpoint, b) for b in model.moe}, kept, groups, options.weights)
    stats, notes = _read(model, options) if options.stats else _measured(model, options, spill, on_progress)
    decision = merging.decide(task, options.method, stats, align=options.align, alias=alias)
    origin = {"stats": {"path": options.stats, "model": stats.model, "samples": stats.samples}}
    budget: dict[str, Any] = {"kind": "uniform", "experts": kept}
    budget |= (origin if options.stats else {"samples": stats.samples}) | decision.budget
    said = [OURS] if alias else []
    return _plan(decision, budget), (*said, *notes, *decision.notes), decision.findings


def _plan(decision: Decision, budget: dict[str, Any]) -> Plan:
    return Plan(
        layers={b.key: c for b, c in decision.choices.items() if not b.attention},
        attention={b.key: c for b, c in decision.choices.items() if b.attention},
        budget=budget,
    )


def _read(model: Model, options: Options) -> tuple[Stats, list[str]]:
    """The statistics given. Raises: CoterieError when they are of another model, or lack what the method reads."""
    assert options.stats
    stats = Stats.load(options.stats, only=merging.needed(options.method))
    stats.check_model(model.checkpoint.hash, options.stats)
    merging.check_sums(stats, options.method, options.stats)
    return stats, []


def _measured(model: Model, options: Options, spill: Path, on_progress: Progress) -> tuple[Stats, list[str]]:
    """Statistics of the data given, and what should be said aloud."""
    from coterie.collect import measure
    from coterie.streaming.samples import compute_dtype, read_samples

    dtype = compute_dtype(model, options.dtype)
    samples, notes = read_samples(
        model, options.data, samples=options.samples, seq_len=options.seq_len, seed=options.seed
    )
    extra = [name for name in methods.load(options.method).SUMS if name in MERGING]
    stats = measure(model, samples, dtype, on_progress, extra=extra, spill=existing(spill))
    merging.check_sums(stats, options.method, str(model.checkpoint.path))
    return stats, [*notes, *stats.notes]
