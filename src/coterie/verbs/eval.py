"""`coterie eval`: perplexity, exact match and lm-evaluation-harness tasks of finished checkpoints.

Last step of the flow: it knows nothing of plans or methods and judges a compressed model as it would any other.
Every number comes with a 95 % interval. Models are loaded one after the other, by stock transformers, and a
checkpoint that does not fill its model exactly is refused: `from_pretrained` succeeding proves nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError
from coterie.forward.data import parse_data, read_documents
from coterie.judge import harness, paired
from coterie.judge.quality import Judging, Load, Progress, check_readable, judge, logger
from coterie.model import loading


def evaluate(
    models: str | Path | Sequence[str | Path],
    *,
    data: dict[str, str | Path] | Sequence[str] = (),
    against: str | Path | None = None,
    window: int = 2048,
    stride: int | None = None,
    tasks: str | Sequence[str] = (),
    task_path: str | Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    dtype: str = "auto",
    seed: int = 0,
    load: Load | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures each model on each data set: exact match on files of problems, perplexity on all others.

    `data`: files by name, or `NAME=FILE` strings (`coterie.forward.data` has the formats). `against`: the original,
    with which every other model is compared on the same tokens. `window`, `stride`: in tokens, as in
    `perplexity`; the window is clamped to the model's positions and the stride is half of it unless given.
    `tasks`: names for lm-evaluation-harness, searched in the folder `task_path` as well. `load(path)` returns the
    model; by default `coterie.load`. `on_progress(what, done, total)` is called as work advances.

    Returns `{"models": [{"path", "perplexity": {NAME: {"value", "low", "high", "tokens"}},
    "exact_match": {NAME: {"value", "low", "high", "count"}}}]}`, with `"tasks": {TASK: {METRIC: value}}` if asked, and
    `"paired"`, as `paired.compare` has it, for each model but `against` if that is given.
    Resamples depend on `seed` and the number of blocks alone, so models are compared on the same ones.

    Raises: CoterieError for bad options or data, a model that does not load completely, results that are no numbers.
    """
    paths = [models] if isinstance(models, str | Path) else list(models)
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    options = Judging(
        window=window,
        stride=stride,
        tasks=names,
        task_path=task_path,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        seed=seed,
    )
    if load is not None and dtype != "auto":
        raise CoterieError(f"dtype is {dtype!r}, but models come from your own load(path); let that choose the dtype")
    if not paths:
        raise CoterieError("no model was given; expected one or more folders or hub ids")
    files = data if isinstance(data, dict) else parse_data([data] if isinstance(data, str) else data)
    if not files and not names:
        raise CoterieError("no data was given; expected NAME=FILE or tasks")
    if against is not None and not files:
        raise CoterieError(f"against is {against}, but tasks are not compared in pairs; give data as well")
    # All data is read, and every task found, before the first model: bad input should not cost an hour.
    notes: list[str] = []
    documents = {name: list(read_documents(file, notes)) for name, file in files.items()}
    if against is not None:
        paired.check_tokens(against, paths, documents)
    manager = harness.task_manager(names, task_path) if names else None
    for path in paths if load is None else ():
        check_readable(path, documents)
    for note in notes:
        logger.warning("%s", note)
    report = on_progress or (lambda what, done, total: None)
    load = load or (lambda path: loading.load(path, dtype=dtype))
    if against is None:
        return {"models": [judge(path, documents, options, load, report, manager, routers=False)[0] for path in paths]}
    listed = any(paired.same_model(path, against) for path in paths)
    alone = options if listed else replace(options, tasks=(), task_path=None)  # tasks of a model nobody listed
    first, original = judge(against, documents, alone, load, report, manager)
    entries = []
    for path in paths:
        if paired.same_model(path, against):
            entries.append({**first, "path": str(path)})
        else:
            entry, kept = judge(path, documents, options, load, report, manager)
            entries.append({**entry, "paired": paired.compare(path, kept, against, original, seed=seed)})
    return {"models": entries}
