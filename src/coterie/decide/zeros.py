"""Unstructured pruning of a planned model while it streams: what `sparsify` and `stun` share.

Everything is checked before OUT is begun; then each layer is pruned, saved and journalled, so that a killed run goes
on from there.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from coterie.decide import linears
from coterie.edits import beside, budget
from coterie.edits.execution import Fill, Filled, Prepare, Request
from coterie.edits.kurtosis import Moments
from coterie.edits.outputs import prunable
from coterie.edits.plan import Plan
from coterie.engine import Engine
from coterie.errors import CoterieError
from coterie.forward.samples import DATA, Calibration, Dtype, compute_dtype, read_samples
from coterie.methods import sparsify as methods
from coterie.methods.sparsify.select import check_pattern
from coterie.model.experts import Experts, expert_shapes
from coterie.model.layer import Model
from coterie.options import Help, flat
from coterie.storage.folders import existing
from coterie.storage.record import Progress
from coterie.storage.writer import Writer

if TYPE_CHECKING:
    from coterie.decide.linears import Linears
    from coterie.decide.pruner import Pruner
    from coterie.decide.spread import Spread
    from coterie.forward.stream import Stream, Walk

Shares = dict[str, Fraction]  # sparsity by layer
OF_SAMPLING = ("samples", "seq_len", "seed", "dtype")
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
        """As they are spelled on the command line."""
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
    if options.method != "magnitude":
        return ()
    if options.scoring.calibration.data or options.scoring.one_pass:
        raise CoterieError("--data and --one-pass would be ignored: magnitude needs no data")
    asked, default = flat(options.scoring), flat(Scoring())
    given = [name for name in OF_SAMPLING if asked[name] != default[name]]
    return tuple(f"--{name.replace('_', '-')} had no effect: magnitude needs no data" for name in given)


def check_options(options: Zeroing) -> None:
    """Raises: CoterieError for a value out of its range, or options that contradict or ignore each other."""
    methods.load(options.method)
    if options.pattern and options.method == "owl":
        raise CoterieError("--pattern fixes every layer's sparsity, which owl wants to choose; use wanda")
    scoring = options.scoring
    if scoring.kinds and (options.method == "sparsegpt" or options.pattern):
        raise CoterieError("--also prunes by rows of scores: it takes neither --method sparsegpt nor --pattern")
    if scoring.min_tokens < 1:
        raise CoterieError(f"--min-tokens {scoring.min_tokens}: expected at least 1")
    if scoring.outliers <= 0 or (scoring.outliers != Scoring().outliers and options.method != "owl"):
        raise CoterieError(f"--outliers {scoring.outliers} is OWL's M, a positive number; other methods have none")


@dataclass(frozen=True)
class Job:
    """What is to be pruned, and how: the model as planned, and as it was."""

    options: Zeroing
    source: Model
    plan: Plan
    view: Model
    engine: Engine


def prepared(options: Zeroing, source: Model, plan: Plan, request: Request) -> Prepare:
    """Checks model, data and options against each other before anything is written; then zeroes the weights."""

    def prepare(view: Model) -> Fill:
        check_writable(view, options)
        job = Job(options, source, plan, view, request.engine)
        if options.method == "magnitude":
            return lambda writer: _by_magnitude(job, writer, request.on_progress)
        calibration = Calibrated(view, options, request.out.parent)
        return lambda writer: _calibrated(job, calibration, writer, request.on_progress)

    return prepare


def check_writable(view: Model, options: Zeroing) -> None:
    """Raises: CoterieError for a pattern that does not divide the inputs, and for weights that share bytes."""
    for name in prunable(view):
        tensor = view.checkpoint.tensors.get(name)
        if tensor is None or tensor.num_bytes < tensor.num_parameters:
            raise CoterieError(f"tensor {name!r}: several weights share a byte; dequantise the checkpoint first")
    if options.method == "sparsegpt" and (one := view.checkpoint.tensors[prunable(view)[0]]).dtype.startswith("F8"):
        raise CoterieError(f"tensor {one.name!r}: {one.dtype} weights cannot be corrected; use wanda, or dequantise")
    for block in view.main if options.pattern else ():
        for _, columns in expert_shapes(view.checkpoint, block).values():
            check_pattern(columns, *options.pattern)  # type: ignore[misc]


class Calibrated:
    """What a calibrated run needs before it writes: token sequences, and the model to stream them through."""

    def __init__(self, view: Model, options: Zeroing, spill: Path) -> None:
        """spill: the folder for activations that are too large for memory."""
        from coterie.forward.stream import Stream

        self.view, self.options = view, options
        self.dtype = compute_dtype(view, options.scoring.dtype)
        self.by_domain, self.notes = read_samples(view, options.scoring.calibration)
        self.samples = [sample for found in self.by_domain.values() for sample in found]
        self.digest = hashlib.sha256(repr(self.samples).encode()).hexdigest()
        self.stream: Stream = Stream(view, self.dtype)
        self._spill = existing(spill)
        self._embedded: Any = self.embed(self.samples)  # now, since it refuses what cannot be streamed

    def embed(self, samples: Sequence[tuple[int, ...]]) -> Any:
        return self.stream.embed(samples, spill=self._spill)

    def batches(self) -> Any:
        """The samples at the first layer's door."""
        found, self._embedded = self._embedded or self.embed(self.samples), None
        return found

    def use(self, samples: list[tuple[int, ...]]) -> None:
        """Goes on with other samples."""
        self.samples, self._embedded = samples, None

    def shares(self, on_progress: Progress) -> Shares:
        """Sparsity by layer; OWL's takes a forward of the dense model."""
        if self.options.method != "owl":
            return uniform(self.view, self.options)
        from coterie.decide.outliers import Outliers

        outliers = Outliers(self.stream, self.options.scoring.outliers, self.options.scoring.kinds)
        return owl_shares(self.view, self.options, outliers.shares(self.batches(), on_progress))

    def summary(self) -> dict[str, dict[str, int]]:
        return {k: {"samples": len(given), "tokens": sum(map(len, given))} for k, given in self.by_domain.items()}


