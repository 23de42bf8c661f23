"""A MoE layer on packed experts: one parallel region per projection, called by transformers' registry of experts.

A few tokens per expert (`kernels.most_tokens`) are multiplied by the kernels, eight at a time and straight from the
packed weights. For more, tiles of a matrix are expanded into the cache and multiplied by torch. Without kernels
(another processor, `COTERIE_KERNELS=torch`), or on a GPU, every used expert is expanded by torch operations; packed
weights stay in host memory.
Axes: T token, K top-k, S = T K chosen pairs, D hidden, F expert hidden, E expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from coterie.errors import CoterieError
from coterie.kernels import run as kernels
from coterie.kernels.memory import TILE, TORCH, Stack
from coterie.kernels.products import padded

IMPLEMENTATION = "coterie_sparse"  # our name in the registry


@dataclass(frozen=True)
class Groups:
    """Pairs in the order of their experts: expert ids[g] has the pairs starts[g] : starts[g] + counts[g]."""

    ids: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, experts: np.ndarray) -> Groups:
        """From sorted expert ids."""
        starts = np.flatnonzero(np.diff(experts, prepend=-1))
        return cls(experts[starts], starts, np.diff(starts, append=len(experts)))

    def where(self, chosen: np.ndarray) -> Groups:
        return Groups(self.ids[chosen], self.starts[chosen], self.counts[chosen])

    def parts(self, most: int) -> Groups:
        """The same pairs, in groups of at most `most`."""
        if self.counts.max() <= most:
            return self
        numbers = -(-self.counts // most)
        place = np.arange(numbers.sum()) - np.repeat(numbers.cumsum() - numbers, numbers)
        counts = np.minimum(np.repeat(self.counts, numbers) - most * place, most)
        return Groups(np.repeat(self.ids, numbers), np.repeat(self.starts, numbers) + most * place, counts)

    def each(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.ids.tolist(), self.starts.tolist(), self.counts.tolist(), strict=True)


def multiply(stacks: list[Stack], groups: Groups, x: torch.Tensor) -> torch.Tensor:
    """Each group's rows of x (S, I), or its only row (1, I), times its expert's matrices: (S, sum of their O).

    float32 where the kernels do it, and where torch does it, its own sums rounded to x's dtype.
    """
    num_pairs = len(x) if len(x) > 1 else int(groups.counts.sum())
    y = torch.empty(num_pairs, sum(s.shape[0] for s in stacks), dtype=torch.float32, device=x.device)
    which = kernels.level() if x.device.type == "cpu" else "torch"
    kind = kernels.input_type(which, stacks[0].dtype, x.dtype == torch.bfloat16)
    limit = kernels.most_tokens(which, kind)
    if num_pairs and groups.counts.max() <= limit:
        _multiply_packed(stacks, groups.parts(kernels.MAX_BATCH), x, y, which, kind)
        return y
    small = groups.counts <= limit
    if small.any():
        _multiply_packed(stacks, groups.where(small).parts(kernels.MAX_BATCH), x, y, which, kind)
    _multiply_tiles(stacks, groups.where(~small), x, y)
    return y


def _multiply_packed(
    stacks: list[Stack], groups: Groups, x: torch.Tensor, y: torch.Tensor, which: str, kind: str
) -> None:
    """By the kernels, all experts and matrices in one parallel region."""
    num_columns, width = x.shape[1], 32 * stacks[0].num_words
    x = x.to(torch.bfloat16 if kind == "BF16" else torch.float32)
    x = (x if num_columns == width else F.pad(x, (0, width - num_columns))).contiguous()
    step = 0 if len(x) == 1 else width * x.element_size()
    sources = x.data_ptr() + groups.starts * step
    targets = y.data_ptr() + groups.starts * (4 * y.shape[1])
    num_bytes = sum(s.num_bytes // len(s.matrices) for s in stacks) * len(groups.ids)
    threads = max(1, min(torch.get_num_threads(), num_bytes // kernels.MIN_SHARE))
    blocks = 1 if threads == 1 else max(1, 8 * threads // (len(groups.ids) * len(stacks)))
    jobs, first = [], 0
    for stack in stacks:
        split = min(blocks, stack.shape[0])
        at = targets + 4 * first
        jobs.append(stack.jobs(which, kind, groups.ids, groups.counts, sources, at, y.shape[1], split))
        first += stack.shape[0]
    kernels.run(which, jobs[0] if len(jobs) == 1 else np.concatenate(jobs), threads)


def _multiply_tiles(stacks: list[Stack], groups: Groups, x: torch.Tensor, y: torch.Tensor) -> None:
    """By torch, from tiles that were just expanded. Token counts are padded to a few sizes (see `products.padded`)."""
    for e, start, count in groups.each():
        rows = x if len(x) == 1 and count == 1 else x[start : start + count]
        rows, first = F.pad(rows, (0, 0, 0, padded(count, x.dtype) - count)), 0
        for stack in stacks:
            matrix, size = stack.matrices[e], TORCH[stack.dtype].itemsize
            step = stack.shape[0] if x.device.type != "cpu" else max(32, TILE // (stack.shape[1] * size))
            for begin in range(0, stack.shape[0], step):
                end = min(begin + step, stack.shape[0])
                tile = matrix.rows(begin, end, x.dtype, x.device)
                y[start : start + count, first + begin : first + end] = F.linear(rows, tile)[:count]
            first += stack.shape[0]


@dataclass(frozen=True)
class SparseExperts:
    """A layer's experts: the stacks that give gate and up (or up alone), and down."""

    first: tuple[Stack, ...]
    down: Stack

    @property
    def num_bytes(self) -> int:
        return sum(s.num_bytes for s in (*self.first, self.down))


def forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """sum_k w_k * down_k(act(gate_k x) * up_k x) for hidden states (T, D); an experts implementation.

    Modules that hold no packed experts are computed by the library's own default.
    """
    experts: SparseExperts | None = getattr(module, "coterie", None)
    if experts is None:
        return _stock(module, hidden_states, top_k_index, top_k_weights)
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        raise CoterieError(
            "packed experts are for inference: they have no gradients; unpack the checkpoint to train it"
        )
    if len(hidden_states) == 1:
        return _one_token(module, experts, hidden_states, top_k_index, top_k_weights)
    num_tokens, top_k = top_k_index.shape
    pairs = top_k_index.reshape(-1).cpu().numpy()
    order = np.argsort(pairs, kind="stable")
    groups, places = Groups.of(pairs[order]), torch.from_numpy(order).to(hidden_states.device)
    y = _outputs(module, experts, groups, hidden_states[places // top_k])
    y = y * top_k_weights.reshape(-1)[places, None]
    total = torch.empty_like(y)
    total[places] = y
    return total.view(num_tokens, top_k, -1).sum(1).to(hidden_states.dtype)


def _one_token(module: Any, experts: SparseExperts, x: torch.Tensor, ids: torch.Tensor, weights: Any) -> torch.Tensor:
    """The same for a single token, whose experts all differ, in as few operations as it takes."""
    chosen = ids[0].cpu().numpy()
    groups = Groups(chosen, np.arange(len(chosen)), np.ones(len(chosen), np.int64))
    y = _outputs(module, experts, groups, x)
    return (weights.to(y.dtype) @ y).to(x.dtype)


def _outputs(module: Any, experts: SparseExperts, groups: Groups, x: torch.Tensor) -> torch.Tensor:
    """down(act(gate x) * up x) of every pair, (S, D), before the router's weights."""
    y = multiply([experts.down], groups, _hidden(module, experts, groups, x))
    if module.has_bias:
        y = y + module.down_proj_bias[_experts_of_pairs(groups, x)]
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y.to(x.dtype)).float()
    return y


def _experts_of_pairs(groups: Groups, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.repeat(groups.ids, groups.counts)).to(x.device)


def _hidden(module: Any, experts: SparseExperts, groups: Groups, x: torch.Tensor) -> torch.Tensor:
    """What enters the down projections, (S, F), in x's dtype; the activation is the module's own."""
    h = multiply(list(experts.first), groups, x)
    if module.has_gate and not module.is_concatenated:
        h = torch.stack(h.chunk(2, dim=-1), dim=-1).flatten(-2)
    if module.has_bias:
        bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        h = h + bias[_experts_of_pairs(groups, x)]
    return (module._apply_gate(h) if module.has_gate else module.act_fn(h)).to(x.dtype)


def _stock(module: Any, *arguments: torch.Tensor) -> torch.Tensor:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *arguments)


class SparseLinear(torch.nn.Module):
    """A linear layer whose packed weight is multiplied without being expanded."""

    def __init__(self, in_features: int, out_features: int, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        self.coterie: Stack | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.coterie is not None
        rows = x.reshape(-1, self.in_features)
        groups = Groups.of(np.zeros(len(rows), np.int64))
        y = multiply([self.coterie], groups, rows).to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def register() -> None:
    """Makes `forward` the experts implementation named `coterie_sparse`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
