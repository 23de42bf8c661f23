"""Made by docs/generate.py."""

import collections.abc
import coterie.storage.record
import pathlib
import typing
from typing import Any

from coterie.storage.checkpoint import Checkpoint as Checkpoint
from coterie.errors import CoterieError as CoterieError
from coterie.model.family import Family as Family
from coterie.edits.plan import Plan as Plan
from coterie.storage.record import Report as Report
from coterie.model.loading import load as load
from coterie.model.read import read_expert as read_expert

VERBS: dict[str, pathlib.Path]
__version__: str

def inspect(
    model: str | pathlib.Path,
) -> dict[str, typing.Any]: ...

def prune(
    model: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    method: str | None = ...,
    ratio: float | None = ...,
    experts: int | None = ...,
    budget: str = ...,
    linkage: str = ...,
    distance: str = ...,
    kappa: int = ...,
    min_experts: int | None = ...,
    non_uniform: str = ...,
    threshold: float = ...,
    seed: int = ...,
    drop_mtp: bool = ...,
    lambda1: float = ...,
    lambda2: float = ...,
    stats: Any = ...,
    weights: Any = ...,
    no_guard: bool = ...,
    base: Any = ...,
    data: Any = ...,
    samples: int | None = ...,
    seq_len: int = ...,
    dtype: str = ...,
    removed: str | None = ...,
    save: str = ...,
    dry_run: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    public: bool = ...,
    io: str = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    in_place: bool = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> coterie.storage.record.Report: ...

def stun(
    model: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    sparsity: float = ...,
    expert_ratio: Any = ...,
    second: str = ...,
    preset: str = ...,
    lambda1: float = ...,
    lambda2: float = ...,
    stats: Any = ...,
    no_guard: bool = ...,
    one_pass: bool = ...,
    also: str = ...,
    data: Any = ...,
    samples: int | None = ...,
    seq_len: int = ...,
    seed: int = ...,
    min_tokens: int = ...,
    outliers: float = ...,
    dtype: str = ...,
    save: str = ...,
    dry_run: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    public: bool = ...,
    io: str = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> coterie.storage.record.Report: ...

def sparsify(
    model: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    method: str = ...,
    sparsity: float | None = ...,
    pattern: str | None = ...,
    one_pass: bool = ...,
    also: str = ...,
    data: Any = ...,
    samples: int | None = ...,
    seq_len: int = ...,
    seed: int = ...,
    min_tokens: int = ...,
    outliers: float = ...,
    dtype: str = ...,
    save: str = ...,
    dry_run: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    public: bool = ...,
    io: str = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> coterie.storage.record.Report: ...

def quantize(
    model: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    bits: int | None = ...,
    average: float | None = ...,
    per: str | None = ...,
    allocate: str | None = ...,
    format: str | None = ...,
    method: str | None = ...,
    group_size: int | None = ...,
    data: Any = ...,
    samples: int | None = ...,
    seq_len: int = ...,
    seed: int = ...,
    dtype: str = ...,
    dry_run: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    public: bool = ...,
    io: str = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> coterie.storage.record.Report: ...

def merge(
    model: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    method: str = ...,
    ratio: float | None = ...,
    experts: int | None = ...,
    router: str = ...,
    align: bool = ...,
    stats: Any = ...,
    weights: Any = ...,
    data: Any = ...,
    samples: int | None = ...,
    seq_len: int = ...,
    seed: int = ...,
    dtype: str = ...,
    save: str = ...,
    dry_run: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    public: bool = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> coterie.storage.record.Report: ...

def condense(
    model: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    layers: int | None = ...,
    layer_ids: Any = ...,
    keep: int | None = ...,
    select: str = ...,
    layer_search: str | None = ...,
    data: Any = ...,
    samples: int | None = ...,
    seq_len: int = ...,
    seed: int = ...,
    dtype: str = ...,
    save: str = ...,
    dry_run: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    public: bool = ...,
    io: str = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> coterie.storage.record.Report: ...

def recover(
    model: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    teacher: Any = ...,
    data: Any = ...,
    stage: str = ...,
    layer_ids: Any = ...,
    steps: int = ...,
    lr: float | None = ...,
    batch_size: int = ...,
    accumulate: int = ...,
    seq_len: int = ...,
    samples: int = ...,
    seed: int = ...,
    dtype: str = ...,
    save_every: int = ...,
    save: str = ...,
    dry_run: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    public: bool = ...,
    io: str = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> coterie.storage.record.Report: ...

def drop(
    model: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    unit: str = ...,
    count: int = ...,
    data: Any = ...,
    samples: int | None = ...,
    seq_len: int = ...,
    seed: int = ...,
    dtype: str = ...,
    save: str = ...,
    dry_run: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    public: bool = ...,
    io: str = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> coterie.storage.record.Report: ...

def collect(
    model: str | pathlib.Path,
    stats: str | pathlib.Path,
    *,
    data: Any = ...,
    samples: int | None = ...,
    seq_len: int = ...,
    seed: int = ...,
    dtype: str = ...,
    merging: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> dict[str, typing.Any]: ...

def compare(
    model: str | pathlib.Path,
    stats: str | pathlib.Path,
    *,
    ratio: float | None = ...,
    experts: int | None = ...,
    weights: Any = ...,
    no_guard: bool = ...,
    seed: int = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> dict[str, typing.Any]: ...

def analyze(
    model: str | pathlib.Path,
    *,
    out: str | pathlib.Path | None = ...,
    data: Any = ...,
    samples: int | None = ...,
    seq_len: int = ...,
    seed: int = ...,
    dtype: str = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> dict[str, typing.Any]: ...

def apply(
    model: str | pathlib.Path,
    plan: str | pathlib.Path | dict[str, typing.Any],
    out: str | pathlib.Path,
    *,
    save: str = ...,
    dry_run: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    public: bool = ...,
    io: str = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    in_place: bool = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> coterie.storage.record.Report: ...

def pack(
    dense: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    values: str = ...,
    dry_run: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    public: bool = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> coterie.storage.record.Report: ...

def unpack(
    packed: str | pathlib.Path,
    dense: str | pathlib.Path,
    *,
    dry_run: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    public: bool = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> coterie.storage.record.Report: ...

def status(
    out: str | pathlib.Path,
) -> dict[str, typing.Any]: ...

def generate(
    model: str | pathlib.Path,
    prompt: str,
    *,
    max_new_tokens: int = ...,
    temperature: float = ...,
    seed: int = ...,
    dtype: str = ...,
    on_text: collections.abc.Callable[[str], None] = ...,
) -> dict[str, typing.Any]: ...

def bench(
    model: str | pathlib.Path,
    *,
    against: str | pathlib.Path | None = ...,
    threads: int | None = ...,
    batch: str | list[int] = ...,
    dtype: str = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> dict[str, typing.Any]: ...

def verify(
    out: str | pathlib.Path,
    *,
    against: str | pathlib.Path | None = ...,
    data: str | pathlib.Path | None = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> dict[str, typing.Any]: ...

def eval(
    models: str | pathlib.Path | collections.abc.Sequence[str | pathlib.Path],
    *,
    data: Any = ...,
    against: str | pathlib.Path | None = ...,
    window: int = ...,
    stride: int | None = ...,
    tasks: Any = ...,
    task_path: str | pathlib.Path | None = ...,
    batch_size: int = ...,
    max_new_tokens: int = ...,
    dtype: str = ...,
    seed: int = ...,
    card: bool = ...,
    load: collections.abc.Callable[[str | pathlib.Path], typing.Any] | None = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] | None = ...,
) -> dict[str, typing.Any]: ...

def report(
    models: str | pathlib.Path | collections.abc.Sequence[str | pathlib.Path] | collections.abc.Mapping[str, str | pathlib.Path],
    out: str | pathlib.Path,
    *,
    data: Any = ...,
    window: int = ...,
    stride: int | None = ...,
    batch_size: int = ...,
    max_new_tokens: int = ...,
    dtype: str = ...,
    seed: int = ...,
    budget: str | int | None = ...,
    speed: bool = ...,
    card: bool = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> dict[str, typing.Any]: ...

def push(
    out: str | pathlib.Path,
    name: str,
    *,
    against: str | pathlib.Path | None = ...,
    private: bool = ...,
    revision: str | None = ...,
    dry_run: bool = ...,
    api: collections.abc.Callable[[], typing.Any] = ...,
    on_progress: collections.abc.Callable[[str, int, int], None] = ...,
) -> dict[str, typing.Any]: ...
