"""Give the routed experts 8, 4, 3 or 2 bits a weight; everything else stays as it is.

Example: coterie quantize MODEL OUT --bits 4
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from coterie.decide.quantizing import Quantising, decided, prepared
from coterie.edits.execution import Io, Request, Writing, execute
from coterie.model.layer import Model
from coterie.options import ModelPath, OutPath, public
from coterie.pages.terminal import show_report as show
from coterie.storage.folders import existing
from coterie.storage.record import Progress, Report, no_progress

__all__ = ["quantize", "show"]


@public
def quantize(
    model: ModelPath,
    out: OutPath,
    *,
    quantising: Quantising,
    writing: Annotated[Writing, {"save": None}],
    io: Io = "auto",
    on_progress: Progress = no_progress,
) -> Report:
    """Writes the routed experts in few bits, as compressed-tensors' `pack-quantized`: w = q s, q of so many bits, and
    one scale s, of the matrix's own dtype, for `group_size` neighbouring weights of a row.

    bits: 8, 4, 3 or 2; two-bit scales may be negative, so that the fourth level is on the side where it serves.
    average, per, allocate: instead, the mean bits of codes over all experts' weights, scales left out; each expert gets
    0 (dropped: its router row stays), 2, 3, 4 or 8, or each layer 2 to 8, by what those were measured to cost on data
    (`decide/widths.py`), or by the controls frequency and random.
    format: compressed-tensors, which transformers and vLLM read, or coterie (`codecs/integers.py`), which alone can say
    widths that differ.
    method: round (scales reach the largest weight), search (scales of the least squared error, weighted by the mean
    square of what a weight multiplies where there are data), or gptq (weights still to be rounded make up for the
    errors of those before; needs data).
    data: NAME=FILE, as in `collect`; layers are quantised one after the other, each on what the quantised ones before
    it give. gptq without it runs on texts that ship.
    samples, seq_len, seed, dtype: as in `collect`.
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    Experts that no token reaches are quantised by search, and listed as cold; so are those of multi-token-prediction
    layers, which are not listed.
    Raises: CoterieError, before anything is written.
    """
    request = Request(
        command="quantize", path=model, out=Path(out), options=quantising.record(), writing=writing, io=io,
        on_progress=on_progress,
    )  # fmt: skip
    source = Model.open(model)
    decision = decided(source, quantising, existing(Path(out).parent), on_progress)
    return execute(source, decision, request, prepare=prepared(source, quantising, decision.plan, request))
