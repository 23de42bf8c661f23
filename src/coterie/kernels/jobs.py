"""What kernels are asked to do: the record that one takes, field by field, and which experts multiply which rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Addresses of the code, of one packed matrix, of its inputs and outputs; the rows to do; words of the mask per row;
# float32 values from one output vector to the next. 64 bits each.
JOB = ("kernel", "mask", "values", "offsets", "scales", "x", "y", "first", "last", "words", "stride")


@dataclass(frozen=True)
class Pairs:
    """Pairs in the order of their experts: expert ids[g] has the pairs starts[g] : starts[g] + counts[g]."""

    ids: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, experts: np.ndarray) -> Pairs:
        """From sorted expert ids."""
        starts = np.flatnonzero(np.diff(experts, prepend=-1))
        return cls(experts[starts], starts, np.diff(starts, append=len(experts)))

    def where(self, chosen: np.ndarray) -> Pairs:
        return Pairs(self.ids[chosen], self.starts[chosen], self.counts[chosen])

    def parts(self, most: int) -> Pairs:
        """The same pairs, in groups of at most `most`."""
        if self.counts.max() <= most:
            return self
        numbers = -(-self.counts // most)
        place = np.arange(numbers.sum()) - np.repeat(numbers.cumsum() - numbers, numbers)
        counts = np.minimum(np.repeat(self.counts, numbers) - most * place, most)
        return Pairs(np.repeat(self.ids, numbers), np.repeat(self.starts, numbers) + most * place, counts)

    def each(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.ids.tolist(), self.starts.tolist(), self.counts.tolist(), strict=True)
