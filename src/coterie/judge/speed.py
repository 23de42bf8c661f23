"""What `coterie bench` measures, and `coterie report` of whole models: tokens per second, bytes read, single kernels.

Everything that is compared runs interleaved in one process, and single calls are timed: another
process disturbs both sides alike. Whole models first, prefill and decode; then the kernels on one expert matrix.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.codecs import bits as fmt
from coterie.codecs.open import coded, num_bytes
from coterie.errors import CoterieError
from coterie.model import causal
from coterie.model.experts import expert_weights
from coterie.model.family import names_experts
from coterie.model.layer import Model, expert_names, mtp_names
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.numerics import encode
from coterie.storage.record import Progress

if TYPE_CHECKING:
    import torch

PROMPT, STEPS, ROUNDS = 128, 8, 5  # tokens of a prefill; decode steps after each; how often both
KERNEL_ROUNDS = 40
QUANTILES = (10, 50, 90)
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "embeddings.weight")
HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")
BIG = 64 << 20  # bytes of a copy that only bandwidth is measured on
SMALL = 1 << 20  # bytes of a matrix below which the call itself is what is timed
Speeds = dict[str, dict[str, dict[str, float]]]  # "prefill" or "decode" -> batch -> percentile -> tokens per second


def batch_sizes(given: str | list[int]) -> list[int]:
    """Numbers of sequences from a list, or from text as in "1,4,16". Raises: CoterieError for anything else."""
    parts = given.split(",") if isinstance(given, str) else list(given)
    numbers = [int(str(part)) if str(part).strip().isdecimal() else 0 for part in parts]
    if not numbers or not all(1 <= n <= 1024 for n in numbers) or len(set(numbers)) < len(numbers):
        raise CoterieError(f"--batch {given!r:.80}: expected different numbers from 1 to 1024, such as 1,4,16")
    return numbers


def check_threads(threads: int | None) -> None:
    """Raises: CoterieError for more threads than cores, or none."""
    cores = os.cpu_count() or 1
    if threads is not None and (type(threads) is not int or not 1 <= threads <= cores):
        raise CoterieError(f"--threads {threads!r}: this machine has {cores} cores; expected 1 to {cores}")


@contextlib.contextmanager
def limited_to(threads: int | None) -> Iterator[int]:
    """While entered, the number of threads that torch uses: its own, or another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def described(
    path: str, view: Checkpoint, speeds: Speeds, bandwidth: float | None, notes: list[str]
) -> dict[str, object]:
    """What is said of one model."""
    try:
        read: int | None = bytes_per_token(view)
    except CoterieError as error:
        read = None
        notes.append(f"{path}: bytes read per token are unknown, and so is the share of bandwidth: {error}")
    single = speeds["decode"].get("1")
    share = read * single["50"] / bandwidth if read and single and bandwidth else None
    return {"path": path, "bytes": num_bytes(view), "bytes_per_token": read, **speeds, "bandwidth_share": share}


# --- whole models ----------------------------------------------------------------------------------------------


class Runner:
    """A loaded model that prefills, and decodes on from there."""

    def __init__(self, path: str, model: Any) -> None:
        self.path, self.model = path, causal.without_router_loss(model)
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.positions = causal.positions(model) or 4 * PROMPT
        self.notes: list[str] = []
        self.cache: Any = None

    def prefill(self, ids: torch.Tensor) -> None:
        self.cache = self._forward(ids, None)

    def decode(self, ids: torch.Tensor) -> None:
        self.cache = self._forward(ids, self.cache)

    def _forward(self, ids: torch.Tensor, cache: Any) -> Any:
        import torch

        from coterie.model.loading import quiet_transformers

        try:
            with quiet_transformers(), torch.inference_mode():
                out = self.model(input_ids=ids.to(self.model.device), past_key_values=cache, use_cache=True)
        except CoterieError:
            raise
        except Exception as error:  # whatever modelling code raises
            raise CoterieError(f"{self.path}: cannot run: {type(error).__name__}: {error!s:.300}") from error
        found = getattr(out, "past_key_values", None)
        if found is None:
            raise CoterieError(f"{self.path}: {type(self.model).__name__} keeps no cache between tokens: cannot decode")
        return found


