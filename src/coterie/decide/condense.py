"""`coterie condense`: from what was asked to a decision, before anything is written.

The experts are measured, those that stay on and their gates are chosen, and the layers, unless they are named.
"""

from __future__ import annotations

from dataclasses import replace

from coterie.decide.condensing import Condensing, announce, check_model, plan_of, unused
from coterie.edits.execution import Request
from coterie.edits.plan import Condensed, Decision, Plan
from coterie.forward.samples import read_samples
from coterie.methods import condense as methods
from coterie.model.layer import Model

SAMPLES = 128  # unless the selection wants another number
SIZE_ONLY = "a dry run computes sizes; which layers, experts and gates comes from data"


def decided(original: Model, source: Model, target: str | None, options: Condensing, request: Request) -> Decision:
    """The layers, experts and gates; of a dry run, only how many.

    source: the original as the model type `target`, where it is converted to another.
    Raises: CoterieError where model, options and data do not fit.
    """
    keep, notes = check_model(source, options)
    if request.is_complete:
        return request.recorded()
    idle = request.writing.dry_run or options.layers == 0
    calibration, usual = options.calibration, getattr(methods.load(options.select), "SAMPLES", SAMPLES)
    calibration = replace(calibration, samples=usual) if calibration.samples is None else calibration
    by_domain, said = ({}, []) if idle else read_samples(source, calibration)
    announce(original, source, options)
    if request.writing.dry_run:
        ids = options.layer_ids or [int(block.key) for block in source.main][: options.layers]
        size = Condensed(tuple(range(keep)), (1.0,) * keep)  # of the right size; which, means nothing
        found = Decision(plan_of(ids, size, target), (SIZE_ONLY,))
    elif options.layers == 0:
        found = Decision(Plan({}, converted=target))
    else:
        from coterie.decide.condenser import Condenser  # imports torch

        with request.deciding(source.checkpoint) as run:
            told = run.start(request.on_progress)
            found = Condenser(source, options, keep, by_domain, run, told).decision(target)
    converted = {"converted": {"from": original.checkpoint.config["model_type"], "to": target}} if target else {}
    notes = [*notes, *said, *unused(options), *found.notes]
    return replace(found, notes=tuple(notes), findings=found.findings | converted)
