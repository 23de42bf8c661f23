"""`coterie drop`: the published baselines that condensing is measured against.

A layer's MoE block goes where it changes the hidden states least (its dense MLP gives zero), or a whole decoder layer.
Source: He et al., Demystifying the Compression of Mixture-of-Experts, arXiv 2406.02500 (layer drop and block drop).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from coterie.edits.execution import Request
from coterie.edits.folding import check_foldable
from coterie.edits.kinds.condense import check_writable
from coterie.edits.kinds.drop import check as check_dropped
from coterie.edits.outputs import patched_config
from coterie.edits.plan import Condensed, Decision, Plan
from coterie.errors import CoterieError
from coterie.forward.samples import Calibration, Dtype, compute_dtype, read_samples
from coterie.model.family import num_layers, unable
from coterie.model.layer import Model
from coterie.options import Help
from coterie.storage.folders import existing
from coterie.storage.record import Progress

if TYPE_CHECKING:
    import torch

    from coterie.decide.always_on import Blocks, Work
    from coterie.forward.activations import Batch

UNITS = ("layer", "block")
NOTHING = Condensed((), (), 0.0)  # a dense MLP that gives zero
NUMBERS = ("layer_idx", "layer_number", "layer_id", "training")  # of a module: what a layer's place changes by itself
SETTINGS = (bool, int, float, str, type(None), tuple)
SIZE_ONLY = "a dry run computes sizes; which layers go comes from data"
DIGITS = 12  # of a similarity that count: less is rounding


@dataclass(frozen=True)
class Dropping:
    """What `drop` was asked for, with its defaults; recorded in coterie.json."""

    unit: Annotated[str, Help("layer: the MoE inside a decoder layer; block: all of it.")] = "layer"
    count: Annotated[int, Help("How many, by the similarity of what enters and leaves.")] = 1
    calibration: Calibration = field(default_factory=Calibration)
    dtype: Dtype = "auto"


def check_options(options: Dropping) -> None:
    """Raises: CoterieError for a value out of its range."""
    if options.unit not in UNITS:
        raise CoterieError(f"--unit {options.unit!r}: unknown; expected one of {', '.join(UNITS)}")
    if options.count < 1:
        raise CoterieError(f"--count {options.count}: expected how many to drop, 1 or more")


def check_model(model: Model, options: Dropping) -> list[int]:
    """The layers that may go. Raises: CoterieError where there are too few, or the config cannot say that one went."""
    sparse = [int(block.key) for block in model.main]
    if options.unit == "layer" and (kind := unable(model.checkpoint.config, "add")):
        raise CoterieError(
            f"{model.checkpoint.path}: the layers of {kind!r} do not simply add their MoE block's output to the hidden "
            "states before it, so that the block cannot go alone; --unit block, or `condense --select least-squares`"
        )
    for block in model.main if options.unit == "layer" else ():
        check_foldable(model.checkpoint, block)
    candidates = sparse if options.unit == "layer" else list(range(num_layers(model.checkpoint.config)))
    if options.unit == "layer":
        check_writable(model, make_plan(model, options, candidates, None))
    most = len(candidates) - (options.unit == "block")
    if options.count > most:
        raise CoterieError(f"--count {options.count}: {model.checkpoint.path} can do without {most} at most")
    check_dropped(model, make_plan(model, options, candidates, None))
    return candidates


def spare(order: list[int], count: int, sparse: list[int]) -> list[int]:
    """The first `count` of the order, passing over the last layer with experts that would be left."""
    chosen: list[int] = []
    for index in order:
        if len(chosen) < count and not set(sparse) <= {*chosen, index}:
            chosen.append(index)
    return chosen


def make_plan(model: Model, options: Dropping, order: list[int], target: str | None) -> Plan:
    """The first layers of the order go."""
    if options.unit == "block":
        return Plan({}, dropped=tuple(sorted(spare(order, options.count, [int(b.key) for b in model.main]))))
    chosen = sorted(order[: options.count])
    return Plan({}, condensed={str(index): NOTHING for index in chosen}, converted=target)


def check_kinds(model: Model, plan: Plan) -> None:
    """Raises: CoterieError where a layer that moves up would become another, because of its number.

    Compared are what transformers builds for the layer before and after: modules, shapes, settings and buffers.
    """
    if not plan.dropped:
        return
    from coterie.forward.skeleton import empty_model
    from coterie.model.loading import decoder_layers

    checkpoint = model.checkpoint
    changed = replace(checkpoint, config=patched_config(model, plan))
    before, after = (
        [_anatomy(layer) for layer in decoder_layers(empty_model(c, compute_dtype(model)).get_decoder(), str(c.path))]
        for c in (checkpoint, changed)
    )
    left = [i for i in range(len(before)) if i not in plan.dropped]
    moved = next((i for i, found in zip(left, after, strict=True) if before[i] != found), None)
    if moved is not None:
        raise CoterieError(
            f"{checkpoint.path}: layer {moved} would become another one under a lower number, because its config or "
            "its class tells layers by their numbers; drop the experts alone (--unit layer)"
        )


def _anatomy(layer: torch.nn.Module) -> dict[str, object]:
    """What distinguishes a decoder layer from others but its weights and its number."""
    found: dict[str, object] = {}
    for path, module in layer.named_modules():
        settings = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in NUMBERS}
        found[path] = type(module).__name__, {k: v for k, v in settings.items() if isinstance(v, SETTINGS)}
        found |= {f"{path}.{name}": tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        found |= {f"{path}.{name}": b.tolist() for name, b in module.named_buffers(recurse=False)}
    return found


def decided(original: Model, source: Model, target: str | None, options: Dropping, request: Request) -> Decision:
    """Which layers go, as one pass of the model shows; of a dry run, only how many.

    source: the original as the model type `target`, where it is converted to another.
    Raises: CoterieError where model, options and data do not fit.
    """
    candidates = check_model(source, options)
    converted = {"converted": {"from": original.checkpoint.config["model_type"], "to": target}} if target else {}
    if request.writing.dry_run:
        found = Decision(make_plan(source, options, candidates, target), (SIZE_ONLY,))
    else:
        found = ranked(source, options, candidates, target, request)
    check_kinds(source, found.plan)
    return replace(found, findings=converted | found.findings)


def ranked(model: Model, options: Dropping, candidates: list[int], target: str | None, request: Request) -> Decision:
    """The layers that change hidden states least go."""
    from coterie.decide.always_on import Blocks, Work

    by_domain, notes = read_samples(model, options.calibration)
    samples = [sample for given in by_domain.values() for sample in given]
    began, blocks = time.monotonic(), Blocks(model, compute_dtype(model, options.dtype))
    work = Work(sum(map(len, samples)), blocks.num_layers)
    batches = blocks.stream.embed(samples, spill=existing(request.out.parent))
    found = similarities(blocks, batches, options.unit, candidates, work, request.on_progress)
    order = sorted(found, key=lambda i: (-round(found[i], DIGITS), i))
    plan = make_plan(model, options, order, target)
    findings = {
        "layer_order": [i for i in order if i in plan.dropped or str(i) in plan.condensed],
        "similarity": {str(i): value for i, value in found.items()},
        "passes": {"experts": 0.0, "layers": round(work.passes, 4)},
        "search_seconds": {"experts": 0.0, "layers": round(time.monotonic() - began, 3)},
        "calibration": {"samples": {name: len(given) for name, given in by_domain.items()}},
    }
    return Decision(plan, tuple(notes), findings)


def similarities(
    blocks: Blocks, batches: list[Batch], unit: str, candidates: list[int], work: Work, on_progress: Progress
) -> dict[int, float]:
    """Layer -> mean over tokens of the cosine of what comes before and after it."""
    from coterie.decide.choosing import Around, surroundings
    from coterie.forward.stream import advance

    found: dict[int, float] = {}
    num_tokens = sum(batch.num_tokens for batch in batches)

    def around_block(around: Around) -> None:
        found[index] += sum_of_cosines(around.before, around.after) / num_tokens

    def around_layer(batch: Batch, output: torch.Tensor) -> None:
        found[index] += sum_of_cosines(batch.loaded(), output) / num_tokens
        advance(batch, output)

    for index in range(blocks.num_layers):
        with blocks.stream.loaded(index) as go:
            work.add(batches)
            if index in candidates:
                found[index] = 0.0
            if unit == "block":
                go(batches, blocks.walk, around_layer)
            elif index in candidates:
                surroundings(blocks, go, index, batches, around_block)
            else:
                go(batches, blocks.walk, advance)
        on_progress("comparing layers", index + 1, blocks.num_layers)
    return found


def sum_of_cosines(a: torch.Tensor, b: torch.Tensor) -> float:
    """Over all tokens of two (..., D), in float64."""
    from torch.nn.functional import cosine_similarity

    return float(cosine_similarity(a.double(), b.double(), dim=-1).sum())
