"""Picks the codec: once for a checkpoint whose config names one, when it is opened; else tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial

from coterie.codecs import Codec, Coded, Place, codecs, pack_quantized
from coterie.codecs.bits import DAMAGED, is_named
from coterie.errors import CoterieError
from coterie.storage.checkpoint import BITS, Checkpoint
from coterie.storage.planned import Planned, Shards, resolved, view
from coterie.storage.shards import Made, Output, whole


def matrices_at(checkpoint: Checkpoint, place: Place) -> Coded | None:
    """The matrices of a tensor, by the codec that they are stored in; None where no tensor is like that."""
    own = (codec for codec in codecs() if not codec.method)  # the others are decoded when the checkpoint is opened
    return next((found for codec in own if (found := codec.read(checkpoint, place))), None)


def codec_of(checkpoint: Checkpoint) -> Codec | None:
    """The codec that config.json names, under which tensors stand for others; None where they stand for themselves. Of
    several of one name, whose parts tell which tensor is stored which way, the first."""
    settings = checkpoint.config.get("quantization_config")
    return next((codec for codec in codecs() if codec.method and is_named(settings, codec.method)), None)


def opened(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself, or, where its config names a codec, the dense one that it stands for.

    Tensors stand in its order, each decoded one where its first part does; matrices are decoded when they are read,
    and the last one is kept, because readers come piece by piece.
    Raises: CoterieError for parts that are missing, or do not fit each other.
    """
    named = codec_of(checkpoint)
    if named is None:
        return checkpoint
    coded, alike = dict[str, Coded](), [codec for codec in codecs() if codec.method == named.method]
    for codec in alike:
        codec.check(checkpoint)
        first = codec.parts[0]
        stems = [name.removesuffix(first) for name in checkpoint.tensors if name.endswith(first)]
        coded |= {stem: matrices for stem in stems if (matrices := codec.read(checkpoint, Place(stem)))}
    _check_claimed(checkpoint, alike, coded)
    return _stood_for(checkpoint, coded)


def _stood_for(checkpoint: Checkpoint, coded: Mapping[str, Coded]) -> Checkpoint:
    """The dense checkpoint that one with these matrices stands for."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return view(checkpoint, decoded(checkpoint, coded), config, coded=coded)


def opened_packed(checkpoint: Checkpoint) -> Checkpoint | None:
    """The dense checkpoint that this one stands for, all of whose coded matrices can be multiplied as they are stored:
    `coded` has them. None where some cannot, or nothing is coded."""
    if codec_of(checkpoint):
        return opened(checkpoint)
    settings, last = checkpoint.config.get("quantization_config"), pack_quantized.PARTS[0]
    coded = {
        stem: found
        for stem in (name.removesuffix(last) for name in checkpoint.tensors if name.endswith(last))
        if (found := pack_quantized.read(checkpoint, Place(stem, settings=settings)))
    }
    packed = [stem for stem, found in coded.items() if found.packed]
    return _stood_for(checkpoint, coded) if packed and len(packed) == len(coded) else None


def _check_claimed(checkpoint: Checkpoint, alike: Iterable[Codec], coded: Mapping[str, Coded]) -> None:
    """Raises: CoterieError for a tensor that is named like a part, and is none of any matrix."""
    claimed = {name for matrices in coded.values() for name in matrices.parts}
    parts = {part for codec in alike for part in codec.parts}
    if left := next((n for n in checkpoint.tensors if n not in claimed and n.endswith(tuple(parts))), None):
        marks = " or ".join(codec.parts[0] for codec in alike)
        raise CoterieError(f"{checkpoint.path}: tensor {left!r} has no {marks} beside it; {DAMAGED}")


def decoded(checkpoint: Checkpoint, coded: Mapping[str, Coded]) -> Shards:
    """The checkpoint's tensors, with each of these matrices decoded where the first of its parts stands."""
    latest = lru_cache(maxsize=1)(lambda name, e: coded[name].raw(e))
    first = {found.parts[0]: found for found in coded.values()}
    others = {part for found in coded.values() for part in found.parts[1:]}
    outputs: Shards = {shard: [] for shard in checkpoint.shards}
    for tensor in checkpoint.tensors.values():
        if tensor.name in first:
            outputs[tensor.file].append(_decoded(first[tensor.name], latest))
        elif tensor.name not in others:
            outputs[tensor.file].append(whole(tensor))
    return resolved(checkpoint, outputs)


def _decoded(found: Coded, raw: Callable[[str, int], bytes]) -> Output:
    """The dense tensor, made one matrix at a time."""
    size = math.prod(found.shape[-2:]) * BITS[found.dtype] // 8
    made = (Made(size, partial(raw, found.name, e)) for e in range(found.num_matrices))
    return Output(found.name, found.dtype, found.shape, tuple(made))


def coded(checkpoint: Checkpoint) -> Mapping[str, Coded]:
    """Of a checkpoint that was opened: the tensors that are stored in parts, by name."""
    return checkpoint.coded if isinstance(checkpoint, Planned) else {}


def inexact(checkpoint: Checkpoint) -> set[str]:
    """Of a checkpoint that was opened: the tensors that were rounded when they were stored, with no original left."""
    return {name for name, found in coded(checkpoint).items() if not found.exact}


def num_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of tensor data as stored: of a checkpoint that was opened, those of its source."""
    return (
        checkpoint.source.num_bytes if coded(checkpoint) and isinstance(checkpoint, Planned) else checkpoint.num_bytes
    )


def check_coded(
    checkpoint: Checkpoint,
    on_progress: Callable[[str, int, int], None],
    needs: Callable[[str, int], bool] = lambda name, e: True,
) -> None:
    """Reads every matrix that is stored in parts once, if it is needed by its tensor's name and its number in it.

    Raises: CoterieError for one whose parts do not agree.
    """
    for done, found in enumerate(coded(checkpoint).values()):
        for e in range(found.num_matrices):
            if needs(found.name, e):
                (found.packed or found.rows)(e)
        on_progress("checking packed tensors", done + 1, len(coded(checkpoint)))
