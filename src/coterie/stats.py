"""What calibration measured, per layer and expert, per data domain; one safetensors file, mergeable by adding.

Everything is a sum over tokens, so that two files of disjoint data add up to the file of both, and so that domains
can be re-weighted without another run. Axes: E expert, D hidden, F expert hidden.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coterie.checkpoint import read_header
from coterie.errors import CoterieError

FORMAT = "coterie-stats-1"
SUMS = {
    "tokens": "(E,) tokens routed to the expert",
    "gates": "(E,) sum of routing weights g",
    "output_norms": "(E,) sum of ||y||, y the expert's output before its weight",
    "gated_output_norms": "(E,) sum of g ||y||",
    "inputs_squared": "(E, D) sum of x^2 per input channel of gate and up",
    "gated_inputs_squared": "(E, D) sum of (g x)^2",
    "hidden_squared": "(E, F) sum of h^2 per input channel of down",
    "gated_hidden_squared": "(E, F) sum of (g h)^2",
    "outputs": "(E, D) sum of y",
    "coactivation": "(E, E) tokens that chose both",
}


@dataclass
class Stats:
    """Sums by (domain, layer key, name), the model's fingerprint, and how many samples each domain gave."""

    model: str
    samples: dict[str, int] = field(default_factory=dict)
    sums: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict)

    def add(self, domain: str, layer: str, name: str, value: np.ndarray) -> None:
        """Adds to a sum, in float64."""
        assert name in SUMS, name
        key = (domain, layer, name)
        self.sums[key] = self.sums[key] + value if key in self.sums else np.asarray(value, dtype=np.float64)

    @property
    def domains(self) -> list[str]:
        return list(self.samples)

    @property
    def layers(self) -> list[str]:
        return sorted(
            {layer for _, layer, _ in self.sums}, key=lambda k: (not k.isdigit(), int(k) if k.isdigit() else 0)
        )

    def get(self, layer: str, name: str, weights: dict[str, float] | None = None) -> np.ndarray:
        """A sum over all domains, each multiplied by its weight (default 1), as if its data were given so often.

        Raises: CoterieError for a domain or a layer that was not measured.
        """
        unknown = set(weights or {}) - set(self.samples)
        if unknown:
            raise CoterieError(
                f"domain {sorted(unknown)[0]!r} is not in the statistics; they hold {', '.join(self.samples)}"
            )
        found = [(self.sums.get((d, layer, name)), (weights or {}).get(d, 1.0)) for d in self.samples]
        parts = [value * weight for value, weight in found if value is not None]
        if not parts:
            raise CoterieError(f"layer {layer} has no {name!r} in the statistics; collect them again on this model")
        return np.sum(parts, axis=0)

    def check_model(self, fingerprint: str, where: str) -> None:
        """Raises: CoterieError when the statistics were collected on another model."""
        if self.model != fingerprint:
            raise CoterieError(
                f"{where}: collected on another model (fingerprint {self.model[:16]}, here {fingerprint[:16]}); "
                "collect them again on this one"
            )

    def save(self, path: Path) -> None:
        """Writes one safetensors file; the name is absent or complete."""
        from safetensors.numpy import save

        tensors = {"/".join(key): np.ascontiguousarray(value) for key, value in self.sums.items()}
        metadata = {"format": FORMAT, "model": self.model, "samples": json.dumps(self.samples)}
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_bytes(save(tensors, metadata))  # not by its save_file, which has errors of its own kind
            partial.rename(path)
        except OSError as error:
            raise CoterieError(f"{path}: cannot be written ({error.strerror or error})") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Reads such a file. Raises: CoterieError for anything else."""
        from coterie.numerics import decode

        path = Path(path)
        tensors, metadata = read_header(path)
        if metadata.get("format") != FORMAT:
            raise CoterieError(
                f"{path}: not a statistics file (format {metadata.get('format')!r}, expected {FORMAT!r})"
            )
        try:
            samples = json.loads(metadata["samples"])
            result = cls(metadata["model"], {str(k): int(v) for k, v in samples.items()})
        except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise CoterieError(f"{path}: its metadata is damaged ({error}); collect the statistics again") from error
        raw = path.read_bytes()
        for name, tensor in tensors.items():
            key = tuple(name.rsplit("/", 2))  # a domain's name may hold slashes
            if len(key) != 3 or key[2] not in SUMS or tensor.dtype != "F64":
                raise CoterieError(f"{path}: {name!r} is not a statistic; expected DOMAIN/LAYER/NAME in F64")
            value = decode(raw[tensor.start : tensor.end], tensor.dtype, name).reshape(tensor.shape)
            if not np.isfinite(value).all():
                raise CoterieError(f"{path}: {name!r} holds NaN or infinite values; collect the statistics again")
            result.sums[key] = value  # type: ignore[index]
        return result


def merge(files: Iterable[Stats]) -> Stats:
    """The statistics of all data together. Raises: CoterieError for files of different models."""
    first, *rest = files
    result = Stats(first.model, dict(first.samples), dict(first.sums))
    for other in rest:
        other.check_model(result.model, "statistics to merge")
        for domain, count in other.samples.items():
            result.samples[domain] = result.samples.get(domain, 0) + count
        for key, value in other.sums.items():
            result.add(*key, value)
    return result
