"""The training loop: which samples each step takes, float32 masters, AdamW, and a state that a killed run resumes from.

Everything that a step does follows from its number and the state, so that a resumed run ends with the same bytes.
`recover` runs it stage by stage, and the reference model's recipe once.
Importing this module imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
import torch

from coterie.errors import CoterieError
from coterie.storage.files import write_whole
from coterie.train.objectives import Objective
from coterie.train.trainable import Part

WARMUP = 0.05  # share of the steps
BETAS, EPSILON, CLIP = (0.9, 0.999), 1e-8, 1.0
MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's AdamW names them
POINTS = 1000  # of a curve at most

Sample = tuple[int, ...]
Optimizer = Callable[[list[torch.Tensor]], torch.optim.AdamW]


# --- samples -----------------------------------------------------------------------------------------------------


def batches(samples: list[Sample], size: int, device: Any = None) -> Iterator[torch.Tensor]:
    """All samples as (B, T) ids, B <= size: those of one length together, so that nothing is padded."""
    alike: dict[int, list[Sample]] = {}
    for sample in samples:
        alike.setdefault(len(sample), []).append(sample)
    for group in alike.values():
        for start in range(0, len(group), size):
            yield torch.tensor(group[start : start + size], device=device)


def taken(count: int, size: int, step: int, seed: int) -> list[int]:
    """The samples of a step: all are taken once, in random order, before any is taken again."""
    positions = range(step * size, (step + 1) * size)
    return [int(_order(count, position // count, seed)[position % count]) for position in positions]


@lru_cache(maxsize=2)
def _order(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


# --- steps -------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of the steps, then linear decay to 0, which a step after the last would have.

    Source: the published program of CD-MoE decays linearly. Deviates: it asks for a warm-up, but in a setting that its
    scheduler does not read.
    """
    warmup = max(1, round(WARMUP * steps))
    return peak * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))


def plain_adam(masters: list[torch.Tensor]) -> torch.optim.AdamW:
    """No weight decay: weights that are fine as they are would shrink."""
    return torch.optim.AdamW(masters, betas=BETAS, eps=EPSILON, weight_decay=0.0)


class Learner:
    """AdamW on float32 masters of parts; the model computes in its own dtype. Gradients are clipped to norm 1."""

    def __init__(self, parts: list[Part], optimizer: Optimizer = plain_adam) -> None:
        """optimizer: makes an AdamW of masters."""
        self.parts, self.optimizer = parts, optimizer
        self.masters = {name: master for part in parts for name, master in part.masters.items()}
        self.parameters = {name: p.requires_grad_() for part in parts for name, p in part.parameters.items()}
        self.norm = 0.0  # of the last step's gradient, before it was clipped
        self.start()

    def start(self) -> None:
        """Forgets all moments."""
        self.adam = self.optimizer([*self.masters.values()])

    def step(self, objective: Objective, groups: list[torch.Tensor], rate: float) -> float:
        """One update from the mean over all tokens of the groups; returns that mean."""
        total, count = 0.0, 0
        for ids in groups:
            loss, number = objective(ids)
            loss.backward()
            total, count = total + loss.item(), count + number
            for name, parameter in self.parameters.items():  # added to their masters' gradients, in float32
                master = self.masters[name]
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                if parameter.grad is not None:
                    master.grad += parameter.grad
                parameter.grad = None
        for master in self.masters.values():
            assert master.grad is not None
            master.grad /= count
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), CLIP)
        if not torch.isfinite(norm) or not np.isfinite(total):
            raise CoterieError(f"the loss became {total / count}; use a smaller --lr, or --dtype float32")
        self.norm = norm.item()
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        self.round()
        return total / count

    def round(self) -> None:
        for part in self.parts:
            part.round()

    def moments(self) -> dict[str, torch.Tensor]:
        """What AdamW remembers; nothing before its first step."""
        known = {name: self.adam.state[master] for name, master in self.masters.items() if self.adam.state[master]}
        return {f"{kind}/{name}": state[kind] for name, state in known.items() for kind in MOMENTS}

    def restore(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Masters and moments as they were saved after `step` steps of a stage."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"master/{name}"])
            if f"{MOMENTS[0]}/{name}" in tensors:
                kept = {kind: tensors[f"{kind}/{name}"].to(master.device) for kind in MOMENTS}
                self.adam.state[master] = {"step": torch.tensor(float(step)), **kept}
        self.round()


# --- the state ---------------------------------------------------------------------------------------------------


class Stage(TypedDict, total=False):
    """What the report says of a stage: what was asked, and every objective's mean on held-out samples."""

    stage: Required[str]
    steps: int
    lr: float
    before: Required[dict[str, float]]
    closed_form: dict[str, dict[str, float | None]]  # by layer: the ridge, and errors before and after
    after: dict[str, float]  # once it is through


@dataclass
class State:
    """How far training got: what the report says of each stage begun, their curves, and steps done of the last one."""

    stages: list[Stage] = field(default_factory=list)
    curve: dict[str, list[list[float]]] = field(default_factory=dict)
    step: int = 0
    power: dict[str, float] = field(default_factory=dict)  # of `objectives.Layers`

    def save(self, learner: Learner, path: Path) -> None:
        """One file, absent or complete: masters, moments, and the rest of the state as JSON."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {f"master/{name}": master for name, master in learner.masters.items()} | learner.moments()

        def write(partial: Path) -> None:
            try:
                save_file(tensors, partial, metadata={"state": json.dumps(vars(self))})
            except SafetensorError as error:  # what the library makes of an OSError
                raise OSError(str(error)) from error

        write_whole(path, write, hint="; free some space and add --resume")

    @classmethod
    def load(cls, learner: Learner, path: Path) -> State:
        """The state as saved, its tensors put into the learner; a fresh one where nothing was saved.

        Raises: CoterieError for a damaged file.
        """
        if not path.is_file():
            return cls()
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                state = cls(**json.loads(file.metadata()["state"]))
                learner.restore({name: file.get_tensor(name) for name in file.keys()}, state.step)  # noqa: SIM118
        except Exception as error:  # a damaged file can provoke anything in there
            raise CoterieError(f"{path}: damaged ({error!s:.200}); start anew with --overwrite") from error
        return state


def mean(objective: Objective, groups: Iterator[torch.Tensor]) -> float:
    """An objective's mean over all tokens, without learning."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in groups:
            loss, number = objective(ids)
            total, count = total + loss.item(), count + number
    return total / count


@dataclass(frozen=True)
class Schedule:
    """How many steps, how fast, and where their state is saved."""

    steps: int
    rate: Callable[[int], float]  # learning rate of each step's number
    place: Path
    save_every: int


def run(
    learner: Learner,
    objective: Objective,
    groups: Callable[[int], list[torch.Tensor]],
    schedule: Schedule,
    state: State,
    stage: str,
    on_step: Callable[[int], None],
) -> None:
    """The steps of a stage that are not done yet, each noted in its curve; the state is not saved after the last.

    groups: the ids of each step's number. on_step: is told how many steps are done.
    """
    steps, curve = schedule.steps, state.curve[stage]
    every = -(-steps // POINTS) if steps else 1
    while state.step < steps:
        step = state.step
        loss = learner.step(objective, groups(step), schedule.rate(step))
        if step % every == 0 or step + 1 == steps:
            curve.append([step, loss])
        state.step += 1
        if state.step % schedule.save_every == 0 and state.step < steps:
            state.save(learner, schedule.place)
        on_step(state.step)
