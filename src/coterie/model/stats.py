"""What calibration measured, per layer and expert, per data domain; one safetensors file, mergeable by adding.

Everything is a sum over tokens (or a maximum, `MAXIMA`), so that two files of disjoint data add up to the file of both,
and so that domains can be re-weighted without another run. Each is kept for two halves of its domain's samples, so that
a choice can be made twice, from different data, and compared (`stability`). Axes: E expert, D hidden, F expert hidden.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coterie.errors import CoterieError
from coterie.storage.checkpoint import check_cost, read_bytes, read_header
from coterie.storage.files import write_whole
from coterie.storage.shards import Hole, Output, header_bytes

FORMAT = "coterie-stats-1"
SUMS = {  # name: its axes, and what is summed
    "num_tokens": ("", "tokens that the router saw"),
    "tokens": ("E", "tokens routed to the expert"),
    "gates": ("E", "routing weights g"),
    "output_norms": ("E", "||y||, y the expert's output before its weight"),
    "gated_output_norms": ("E", "g ||y||"),
    "output_norms_squared": ("E", "||y||^2"),
    "output_max": ("E", "the largest |y_d| of any token and channel: a maximum, not a sum"),
    "inputs_squared": ("ED", "x^2 per input channel of gate and up"),
    "gated_inputs_squared": ("ED", "(g x)^2"),
    "hidden_squared": ("EF", "h^2 per input channel of down"),
    "gated_hidden_squared": ("EF", "(g h)^2"),
    "outputs": ("ED", "y"),
    "coactivation": ("EE", "tokens that chose both"),
    "logits": ("E", "z over all num_tokens: what the router computes before softmax or sigmoid; no selection biases"),
    "logits_squared": ("E", "z^2"),
}
MERGING = {  # measured only for `merge`: the first takes E / K times the work of all others
    "all_outputs": ("ED", "y over all num_tokens, whether the token chose the expert or not"),
    "logit_products": ("EE", "z_i z_j over all num_tokens"),
}
KNOWN = SUMS | MERGING
MAXIMA = ("output_max",)  # of these, two values make the larger of them; a domain counts unless its weight is 0
SIGNED = ("gates", "gated_output_norms", "outputs", "logits", "all_outputs", "logit_products")  # may be negative
HALVES = 2
LARGEST = 1e150  # beyond it squares and totals would overflow


@dataclass
class Stats:
    """Sums by (domain, layer key, name), each (2, *axes): of the domain's even samples, and of its odd ones.

    model: the fingerprint; samples: how many each domain gave, in both halves together; notes: what is not there.
    """

    model: str
    samples: dict[str, int] = field(default_factory=dict)
    sums: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, domain: str, layer: str, name: str, value: np.ndarray) -> None:
        """Adds both halves' values (2, *axes) to a sum, in float64."""
        assert name in KNOWN, name
        key, value = (domain, layer, name), np.asarray(value, dtype=np.float64)
        self.sums[key] = joined(name)(self.sums[key], value) if key in self.sums else value

    def take(self, other: Stats) -> None:
        """Moves another's sums of other layers, and its notes, here."""
        self.sums |= other.sums
        self.notes += other.notes
        other.sums, other.notes = {}, []

    @property
    def layers(self) -> list[str]:
        return sorted(
            {layer for _, layer, _ in self.sums}, key=lambda k: (not k.isdigit(), int(k) if k.isdigit() else 0)
        )

    def half(self, index: int) -> Stats:
        """The sums of every second sample of each domain: half 0 has the first, half 1 the second.

        Samples alternate within what one run was given of a domain; halves of merged files are the halves' sums.
        """
        assert index in range(HALVES), index
        halves = {key: value[index : index + 1] for key, value in self.sums.items()}
        return Stats(self.model, self.samples, halves, self.notes)

    def get(self, layer: str, name: str, weights: Mapping[str, float] | None = None) -> np.ndarray:
        """A sum over all domains, each multiplied by its weight (default 1), as if its data were given so often.

        Raises: CoterieError for a domain, a layer or a sum that was not measured, and for totals out of range.
        """
        unknown = set(weights or {}) - set(self.samples)
        if unknown:
            raise CoterieError(
                f"domain {sorted(unknown)[0]!r} is not in the statistics; they hold {', '.join(self.samples)}"
            )
        found = [(self.sums.get((d, layer, name)), (weights or {}).get(d, 1.0)) for d in self.samples]
        with np.errstate(over="ignore", invalid="ignore"):
            parts = [_weighted(name, value, weight) for value, weight in found if value is not None]
        if not parts:
            missing = "; ".join([f"layer {layer} has no {name!r} in the statistics", *self.notes])
            raise CoterieError(f"{missing}; collect them again on this model")
        if len({part.shape for part in parts}) > 1 or not all((np.abs(part) <= LARGEST).all() for part in parts):
            raise CoterieError(f"layer {layer}: {name!r} is damaged or out of range; collect the statistics again")
        return joined(name).reduce(parts)

    def check_model(self, fingerprint: str, where: str) -> None:
        """Raises: CoterieError when the statistics were collected on another model."""
        if self.model != fingerprint:
            raise CoterieError(
                f"{where}: collected on another model (fingerprint {self.model[:16]}, here {fingerprint[:16]}); "
                "collect them again on this one"
            )

    def save(self, path: Path) -> None:
        """Writes one safetensors file, the same bytes for the same sums; the name is absent or complete."""
        values = {"/".join(key): self.sums[key].astype("<f8") for key in sorted(self.sums)}
        outputs = [Output(name, "F64", v.shape, (Hole(v.nbytes),)) for name, v in values.items()]
        metadata = {"format": FORMAT, "model": self.model, "samples": json.dumps(self.samples)}
        raw = header_bytes(outputs, metadata | {"notes": json.dumps(self.notes)})
        write_whole(path, lambda partial: partial.write_bytes(b"".join([raw, *(v.tobytes() for v in values.values())])))

    @classmethod
    def load(
        cls, path: str | Path, only: Collection[str] = tuple(KNOWN), layers: Collection[str] | None = None
    ) -> Stats:
        """Reads such a file, or of its sums only those named, or only some layers'.

        Raises: CoterieError for anything else.
        """
        from coterie.storage.numerics import decode

        path = Path(path)
        try:
            tensors, metadata = read_header(path)
        except CoterieError:
            raise
        except ValueError as error:  # a null byte in the name
            raise CoterieError(f"{str(path)!r}: not a file name ({error})") from error
        result = cls._of_metadata(path, metadata)
        result._check_complete(path, tensors)
        for name, tensor in tensors.items():
            key = tuple(name.rsplit("/", 2))  # a domain's name may hold slashes
            axes = KNOWN.get(key[-1], ("", ""))[0]
            has_halves = tensor.shape[:1] == (HALVES,) and len(tensor.shape) == 1 + len(axes)
            if len(key) != 3 or key[2] not in KNOWN or tensor.dtype != "F64" or not has_halves:
                raise CoterieError(
                    f"{path}: {name!r} is not a statistic; expected DOMAIN/LAYER/NAME in F64, two halves"
                )
            if key[2] in only and (layers is None or key[1] in layers):
                raw = read_bytes(path, tensor.start, tensor.num_bytes, name)
                result.sums[key] = decode(raw, tensor.dtype, name).reshape(tensor.shape)  # type: ignore[index]
                _check_values(path, name, result.sums[key])  # type: ignore[index]
        return result

    def _check_complete(self, path: Path, names: Collection[str]) -> None:
        """Raises: CoterieError where a domain lacks a sum that another has: its weight would change nothing."""
        measured = {tuple(name.rsplit("/", 2)[1:]) for name in names}
        for domain in self.samples:
            gone = next((rest for rest in sorted(measured) if "/".join((domain, *rest)) not in names), None)
            if gone:
                raise CoterieError(
                    f"{path}: domain {domain!r} has no {'/'.join(gone)!r}, which others have; collect again"
                )

    @classmethod
    def _of_metadata(cls, path: Path, metadata: dict[str, str]) -> Stats:
        """The statistics without their sums."""
        if metadata.get("format") != FORMAT:
            raise CoterieError(
                f"{path}: not a statistics file (format {metadata.get('format')!r}, expected {FORMAT!r})"
            )
        try:
            for name in ("samples", "notes"):
                check_cost(metadata.get(name, "").encode(), f"{path}: its {name}")
            samples, notes = json.loads(metadata["samples"]), json.loads(metadata.get("notes", "[]"))
            if not isinstance(notes, list):
                raise TypeError("notes are no list")
            return cls(metadata["model"], {str(k): int(v) for k, v in samples.items()}, notes=[str(n) for n in notes])
        except CoterieError:
            raise
        except (KeyError, ValueError, AttributeError, TypeError, RecursionError, OverflowError) as error:
            raise CoterieError(f"{path}: its metadata is damaged ({error}); collect the statistics again") from error


