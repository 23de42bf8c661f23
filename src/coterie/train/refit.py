"""The down projection that reproduces given outputs best, in closed form, near the one there is.

With hidden activations h (F,) and wanted outputs y (D,) of tokens: G = sum h h^T, C = sum h y^T, and for a ridge r

    down = argmin sum |y - W h|^2 + r g |W - W0|^2,   so   (W - W0)^T = (G + r g I)^-1 (C - G W0^T)

where g is the mean of G's diagonal. The ridge holds on to the present weights, not to zero: what the tokens do not
tell stays. Hidden units that never fire (zero padding) keep their columns, exactly.
Importing this module imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass
class Sums:
    """What a least squares fit needs of its tokens: G (F, F), C (F, D), the sum of |y|^2, all in float64."""

    gram: torch.Tensor
    cross: torch.Tensor
    power: float = 0.0

    def add(self, hidden: torch.Tensor, wanted: torch.Tensor) -> None:
        """Tokens: hidden (T, F), wanted (T, D)."""
        h, y = hidden.float(), wanted.float()
        self.gram += (h.T @ h).double()
        self.cross += (h.T @ y).double()
        self.power += float(y.double().square().sum())

    def error(self, down: torch.Tensor) -> float:
        """sum |y - W h|^2 over sum |y|^2 for any W (D, F)."""
        weights = down.double().T
        missing = self.power + float((weights * (self.gram @ weights - 2 * self.cross)).sum())
        return max(0.0, missing) / self.power if self.power else 0.0


def refit(fitted: Sums, judged: Sums, down: torch.Tensor) -> tuple[torch.Tensor, float | None]:
    """(W (D, F) in float32, its ridge): of those fitted, and of W0 itself (ridge None), the one judged best.

    judged: sums of other tokens than those that are fitted.
    """
    best, chosen, error = down, None, judged.error(down)
    live = fitted.gram.diagonal() > 0
    if not live.any():
        return best, chosen
    gram, start = fitted.gram[live][:, live], down.double().T
    missing = (fitted.cross - fitted.gram @ start)[live]
    for ridge in RIDGES:
        shift = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(gram + shift)
        if failed:
            continue
        found = start.clone()
        found[live] += torch.cholesky_solve(missing, factor)
        candidate = found.T.float()
        if (new := judged.error(candidate)) < error:
            best, chosen, error = candidate, ridge, new
    return best.contiguous(), chosen
