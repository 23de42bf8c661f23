"""In which type this processor computes fast: what `--dtype auto` means.

Without instructions for bfloat16 a product in it takes 5 to 8 times as long as in float32. The processor says whether
it has them; a measurement confirms it, since virtual machines and limits of the library (ONEDNN_MAX_CPU_ISA) hide some.
"""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHAPE = (128, 1024, 768)  # tokens, inputs, outputs of the products that are timed: the whole takes about 50 ms
ROUNDS = 4
MUCH = 2.0  # times as long: instructions gain more and their absence costs more, so that noise does not decide


def fast(name: str) -> str:
    """The type to compute in on the processor, for weights stored as the type of that name: it, or float32."""
    return name if name not in ("bfloat16", "float16") or _computes(name) else "float32"


@cache
def _computes(name: str) -> bool:
    """Whether half as many bits are no slower. Asked once: a run computes in one type from its beginning to its end."""
    import torch

    return has_instructions(name) and slowdown(getattr(torch, name)) < MUCH


def has_instructions(name: str) -> bool:
    """Whether the processor has, and torch uses, arithmetic in this type: AVX512-BF16, AMX or Arm's."""
    import platform

    import torch

    known: Any = torch.ops.mkldnn
    if name == "float16":
        return bool(known._is_mkldnn_fp16_supported())
    if not known._is_mkldnn_bf16_supported():
        return False
    intel = platform.machine().lower() in ("x86_64", "amd64")  # there oneDNN also emulates it by AVX-512
    return not intel or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a product takes: the fastest of a few in turn, of each."""
    import torch

    tokens, inputs, outputs = SHAPE
    x, weight = (torch.ones(rows, inputs, device="cpu") for rows in (tokens, outputs))
    pairs = [(x, weight), (x.to(dtype), weight.to(dtype))]
    seconds: list[list[float]] = [[], []]
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for pair, found in zip(pairs, seconds, strict=True):
                began = time.perf_counter()
                torch.nn.functional.linear(*pair)
                found.append(time.perf_counter() - began)
    return min(seconds[1]) / min(seconds[0])
