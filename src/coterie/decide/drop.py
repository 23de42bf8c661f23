"""`coterie drop`: the published baselines that condensing is measured against.

A layer's MoE block goes where it changes the hidden states least (its dense MLP gives zero), or a whole decoder layer.
Source: He et al., Demystifying the Compression of Mixture-of-Experts, arXiv 2406.02500 (layer drop and block drop).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

from coterie.edits.execution import Request
from coterie.edits.folding import check_foldable
from coterie.edits.kinds.condense import check_writable
from coterie.edits.kinds.drop import check as check_dropped
from coterie.edits.plan import Condensed, Decision, Plan
from coterie.errors import CoterieError, check_choice
from coterie.forward.layerwise import Layerwise
from coterie.forward.samples import Calibration, Dtype, compute_dtype, dtype_name, read_samples
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
    check_choice("--unit", options.unit, UNITS)
    if options.count < 1:
        raise CoterieError(f"--count {options.count}: expected how many to drop, 1 or more")


def check_model(model: Model, options: Dropping) -> list[int]:
    """The layers that may go. Raises: CoterieError where there are too few, or the config cannot say that one went."""
    candidates = list(range(num_layers(model.checkpoint.config)))
    if options.unit == "layer":
        if kind := unable(model.checkpoint.config, "add"):
            raise CoterieError(
                f"{model.checkpoint.path}: the layers of {kind!r} do not simply add their MoE block's output to the "
                "hidden states before it, so that the block cannot go alone; --unit block, or `condense --select "
                "least-squares`"
            )
        for block in model.main:
            check_foldable(model.checkpoint, block)
        candidates = [int(block.key) for block in model.main]
        last = make_plan(model, options, candidates[::-1], None)  # which no ranking can know that it spares
        check_writable(model, last)
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


def decided(original: Model, source: Model, target: str | None, options: Dropping, request: Request) -> Decision:
    """Which layers go, as one pass of the model shows; of a dry run, only how many.

    source: the original as the model type `target`, where it is converted to another.
    Raises: CoterieError where model, options and data do not fit.
    """
    if request.is_complete:
        return request.recorded()
    candidates = check_model(source, options)
    converted = {"converted": {"from": original.checkpoint.config["model_type"], "to": target}} if target else {}
    if request.writing.dry_run:
        found = Decision(make_plan(source, options, candidates, target), (SIZE_ONLY,))
    else:
        found = ranked(source, options, candidates, target, request)
    return replace(found, findings=converted | found.findings)


def ranked(model: Model, options: Dropping, candidates: list[int], target: str | None, request: Request) -> Decision:
    """The layers that change hidden states least go."""
    from coterie.decide.always_on import Blocks, Work

    by_domain, notes = read_samples(model, options.calibration)
    samples = [sample for given in by_domain.values() for sample in given]
    began, blocks = time.monotonic(), Blocks(model, compute_dtype(model, options.dtype))
    work = Work(sum(map(len, samples)), blocks.num_layers)
    batches = blocks.stream.embed(samples, spill=existing(request.out.parent))
    with request.deciding(model.checkpoint) as run:
        layerwise, told = Layerwise(run, samples), run.start(request.on_progress)
        found = similarities(blocks, batches, options.unit, candidates, work, layerwise, told)
    order = sorted(found, key=lambda i: (-round(found[i], DIGITS), i))
    plan = make_plan(model, options, order, target)
    findings = {
        "layer_order": [i for i in order if i in plan.dropped or str(i) in plan.condensed],
        "similarity": {str(i): value for i, value in found.items()},
        "passes": {"experts": 0.0, "layers": round(work.passes, 4)},
        "search_seconds": {"experts": 0.0, "layers": round(time.monotonic() - began, 3)},
        "dtype": dtype_name(blocks.dtype),
        "calibration": {"samples": {name: len(given) for name, given in by_domain.items()}},
    }
    return Decision(plan, tuple(notes), findings, begun=True)


def similarities(
    blocks: Blocks,
    batches: list[Batch],
    unit: str,
    candidates: list[int],
    work: Work,
    layerwise: Layerwise,
    on_progress: Progress,
) -> dict[int, float]:
    """Layer -> mean over tokens of the cosine, in float64, of what comes before and after it."""
    from torch.nn.functional import cosine_similarity

    from coterie.decide.choosing import surroundings
    from coterie.forward.stream import advance

    known = {note["layer"]: note["found"] for note in layerwise.notes}
    found, index = {candidate: known.get(candidate, 0.0) for candidate in candidates}, 0
    work.token_layers = layerwise.done["work"] if layerwise.done else 0
    num_tokens = sum(batch.num_tokens for batch in batches)

    def compare(before: torch.Tensor, after: torch.Tensor) -> None:
        found[index] += float(cosine_similarity(before.double(), after.double(), dim=-1).sum()) / num_tokens

    def around_layer(batch: Batch, output: torch.Tensor) -> None:
        compare(batch.loaded(), output)
        advance(batch, output)

    def layers() -> Iterator[int]:
        nonlocal index
        for index in range(layerwise.first(batches, blocks.num_layers), blocks.num_layers):
            with blocks.stream.loaded(index) as go:
                if unit == "layer" and index in candidates:
                    work.add(batches)
                    surroundings(blocks, go, index, batches, lambda around: compare(around.before, around.after))
                elif unit == "block":
                    work.add(batches)
                    go(batches, blocks.walk, around_layer)
                else:
                    blocks.run(go, index, batches, None, work)
            yield index

    def state(index: int) -> dict[str, object]:
        return {"found": found.get(index), "work": work.token_layers}

    layerwise.run(batches, layers(), blocks.num_layers, state, partial(on_progress, "comparing layers"))
    return found
