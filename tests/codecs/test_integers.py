"""Integers of a width each: values by hand, other packings beside them, damage refused by name before it is used."""

import json

import numpy as np
import pytest

import handmade
from coterie.codecs.integers import FORMAT, Arrangement, checksum, values
from coterie.codecs.open import coded, opened
from coterie.errors import CoterieError
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.numerics import packed
from coterie.verbs.pack import pack

NAME = "model.layers.0.mlp.experts"
SETTINGS = {"coterie": "packed", "format": FORMAT}


def parts(name, matrices, group, fused=True):
    """The tensors of matrices (bits, numbers w (O, I), scales (O, G) float32), as the format says."""
    shape = (*((len(matrices),) if fused else ()), *matrices[0][1].shape)
    codes = [packed(w + 2 ** (b - 1), b).view(np.uint32) if b else np.empty(0, np.uint32) for b, w, _ in matrices]
    scales = [s if b else s[:0] for b, _, s in matrices]
    layout = Arrangement(shape, group, "F32", tuple(b for b, _, _ in matrices))
    sums = [checksum(c.tobytes(), s.tobytes()) for c, s in zip(codes, scales, strict=True)]
    return {
        f"{name}.widths": np.frombuffer(layout.header(sums), np.int64),
        f"{name}.codes": np.concatenate([c.reshape(-1) for c in codes]),
        f"{name}.scales": np.concatenate(scales).reshape(layout.parts[".scales"][1]),
    }


