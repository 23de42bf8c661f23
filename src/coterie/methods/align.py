"""Lines up the neurons of experts before they are averaged: an expert computes the same in any order of its neurons.

    argmax over permutations P of sum_n <a_n, b_P(n)>,  the n-th neuron's row of gate, row of up and column of down

which is the order in which two experts are nearest, ||a - P b||_2: a linear assignment.

Source: Li et al., MC-SMoE, ICLR 2024: permutation alignment of W_in and W_out with the dominant expert.
"""

import numpy as np

from coterie.model.experts import Matrices


def neurons(matrices: Matrices, bias: np.ndarray | None = None) -> np.ndarray:
    """An expert's neurons, one a row (F, C): of gate, up and down, and of the biases (2F,) of gate above up, if any."""
    gate, up, down = matrices
    parts = [m for m in (gate, up, down.T) if m is not None]
    if bias is not None:
        parts.append(bias.reshape(-1, len(up)).T)
    return np.concatenate(parts, axis=1, dtype=np.float32)


def order(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which neuron of `other` (F, C) belongs in each place of `reference` (F, C): (F,); O(F^3) at worst."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(reference @ other.T, maximize=True)[1]
