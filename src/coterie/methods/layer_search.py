"""Which MoE layers to condense: one-shot, greedy, or beam search over sets of layers; scores come from outside.

A score says how far the model with a set of layers condensed is from the original: lower is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

SEARCHES = ("greedy", "one-shot", "beam")
DIGITS = 12  # of a score that count: less is rounding, not preference
BEAM = 4  # sets kept by the beam search

Score = Callable[[tuple[int, ...], list[int]], Sequence[float]]  # (condensed, candidates) -> score of each one added


def search(kind: str, layers: Sequence[int], count: int, score: Score) -> tuple[list[int], list[float]]:
    """(layers in the order chosen, the score after each), by the search of that name."""
    if kind == "one-shot":
        return one_shot(layers, count, score)
    return beam(layers, count, score, BEAM if kind == "beam" else 1)


def one_shot(layers: Sequence[int], count: int, score: Score) -> tuple[list[int], list[float]]:
    """The layers of lowest score alone, each scored with all others original; ties go to the lower index."""
    ranked = sorted(zip(_rounded(score((), list(layers))), layers, strict=True))[:count]
    return [layer for _, layer in ranked], [value for value, _ in ranked]


def beam(layers: Sequence[int], count: int, score: Score, width: int = 1) -> tuple[list[int], list[float]]:
    """Grows the `width` best sets by one layer at a time; width 1 is the greedy search.

    Of sets that are equal but for their order, the one found first stays; ties go to the lower indices.
    """
    states: list[tuple[tuple[int, ...], tuple[float, ...]]] = [((), ())]
    for _ in range(count):
        grown = []
        for chosen, scores in states:
            left = [layer for layer in layers if layer not in chosen]
            grown += [
                (value, (*chosen, layer), (*scores, value))
                for value, layer in zip(_rounded(score(chosen, left)), left, strict=True)
            ]
        states, seen = [], set[frozenset[int]]()
        for _, chosen, scores in sorted(grown):
            if frozenset(chosen) not in seen and len(states) < width:
                seen.add(frozenset(chosen))
                states.append((chosen, scores))
    order, scores = states[0]
    return list(order), list(scores)


def _rounded(scores: Sequence[float]) -> list[float]:
    return [round(float(s), DIGITS) for s in scores]
