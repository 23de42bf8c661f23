"""The rules that choose experts, gates and layers, against hand-sized numbers and slow obvious versions."""

import itertools
import math

import numpy as np
import pytest
import torch

from coterie.decide.always_on import OutputSums
from coterie.methods import layer_search as layers
from coterie.methods.condense import least_squares, official, routing

# --- as published -------------------------------------------------------------------------------------------------


def test_a_gate_is_the_mean_over_the_tokens_that_chose_the_expert():
    """Expert 0 got .6 and .2 from two tokens: .4; expert 1 was never chosen, so it has no gate and is no candidate."""
    gates = official.fixed_gates(np.array([0.8, 0.0, 0.3]), np.array([2, 0, 1]))
    assert gates[[0, 2]].tolist() == [0.4, 0.3] and math.isnan(gates[1])
    assert official.candidates(gates) == [0, 2]


def divergence_by_hand(h, g):
    """One token at a time, with the formulas as they stand in the paper's program."""
    found = []
    for x, y in zip(h.tolist(), g.tolist(), strict=True):
        p, q = ([math.exp(v - max(z)) for v in z] for z in (x, y))
        p, q = ([v / sum(z) for v in z] for z in (p, q))
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        kl = [sum((a + 1e-10) * math.log((a + 1e-10) / (b + 1e-10)) for a, b in zip(z, m, strict=True)) for z in (p, q)]
        found.append(sum(kl) / 2)
    return found


def test_divergence_is_that_of_softmaxes_over_features():
    """Between two random states of 5 tokens and 7 features; zero of a state and itself shifted, positive elsewhere."""
    generator = torch.Generator().manual_seed(0)
    h, g = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    assert official.jensen_shannon(h, g).tolist() == pytest.approx(divergence_by_hand(h, g), rel=1e-12)
    assert official.jensen_shannon(h, h + 3).abs().max() < 1e-12
    assert bool((official.jensen_shannon(h, g) > 0).all())


def test_greedy_adds_the_expert_whose_set_diverges_least():
    """Alone 2 is best; with 2, 0 is; ties (1 and 3) go to the lower id, and noise below 1e-12 is a tie."""
    table = {(): [3, 2.5, 1, 2.5], (2,): [0.5, 0.7, 9, 0.7 - 1e-14], (2, 0): [9, 0.2, 9, 0.2 - 1e-14]}
    found = official.choose([0, 1, 2, 3], 3, lambda chosen, left: [table[tuple(chosen)][e] for e in left])
    assert found == [2, 0, 1]


def test_greedy_stops_where_candidates_end():
    """Asked for 3 of 2 candidates, it gives both."""
    assert official.choose([4, 1], 3, lambda chosen, left: [float(e) for e in left]) == [1, 4]


# --- least squares ------------------------------------------------------------------------------------------------


def problem(num_experts=6, num_tokens=40, hidden=3, seed=0, shared=False):
    """(outputs (n, T D), target (T D)); the target is a sum of two experts, the last regressor, and noise."""
    draw = np.random.default_rng(seed)
    n = num_experts + shared
    outputs = draw.normal(size=(n, num_tokens * hidden))
    target = 0.7 * outputs[4] - 0.2 * outputs[1] + 0.5 * outputs[-1] + 0.1 * draw.normal(size=outputs.shape[1])
    return outputs, target


def slow_pursuit(outputs, target, count, fixed):
    """Every candidate set solved from the outputs themselves by the library's least squares."""
    chosen, always = [], list(range(len(outputs) - fixed, len(outputs)))

    def solve(members):
        gates = np.linalg.lstsq(outputs[members].T, target, rcond=None)[0]
        return gates, float(((target - gates @ outputs[members]) ** 2).sum())

    for _ in range(count):
        left = [e for e in range(len(outputs) - fixed) if e not in chosen]
        chosen.append(min(left, key=lambda e: solve([*chosen, e, *always])[1]))
    members = [*chosen, *always]
    return (chosen, *solve(members)) if members else (chosen, np.zeros(0), float((target**2).sum()))


@pytest.mark.parametrize(("count", "fixed"), [(0, 1), (1, 0), (3, 1), (6, 0)])
@pytest.mark.parametrize("seed", range(5))
def test_pursuit_equals_solving_from_the_outputs(count, fixed, seed):
    """Experts, gates and error follow from the Gram matrix alone, with or without a shared expert."""
    outputs, target = problem(seed=seed, shared=bool(fixed))
    gram, products, total = outputs @ outputs.T, outputs @ target, float(target @ target)
    chosen, gates = least_squares.choose(gram, products, count, fixed)
    expected, expected_gates, expected_error = slow_pursuit(outputs, target, count, fixed)
    assert chosen == expected
    np.testing.assert_allclose(gates, expected_gates, rtol=1e-9)
    members = [*chosen, *range(len(outputs) - fixed, len(outputs))]
    share = OutputSums(gram, products, total).error(members, gates)
    assert share * total == pytest.approx(expected_error, rel=1e-9)


