"""`coterie bench`: how fast a checkpoint runs on this machine, beside another one and what the machine can read.

Last step of the flow. Everything that is compared runs interleaved in one process, and single calls are timed: another
process disturbs both sides alike. Whole models first, prefill and decode; then the kernels on one expert matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.codecs.open import opened
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.record import Progress, no_progress

if TYPE_CHECKING:
    pass
from coterie.judge.speed import (
    Runner,
    _batches,
    _check_threads,
    _clock_name,
    _entry,
    _threads,
    kernel_rows,
    measure,
    read_bandwidth,
)


def bench(
    model: str | Path,
    *,
    against: str | Path | None = None,
    threads: int | None = None,
    batch: str | list[int] = "1,4,16",
    dtype: str = "auto",
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """Tokens per second of a model (and of another one), bytes read per token, and the share of memory bandwidth.

    batch: how many sequences run together, one number or several. threads: of torch and of our kernels (default:
    torch's own number). dtype: as in `load`.
    Returns `{"machine", "clock", "bandwidth" (bytes/s), "models": [{"path", "bytes", "bytes_per_token", "prefill",
    "decode", "bandwidth_share"}], "kernels", "notes"}`. prefill and decode hold, per batch, tokens per second as
    quantiles (10, 50, 90) over single calls; the share is of decoding one sequence, at the median; it and the bytes
    per token are None where experts are of no family that we know. `kernels`: one
    expert matrix of MODEL by our sparse kernel, torch's and our dense ones, and dense int4: bytes, seconds of a call
    (20th percentile), share of bandwidth, and how often faster than each rival.
    Raises: CoterieError for a model that does not load or cannot run, and options out of range.
    """
    sizes = _batches(batch)
    _check_threads(threads)
    paths = [model] if against is None else [model, against]
    views = [opened(Checkpoint.open(path)) for path in paths]
    from coterie.model.loading import load

    with _threads(threads) as number:
        from coterie.kernels import cases

        runners = [Runner(str(path), load(path, dtype=dtype).eval()) for path in paths]
        speeds = measure(runners, sizes, on_progress)
        notes = [note for runner in runners for note in runner.notes]
        del runners
        on_progress("measuring kernels", 0, 1)
        bandwidth = read_bandwidth(number)
        kernels = kernel_rows(views[0], number, notes)
        on_progress("measuring kernels", 1, 1)
        found = {"machine": cases.machine(number), "clock": _clock_name(number), "bandwidth": bandwidth}
    entries = [_entry(str(p), v, s, bandwidth, notes) for p, v, s in zip(paths, views, speeds, strict=True)]
    return found | {"models": entries, "kernels": kernels, "notes": notes}
