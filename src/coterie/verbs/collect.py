"""Measure once what the experts do on data; criteria read the one file.

Example: coterie collect MODEL STATS --data code=code.txt --data prose=prose.txt
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from coterie.forward.samples import Calibration, Dtype, compute_dtype, counted, dtype_name, read_samples
from coterie.model.layer import Model
from coterie.model.stats import MERGING
from coterie.options import Help, ModelPath, Resume, public
from coterie.pages.terminal import Asked, table
from coterie.storage.folders import check_file
from coterie.storage.record import Progress, Stopwatch, no_progress, versions
from coterie.storage.resumable import Resumable


@public
def collect(
    model: ModelPath,
    stats: Annotated[str | Path, Help("The file to write; must not exist.", "STATS", given=Path)],
    *,
    calibration: Calibration,
    dtype: Dtype = "auto",
    merging: Annotated[bool, Help("Also what merge needs: every expert on every token, so much slower.")] = False,
    resume: Resume = False,
    overwrite: Annotated[bool, Help("Replace STATS.")] = False,
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measures what the experts of a model do on calibration data, and writes it to the file `stats`.

    data: NAME=FILE (a text, JSON lines, Parquet, a folder, or hub:OWNER/NAME); without it, texts that ship.
    samples: sequences in all, spread evenly over the names; seq_len: tokens of each; seed: which of them.
    dtype: auto (as the experts are stored, or float32 where that is faster), float32, bfloat16 or float16.
    merging: also what `merge` needs, for which every expert runs on every token: about E / K times the work.
    resume: what is finished is kept in STATS.partial, layer by layer, from which the same call goes on.
    Raises: CoterieError, before anything is measured.
    """
    from coterie.forward.measure import measure

    clock, out = Stopwatch(), Path(stats)
    check_file(out, resume=resume, overwrite=overwrite)
    source = Model.open(model)
    chosen = compute_dtype(source, dtype, out if resume else None)
    by_domain, notes = read_samples(source, calibration)
    options = calibration.sizes | {"dtype": dtype_name(chosen)} | ({"merging": True} if merging else {})
    asked = {"command": "collect", "options": options | {"data": calibration.named}, "source": source.checkpoint.hash}
    with Resumable(out, asked, resume=resume, replace=overwrite) as run:
        told, extra = run.start(on_progress), MERGING if merging else ()
        result = measure(source, by_domain, chosen, told, extra=extra, run=run, spill=out.parent)
        run.finish_file(result.save)
    return {
        "stats": str(out),
        "model": {"path": str(model), "hash": result.model},
        "options": options,
        "domains": counted(by_domain),
        "layers": result.layers,
        "notes": [*notes, *result.notes],
        "versions": versions(),
        **clock.read(),
    }


def show(found: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    """How much was measured."""
    rows = [(f"data {n}", f"{d['samples']:,} samples, {d['tokens']:,} tokens") for n, d in found["domains"].items()]
    rows += [("MoE layers", f"{len(found['layers']):,}"), ("peak memory", f"{found['peak_rss_bytes'] / 1e6:.0f} MB")]
    return table(f"{asked['stats']}: done in {found['seconds']:.1f} s", rows)
