"""NAEE's criterion where there are too many sets to try: remove one expert after the other, each the least missed.

As `naee`, but each step tries only the sets that lack one more expert: about r E of them instead of (E choose r).

Source: Lu et al., arXiv 2402.14800, for what is measured; greedy removal instead of its enumeration is ours.
"""

from collections.abc import Sequence

from coterie.methods.prune.naee import Error

NEEDS = "outputs"


def check(sizes: Sequence[int], per_group: Sequence[int]) -> None:
    """Any number of experts will do."""


def choose(
    error: Error, groups: Sequence[Sequence[int]], per_group: Sequence[int], always: frozenset[int]
) -> list[int]:
    """The experts that stay: of `groups[g]`, `per_group[g]`, with `always` among them; ties remove higher ids."""
    kept = [list(group) for group in groups]
    while any(len(group) > count for group, count in zip(kept, per_group, strict=True)):
        trials = [
            (error(tuple(sorted(k for other in kept for k in other if k != e))), -e)
            for group, count in zip(kept, per_group, strict=True)
            for e in group
            if len(group) > count and e not in always
        ]
        gone = -min(trials)[1]
        kept = [[e for e in group if e != gone] for group in kept]
    return sorted(e for group in kept for e in group)
