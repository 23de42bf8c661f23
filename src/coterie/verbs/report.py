"""Quality against bytes against speed: one page with plots and tables, which opens without a network.

Example: coterie report MODEL OUT1 OUT2 -o report.html --data prose=prose.txt
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from coterie.judge.facts import Models, named
from coterie.judge.judging import Card, Files, Judging, judged_files, put_card
from coterie.options import Help, Resume, public
from coterie.pages.page import sized
from coterie.pages.terminal import Asked, interval, table
from coterie.pages.verdict import decide, read_budget
from coterie.storage.folders import check_file
from coterie.storage.record import Progress, no_progress


# What was not measured is said. `judge/lineup.py` measures, and `pages/report.py` lays the numbers out.
@public
def report(
    models: Annotated[
        Models,
        Help(
            "The original first, then what was made of it; NAME=MODEL to call it so.",
            "MODEL...",
            given=list[str],
        ),
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
    budget: Annotated[
        str | int | None,
        Help("Bytes within which the verdict is, as 20GB [default: all smaller results].", "SIZE", given=str),
    ] = None,
    speed: Annotated[bool, Help("Do not measure tokens per second.")] = True,
    card: Card = False,
    resume: Resume = False,
    overwrite: Annotated[bool, Help("Replace FILE.")] = False,
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measures the models, the first of which is the original, and writes one self-contained HTML page to `out`.

    models: paths, NAME=PATH items, or a dictionary of paths by name. budget: bytes, as a number or as in "20GB"; the
    reader of the page can move it. speed: whether to measure tokens per second, for which all models are in memory at
    once. card: whether the numbers go into README.md of each model that Coterie made. resume: what is measured is kept
    in FILE.partial, model by model, from which the same call goes on.
    data, window, stride, batch_size, max_new_tokens, dtype, seed: as in `eval`; without data, the held-out texts that
    ship are judged.
    Returns what the page shows: `{"models": [...], "references": [...], "verdict", "options", "notes", "versions",
    "seconds", ...}`. A model has "name", "path", "ways" (what was done to the original, such as "pruned"), "bytes",
    "parameters", "bits_per_parameter" (8 bytes / the original's parameters), "experts" (by layer; None: unknown),
    "mean" (loss, nats per token, mean over data sets), "cut" (share of answers cut off), "perplexity" and "exact_match"
    as `eval` has them; where it applies "paired" (as `eval --against` has it, with "mean"), "fate" (of the original's
    experts), "kurtosis", "sparsity", "speed". `references` holds the original with experts rounded to 4 bits, and
    what "makes" it. "verdict" is {"budget", "best" (a name, or None where nothing fits), "sentence", "front" (names:
    no other is both smaller and better), "steps" (the best from so many "bytes" on)}.
    Raises: CoterieError for bad options, data or models, and when `out` exists (unless `overwrite`) or is no place.
    """
    from coterie.judge.lineup import side_by_side
    from coterie.pages.report import render

    page, line, models = Path(out), read_budget(budget), named(models)
    check_file(page, resume=resume, overwrite=overwrite)
    with side_by_side(models, data, judging, on_progress, page, resume=resume, overwrite=overwrite) as lineup:
        found = lineup.compare(speed=speed)
        verdict = decide(found, line)
        lineup.run.finish_file(lambda file: file.write_text(render(found, verdict), encoding="utf-8"))
    for entry in found["models"] if card else ():
        put_card(entry["path"], entry)
    return {"out": str(out), **found, "verdict": verdict}


def show(found: dict[str, Any], asked: Asked) -> Iterator[str]:
    """The verdict; size and loss of every model on the page."""
    entries, verdict = [*found["models"], *found["references"]], found["verdict"]
    shown = [sized(m["bytes"]) + (f", loss {interval(m['mean'])}" if m["mean"] else "") for m in entries]
    title = f"{asked['out']}: written in {found['seconds']:.1f} s"
    yield from table(title, list(zip((m["name"] for m in entries), shown, strict=True)))
    yield f"within {sized(verdict['budget'])}: {verdict['sentence']}"
