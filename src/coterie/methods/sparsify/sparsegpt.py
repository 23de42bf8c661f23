"""SparseGPT: prune column by column and let the columns after make up for what was lost.

With H = sum x x^T (damped) and U the upper Cholesky factor of H^-1: in blocks of 128 columns the mask takes the
lowest w^2 / U_jj^2 of the whole block; each pruned weight's error is then spread over the later columns along U's row.

Source: Frantar and Alistarh, SparseGPT, arXiv 2301.00774, algorithm 1.
Deviates: exactly as many weights go as asked (the published threshold takes ties too). Weights of channels that never
fired go first, but no more of them than asked, and those channels do not enter the damping, so that the scale of H
(published: 2/N) does not matter.
"""

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from coterie.methods.masks import check_pattern, lowest_per_group, lowest_per_row

NEEDS = "hessian"
PER_ROW = False
BLOCK = 128
DAMPING = 0.01  # of the mean diagonal


def prune(
    weight: np.ndarray, hessian: np.ndarray, num_zeros: int, *, pattern: tuple[int, int] | None = None
) -> np.ndarray:
    """The pruned and corrected weights (O, I) in float64; hessian (I, I) = sum x x^T over the tokens, times anything.

    `num_zeros` is of the whole matrix, shared among blocks by their size; pattern (n, m) zeroes n of every m
    consecutive columns instead. Ties go to the lower column of the earlier row.
    Raises: CoterieError for a pattern that does not divide the columns.
    """
    w = weight.astype(np.float64)
    columns = w.shape[1]
    u = inverse_factor(hessian)
    pivots = np.where(np.diag(hessian) == 0, np.inf, np.diag(u))  # a dead channel's weights cost nothing
    if pattern:
        check_pattern(columns, *pattern)
    size = max(BLOCK // pattern[1], 1) * pattern[1] if pattern else BLOCK  # no group stands in two blocks
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        wanted = num_zeros * stop // columns - num_zeros * start // columns
        errors = _prune_block(w[:, start:stop], u[start:stop, start:stop], pivots[start:stop], wanted, pattern)
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return w


def _prune_block(
    block: np.ndarray, factor: np.ndarray, pivots: np.ndarray, num_zeros: int, pattern: tuple[int, int] | None
) -> np.ndarray:
    """Prunes the columns of `block` (a view, changed in place); returns the errors (O, B) for the columns after."""
    flat = (block / pivots).reshape(1, -1) ** 2
    mask = lowest_per_row(flat, np.array([0 if pattern else num_zeros])).reshape(block.shape)
    errors = np.zeros_like(block)
    for j in range(block.shape[1]):
        if pattern and j % pattern[1] == 0:  # on the weights as they have been corrected so far
            group = slice(j, j + pattern[1])
            mask[:, group] = lowest_per_group((block[:, group] / pivots[group]) ** 2, *pattern)
        errors[:, j] = np.where(mask[:, j], block[:, j], 0.0) / factor[j, j]
        block[:, j + 1 :] -= np.outer(errors[:, j], factor[j, j + 1 :])
        block[mask[:, j], j] = 0.0
    return errors


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """Upper triangular U (I, I) with U^T U = (H + 0.01 mean(diag H) I)^-1; channels that never fired get the mean."""
    damped = hessian.astype(np.float64)
    diagonal = np.diag(damped).copy()
    dead = diagonal == 0
    mean = 1.0 if dead.all() else diagonal[~dead].mean()
    damped[np.diag_indices_from(damped)] += np.where(dead, mean, 0.0) + DAMPING * mean
    lower = cholesky(damped, lower=True)
    inverse = solve_triangular(lower, np.eye(len(damped)), lower=True)
    return cholesky(inverse.T @ inverse, lower=False)
