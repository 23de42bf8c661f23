"""`coterie collect`: calibrate once; every criterion reads the one file.

One streaming forward over the samples of all domains together, so that each expert is read once; every token knows
its domain and half (of the domain's samples, every second one), and is added to their sums. Axis G: 2 * domain + half.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.forward.data import calibration_files
from coterie.forward.samples import Calibration, Data, compute_dtype, read_samples
from coterie.model.layer import Model
from coterie.model.stats import MERGING
from coterie.storage.files import check_new_file
from coterie.storage.record import Progress, Stopwatch, no_progress, versions

if TYPE_CHECKING:
    import numpy as np


Sums = dict[str, "np.ndarray"]  # of one layer by name, each (G, ...)
SCALARS = ("tokens", "gates", "output_norms", "gated_output_norms", "output_norms_squared")


def collect(
    model: str | Path,
    stats: str | Path,
    *,
    data: Data = (),
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    dtype: str = "auto",
    merging: bool = False,
    overwrite: bool = False,
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measures what the experts of a model do on calibration data, and writes it to the file `stats`.

    data: NAME=FILE (a text, JSON lines, Parquet, a folder, or hub:OWNER/NAME); without it, texts that ship.
    samples: sequences in all, spread evenly over the names; seq_len: tokens of each; seed: which of them.
    dtype: auto (as the experts are stored), float32, bfloat16 or float16.
    merging: also what `merge` needs, for which every expert runs on every token: about E / K times the work.
    Raises: CoterieError, before anything is written.
    """
    from coterie.forward.measure import measure

    clock, out = Stopwatch(), Path(stats)
    check_new_file(out, overwrite)
    source = Model.open(model)
    chosen = compute_dtype(source, dtype)
    calibration = Calibration(data=calibration_files(data), samples=samples, seq_len=seq_len, seed=seed)
    by_domain, notes = read_samples(source, calibration)
    extra = MERGING if merging else ()
    result = measure(source, by_domain, chosen, on_progress, extra=extra, spill=out.parent)
    result.save(out)
    return {
        "stats": str(out),
        "model": {"path": str(model), "hash": result.model},
        "options": {"samples": samples, "seq_len": seq_len, "seed": seed, "dtype": str(chosen).removeprefix("torch.")}
        | ({"merging": True} if merging else {}),
        "domains": {name: {"samples": len(given), "tokens": sum(map(len, given))} for name, given in by_domain.items()},
        "layers": result.layers,
        "notes": [*notes, *result.notes],
        "versions": versions(),
        **clock.read(),
    }
