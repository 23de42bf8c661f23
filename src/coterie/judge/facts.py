"""What headers and records say of a model, and what was measured when it was made: first of what `report` shows.

A record may by now hold anything: its numbers are checked, not trusted, and the files that it names are read only where
they may be those that the model is judged on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.codecs.open import opened
from coterie.edits.kurtosis import of_experts
from coterie.errors import CoterieError
from coterie.forward.sources import MAX_DATA
from coterie.model.family import names_experts
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint, resolve
from coterie.storage.record import object_at, record_of, typed

LONGEST = 400  # characters of a command that are shown
Digest = tuple[int, str]  # bytes of a file, and their hash


@dataclass(frozen=True)
class Facts:
    """Sizes and fingerprint of a model, and what its coterie.json recorded."""

    bytes: int
    parameters: int
    experts: dict[str, int] | None  # by layer, none where no layer has any left; None where they are not understood
    hash: str
    command: str | None  # as one would type it
    sparsity: float | None  # share of expert weights that are removed or zero
    kurtosis: dict[str, float]  # of expert weights, by stage: as recorded, or as it is
    calibrated: Mapping[str, object]  # files, by name
    notes: tuple[str, ...] = ()  # of what is unknown

    def as_dict(self) -> dict[str, object]:
        """The facts as `report` returns them."""
        return {key: value for key, value in vars(self).items() if key not in ("calibrated", "notes")}

    @classmethod
    def of(cls, path: str | Path) -> Facts:
        """Raises: CoterieError for no checkpoint, and for a damaged record."""
        folder = resolve(path)
        checkpoint, record = Checkpoint.open(folder), record_of(folder) or {}
        view = opened(checkpoint)
        made, options = object_at(record, "report"), object_at(record, "options")
        stages = object_at(made, "kurtosis").items()
        kurtosis = {str(stage): n for stage, value in stages if (n := _number(value)) is not None}
        experts, notes = None, []
        try:
            model = Model.of(view) if names_experts(view.tensors) else None
            experts = {b.key: b.num_experts for b in model.main} if model else {}
        except CoterieError as error:
            model, notes = None, [f"how many experts its layers have is unknown: {error}"]
        if model and not kurtosis:  # which takes reading all experts
            try:
                found = of_experts(model)
                kurtosis = {} if found is None else {"as it is": found}
            except CoterieError as error:  # rounded, or in a coding that is not read
                notes = [f"the kurtosis of its experts' weights is unknown: {error}"]
        return cls(
            bytes=checkpoint.num_bytes,
            parameters=view.num_parameters,
            experts=experts,
            hash=checkpoint.hash,
            command=_command(record.get("command"), options),
            sparsity=_number(object_at(made, "sparsity").get("experts")),
            kurtosis=kurtosis,
            calibrated=object_at(options, "data"),
            notes=tuple(notes),
        )


def _command(command: object, options: dict[str, object]) -> str | None:
    """The command as one would type it, from a record."""
    text = typed(command, options) if isinstance(command, str) else None
    return f"{text[:LONGEST]} [...]" if text and len(text) > LONGEST else text


def _number(value: object) -> float | None:
    """A finite number, or nothing."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def names_of(paths: Sequence[str | Path]) -> list[str]:
    """A name for each model, all different: its folder's; with what stands above it, or a number, where two agree."""
    names = [Path(path).resolve().name if Path(path).is_dir() else str(path) for path in paths]
    names = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def overlaps(name: str, calibrated: Mapping[str, object], digests: dict[str, Digest | None]) -> list[str]:
    """A note for each file that the model was calibrated on and is judged on."""
    sizes = {digest[0] for digest in digests.values() if digest}
    seen = {digest_of(file, sizes): file for file in calibrated.values() if isinstance(file, str)}
    return [
        f"{name}: was calibrated on {seen[digest]}, which it is judged on as {data!r}: expect too good a result"
        for data, digest in digests.items()
        if digest is not None and digest in seen
    ]


def digest_of(file: str | Path, sizes: Container[int] = range(1, MAX_DATA + 1)) -> Digest | None:
    """Size and hash of a regular file of such a size; nothing for anything else: a record may name any file here."""
    try:
        path = Path(file)
        size = path.stat().st_size if path.is_file() else 0
        if size not in sizes:
            return None
        with path.open("rb") as opened:
            return size, hashlib.file_digest(opened, "sha256").hexdigest()
    except (OSError, ValueError):
        return None
