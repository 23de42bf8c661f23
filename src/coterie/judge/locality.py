"""Which experts the router chose, token after token: load by domain, what stays from one token to the next, who is
chosen together, and how often a small cache of experts would have held the right one."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from coterie.judge.numbers import listed, number, ratio

CACHED = 4096  # tokens that the cache is tried on
COACTIVE = 10  # pairs listed


@dataclass(frozen=True)
class Tokens:
    """Of every row that a layer routes, in order: its sample and its domain, (T,) each; samples stay whole."""

    sample: np.ndarray
    domain: np.ndarray
    names: tuple[str, ...]


def look(chosen: np.ndarray, num_experts: int, tokens: Tokens) -> dict[str, object]:
    """`load`, `locality`, `coactivation` and `coactive` of a layer, as `analyze` describes them.

    chosen (T, K): ids; those beyond the experts stand for none.
    """
    counts = _counts(chosen, num_experts, tokens)
    together = coactivation(chosen, num_experts)
    return {
        "load": _load(counts, tokens),
        "locality": {
            **repeats(chosen, num_experts, counts, tokens),
            "cache": cache(chosen[_some(tokens)], num_experts),
        },
        "coactivation": together.tolist(),
        "coactive": _coactive(together, counts.sum(axis=0), len(chosen)),
    }


def _counts(chosen: np.ndarray, num_experts: int, tokens: Tokens) -> np.ndarray:
    """How many tokens of each domain chose each expert, (domains, E)."""
    valid = chosen < num_experts
    places = (tokens.domain[:, None] * num_experts + chosen)[valid]
    return np.bincount(places, minlength=len(tokens.names) * num_experts).reshape(-1, num_experts)


def _load(counts: np.ndarray, tokens: Tokens) -> dict[str, object]:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    gaps = [0.5 * np.abs(a - b).sum() for a, b in combinations(shares, 2)]
    total = counts.sum(axis=0) / max(counts.sum(), 1)
    return {
        "domains": {name: listed(row, 6) for name, row in zip(tokens.names, shares, strict=True)},
        "all": listed(total, 6),
        "entropy": number(entropy(total)),
        "unused": int((counts.sum(axis=0) == 0).sum()),
        "largest": number(total.max()),
        "domain_gap": number(np.mean(gaps)) if gaps else None,
    }


def _some(tokens: Tokens) -> np.ndarray:
    """Which rows (T,) the cache is tried on: whole samples, spread evenly over all, one at least."""
    samples = tokens.sample[np.sort(np.unique(tokens.sample, return_index=True)[1])]  # as they come
    count = max(1, CACHED * len(samples) // max(CACHED, len(tokens.sample)))
    return np.isin(tokens.sample, samples[np.linspace(0, len(samples) - 1, count).round().astype(np.int64)])


def entropy(shares: np.ndarray) -> float:
    """-sum p log p / log E: 1 when all experts work alike, 0 when one does all; 1 of a single expert."""
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum() / np.log(len(shares))) if len(shares) > 1 else 1.0


def repeats(chosen: np.ndarray, num_experts: int, counts: np.ndarray, tokens: Tokens) -> dict[str, object]:
    """Of the experts of token t, the share that token t + 1 of the same sample chose again, and what chance gives.

    chance: for tokens drawn independently from the same domain, sum_e p_e^2 / sum_e p_e, p_e being the share of the
    domain's tokens that chose e. uniform: the same, had all experts equal load: K / E.
    """
    valid = chosen < num_experts
    same = (chosen[:-1, :, None] == chosen[1:, None, :]).any(axis=2) & valid[:-1]
    follows = tokens.sample[:-1] == tokens.sample[1:]
    asked = valid[:-1].sum(axis=1)
    num_tokens = np.maximum(np.bincount(tokens.domain, minlength=len(tokens.names)), 1)
    p = counts / num_tokens[:, None]
    by_domain = np.divide((p * p).sum(1), p.sum(1), out=np.zeros(len(p)), where=p.sum(1) > 0)
    whole = float(asked[follows].sum())
    expected = float((by_domain[tokens.domain[:-1]] * asked)[follows].sum())
    return {
        "repeat": number(ratio(same[follows].sum(), whole)) if whole else None,
        "chance": number(ratio(expected, whole)) if whole else None,
        "uniform": number(chosen.shape[1] / num_experts),
        "pairs": int(follows.sum()),
    }


def cache(chosen: np.ndarray, num_experts: int) -> dict[str, object]:
    """Share of asked experts that a cache of a quarter of them (K at least) held: the most recent, or the hottest.

    lru drops the least recently used; hot holds the most used of these very tokens, and never changes: the best that
    a fixed set can do. Both see tokens in order, one after the other.
    """
    size = min(num_experts, max(chosen.shape[1], num_experts // 4))
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    asked = [e for row in chosen.tolist() for e in row if e < num_experts]
    for e in asked:
        if e in held:
            hits += 1
            held.move_to_end(e)
        else:
            held[e] = None
            if len(held) > size:
                held.popitem(last=False)
    counts = np.bincount(np.array(asked, dtype=np.int64), minlength=num_experts)
    hot = int(np.sort(counts)[num_experts - size :].sum())
    return {
        "experts": size,
        "lru": number(ratio(hits, len(asked))),
        "hot": number(ratio(hot, len(asked))),
        "uniform": number(size / num_experts),
        "tokens": len(chosen),
    }


def coactivation(chosen: np.ndarray, num_experts: int) -> np.ndarray:
    """Tokens that chose both of two experts, (E, E) integers; the diagonal is 0."""
    found = np.zeros(num_experts**2, dtype=np.int64)
    for i, j in combinations(chosen.T, 2):
        both = (i < num_experts) & (j < num_experts)
        found += np.bincount(i[both] * num_experts + j[both], minlength=len(found))
    square = found.reshape(num_experts, num_experts)
    return square + square.T


def _coactive(together: np.ndarray, counts: np.ndarray, num_tokens: int) -> list[dict[str, object]]:
    """The pairs chosen together most, with lift: how many times as often as if choices were independent."""
    ids = [(i, j) for i, j in zip(*np.nonzero(np.triu(together, 1)), strict=True)]
    ids = sorted(ids, key=lambda pair: (-together[pair], pair))[:COACTIVE]
    return [
        {
            "experts": [int(i), int(j)],
            "tokens": int(together[i, j]),
            "lift": number(together[i, j] * num_tokens / (int(counts[i]) * int(counts[j])), 4),
        }
        for i, j in ids
    ]
