"""What `eval` and `report` can be asked for. Light to import: neither torch nor transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from coterie.errors import CoterieError, check_choice
from coterie.forward.data import parse_data
from coterie.forward.samples import Dtype
from coterie.model.loading import DTYPES
from coterie.options import Help
from coterie.storage.card import put_quality
from coterie.storage.checkpoint import resolve

logger = logging.getLogger("coterie")

Files = Mapping[str, str | Path]  # by the name of the data set
Load = Callable[[str | Path], Any]  # the model at a path


Card = Annotated[bool, Help("Write what is measured into README.md of each model that coterie made.")]


def put_card(model: str | Path, entry: Mapping[str, Any]) -> None:
    """Writes a model's quality into its README.md, and says so where it has none of ours."""
    if not put_quality(resolve(model), entry):
        logger.warning("%s: no card of coterie's, so that nothing was written into it", model)


def judged_files(data: Files | Sequence[str] | str | None) -> Files:
    """Files by name: as a dictionary, or from `NAME=FILE` items."""
    return data if isinstance(data, Mapping) else parse_data([data] if isinstance(data, str) else data or ())


def task_names(tasks: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of tasks from a sequence, or from text as in "arc_easy,piqa"."""
    return tuple(name for name in tasks.split(",") if name) if isinstance(tasks, str) else tuple(tasks or ())


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How models are judged, by `eval` and `report`; checked."""

    window: Annotated[int, Help("Tokens of context per window.")] = 2048
    stride: Annotated[int | None, Help("Tokens between windows [default: half the window].")] = None
    tasks: Annotated[
        tuple[str, ...], Help("Comma-separated lm-evaluation-harness tasks.", given=str, read=task_names)
    ] = ()
    task_path: Annotated[str | Path | None, Help("A folder with task files of your own.", given=Path)] = None
    batch_size: Annotated[int, Help("Sequences per forward.")] = 32
    max_new_tokens: Annotated[int, Help("Longest generated answer.")] = 128
    dtype: Dtype = "auto"
    seed: Annotated[int, Help("Of the bootstrap.")] = 0

    def __post_init__(self) -> None:
        for name, least in {"window": 2, "stride": 1, "batch_size": 1, "max_new_tokens": 1, "seed": 0}.items():
            value = getattr(self, name)
            if (name, value) != ("stride", None) and (type(value) is not int or value < least):
                raise CoterieError(f"{name} is {value!r}; expected a whole number, at least {least}")
        check_stride(self.window, self.stride)
        check_choice("--dtype", self.dtype, DTYPES)
        if self.task_path is not None and not self.tasks:
            raise CoterieError(f"task_path is {self.task_path} but no tasks were asked; name them with tasks")


def check_stride(window: int, stride: int | None) -> None:
    """Raises: CoterieError for a stride that would leave a token without one before it in its window."""
    if stride is not None and stride >= window:
        raise CoterieError(
            f"stride is {stride} and the window {window} tokens; expected a stride of at most {window - 1}, "
            "since each token is scored with one before it in its window"
        )
