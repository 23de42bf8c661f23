"""SparseGPT: prune column by column and let the columns after make up for what was lost.

With H = 2/N sum x x^T (damped) and U the upper Cholesky factor of H^-1: in blocks of 128 columns the mask takes the
lowest w^2 / U_jj^2 of the whole block; each pruned weight's error is then spread over the later columns along U's row.

Source: Frantar and Alistarh, SparseGPT, arXiv 2301.00774, algorithm 1.
"""

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from coterie.methods.sparsify.select import lowest_per_row

BLOCK = 128
DAMPING = 0.01  # of the mean diagonal


def prune(
    weight: np.ndarray, hessian: np.ndarray, num_zeros: int, *, pattern: tuple[int, int] | None = None
) -> np.ndarray:
    """The pruned and corrected weights (O, I) in float64; hessian (I, I) = sum x x^T over the tokens.

    `num_zeros` is of the whole matrix, shared among blocks by their size; pattern (n, m) zeroes n of every m
    consecutive columns instead. Ties go to the lower column of the earlier row.
    """
    w = weight.astype(np.float64).copy()
    columns = w.shape[1]
    u = _inverse_factor(hessian.astype(np.float64).copy(), w)
    done = 0
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        wanted = round(num_zeros * stop / columns) - done
        done += wanted
        block, factor = w[:, start:stop], u[start:stop, start:stop]
        errors = np.zeros_like(block)
        scores = block**2 / np.diag(factor) ** 2
        mask = lowest_per_row(scores.reshape(1, -1), np.array([wanted])).reshape(scores.shape)
        for j in range(stop - start):
            if pattern and j % pattern[1] == 0:
                ahead = block[:, j : j + pattern[1]] ** 2 / np.diag(factor)[j : j + pattern[1]] ** 2
                mask[:, j : j + pattern[1]] = lowest_per_row(ahead, np.full(len(ahead), pattern[0]))
            kept = np.where(mask[:, j], 0.0, block[:, j])
            errors[:, j] = (block[:, j] - kept) / factor[j, j]
            block[:, j + 1 :] -= np.outer(errors[:, j], factor[j, j + 1 :])
            block[:, j] = kept
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return w


def _inverse_factor(hessian: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """U with H^-1 = U^T U. Channels that never fired get a unit diagonal, and their weights (useless) become zero."""
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1.0
    weight[:, dead] = 0.0
    hessian[np.diag_indices_from(hessian)] += DAMPING * np.diag(hessian).mean()
    lower = cholesky(hessian, lower=True)
    inverse = solve_triangular(lower, np.eye(len(hessian)), lower=True)
    return cholesky(inverse.T @ inverse, lower=False)
