"""Keep the set of experts without which the layer's output changes least, by trying every set.

    argmin over sets K of sum_x ||Z(x) - Z_K(x)||^2,  Z_K the output when the router knows the experts K alone

Every token is routed again for every set: who takes over, and the normalisation of the weights, change with it.

Source: Lu et al., Not All Experts are Equal, arXiv 2402.14800, section 3 (layer-wise, on the unpruned model's inputs).
Deviates: squares are summed over all tokens; the program adds norms of batches, so that it depends on their size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product

from coterie.errors import CoterieError

NEEDS = "outputs"
MOST_SUBSETS = 20_000
Error = Callable[[tuple[int, ...]], float]  # of the experts that stay


def num_subsets(sizes: Sequence[int], per_group: Sequence[int]) -> int:
    """How many sets keep `per_group[g]` of the `sizes[g]` experts of every routing group."""
    return math.prod(math.comb(size, count) for size, count in zip(sizes, per_group, strict=True))


def check(sizes: Sequence[int], per_group: Sequence[int]) -> None:
    """Raises: CoterieError where there are more sets to try than `MOST_SUBSETS`."""
    number = num_subsets(sizes, per_group)
    if number > MOST_SUBSETS:
        raise CoterieError(
            f"--method naee tries every set: keeping {sum(per_group)} of {sum(sizes)} experts there are {number:,} in "
            f"each layer, over the budget of {MOST_SUBSETS:,}; use naee-greedy"
        )


def subsets(groups: Sequence[Sequence[int]], per_group: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every set of experts that may stay, ascending; those with lower ids come first."""
    choices = (combinations(group, count) for group, count in zip(groups, per_group, strict=True))
    yield from (tuple(sorted(e for part in parts for e in part)) for parts in product(*choices))


def choose(
    error: Error, groups: Sequence[Sequence[int]], per_group: Sequence[int], always: frozenset[int]
) -> list[int]:
    """The experts that stay: of `groups[g]`, `per_group[g]`, with `always` among them; ties go to lower ids."""
    allowed = (kept for kept in subsets(groups, per_group) if always <= set(kept))
    best = min(allowed, key=error)
    return list(best)
