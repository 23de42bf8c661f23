"""Unstructured pruning of a planned model while it streams: what `sparsify` and `stun` share.

Everything is checked before OUT is begun; then each layer is pruned, saved and journalled, so that a killed run goes
on from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from coterie.decide import linears
from coterie.edits import beside, budget
from coterie.edits.execution import Filled, Filling, Prepare, Request
from coterie.edits.kurtosis import Moments
from coterie.edits.outputs import prunable
from coterie.edits.plan import Plan
from coterie.errors import CoterieError
from coterie.forward.layerwise import Calibrated, Layerwise
from coterie.forward.samples import DATA, Calibration, Dtype, unsampled
from coterie.methods import sparsify as methods
from coterie.methods.masks import check_pattern
from coterie.model.experts import Experts, expert_shapes, expert_storage, expert_weights
from coterie.model.layer import Model
from coterie.options import Help, flat
from coterie.storage.record import Progress
from coterie.storage.writer import Writer

if TYPE_CHECKING:
    import torch

    from coterie.decide.linears import Linears
    from coterie.decide.pruner import Pruner, Put
    from coterie.decide.spread import Spread
    from coterie.forward.activations import Walk
    from coterie.forward.stream import Stream

Shares = dict[str, Fraction]  # sparsity by layer
ALSO_HERE = "--engine ray: with --also or --preset paper, experts are calibrated on the driver's machine alone"


@dataclass(frozen=True)
class Scoring:
    """How weights are scored and on what, whichever the rule; recorded in coterie.json."""

    one_pass: Annotated[bool, Help("Score all layers on the dense model, not on layers pruned before them.")] = False
    also: Annotated[str, Help("Prune these too, comma-separated: attention, shared, dense, router.", "KINDS")] = ""
    calibration: Annotated[Calibration, {"data": replace(DATA, default=None)}] = field(default_factory=Calibration)
    min_tokens: Annotated[int, Help("Experts that fewer tokens reach are pruned by magnitude.")] = 64
    outliers: Annotated[float, Help("OWL's M: outliers score so many times the mean.")] = 3.0
    dtype: Dtype = "auto"

    def record(self) -> dict[str, Any]:
        """The options as spelled on the command line."""
        return flat(self) | {"data": self.calibration.named}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of `also`. Raises: CoterieError for one that is not known."""
        kinds = tuple(dict.fromkeys(kind.strip() for kind in self.also.split(",") if kind.strip()))
        unknown = set(kinds) - set(beside.KINDS)
        if unknown:
            raise CoterieError(f"--also {self.also!r}: {sorted(unknown)[0]!r} is none of {', '.join(beside.KINDS)}")
        return kinds


@dataclass(frozen=True)
class Zeroing:
    """How many weights are zeroed, and how. `sparsity` is the share of zeros per expert matrix."""

    method: str = "wanda"
    sparsity: Fraction = Fraction(1, 2)
    total: int | None = None  # zeros in all; None: floor(S * I) in each row
    pattern: tuple[int, int] | None = None
    weighted: bool = True  # OWL's ratios: by parameter count, or as published
    scoring: Scoring = field(default_factory=Scoring)


def idle(options: Zeroing) -> tuple[str, ...]:
    """What to say of options about data where the rule needs none. Raises: CoterieError for data themselves."""
    if methods.load(options.method).NEEDS != "nothing":
        return ()
    if options.scoring.calibration.data or options.scoring.one_pass:
        raise CoterieError(f"--data and --one-pass would be ignored: {options.method} needs no data")
    return unsampled(options.scoring, Scoring(), f"{options.method} needs no data")


def check_options(options: Zeroing) -> None:
    """Raises: CoterieError for a value out of its range, or options that contradict or ignore each other."""
    method, scoring = options.method, options.scoring
    if methods.chooses_shares(method) and options.pattern:
        raise CoterieError(f"--pattern fixes every layer's sparsity, which {method} wants to choose; use wanda")
    if scoring.kinds and (methods.corrects(method) or options.pattern):
        correcting = " or ".join(methods.names("hessian"))
        raise CoterieError(f"--also prunes by rows of scores: it takes neither --method {correcting} nor --pattern")
    if scoring.min_tokens < 1:
        raise CoterieError(f"--min-tokens {scoring.min_tokens}: expected at least 1")
    if scoring.outliers <= 0 or (scoring.outliers != Scoring().outliers and not methods.chooses_shares(method)):
        raise CoterieError(f"--outliers {scoring.outliers} is OWL's M, a positive number; other methods have none")


def prepared(options: Zeroing, source: Model, plan: Plan, request: Request) -> Prepare:
    """Checks model, data and options against each other before anything is written; then zeroes the weights."""

    def prepare(view: Model) -> Filling:
        check_writable(view, options)
        run = ZeroingRun(options, source, plan, view, request)
        if methods.load(options.method).NEEDS == "nothing":
            return Filling(run.without_data, run.foreseen())
        scoring, spill = options.scoring, request.out.parent
        calibration = Calibrated(view, scoring.calibration, scoring.dtype, spill, request.begun)
        return Filling(partial(run.calibrated, calibration), run.foreseen())

    return prepare


