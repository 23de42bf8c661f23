"""The sparse format: exact round trips, sizes as promised, and damaged parts refused by name."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.codecs import bits as fmt
from coterie.errors import CoterieError


def random_matrix(rng, dtype, shape, sparsity):
    """Bit patterns of random values, with minus zeros and empty and full rows among them."""
    codes = rng.integers(0, 2 ** (8 * fmt.CODES[dtype].itemsize), shape).astype(fmt.CODES[dtype])
    codes[rng.random(shape) < sparsity] = 0
    if shape[0] > 2:
        codes[0], codes[1] = 0, 1
    return codes


@given(
    st.sampled_from(sorted(fmt.CODES)),
    st.integers(1, 9),
    st.integers(1, 200),
    st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_decode_is_the_inverse_of_encode(dtype, rows, columns, sparsity, seed):
    """Every byte comes back, whatever the shape, dtype and sparsity."""
    raw = random_matrix(np.random.default_rng(seed), dtype, (rows, columns), sparsity).tobytes()
    packed = fmt.encode(raw, dtype, (rows, columns))
    fmt.check(packed, fmt.checksum(packed), "w")
    assert fmt.decode(packed) == raw


def test_a_matrix_by_hand():
    """[[0, 3, 0], [-0, 0, 5]] in float16: words 2 and 5, one and two kept values; minus zero is kept."""
    values = np.array([[0, 3, 0], [-0.0, 0, 5]], np.float16)
    packed = fmt.encode(values.tobytes(), "F16", (2, 3))
    assert packed.mask.tolist() == [[0b010], [0b101]]
    assert packed.rows.tolist() == [1, 2] and packed.rows.dtype == np.uint8
    assert packed.values.view(np.float16).tolist() == [3, 0, 5] and np.signbit(packed.values.view(np.float16)[1])


@pytest.mark.parametrize(("rows", "columns"), [(768, 2048), (2048, 768), (14336, 4096), (32, 256), (256, 96)])
def test_half_of_a_bf16_matrix_takes_at_most_0_575_of_its_bytes(rows, columns):
    """Mask, row counts, checksum and padding included."""
    stored = sum(p.num_bytes for p in fmt.parts("w", "BF16", (rows, columns), rows * columns // 2))
    assert stored <= 0.575 * 2 * rows * columns


@pytest.mark.parametrize("dtype", sorted(fmt.CODES))
@pytest.mark.parametrize("shape", [(7, 33), (3, 5, 70), (1, 1), (2, 300), (1, 70_000)])
@pytest.mark.parametrize("num_values", [0, 1, 13])
def test_whatever_follows_a_packed_tensor_stays_aligned(dtype, shape, num_values):
    """All parts begin at multiples of their item size, and the whole is a multiple of 8 bytes."""
    position = 0
    for part in fmt.parts("w", dtype, shape, num_values):
        assert position % (fmt.BITS[part.dtype] // 8) == 0
        position += part.num_bytes
    assert position % 8 == 0


def test_what_does_not_shrink_is_left_dense():
    """The break-even of bf16 is one kept bit per 16: dense matrices stay dense."""
    assert not fmt.shrinks("BF16", (256, 512), 256 * 512)
    assert not fmt.shrinks("BF16", (256, 512), int(0.94 * 256 * 512))
    assert fmt.shrinks("BF16", (256, 512), int(0.92 * 256 * 512))
    assert fmt.shrinks("F32", (256, 512), int(0.96 * 256 * 512))


def flip(array):
    """A copy with one bit of its middle changed."""
    changed = np.array(array)
    changed.view(np.uint8).reshape(-1)[changed.nbytes // 2] ^= 1
    return changed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: {"mask": flip(p.mask)}, "keeps"),
        (lambda p: {"rows": flip(p.rows)}, "its count says"),
        (lambda p: {"values": flip(p.values)}, "checksum"),
        (lambda p: {"values": p.values[:-1]}, "are stored"),
        (lambda p: {"values": np.append(p.values, p.values[:1])}, "are stored"),
        (lambda p: {"mask": p.mask[:, ::-1].copy(), "rows": p.rows}, "damaged"),
        (lambda p: {"mask": p.mask[::-1].copy(), "rows": p.rows[::-1].copy()}, "checksum"),
    ],
)
def test_damaged_parts_are_refused_by_name(change, says):
    """A changed bit of mask, counts or values, and values too few or too many."""
    raw = random_matrix(np.random.default_rng(0), "BF16", (6, 70), 0.5).tobytes()
    packed = fmt.encode(raw, "BF16", (6, 70))
    with pytest.raises(CoterieError, match=says) as error:
        fmt.check(replace(packed, **change(packed)), fmt.checksum(packed), "layer.w")
    assert "layer.w" in str(error.value)


def test_a_mask_that_keeps_more_columns_than_there_are_is_refused():
    """The last word's spare bits stay zero, even when the counts agree."""
    packed = fmt.encode(np.array([[1, 0, 0]], np.float16).tobytes(), "F16", (1, 3))
    wrong = replace(packed, mask=np.array([[1 << 3]], np.uint32))
    with pytest.raises(CoterieError, match="beyond the 3"):
        fmt.check(wrong, fmt.checksum(wrong), "w")


@pytest.mark.parametrize("found", [{"format": 3}, {"format": "1"}, {"format": True}, {}, None, [1]])
def test_another_format_version_is_refused(found):
    """Only formats 1 and 2, spelled as numbers."""
    with pytest.raises(CoterieError, match="expected 1"):
        fmt.check_settings(found, "config.json")
    fmt.check_settings(fmt.SETTINGS, "config.json")


def test_int8_rounds_to_half_a_scale_and_keeps_zeros():
    """Groups of 128 columns, the last one shorter; a group of zeros has scale 0."""
    values = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)
    values[1], values[2, :128], values[3, 7] = 0, 0, 0
    codes, scales = fmt.quantise(values)
    assert codes.shape == (5, 300) and scales.shape == (5, 3) and scales[2, 0] == 0 == codes[3, 7]
    spread = np.repeat(scales, fmt.GROUP, 1)[:, :300]
    assert (np.abs(codes * spread - values) <= 0.501 * spread).all() and np.abs(codes).max() == 127
