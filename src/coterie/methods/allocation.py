"""Which width each expert gets, where they share a number of bits.

With D_ib the error of item i at b bits, and c_ib the bits that this takes, one multiplier decides for all:
b_i = argmin_b D_ib + mu c_ib, with the smallest mu whose bits fit. What is left goes to items that can still use it.

Only widths on the lower convex hull of an item's (c, D) are ever chosen so; of those choices none of equal bits has a
smaller sum of errors, and the best of all choices is less than one step of one item away. Axes: N items, W widths.
"""

from __future__ import annotations

import numpy as np


def allocate(errors: np.ndarray, widths: tuple[int, ...], sizes: np.ndarray, budget: float) -> list[int]:
    """The width of each item. errors: D (N, W). sizes: weights of each item (N,). budget: bits for all weights."""
    steps = sorted(
        (step for i, found in enumerate(errors) for step in _steps(i, np.asarray(found, float), widths)),
        key=lambda step: (-step[0] / sizes[step[1]], step[1], step[2]),
    )  # of one item in order of width: gains per bit fall along the hull
    chosen, spent, full = [widths[0]] * len(errors), float(widths[0] * np.sum(sizes)), set[int]()
    for _, item, width in steps:
        cost = float((width - chosen[item]) * sizes[item])
        if item in full or spent + cost > budget:
            full.add(item)  # the next step of this item starts from this one
            continue
        chosen[item], spent = width, spent + cost
    return chosen


def _steps(item: int, errors: np.ndarray, widths: tuple[int, ...]) -> list[tuple[float, int, int]]:
    """(error saved per bit of a weight, item, width) of each step along the hull, from the narrowest width on."""
    found, at = list[tuple[float, int, int]](), 0
    while at + 1 < len(widths):
        gains = [(errors[at] - errors[j]) / (widths[j] - widths[at]) for j in range(at + 1, len(widths))]
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        at += 1 + best
        found.append((float(gains[best]), item, widths[at]))
    return found


def grouped(errors: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Errors (N, W) summed over the items of each group, (max(groups) + 1, W)."""
    found = np.zeros((int(groups.max()) + 1, errors.shape[1]))
    np.add.at(found, groups, errors)
    return found


def spread(importance: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """Errors (N, W) as they are at many bits, a quarter with every bit more: D_ib = s_i / 4^b. Of controls, which know
    how important an item is (N,), and nothing of how it rounds."""
    return np.asarray(importance, float)[:, None] / 4.0 ** np.asarray(widths, float)
