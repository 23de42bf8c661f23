"""What recovery minimises: language modelling loss, divergence from a teacher's logits, error of single layers.

Each objective is called with token ids (B, T) and answers with (a sum over tokens, how many tokens): whoever sums over
several batches divides once, so that the mean does not depend on how samples were put together.
Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call

from coterie.errors import CoterieError
from coterie.model import moe
from coterie.model.loading import decoder_layers
from coterie.model.standin import block_of
from coterie.train.refit import Sums

Objective = Callable[[torch.Tensor], tuple[torch.Tensor, int]]
Call = tuple[tuple[Any, ...], Mapping[str, Any]]  # what a module is called with


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, vocabulary), float32."""
    return model(input_ids=ids, use_cache=False).logits.float()


def language_modelling(model: Any) -> Objective:
    """-sum_t log p(x_t | x_<t), in nats, over all tokens but each sample's first."""

    def objective(ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        found = logits(model, ids)[:, :-1].flatten(0, 1)
        return F.cross_entropy(found, ids[:, 1:].flatten(), reduction="sum"), ids[:, 1:].numel()

    return objective


def distillation(model: Any, teacher: Any) -> Objective:
    """sum_t KL(teacher || model) between next-token distributions, in nats, at temperature 1.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
    """

    def objective(ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        with torch.no_grad():
            wanted = logits(teacher, ids).log_softmax(-1)
        found = logits(model, ids).log_softmax(-1)
        return F.kl_div(found, wanted, reduction="sum", log_target=True), ids.numel()

    return objective


@dataclass
class Layers:
    """Dense MLPs of a model, each beside the teacher's MoE block in the same layer.

    Both get the inputs that the model itself gives its MLP: what the layers before it, condensed and perhaps recovered,
    let through. That is what the MLP will see, and the teacher's block is run on it alone, without its other layers.
    """

    model: Any
    students: dict[int, torch.nn.Module]
    teachers: dict[int, torch.nn.Module]
    power: dict[int, float] = field(default_factory=dict)  # mean of |y|^2 over tokens, by layer

    def calls(self, ids: torch.Tensor) -> dict[int, Call]:
        """What each MLP is called with in a forward of the model."""
        found: dict[int, Call] = {}
        with torch.no_grad(), ExitStack() as hooks:
            for index, module in self.students.items():
                note = partial(_note, found, index)
                hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
            self.model.get_decoder()(input_ids=ids, use_cache=False)
        return found

    def wanted(self, index: int, call: Call) -> torch.Tensor:
        """The teacher's output (B, T, D) for a call."""
        with torch.no_grad():
            return _output(self.teachers[index](*call[0], **call[1]))

    def measure_power(self, batches: Iterable[torch.Tensor]) -> None:
        """Sets `power`, by which layers of different scale count alike."""
        sums, num_tokens = dict.fromkeys(self.students, 0.0), 0
        for ids in batches:
            num_tokens += ids.numel()
            for index, call in self.calls(ids).items():
                sums[index] += float(self.wanted(index, call).double().square().sum())
        self.power = {index: total / num_tokens for index, total in sums.items()}

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        """sum_t mean_l |f_l(x_t) - y_l(x_t)|^2 / power_l: each layer's own error, blind to what follows from it."""
        total = torch.zeros((), device=ids.device)
        for index, call in self.calls(ids).items():
            found = _output(self.students[index](*call[0], **call[1]))
            missing = (found.float() - self.wanted(index, call).float()).square().sum()
            total = total + missing / (self.power[index] or 1.0)
        return total / len(self.students), ids.numel()

    def sums(self, index: int, down: str, batches: Iterable[torch.Tensor]) -> Sums:
        """What a refit of one layer's down projection (its parameter's name in the MLP) needs."""
        student = self.students[index]
        weight = student.get_parameter(down)
        hidden, width = weight.shape
        # With the identity in its place, an MLP of any make gives what enters its down projection.
        identity = {down: torch.eye(width, dtype=weight.dtype, device=weight.device)}
        gram, cross = (torch.zeros(width, n, dtype=torch.float64, device=weight.device) for n in (width, hidden))
        sums = Sums(gram, cross)
        for ids in batches:
            call = self.calls(ids)[index]
            with torch.no_grad():
                inner = _output(functional_call(student, identity, call[0], dict(call[1])))
            sums.add(inner.flatten(0, -2), self.wanted(index, call).flatten(0, -2))
        return sums


def pair(model: Any, teacher: Any, students: dict[int, torch.nn.Module]) -> Layers:
    """The dense MLPs beside their teachers. Raises: CoterieError where the teacher has nothing in the same place."""
    paths = {id(module): path for path, module in model.named_modules()}
    layers, teachers = decoder_layers(teacher.get_decoder(), "the teacher"), {}
    for index, student in students.items():
        if moe.experts_modules(layers[index]):
            parent, attribute, _ = block_of(layers[index], f"the teacher's layer {index}")
            teachers[index] = getattr(parent, attribute)
            continue
        try:
            teachers[index] = teacher.get_submodule(paths[id(student)])
        except AttributeError as error:
            raise CoterieError(f"the teacher's layer {index} has neither experts nor an MLP of that name") from error
    return Layers(model, students, teachers)


def _note(found: dict[int, Call], index: int, _: torch.nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
    found[index] = args, kwargs


def _output(found: Any) -> torch.Tensor:
    """A block's hidden states, where it gives its router's logits as well."""
    return found[0] if isinstance(found, tuple) else found
