"""Which weights inside an expert become zero. A rule is a file here with `score(weight, norms) -> scores`, one per
weight: the lowest of each output row go (`methods/masks.py`). It is called with a few rows at a time, so the scores of
a row depend on that row alone.

A rule says in `NEEDS` what it wants to know of an expert's tokens: "nothing" (`norms` is None then, and no data are
read), "norms" (||X_j|| of each input channel), "gated norms" (tokens multiplied by the router's weight), or "hessian"
(sum x x^T); a rule of the last kind also changes the weights that stay, and has `prune(weight, hessian, num_zeros, *,
pattern)` instead of `score`.

A file may also have `PER_ROW = False`: round(S x all expert weights) zeros in all, instead of floor(S * I) in each row
of I inputs; and `layer_sparsities(outliers, sparsity, sizes, *, weighted)`, where it chooses each layer's share itself,
from the outliers among its scores.
"""

from coterie.methods import Folder

_folder = Folder(__name__)
names, load = _folder.names, _folder.load


def corrects(name: object) -> bool:
    """Whether it is a rule that also changes the weights that stay."""
    return name in names("hessian")


def chooses_shares(name: str) -> bool:
    """Whether it is a rule that chooses each layer's share of zeros itself."""
    return hasattr(load(name), "layer_sparsities")
