"""How many tokens a product is given: a few counts only, for libraries that compile a kernel for each."""

from __future__ import annotations

import torch

BUCKET = 32  # token counts are padded to powers of two up to this, then to multiples of it


def padded(num_tokens: int, dtype: torch.dtype) -> int:
    """The token count that one is padded to: oneDNN, which has the 16-bit products, compiles a kernel for every shape.

    Products in float32 and float64 are compiled beforehand, and take what there is.
    """
    if dtype.itemsize > 2:
        return num_tokens
    return -(-num_tokens // BUCKET) * BUCKET if num_tokens > BUCKET else 1 << max(0, num_tokens - 1).bit_length()
