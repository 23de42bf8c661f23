"""What `quantize` can be asked for, what its options demand of each other, and the work that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from coterie.edits.counts import count
from coterie.edits.execution import Filled, Filling, Prepare, Request
from coterie.edits.kinds.bits import (
    FORMAT,
    FORMATS,
    GROUPS,
    OWN,
    WIDTHS,
    Bits,
    Scheme,
    quantised_blocks,
    width_of,
)
from coterie.edits.outputs import check_plan
from coterie.edits.plan import Decision, Plan
from coterie.errors import CoterieError, check_choice
from coterie.forward.layerwise import Calibrated, Layerwise
from coterie.forward.samples import DATA, Calibration, Dtype, unsampled
from coterie.methods import quantize as methods
from coterie.model.experts import expert_shapes
from coterie.model.layer import Model
from coterie.options import Help, flat
from coterie.storage.record import Progress, no_progress

if TYPE_CHECKING:
    from coterie.storage.writer import Writer

PER = ("expert", "layer")
ALLOCATIONS = ("measured", "frequency", "random")


@dataclass(frozen=True)
class Quantising:
    """How many bits the experts get, and how.

    method: None: gptq where there are data, else search. group_size: None: the largest that divides all rows.
    """

    bits: Annotated[int | None, Help(f"Of each expert weight: {', '.join(map(str, WIDTHS))} [default: 4].")] = None
    average: Annotated[
        float | None, Help("Mean bits of codes over all experts, instead of --bits: each gets what it needs.")
    ] = None
    per: Annotated[
        str | None,
        Help("With --average, what has a width: expert (0 bits: dropped) or layer [default: expert]."),
    ] = None
    allocate: Annotated[
        str | None, Help(f"With --average, by what: {', '.join(ALLOCATIONS)} (controls, but the first, the default).")
    ] = None
    format: Annotated[str | None, Help(f"{' or '.join(FORMATS)} [default: the former for one width, else ours].")] = (
        None
    )
    method: Annotated[str | None, Help(f"{', '.join(methods.names())} [default: gptq with --data, else search].")] = (
        None
    )
    group_size: Annotated[
        int | None, Help(f"Weights that share a scale: {', '.join(map(str, GROUPS))} [default: the largest that fits].")
    ] = None
    calibration: Annotated[Calibration, {"data": replace(DATA, default=None)}] = field(default_factory=Calibration)
    dtype: Dtype = "auto"

    @property
    def width(self) -> int:
        """Of all experts, where no mean is given."""
        return self.bits or 4

    @property
    def item(self) -> str:
        return self.per or PER[0]

    @property
    def by(self) -> str:
        return self.allocate or ALLOCATIONS[0]

    @property
    def rule(self) -> str:
        return self.method or ("gptq" if self.calibration.data or self.average is not None else "search")

    @property
    def from_data(self) -> bool:
        """Whether experts are made from data; gptq does so in any case, over texts that ship where none are given."""
        needs = methods.load(self.rule).NEEDS
        return needs == "hessian" or (needs == "squares" and bool(self.calibration.data))

    @property
    def reads_data(self) -> bool:
        """Whether the model runs over data, be it to choose widths alone."""
        return self.from_data or self.average is not None

    @property
    def stored_as(self) -> str:
        return self.format or (FORMAT if self.average is None else OWN)

    def record(self) -> dict[str, Any]:
        """The options as spelled on the command line."""
        mixed = {"per": self.item, "allocate": self.by} if self.average is not None else {"bits": self.width}
        return flat(self) | mixed | {"method": self.rule, "data": self.calibration.named}


def check_options(options: Quantising) -> tuple[str, ...]:
    """What to say of options without effect. Raises: CoterieError for values out of range, or data without use."""
    if options.bits not in (None, *WIDTHS):
        raise CoterieError(f"--bits {options.bits}: expected one of {', '.join(map(str, WIDTHS))}")
    if options.group_size not in (None, *GROUPS):
        raise CoterieError(f"--group-size {options.group_size}: expected one of {', '.join(map(str, GROUPS))}")
    check_choice("--per", options.item, PER)
    check_choice("--allocate", options.by, ALLOCATIONS)
    if options.format is not None:
        check_choice("--format", options.format, FORMATS)
    _check_average(options)
    if methods.load(options.rule).NEEDS == "nothing" and options.calibration.data and options.average is None:
        raise CoterieError(f"--data would be ignored: {options.rule} needs none; use search or gptq")
    if options.reads_data:
        return ()
    return unsampled(options, Quantising(), f"{options.rule} without --data reads none")


def _check_average(options: Quantising) -> None:
    """Raises: CoterieError for a mean that no widths have, and for options that would be ignored without one."""
    if options.average is None:
        for name in ("per", "allocate"):
            if getattr(options, name) is not None:
                raise CoterieError(f"--{name} is of mixed widths and would be ignored; add --average")
        return
    if options.bits is not None:
        raise CoterieError("--bits and --average exclude each other; choose one")
    least = min(WIDTHS) if options.item == "layer" else 0
    if not (options.average > 0 and least <= options.average <= max(WIDTHS)):
        raise CoterieError(f"--average {options.average:g}: expected more than 0 and {least} to {max(WIDTHS)} bits")
    if options.format == FORMAT:
        raise CoterieError(f"--format {FORMAT} knows one width for all experts; leave it out, or give --bits")


def decided(
    model: Model, options: Quantising, spill: Path | None = None, on_progress: Progress = no_progress
) -> Decision:
    """The plan, and what reads its result; widths of experts are measured first where their mean is given.

    Raises: CoterieError where no group divides all rows.
    """
    notes = check_options(options)
    columns = {
        shape[1] for block in quantised_blocks(model) for shape in expert_shapes(model.checkpoint, block).values()
    }
    fitting = [size for size in GROUPS if not any(n % size for n in columns)]
    if not fitting and options.group_size is None:
        raise CoterieError(
            f"{model.checkpoint.path}: experts' rows of {', '.join(map(str, sorted(columns)))} weights: no group of "
            f"{', '.join(map(str, GROUPS))} divides them all"
        )
    size = options.group_size or fitting[0]
    scheme = Scheme(options.stored_as, size, options.rule, options.from_data)
    bits: dict[str, Bits] = {block.key: options.width for block in quantised_blocks(model)}
    findings: dict[str, object] = {}
    if options.average is not None:
        check_plan(model, Plan(layers={}, entries={"bits": bits, "quantized": scheme}))  # before hours of measuring
        bits, findings["widths"], said = _mixed(model, options, size, spill, on_progress)
        notes = (*notes, *said)
    if scheme.format == OWN:
        loads_in, how = ["coterie"], "transformers does after `import coterie`"
    else:
        loads_in = ["transformers", "vllm", "coterie"] if model.family.stock else ["vllm", "coterie"]
        how = "transformers needs the package compressed-tensors, and expands experts in memory"
    mean = _mean(model, bits, size)
    findings |= {"loads_in": loads_in, "bits": {"experts": mean, "all": _bits_of_all(model, mean)}}
    announced = (
        f"experts get {mean:g} bits a weight, scales included; {', '.join(loads_in)} "
        f"{'loads' if len(loads_in) == 1 else 'load'} the result ({how})"
    )
    return Decision(Plan(layers={}, entries={"bits": bits, "quantized": scheme}), notes, findings, announced)


def _mixed(
    model: Model, options: Quantising, group_size: int, spill: Path | None, on_progress: Progress
) -> tuple[dict[str, Bits], dict[str, object], list[str]]:
    """Widths of a given mean, what they cost, and what to say of the data."""
    from coterie.decide import widths

    assert options.average is not None
    calibrated = Calibrated(model, options.calibration, options.dtype, spill or Path())
    known = (0, *WIDTHS) if options.item == "expert" else WIDTHS
    costs = widths.measured(calibrated, known, group_size, methods.load(options.rule), on_progress)
    seed = options.calibration.seed
    bits, cost = widths.chosen(model, costs, options.average, per=options.item, allocation=options.by, seed=seed)
    each = [b for found in bits.values() for b in (found if isinstance(found, list) else [found])]
    counted_by_width = {str(width): each.count(width) for width in known}
    return bits, {"cost": cost, "items": counted_by_width, **calibrated.measured}, calibrated.notes


def _mean(model: Model, bits: Mapping[str, Bits], group_size: int) -> float:
    """Bits a weight over all experts' weights, scales of 16 bits included."""
    stored, number = 0.0, 0
    for block in quantised_blocks(model):
        size = sum(rows * columns for rows, columns in expert_shapes(model.checkpoint, block).values())
        each = [width_of(bits[block.key], e) for e in range(block.num_experts)]
        stored += size * sum(b + 16 / group_size * (b > 0) for b in each)
        number += size * len(each)
    return stored / (number or 1)  # none are known of what cannot be read, which the plan's check refuses


