"""What a layer's output loses when only some of its experts stay, for criteria that try sets of them (NAEE).

Removing experts changes more than a sum: the router chooses others, and normalises anew. So every token is routed again
for every set, by the stock block itself; and what the change of weights costs is read off inner products,

    sum_x ||Z(x) - Z_K(x)||^2 = sum_x (w - w_K)^T G(x) (w - w_K),   G_ef(x) = <f_e(x), f_f(x)>,

w (E,) being the token's weights, zero where an expert is not chosen. G is measured once, with every expert run on every
token; sets then cost a routing each. Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from coterie.decide.criteria import UNMEASURED, Guarded, Selected, Task, by_weights, keep
from coterie.edits.masked import MaskedRouting, twin
from coterie.edits.plan import Choice
from coterie.errors import CoterieError
from coterie.forward.activations import Batch, Routed, dense_weights, plain_walk, samples_of
from coterie.forward.samples import Calibration, compute_dtype, dtype_name, read_samples
from coterie.forward.stream import Stream, advance
from coterie.forward.suspended import ExpertsCall, asked_by
from coterie.model import moe
from coterie.model.layer import Model, MoE
from coterie.model.loading import quiet_transformers
from coterie.model.stats import HALVES, agreement
from coterie.storage.folders import existing
from coterie.storage.record import Progress

MOST_PRODUCTS = 2**30  # bytes of G in memory: 4 T E^2 of one layer
MOST_OUTPUTS = 2**26  # numbers: the outputs of all experts on some tokens
ROWS = 4096  # tokens whose errors are summed at once
ALIKE = 1e-4  # of the largest weight: routing that is found again may round differently

Kept = tuple[int, ...]
Samples = dict[str, list[tuple[int, ...]]]  # by domain


def decide(
    model: Model, trial: Trial, calibration: Calibration, dtype: str, spill: Path | None, on_progress: Progress
) -> Selected:
    """The choices of a criterion of outputs, layer by layer, on the model as it is.

    spill: the folder for activations that are too large for memory.
    Raises: CoterieError for more sets than the criterion tries, and for a model or data that cannot be measured.
    """
    task = trial.task
    for block in task.measured:
        size, kept = block.num_experts // task.num_groups, task.kept // task.num_groups
        trial.method.check([size] * task.num_groups, [kept] * task.num_groups)
    rest = keep(task, by_weights(task, "router-norm", 0), trial.guarded)
    samples, notes = read_samples(model, calibration)
    computed_in = compute_dtype(model, dtype)
    measure(model, samples, trial, computed_in, on_progress, spill)
    notes += [UNMEASURED] if len(task.measured) < len(task.layers) else []
    budget: dict[str, object] = {
        "samples": {name: len(given) for name, given in samples.items()},
        "stability": agreement(*trial.halves),
    }
    return Selected(
        {**rest, **trial.choices},
        budget,
        {"reconstruction_error": trial.errors, "dtype": dtype_name(computed_in)},
        tuple(notes),
    )


@dataclass
class Trial:
    """What a criterion chooses, on all samples and on each half, and the share of the output that the choice loses."""

    task: Task
    method: ModuleType
    guarded: Guarded
    choices: dict[MoE, Choice] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    halves: tuple[dict[str, Kept], ...] = field(default_factory=lambda: tuple({} for _ in range(HALVES)))

    def choose(self, block: MoE, sets: Sets) -> None:
        """Chooses for one block."""
        num_groups, always = self.task.num_groups, frozenset(self.guarded.get(block, ()))
        groups = np.arange(block.num_experts).reshape(num_groups, -1).tolist()
        per_group = [self.task.kept // num_groups] * num_groups
        error = cache(sets.error)

        def chosen(half: slice) -> Kept:
            return tuple(self.method.choose(lambda kept: error(kept)[half].sum(), groups, per_group, always))

        kept = chosen(slice(None))
        self.choices[block] = Choice(kept)
        self.errors[block.key] = float(error(kept).sum() / (sets.size() or 1.0))
        for half, found in enumerate(self.halves):
            found[block.key] = chosen(slice(half, half + 1))


@quiet_transformers()
def measure(
    model: Model, samples: Samples, trial: Trial, dtype: torch.dtype, on_progress: Progress, spill: Path | None = None
) -> None:
    """Runs the model as it is over the samples; each MoE layer chooses once it is through.

    Raises: CoterieError for more tokens than the inner products of all experts' outputs have room for.
    """
    stream, blocks = Stream(model, dtype), {int(b.key): b for b in model.main}
    given = [s for found in samples.values() for s in found]
    num_experts, num_tokens = max(block.num_experts for block in model.main), sum(map(len, given))
    most = MOST_PRODUCTS // (4 * num_experts**2)
    if num_tokens > most:
        raise CoterieError(
            f"--samples: {num_tokens:,} tokens of {num_experts} experts each; inner products of their outputs fit in "
            f"memory for {most:,}: give fewer or shorter samples"
        )
    batches = stream.embed(given, spill=None if spill is None else existing(spill))
    halves, weights = token_weights(batches, samples, trial.task.weights)
    for index, layer in enumerate(stream.layers):
        with stream.loaded(index) as go:
            block = blocks.get(index)
            if block is None:
                go(batches, plain_walk(model.checkpoint, dtype), advance)
            else:
                sets = Sets(stream, layer, block, halves, weights)
                with sets.seen():
                    go(batches, sets.walk, advance)
                sets.check()
                trial.choose(block, sets)
        on_progress("trying sets of experts", index + 1, len(stream.layers))


def token_weights(
    batches: list[Batch], samples: Samples, weights: Mapping[str, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every row that a layer routes: the half that its sample is in, and its domain's weight; (T,) each.

    Raises: CoterieError for a weight of a domain that is not there.
    """
    unknown = set(weights) - set(samples)
    if unknown:
        raise CoterieError(f"--weights: domain {sorted(unknown)[0]!r} is not in the data: {', '.join(samples)}")
    half = [i % HALVES for given in samples.values() for i in range(len(given))]
    weight = [weights.get(name, 1.0) for name, given in samples.items() for _ in given]
    if not any(weight):
        raise CoterieError("--weights: every domain weighs 0; give one of them more")
    order = samples_of(batches)
    return torch.tensor(half)[order], torch.tensor(weight)[order].double()


