"""Pruning experts as units of work: what `pruner.py` does in one process, one expert per unit on any node.

Called by `zeros.py` where the engine spreads work. A unit reads its expert from MODEL, writes it with its zeros into
its place in OUT.partial, and answers with counts. Where data decide, a layer's inputs lie in a file that units read
their tokens from, and each leaves its expert's outputs in a file, which the driver adds in the experts' order: sums of
floats depend on it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from coterie.decide.pruner import Pruner, every_expert, read_finite
from coterie.edits.budget import zeros_of
from coterie.edits.kurtosis import Moments
from coterie.edits.outputs import plan_outputs, planned
from coterie.edits.plan import read_plan
from coterie.engine import Engine, Unit
from coterie.errors import writing
from coterie.forward.activations import Batch, Routed, save
from coterie.forward.stream import Stream
from coterie.methods import sparsify as methods
from coterie.model import moe
from coterie.model.experts import expert_weights
from coterie.model.layer import Model, MoE
from coterie.storage.checkpoint import load_json
from coterie.storage.copying import write_at
from coterie.storage.movers import SOURCE, check_source
from coterie.storage.record import Progress
from coterie.storage.writer import Writer

JOB = "job.json"
UNIT = "coterie.decide.spread:prune_expert"
DATA_FREE_DISK, CALIBRATED_DISK = 0.5, 0.1  # of a node's resource `disk`: how much of its time a unit reads or writes


@dataclass
class Spread:
    """The driver's side: in place of the methods of `pruner`, which goes on counting."""

    engine: Engine
    writer: Writer
    pruner: Pruner

    def describe(self, job: dict[str, Any]) -> None:
        """Says to the units what all of them need to know: plan, method, shares, total, pattern, and so on."""
        job = job | {"threads": torch.get_num_threads()}  # the last bits of products depend on it
        with writing(self.engine.scratch):
            (self.engine.scratch / JOB).write_text(json.dumps(job))

    def prune_all(self, model: Model, on_progress: Progress) -> None:
        """Every expert of every block, without data."""
        blocks = model.main
        units = (unit for block in blocks for unit in self._units(block, [None] * block.num_experts))
        found = self.engine.run(units)
        for done, block in enumerate(blocks, 1):
            for _ in range(block.num_experts):
                self.pruner.absorb(next(found))
            on_progress("pruning layers", done, len(blocks))
        assert next(found, None) is None

    def walk(self, routed: Routed) -> torch.Tensor:
        """A layer's experts on its tokens; as `Pruner.walk`, to the last bit on processors of one kind."""
        experts = list(every_expert(routed))
        folder = self.engine.scratch
        inputs = folder / f"inputs-{routed.block.key}.safetensors"
        _save_inputs(routed, experts, inputs)
        ends = list(accumulate(len(rows) for _, rows, _ in experts))
        outputs = [folder / f"outputs-{routed.block.key}-{e}.safetensors" for e, _, _ in experts]
        tokens: list[dict[str, Any] | None] = [
            {"inputs": str(inputs), "first": end - len(rows), "last": end, "outputs": str(out)}
            for end, (_, rows, _), out in zip(ends, experts, outputs, strict=True)
        ]
        total = routed.zeros()
        states = self.engine.run(self._units(routed.block, tokens))
        for (_, rows, _), out, state in zip(experts, outputs, states, strict=True):
            self.pruner.absorb(state)
            if len(rows):
                routed.add_rows(total, rows, _load(out))
                out.unlink()
        inputs.unlink()
        return total

    def _units(self, block: MoE, tokens: list[dict[str, Any] | None]) -> Iterator[Unit]:
        names = expert_weights(self.pruner.checkpoint, block)
        known = set(names)
        for e, some in enumerate(tokens):
            own = [name for name in block.experts[e].values() if name in known] if block.experts else names
            places = {name: [str(path.absolute()), *span] for name, (path, *span) in self._where(own)}
            arguments = {"scratch": str(self.engine.scratch), "layer": block.key, "expert": e, "places": places}
            if some is None:
                yield Unit(UNIT, arguments, DATA_FREE_DISK)
            else:
                yield Unit(UNIT, arguments | {"tokens": some}, CALIBRATED_DISK, torch.get_num_threads())

    def _where(self, names: list[str]) -> Iterator[tuple[str, tuple[Path, int, int]]]:
        for name in names:
            yield name, self.writer.where(name)


