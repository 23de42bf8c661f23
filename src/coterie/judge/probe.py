"""What every expert of a layer would have put out, measured on the tokens as they really pass: the two-pass probe.

The model runs as it is. Where a layer asks for its experts, the chosen ones give the sum that the model goes on with;
and on some of the tokens, spread evenly, *all* experts run on the same inputs. So outputs of experts that were not
chosen are known for the true trajectory, and nothing that they would have changed enters later layers.
Each expert is read once; its outputs on the probed tokens are kept, (P, E, D), with P as large as fits the bounds.
Source: A Closer Look into Mixture-of-Experts, arXiv 2406.18219. Importing this module imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coterie.errors import CoterieError
from coterie.forward.activations import Batch, Routed, dense_weights, samples_of
from coterie.forward.layerwise import Layerwise
from coterie.forward.measure import Routers
from coterie.forward.stream import Stream
from coterie.judge import locality
from coterie.judge.locality import Tokens
from coterie.judge.numbers import Found, correlation, listed, number, pairs, ratio
from coterie.judge.rounding import BITS, GROUP, rounded_expert
from coterie.methods.condense import least_squares
from coterie.model import moe
from coterie.model.experts import hidden_size
from coterie.model.layer import Model, MoE
from coterie.model.loading import quiet_transformers
from coterie.storage.checkpoint import load_json
from coterie.storage.files import write_whole
from coterie.storage.record import Progress, no_progress
from coterie.storage.resumable import Resumable

PROBED = 512  # tokens at most
MOST_OUTPUTS = 2**25  # numbers: the outputs of all experts on the probed tokens
MOST_AT_ONCE = 2**22  # numbers: some tokens' outputs, and cosines of them
POINTS = 300  # of gates against norms, for plots


@dataclass
class Seen:
    """What a layer showed while it ran: P probed tokens, T all of them."""

    chosen: np.ndarray  # (T, K)
    weights: torch.Tensor  # (P, E): of the true routing, 0 where an expert was not chosen
    outputs: torch.Tensor  # (P, E, D) float32
    gates: np.ndarray  # of every choice of every token
    norms: np.ndarray  # of the outputs of the same choices
    changes: dict[int, torch.Tensor] = field(default_factory=dict)  # bits -> change of the weighted sum (P, D)
    errors: dict[int, list[float]] = field(default_factory=dict)  # bits -> of each expert's outputs
    squares: dict[int, list[float]] = field(default_factory=dict)  # bits -> change of weights, weights


@quiet_transformers()
def probe(
    model: Model,
    by_domain: dict[str, list[tuple[int, ...]]],
    dtype: torch.dtype,
    finish: Callable[[MoE, Found], Found] = lambda _, found: found,
    *,
    seed: int = 0,
    run: Resumable | None = None,
    on_progress: Progress = no_progress,
    **activations: Any,
) -> list[tuple[MoE, Found]]:
    """(block, what its experts do) of every MoE layer in order, as `analyze` describes it.

    finish: what becomes of it, which is kept in JSON where there is a `run`, to go on from.
    Raises: CoterieError for a model that cannot be streamed, and for outputs that are NaN or infinite.
    """
    stream, samples = Stream(model, dtype), [sample for given in by_domain.values() for sample in given]
    batches, layerwise = stream.embed(samples, **activations), Layerwise(run, samples)
    tokens = tokens_of(batches, by_domain)
    rows = probed_rows(model, len(tokens.sample))
    groups = torch.full((len(tokens.sample),), len(rows))  # every probed token is a group of its own
    groups[rows] = torch.arange(len(rows))
    routers = Routers(stream, groups, len(rows) + 1)
    seen: list[Seen] = []

    def walk(routed: Routed) -> torch.Tensor:
        total, found = watch(routed, model, dtype, rows)
        seen.append(found)
        return total

    blocks, num_layers = {int(block.key): block for block in model.main}, len(stream.layers)

    def layers(first: int) -> Iterator[int]:
        for index in stream.run(batches, walk, first):
            if block := blocks.get(index):
                logits = routers.take(block).get("logits")
                hidden = float(gathered(batches, rows).double().square().sum())
                scores = None if logits is None else torch.from_numpy(logits[: len(rows)]).softmax(dim=1).float()
                found[index] = finish(block, findings(seen.pop(), tokens, scores, hidden, seed))
                if run:
                    write_whole(layerwise.kept(index), partial(Path.write_text, data=json.dumps(found[index])))
            yield index

    first = layerwise.first(batches, num_layers)
    found: dict[int, Found] = {i: load_json(layerwise.kept(i)) for i in range(first) if i in blocks}
    layerwise.run(batches, layers(first), num_layers, lambda _: {}, partial(on_progress, "analyzing layers"))
    return [(blocks[index], entry) for index, entry in found.items()]


def tokens_of(batches: list[Batch], by_domain: dict[str, list[tuple[int, ...]]]) -> Tokens:
    """Sample and domain of every row that a layer routes."""
    domain_of = np.repeat(np.arange(len(by_domain)), [len(given) for given in by_domain.values()])
    sample = samples_of(batches).numpy()
    return Tokens(sample, domain_of[sample], tuple(by_domain))


def probed_rows(model: Model, num_tokens: int) -> torch.Tensor:
    """Rows spread evenly over all tokens: at most `PROBED`, fewer where outputs would be too many numbers."""
    width = max(hidden_size(model.checkpoint, b) * b.num_experts for b in model.main)
    count = max(1, min(PROBED, num_tokens, MOST_OUTPUTS // width))
    return torch.from_numpy(np.unique(np.linspace(0, num_tokens - 1, count).round().astype(np.int64)))


def gathered(batches: list[Batch], rows: torch.Tensor) -> torch.Tensor:
    """Hidden states (P, ...) of some rows of all batches, ascending."""
    found, start = [], 0
    for batch in batches:
        here = rows[(rows >= start) & (rows < start + batch.num_tokens)] - start
        found.append(batch.hidden.reshape(batch.num_tokens, -1)[here].float())
        start += batch.num_tokens
    return torch.cat(found)


# --- while the layer runs -----------------------------------------------------------------------------------------


def watch(routed: Routed, model: Model, dtype: torch.dtype, rows: torch.Tensor) -> tuple[torch.Tensor, Seen]:
    """The experts' weighted sum over all tokens, and what all experts do on the probed rows."""
    routed.check_linear()
    block, total, num_experts = routed.block, routed.zeros(), routed.block.num_experts
    weights = dense_weights(routed.chosen[rows], routed.weights[rows], num_experts)
    outputs = torch.zeros(len(rows), num_experts, routed.x.shape[1])
    seen = Seen(routed.chosen.numpy(), weights, outputs, np.zeros(0), np.zeros(0))
    theirs = {e: (places, gates) for e, places, gates in routed.by_expert()}
    gates, norms = [], []
    for e, expert in enumerate(moe.read_experts(model.checkpoint, block, range(num_experts), dtype)):
        places, given = theirs.get(e, (rows[:0], routed.weights[:0, 0]))
        for piece in routed.pieces(expert, places, given) if len(places) else ():
            routed.add(total, piece)
            gates.append(piece.gates.float())
            norms.append(piece.y.float().norm(dim=1))
        outputs[:, e] = run(routed, expert, rows)
        for bits in BITS:
            _round(seen, routed, rows, e, expert, bits)
    seen.gates, seen.norms = (torch.cat(v).numpy() if v else np.zeros(0) for v in (gates, norms))
    if not all(bool(bound.isfinite()) for bound in outputs.aminmax()):
        raise CoterieError(
            f"{block.name}: outputs of experts are NaN or infinite on tokens that did not choose them; the weights are "
            "damaged, or their range needs --dtype float32"
        )
    return total, seen


