"""What `quantize` can be asked for, what its options demand of each other, and the work that follows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from coterie.edits.counts import count
from coterie.edits.execution import Filled, Filling, Prepare, Request
from coterie.edits.kinds.bits import FORMAT, GROUPS, WIDTHS, Scheme, quantised_blocks
from coterie.edits.plan import Decision, Plan
from coterie.errors import CoterieError
from coterie.forward.layerwise import Calibrated, Layerwise
from coterie.forward.samples import DATA, Calibration, Dtype, unsampled
from coterie.methods import quantize as methods
from coterie.model.experts import expert_shapes
from coterie.model.layer import Model
from coterie.options import Help, flat

if TYPE_CHECKING:
    from coterie.storage.writer import Writer


@dataclass(frozen=True)
class Quantising:
    """How many bits the experts get, and how.

    method: None: gptq where there are data, else search. group_size: None: the largest that divides all rows.
    """

    bits: Annotated[int, Help(f"Of each expert weight: {', '.join(map(str, WIDTHS))}.")] = 4
    method: Annotated[str | None, Help(f"{', '.join(methods.names())} [default: gptq with --data, else search].")] = (
        None
    )
    group_size: Annotated[
        int | None, Help(f"Weights that share a scale: {', '.join(map(str, GROUPS))} [default: the largest that fits].")
    ] = None
    calibration: Annotated[Calibration, {"data": replace(DATA, default=None)}] = field(default_factory=Calibration)
    dtype: Dtype = "auto"

    @property
    def rule(self) -> str:
        return self.method or ("gptq" if self.calibration.data else "search")

    @property
    def from_data(self) -> bool:
        """Whether the model runs over data; gptq does so in any case, over texts that ship where none are given."""
        return bool(self.calibration.data) or methods.load(self.rule).NEEDS == "hessian"

    def record(self) -> dict[str, Any]:
        """The options as spelled on the command line."""
        return flat(self) | {"method": self.rule, "data": self.calibration.named}


def check_options(options: Quantising) -> tuple[str, ...]:
    """What to say of options without effect. Raises: CoterieError for values out of range, or data without use."""
    if options.bits not in WIDTHS:
        raise CoterieError(f"--bits {options.bits}: expected one of {', '.join(map(str, WIDTHS))}")
    if options.group_size not in (None, *GROUPS):
        raise CoterieError(f"--group-size {options.group_size}: expected one of {', '.join(map(str, GROUPS))}")
    if methods.load(options.rule).NEEDS == "nothing" and options.calibration.data:
        raise CoterieError(f"--data would be ignored: {options.rule} needs none; use search or gptq")
    if options.from_data:
        return ()
    return unsampled(options, Quantising(), f"{options.rule} without --data reads none")


def decided(model: Model, options: Quantising) -> Decision:
    """The plan, and what reads its result. Raises: CoterieError where no group divides all rows."""
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
    scheme = Scheme(FORMAT, size, options.rule, options.from_data)
    bits = {block.key: options.bits for block in quantised_blocks(model)}
    loads_in = ["transformers", "vllm", "coterie"] if model.family.stock else ["vllm", "coterie"]
    mean = options.bits + 16 / size
    findings = {"loads_in": loads_in, "bits": {"experts": mean, "all": _bits_of_all(model, mean)}}
    announced = (
        f"experts get {mean:g} bits a weight, scales included; {', '.join(loads_in)} load the result (transformers "
        "needs the package compressed-tensors, and expands experts in memory)"
    )
    return Decision(Plan(layers={}, entries={"bits": bits, "quantized": scheme}), notes, findings, announced)


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
        return Filling(partial(_fill, options.bits, scheme, request, calibration))

    return prepare


def _fill(bits: int, scheme: Scheme, request: Request, calibration: Calibrated, writer: Writer) -> Filled:
    """Quantises layer after layer, each on what the quantised layers before it give."""
    from coterie.decide.quantizer import Quantizer

    checkpoint, stream, batches = calibration.model.checkpoint, calibration.stream, calibration.batches()
    run = Layerwise(writer, calibration.samples)
    quantizer = Quantizer(
        checkpoint, methods.load(scheme.method), bits, scheme.group_size, writer.put, calibration.dtype
    )
    if run.done:
        quantizer.absorb(run.done)
    layers = stream.run(batches, quantizer.walk, run.first(batches, len(stream.layers)))
    progress = partial(request.on_progress, "quantising layers")
    run.run(batches, layers, len(stream.layers), lambda _: quantizer.state(), progress)
    report = {**quantizer.state(), **calibration.measured}
    return Filled({}, {}, report, calibration.notes)