def test_no_gates_are_better_than_the_least_squares_ones():
    """For the same experts, published or any other gates lose at least as much."""
    outputs, target = problem()
    gram, products, total = outputs @ outputs.T, outputs @ target, float(target @ target)
    best = least_squares.solve(gram, products, [1, 4])
    found = OutputSums(gram, products, total)
    for other in np.random.default_rng(1).normal(size=(50, 2)):
        assert found.error([1, 4], best) <= found.error([1, 4], other)


def test_an_expert_that_repeats_another_or_gives_nothing_is_no_trouble():
    """Of twins the lower id is chosen first; beside it the second twin and a dead expert are worth nothing."""
    outputs, target = problem()
    outputs[5], outputs[0] = outputs[4], 0.0
    gram, products = outputs @ outputs.T, outputs @ target
    chosen, gates = least_squares.choose(gram, products, 6)
    assert chosen.index(4) < chosen.index(5) and np.isfinite(gates).all()
    assert gates[chosen.index(0)] == 0.0


def test_the_scale_of_an_expert_does_not_matter():
    """Times a million and its gate over a million: the same choice, the same sum."""
    outputs, target = problem()
    small = least_squares.choose(outputs @ outputs.T, outputs @ target, 3)
    outputs[4] *= 1e6
    large = least_squares.choose(outputs @ outputs.T, outputs @ target, 3)
    assert small[0] == large[0]
    np.testing.assert_allclose(large[1] * [1e6 if e == 4 else 1 for e in large[0]], small[1], rtol=1e-8)


# --- routing ------------------------------------------------------------------------------------------------------


def test_routing_keeps_the_experts_of_most_weight():
    """Largest first; ties to the lower id; what no token chose stays out even where there is room."""
    assert routing.choose(np.array([1.0, 3.0, 0.0, 1.0, 2.0]), 3) == [1, 4, 0]
    assert routing.choose(np.array([1.0, 3.0, 0.0, 1.0, 2.0]), 9) == [1, 4, 0, 3]


# --- layers -------------------------------------------------------------------------------------------------------


def damage(seed=0, num_layers=5):
    """A score for every set of layers: what each costs, and what pairs cost together."""
    draw = np.random.default_rng(seed)
    alone, pairs = draw.uniform(1, 2, num_layers), draw.normal(0, 0.6, (num_layers, num_layers))

    def of(members):
        return sum(alone[m] for m in members) + sum(pairs[a, b] for a, b in itertools.combinations(sorted(members), 2))

    def score(chosen, left):
        return [of({*chosen, layer}) for layer in left]

    return of, score


@pytest.mark.parametrize("seed", range(6))
def test_greedy_takes_the_best_layer_on_top_of_those_taken(seed):
    """Against a loop that says just that; scores are those of the growing sets."""
    of, score = damage(seed)
    order, scores = layers.search("greedy", range(5), 4, score)
    expected = []
    for _ in range(4):
        expected.append(min((e for e in range(5) if e not in expected), key=lambda e: of({*expected, e})))
    assert order == expected
    assert scores == pytest.approx([of(set(order[: i + 1])) for i in range(4)])


@pytest.mark.parametrize("seed", range(6))
def test_beam_is_at_least_as_good_as_greedy(seed):
    """And a beam as wide as there are sets finds the best one."""
    of, score = damage(seed)
    greedy, beam, wide = (layers.beam(range(5), 3, score, width)[0] for width in (1, 4, 99))
    assert of(set(beam)) <= of(set(greedy)) + 1e-9
    assert of(set(wide)) == pytest.approx(min(of(set(s)) for s in itertools.combinations(range(5), 3)))


def test_one_shot_ranks_layers_alone():
    """One round of scores decides; ties go to the lower index."""
    calls = []

    def score(chosen, left):
        calls.append(chosen)
        return [{7: 0.5, 2: 0.1, 4: 0.1 + 1e-15}[layer] for layer in left]

    assert layers.search("one-shot", [7, 2, 4], 2, score) == ([2, 4], [0.1, 0.1])
    assert calls == [()]
