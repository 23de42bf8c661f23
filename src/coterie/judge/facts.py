"""What headers and records say of a model, and what was measured when it was made: first of what `report` shows.

A record may by now hold anything: its numbers are checked, not trusted, and the files that it names are read only where
they may be those that the model is judged on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from coterie.codecs.open import opened
from coterie.edits.kurtosis import of_experts
from coterie.edits.lineage import plans_between
from coterie.edits.plan import Plan, read_plan
from coterie.errors import CoterieError
from coterie.forward.sources import MAX_DATA
from coterie.model.family import names_experts
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint, resolve
from coterie.storage.record import object_at, record_of, typed

LONGEST = 400  # characters of a command that are shown
Digest = tuple[int, str]  # bytes of a file, and their hash
Models = str | Path | Sequence[str | Path] | Mapping[str, str | Path]  # NAME=FOLDER items, or a dictionary of them
WAYS: dict[str, Callable[[Plan], bool]] = {  # of making a model smaller: whether a plan does it
    "pruned": lambda plan: any(not choice.merged for choice in plan.choices.values()),
    "merged": lambda plan: any(choice.merged for choice in plan.choices.values()),
    "condensed": lambda plan: any(layer.experts for layer in plan.condensed.values()),
    "layers dropped": lambda plan: bool(plan.dropped) or not all(layer.experts for layer in plan.condensed.values()),
    "zeros": lambda plan: bool(plan.sparsity),
    "quantised": lambda plan: bool(plan.at("bits")),
}


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


def named(models: Models) -> dict[str, str | Path]:
    """The models by name, all different, in their order: NAME=FOLDER has its own name; others have their folder's, or
    what was typed, where two agree.

    Raises: CoterieError where no model is given, or two have one label.
    """
    if isinstance(models, Mapping):
        split = [(str(name), path) for name, path in models.items()]
    else:
        split = [_labelled(m) for m in ([models] if isinstance(models, str | Path) else models)]
    if not split:
        raise CoterieError("no model was given; expected the original first, then what was made of it")
    labels = [label for label, _ in split if label]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise CoterieError(f"{twice}=...: two models are called so; give each a name of its own")
    short = [label or (Path(path).resolve().name if Path(path).is_dir() else str(path)) for label, path in split]
    found: dict[str, str | Path] = {}
    for (label, path), name in zip(split, short, strict=True):
        wanted = name if label or short.count(name) == 1 else str(path)
        copies = (f"{wanted} ({i})" for i in count(2))
        found[wanted if label or wanted not in {*found, *labels} else next(c for c in copies if c not in found)] = path
    return found


def _labelled(model: str | Path) -> tuple[str, str | Path]:
    """(label, path) of NAME=FOLDER; no label where a folder is called so, equals sign and all."""
    label, equals, path = str(model).partition("=")
    return (label, path) if label and path and equals and not Path(model).exists() else ("", model)


def ways(path: str | Path, original_hash: str) -> list[str]:
    """What was done to the original, each of `WAYS` once, in order; as far back as records lead.

    What cannot be read says nothing: the map of the experts, which needs the same records, says why.
    """
    try:
        folder = resolve(path)
        record = record_of(folder) or {}
        plans = plans_between(folder, original_hash)
        plans = [read_plan(record)] if plans is None and record else plans or []
    except CoterieError:
        return []
    found = [way for plan in plans for way, was_done in WAYS.items() if was_done(plan)]
    return list(dict.fromkeys(found + ["recovered"] * (record.get("command") == "recover")))


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
