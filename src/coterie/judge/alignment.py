"""How alike experts are once their neurons stand in the best order, and what one shared expert would capture of them.

Neuron i of an expert is the point (row i of gate, row i of up, column i of down); the order of neurons changes nothing
that an expert computes. Biases take no part. Alignment flatters: neurons of unrelated experts match a little by
chance, so that every number has beside it what random experts of the same shape give.
Source: ResMoE, arXiv 2503.06881; A Closer Look into Mixture-of-Experts, arXiv 2406.18219.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coterie.judge.numbers import listed, number, pairs, ratio
from coterie.methods import align
from coterie.model.experts import Experts

MOST_BYTES = 2**28  # of the experts that are aligned, all held at once
MOST_WORK = 1e12  # multiplications per layer
MOST_NEURONS = 6144  # the matching of more needs gigabytes
ROUNDS = 5  # of matching and averaging
SETTLED = 1e-5  # of the energy: rounds that bring less are the last
CHANCE = 4  # random experts whose pairs say what chance gives
RESIDUALS = 8  # experts whose singular values are computed
SHARES = (0.125, 0.25, 0.5)  # of an expert's numbers that low-rank factors may take
ALIKE = 0.9  # cosine above which a pair's permutation is listed

Points = np.ndarray  # (F, C): an expert's neurons, C being 3 D, or 2 D without a gate


def kendall(order: np.ndarray) -> float:
    """Kendall's tau of a permutation and the identity: 1 - 4 inversions / (F (F - 1)); 1 for fewer than two."""
    size = len(order)
    inversions = sum(int((order[:i] > value).sum()) for i, value in enumerate(order))
    return 1.0 - 4.0 * inversions / (size * (size - 1)) if size > 1 else 1.0


