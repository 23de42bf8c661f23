"""Measure models: perplexity per data set; exact match where lines are {"prompt", "answer"}.

Example: coterie eval MODEL OUT --data prose=prose.txt --data sums=problems.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from coterie.errors import CoterieError
from coterie.forward.data import read_all
from coterie.judge.judging import Card, Files, Judging, Load, judged_files, put_card
from coterie.options import Help, public
from coterie.pages.terminal import Asked, Rows, interval, table
from coterie.reference_model import HELD_OUT
from coterie.storage.record import Progress, no_progress

if TYPE_CHECKING:
    from coterie.judge.paired import Paired


@public
def evaluate(
    models: Annotated[str | Path | Sequence[str | Path], Help("Folders or hub ids.", "MODEL...", given=list[str])],
    *,
    data: Annotated[
        Files,
        Help(
            "A data set; repeatable [default: texts that ship].",
            "NAME=FILE",
            given=list[str],
            read=judged_files,
            default=(),
        ),
    ],
    against: Annotated[
        str | Path | None, Help("The original, to compare with on the same tokens.", "MODEL", given=str)
    ] = None,
    judging: Judging,
    card: Card = False,
    load: Load | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures each model on each data set: exact match on files of problems, perplexity on all others.

    `data`: files by name, or `NAME=FILE` strings (`coterie.forward.data` has the formats); without data and tasks, the
    held-out texts that ship. `against`: the original,
    with which every other model is compared on the same tokens. `window`, `stride`: in tokens, as in `perplexity`;
    the window is clamped to the model's positions and the stride is half of it unless given.
    `tasks`: names for lm-evaluation-harness, searched in the folder `task_path` as well. `load(path)` returns the
    model; by default `coterie.load`. `card`: whether the numbers go into README.md of each model that Coterie made.
    `on_progress(what, done, total)` is called as work advances.

    Returns `{"models": [{"path", "dtype", "perplexity": {NAME: {"value", "low", "high", "tokens"}},
    "exact_match": {NAME: {"value", "low", "high", "count"}}}]}`, with `"tasks": {TASK: {METRIC: value}}` if asked, and
    `"paired"`, as `paired.compare` has it, for each model but `against` if that is given.
    Resamples depend on `seed` and the number of blocks alone, so models are compared on the same ones.

    Raises: CoterieError for bad options or data, a model that does not load completely, results that are no numbers.
    """
    paths = [models] if isinstance(models, str | Path) else list(models)
    if load is not None and judging.dtype != "auto":
        raise CoterieError(
            f"dtype is {judging.dtype!r}, but models come from your own load(path); let that choose the dtype"
        )
    if not paths:
        raise CoterieError("no model was given; expected one or more folders or hub ids")
    if against is not None and not data and judging.tasks:
        raise CoterieError(f"against is {against}, but tasks are not compared in pairs; give data as well")
    # All data is read, and every task found, before the first model: bad input should not cost an hour.
    shipped = not data and not judging.tasks
    documents, notes = read_all(HELD_OUT if shipped else data)
    if shipped:
        notes = [f"no --data: judged on the held-out texts that ship with coterie ({', '.join(HELD_OUT)})"]
    from coterie.judge.quality import judge_all

    found = judge_all(paths, documents, notes, against, judging, load, on_progress or no_progress)
    for entry in found if card else ():
        put_card(entry["path"], entry)
    return {"models": found}


def show(found: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    """A table per model."""
    for entry in found["models"]:
        rows = [(f"perplexity {n}", interval(v)) for n, v in entry["perplexity"].items()]
        rows += [(f"exact match {n}", interval(v, percent=True)) for n, v in entry["exact_match"].items()]
        rows += [(f"task {n}", json.dumps(v)) for n, v in entry.get("tasks", {}).items()]
        yield from table(entry["path"], rows + _paired(entry.get("paired")))


def _paired(found: Paired | None) -> Rows:
    """What a comparison with the original adds."""
    if found is None:
        return []
    rows = [
        (f"log-likelihood {n}", f"{v['value']:+.4f}  [{v['low']:+.4f}, {v['high']:+.4f}] nats per token, difference")
        for n, v in found["difference"].items()
    ]
    rows += [(f"flipped {n}", f"{100 * share:.2f} % of the answers") for n, share in found["flipped"].items()]
    for name, shares in found["repetition"].items():
        own, theirs = ("none" if s is None else f"{100 * s:.2f} %" for s in (shares["model"], shares["against"]))
        rows.append((f"repetition {name}", f"{own} (original {theirs}) of generated 4-grams"))
    if overlap := found["router_overlap"]:
        rows.append(("router overlap", f"{sum(overlap.values()) / len(overlap):.3f}, mean of {len(overlap)} layers"))
    return [*rows, ("compared with", found["against"])]
