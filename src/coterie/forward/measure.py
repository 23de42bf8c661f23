"""What the experts of a model do on calibration data, measured in one streaming forward: the sums of `model/stats.py`.

Every token knows its domain and half (of the domain's samples, every second one), and is added to their sums.
Axis G: 2 * domain + half.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch

from coterie.errors import CoterieError
from coterie.forward.activations import ROWS, Piece, Routed, Walk, samples_of, weighted_sums
from coterie.forward.layerwise import Layerwise
from coterie.forward.stream import Stream
from coterie.model import moe
from coterie.model.layer import Model, MoE
from coterie.model.loading import quiet_transformers
from coterie.model.stats import HALVES, Stats, joined
from coterie.storage.record import Progress, no_progress
from coterie.storage.resumable import Resumable

Sums = dict[str, np.ndarray]  # of one layer by name, each (G, ...)
SCALARS = ("tokens", "gates", "output_norms", "gated_output_norms", "output_norms_squared")


@quiet_transformers()
def measure(
    model: Model,
    by_domain: dict[str, list[tuple[int, ...]]],
    dtype: torch.dtype,
    on_progress: Progress = no_progress,
    extra: Collection[str] = (),
    run: Resumable | None = None,
    **activations: Any,
) -> Stats:
    """All sums of `stats.SUMS` for every MoE layer, by domain and half.

    extra: names in `stats.MERGING` to measure as well. run: where each layer's sums are kept, to go on from.
    activations: where they go when they are large, as `Stream.embed` has it (spill, budget).
    Raises: CoterieError for a model that cannot be streamed, and for activations that are NaN or infinite.
    """
    stream, samples = Stream(model, dtype), [sample for given in by_domain.values() for sample in given]
    batches, layerwise = stream.embed(samples, **activations), Layerwise(run, samples)
    group_of = [HALVES * d + i % HALVES for d, given in enumerate(by_domain.values()) for i in range(len(given))]
    groups, num_groups = torch.tensor(group_of)[samples_of(batches)], HALVES * len(by_domain)
    stats, part = (Stats(model.checkpoint.hash, {n: len(given) for n, given in by_domain.items()}) for _ in range(2))
    routers = Routers(stream, groups, num_groups, products="logit_products" in extra)
    blocks = {int(block.key): block for block in model.main}

    def keep(block: MoE, sums: Sums) -> None:
        _check_finite(sums, block.name)
        for name, values in sums.items():
            for domain, halves in zip(by_domain, values.reshape(-1, HALVES, *values.shape[1:]), strict=True):
                part.add(domain, block.key, name, halves)

    def layers(first: int) -> Iterator[int]:
        walk = measuring_walk(model, dtype, groups, num_groups, keep, everywhere="all_outputs" in extra)
        for index in stream.run(batches, walk, first):
            if block := blocks.get(index):
                logits = routers.take(block)
                keep(block, logits)
                if not logits:
                    part.notes.append(f"{block.name}: its router's logits could not be seen, and are left out")
            if run:
                part.save(layerwise.kept(index))
            stats.take(part)
            yield index

    for index in range(first := layerwise.first(batches, len(stream.layers))):
        stats.take(Stats.load(layerwise.kept(index)))
    layerwise.run(batches, layers(first), len(stream.layers), lambda _: {}, partial(on_progress, "measuring layers"))
    return stats


class Routers:
    """Sums of what every router computes before its softmax or sigmoid, taken where it runs.

    The logits z (T, E) are the output, or the first of several, of the module that holds the router's rows: in every
    family of transformers x W^T plus the router's own bias, times its own multiplier where it has one, x being what
    that router sees (not always what the experts see). Biases that only select are added later, and take no part.
    """

    def __init__(self, stream: Stream, groups: torch.Tensor, num_groups: int, *, products: bool = False) -> None:
        self._groups, self._num_groups = groups, num_groups
        self._sums: dict[str, torch.Tensor] = {}  # layer key -> sums of z and of z^2 (2, G, E)
        self._products: dict[str, torch.Tensor] | None = {} if products else None  # and of z z^T (G, E, E)
        self._num_seen: dict[str, int] = {}
        for block in stream.source.main:
            index = int(block.key)
            if name := stream.router(index):
                router = stream.layers[index].get_submodule(name.rpartition(".")[0])
                router.register_forward_hook(self._hook(block))

    def _hook(self, block: MoE) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(first, torch.Tensor) or first.shape[-1:] != (block.num_experts,):
                return
            z = first.reshape(-1, block.num_experts).double()
            start = self._num_seen.get(block.key, 0)
            self._num_seen[block.key] = start + len(z)
            rows = self._groups[start : start + len(z)]  # batches come in the order of the groups
            empty = torch.zeros(2, self._num_groups, block.num_experts, dtype=torch.float64)
            found = self._sums.setdefault(block.key, empty)
            for sums, values in zip(found, (z, z.square()), strict=True):
                sums.index_add_(0, rows, values[: len(rows)])
            if self._products is not None:
                empty = torch.zeros(self._num_groups, block.num_experts, block.num_experts, dtype=torch.float64)
                products = self._products.setdefault(block.key, empty)
                for group in rows.unique().tolist():
                    some = z[: len(rows)][rows == group]
                    products[group] += some.T @ some

        return hook

    def take(self, block: MoE) -> Sums:
        """A layer's sums (G, E), once it is through; none where not every token's logits were seen."""
        sums, num_seen = self._sums.pop(block.key, None), self._num_seen.pop(block.key, 0)
        products = None if self._products is None else self._products.pop(block.key, None)
        if sums is None or num_seen != len(self._groups):
            return {}
        found = {"logits": sums[0].numpy(), "logits_squared": sums[1].numpy()}
        return found if products is None else found | {"logit_products": products.numpy()}


def measuring_walk(
    model: Model,
    dtype: torch.dtype,
    groups: torch.Tensor,
    num_groups: int,
    keep: Callable[[MoE, Sums], None],
    *,
    everywhere: bool = False,
) -> Walk:
    """The experts as they are, each measured on the way; `keep` gets a block's sums once it is through.

    everywhere: also on the tokens that did not choose them ("all_outputs").
    """

    def walk(routed: Routed) -> torch.Tensor:
        assert len(routed.x) == len(groups)
        total = routed.zeros()
        sums: Sums = {"coactivation": _coactivation(routed, groups, num_groups)}
        sums["num_tokens"] = torch.bincount(groups, minlength=num_groups).double().numpy()
        for e, expert, rows, weights in routed.experts(model.checkpoint, dtype):
            for piece in routed.pieces(expert, rows, weights):
                routed.add(total, piece)
                for name, values in _sums(piece, groups[piece.rows], num_groups).items():
                    shape = (num_groups, routed.block.num_experts, *values.shape[1:])
                    sum_of_expert = sums.setdefault(name, np.zeros(shape))[:, e]
                    joined(name)(sum_of_expert, values.numpy(), out=sum_of_expert)
        if everywhere:
            sums["all_outputs"] = _all_outputs(routed, model, dtype, groups, num_groups)
        keep(routed.block, sums)
        return total

    return walk


def _all_outputs(routed: Routed, model: Model, dtype: torch.dtype, groups: torch.Tensor, num_groups: int) -> np.ndarray:
    """Every expert's outputs on every token, summed by group, (G, E, D).

    The last map is linear, so that it sees sums alone, which saves a third of the products; an expert with a norm
    behind it runs whole. Each is read once more: beside its work on all tokens that is little.
    """
    block, whole, found = routed.block, bool(routed.module.has_post_expert_norm), []
    rows, counts = torch.arange(len(groups)), torch.bincount(groups, minlength=num_groups).double()
    for expert in moe.read_experts(model.checkpoint, block, range(block.num_experts), dtype):
        sums: Any = 0.0
        for piece in routed.pieces(expert, rows, torch.ones(len(rows)), outputs=whole):
            own = torch.nn.functional.one_hot(groups[piece.rows], num_groups).T.float()
            sums = sums + weighted_sums(own, piece.y if whole else piece.hidden)
        if not whole:
            sums = sums @ expert.down.double().T
            if expert.down_bias is not None:
                sums += torch.outer(counts, expert.down_bias.double())
        found.append(sums.numpy())
    return np.stack(found, axis=1)


def _sums(piece: Piece, groups: torch.Tensor, num_groups: int) -> dict[str, torch.Tensor]:
    """An expert's sums over some of its tokens, whose groups are (T,), each (G, ...) in float64.

    One product of ones and squared gates (2G, T) with squares (T, C) sums every group, as it is and gated.
    """
    norms = torch.cat([y.float().norm(dim=1) for y in piece.y.split(ROWS)]).double()
    weights, num_tokens = piece.weights.double(), len(groups)
    scalars = torch.stack([torch.ones_like(norms), piece.gates.double(), norms, weights * norms, norms.square()])
    by_group = torch.zeros(len(scalars), num_groups, dtype=torch.float64).index_add_(1, groups, scalars)
    largest = piece.y.abs().amax(dim=1).double()
    own = torch.zeros(num_groups, num_tokens)
    own[groups, torch.arange(num_tokens)] = 1.0
    both = torch.cat([own, own * piece.weights.float().square()])
    inputs, hidden = (weighted_sums(both, v, squared=True).chunk(2) for v in (piece.x, piece.hidden))
    return {
        **dict(zip(SCALARS, by_group, strict=True)),
        "output_max": torch.zeros(num_groups, dtype=torch.float64).scatter_reduce_(0, groups, largest, "amax"),
        **dict(zip(("inputs_squared", "gated_inputs_squared"), inputs, strict=True)),
        **dict(zip(("hidden_squared", "gated_hidden_squared"), hidden, strict=True)),
        "outputs": weighted_sums(own, piece.y),
    }


def _coactivation(routed: Routed, groups: torch.Tensor, num_groups: int) -> np.ndarray:
    """How many tokens of each group chose both experts of a pair, (G, E, E); the diagonal is 0."""
    num_experts = routed.block.num_experts
    counts = torch.zeros(num_groups * num_experts**2, dtype=torch.long)
    for i, j in combinations(routed.chosen.T, 2):
        both = (i < num_experts) & (j < num_experts)  # ids beyond the experts stand for none
        counts += torch.bincount(((groups * num_experts + i) * num_experts + j)[both], minlength=len(counts))
    found = counts.view(num_groups, num_experts, num_experts)
    return (found + found.mT).double().numpy()


def _check_finite(sums: Sums, where: str) -> None:
    bad = next((name for name, value in sums.items() if not np.isfinite(value).all()), None)
    if bad:
        raise CoterieError(
            f"{where}: {bad} are NaN or infinite; the weights are damaged, or their range needs --dtype float32"
        )
