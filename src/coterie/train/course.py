"""A recovery from beginning to end: models and samples are loaded and checked, stages run, what was learned is written.

Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from coterie.edits.folding import shared_names
from coterie.errors import CoterieError
from coterie.forward.samples import counted, read_samples
from coterie.model import causal
from coterie.model.loading import available_memory, load
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.record import Progress
from coterie.storage.writer import Writer
from coterie.train import loop as training
from coterie.train import objectives, trainable
from coterie.train.loop import Sample, State
from coterie.train.refit import refit
from coterie.train.trainable import Part
from coterie.train.trainee import STAGES, Trainee, compute_dtype, memory_bytes, peak_rate

HELD_OUT = 8  # one sample in so many is not trained on, but judges
FIT_TOKENS = 32  # for every hidden unit: what a closed form is made from, at most
STATE = "training.safetensors"  # in OUT.partial


class Course:
    """Models, samples and objectives; making one checks them, and writes nothing. `teach` does the rest."""

    def __init__(self, trainee: Trainee, save_every: int, on_progress: Progress) -> None:
        self.trainee, self.options = trainee, trainee.options
        self.save_every, self.on_progress = save_every, on_progress
        self.by_name, self.notes = read_samples(trainee.model, trainee.options.calibration)
        self.train_on, self.held_out = split([s for given in self.by_name.values() for s in given], self.notes)
        self.student, self.teacher = load_models(trainee)
        check_samples(self.by_name, self.student.get_input_embeddings().num_embeddings)
        self.parts = load_parts(trainee, self.student)
        self.learner = training.Learner([*chain.from_iterable(self.parts.values())])
        # By the name of the stage that minimises it; all are measured on held-out samples.
        self.objectives: dict[str, objectives.Objective] = {"lm": objectives.language_modelling(self.student)}
        if self.teacher is not None:
            self.objectives["distill"] = objectives.distillation(self.student, self.teacher)
        self.layers: objectives.Layers | None = None
        if "local" in STAGES[trainee.options.stage]:
            mlps = {index: mlp_path(self.parts[index][0]) for index in sorted(trainee.mlps)}
            modules = {index: self.student.get_submodule(path) for index, path in mlps.items()}
            self.objectives["local"] = self.layers = objectives.pair(self.student, self.teacher, modules)

    def teach(self, writer: Writer) -> dict[str, object]:
        """Runs all stages that are not done, and puts the weights into the written shards; what to report."""
        state = State.load(self.learner, writer.partial / STATE)
        if self.layers and not state.power:  # measured once and kept: later inputs are others
            self.layers.measure_power(self._batches(self.held_out))
            state.power = {str(index): power for index, power in self.layers.power.items()}
        elif self.layers:
            self.layers.power = {int(key): power for key, power in state.power.items()}
        for number, stage in enumerate(STAGES[self.options.stage]):
            if number >= len(state.stages):
                self._begin(stage, state)
            if "after" not in state.stages[number]:
                self._run(stage, state, writer.partial / STATE)
        for part in self.learner.parts:
            for name, offset, data in part.stored(part.masters):
                writer.put(name, offset, data)
        writer.unit({"trained": len(self.trainee.tensors)})
        found: dict[str, object] = {
            "stages": state.stages,
            "curve": state.curve,
            "dtype": str(self.student.dtype).removeprefix("torch."),
            "data": counted(self.by_name),
            "held_out": {"samples": len(self.held_out), "tokens": sum(map(len, self.held_out))},
        }
        if self.teacher is not None:
            objective = objectives.language_modelling(self.teacher)
            found["teacher_lm"] = training.mean(objective, self._batches(self.held_out))
        return found

    def _begin(self, stage: str, state: State) -> None:
        """Measures, and does what comes before the first step."""
        before = state.stages[-1]["after"] if state.stages else self._measured()
        state.stages.append(
            {"stage": stage, "steps": self.options.steps, "lr": peak_rate(self.trainee), "before": before}
        )
        state.step, state.curve[stage] = 0, []
        self.learner.start()
        if stage == "local":
            state.stages[-1]["closed_form"] = self._refit()

    def _run(self, stage: str, state: State, place: Path) -> None:
        """The stage's steps that are left."""
        options, peak = self.options, peak_rate(self.trainee)

        def groups(step: int) -> list[torch.Tensor]:
            size = options.batch_size * options.accumulate
            chosen = training.taken(len(self.train_on), size, step, options.seed)
            return [*self._batches([self.train_on[i] for i in chosen])]

        schedule = training.Schedule(
            options.steps, lambda step: training.learning_rate(step, options.steps, peak), place, self.save_every
        )
        training.run(
            self.learner, self.objectives[stage], groups, schedule, state, stage,
            on_step=lambda step: self.on_progress(f"recovering ({stage})", step, options.steps),
        )  # fmt: skip
        state.stages[-1]["after"] = self._measured()
        state.save(self.learner, place)

    def _refit(self) -> dict[str, dict[str, float | None]]:
        """The closed form of each layer in order, so that each sees those before it refitted: ridges and errors."""
        assert self.layers
        found = {}
        for done, index in enumerate(self.layers.students):
            self.on_progress("recovering (closed form)", done, len(self.layers.students))
            part = self.parts[index][0]
            path = down_of(part)
            name = path.removeprefix(f"{mlp_path(part)}.")
            chosen = spread(self.train_on, FIT_TOKENS * part.masters[path].shape[1])
            fitted, judged = (self.layers.sums(index, name, self._batches(s)) for s in (chosen, self.held_out))
            down, ridge = refit(fitted, judged, part.masters[path])
            before, after = (judged.error(weights) for weights in (part.masters[path], down))
            found[str(index)] = {"ridge": ridge, "before": before, "after": after}
            part.masters[path].copy_(down)
            part.round()
        return found

    def _batches(self, samples: list[Sample]) -> Iterator[torch.Tensor]:
        return training.batches(samples, self.options.batch_size, self.student.device)

    def _measured(self) -> dict[str, float]:
        """The mean of every objective on the held-out samples."""
        return {name: training.mean(f, self._batches(self.held_out)) for name, f in self.objectives.items()}


