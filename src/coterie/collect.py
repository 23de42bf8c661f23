"""`coterie collect`: calibrate once; every criterion reads the one file.

One streaming forward over the samples of all domains together, so that each expert is read once; every token knows
its domain, and is added to that domain's sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import CoterieError
from coterie.layer import Model
from coterie.report import Progress, Stopwatch, no_progress, versions
from coterie.samples import Data, compute_dtype, read_samples
from coterie.stats import Stats

if TYPE_CHECKING:
    import numpy as np
    import torch

    from coterie.calibrate import Batch, Routed, Walk

Sums = dict[str, "np.ndarray"]  # of one layer by name, one row a domain


def collect(
    model: str | Path,
    stats: str | Path,
    *,
    data: Data = (),
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    dtype: str = "auto",
    overwrite: bool = False,
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measures what the experts of a model do on calibration data, and writes it to the file `stats`.

    data: NAME=FILE (a text, JSON lines, Parquet, a folder, or hub:OWNER/NAME); without it, texts that ship.
    samples: sequences in all, spread evenly over the names; seq_len: tokens of each; seed: which of them.
    dtype: auto (as the experts are stored), float32, bfloat16 or float16.
    Raises: CoterieError, before anything is written.
    """
    clock, out = Stopwatch(), Path(stats)
    _check_out(out, overwrite)
    source = Model.open(model)
    chosen = compute_dtype(source, dtype)
    by_domain, notes = read_samples(source, data, samples=samples, seq_len=seq_len, seed=seed)
    result = measure(source, by_domain, chosen, on_progress)
    result.save(out)
    return {
        "stats": str(out),
        "model": {"path": str(model), "hash": result.model},
        "options": {"samples": samples, "seq_len": seq_len, "seed": seed, "dtype": str(chosen).removeprefix("torch.")},
        "domains": {name: {"samples": len(given), "tokens": sum(map(len, given))} for name, given in by_domain.items()},
        "layers": result.layers,
        "notes": notes,
        "versions": versions(),
        **clock.read(),
    }


def _check_out(out: Path, overwrite: bool) -> None:
    """Raises: CoterieError unless the file can be written: better now than after the work."""
    try:
        out.lstat()
        exists = True
    except FileNotFoundError:
        exists = False
    except (OSError, ValueError) as error:  # too long, below a file, or with a null byte
        raise CoterieError(f"{str(out)!r:.200}: not a file name ({error})") from error
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        fault = "a folder" if out.is_dir() else "its folder is missing, or may not be written to"
        raise CoterieError(f"{out}: {fault}; expected a new file's name")
    if exists and not overwrite:
        raise CoterieError(f"{out}: exists already; give another name, or --overwrite")


def measure(
    model: Model,
    by_domain: dict[str, list[tuple[int, ...]]],
    dtype: torch.dtype,
    on_progress: Progress = no_progress,
) -> Stats:
    """All sums of `stats.SUMS` for every MoE layer, by domain.

    Raises: CoterieError for a model that cannot be streamed, and for activations that are NaN or infinite.
    """
    from coterie.calibrate import Stream

    stream = Stream(model, dtype)
    batches = stream.embed([sample for given in by_domain.values() for sample in given])
    domain_of = [number for number, given in enumerate(by_domain.values()) for _ in given]
    stats = Stats(model.checkpoint.hash, {name: len(given) for name, given in by_domain.items()})

    def keep(layer: str, sums: Sums) -> None:
        for name, values in sums.items():
            for domain, value in zip(by_domain, values, strict=True):
                stats.add(domain, layer, name, value)

    walk = measuring_walk(model, dtype, _domain_of_tokens(batches, domain_of), len(by_domain), keep)
    for index in stream.run(batches, walk):
        on_progress("measuring layers", index + 1, len(stream.layers))
    return stats


def _domain_of_tokens(batches: list[Batch], domain_of: list[int]) -> torch.Tensor:
    """The domain's number of every row that a layer routes, in the order of `Routed.x`."""
    import torch

    rows = [torch.tensor([domain_of[i] for i in b.samples]).repeat_interleave(b.hidden.shape[1]) for b in batches]
    return torch.cat(rows)


def measuring_walk(
    model: Model, dtype: torch.dtype, domains: torch.Tensor, num_domains: int, keep: Callable[[str, Sums], None]
) -> Walk:
    """The experts as they are, each measured on the way; `keep` gets a layer's sums once it is through."""
    import numpy as np
    import torch

    from coterie import moe

    def walk(routed: Routed) -> torch.Tensor:
        assert len(routed.x) == len(domains)
        num_experts, total = routed.block.num_experts, torch.zeros_like(routed.x)
        sums: Sums = {"coactivation": _coactivation(routed, domains, num_domains)}
        for e, rows, weights in routed.by_expert():
            expert = moe.read_expert(model.checkpoint, routed.block, e, dtype)
            x = routed.x[rows]
            hidden, y = moe.expert_forward(routed.module, expert, x)
            total.index_add_(0, rows, (y * weights[:, None]).to(total.dtype))
            for d in range(num_domains):
                own = domains[rows] == d
                for name, value in _sums(x[own], hidden[own], y[own], weights[own]).items():
                    shape = (num_domains, num_experts, *value.shape)
                    sums.setdefault(name, np.zeros(shape))[d, e] = value
        _check_finite(sums, routed.block.name)
        keep(routed.block.key, sums)
        return total

    return walk


def _sums(x: torch.Tensor, hidden: torch.Tensor, y: torch.Tensor, gates: torch.Tensor) -> Sums:
    """One expert's sums over its tokens: inputs (T, D), hidden (T, F), outputs (T, D) and gates (T,), in float64."""
    import numpy as np

    norms = y.float().norm(dim=1).double()
    g, column = gates.double(), gates.float()[:, None]
    values = {
        "gates": g.sum(),
        "output_norms": norms.sum(),
        "gated_output_norms": (g * norms).sum(),
        "inputs_squared": _sum_of_squares(x.float()),
        "gated_inputs_squared": _sum_of_squares(x.float() * column),
        "hidden_squared": _sum_of_squares(hidden.float()),
        "gated_hidden_squared": _sum_of_squares(hidden.float() * column),
        "outputs": y.double().sum(0),
    }
    return {"tokens": np.array(len(x), dtype=np.float64)} | {name: v.numpy() for name, v in values.items()}


def _sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    """(T, C) -> (C,) in float64, squared there too: squares of float32 may be too large for it."""
    return values.double().square().sum(0)


def _coactivation(routed: Routed, domains: torch.Tensor, num_domains: int) -> np.ndarray:
    """How many tokens of each domain chose both experts of a pair, (domains, E, E); the diagonal is 0."""
    import torch

    num_experts = routed.block.num_experts
    counts = torch.zeros(num_domains * num_experts**2, dtype=torch.long)
    for i, j in combinations(routed.chosen.T, 2):
        counts += torch.bincount((domains * num_experts + i) * num_experts + j, minlength=len(counts))
    found = counts.view(num_domains, num_experts, num_experts)
    return (found + found.mT).double().numpy()


def _check_finite(sums: Sums, where: str) -> None:
    import numpy as np

    bad = next((name for name, value in sums.items() if not np.isfinite(value).all()), None)
    if bad:
        raise CoterieError(
            f"{where}: {bad} are NaN or infinite; the weights are damaged, or their range needs --dtype float32"
        )
