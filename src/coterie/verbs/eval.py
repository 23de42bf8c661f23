"""Measure models: perplexity per data set; exact match where lines are {"prompt", "answer"}.

Example: coterie eval MODEL OUT --data prose=prose.txt --data sums=problems.jsonl
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from coterie.errors import CoterieError
from coterie.forward.data import Document, read_documents
from coterie.judge.judging import Files, Judging, judged_files
from coterie.options import Help, public
from coterie.pages.terminal import Asked, Rows, interval, table
from coterie.storage.record import Progress, no_progress

logger = logging.getLogger("coterie")
Load = Callable[[str | Path], Any]


@public
def evaluate(
    models: Annotated[str | Path | Sequence[str | Path], Help("Folders or hub ids.", "MODEL...", given=list[str])],
    *,
    data: Annotated[
        Files, Help("A data set; repeatable.", "NAME=FILE", given=list[str], read=judged_files, default=())
    ],
    against: Annotated[
        str | Path | None, Help("The original, to compare with on the same tokens.", "MODEL", given=str)
    ] = None,
    judging: Judging,
    load: Load | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures each model on each data set: exact match on files of problems, perplexity on all others.

    `data`: files by name, or `NAME=FILE` strings (`coterie.forward.data` has the formats). `against`: the original,
    with which every other model is compared on the same tokens. `window`, `stride`: in tokens, as in `perplexity`;
    the window is clamped to the model's positions and the stride is half of it unless given.
    `tasks`: names for lm-evaluation-harness, searched in the folder `task_path` as well. `load(path)` returns the
    model; by default `coterie.load`. `on_progress(what, done, total)` is called as work advances.

    Returns `{"models": [{"path", "perplexity": {NAME: {"value", "low", "high", "tokens"}},
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
    if not data and not judging.tasks:
        raise CoterieError("no data was given; expected NAME=FILE or tasks")
    if against is not None and not data:
        raise CoterieError(f"against is {against}, but tasks are not compared in pairs; give data as well")
    # All data is read, and every task found, before the first model: bad input should not cost an hour.
    notes: list[str] = []
    documents = {name: list(read_documents(file, notes)) for name, file in data.items()}
    return {"models": _judged(paths, documents, notes, against, judging, load, on_progress or no_progress)}


def _judged(
    paths: list[str | Path],
    documents: dict[str, list[Document]],
    notes: list[str],
    against: str | Path | None,
    judging: Judging,
    load: Load | None,
    on_progress: Progress,
) -> list[dict[str, Any]]:
    """An entry per model; beside the original, what a comparison with it gives."""
    from coterie.judge import harness, paired
    from coterie.judge.quality import _check_readable, judge
    from coterie.model import loading

    if against is not None:
        paired.check_tokens(against, paths, documents)
    manager = harness.task_manager(judging.tasks, judging.task_path) if judging.tasks else None
    for path in paths if load is None else ():
        _check_readable(path, documents)
    for note in notes:
        logger.warning("%s", note)
    load = load or (lambda path: loading.load(path, dtype=judging.dtype))
    if against is None:
        return [judge(path, documents, judging, load, on_progress, manager, routers=False)[0] for path in paths]
    listed = any(paired.same_model(path, against) for path in paths)
    alone = judging if listed else replace(judging, tasks=(), task_path=None)  # tasks of a model nobody listed
    first, original = judge(against, documents, alone, load, on_progress, manager)
    entries = []
    for path in paths:
        if paired.same_model(path, against):
            entries.append({**first, "path": str(path)})
        else:
            entry, kept = judge(path, documents, judging, load, on_progress, manager)
            entries.append({**entry, "paired": paired.compare(path, kept, against, original, seed=judging.seed)})
    return entries


def show(found: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    """A table per model."""
    for entry in found["models"]:
        rows = [(f"perplexity {n}", interval(v)) for n, v in entry["perplexity"].items()]
        rows += [(f"exact match {n}", interval(v, percent=True)) for n, v in entry["exact_match"].items()]
        rows += [(f"task {n}", json.dumps(v)) for n, v in entry.get("tasks", {}).items()]
        yield from table(entry["path"], rows + _paired(entry.get("paired")))


def _paired(found: dict[str, Any] | None) -> Rows:
    """What a comparison with the original adds."""
    if found is None:
        return []
    rows = [
        (f"log-likelihood {n}", f"{v['value']:+.4f}  [{v['low']:+.4f}, {v['high']:+.4f}] nats per token, difference")
        for n, v in found["difference"].items()
    ]
    rows += [(f"flipped {n}", f"{100 * share:.2f} % of the answers") for n, share in found["flipped"].items()]
    for name, shares in found["repetition"].items():
        own, theirs = ("none" if shares[k] is None else f"{100 * shares[k]:.2f} %" for k in ("model", "against"))
        rows.append((f"repetition {name}", f"{own} (original {theirs}) of generated 4-grams"))
    if overlap := found["router_overlap"]:
        rows.append(("router overlap", f"{sum(overlap.values()) / len(overlap):.3f}, mean of {len(overlap)} layers"))
    return [*rows, ("compared with", found["against"])]
