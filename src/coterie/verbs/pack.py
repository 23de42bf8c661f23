"""Store zeros as one bit each: smaller on disk and in memory, and faster to decode from.

Example: coterie pack OUT PACKED
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from coterie.edits import pack as packing
from coterie.edits.execution import Writing
from coterie.options import Help, OutPath, public
from coterie.pages.terminal import show_packed as show
from coterie.storage.record import Progress, Report, no_progress

__all__ = ["pack", "show"]


@public
def pack(
    dense: Annotated[str | Path, Help("A folder whose matrices hold zeros.", "DENSE", given=str)],
    out: OutPath,
    *,
    values: Annotated[str, Help("as stored, or int8: rounded, with a scale per 128 columns.")] = "as stored",
    writing: Annotated[Writing, {"save": None}],
    on_progress: Progress = no_progress,
) -> Report:
    """Writes DENSE to OUT with its sparse matrices packed: one bit per weight, and the values that are not zero.

    Experts, and other matrices of decoder layers; each only where it takes fewer bytes. The report of a folder that
    another command wrote stays that command's, with `report.packed` (and `report.packed_from`, the dense fingerprint).
    values: "as stored", which `unpack` restores exactly, or "int8", rounded with a scale per 128 columns, which it
    cannot.
    Raises: CoterieError, before anything is written, when no matrix would shrink.
    """
    return packing.pack(dense, Path(out), values=values, writing=writing, on_progress=on_progress)
