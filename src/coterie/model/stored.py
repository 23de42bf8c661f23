"""How the matrices of a checkpoint are stored, outside the experts as well; and whether they can be read at all.

The experts' own are `experts.py`'s. What cannot be calculated with is refused here, once for a whole checkpoint; and a
checkpoint is opened here as the one in plain floats that it stands for, where its weights are to be changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from coterie.codecs import Coded, Place, codecs
from coterie.codecs.open import codec_of, decoded, matrices_at
from coterie.errors import CoterieError
from coterie.model.experts import QUANTISATION, expert_storage, quantisation
from coterie.model.family import lookup
from coterie.model.layer import LAYER, Model, MoE, expert_names, find_blocks, mtp_names
from coterie.storage.checkpoint import FLOATS, Checkpoint
from coterie.storage.planned import root, view

UNPACKED = (*FLOATS, "I64", "BOOL")  # what tables and flags are stored as, and nothing is packed in
ADVICE = "prune, drop and apply move such weights as they are; for anything else dequantise the checkpoint first"


def quantised(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Coded]:
    """The matrices of linear layers among these tensors that are not plain floats, by the name of a plain one.

    `parts` are all tensors that stand there for the weight, scales of activations included.
    Raises: CoterieError for a layer whose weight is packed in a way that no codec reads.
    """
    settings = quantisation(checkpoint)
    found = {}
    for module, beside in _linears(names).items():
        stem, weight = module.rpartition(".")[2], checkpoint.tensors.get(f"{module}.weight")
        if weight and weight.dtype in FLOATS and not settings:
            continue
        local = {f"{stem}.{key}": name for key, name in beside.items()}
        place = Place(f"{module}.weight", f"{stem}.weight", beside=local, weights=(stem,), settings=settings)
        matrix = matrices_at(checkpoint, place)
        if matrix is None:
            known = ", ".join(sorted(beside))
            raise CoterieError(f"{module} ({known}): no weight in a form that we know; dequantise the checkpoint first")
        if not (matrix.verbatim and matrix.dtype in FLOATS):
            parts = tuple(name for key, name in beside.items() if key != "bias")
            found[place.name] = replace(matrix, name=place.name, parts=parts)
    return found


def _linears(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Module -> its tensors (name below it -> name), of the modules that hold a weight, however it is stored."""
    marks, known = {codec.mark for codec in codecs() if not codec.method}, list(names)
    found: dict[str, dict[str, str]] = {}
    for name in known:
        for mark in marks:
            if name.endswith(mark):
                found[name.removesuffix(mark)] = {}
    for name in known:
        module = name.rpartition(".")[0]
        while module and module not in found:
            module = module.rpartition(".")[0]
        if module:
            found[module][name.removeprefix(f"{module}.")] = name
    return found


def in_experts(model: Model, blocks: Iterable[MoE]) -> dict[str, Coded]:
    """The matrices of these blocks' experts that are not plain floats, likewise; a fused tensor's are one."""
    found, tensors, settings = {}, model.checkpoint.tensors, quantisation(model.checkpoint)
    for block in blocks:
        for e in range(max(1, len(block.experts))):
            names = list(block.experts[e].values()) if block.experts else block.fused
            if not settings and all(tensors[name].dtype in FLOATS for name in names):
                continue  # there are models of 70,000 matrices, and every command asks this of them
            for matrix in expert_storage(model.checkpoint, block, e):
                if not (matrix.verbatim and matrix.dtype in FLOATS):
                    stem = matrix.name.removesuffix(".weight")
                    parts = (n for n in names if n.startswith((stem + ".", stem + "_")) or n == stem)
                    own = tuple(n for n in parts if not n.endswith((".bias", "_bias")))
                    found[matrix.name] = replace(matrix, parts=own, rows=_all_rows(matrix, block))
    return found


def _all_rows(matrix: Coded, block: MoE) -> Callable[[int], np.ndarray]:
    """Of a tensor that has its experts' rows one below the other, all of them at once."""
    if block.experts or len(matrix.shape) == 3:
        return matrix.rows
    return lambda _: np.concatenate([matrix.rows(e) for e in range(block.num_experts)])


def dense(model: Model) -> Model:
    """The model with its quantised matrices as BF16 under their plain names, to be read and written like any other.

    Raises: CoterieError where some cannot be read.
    """
    checkpoint = model.checkpoint
    check_readable(model)
    found = in_experts(model, model.moe) | quantised(checkpoint, outside(model, prediction=True))
    outputs = decoded(checkpoint, {name: replace(matrix, dtype="BF16") for name, matrix in found.items()})
    config = copy.deepcopy(checkpoint.config)
    for key, holder, _ in list(lookup(config, (QUANTISATION,))):
        del holder[key]
    return find_blocks(view(checkpoint, outputs, config), model.family)


def in_floats(model: Model) -> Model:
    """The model itself where nothing is quantised, else as `dense` has it."""
    return dense(model) if quantisation(model.checkpoint) else model


def is_dense_view(checkpoint: Checkpoint) -> bool:
    """Whether it is what `dense` made of a checkpoint on the disk."""
    there = root(checkpoint)
    return codec_of(there) is None and bool(quantisation(there)) and not quantisation(checkpoint)


def outside(model: Model, *, prediction: bool = False) -> list[str]:
    """The tensors that belong to no routed expert, nor, unless it is asked for, to multi-token prediction."""
    inside = {name for block in model.moe for name in expert_names(block)}
    inside |= set() if prediction else set(mtp_names(model))
    return [name for name in model.checkpoint.tensors if name not in inside]


def check_readable(model: Model) -> None:
    """Looks at headers alone, of experts and of everything beside them.

    Raises: CoterieError where matrices are stored in a way that cannot be calculated with, and says where they are.
    """
    inside = next(_faults(model), None)
    beside = _fault_outside(model)
    if inside or beside:
        where = " and ".join(["experts"] * bool(inside) + ["layers outside the experts"] * bool(beside))
        settings = quantisation(model.checkpoint)
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise CoterieError(
            f"{model.checkpoint.path}: {where} are stored in a way that we cannot read (quant_method {method!r:.40}; "
            f"{'; '.join(filter(None, (inside, beside)))}); {ADVICE}"
        )


def _faults(model: Model) -> Iterator[str]:
    """What is wrong with experts, one of every kind of each block."""
    for block in (block for block in model.moe if not block.mtp):
        for e in _kinds(block):
            try:
                for matrix in expert_storage(model.checkpoint, block, e):
                    matrix.check()
            except CoterieError as error:
                yield _reason(error)


def _kinds(block: MoE) -> Iterable[int]:
    """An expert of every kind, by the tensors it has."""
    return {frozenset(expert): e for e, expert in reversed(list(enumerate(block.experts)))}.values() or (0,)


def _fault_outside(model: Model) -> str | None:
    try:
        found = quantised(model.checkpoint, outside(model))
        for matrix in found.values():
            matrix.check()
    except CoterieError as error:
        return _reason(error)
    known = {name for matrix in found.values() for name in matrix.parts}
    for tensor in (model.checkpoint.tensors[name] for name in outside(model) if name not in known):
        if tensor.dtype not in UNPACKED and LAYER.fullmatch(tensor.name):
            return f"tensor {tensor.name!r}: found {tensor.dtype}; expected weights in a form that we know"
    return None


def _reason(error: CoterieError) -> str:
    return str(error).removesuffix("; dequantise the checkpoint first")