def how_many(num_experts: int, shape: tuple[int, int]) -> int:
    """How many experts of shape (F, C) are aligned within the bounds above; fewer than two means none."""
    num_neurons, width = shape
    if num_neurons > MOST_NEURONS:
        return 0
    matches = MOST_WORK / (2 * num_neurons**2 * width + 4 * num_neurons**3)
    fits = int(MOST_BYTES // (4 * num_neurons * width))
    found = next((m for m in range(num_experts, 1, -1) if m * (m - 1) / 2 + 2 * ROUNDS * m <= matches), 0)
    return min(found, fits)


def look(experts: Experts, shape: tuple[int, int], seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(`alignment`, `energy`) of a layer, as `analyze` describes them; None where experts are too large to align."""
    count = how_many(len(experts), shape)
    if count < 2:
        return None
    ids = sorted({round(i) for i in np.linspace(0, len(experts) - 1, count)})
    held = unit_scale([align.neurons(experts[e]) for e in ids])
    generator = np.random.default_rng(seed)
    random = [generator.standard_normal(shape, dtype=np.float32) for _ in ids]
    return _alignment(ids, held, random), _energy(ids, held, random)


def unit_scale(held: list[Points]) -> list[Points]:
    """All experts divided by one number, so that their squares stay in range."""
    largest = max(float(np.abs(p).max(initial=0.0)) for p in held) or 1.0
    return [p / np.float32(largest) for p in held]


def _alignment(ids: Sequence[int], held: list[Points], random: list[Points]) -> dict[str, Any]:
    cosines, taus, orders = align_all(held)
    alike = [(i, j) for i, j in orders if cosines[i, j] >= ALIKE]
    alike = sorted(alike, key=lambda pair: -cosines[pair])[: len(ids)]
    return {
        "experts": list(ids),
        "cosine": listed(cosines),
        "kendall": listed(taus),
        "mean": number(pairs(cosines).mean()),
        "chance": number(pairs(align_all(random[:CHANCE])[0]).mean()),
        "alike": [
            {
                "experts": [ids[i], ids[j]],
                "cosine": number(cosines[i, j]),
                "kendall": number(taus[i, j]),
                "permutation": orders[i, j].tolist(),
            }
            for i, j in alike
        ],
    }


def align_all(held: list[Points]) -> tuple[np.ndarray, np.ndarray, dict[tuple[int, int], np.ndarray]]:
    """(cosines after alignment (m, m), Kendall's tau (m, m), orders): held[j][orders[i, j]], i < j, fits held[i].

    Orders are kept of pairs above `ALIKE` alone.
    """
    norms = [float(np.linalg.norm(p.astype(np.float64))) for p in held]
    count = len(held)
    cosines, taus, orders = np.diag([1.0 if n else 0.0 for n in norms]), np.eye(count), {}
    for i in range(count):
        for j in range(i + 1, count):
            order = align.order(held[i], held[j])
            product = float(np.einsum("ij,ij->", held[i], held[j][order], dtype=np.float64))
            cosines[i, j] = cosines[j, i] = min(1.0, max(-1.0, ratio(product, norms[i] * norms[j])))
            taus[i, j] = taus[j, i] = kendall(order)
            if cosines[i, j] >= ALIKE:
                orders[i, j] = order
    return cosines, taus, orders


def captured(mean: Points, energy: float, count: int) -> float:
    """m |W|^2 / sum_k |W_k|^2: the share of m experts' squared norm that their mean W holds."""
    return ratio(count * float(np.square(mean, dtype=np.float64).sum()), energy)


def barycentre(held: list[Points]) -> tuple[Points, list[np.ndarray], list[float]]:
    """(W, orders, energies): the mean of all experts in their best orders, found by matching and averaging in turn.

    Starts at the first expert; energies[r] is what W captures after round r, which never falls.
    """
    energy = sum(float(np.square(p, dtype=np.float64).sum()) for p in held)
    centre, orders, energies = held[0], [np.arange(len(held[0]))] * len(held), list[float]()
    for _ in range(ROUNDS):
        found = [align.order(centre, p) for p in held]
        mean = sum(p[o].astype(np.float64) for p, o in zip(held, found, strict=True)) / len(held)
        now = captured(mean, energy, len(held))
        if energies and now <= energies[-1]:
            break
        centre, orders = mean.astype(np.float32), found
        energies.append(now)
        if len(energies) > 1 and now - energies[-2] < SETTLED:
            break
    return centre, orders, energies


def _energy(ids: Sequence[int], held: list[Points], random: list[Points]) -> dict[str, Any]:
    energy = sum(float(np.square(p, dtype=np.float64).sum()) for p in held)
    raw = captured(sum(p.astype(np.float64) for p in held) / len(held), energy, len(held))  # type: ignore[arg-type]
    centre, orders, energies = barycentre(held)
    some = sorted({round(i) for i in np.linspace(0, len(held) - 1, RESIDUALS)})
    ordered = [held[i][orders[i]] for i in some]
    return {
        "experts": len(ids),
        "none": number(1 / len(ids)),
        "raw": number(raw),
        "aligned": number(energies[-1]),
        "chance": number(barycentre(random)[2][-1]),
        "rounds": len(energies),
        "ranks": {str(share): _of_rank(centre, ordered, share) for share in SHARES},
    }


def _of_rank(centre: Points, some: list[Points], share: float) -> dict[str, Any]:
    """What the barycentre and factors of rank r capture of some experts, and what such factors capture alone.

    r is the rank at which factors (F, r) and (r, C) hold `share` of an expert's F C numbers; the barycentre
    comes on top.
    """
    num_neurons, width = centre.shape
    rank = max(1, round(share * num_neurons * width / (num_neurons + width)))
    whole = sum(float(np.square(p, dtype=np.float64).sum()) for p in some)
    lost = sum(_beyond(p - centre, rank) for p in some)
    alone = sum(_beyond(p, rank) for p in some)
    return {
        "rank": rank,
        "aligned": number(1 - ratio(lost, whole)),
        "alone": number(1 - ratio(alone, whole)),
        "experts": len(some),
    }


def _beyond(matrix: np.ndarray, rank: int) -> float:
    """The sum of all squared singular values but the `rank` largest."""
    wide = matrix.astype(np.float64)
    squares = np.linalg.eigvalsh(wide @ wide.T if len(wide) <= wide.shape[1] else wide.T @ wide)
    return float(np.clip(squares[: max(0, len(squares) - rank)], 0, None).sum())
