"""`coterie eval --tasks`: hands a loaded model over to lm-evaluation-harness (extra `[eval]`)."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError
from coterie.model.loading import quiet_transformers


def task_manager(tasks_asked: tuple[str, ...], folder: str | Path | None) -> Any:
    """The harness's index of tasks, its own and those below `task_path`, with every task asked for in it."""
    if folder is not None and not Path(folder).is_dir():
        raise CoterieError(f"task_path {folder}: no such folder; expected one with YAML files of tasks")
    try:
        tasks = importlib.import_module("lm_eval.tasks")
    except ImportError as e:
        raise CoterieError(f"tasks need lm-evaluation-harness ({e}); run: pip install 'coterie[eval]'") from e
    try:
        with _silence():
            # The harness's own thousands of files take seconds to index: only if the folder lacks a task.
            for theirs in (False, True) if folder is not None else (True,):
                manager = tasks.TaskManager(
                    include_path=None if folder is None else str(folder), include_defaults=theirs
                )
                unknown = [task for task in tasks_asked if not manager.match_tasks([task])]
                if not unknown:
                    return manager
    except Exception as e:  # whatever a YAML file may provoke
        raise CoterieError(f"task_path {folder}: the harness cannot read its tasks ({e})") from e
    raise CoterieError(f"tasks {', '.join(unknown)}: not known to the harness; check the names, or give task_path")


def run_tasks(
    model: Any, tokenizer: Any, tasks: tuple[str, ...], manager: Any, *, batch_size: int, seed: int, what: str
) -> dict[str, dict[str, float]]:
    """Every number the harness reports, by task and by the harness's own name of the metric."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        with _silence(), quiet_transformers():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, log_samples=False, **seeds)
    except Exception as e:  # downloads, templates and metrics of others: anything can happen
        raise CoterieError(f"{what}: the harness failed on {', '.join(tasks)}: {type(e).__name__}: {e}") from e
    return {
        task: {metric: float(value) for metric, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Swallows what the harness prints, and what the git it calls writes straight to the process's standard error."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