def measure(runners: list[Runner], sizes: list[int], on_progress: Progress) -> list[Speeds]:
    """Per runner: tokens per second by batch, of prefill and of decode."""
    speeds: list[Speeds] = [{"prefill": {}, "decode": {}} for _ in runners]
    length = prompt_length(runners)
    if length < PROMPT:
        runners[0].notes.append(f"prompts have {length} tokens instead of {PROMPT}: the models' positions end there")
    for done, size in enumerate(sizes):
        for speed, (prefills, steps) in zip(speeds, _times(runners, size, length), strict=True):
            speed["prefill"][str(size)] = quantiles(size * length, prefills)
            speed["decode"][str(size)] = quantiles(size, steps)
        on_progress("measuring whole models", done + 1, len(sizes))
    return speeds


def prompt_length(runners: list[Runner]) -> int:
    """Tokens of a prefill: fewer where a model's positions end. Raises: CoterieError where there is room for none."""
    length = min(PROMPT, *(r.positions - STEPS for r in runners))
    if length < 1:
        raise CoterieError(f"{runners[0].path}: fewer than {STEPS + 1} positions; too few to measure decoding")
    return length


def _times(runners: list[Runner], size: int, length: int) -> list[tuple[list[float], list[float]]]:
    """Seconds of single calls, the first round left out: prefills of all runners in turn, then steps in turn."""
    import torch

    from coterie.kernels.cases import clock

    now, vocabulary = clock(), min(r.vocabulary for r in runners)
    rng = np.random.default_rng(0)
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in runners]
    for turn in range(ROUNDS + 1):
        for step in range(STEPS + 1):
            ids = torch.from_numpy(rng.integers(0, vocabulary, (size, 1 if step else length)))
            for runner, kept in zip(runners, times, strict=True):
                call, began = (runner.decode if step else runner.prefill), now()
                call(ids)
                if turn:
                    kept[step > 0].append(now() - began)
    return times


def quantiles(num_tokens: int, seconds: list[float]) -> dict[str, float]:
    """Tokens per second: the 10th, 50th and 90th percentile of single calls."""
    found = np.percentile(num_tokens / np.array(seconds), QUANTILES)
    return {str(q): float(value) for q, value in zip(QUANTILES, found, strict=True)}


def bytes_per_token(checkpoint: Checkpoint) -> int:
    """Bytes of weights, as stored, that one token of one sequence reads: everything but the experts not chosen, the
    input embedding (of which it reads a row, unless it is the head too) and multi-token prediction.

    Raises: CoterieError where there are experts, but of no family that we know.
    """
    packed = coded(checkpoint)
    sizes = {n: packed[n].num_bytes if n in packed else t.num_bytes for n, t in checkpoint.tensors.items()}
    model = _understood(checkpoint)
    skipped = set(mtp_names(model)) if model else set()
    if any(name.endswith(HEADS) for name in sizes):
        skipped |= {name for name in sizes if name.endswith(EMBEDDINGS)}
    total = 0.0
    for block in model.moe if model else ():
        names = set(expert_names(block))
        top_k = min(model.family.num_experts_per_token(checkpoint.config), block.num_experts) if model else 0
        if not block.aside:
            total += sum(sizes[n] for n in names - skipped) * top_k / block.num_experts
        skipped |= names
    return round(total) + sum(size for name, size in sizes.items() if name not in skipped)


def _understood(checkpoint: Checkpoint) -> Model | None:
    """The checkpoint's experts; None for a model without any, such as one whose layers are all condensed."""
    if not names_experts(checkpoint.tensors):
        return None
    return Model.of(checkpoint)