def _bits_of_all(model: Model, mean: float) -> float:
    """Bits per parameter of the whole model, if those of experts have so many."""
    numbers = count(list(model.checkpoint.tensors.values()), model.roles)
    experts = [t for name, t in model.checkpoint.tensors.items() if model.roles[name] == "expert"]
    beside = 8 * (model.checkpoint.num_bytes - sum(t.num_bytes for t in experts))
    return (mean * numbers["experts"] + beside) / numbers["all"]


def prepared(model: Model, options: Quantising, plan: Plan, request: Request) -> Prepare | None:
    """What fills in the experts that are made from data; None where there are no data."""
    scheme: Scheme = plan.at("quantized")
    if not scheme.from_data:
        return None

    def prepare(view: Model) -> Filling:
        calibration = Calibrated(model, options.calibration, options.dtype, request.out.parent, request.begun)
        return Filling(partial(_fill, plan.at("bits"), scheme, request, calibration))

    return prepare


def _fill(
    bits: Mapping[str, Bits], scheme: Scheme, request: Request, calibration: Calibrated, writer: Writer
) -> Filled:
    """Quantises layer after layer, each on what the quantised layers before it give."""
    from coterie.decide.quantizer import Quantizer

    checkpoint, stream, batches = calibration.model.checkpoint, calibration.stream, calibration.batches()
    run = Layerwise(writer, calibration.samples)
    quantizer = Quantizer(checkpoint, methods.load(scheme.method), bits, scheme, writer.put, calibration.dtype)
    if run.done:
        quantizer.absorb(run.done)
    layers = stream.run(batches, quantizer.walk, run.first(batches, len(stream.layers)))
    progress = partial(request.on_progress, "quantising layers")
    run.run(batches, layers, len(stream.layers), lambda _: quantizer.state(), progress)
    report = {**quantizer.state(), **calibration.measured}
    return Filled({}, {}, report, calibration.notes)
