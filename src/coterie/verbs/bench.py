"""Measure tokens per second, bytes read per token, and the share of what the memory can deliver. Writes nothing.

Example: coterie bench PACKED --against DENSE
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from coterie.codecs.open import opened
from coterie.forward.samples import Dtype
from coterie.judge.speed import (
    Runner,
    batch_sizes,
    check_threads,
    described,
    kernel_rows,
    limited_to,
    measure,
    read_bandwidth,
)
from coterie.options import Help, public
from coterie.pages.terminal import Asked, known, table
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.record import Progress, no_progress


@public
def bench(
    model: Annotated[str | Path, Help("A folder of safetensors, packed or not, or a hub id.", "OUT", given=str)],
    *,
    against: Annotated[str | Path | None, Help("Another one, measured in turn with it.", "MODEL", given=str)] = None,
    threads: Annotated[int | None, Help("Threads to compute with [default: torch's number].")] = None,
    batch: Annotated[str | list[int], Help("Sequences that run together.", "A,B,...", given=str)] = "1,4,16",
    dtype: Dtype = "auto",
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
    sizes = batch_sizes(batch)
    check_threads(threads)
    paths = [model] if against is None else [model, against]
    views = [opened(Checkpoint.open(path)) for path in paths]
    from coterie.model.loading import load

    with limited_to(threads) as number:
        from coterie.kernels import cases

        runners = [Runner(str(path), load(path, dtype=dtype).eval()) for path in paths]
        speeds = measure(runners, sizes, on_progress)
        notes = [note for runner in runners for note in runner.notes]
        del runners
        on_progress("measuring kernels", 0, 1)
        bandwidth = read_bandwidth(number)
        kernels = kernel_rows(views[0], number, notes)
        on_progress("measuring kernels", 1, 1)
        clock = "processor time of the one thread" if number == 1 else "wall time"
        found = {"machine": cases.machine(number), "clock": clock, "bandwidth": bandwidth}
    entries = [described(str(p), v, s, bandwidth, notes) for p, v, s in zip(paths, views, speeds, strict=True)]
    return found | {"models": entries, "kernels": kernels, "notes": notes}


def show(found: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    """The machine, each model, and the kernels."""
    about = found["machine"]
    read = f"{found['bandwidth'] / 1e9:.1f} GB/s" if found["bandwidth"] else "not measured"
    rows = [("kernels", ", ".join(about["kernels"])), ("threads", f"{about['threads']} of {about['cores']} cores")]
    yield from table(about["processor"], [*rows, ("read bandwidth", read), ("clock", found["clock"])])
    for entry in found["models"]:
        share = entry["bandwidth_share"]
        rows = [("bytes", f"{entry['bytes']:,}"), ("bytes read per token", known(entry["bytes_per_token"]))]
        rows += [("share of bandwidth", "unknown" if share is None else f"{100 * share:.0f} %")]
        for kind in ("prefill", "decode"):
            rows += [(f"{kind}, batch {b}", _speed(q)) for b, q in entry[kind].items()]
        yield from table(entry["path"], rows)
    if found["kernels"]:
        yield from _kernels(found["kernels"])


def _speed(found: dict[str, float]) -> str:
    return f"{found['50']:,.1f} tokens/s  [{found['10']:,.1f}, {found['90']:,.1f}]"


def _kernels(found: Mapping[str, Any]) -> Iterator[str]:
    """One line per kernel, and how often faster it is than each rival."""
    rows, columns = found["shape"]
    rivals = list(found["rows"][0]["times_faster_than"]) if found["rows"] else []
    yield f"{found['tensor']}: {rows} x {columns}, {100 * found['zeros']:.1f} % zeros"
    for row in found["rows"]:
        share = row["bandwidth_share"]
        of = "" if share is None else f", {100 * share:.0f} % of bandwidth"
        yield f"  {row['name']}: {row['bytes']:,} bytes, {1e6 * row['seconds']:.1f} us{of}"
        if row["name"].startswith("sparse"):
            ratios = (f"{row['times_faster_than'][rival]:.2f} of {rival}" for rival in rivals)
            yield f"    speed: {', '.join(ratios)}"