def joined(name: str) -> np.ufunc:
    """What makes one of two data sets' values: addition, or the larger."""
    return np.maximum if name in MAXIMA else np.add


def _weighted(name: str, value: np.ndarray, weight: float) -> np.ndarray:
    """Both halves of a domain (2, *axes), as if its data were given `weight` times."""
    return value.max(0) * (weight > 0) if name in MAXIMA else value.sum(0) * weight


def _check_values(path: Path, name: str, values: np.ndarray) -> None:
    """Raises: CoterieError for what no sum of the kind can be."""
    if not np.isfinite(values).all():
        raise CoterieError(f"{path}: {name!r} holds NaN or infinite values; collect the statistics again")
    if name.rpartition("/")[2] not in SIGNED and values.min(initial=0.0) < 0:
        raise CoterieError(f"{path}: {name!r} holds negative values; collect the statistics again")


def merge(files: Iterable[Stats]) -> Stats:
    """The statistics of all data together: every sum of every half is added.

    Raises: CoterieError for files of different models, or that hold different sums.
    """
    first, *rest = files
    result = Stats(first.model, dict(first.samples), dict(first.sums), list(first.notes))
    for other in rest:
        other.check_model(result.model, "statistics to merge")
        if {key[1:] for key in other.sums} != {key[1:] for key in result.sums}:
            raise CoterieError("statistics to merge hold different sums; collect them again with one version")
        result.notes = list(dict.fromkeys([*result.notes, *other.notes]))
        for domain, count in other.samples.items():
            result.samples[domain] = result.samples.get(domain, 0) + count
        for key, value in other.sums.items():
            result.add(*key, value)
    return result


