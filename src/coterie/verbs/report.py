"""`coterie report`: an original and what was made of it, side by side on one page: quality, bytes, speed.

`judge/lineup.py` measures, and `pages/report.py` lays the numbers out. The first model is the original; all others are
compared with it on the same tokens. What was not measured is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError
from coterie.forward.data import parse_data, read_documents
from coterie.pages.report import render
from coterie.reference_model import HELD_OUT
from coterie.storage.files import check_new_file, write_whole
from coterie.storage.record import Progress, Stopwatch, no_progress, versions


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
    from coterie.judge.lineup import Comparison, Lineup, warnings_to
    from coterie.judge.quality import Judging

    paths = [models] if isinstance(models, str | Path) else list(models)
    if not paths:
        raise CoterieError("no model was given; expected the original first, then what was made of it")
    clock, target = Stopwatch(), Path(out)
    check_new_file(target, overwrite)
    options = Judging(
        window=window, stride=stride, batch_size=batch_size, max_new_tokens=max_new_tokens, dtype=dtype, seed=seed
    )
    files: Any = data if isinstance(data, dict) else parse_data([data] if isinstance(data, str) else data)
    notes: list[str] = []
    if not files:
        files = HELD_OUT
        notes.append(f"no --data: judged on the held-out texts that ship with coterie ({', '.join(HELD_OUT)})")
    documents = {name: list(read_documents(file, notes)) for name, file in files.items()}
    lineup = Lineup(paths, documents, options, on_progress, notes)
    with warnings_to(notes):
        measured = lineup.models(files)
        references = lineup.references()
        if speed:
            lineup.add_speed(measured)
        else:
            notes.append("speed was not measured: not asked for")
    found: Comparison = {
        "models": measured,
        "references": references,
        "options": {**vars(options), "task_path": None, "data": {name: str(file) for name, file in files.items()}},
        "notes": _grouped(notes, [f"{path}: {name}: " for path in paths for name in files]),
        "versions": versions(),
        **clock.read(),  # type: ignore[typeddict-item]
    }
    write_whole(target, lambda partial: partial.write_text(render(found), encoding="utf-8"))
    return {"out": str(out), **found}


def _grouped(notes: Sequence[str], prefixes: Sequence[str]) -> list[str]:
    """The notes, those that differ in their model and data set alone as one."""
    found: dict[str, list[str]] = {}
    for note in notes:
        prefix = next((p for p in prefixes if note.startswith(p)), "")
        found.setdefault(note.removeprefix(prefix), []).append(prefix)
    more = {rest: len(dict.fromkeys(where)) - 1 for rest, where in found.items()}
    return [
        where[0] + rest + (f" (and in {more[rest]} more of these evaluations)" if more[rest] else "")
        for rest, where in found.items()
    ]