class Sets:
    """Errors of sets of experts in one loaded layer, from one run of it with `seen` entered and `walk` for experts."""

    def __init__(
        self, stream: Stream, layer: torch.nn.Module, block: MoE, halves: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """halves, weights: as `token_weights` has them.

        Raises: CoterieError for a block whose experts are named by a table.
        """
        if block.tables:
            raise CoterieError(f"{block.name}: a table names its experts, so there is no routing to try sets with")
        self._stream, self._block, self._halves, self._token_weights = stream, block, halves, weights
        self._experts = moe.experts_modules(layer)[0]
        self._router = twin(stream.model, stream.checkpoint, block, block.router)
        biases = [name for name in block.rows if "bias" in name.rpartition(".")[2]]
        self._biases = [twin(stream.model, stream.checkpoint, block, name) for name in biases]
        self._module = _holder(layer, self._experts, self._router)
        _remember(self._module, self._experts, [self._router, *self._biases])
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self._weights = self._products = torch.empty(0)

    def seen(self) -> AbstractContextManager[Any]:
        """While entered, takes down what the block is called with, once a batch."""
        return self._module.register_forward_pre_hook(
            lambda module, args, kwargs: self._calls.append((args, kwargs)), with_kwargs=True
        )

    def walk(self, routed: Routed) -> torch.Tensor:
        """Every expert on every token: their inner products are kept, and their weighted sums returned."""
        routed.check_linear()
        num_experts, total = routed.block.num_experts, routed.zeros()
        self._weights = dense_weights(routed.chosen, routed.weights, num_experts)
        self._products = torch.empty(len(routed.x), num_experts, num_experts)
        size = max(1, MOST_OUTPUTS // (num_experts * routed.x.shape[1]))
        for rows in torch.arange(len(routed.x)).split(size):
            experts = moe.read_experts(self._stream.checkpoint, routed.block, range(num_experts), self._stream.dtype)
            pieces = (routed.pieces(expert, rows, torch.ones(len(rows))) for expert in experts)
            outputs = torch.stack([torch.cat([piece.y.float() for piece in some]) for some in pieces], dim=1)
            self._products[rows] = outputs @ outputs.mT
            total[rows] = (self._weights[rows, None] @ outputs)[:, 0].to(total.dtype)
        if not all(bound.isfinite() for bound in self._products.aminmax()):
            raise CoterieError(f"{routed.block.name}: outputs of experts are NaN or too large; try --dtype float32")
        return total

    def size(self) -> float:
        """The squared norm of the experts' sum: what errors are a share of."""
        return float(self._cost(self._weights).sum())

    def error(self, kept: Kept) -> np.ndarray:
        """The squared change of the output when the router knows these experts alone, by half (2,)."""
        return self._cost(self._weights - self._routed(kept)).numpy()

    def _cost(self, change: torch.Tensor) -> torch.Tensor:
        """The sum over tokens, weighted and by half, of change^T G change, for weights (T, E)."""
        found = torch.zeros(HALVES, dtype=torch.float64)
        num_experts = change.shape[1]
        changed = change.count_nonzero(dim=1)  # of a token: few of all experts, so that few products do
        most = max(1, int(changed.max()))
        for rows in changed.nonzero()[:, 0].split(ROWS):
            ids = change[rows].abs().topk(most, sorted=False).indices
            some = change[rows].gather(1, ids)
            pairs = (ids[:, :, None] * num_experts + ids[:, None]).flatten(1) + rows[:, None] * num_experts**2
            products = self._products.take(pairs).view(len(rows), most, most)
            costs = ((some[:, None] @ products)[:, 0] * some).sum(dim=1).double().clamp(min=0)
            found.index_add_(0, self._halves[rows], costs * self._token_weights[rows])
        return found

    def _routed(self, kept: Kept) -> torch.Tensor:
        """Every token's weights (T, E) when the router knows the kept experts alone: the stock block runs again.

        Raises: CoterieError where the router does not use the stored rows as they are.
        """
        routing, dropped = MaskedRouting(), sorted(set(range(self._block.num_experts)) - set(kept))
        routing.hide(self._block.name, self._router, kept)
        with _lowered(self._biases, dropped), routing:
            calls = [partial(self._module, *args, **kwargs) for args, kwargs in self._calls]
            asked = [found for call in calls if isinstance(found := asked_by(call, [self._experts]), ExpertsCall)]
        if not all(routing.hits.values()):
            raise CoterieError(
                f"{self._block.name}: its router computes in another dtype than {self._router.dtype}, so no set can be "
                "tried; give --dtype float32"
            )
        _, _, chosen, weights = zip(*asked, strict=True)
        return dense_weights(torch.cat(chosen), torch.cat(weights), self._block.num_experts)

    def check(self) -> None:
        """Raises: CoterieError where the block, run again with all experts, does not route as it did."""
        again = self._routed(tuple(range(self._block.num_experts)))
        gap = float((again - self._weights).abs().max() / self._weights.abs().max())
        if gap > ALIKE:
            raise CoterieError(
                f"{self._block.name}: run again, its block routes differently (by {gap:.1e}); use a "
                "criterion of statistics"
            )


@contextmanager
def _lowered(biases: list[torch.Tensor], dropped: list[int]) -> Iterator[None]:
    """While entered, biases that select cannot select the dropped experts."""
    before = [bias.clone() for bias in biases]
    for bias in biases:
        bias[..., dropped] = -torch.inf
    try:
        yield
    finally:
        for bias, values in zip(biases, before, strict=True):
            bias.copy_(values)


def _remember(module: torch.nn.Module, experts: torch.nn.Module, routing: list[torch.Tensor]) -> None:
    """From now on, submodules that do not route return what they returned for an equal input: a block often computes
    its shared expert before it calls the routed ones, and it is the same for every set.
    """
    for child in module.children():
        held = [*child.parameters(), *child.buffers()]
        if experts not in child.modules() and not any(one is other for one in held for other in routing):
            child.forward = remembering(child.forward)


def remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, computed once for inputs that are one tensor each, and equal."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not isinstance(args[0], torch.Tensor):
            return function(*args, **kwargs)
        for given, output in seen:
            if torch.equal(given, args[0]):
                return output.clone()  # what is remembered must not change in place
        output = function(args[0])
        if isinstance(output, torch.Tensor):
            seen.append((args[0], output.clone()))
        return output

    return call


def _holder(layer: torch.nn.Module, experts: torch.nn.Module, router: torch.Tensor) -> torch.nn.Module:
    """The smallest module of a layer that holds both its experts and its router."""
    path = next(path for path, module in layer.named_modules() if module is experts)
    while path:
        path = path.rpartition(".")[0]
        module = layer.get_submodule(path)
        if any(parameter is router for parameter in module.parameters()):
            return module
    return layer
