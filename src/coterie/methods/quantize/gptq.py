"""GPTQ: round column by column, and let the columns after make up for the error.

With H = E[x x^T] (damped) and U the upper Cholesky factor of H^-1: column j takes its nearest levels, and its error
(w_j - w'_j) / U_jj is taken from the columns after, along U's row. A group's scales are searched when the turn of its
first column comes, on the weights as corrected so far, weighted by H's diagonal.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv
2210.17323. Deviates: scales are searched, not those of the largest magnitude, and make up for what outputs shrank by in
the end (`levels.unbiased`); weights that are zero stay zero.
"""

import numpy as np

from coterie.methods.levels import Levels, Quantised, best_scales, unbiased
from coterie.methods.sparsify.sparsegpt import inverse_factor

NEEDS = "hessian"


def quantise(weight: np.ndarray, levels: Levels, seen: np.ndarray) -> Quantised:
    """seen: H (I, I), times anything."""
    w, factor = weight.astype(np.float64), inverse_factor(seen)
    zero = weight == 0
    importance = np.diag(seen).reshape(-1, 1, levels.group)
    codes, scales = np.empty(w.shape, np.int8), []
    for g, start in enumerate(range(0, w.shape[1], levels.group)):
        part = slice(start, start + levels.group)
        block = w[:, part]
        scale = best_scales(levels, block[:, None].astype(np.float32), importance[g])
        codes[:, part], errors = _round(levels, block, scale, factor[part, part], zero[:, part])
        w[:, part.stop :] -= errors @ factor[part, part.stop :]
        scales.append(scale)
    return unbiased(Quantised(levels, codes, np.concatenate(scales, axis=1)), weight, weight @ seen.astype(np.float32))


def _round(
    levels: Levels, block: np.ndarray, scale: np.ndarray, factor: np.ndarray, zero: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of one group's columns (O, B), corrected one after the other in place; and their errors (O, B)."""
    codes, errors = np.empty(block.shape, np.int8), np.empty_like(block)
    steps = scale[:, 0].astype(np.float64)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
    for j in range(block.shape[1]):
        q = np.clip(np.rint(block[:, j] * inverse), levels.lowest, -levels.lowest - 1)
        q[zero[:, j]] = 0
        codes[:, j] = q
        errors[:, j] = (block[:, j] - q * steps) / factor[j, j]
        block[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
    return codes, errors