def mean(sums: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Sums (E,) over the tokens (E,) of each expert; 0 for experts that no token chose."""
    return np.divide(sums, tokens, out=np.zeros_like(sums, dtype=np.float64), where=tokens > 0)


def parse_weights(weights: str | Mapping[str, float] | None) -> dict[str, float]:
    """{"code": 2.0, "chat": 1.0} of "code=2,chat=1", or of such a dictionary.

    Raises: CoterieError for another form, a name that comes twice, and weights that are negative or not finite.
    """
    if isinstance(weights, str):
        parts = [item.rpartition("=") for item in weights.split(",")]
        given = [(name.strip(), value) for name, _, value in parts]
    else:
        given = [(str(name), value) for name, value in (weights or {}).items()]  # type: ignore[misc]
    found: dict[str, float] = {}
    for name, value in given:
        try:
            weight = float(value)
        except (TypeError, ValueError, OverflowError):
            weight = math.nan
        if not name or not 0 <= weight < math.inf:
            raise CoterieError(f"--weights {name}={value}: expected NAME=WEIGHT, 0 or more, such as code=2,chat=0.5")
        if name in found:
            raise CoterieError(f"--weights names {name!r} twice; give each domain one weight")
        found[name] = weight
    return found


def stability(stats: Stats, choose: Callable[[Stats], dict[str, Collection[int]]]) -> dict[str, object]:
    """How much of a choice depends on the data at hand: what two halves of them choose in common (`agreement`).

    `choose` keeps experts by layer. Raises: whatever `choose` raises on half of the data.
    """
    first, second = (choose(stats.half(index)) for index in range(HALVES))
    return agreement(first, second)


def agreement(first: Mapping[str, Collection[int]], second: Mapping[str, Collection[int]]) -> dict[str, Any]:
    """What two choices of experts by layer have in common: |A & B| / max(|A|, |B|).

    {"layers": {key: share}, "mean": share}. 1 means the same experts; two sets drawn at random have about the kept
    share in common.
    """
    shares = {
        key: len(set(kept) & set(second[key])) / max(len(kept), len(second[key]), 1) for key, kept in first.items()
    }
    return {"layers": shares, "mean": sum(shares.values()) / max(len(shares), 1)}
