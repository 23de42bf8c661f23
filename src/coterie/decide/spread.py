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
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from coterie.decide.pruner import Pruner, Visitors, every_expert, read_finite
from coterie.edits.budget import zeros_of
from coterie.edits.kinds.dequantise import dequantised
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

    def describe(self, job: Mapping[str, object]) -> None:
        """Says to the units what all of them need to know: plan, method, shares, total, pattern, and so on."""
        text = json.dumps({**job, "threads": torch.get_num_threads()})  # the last bits of products depend on it
        with writing(self.engine.scratch):
            (self.engine.scratch / JOB).write_text(text)

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
        from safetensors.torch import load_file

        experts = list(every_expert(routed))
        folder = self.engine.scratch
        inputs = folder / f"inputs-{routed.block.key}.safetensors"
        _save_inputs(routed, experts, inputs)
        ends = accumulate(len(visitors.rows) for visitors in experts)
        tokens: list[TokenFile | None] = [
            TokenFile(str(inputs), end - len(rows), end, str(folder / f"outputs-{routed.block.key}-{e}.safetensors"))
            for end, (e, rows, _) in zip(ends, experts, strict=True)
        ]
        total = routed.zeros()
        states = self.engine.run(self._units(routed.block, tokens))
        for visitors, some, state in zip(experts, tokens, states, strict=True):
            self.pruner.absorb(state)
            if some and len(visitors.rows):
                routed.add_rows(total, visitors.rows, load_file(some.outputs)["0"])
                Path(some.outputs).unlink()
        inputs.unlink()
        return total

    def _units(self, block: MoE, tokens: list[TokenFile | None]) -> Iterator[Unit]:
        """One for each expert, with its tokens where data decide."""
        names = expert_weights(self.pruner.checkpoint, block)
        known = set(names)
        for e, some in enumerate(tokens):
            own = [name for name in block.experts[e].values() if name in known] if block.experts else names
            where = ((name, self.writer.where(name)) for name in own)
            places = {name: [str(path.absolute()), *span] for name, (path, *span) in where}
            arguments = {"scratch": str(self.engine.scratch), "layer": block.key, "expert": e, "places": places}
            if some is None:
                yield Unit(UNIT, arguments, DATA_FREE_DISK)
            else:
                yield Unit(UNIT, arguments | {"tokens": asdict(some)}, CALIBRATED_DISK, torch.get_num_threads())


@dataclass(frozen=True)
class TokenFile:
    """Where an expert's tokens are, numbers `first` to `last` of those in a file, and where its outputs go."""

    inputs: str
    first: int
    last: int
    outputs: str


def _save_inputs(routed: Routed, experts: list[Visitors], path: Path) -> None:
    """The file that units read their tokens from: inputs (T, D); rows and weights, expert after expert."""
    inputs = Batch(routed.x, [])
    inputs.maps = routed.maps
    chosen = [(rows, gates) for _, rows, gates in experts if len(rows)]
    rows, gates = (torch.cat([pair[i] for pair in chosen]) for i in (0, 1))
    save([inputs, Batch(rows, []), Batch(gates, [])], path, sync=False)


# --- the units' side ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
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
def worker_of(scratch: str) -> Worker:
    """Opens what a run works on. Raises: CoterieError where this node has another MODEL."""
    check_source(scratch)
    job = load_json(Path(scratch) / JOB)
    torch.set_num_threads(job["threads"])
    source, plan = Model.open(load_json(Path(scratch) / SOURCE)["path"]), read_plan({"plan": job["plan"]})
    source = dequantised(source, plan)
    view = planned(source, plan, plan_outputs(source, plan))
    zeros = zeros_of(view, {key: Fraction(share) for key, share in job["shares"].items()}, job["total"])
    pattern = tuple(job["pattern"]) if job["pattern"] else None
    pruner = Pruner(
        view.checkpoint, methods.load(job["method"]), zeros, _nowhere, getattr(torch, job["dtype"]), pattern,
        job["min_tokens"], sequential=not job["one_pass"],
    )  # fmt: skip
    return Worker(view, pruner)


def _nowhere(name: str, offset: int, data: bytes) -> None:
    raise AssertionError("a unit's pruner writes to the unit's places")


def prune_expert(
    scratch: str, layer: str, expert: int, places: dict[str, list[Any]], tokens: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """The unit: prunes one expert into its places (tensor -> file, first and last byte), and gives its counts.

    tokens: a `TokenFile`, where data decide.
    """
    worker, files = worker_of(scratch), Places(places)
    block = worker.blocks[layer]
    pruner = replace(worker.pruner, put=files.put, cold=[], num_zeros=Counter(), before=Moments(), after=Moments())
    with closing(files):
        if tokens is None:
            pruner.prune(block, expert, read_finite(pruner.checkpoint, block, expert), None)
        else:
            _on_tokens(worker, pruner, block, expert, TokenFile(**tokens))
        files.sync()
    return pruner.state()


@torch.no_grad()
def _on_tokens(worker: Worker, pruner: Pruner, block: MoE, expert: int, tokens: TokenFile) -> None:
    """Prunes an expert by its tokens, and leaves its weighted outputs."""
    from safetensors import safe_open

    with safe_open(tokens.inputs, "pt") as file:
        rows, gates = (file.get_slice(name)[tokens.first : tokens.last] for name in ("1", "2"))
        x = file.get_tensor("0")[rows]
    (module,) = moe.experts_modules(worker.stream.layers[int(block.key)])
    chosen = torch.full((len(rows), 1), expert)
    routed = Routed(block, module, x, chosen, gates[:, None])
    total = routed.zeros()
    pruner.visit(routed, Visitors(expert, torch.arange(len(rows)), gates), total)
    if len(rows):
        save([Batch(total, [])], Path(tokens.outputs), sync=False)


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
