"""Levels that a low-bit weight can take, and scales to multiply them by. numpy only.

    w ~ q s        q whole, -2^(b-1) <= q < 2^(b-1); one s for `group` neighbouring weights of a row

One level more lies below zero than above. A scale may be negative: then it is the other side that has it, which is
worth much at two bits (levels -2, -1, 0, 1), where a group often has one large weight. Axes: O outputs, I inputs, G
groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coterie.errors import CoterieError
from coterie.storage.numerics import decode, encode

COARSE = np.concatenate([np.linspace(0.3, 1.1, 9), np.linspace(-1.1, -0.3, 9)]).astype(np.float32)
FINE = np.linspace(0.9, 1.1, 9, dtype=np.float32)  # of the best of those: fractions of the covering scale
ROUNDS = 3  # of fitting scales to codes and codes to scales after it
MOST_GAIN = 2.0  # a row that would have to grow more is all but gone: it stays as it is
AT_ONCE = 1 << 16  # weights times scales tried at a time: with codes and errors they stay in the processor's cache


@dataclass(frozen=True)
class Levels:
    """Width in bits, how many weights share a scale, and the dtype that scales are stored in."""

    bits: int
    group: int
    scale_dtype: str = "BF16"

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    def grouped(self, weight: np.ndarray) -> np.ndarray:
        """(O, I) as (O, G, group). Raises: CoterieError where groups do not divide the inputs."""
        if weight.shape[-1] % self.group:
            raise CoterieError(f"rows of {weight.shape[-1]} weights do not divide into groups of {self.group}")
        return weight.reshape(len(weight), -1, self.group)

    def stored(self, scales: np.ndarray) -> np.ndarray:
        """Scales as they are once stored, in float32."""
        rounded = decode(encode(scales, self.scale_dtype, "scales"), self.scale_dtype, "scales")
        return rounded.astype(np.float32).reshape(scales.shape)

    def codes(self, grouped: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """The nearest level's q, as floats, of weights (..., group) with scales (...); 0 where a scale is 0."""
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
        found = np.rint(grouped * inverse[..., None])
        return np.clip(found, self.lowest, -self.lowest - 1, out=found)

    def covering(self, grouped: np.ndarray) -> np.ndarray:
        """Scales (O, G) with which the outermost levels reach the largest magnitude to half a step."""
        return np.abs(grouped).max(-1) / np.float32(-self.lowest - 0.5)


@dataclass(frozen=True)
class Quantised:
    """A matrix in few bits: codes (O, I) int8 and scales (O, G) float32, as they are stored."""

    levels: Levels
    codes: np.ndarray
    scales: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """What it stands for, (O, I) in float32."""
        return (self.levels.grouped(self.codes) * self.scales[..., None]).reshape(self.codes.shape)


def quantised(levels: Levels, weight: np.ndarray, scales: np.ndarray) -> Quantised:
    """The nearest codes of weights (O, I) for scales (O, G) that are as stored."""
    return Quantised(levels, levels.codes(levels.grouped(weight), scales).astype(np.int8).reshape(weight.shape), scales)


def unbiased(found: Quantised, weight: np.ndarray, pull: np.ndarray) -> Quantised:
    """The same codes, each row's scales times gamma = sum_j p_j w_j / sum_j p_j w'_j.

    Codes and scales of the least squared error are too small on the whole: they keep the share of a row's output that
    is like it, and give nothing for the rest. That shrinks what every expert of every layer says, and unlike random
    errors it does not average out. With gamma the part that is like the output has the output's size.
    pull: p (O, I), what a change of each weight adds to its row's inner product with the right output: h_j w_j, or W H.
    """
    above, below = (pull * weight).sum(1), (pull * found.values).sum(1)
    gamma = np.divide(above, below, out=np.ones_like(above), where=(below > 0) & (above < MOST_GAIN * below))
    return Quantised(found.levels, found.codes, found.levels.stored((found.scales * gamma[:, None]).astype(np.float32)))


def best_scales(levels: Levels, grouped: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Scales (O, G), as stored, with a small sum_j h_j (w_j - q_j s)^2 in each group.

    A search over fractions of the covering scale, of both signs; then scales are fitted to codes and codes to scales in
    turn, s = sum h w q / sum h q^2, where that helps.
    importance: h, (G, group), not negative. Groups where all are 0 count them as 1.
    """
    weights = np.where(importance.any(-1, keepdims=True), importance, 1).astype(np.float32)
    found = np.empty(grouped.shape[:2], np.float32)
    step = max(1, AT_ONCE // (len(COARSE) * max(1, grouped[0].size)))
    for start in range(0, len(grouped), step):
        rows = slice(start, start + step)
        found[rows] = _searched(levels, grouped[rows], weights)
    return found


def _searched(levels: Levels, grouped: np.ndarray, importance: np.ndarray) -> np.ndarray:
    def best_of(scales: np.ndarray) -> np.ndarray:
        """Of several scales for each group, (N, O, G), the best (O, G)."""
        scales = levels.stored(scales)
        errors = grouped - levels.codes(grouped, scales) * scales[..., None]
        costs = (np.square(errors, out=errors) * importance).sum(-1)
        return np.take_along_axis(scales, costs.argmin(0)[None], 0)[0]

    best = best_of(levels.covering(grouped) * COARSE[:, None, None])
    best = best_of(best * FINE[:, None, None])
    for _ in range(ROUNDS):
        codes = levels.codes(grouped, best)
        weighted = codes * importance
        above, below = (weighted * grouped).sum(-1), (weighted * codes).sum(-1)
        fitted = np.divide(above, below, out=best.copy(), where=below > 0)
        best = best_of(np.stack([best, fitted]))
    return best