def uniform(view: Model, options: Zeroing) -> Shares:
    layers = {b.key for b in view.main} | set(map(str, beside.by_layer(view, options.scoring.kinds)))
    return dict.fromkeys(layers, options.sparsity)


def owl_shares(view: Model, options: Zeroing, outliers: dict[str, float]) -> Shares:
    """OWL's sparsity of each layer, as fractions that JSON can hold exactly."""
    import numpy as np

    from coterie.methods.sparsify import owl

    sizes: Counter[str] = Counter({b.key: budget.num_weights(view.checkpoint, b) for b in view.main})
    for index, names in beside.by_layer(view, options.scoring.kinds).items():
        sizes[str(index)] += sum(view.checkpoint.tensors[n].num_parameters for n in names)
    shares = owl.layer_sparsities(
        np.array([outliers[k] for k in sizes]),
        float(options.sparsity),
        np.array(list(sizes.values())),
        weighted=options.weighted,
    )
    return {key: Fraction(repr(float(value))) for key, value in zip(sizes, shares, strict=True)}


def counts(view: Model, options: Zeroing, shares: Shares) -> budget.Counts:
    """Zeros of every expert matrix."""
    return budget.zeros_of(view, shares, options.total)


def workers(view: Model, options: Zeroing, shares: Shares, put: Any, dtype: Any = None) -> tuple[Pruner, Linears]:
    """What prunes the experts, and what prunes the matrices beside them."""
    import torch

    from coterie.decide.pruner import Pruner

    method = methods.load(options.method)
    pruner = Pruner(
        view.checkpoint, method, counts(view, options, shares), put, dtype or torch.float32, options.pattern,
        options.scoring.min_tokens, sequential=not options.scoring.one_pass,
    )  # fmt: skip
    return pruner, linears.Linears(view, method, options.scoring.kinds, shares, put)


def _by_magnitude(job: Job, writer: Writer, on_progress: Progress) -> Filled:
    shares = uniform(job.view, job.options)
    pruner, others = workers(job.view, job.options, shares, writer.put)
    prune_all = spread(job, writer, pruner, shares).prune_all if job.engine.spread else pruner.prune_all
    prune_all(job.view, on_progress)
    others.prune_all()
    return filled(job, pruner, others, shares, {}, [])


