"""How an expert's matrices get few bits. A rule is a file here with `quantise(weight, levels, seen) -> Quantised`, of
one matrix (O, I) in float32.

It says in `NEEDS` what it wants to know of an expert's tokens: "nothing", "squares" (the mean of x_j^2, (I,)), or
"hessian" (the mean of x x^T, (I, I)). `seen` is None where no data are given, or no token reached the expert; a rule of
the last kind is not asked then.
"""

from coterie.methods import Folder

_folder = Folder(__name__)
names, load = _folder.names, _folder.load
