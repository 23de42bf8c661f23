"""Matrices of codes of 2, 3, 4 or 8 bits in memory, as they are stored, or of none: zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coterie.codecs import Codes
from coterie.kernels import run as kernels
from coterie.kernels.inputs import CODES, Order, lanes_of, zero_of

SCALES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, eq=False)
class IntegerMatrix(Codes):
    """One matrix where the kernels read it."""

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // max(1, self.scales.shape[1])

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def packed(self) -> Codes:
        """The matrix as it is stored."""
        return Codes(self.bits, self.shape, self.codes, self.scales, self.scale_type)

    def kernel(self, variant: kernels.Variant, batch: int) -> int:
        """The address of the code that multiplies so many vectors; 0 where there is nothing to multiply."""
        if not self.bits:
            return 0
        tail = self.shape[1] // CODES % lanes_of(variant.level)
        return kernels.integer_gemv(variant.level, self.bits, self.group, self.scale_type, tail, batch)

    def order(self, variant: kernels.Variant) -> Order:
        return Order("F32", self.bits)

    def pointers(self) -> list[int]:
        """mask, values, offsets, scales: the job's first addresses."""
        return [0, self.codes.ctypes.data, 0, self.scales.ctypes.data]

    def rows(self, first: int, last: int, dtype: torch.dtype, device: Any = "cpu") -> torch.Tensor:
        """Rows first:last, expanded by torch operations, (last - first, I): only codes travel to the device."""
        if not self.bits:
            return torch.zeros(last - first, self.shape[1], dtype=dtype, device=device)
        raw = torch.from_numpy(self.codes[first:last].view(np.uint8)).to(device).long()
        steps = torch.arange(8, device=device)
        whole = (raw.unflatten(1, (-1, self.bits)) << 8 * steps[: self.bits]).sum(-1)  # eight codes each
        numbers = (whole[..., None] >> self.bits * steps) & ((1 << self.bits) - 1)
        scales = torch.from_numpy(self.scales[first:last]).view(SCALES[self.scale_type]).to(device).float()
        values = (numbers.flatten(1) - zero_of(self.bits)).unflatten(1, (-1, self.group)) * scales[..., None]
        return values.flatten(1).to(dtype)