def check_writable(view: Model, options: Zeroing) -> None:
    """Raises: CoterieError for a pattern that does not divide the inputs, and for weights that share bytes."""
    for block in view.main:
        expert_storage(view.checkpoint, block, 0)  # which raises where it knows of no weights
    for name in prunable(view):
        tensor = view.checkpoint.tensors.get(name)
        if tensor is None or tensor.num_bytes < tensor.num_parameters:
            raise CoterieError(f"tensor {name!r}: several weights share a byte; dequantise the checkpoint first")
    if methods.corrects(options.method) and (one := view.checkpoint.tensors[prunable(view)[0]]).dtype.startswith("F8"):
        raise CoterieError(f"tensor {one.name!r}: {one.dtype} weights cannot be corrected; use wanda, or dequantise")
    for block in view.main if options.pattern else ():
        for _, columns in expert_shapes(view.checkpoint, block).values():
            check_pattern(columns, *options.pattern)  # type: ignore[misc]


def shares_of(calibration: Calibrated, options: Zeroing, on_progress: Progress) -> Shares:
    """Sparsity by layer; OWL's takes a forward of the dense model."""
    view, kinds = calibration.model, options.scoring.kinds
    if not methods.chooses_shares(options.method):
        return uniform(view, options)
    import numpy as np

    from coterie.decide.outliers import outlier_shares

    batches = calibration.batches()
    outliers = outlier_shares(calibration.stream, batches, options.scoring.outliers, kinds, on_progress)
    sizes = Counter({b.key: budget.num_weights(view.checkpoint, b) for b in view.main})
    for (layer, _), size in linears.sizes(view, kinds).items():
        sizes[layer] += size
    shares = methods.load(options.method).layer_sparsities(
        np.array([outliers[k] for k in sizes]), float(options.sparsity), np.array(list(sizes.values())),
        weighted=options.weighted,
    )  # fmt: skip
    # As fractions that JSON can hold exactly.
    return {key: Fraction(repr(float(value))) for key, value in zip(sizes, shares, strict=True)}


def uniform(view: Model, options: Zeroing) -> Shares:
    layers = {b.key for b in view.main} | set(map(str, beside.by_layer(view, options.scoring.kinds)))
    return dict.fromkeys(layers, options.sparsity)


@dataclass(frozen=True)
class Workers:
    """What prunes the experts of a model as planned, and what prunes the matrices beside them."""

    shares: Shares
    pruner: Pruner
    others: Linears

    @classmethod
    def of(cls, view: Model, options: Zeroing, shares: Shares, put: Put, dtype: torch.dtype | None = None) -> Workers:
        """Workers that write with `put` and compute in `dtype` (float32 unless given)."""
        import torch

        from coterie.decide.pruner import Pruner

        method, scoring = methods.load(options.method), options.scoring
        zeros = budget.zeros_of(view, shares, options.total)
        pruner = Pruner(
            view.checkpoint, method, zeros, put, dtype or torch.float32, options.pattern, scoring.min_tokens,
            sequential=not scoring.one_pass,
        )  # fmt: skip
        return cls(shares, pruner, linears.Linears(view, method, scoring.kinds, shares, put))

    def layers(self, stream: Stream, batches: Any, first: int = 0, walk: Walk | None = None) -> Iterator[int]:
        """Each layer's index once it is pruned; with other linears, a layer runs densely first, to be measured."""
        rehearse = self.others.rehearse(stream, self.pruner.rehearse) if self.others.also else None
        return stream.run(batches, walk or self.pruner.walk, first, rehearse)

    def state(self) -> dict[str, object]:
        """What a resumed run has to know of the layers done."""
        others = [[*key, n] for key, n in self.others.zeros.items()]
        return {**self.pruner.state(), "others": others, "shares": {k: str(share) for k, share in self.shares.items()}}


