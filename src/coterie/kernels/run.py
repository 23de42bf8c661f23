"""Compiles the kernels on the user's machine, for the instructions it has, and runs lists of jobs on threads.

llvmlite turns LLVM IR into machine code in about 20 ms a kernel; no compiler is needed. Calls go through ctypes, which
releases Python's lock. Where the instructions or llvmlite are missing, `level()` is "torch" and callers expand
matrices with torch operations instead. `COTERIE_KERNELS` (avx512, avx512f, avx2, torch) asks for a lower level.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from coterie.errors import CoterieError
from coterie.kernels.inputs import Order

SLACK = 128  # bytes that a kernel may read beyond the last value
MAX_BATCH = 8  # tokens that one kernel call serves
MANY = 24  # tokens up to which calls of eight beat expanding and torch, on AVX-512 without matrix units
LEVELS = {
    "avx512": "avx512f avx512bw avx512vl avx512vbmi avx512vbmi2 avx512vnni avx512bf16 fma popcnt f16c".split(),
    "avx512f": "avx512f fma popcnt f16c".split(),
    "avx2": "avx2 fma popcnt f16c".split(),
}
MIN_SHARE = 1 << 17  # bytes that a thread should have to read before it is worth waking


@cache
def features() -> frozenset[str]:
    """The processor's features as LLVM names them; none where llvmlite is missing or the processor is not x86-64."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        from llvmlite import binding
    except (ImportError, OSError):
        return frozenset()
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


@cache
def available() -> tuple[str, ...]:
    """The levels that this machine can run, best first; "torch" always."""
    return (*(level for level, needs in LEVELS.items() if features().issuperset(needs)), "torch")


def level() -> str:
    """The level in use: the best one, or what COTERIE_KERNELS names. Raises: CoterieError for an unknown name."""
    asked = os.environ.get("COTERIE_KERNELS", "")
    if not asked:
        return available()[0]
    if asked not in available():
        raise CoterieError(f"COTERIE_KERNELS={asked!r:.40}: this machine has {', '.join(available())}; choose of these")
    return asked


@cache
def _compiler(which: str) -> Any:
    """LLVM's, for a level: only the features the level promises, not a guess by the CPU's name."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    wanted = ",".join(f"+{name}" for name in (*LEVELS[which], "bmi", "bmi2", "lzcnt"))
    target = binding.Target.from_default_triple()
    return binding.create_lljit_compiler(target.create_target_machine("x86-64", wanted, opt=3, jit=True))


_lock = threading.Lock()
_compiled: dict[tuple[str, str], tuple[int, Any]] = {}  # (level, name) -> address, and what keeps it alive


def compiled(which: str, name: str, source: Callable[[str], str]) -> int:
    """The address of the function `name` of a level, compiled on first use from what `source(name)` gives."""
    from llvmlite import binding

    with _lock:
        if (which, name) not in _compiled:
            library = binding.JITLibraryBuilder().add_ir(source(name)).export_symbol(name).add_current_process()
            linked = library.link(_compiler(which), name)
            _compiled[which, name] = (linked[name], linked)
        return _compiled[which, name][0]


@cache
def gemv(which: str, values: str, x: str, batch: int, dense: bool = False) -> int:
    """The kernel that multiplies `batch` vectors of type `x` with stored `values`."""
    from coterie.kernels import emit

    kernel = emit.Kernel(which, values, x, batch, dense)
    return compiled(which, f"gemv_{kernel.name}", partial(emit.gemv, kernel))


@cache
def expand(which: str, values: str) -> int:
    """The kernel that writes rows out as dense bit patterns."""
    from coterie.kernels import emit

    kernel = emit.Kernel(which, values, "F32")
    return compiled(which, f"expand_{kernel.name}", partial(emit.expand, kernel))


@cache
def integer_gemv(which: str, bits: int, group: int, scales: str, tail: int, batch: int) -> int:
    """The kernel that multiplies `batch` vectors with codes of so many bits (see `emit_integers.IntegerKernel`)."""
    from coterie.kernels import emit_integers as emit

    kernel = emit.IntegerKernel(which, bits, group, scales, tail, batch)
    return compiled(which, f"gemv_{kernel.name}", partial(emit.gemv, kernel))


class Variant(NamedTuple):
    """Which kernels are meant: those of a level, for inputs that are bf16 or not."""

    level: str
    bf16: bool


def input_type(which: str, values: str, bf16: bool) -> str:
    """How the vectors should be given: BF16 where both sides are and there is an instruction for it, else F32."""
    return "BF16" if bf16 and values == "BF16" and which == "avx512" else "F32"


def most_tokens(which: str, order: Order) -> int:
    """Tokens of one expert up to which a level's kernels are the fastest way, given inputs in this order."""
    if which == "torch":
        return 0
    return MANY if which == "avx512" and order.x == "BF16" and "amx-bf16" not in features() else MAX_BATCH


@cache
def _runner(which: str) -> Any:
    from coterie.kernels import emit

    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    return prototype(compiled(which, "run_jobs", emit.runner))


def run(which: str, jobs: np.ndarray, num_threads: int = 1) -> None:
    """Does every job (n, fields of `JOB`), int64, by `num_threads` threads that take them as they come free.

    No thread spins: helpers sleep until there is work, and the caller works too.
    """
    function, counter = _runner(which), ctypes.c_int64()
    arguments = jobs.ctypes.data, len(jobs), ctypes.addressof(counter)
    helpers: list[Future] = []
    if num_threads > 1 and len(jobs) > 1:
        pool = _pool(os.getpid())
        helpers = [pool.submit(function, *arguments) for _ in range(min(num_threads, len(jobs)) - 1)]
    function(*arguments)
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The helpers of this process (a forked child has none of its parent's threads)."""
    return ThreadPoolExecutor(max(1, os.cpu_count() or 1), thread_name_prefix="coterie-sparse")