def run(routed: Routed, expert: moe.Expert, rows: torch.Tensor) -> torch.Tensor:
    """An expert's outputs (P, D) on some rows, in float32."""
    return torch.cat([piece.y.float() for piece in routed.pieces(expert, rows, torch.ones(len(rows)))])


def _round(seen: Seen, routed: Routed, rows: torch.Tensor, e: int, expert: moe.Expert, bits: int) -> None:
    """Adds what rounding expert e to so many bits changes."""
    less, change, whole = rounded_expert(expert, bits)
    gap = run(routed, less, rows) - seen.outputs[:, e]
    size = float(seen.outputs[:, e].double().norm())
    seen.errors.setdefault(bits, []).append(ratio(float(gap.double().norm()), size))
    seen.changes.setdefault(bits, torch.zeros_like(gap)).add_(seen.weights[:, e, None] * gap)
    sums = seen.squares.setdefault(bits, [0.0, 0.0])
    sums[0], sums[1] = sums[0] + change, sums[1] + whole


# --- once it is through -------------------------------------------------------------------------------------------


def findings(seen: Seen, tokens: Tokens, scores: torch.Tensor | None, hidden: float, seed: int) -> dict[str, object]:
    """A layer's entries: `cosine` of outputs, `probe`, `norms`, `bits`, `condense` and what `locality` finds."""
    outputs, angular = similarities(seen.outputs)
    target = (seen.weights[:, None] @ seen.outputs)[:, 0]
    return {
        "chosen": seen.chosen.shape[1],
        "cosine": {"outputs": listed(outputs), "angular": listed(angular)},
        "probe": {
            "tokens": len(seen.outputs),
            "outputs_mean": number(pairs(outputs).mean()) if len(outputs) > 1 else None,
            "counterfactual": counterfactual(seen, target, scores, seed),
        },
        "norms": norms_and_gates(seen, scores),
        "bits": _bits(seen, target),
        "condense": condense(seen, target, hidden),
        **locality.look(seen.chosen, seen.outputs.shape[1], tokens),
    }