def drawn(bits, rows=3, columns=64, group=32, seed=0):
    draw = np.random.default_rng(seed)
    numbers = draw.integers(-(2 ** (bits - 1)) if bits else 0, 2 ** (bits - 1) if bits else 1, (rows, columns))
    return bits, numbers, draw.normal(size=(rows, columns // group)).astype(np.float32)


def dense(matrix):
    bits, numbers, scales = matrix
    spread = np.repeat(scales, numbers.shape[1] // scales.shape[1], axis=1)
    return (numbers * spread).astype(np.float32) if bits else np.zeros(numbers.shape, np.float32)


def folder(path, tensors, settings=SETTINGS):
    return handmade.save(path, {"model_type": "qwen3_moe", "quantization_config": settings}, [tensors])


def test_one_row_by_hand(tmp_path):
    """Two bits: 32 codes in two words, the first code in the lowest bits; a negative scale turns them round."""
    tensors = parts("w", [(2, np.array([[-2, -1, 0, 1] * 8]), np.float32([[-0.5]]))], 32, fused=False)
    assert tensors["w.codes"].tolist() == [0b11100100_11100100_11100100_11100100] * 2
    assert tensors["w.widths"][:4].tolist() == [32, 32, 0, 2]
    view = opened(Checkpoint.open(folder(tmp_path / "m", tensors)))
    assert view.read("w").tolist() == [[1.0, 0.5, 0.0, -0.5] * 8]


def test_every_matrix_has_a_width_of_its_own(tmp_path):
    """In one tensor, and 0 bits among them: zeros, without a byte; kernels get codes and scales as stored."""
    matrices = [drawn(bits, seed=bits) for bits in (4, 0, 2, 8, 3, 0)]
    view = opened(Checkpoint.open(folder(tmp_path / "m", parts(NAME, matrices, 32))))
    assert np.array_equal(view.read(NAME), np.stack([dense(m) for m in matrices]))
    assert view.tensors[NAME].dtype == "F32" and "quantization_config" not in view.config
    found = coded(view)[NAME]
    for e, (bits, _, scales) in enumerate(matrices):
        held = found.packed(e)
        assert (held.bits, held.shape, held.scale_type) == (bits, (3, 64), "F32")
        assert held.codes.shape == (3, 2 * bits) and held.codes.dtype == np.uint32
        assert np.array_equal(held.scales, scales if bits else np.empty((3, 0)))
        assert np.array_equal(values(held), found.rows(e))


@pytest.mark.parametrize("fused", [True, False])
def test_a_tensor_of_zeros_alone_keeps_its_shape(tmp_path, fused):
    view = opened(Checkpoint.open(folder(tmp_path / "m", parts("w", [drawn(0)], 32, fused))))
    assert view.read("w").shape == ((1, 3, 64) if fused else (3, 64)) and not view.read("w").any()


@pytest.mark.parametrize("scale_type", ["BF16", "F16"])
def test_scales_of_two_bytes_are_read_exactly(tmp_path, scale_type):
    """The record keeps them as they are stored; values multiply what they stand for."""
    import torch
    from safetensors.torch import save_file

    _, numbers, scales = drawn(4)
    kind = torch.bfloat16 if scale_type == "BF16" else torch.float16
    stored = torch.from_numpy(scales)[None].to(kind)
    codes = packed(numbers + 8, 4).view(np.uint32)
    layout = Arrangement((3, 64), 32, scale_type, (4,))
    header = layout.header([checksum(codes.tobytes(), stored.view(torch.int16).numpy().tobytes())])
    tensors = {"w.widths": torch.frombuffer(bytearray(header), dtype=torch.int64), "w.scales": stored}
    path = folder(tmp_path / "m", {})
    save_file(tensors | {"w.codes": torch.from_numpy(codes.reshape(-1))}, path / "model.safetensors")
    found = coded(opened(Checkpoint.open(path)))["w"]
    assert np.array_equal(found.rows(0), dense((4, numbers, stored[0].float().numpy())))
    assert found.packed(0).scales.dtype == np.uint16 and found.num_bytes == layout.num_bytes == 40 + 96 + 12


def test_zeros_as_bits_stand_beside_integers(tmp_path):
    """One checkpoint, two packings, told by their parts."""
    sparse = handmade.save(tmp_path / "dense", handmade.qwen_config(), [handmade.read_all(_half_zero(tmp_path))])
    pack(sparse, tmp_path / "packed")
    tensors = handmade.read_all(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text()) | {"quantization_config": SETTINGS}
    both = handmade.save(tmp_path / "both", config, [tensors | parts("extra", [drawn(3)], 32, fused=False)])
    found = coded(opened(Checkpoint.open(both)))
    assert {"extra"} < found.keys() and np.array_equal(found["extra"].rows(0), dense(drawn(3)))
    assert found.keys() - {"extra"} == coded(opened(Checkpoint.open(tmp_path / "packed"))).keys()


def _half_zero(tmp_path):
    path = handmade.qwen(tmp_path / "some", dtype=np.float16)
    tensors = {n: v * (np.arange(v.size).reshape(v.shape) % 4 == 0) if "experts" in n else v
               for n, v in handmade.read_all(path).items()}  # fmt: skip
    wide = {n: np.tile(v, (8, 16)) if "experts" in n else v for n, v in tensors.items()}
    return handmade.save(tmp_path / "wide", handmade.qwen_config(), [wide])


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_one_flipped_bit_is_found_before_anything_is_decoded(tmp_path, part):
    """By the checksum of its matrix; the others still read."""
    tensors = parts("w", [drawn(4), drawn(3)], 32)
    tensors[f"w.{part}"].view(np.uint8).reshape(-1)[-1] ^= 1
    found = coded(opened(Checkpoint.open(folder(tmp_path / "m", tensors))))["w"]
    assert np.array_equal(found.rows(0), dense(drawn(4)))
    for read in (found.rows, found.packed):
        with pytest.raises(CoterieError, match=r"tensor 'w\[1\]': checksum"):
            read(1)


def _changed(**at):
    """The tensors of two matrices, with some numbers of the header changed."""

    def change(tensors):
        header = tensors["w.widths"].copy()
        for place, value in at.items():
            header[int(place[1:])] = value
        return tensors | {"w.widths": header}

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_changed(_0=0), "expected whole words"),
        (_changed(_0=48), "expected whole words"),
        (_changed(_0=2**40), "expected whole words"),
        (_changed(_0=128), "should be"),
        (_changed(_1=0), "expected whole words"),
        (_changed(_1=-32), "expected whole words"),
        (_changed(_1=64), "should be"),
        (_changed(_2=3), "expected whole words"),
        (_changed(_2=-2), "expected whole words"),
        (_changed(_3=5), "widths among 0, 2, 3, 4, 8"),
        (_changed(_3=0), "should be"),
        (_changed(_3=8), "should be"),
        (_changed(_5=-1), "expected whole words"),
        (lambda t: t | {"w.widths": t["w.widths"].astype(np.float64)}, "the first I64"),
        (lambda t: t | {"w.widths": t["w.widths"][:3].copy()}, "expected whole words"),
        (lambda t: t | {"w.widths": t["w.widths"][:-1].copy()}, "expected whole words"),
        (lambda t: t | {"w.codes": t["w.codes"][:-1].copy()}, "should be U32"),
        (lambda t: t | {"w.codes": t["w.codes"].view(np.int32)}, "should be U32"),
        (lambda t: t | {"w.scales": t["w.scales"].astype(np.int8)}, "expected whole words"),
        (lambda t: t | {"w.scales": t["w.scales"].reshape(-1)}, "expected whole words"),
        (lambda t: {n: v for n, v in t.items() if n != "w.scales"}, "expected .widths, .codes, .scales"),
        (lambda t: {n: v for n, v in t.items() if n != "w.widths"}, "no .layout or .widths beside it"),
        (lambda t: t | {"w": np.zeros(3, np.float32)}, "none without them"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(tmp_path, change, says):
    path = folder(tmp_path / "m", change(parts("w", [drawn(4), drawn(3)], 32)))
    with pytest.raises(CoterieError, match=says):
        opened(Checkpoint.open(path))


@pytest.mark.parametrize("version", [0, 3, "2", None, True])
def test_another_version_of_the_format_is_refused(tmp_path, version):
    """Older versions of this package know the first alone, and say so in the same way."""
    path = folder(tmp_path / "m", parts("w", [drawn(4)], 32), SETTINGS | {"format": version})
    with pytest.raises(CoterieError, match="expected 1 or 2"):
        opened(Checkpoint.open(path))
