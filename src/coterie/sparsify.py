"""`coterie sparsify`: unstructured pruning of the routed experts, streamed; and what `stun` shares with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from coterie.apply import execute
from coterie.errors import CoterieError
from coterie.layer import Model
from coterie.methods import sparsify as methods
from coterie.plan import Plan
from coterie.report import Progress, Report, Stopwatch, no_progress
from coterie.writer import Writer


@dataclass(frozen=True)
class Options:
    """How weights are zeroed; recorded in coterie.json. `sparsity` is the share of zeros per expert matrix."""

    method: str = "wanda"
    sparsity: Fraction = Fraction(1, 2)
    pattern: tuple[int, int] | None = None
    one_pass: bool = False
    data: dict[str, Path] = field(default_factory=dict)
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    min_tokens: int = 64
    outliers: float = 3.0
    dtype: str = "auto"


def sparsify(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "wanda",
    sparsity: float = 0.5,
    pattern: str | None = None,
    one_pass: bool = False,
    data: dict[str, Path] | list[str] | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    min_tokens: int = 64,
    outliers: float = 3.0,
    dtype: str = "auto",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Progress = no_progress,
) -> Report:
    """Zeroes the share `sparsity` of the routed experts' weights by a rule, and leaves everything else as it is.

    method: magnitude (needs no data), wanda, owl, sparsegpt, moe-pruner.
    pattern: "n:m" zeroes n of every m consecutive inputs instead of `sparsity` of a row.
    one_pass: score every layer on the dense model's activations (default: on those of the layers pruned before it).
    min_tokens: experts that fewer calibration tokens reach are pruned by magnitude and listed as cold.
    outliers: OWL's M.
    Raises: CoterieError, before anything is written.
    """
    from coterie.data import parse_data

    clock, source = Stopwatch(), Model.open(model)
    files = data if isinstance(data, dict) else parse_data(data or [], folders=True)
    options = Options(
        method, Fraction(str(sparsity)), parse_pattern(pattern), one_pass, files, samples, seq_len, seed, min_tokens,
        outliers, dtype,
    )  # fmt: skip
    check_options(options)
    plan = Plan(layers={}, budget={"kind": "sparsity", "sparsity": sparsity})
    recorded = vars(options) | {
        "sparsity": sparsity,
        "pattern": pattern,
        "data": {name: str(file) for name, file in files.items()},
    }
    return execute(
        source, plan, Path(out), command="sparsify", path=model, options=recorded, clock=clock,
        dry_run=dry_run, resume=resume, overwrite=overwrite, on_progress=on_progress,
        fill=lambda view, writer: zero_weights(view, options, writer, on_progress),
    )  # fmt: skip


def check_options(options: Options) -> None:
    """Raises: CoterieError for a value out of its range, or options that contradict or ignore each other."""
    methods.load(options.method)
    if not 0 <= options.sparsity < 1:
        raise CoterieError(f"--sparsity {float(options.sparsity)}: the share of zeros must be in [0, 1)")
    if options.method == "magnitude" and (options.data or options.one_pass):
        raise CoterieError("--data and --one-pass would be ignored: magnitude needs no data")
    if options.pattern and options.method == "owl":
        raise CoterieError("--pattern fixes every layer's sparsity, which owl wants to choose; use wanda")


def parse_pattern(text: str | None) -> tuple[int, int] | None:
    """(n, m) of "n:m": n of every m consecutive inputs become zero."""
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != 2 or not all(p.isdecimal() for p in parts) or not 0 < int(parts[0]) < int(parts[1]) <= 64:
        raise CoterieError(f"--pattern {text!r}: expected n:m with 0 < n < m, such as 2:4")
    return int(parts[0]), int(parts[1])


def zero_weights(model: Model, options: Options, writer: Writer, on_progress: Progress) -> dict[str, Any]:
    """Prunes every expert matrix of the model into the writer's holes; returns what to add to the report."""

    if options.method == "magnitude":
        shares = {b.key: options.sparsity for b in model.main}
        worker = _worker(model, options, shares, writer)
        worker.prune_all(model, on_progress)
        return _numbers(worker, shares)
    return _calibrated(model, options, writer, on_progress)