# --- kernels ---------------------------------------------------------------------------------------------------


def read_bandwidth(threads: int) -> float | None:
    """Bytes per second that `threads` threads read of memory larger than the caches; None without AVX-512."""
    from coterie.kernels import cases
    from coterie.kernels.memory import Arena

    arena, blank = Arena(), np.ones(BIG, np.uint8)
    copies = [arena.put(blank) for _ in range(max(2, cases.RING // BIG))]
    found = cases.reading(copies, threads)
    return BIG / cases.interleaved(found, KERNEL_ROUNDS)["read"] if found else None


@dataclass(frozen=True, eq=False)
class Subject:
    """One expert matrix: packed as stored (or as `pack` would), and its dense bits (O, I)."""

    name: str
    packed: fmt.Packed
    dtype: str  # of the dense bits
    bits: np.ndarray


def subject(view: Checkpoint) -> Subject | None:
    """The largest kind of expert matrix in the middle layer, of expert 0; None where none is plain floats."""
    model = _understood(view)
    if model is None or not model.main:
        return None
    block = model.main[len(model.main) // 2]
    names = [n for n in expert_weights(view, block) if n in view.tensors and len(view.tensors[n].shape) in (2, 3)]
    held = {name: found.packed for name, found in coded(view).items() if found.packed}
    names = [n for n in names if n in held] or [n for n in names if view.tensors[n].dtype in ("BF16", "F16", "F32")]
    if not names:
        return None
    name = max(names, key=lambda n: view.tensors[n].shape[-2] * view.tensors[n].shape[-1])
    tensor = view.tensors[name]
    shape = (tensor.shape[-2], tensor.shape[-1])
    if name in held:
        packed = held[name](0)
    else:
        size = tensor.num_bytes // (tensor.shape[0] if len(tensor.shape) == 3 else 1)
        packed = fmt.encode(view.raw(name, 0, size), tensor.dtype, shape)
    if packed.scales is None:
        bits = np.frombuffer(fmt.decode(packed), fmt.CODES[packed.dtype]).reshape(shape)
        return Subject(name, packed, packed.dtype, bits)
    bits = np.frombuffer(encode(fmt.products(packed), "BF16", name), fmt.CODES["BF16"]).reshape(shape)
    return Subject(name, packed, "BF16", bits)


def kernel_rows(view: Checkpoint, threads: int, notes: list[str]) -> dict[str, object] | None:
    """One expert matrix by every kernel."""
    import torch

    from coterie.kernels import cases

    try:
        found, why = subject(view), "there is no expert matrix of plain floats"
    except CoterieError as error:
        found, why = None, str(error)
    if found is None:
        notes.append(f"no kernels measured: {why}")
        return None
    if found.bits.nbytes < SMALL:
        notes.append(f"the expert matrix has {found.bits.nbytes:,} bytes: a call's own cost outweighs reading it")
    if not cases.levels():
        notes.append("no kernels of ours for this processor: torch expands packed matrices")
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((found.bits.shape[1],), np.float32))
    x = x.to(torch.bfloat16 if found.dtype == "BF16" else torch.float32)
    with torch.inference_mode():
        measured = cases.dense_cases(np.ascontiguousarray(found.bits), found.dtype, x, threads)
        for level in cases.levels():
            measured |= cases.sparse_case(f"sparse {level}", level, found.packed, x, threads)
        seconds = cases.interleaved(measured, KERNEL_ROUNDS)
    own = [name for name in measured if name.startswith("own dense") and "int4" not in name]
    best = [min(own, key=lambda name: seconds[name])] if own else []
    rivals = [*best, *(n for n in measured if n.startswith("torch")), *(n for n in measured if n == "own dense int4")]
    return {
        "tensor": found.name,
        "shape": list(found.bits.shape),
        "stored": found.packed.dtype,
        "zeros": 1 - found.packed.density,
        "rows": cases.table(measured, seconds, rivals),
    }
