"""Quality against bytes against speed: one page with plots and tables, which opens without a network.

Example: coterie report MODEL OUT1 OUT2 -o report.html --data prose=prose.txt
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from coterie.errors import CoterieError
from coterie.judge.judging import Files, Judging, judged_files
from coterie.options import Help, public
from coterie.pages.terminal import Asked, interval, table
from coterie.storage.files import check_new_file, write_whole
from coterie.storage.record import Progress, no_progress


# What was not measured is said. `judge/lineup.py` measures, and `pages/report.py` lays the numbers out.
@public
def report(
    models: Annotated[
        str | Path | Sequence[str | Path],
        Help("The original first, then what was made of it.", "MODEL...", given=list[str]),
    ],
    out: Annotated[str | Path, Help("The page to write; must not exist.", "FILE", flags=("--out", "-o"), given=Path)],
    *,
    data: Annotated[
        Files,
        Help(
            "As for eval; repeatable [default: texts that ship].",
            "NAME=FILE",
            given=list[str],
            read=judged_files,
            default=(),
        ),
    ],
    judging: Annotated[Judging, {"tasks": None, "task_path": None}],
    speed: Annotated[bool, Help("Do not measure tokens per second.")] = True,
    overwrite: Annotated[bool, Help("Replace FILE.")] = False,
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
    from coterie.pages.report import render

    paths = [models] if isinstance(models, str | Path) else list(models)
    if not paths:
        raise CoterieError("no model was given; expected the original first, then what was made of it")
    target = Path(out)
    check_new_file(target, overwrite)
    found = side_by_side(paths, data, judging, on_progress, speed=speed)
    write_whole(target, lambda partial: partial.write_text(render(found), encoding="utf-8"))
    return {"out": str(out), **found}


def show(found: dict[str, Any], asked: Asked) -> Iterator[str]:
    """Bytes and loss of every model on the page."""
    entries = [*found["models"], *found["references"]]
    shown = [f"{m['bytes']:,} bytes" + (f", loss {interval(m['mean'])}" if m["mean"] else "") for m in entries]
    title = f"{asked['out']}: written in {found['seconds']:.1f} s"
    return table(title, list(zip((m["name"] for m in entries), shown, strict=True)))
