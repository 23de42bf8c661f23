"""Products of packed matrices with rows, all experts of a layer in one parallel region.

A few rows per expert (`run.most_tokens`) are multiplied by the kernels, eight at a time and straight from the packed
weights. For more, tiles of a matrix are expanded into the cache and multiplied by torch. Without kernels (another
processor, `COTERIE_KERNELS=torch`), or on a GPU, every used matrix is expanded by torch operations; packed weights stay
in host memory. Axes: S rows, each with the expert that multiplies it, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from coterie.kernels import run as kernels
from coterie.kernels.inputs import Inputs
from coterie.kernels.jobs import Pairs
from coterie.kernels.memory import TILE, Stack
from coterie.kernels.products import padded


def multiply(stacks: Sequence[Stack], pairs: Pairs, x: torch.Tensor) -> torch.Tensor:
    """Each group's rows of x (S, I), or its only row (1, I), times its expert's matrices: (S, sum of their O).

    float32 where the kernels do it, and where torch does it, its own sums rounded to x's dtype.
    """
    num_pairs = len(x) if len(x) > 1 else int(pairs.counts.sum())
    allocate = torch.zeros if any(s.has_empty for s in stacks) else torch.empty
    y = allocate(num_pairs, sum(s.shape[0] for s in stacks), dtype=torch.float32, device=x.device)
    variant = kernels.Variant(kernels.level() if x.device.type == "cpu" else "torch", x.dtype == torch.bfloat16)
    limit = 0 if variant.level == "torch" else min(s.most_tokens(variant) for s in stacks)
    if num_pairs and pairs.counts.max() <= limit:
        _multiply_packed(stacks, pairs.parts(kernels.MAX_BATCH), x, y, variant)
        return y
    small = pairs.counts <= limit
    if small.any():
        _multiply_packed(stacks, pairs.where(small).parts(kernels.MAX_BATCH), x, y, variant)
    _multiply_tiles(stacks, pairs.where(~small), x, y)
    return y


def _multiply_packed(
    stacks: Sequence[Stack], pairs: Pairs, x: torch.Tensor, y: torch.Tensor, variant: kernels.Variant
) -> None:
    """Fills y by the kernels, all experts and matrices in one parallel region."""
    inputs = Inputs(x, variant.level)
    targets = y.data_ptr() + pairs.starts * (4 * y.shape[1])
    num_bytes = sum(s.num_bytes // len(s.matrices) for s in stacks) * len(pairs.ids)
    threads = max(1, min(torch.get_num_threads(), num_bytes // kernels.MIN_SHARE))
    blocks = 1 if threads == 1 else max(1, 8 * threads // (len(pairs.ids) * len(stacks)))
    jobs, first = [], 0
    for stack in stacks:
        split = min(blocks, stack.shape[0])
        jobs.append(stack.jobs(variant, pairs, inputs, targets + 4 * first, y.shape[1], split))
        first += stack.shape[0]
    kernels.run(variant.level, jobs[0] if len(jobs) == 1 else np.concatenate(jobs), threads)


def _multiply_tiles(stacks: Sequence[Stack], pairs: Pairs, x: torch.Tensor, y: torch.Tensor) -> None:
    """Fills y by torch, from tiles that were just expanded. Token counts are padded (see `products.padded`)."""
    for e, start, count in pairs.each():
        rows = x if len(x) == 1 and count == 1 else x[start : start + count]
        rows, first = F.pad(rows, (0, 0, 0, padded(count, x.dtype) - count)), 0
        for stack in stacks:
            matrix = stack.matrices[e]
            step = stack.shape[0] if x.device.type != "cpu" else max(32, TILE // (stack.shape[1] * x.element_size()))
            for begin in range(0, stack.shape[0] if matrix.num_bytes else 0, step):
                end = min(begin + step, stack.shape[0])
                tile = matrix.rows(begin, end, x.dtype, x.device)
                y[start : start + count, first + begin : first + end] = F.linear(rows, tile)[:count]
            first += stack.shape[0]
