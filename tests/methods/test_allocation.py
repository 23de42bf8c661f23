"""Widths for items that share a number of bits: by hand, and against every choice there is."""

from itertools import product

import numpy as np
import pytest

from coterie.methods.allocation import allocate, grouped, spread


def test_by_hand():
    """Six bits for three weights: what saves most per bit comes first, and what nothing helps stays at none."""
    errors = np.array([[10.0, 4.0, 3.0], [8.0, 1.0, 0.0], [0.0, 0.0, 0.0]])  # at 0, 2 and 4 bits
    assert allocate(errors, (0, 2, 4), np.ones(3), 0) == [0, 0, 0]
    assert allocate(errors, (0, 2, 4), np.ones(3), 2) == [0, 2, 0]
    assert allocate(errors, (0, 2, 4), np.ones(3), 6) == [4, 2, 0]  # both last steps save as much: the first item's
    assert allocate(errors, (0, 2, 4), np.ones(3), 99) == [4, 4, 0]


def test_a_width_that_is_worse_than_its_neighbours_is_never_chosen():
    """Off the convex hull: three bits save less per bit than four do."""
    assert allocate(np.array([[9.0, 8.9, 0.0]]), (2, 3, 4), np.ones(1), 3) == [2]
    assert allocate(np.array([[9.0, 8.9, 0.0]]), (2, 3, 4), np.ones(1), 4) == [4]


def test_an_item_of_many_weights_pays_for_all_of_them():
    assert allocate(np.array([[9.0, 0.0], [8.0, 0.0]]), (0, 2), np.array([10, 1]), 20) == [0, 2]


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_of_as_many_bits_is_better_by_a_step(seed):
    """Every choice of five items, three of them noisy: the bits fit, and the best that fits is less than one step
    away; where all bits are used along the hull, there is none better."""
    draw, widths = np.random.default_rng(seed), (0, 2, 3, 4)
    errors = draw.uniform(0.1, 1, (5, 1)) / 4.0 ** np.array(widths) * draw.uniform(0.7, 1.3, (5, 4))
    sizes, budget = draw.integers(1, 4, 5), draw.uniform(5, 40)

    def total(choice):
        return sum(errors[i, widths.index(b)] for i, b in enumerate(choice))

    def bits(choice):
        return sum(b * s for b, s in zip(choice, sizes, strict=True))

    found = allocate(errors, widths, sizes, budget)
    assert bits(found) <= budget
    best = min(total(choice) for choice in product(widths, repeat=5) if bits(choice) <= budget)
    assert total(found) <= best + (errors[:, 0] - errors.min(1)).max()
    exact = min(total(choice) for choice in product(widths, repeat=5) if bits(choice) <= bits(found))
    assert total(found) <= exact + (errors[:, 0] - errors.min(1)).max()


def test_coarser_items_add_up_their_errors():
    errors = np.array([[4.0, 1.0], [2.0, 1.0], [5.0, 0.0]])
    assert grouped(errors, np.array([0, 0, 1])).tolist() == [[6.0, 2.0], [5.0, 0.0]]


def test_controls_know_importance_alone():
    """The most used item gets most; of items alike the first gets what is left for one."""
    errors = spread(np.array([1.0, 100.0, 1.0]), (0, 2, 3, 4))
    assert errors[1].tolist() == [100.0, 6.25, 1.5625, 0.390625]
    assert allocate(errors, (0, 2, 3, 4), np.ones(3), 7) == [3, 4, 0]
    assert allocate(errors, (0, 2, 3, 4), np.ones(3), 8) == [2, 4, 2]
