"""Restore the dense checkpoint, byte for byte.

Example: coterie unpack PACKED DENSE
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from coterie.edits import pack as packing
from coterie.edits.execution import Writing
from coterie.options import Help, OutPath, public
from coterie.pages.terminal import show_packed as show
from coterie.storage.record import Progress, Report, no_progress

__all__ = ["show", "unpack"]


@public
def unpack(
    packed: Annotated[str | Path, Help("A folder that `coterie pack` wrote.", "PACKED", given=str)],
    dense: OutPath,
    *,
    writing: Annotated[Writing, {"save": None}],
    on_progress: Progress = no_progress,
) -> Report:
    """Restores the dense checkpoint that `pack` packed: same tensors, same order, same bytes.

    Raises: CoterieError for a checkpoint that is not packed, or whose parts are damaged; nothing is written then.
    """
    return packing.unpack(packed, Path(dense), writing=writing, on_progress=on_progress)
