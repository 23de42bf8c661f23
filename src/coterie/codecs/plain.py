"""Matrices as they are: floats in a tensor of their own, or one after the other in a fused one."""

from __future__ import annotations

from functools import partial

import numpy as np

from coterie.codecs import Codec, Coded, Place
from coterie.errors import CoterieError
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.shards import Made, Output


def read(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """A tensor of any dtype that has numbers in it."""
    tensor = checkpoint.tensors.get(place.name)
    if tensor is None:
        return None

    check = partial(check_shape, place, tensor.shape)

    def rows(e: int) -> np.ndarray:
        check()
        return share(checkpoint, place, place.name, e, len(tensor.shape) == 3).astype(np.float32, copy=False)

    return Coded(
        tensor.name, tensor.dtype, tensor.shape, (tensor.name,), tensor.num_bytes, rows, verbatim=True, check=check
    )


def check_shape(place: Place, shape: tuple[int, ...]) -> None:
    """Raises: CoterieError for a fused tensor that is neither (E, rows, columns) nor (E * rows, columns)."""
    if place.num_matrices and len(shape) != 2 and not (len(shape) == 3 and shape[0] == place.num_matrices):
        raise CoterieError(f"tensor {place.name!r}: shape {list(shape)}; expected one matrix per expert")


def share(checkpoint: Checkpoint, place: Place, name: str, e: int, stacked: bool) -> np.ndarray:
    """What matrix e has of a tensor, decoded: all of one of its own, or that serves all matrices; of a fused one its
    rows, or its entry where the weights are stacked (E, rows, columns)."""
    shape = checkpoint.tensors[name].shape
    if not place.num_matrices or not shape or (name != place.name and shape[0] == 1 < place.num_matrices):
        return checkpoint.read(name)
    rows = shape[0] // place.num_matrices
    if stacked and rows != 1:
        raise CoterieError(f"tensor {name!r}: shape {list(shape)}; expected one entry for each expert")
    values = checkpoint.read_rows(name, e * rows, (e + 1) * rows)
    return values[0] if stacked else values


def encode(name: str, dtype: str, shape: tuple[int, ...], raw: bytes) -> list[Output]:
    """The tensor itself."""
    return [Output(name, dtype, shape, (Made(len(raw), lambda: raw),))]


CODEC = Codec(parts=("",), read=read, encode=encode)