def _save_inputs(routed: Routed, experts: list[tuple[int, torch.Tensor, torch.Tensor]], path: Path) -> None:
    """The file that units read their tokens from: inputs (T, D); rows and weights, expert after expert."""
    inputs = Batch(routed.x, [])
    inputs.maps = routed.maps
    chosen = [(rows, gates) for _, rows, gates in experts if len(rows)]
    rows, gates = (torch.cat([pair[i] for pair in chosen]) for i in (0, 1))
    save([inputs, Batch(rows, []), Batch(gates, [])], path, sync=False)


def _load(path: Path) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor("0")


# --- the units' side ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a process keeps between units of one run: the model as planned, and a pruner that has pruned nothing."""

    view: Model
    pruner: Pruner

    @cached_property
    def blocks(self) -> dict[str, MoE]:
        return {block.key: block for block in self.view.main}

    @cached_property
    def stream(self) -> Stream:
        """The model without its weights: its experts modules know activations and clamps."""
        return Stream(self.view, self.pruner.dtype)


@lru_cache(maxsize=1)
def task_of(scratch: str) -> Task:
    """Opens what a run works on. Raises: CoterieError where this node has another MODEL."""
    check_source(scratch)
    job = load_json(Path(scratch) / JOB)
    torch.set_num_threads(job["threads"])
    source, plan = Model.open(load_json(Path(scratch) / SOURCE)["path"]), read_plan({"plan": job["plan"]})
    view = planned(source, plan, plan_outputs(source, plan))
    zeros = zeros_of(view, {key: Fraction(share) for key, share in job["shares"].items()}, job["total"])
    pattern = tuple(job["pattern"]) if job["pattern"] else None
    pruner = Pruner(
        view.checkpoint, methods.load(job["method"]), zeros, _nowhere, getattr(torch, job["dtype"]), pattern,
        job["min_tokens"], sequential=not job["one_pass"],
    )  # fmt: skip
    return Task(view, pruner)


def _nowhere(name: str, offset: int, data: bytes) -> None:
    raise AssertionError("a unit's pruner writes to the unit's places")


def prune_expert(
    scratch: str, layer: str, expert: int, places: dict[str, list[Any]], tokens: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The unit: prunes one expert into its places (tensor -> file, first and last byte), and gives its counts.

    tokens: where its inputs are, and where its outputs go; without, by magnitude.
    """
    task, files = task_of(scratch), Places(places)
    block = task.blocks[layer]
    pruner = replace(task.pruner, put=files.put, cold=[], num_zeros=Counter(), before=Moments(), after=Moments())
    try:
        if tokens is None:
            pruner.prune(block, expert, read_finite(pruner.checkpoint, block, expert), None)
        else:
            _on_tokens(task, pruner, block, expert, **tokens)
        files.sync()
    finally:
        files.close()
    return pruner.state()


@torch.no_grad()
def _on_tokens(
    task: Task, pruner: Pruner, block: MoE, expert: int, inputs: str, first: int, last: int, outputs: str
) -> None:
    """Prunes an expert by its tokens, numbers `first:last` of those in the file, and leaves its weighted outputs."""
    from safetensors import safe_open

    with safe_open(inputs, "pt") as file:
        rows, gates = (file.get_slice(name)[first:last] for name in ("1", "2"))
        x = file.get_tensor("0")[rows]
    (module,) = moe.experts_modules(task.stream.layers[int(block.key)])
    chosen = torch.full((len(rows), 1), expert)
    routed = Routed(block, module, x, chosen, gates[:, None])
    total = routed.zeros()
    pruner.visit(routed, expert, torch.arange(len(rows)), gates, total)
    if len(rows):
        save([Batch(total, [])], Path(outputs), sync=False)


class Places:
    """Where a unit's tensors stand in files that exist."""

    def __init__(self, places: dict[str, list[Any]]) -> None:
        self._places = places
        self._open: dict[str, int] = {}

    def put(self, name: str, offset: int, data: bytes) -> None:
        """Writes bytes of a tensor from byte `offset` of it."""
        path, start, end = self._places[name]
        assert offset >= 0 and start + offset + len(data) <= end
        if path not in self._open:
            self._open[path] = os.open(path, os.O_WRONLY)
        write_at(self._open[path], data, start + offset)

    def sync(self) -> None:
        for descriptor in self._open.values():
            os.fsync(descriptor)

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