@dataclass(frozen=True)
class ZeroingRun:
    """What is to be pruned, and how: the model as it was, and as planned."""

    options: Zeroing
    source: Model
    plan: Plan
    view: Model
    request: Request

    def foreseen(self) -> dict[str, int]:
        """Zeros of every tensor before any is made: as if layers were alike, where the rule chooses their shares, and
        the experts of a layer as well."""
        view, shares, found = self.view, uniform(self.view, self.options), dict[str, int]()
        tensors, by_layer = view.checkpoint.tensors, Counter[str]()
        for (layer, _, _), number in budget.zeros_of(view, shares, self.options.total).items():
            by_layer[layer] += number
        for block in view.main:
            sizes = {name: tensors[name].num_parameters for name in expert_weights(view.checkpoint, block)}
            share = Fraction(by_layer[block.key], sum(sizes.values()))
            found |= dict(zip(sizes, budget.spread_zeros(list(sizes.values()), [share] * len(sizes)), strict=True))
        for index, names in beside.by_layer(view, self.options.scoring.kinds).items():
            for name in names:
                rows, columns = tensors[name].shape
                found[name] = rows * int(shares[str(index)] * columns)
        return found

    def without_data(self, writer: Writer) -> Filled:
        """Zeroes by a rule that needs no data."""
        workers = Workers.of(self.view, self.options, uniform(self.view, self.options), writer.put)
        by = self._spread(writer, workers) if self.request.engine.spread else workers.pruner
        by.prune_all(self.view, self.request.on_progress)
        workers.others.prune_all()
        return self._filled(workers, {}, [])

    def calibrated(self, calibration: Calibrated, writer: Writer) -> Filled:
        """One streaming forward (two for OWL, whose first measures the dense model), pruning each expert on the way.

        After each layer the hidden states and what was counted are saved, so that a killed run goes on from there.
        """
        run, on_progress = Layerwise(writer, calibration.samples), self.request.on_progress
        done, engine = run.done, self.request.engine
        known = {k: Fraction(v) for k, v in done["shares"].items()} if done else None
        shares = known or shares_of(calibration, self.options, on_progress)
        workers = Workers.of(self.view, self.options, shares, writer.put, calibration.dtype)
        batches = calibration.batches()
        if done:
            workers.pruner.absorb(done)
            workers.others.zeros.update({(layer, kind): n for layer, kind, n in done["others"]})
        stream, also = calibration.stream, workers.others.also
        walk = self._spread(writer, workers).walk if engine.spread and not also else None
        layers = workers.layers(stream, batches, run.first(batches, len(stream.layers)), walk)
        run.run(batches, layers, len(stream.layers), lambda _: workers.state(), partial(on_progress, "pruning layers"))
        notes = [*calibration.notes, *([ALSO_HERE] if engine.spread and also else [])]
        return self._filled(workers, calibration.measured, notes)

    def _spread(self, writer: Writer, workers: Workers) -> Spread:
        """What prunes experts on the engine's nodes, in place of the pruner."""
        from coterie.decide.spread import Spread

        found, options = Spread(self.request.engine, writer, workers.pruner), self.options
        found.describe({
            "plan": self.plan.as_dict(), "method": options.method, "total": options.total, "pattern": options.pattern,
            "one_pass": options.scoring.one_pass, "min_tokens": options.scoring.min_tokens,
            "dtype": str(workers.pruner.dtype).partition(".")[2],
            "shares": {key: str(share) for key, share in workers.shares.items()},
        })  # fmt: skip
        return found

    def _filled(self, workers: Workers, more: dict[str, Any], notes: list[str]) -> Filled:
        """What was done, in the numbers of the report."""
        view, pruner, others = self.view, workers.pruner, workers.others
        zeros = {b.key: {"expert": pruner.num_zeros[b.key] / budget.num_weights(view.checkpoint, b)} for b in view.main}
        for (layer, kind), size in linears.sizes(view, others.also).items():
            zeros.setdefault(layer, {})[kind] = others.zeros[layer, kind] / size
        experts = sum(pruner.num_zeros.values())
        everything = experts + sum(others.zeros.values())
        report = {
            "cold_experts": pruner.cold,
            "layer_sparsity": {key: float(share) for key, share in workers.shares.items()},
            "expert_zeros": experts,
            "expert_zero_share": experts / sum(budget.num_weights(view.checkpoint, b) for b in view.main),
            "kurtosis": {
                "before": before_dropping(self.source, self.plan, pruner.before).kurtosis,
                "between": pruner.before.kurtosis,
                "after": pruner.after.kurtosis,
            },
        }
        return Filled(zeros, {"experts": experts, "linears": everything, "all": everything}, report | more, notes)


def before_dropping(source: Model, plan: Plan, kept: Moments) -> Moments:
    """Moments of all experts' weights before any were dropped; `kept` are those of the experts that stayed."""
    merged = any(choice.merged for choice in plan.layers.values())
    moments = Moments() if merged else kept
    for block in source.main:
        choice, experts = plan.choice(block), Experts(source.checkpoint, block)
        known = set() if merged else set(choice.kept if choice else range(block.num_experts))
        for e in set(range(block.num_experts)) - known:
            found = Moments()
            for matrix in experts[e]:
                if matrix is not None:
                    found.add(matrix)
            moments = moments + found
    return moments


def parse_pattern(text: str | None) -> tuple[int, int] | None:
    """(n, m) of "n:m": n of every m consecutive inputs become zero."""
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != 2 or not all(p.isdecimal() for p in parts) or not 0 < int(parts[0]) < int(parts[1]) <= 64:
        raise CoterieError(f"--pattern {text!r}: expected n:m with 0 < n < m, such as 2:4")
    return int(parts[0]), int(parts[1])