def spread(job: Job, writer: Writer, pruner: Pruner, shares: Shares) -> Spread:
    """What prunes experts on the engine's nodes, in place of the pruner."""
    from coterie.decide.spread import Spread

    found, options = Spread(job.engine, writer, pruner), job.options
    found.describe({
        "plan": job.plan.as_dict(), "method": options.method, "total": options.total, "pattern": options.pattern,
        "one_pass": options.scoring.one_pass, "min_tokens": options.scoring.min_tokens, "dtype": str(pruner.dtype).partition(".")[2],
        "shares": {key: str(share) for key, share in shares.items()},
    })  # fmt: skip
    return found


def _calibrated(job: Job, calibration: Calibrated, writer: Writer, on_progress: Progress) -> Filled:
    """One streaming forward (two for OWL, whose first measures the dense model), pruning each expert on the way.

    After each layer the hidden states and what was counted are saved, so that a killed run goes on from there.
    """
    from coterie.forward.activations import restore, save

    stream = calibration.stream
    done = writer.units[-1] if writer.units else None
    if done and done["samples"] != calibration.digest:
        raise CoterieError(f"{writer.partial}: was begun on other data; give the same, or start anew with --overwrite")
    shares = {k: Fraction(v) for k, v in done["shares"].items()} if done else calibration.shares(on_progress)
    pruner, others = workers(job.view, job.options, shares, writer.put, calibration.dtype)
    batches, first = calibration.batches(), 0
    if done:
        first = done["layer"] + 1
        pruner.restore(done)
        others.zeros = Counter({(layer, kind): n for layer, kind, n in done["others"]})
        restore(batches, writer.partial / f"hidden-{done['layer']}.safetensors")
    apart = job.engine.spread and not others.also
    walk = spread(job, writer, pruner, shares).walk if apart else pruner.walk
    for index in prune_layers(stream, batches, pruner, others, first, walk):
        save(batches, writer.partial / f"hidden-{index}.safetensors")
        kept = {"layer": index, "others": [[*key, n] for key, n in others.zeros.items()], **pruner.state()}
        kept["samples"] = calibration.digest
        writer.unit(kept | {"shares": {key: str(share) for key, share in shares.items()}}, len(stream.layers))
        (writer.partial / f"hidden-{index - 1}.safetensors").unlink(missing_ok=True)
        on_progress("pruning layers", index + 1, len(stream.layers))
    for path in writer.partial.glob("hidden-*.safetensors"):
        path.unlink()
    notes = [*calibration.notes, *([ALSO_HERE] if job.engine.spread and others.also else [])]
    return filled(job, pruner, others, shares, {"calibration": calibration.summary()}, notes)


def prune_layers(
    stream: Stream, batches: Any, pruner: Pruner, others: Linears, first: int = 0, walk: Walk | None = None
) -> Any:
    """Yields each layer's index once it is pruned; with other linears, a layer runs densely first, to be measured."""
    rehearse = others.rehearse(stream, pruner.rehearse) if others.also else None
    return stream.run(batches, walk or pruner.walk, first, rehearse)


def filled(job: Job, pruner: Pruner, others: Linears, shares: Shares, more: dict[str, Any], notes: list[str]) -> Filled:
    """What was done, in the numbers of the report."""
    view = job.view
    zeros: dict[str, dict[str, float]] = {}
    for block in view.main:
        share = pruner.num_zeros[block.key] / budget.num_weights(view.checkpoint, block)
        zeros.setdefault(block.key, {})["expert"] = share
    for index, names in beside.by_layer(view, others.also).items():
        for kind in dict.fromkeys(names.values()):
            size = sum(view.checkpoint.tensors[n].num_parameters for n, k in names.items() if k == kind)
            zeros.setdefault(str(index), {})[kind] = others.zeros[str(index), kind] / size
    experts = sum(pruner.num_zeros.values())
    everything = experts + sum(others.zeros.values())
    return Filled(
        zeros,
        {"experts": experts, "linears": everything, "all": everything},
        {
            "cold_experts": pruner.cold,
            "layer_sparsity": {key: float(share) for key, share in shares.items()},
            "expert_zeros": experts,
            "kurtosis": {
                "before": before_dropping(job.source, job.plan, pruner.before).kurtosis,
                "between": pruner.before.kurtosis,
                "after": pruner.after.kurtosis,
            },
            **more,
        },
        notes,
    )


def before_dropping(source: Model, plan: Plan, kept: Moments) -> Moments:
    """Of all experts' weights, before any were dropped; `kept` are those of the experts that stayed."""
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