# --- samples ---------------------------------------------------------------------------------------------------


def split(samples: list[Sample], notes: list[str]) -> tuple[list[Sample], list[Sample]]:
    """(samples to train on, samples to judge by): every 8th judges."""
    held_out = samples[HELD_OUT - 1 :: HELD_OUT]
    if not held_out:
        notes.append(f"{len(samples)} samples are too few to hold some out: losses are of those trained on")
        return samples, samples
    return [s for i, s in enumerate(samples) if i % HELD_OUT != HELD_OUT - 1], held_out


def spread(samples: list[Sample], most: int) -> list[Sample]:
    """So many samples, evenly spread over all, that they have about `most` tokens at most; one at least."""
    share = most / sum(map(len, samples))
    count = max(1, min(len(samples), int(share * len(samples))))
    return [samples[i * len(samples) // count] for i in range(count)]


def check_samples(by_name: dict[str, list[Sample]], vocabulary: int) -> None:
    """Raises: CoterieError for token ids that the model does not know, and samples without a next token."""
    for name, given in by_name.items():
        for number, sample in enumerate(given):
            if max(sample) >= vocabulary:
                fault = f"token {max(sample)} is not among the model's {vocabulary}; is it the right tokenizer?"
            elif len(sample) < 2:
                fault = "found one token; expected two at least"
            else:
                continue
            raise CoterieError(f"data {name!r}: sample {number}: {fault}")


# --- models ----------------------------------------------------------------------------------------------------


def load_models(trainee: Trainee) -> tuple[Any, Any]:
    """(student, teacher or None), frozen. Raises: CoterieError where memory is short, or one does not load."""
    needed, available = memory_bytes(trainee), None if torch.cuda.is_available() else available_memory()
    if available is not None and needed > available:
        raise CoterieError(
            f"training takes about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available; use a "
            "smaller --batch-size, --dtype bfloat16, or a larger machine"
        )
    dtype = compute_dtype(trainee)

    def frozen(checkpoint: Checkpoint) -> Any:
        return causal.without_router_loss(load(checkpoint.path, dtype=dtype).requires_grad_(False))

    return frozen(trainee.model.checkpoint), frozen(trainee.teacher) if trainee.teacher else None


def load_parts(trainee: Trainee, student: Any) -> dict[int, list[Part]]:
    """What is trained of each layer."""
    checkpoint = trainee.model.checkpoint
    parts = {index: [trainable.mlp(student, checkpoint, names)] for index, names in trainee.mlps.items()}
    for index, block in trainee.blocks.items():
        parts[index] = [trainable.routed(student, checkpoint, block)]
        if shared := shared_names(block):
            parts[index].append(trainable.mlp(student, checkpoint, shared[0]))
    return parts


def down_of(mlp: Part) -> str:
    """The model's name for an MLP's down projection, the last of its three."""
    return [*mlp.parameters][-1]


def mlp_path(mlp: Part) -> str:
    """The module that holds gate, up and down: `model.layers.3.mlp` of `model.layers.3.mlp.down_proj.weight`."""
    return down_of(mlp).rpartition(".")[0].rpartition(".")[0]
