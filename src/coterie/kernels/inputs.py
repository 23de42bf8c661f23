"""Inputs in the order in which kernels meet the weights, and where codes of few bits stand.

Codes of 2, 3, 4 or 8 bits are read in chunks: a vector of 32-bit lanes, each with `CODES` codes that stand side by
side. Lane j of chunk c has the columns 8 (L c + j) + k of code k = 0 to 7. Masked where they stand, all codes k are
u_k 2^p_k, and the kernels add

    start + sum_k (u_k 2^p_k) (x_k 2^-p_k) = sum_k (u_k - zero) x_k,  start = -zero sum_k x_k

so that neither shifts nor subtractions are left to them: inputs come as start and the x_k 2^-p_k, by chunk.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

CODES = 8  # per lane of a chunk
WORD = 32


class Order(NamedTuple):
    """What a kernel wants of its inputs: BF16 or F32; as they are (bits 0), or by chunks for codes of so many bits."""

    x: str
    bits: int = 0


def lanes_of(level: str) -> int:
    """32-bit lanes of a level's vectors."""
    return 8 if level == "avx2" else 16


def place(bits: int, k: int) -> tuple[int, int]:
    """Where code k of a lane stands: the number of its word, and its lowest bit there."""
    return divmod(bits * k, WORD)


def is_topmost(bits: int, k: int) -> bool:
    """Whether a code ends where its word does, at the sign: it is shifted down, and not left where it stands."""
    return place(bits, k)[1] + bits == WORD


def zero_of(bits: int) -> int:
    """The code that stands for zero."""
    return 1 << (bits - 1)


@cache
def powers(bits: int) -> torch.Tensor:
    """2^-p_k, (8, 1)."""
    return torch.tensor([[1.0 if is_topmost(bits, k) else 2.0 ** -place(bits, k)[1]] for k in range(CODES)])


def arranged(x: torch.Tensor, order: Order, level: str) -> torch.Tensor:
    """Vectors x (N, I), ready for a kernel, one after the other: (N, columns), or (N, chunks, 1 + 8, lanes)."""
    x = x.to(torch.bfloat16 if order.x == "BF16" else torch.float32)
    columns = CODES * lanes_of(level) if order.bits else WORD
    if more := -x.shape[1] % columns:
        x = F.pad(x, (0, more))
    if not order.bits:
        return x.contiguous()
    chunks = x.reshape(len(x), -1, lanes_of(level), CODES)
    found = torch.empty(*chunks.shape[:2], 1 + CODES, lanes_of(level))
    torch.mul(chunks.mT, powers(order.bits), out=found[:, :, 1:])
    torch.mul(chunks.sum(-1), -zero_of(order.bits), out=found[:, :, 0])
    return found


class Inputs:
    """Vectors x (N, I) for kernels of a level, in every order that they want; a single one serves all experts."""

    def __init__(self, x: torch.Tensor, level: str) -> None:
        self.x, self.level = x.detach(), level
        self._arranged: dict[Order, torch.Tensor] = {}

    def addresses(self, orders: tuple[Order, ...], order_of: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Where vector rows[g] begins in the order orders[order_of[g]]."""
        at = np.array([self._at(order) for order in orders])
        if len(at) == 1:
            return at[0, 0] + rows * at[0, 1]
        first, step = at[order_of].T
        return first + rows * step

    def _at(self, order: Order) -> tuple[int, int]:
        """The address of the first vector, and bytes to the next."""
        if order not in self._arranged:
            self._arranged[order] = arranged(self.x, order, self.level)
        found = self._arranged[order]
        return found.data_ptr(), found[0].nbytes if len(found) > 1 else 0
