"""What a config counts is held against what is stored, by headers alone: layers, experts a token, sizes, dense layers.

A count that is not so is no model: stock transformers would make other tensors than there are, and every decision here
would rest on it. What a config does not say is not asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from coterie.errors import CoterieError
from coterie.model.family import NUM_LAYERS, Config, Family, lookup
from coterie.storage.checkpoint import FLOATS, Checkpoint

HIDDEN = ("hidden_size", "d_model", "n_embd")
VOCABULARY = ("vocab_size",)
WIDTH = ("moe_intermediate_size",)  # of an expert; where it has another name, that is also of other matrices
EMBEDDINGS = ("embed_tokens", "word_embeddings", "embeddings", "wte")
OF_PREDICTION = ("eh_proj.", "enorm.", "hnorm.", "shared_head.", "embed_tokens.")  # what only such layers have


def check_counts(
    checkpoint: Checkpoint, family: Family, stack: str, *, sparse: Sequence[int], rows: int, expert: Sequence[str]
) -> None:
    """Raises: CoterieError for a count that is not what is stored.

    stack: what stands before the number of a decoder layer. sparse: the layers with experts. rows: experts that the
    smallest router chooses from. expert: the tensors of an expert, or of all in one.
    """
    _check_layers(checkpoint, family, stack)
    _check_dense(checkpoint.config, family, sparse)
    values = [v for v in _said(checkpoint.config, family.top_k) if v > rows]
    if values:
        raise CoterieError(f"config.json: {values[0]} experts a token ({', '.join(family.top_k)}); routers have {rows}")
    root = stack.rpartition(".")[0]
    for name in (f"{root}.{kind}.weight".lstrip(".") for kind in EMBEDDINGS):
        _check_axis(checkpoint, name, 0, VOCABULARY)
        _check_axis(checkpoint, name, 1, HIDDEN)
    for name in expert:
        _check_width(checkpoint, name)


def _check_layers(checkpoint: Checkpoint, family: Family, stack: str) -> None:
    """All layers from the first to the last are there, and after them such of multi-token prediction at most."""
    counted = _said(checkpoint.config, NUM_LAYERS)[:1]
    if not counted:
        return
    parts, below = dict[int, list[str]](), re.compile(re.escape(stack) + r"\.([0-9]{1,6})\.")
    for name in checkpoint.tensors:
        if match := below.match(name):
            parts.setdefault(int(match[1]), []).append(name[match.end() :])
    where = f"{checkpoint.path}: config.json counts {counted[0]:,} layers"
    missing = next(i for i in range(len(parts) + 1) if i not in parts)
    if missing < counted[0]:
        raise CoterieError(
            f"{where}, but {stack}.{missing} is not stored (of {len(parts):,} that are the last is {max(parts)}); "
            "mend the count, or download the missing files"
        )
    beyond = [i for i in parts if i >= counted[0]]
    predicting = [i for i in beyond if any(rest.startswith(OF_PREDICTION) for rest in parts[i])]
    if len(beyond) > max([len(predicting), *_said(checkpoint.config, family.mtp_count)]):
        raise CoterieError(
            f"{where}, but {stack}.{max(beyond)} is stored, and none of {', '.join(family.mtp_count)} counts what is "
            "beyond; mend the count"
        )


def _check_dense(config: Config, family: Family, sparse: Sequence[int]) -> None:
    """No layer with experts is one that the config says is dense."""
    for key, _, value in lookup(config, (family.dense.key,)) if family.dense else ():
        wrong = [i for i in sparse if family.dense and _is_dense(family.dense.kind, value, i)]
        if wrong:
            raise CoterieError(f"config.json: {key} is {value!r:.80}, so layer {wrong[0]} is dense, but it has experts")


def _is_dense(kind: str, value: object, index: int) -> bool:
    if not isinstance(value, list):
        return kind == "prefix" and type(value) is int and index < value
    if kind == "types":
        return value[index : index + 1] == ["dense"]
    return (kind == "ids" and index in value) or (kind == "others" and index not in value)


def _check_axis(checkpoint: Checkpoint, name: str, axis: int, keys: tuple[str, ...]) -> None:
    tensor, said = checkpoint.tensors.get(name), _said(checkpoint.config, keys)
    if tensor and tensor.dtype in FLOATS and len(tensor.shape) == 2 and said and tensor.shape[axis] not in said:
        raise CoterieError(
            f"config.json: {keys[0]} is {said[0]:,}, but {name!r} has shape {list(tensor.shape)}; mend the config"
        )


def _check_width(checkpoint: Checkpoint, name: str) -> None:
    """An expert's matrix has its width, or gate's and up's together, along an axis."""
    tensor, said = checkpoint.tensors[name], _said(checkpoint.config, WIDTH)
    whole = tensor.dtype in FLOATS or tensor.dtype.startswith("F8")
    if whole and len(tensor.shape) > 1 and said and not {*said, *(2 * s for s in said)} & set(tensor.shape[-2:]):
        raise CoterieError(f"config.json: {WIDTH[0]} is {said[0]:,}, but {name!r} has shape {list(tensor.shape)}")


def _said(config: Config, keys: tuple[str, ...]) -> list[int]:
    """Every whole number that stands under one of the keys."""
    return [value for _, _, value in lookup(config, keys) if type(value) is int]
