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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from coterie.decide.pruner import Pruner, Visitors, every_expert, read_finite
from coterie.edits.budget import zeros_of
from coterie.edits.kinds.dequantise import dequantised
from coterie.edits.kurtosis import Moments
from coterie.edits.outputs import planned
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

Tokens = tuple[str, int, int, str]  # an expert's: those from one to another number in a file, and where its outputs go


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

        experts, key, folder = list(every_expert(routed)), routed.block.key, self.engine.scratch
        inputs, x = folder / f"inputs-{key}.safetensors", Batch(routed.x, [])
        x.maps = routed.maps
        # Rows and weights, expert after expert: each takes a part of them.
        rows, gates = map(torch.cat, zip(*((v.rows, v.gates) for v in experts if len(v.rows)), strict=True))
        save([x, Batch(rows, []), Batch(gates, [])], inputs, sync=False)
        ends = accumulate(len(visitors.rows) for visitors in experts)
        outputs = [folder / f"outputs-{key}-{visitors.expert}.safetensors" for visitors in experts]
        tokens = [
            (str(inputs), end - len(visitors.rows), end, str(path))
            for end, visitors, path in zip(ends, experts, outputs, strict=True)
        ]
        total = routed.zeros()
        states = self.engine.run(self._units(routed.block, tokens))
        for visitors, path, state in zip(experts, outputs, states, strict=True):
            self.pruner.absorb(state)
            if len(visitors.rows):
                routed.add_rows(total, visitors.rows, load_file(path)["0"])
                path.unlink()
        inputs.unlink()
        return total

    def _units(self, block: MoE, tokens: Sequence[Tokens | None]) -> Iterator[Unit]:
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
                yield Unit(UNIT, arguments | {"tokens": some}, CALIBRATED_DISK, torch.get_num_threads())


# --- the units' side ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def worker_of(scratch: str) -> tuple[Model, Pruner]:
    """What a process keeps between units of one run: the model as planned, and a pruner that has pruned nothing.

    Raises: CoterieError where this node has another MODEL.
    """
    check_source(scratch)
    job = load_json(Path(scratch) / JOB)
    torch.set_num_threads(job["threads"])
    source, plan = Model.open(load_json(Path(scratch) / SOURCE)["path"]), read_plan({"plan": job["plan"]})
    source = dequantised(source, plan)
    view = planned(source, plan)
    zeros = zeros_of(view, {key: Fraction(share) for key, share in job["shares"].items()}, job["total"])
    pattern = tuple(job["pattern"]) if job["pattern"] else None
    put: Any = None  # each unit's pruner has places of its own
    return view, Pruner(
        view.checkpoint, methods.load(job["method"]), zeros, put, getattr(torch, job["dtype"]), pattern,
        job["min_tokens"], sequential=not job["one_pass"],
    )  # fmt: skip


@lru_cache(maxsize=1)
def stream_of(scratch: str) -> Stream:
    """The model without its weights: its experts modules know activations and clamps."""
    view, pruner = worker_of(scratch)
    return Stream(view, pruner.dtype)


def prune_expert(
    scratch: str, layer: str, expert: int, places: dict[str, list[Any]], tokens: Tokens | None = None
) -> Mapping[str, Any]:
    """The unit: prunes one expert into its places (tensor -> file, first and last byte), and gives its counts."""
    view, idle = worker_of(scratch)
    block = next(block for block in view.main if block.key == layer)
    with ExitStack() as stack:
        paths = {path for path, _, _ in places.values()}
        files = {path: stack.enter_context(open(path, "rb+", buffering=0)) for path in paths}

        def put(name: str, offset: int, data: bytes) -> None:
            path, start, end = places[name]
            assert offset >= 0 and start + offset + len(data) <= end
            write_at(files[path].fileno(), data, start + offset)

        pruner = replace(idle, put=put, cold=[], num_zeros=Counter(), before=Moments(), after=Moments())
        if tokens is None:
            pruner.prune(block, expert, read_finite(pruner.checkpoint, block, expert), None)
        else:
            _on_tokens(stream_of(scratch), pruner, block, expert, tokens)
        for file in files.values():
            os.fsync(file)
    return pruner.state()


@torch.no_grad()
def _on_tokens(stream: Stream, pruner: Pruner, block: MoE, expert: int, tokens: Tokens) -> None:
    """Prunes an expert by its tokens, and leaves its weighted outputs."""
    from safetensors import safe_open

    inputs, first, last, outputs = tokens
    with safe_open(inputs, "pt") as file:
        rows, gates = (file.get_slice(name)[first:last] for name in ("1", "2"))
        x = file.get_tensor("0")[rows]
    module = moe.experts_modules(stream.layers[int(block.key)])[0]
    routed = Routed(block, module, x, torch.full((len(rows), 1), expert), gates[:, None])
    total = routed.zeros()
    pruner.visit(routed, Visitors(expert, torch.arange(len(rows)), gates), total)
    if len(rows):
        save([Batch(total, [])], Path(outputs), sync=False)