def similarities(outputs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Means over tokens of the cosine c of two experts' outputs, and of 1 - arccos(c) / pi: (E, E) each.

    outputs (P, E, D). An output of zero has cosine 0 with everything, and counts.
    """
    num_tokens, num_experts, width = outputs.shape
    cosines, angles = (torch.zeros(num_experts, num_experts, dtype=torch.float64) for _ in range(2))
    for some in outputs.split(max(1, MOST_AT_ONCE // (num_experts * max(num_experts, width)))):
        scaled = some / some.abs().amax(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        unit = scaled / scaled.norm(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        found = (unit @ unit.mT).double().clamp(-1, 1)
        itself = torch.diagonal(found, dim1=1, dim2=2)
        itself.copy_((itself > 0.5).double())  # rounding: an angle to oneself is 0
        cosines += found.sum(dim=0)
        angles += (1 - found.arccos() / math.pi).sum(dim=0)
    return (cosines / num_tokens).numpy(), (angles / num_tokens).numpy()


def counterfactual(seen: Seen, target: torch.Tensor, scores: torch.Tensor | None, seed: int) -> dict[str, object]:
    """What the experts' sum would have been with others: {"error", "cosine"} by choice; None where there is none.

    error: sum |z' - z|^2 / sum |z|^2 over the probed tokens, z being the true sum; cosine: its mean over tokens.
    next: the K experts with the next best scores, with the weights of the chosen ones in order; random: K of those that
    were not chosen; first: the expert of largest weight alone, with the weights' sum; all: every expert, by the softmax
    of its logit, scaled to the same sum.
    """
    weights, num_chosen = seen.weights, seen.chosen.shape[1]
    enough = weights.shape[1] >= 2 * num_chosen
    ranked = weights.sort(dim=1, descending=True).values[:, :num_chosen]
    taken = weights != 0
    draws = torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed))
    sums = weights.sum(dim=1, keepdim=True)
    first = torch.zeros_like(weights).scatter_(1, weights.argmax(dim=1, keepdim=True), sums)
    swaps = {
        "next": _instead(scores, taken, ranked) if enough and scores is not None else None,
        "random": _instead(draws, taken, ranked) if enough else None,
        "first": first,
        "all": None if scores is None else scores * sums / scores.sum(dim=1, keepdim=True),
    }
    return {name: None if given is None else _against(seen, target, given) for name, given in swaps.items()}


def _instead(order: torch.Tensor, taken: torch.Tensor, ranked: torch.Tensor) -> torch.Tensor:
    """Weights (P, E): the given ones (P, K) on the experts of largest `order` among those not taken."""
    others = order.masked_fill(taken, -torch.inf).topk(ranked.shape[1], dim=1).indices
    return torch.zeros_like(order).scatter_(1, others, ranked)


def _against(seen: Seen, target: torch.Tensor, weights: torch.Tensor) -> dict[str, object]:
    other = (weights[:, None] @ seen.outputs)[:, 0]
    error = ratio(float((other - target).double().square().sum()), float(target.double().square().sum()))
    alike = torch.nn.functional.cosine_similarity(other.double(), target.double(), dim=1)
    return {"error": number(error), "cosine": number(float(alike.mean()))}


def norms_and_gates(seen: Seen, scores: torch.Tensor | None) -> dict[str, object]:
    """Norms |f_e(x)| of outputs against what the router says of the expert."""
    norms = seen.outputs.norm(dim=2)
    num_tokens, num_experts = norms.shape
    taken = seen.weights != 0
    ranks = norms.argsort(dim=1, descending=True).argsort(dim=1)
    largest = taken & (ranks < taken.sum(dim=1, keepdim=True))
    some = np.unique(np.linspace(0, max(0, len(seen.gates) - 1), POINTS).astype(np.int64))[: len(seen.gates)]
    return {
        "mean": listed(norms.mean(dim=0), 6),
        "gate_norm": number(correlation(seen.gates, seen.norms)),
        "gate_contribution": number(correlation(seen.gates, seen.gates * seen.norms)),
        "score_norm": None
        if scores is None
        else number(correlation(scores.flatten().numpy(), norms.flatten().numpy())),
        "chosen_largest": number(ratio(int(largest.sum()), int(taken.sum()))),
        "chance": number(ratio(float(taken.sum()) / num_tokens, num_experts)),
        "choices": len(seen.gates),
        "points": [[number(g, 4), number(n, 4)] for g, n in zip(seen.gates[some], seen.norms[some], strict=True)],
    }


def _bits(seen: Seen, target: torch.Tensor) -> dict[str, object]:
    """Relative errors, norm over norm, of experts rounded to so many bits."""
    size = float(target.double().norm())
    return {
        str(bits): {
            "stored": bits + 32 / GROUP,
            "weights": number(math.sqrt(ratio(*seen.squares[bits]))),
            "layer": number(ratio(float(seen.changes[bits].double().norm()), size)),
            "experts": listed(seen.errors[bits], 6),
        }
        for bits in BITS
    }


def condense(seen: Seen, target: torch.Tensor, hidden: float) -> dict[str, object]:
    """How well the best K experts, always on with constant gates, stand for the routed sum z of the probed tokens.

    captured: 1 - |z - z'|^2 / |z|^2; routed: |z|^2 over the squared hidden states that leave the layer;
    lost: (1 - captured) routed, the share of those that condensing changes. Found greedily, by least squares.
    """
    num_experts, width = seen.outputs.shape[1:]
    gram, goal = np.zeros((num_experts, num_experts)), np.zeros(num_experts)
    size = max(1, MOST_AT_ONCE // (num_experts * width))
    for some, goals in zip(seen.outputs.split(size), target.split(size), strict=True):
        flat = some.transpose(0, 1).reshape(num_experts, -1)
        gram += (flat @ flat.T).double().numpy()
        goal += (flat @ goals.flatten()).double().numpy()
    whole = float(target.double().square().sum())
    experts, gates = least_squares.choose(gram, goal, seen.chosen.shape[1])
    share = min(1.0, max(0.0, ratio(least_squares.explained(gram, goal, experts), whole)))
    return {
        "experts": experts,
        "gates": listed(gates, 6),
        "captured": number(share),
        "routed": number(ratio(whole, hidden)),
        "lost": number((1 - share) * ratio(whole, hidden)),
    }
