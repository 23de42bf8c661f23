"""`coterie report`: an original and what was made of it, side by side on one page: quality, bytes, speed.

`judge/lineup.py` measures, and `pages/report.py` lays the numbers out. The first model is the original; all others are
compared with it on the same tokens. What was not measured is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError
from coterie.forward.data import parse_data
from coterie.storage.files import check_new_file, write_whole
from coterie.storage.record import Progress, no_progress


def report(
    models: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    data: dict[str, str | Path] | Sequence[str] = (),
    window: int = 2048,
    stride: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    dtype: str = "auto",
    seed: int = 0,
    speed: bool = True,
    overwrite: bool = False,
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measures the models, the first of which is the original, and writes one self-contained HTML page to `out`.

    data, window, stride, batch_size, max_new_tokens, dtype, seed: as in `eval`; without data, the held-out texts that
    ship are judged. speed: whether to measure tokens per second, for which all models are in memory at once.
    Returns what the page shows: `{"models": [...], "references": [...], "options", "notes", "versions", "seconds",
    ...}`. A model has "name", "path", "bytes", "parameters", "bits_per_parameter" (8 bytes / the original's
    parameters), "experts" (by layer; None: unknown), "mean" (loss, nats per token, mean over data sets), "cut" (share
    of answers cut off), "perplexity" and "exact_match" as `eval` has them; where it applies "paired" (as `eval
    --against` has it, with "mean"), "fate" (of the original's experts), "kurtosis", "sparsity", "speed". `references`
    holds the original with experts rounded to 4 bits.
    Raises: CoterieError for bad options, data or models, and when `out` exists (unless `overwrite`) or is no place.
    """
    from coterie.judge.lineup import side_by_side
    from coterie.judge.quality import Judging
    from coterie.pages.report import render

    paths = [models] if isinstance(models, str | Path) else list(models)
    if not paths:
        raise CoterieError("no model was given; expected the original first, then what was made of it")
    target = Path(out)
    check_new_file(target, overwrite)
    options = Judging(
        window=window, stride=stride, batch_size=batch_size, max_new_tokens=max_new_tokens, dtype=dtype, seed=seed
    )
    files: Any = data if isinstance(data, dict) else parse_data([data] if isinstance(data, str) else data)
    found = side_by_side(paths, files, options, on_progress, speed=speed)
    write_whole(target, lambda partial: partial.write_text(render(found), encoding="utf-8"))
    return {"out": str(out), **found}