def _worker(model: Model, options: Options, shares: dict[str, Fraction], writer: Writer, dtype: Any = None) -> Any:
    from coterie import pruner

    return pruner.Pruner(
        model.checkpoint,
        methods.load(options.method),
        pruner.zero_budget(model, shares),
        writer.put,
        dtype,
        options.pattern,
        options.min_tokens,
        sequential=not options.one_pass,
    )


def _numbers(worker: Any, shares: dict[str, Fraction]) -> dict[str, Any]:
    return {
        "cold_experts": worker.cold,
        "layer_sparsity": {key: float(share) for key, share in shares.items()},
        "expert_zeros": worker.num_zeros,
    }


def _calibrated(model: Model, options: Options, writer: Writer, on_progress: Progress) -> dict[str, Any]:
    """One streaming forward (two for OWL, whose first measures the dense model), pruning each expert on the way.

    After each layer the hidden states and what was counted are saved, so that a killed run goes on from there.
    """
    from coterie.calibrate import Stream
    from coterie.samples import compute_dtype, read_samples

    dtype = compute_dtype(model, options.dtype)
    by_domain, notes = read_samples(
        model, options.data, samples=options.samples, seq_len=options.seq_len, seed=options.seed
    )
    samples = [sample for found in by_domain.values() for sample in found]
    stream = Stream(model, dtype)
    blocks = model.main
    done = writer.units[-1] if writer.units else None
    if done:
        shares = {key: Fraction(share) for key, share in done["shares"].items()}
    elif options.method == "owl":
        shares = _owl_shares(model, stream, samples, options, on_progress)
    else:
        shares = {b.key: options.sparsity for b in blocks}
    worker = _worker(model, options, shares, writer, dtype)
    batches = stream.embed(samples)
    first = 0
    if done:
        first, worker.cold, worker.num_zeros = done["layer"] + 1, done["cold"], done["zeros"]
        _restore(batches, writer.partial / f"hidden-{done['layer']}.safetensors")
    for index in stream.run(batches, worker.walk, first):
        _save(batches, writer.partial / f"hidden-{index}.safetensors")
        kept = {"layer": index, "cold": worker.cold, "zeros": worker.num_zeros}
        writer.unit(kept | {"shares": {key: str(share) for key, share in shares.items()}})
        (writer.partial / f"hidden-{index - 1}.safetensors").unlink(missing_ok=True)
        on_progress("pruning layers", index + 1, len(stream.layers))
    for path in writer.partial.glob("hidden-*.safetensors"):
        path.unlink()
    return _numbers(worker, shares) | {
        "calibration": {"samples": {name: len(found) for name, found in by_domain.items()}, "notes": notes}
    }


def _owl_shares(
    model: Model, stream: Any, samples: Any, options: Options, on_progress: Progress
) -> dict[str, Fraction]:
    """OWL's sparsity of each layer, as fractions that JSON can hold exactly."""
    import numpy as np

    from coterie import pruner
    from coterie.methods.sparsify import owl

    found = pruner.outlier_shares(stream, stream.embed(samples), options.outliers, on_progress)
    sizes = [
        b.num_experts * sum(r * c for r, c in pruner.matrix_shapes(model.checkpoint, b).values()) for b in model.main
    ]
    keys = [b.key for b in model.main]
    values = owl.layer_sparsities(np.array([found[k] for k in keys]), float(options.sparsity), np.array(sizes))
    return {key: Fraction(repr(float(value))) for key, value in zip(keys, values, strict=True)}


def _save(batches: list[Any], path: Path) -> None:
    """The hidden states between two layers; the name is absent or complete."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".tmp")
    save_file({str(i): batch.hidden.contiguous() for i, batch in enumerate(batches)}, partial)
    partial.rename(path)


def _restore(batches: list[Any], path: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(path)
    for i, batch in enumerate(batches):
        batch.hidden = saved[str(i)]
