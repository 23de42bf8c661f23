"""Bytes to numbers and back: every small format value by value, rounding, dequantising, every layout of experts."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from coterie.codecs.fp8 import dequantise
from coterie.codecs.mxfp4 import mxfp4
from coterie.errors import CoterieError
from coterie.model.experts import Experts
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.numerics import decode, encode, round_to_bf16
from handmade import save

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}


def same(found, expected):
    """Equal values, signs of zero and places of NaN."""
    return np.array_equal(np.isnan(found), np.isnan(expected)) and np.array_equal(
        found[~np.isnan(found)].view(np.uint32), expected[~np.isnan(expected)].view(np.uint32)
    )


def test_every_bf16_pattern_decodes_as_in_torch():
    """All 65536 patterns, subnormals, infinities and NaN included."""
    codes = np.arange(65536, dtype=np.uint16)
    expected = torch.from_numpy(codes.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert same(decode(codes.tobytes(), "BF16", "x"), expected)


def test_every_f16_pattern_decodes_as_in_torch():
    """All 65536 patterns of half precision become float32 exactly."""
    codes = np.arange(65536, dtype=np.uint16)
    expected = torch.from_numpy(codes.view(np.int16)).view(torch.float16).float().numpy()
    assert same(decode(codes.tobytes(), "F16", "x"), expected)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_float8_pattern_decodes_as_in_torch(dtype):
    """All 256 patterns of each 8-bit float."""
    codes = np.arange(256, dtype=np.uint8)
    assert same(decode(codes.tobytes(), dtype, "x"), torch.from_numpy(codes).view(FLOAT8[dtype]).float().numpy())


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E4M3FNUZ", "C64"])
def test_formats_without_numbers_are_refused(dtype):
    """What cannot be decoded exactly is refused with the tensor's name, never guessed."""
    with pytest.raises(CoterieError, match=f"tensor 'x': cannot read values of dtype {dtype}"):
        decode(b"\0" * 8, dtype, "x")
    with pytest.raises(CoterieError, match="cannot write"):
        encode(np.zeros(1), dtype, "x")


@given(st.lists(st.floats(width=32), min_size=1))
def test_rounding_float32_to_bf16_agrees_with_torch(values):
    """To nearest, ties to even, overflow to infinity, NaN stays NaN."""
    values = np.array(values, np.float32)
    bits = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    finite = ~np.isnan(values)
    found = round_to_bf16(values)
    assert np.array_equal(found[finite], bits[finite])
    assert np.isnan(decode(found.tobytes(), "BF16", "x"))[~finite].all()


def slow_bf16(value):
    """The nearest of the two bf16 neighbours by exact fractions; of a tie, the even pattern."""
    low = int(np.array([np.abs(value)], np.float32).view(np.uint32)[0] >> 16)

    def exact(code):
        return Fraction(float(np.array([code << 16], np.uint32).view(np.float32)[0]))

    codes = [c for c in (low - 1, low, low + 1) if 0 <= c < 0x7F80]
    best = min(codes, key=lambda c: (abs(exact(c) - Fraction(abs(value))), c & 1))
    return best | (0x8000 if np.signbit(value) else 0)


@given(st.floats(-1e38, 1e38) | st.integers(-(2**11), 2**11).map(lambda n: (1 + n / 2**10) * (1 + 2.0**-40)))
def test_rounding_float64_to_bf16_rounds_once(value):
    """Not first to float32: a value just beyond a tie goes to its own side of it."""
    assert round_to_bf16(np.array([value]))[0] == slow_bf16(value)


def test_a_value_just_beyond_a_tie_in_float64():
    """1 + 2^-8 lies between 1 and 1 + 2^-7; a little more rounds up, where a stop at float32 would lose it."""
    tie = 1 + 2.0**-8
    found = decode(encode(np.array([tie, tie + 2.0**-40, tie - 2.0**-40, -tie - 2.0**-40]), "BF16", "x"), "BF16", "x")
    assert found.tolist() == [1, 1 + 2.0**-7, 1, -1 - 2.0**-7]


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64", "BF16"])
def test_what_was_decoded_encodes_to_the_same_bytes(dtype):
    """Decoding and encoding again is the identity."""
    raw = encode(np.random.default_rng(0).normal(size=100), dtype, "x")
    assert encode(decode(raw, dtype, "x"), dtype, "x") == raw


@given(st.lists(st.floats(-60000, 60000), min_size=1))
def test_rounding_to_f16_agrees_with_numpy(values):
    """Half precision is rounded once from float64."""
    assert encode(np.array(values), "F16", "x") == np.array(values).astype(np.float16).tobytes()


@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"),
    [
        ("F16", 65519.99, 65520.0),  # half a step above 65504 rounds to infinity
        ("BF16", 3.3961e38, 3.3962e38),
        ("F32", 3.40282356e38, 3.40282357e38),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_values_never_become_infinite(dtype, largest, beyond, sign):
    """Refused with the tensor's name, whatever stands beside them; what rounds to the largest number is fine."""
    given = np.array([0, sign * largest, np.nan, np.inf, -np.inf])
    found = decode(encode(given, dtype, "x"), dtype, "x")
    assert np.isfinite(found[:2]).all() and np.isnan(found[2]) and found[3] == np.inf == -found[4]
    for values in ([sign * beyond], [np.nan, np.inf, sign * beyond, -np.inf]):
        with pytest.raises(CoterieError, match=f"tensor 'x': .* is beyond the range of {dtype}"):
            encode(np.array(values), dtype, "x")


def test_single_precision_beyond_halves_is_refused():
    """As float32, which most weights come as."""
    for dtype, value in (("F16", 1e5), ("BF16", 3.4e38)):
        with pytest.raises(CoterieError, match=f"tensor 'x': .* is beyond the range of {dtype}"):
            encode(np.float32([[1, value], [2, 3]]), dtype, "x")
    for dtype in ("F16", "BF16", "F32", "F64"):
        assert encode(np.zeros((0, 2), np.float32), dtype, "x") == b""
        assert np.isinf(decode(encode(np.float16([np.inf]), dtype, "x"), dtype, "x")).all()


def test_integers_beyond_halves_are_refused():
    """70000 has no half; 65504 is the largest."""
    assert decode(encode(np.array([65504]), "F16", "x"), "F16", "x") == [65504]
    with pytest.raises(CoterieError, match="70000 is beyond the range of F16"):
        encode(np.array([70000]), "F16", "x")


def test_floats_are_not_cut_to_integers():
    """Codes of quantised weights are not what their values round to."""
    with pytest.raises(CoterieError, match="tensor 'x': cannot write values of dtype I8"):
        encode(np.float32([0.5]), "I8", "x")
    assert encode(np.array([3], np.int8), "I8", "x") == b"\x03"


# --- dequantising ------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_scales_per_block(blocks_down, blocks_right, height, width):
    """Every weight is multiplied by its own block's scale."""
    draw = np.random.default_rng(0)
    values = draw.normal(size=(blocks_down * height, blocks_right * width)).astype(np.float32)
    scale = draw.normal(size=(blocks_down, blocks_right)).astype(np.float32)
    found = dequantise(values, scale, "x", (height, width))
    for (i, j), value in np.ndenumerate(values):
        assert found[i, j] == value * scale[i // height, j // width]


def test_scales_per_tensor_and_per_row():
    """One number for all, or one per row in either spelling."""
    values = np.array([[1, 2], [3, 4]], np.float32)
    for scale in (np.float32([2]), np.float32(2), np.float32([[2]])):
        assert dequantise(values, np.asarray(scale), "x").tolist() == [[2, 4], [6, 8]]
    for scale in (np.float32([2, 3]), np.float32([[2], [3]])):
        assert dequantise(values, scale, "x").tolist() == [[2, 4], [9, 12]]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 1), (0,), (0, 2), (4, 4)])
def test_scales_that_do_not_fit_are_refused(shape):
    """A scale of another shape is refused, not broadcast."""
    with pytest.raises(CoterieError, match=r"'x': scale of shape .* does not divide"):
        dequantise(np.ones((2, 2), np.float32), np.ones(shape, np.float32), "x")


def test_the_last_block_may_be_cut_short():
    """Five rows in blocks of two: the third block has one; and the third column of blocks likewise."""
    scale = np.float32([[1, 2], [3, 4], [5, 6]])
    found = dequantise(np.ones((5, 3), np.float32), scale, "x", (2, 2))
    assert found.tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4], [3, 3, 4], [5, 5, 6]]


@pytest.mark.parametrize("shape", [(), (1,), (2, 2), (4, 2), (5, 1)])
def test_scales_must_fit_the_known_blocks(shape):
    """Five rows in blocks of two take three scales: neither one for all, nor one per row."""
    with pytest.raises(CoterieError, match=r"'x': scale of shape .* into blocks of 2 x 2"):
        dequantise(np.ones((5, 3), np.float32), np.ones(shape, np.float32), "x", (2, 2))


@pytest.mark.parametrize(("rows", "count", "size"), [(8, 2, 4), (5, 3, 2), (448, 7, 64), (450, 4, 128)])
def test_unknown_blocks_are_powers_of_two(rows, count, size):
    """Of those, one size at most gives the number of scales."""
    found = dequantise(np.ones((rows, 2), np.float32), np.arange(count, dtype=np.float32)[:, None], "x")
    assert found[:, 1].tolist() == [i // size for i in range(rows)]


@pytest.mark.parametrize(("rows", "count"), [(448, 4), (6, 2), (9, 3), (7, 3)])
def test_unknown_blocks_that_could_be_others_are_refused(rows, count):
    """448 rows with 4 scales: blocks of 128, the last one short, or of 112?"""
    with pytest.raises(CoterieError, match=r"a power of two"):
        dequantise(np.ones((rows, 2), np.float32), np.ones((count, 1), np.float32), "x")


def slow_e2m1(code):
    """A 4-bit float: sign, two bits of exponent (bias 1), one bit of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    return (-1) ** sign * (2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2)


def test_mxfp4_against_a_slow_loop():
    """Low nibble first, sixteen bytes per exponent, every code and many exponents."""
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (3, 2, 16)).astype(np.uint8)
    scales = draw.integers(100, 150, (3, 2)).astype(np.uint8)
    found = mxfp4(blocks, scales)
    assert found.shape == (3, 64) and found.dtype == np.float32
    for (row, group, byte), value in np.ndenumerate(blocks):
        unit = 2.0 ** (int(scales[row, group]) - 127)
        assert found[row, group * 32 + 2 * byte] == slow_e2m1(int(value) & 15) * unit
        assert found[row, group * 32 + 2 * byte + 1] == slow_e2m1(int(value) >> 4) * unit


# --- layouts of experts ------------------------------------------------------------------------------------

E, D, F = 3, 4, 2
DRAW = np.random.default_rng(0)
GATE, UP = (DRAW.normal(size=(E, F, D)).astype(np.float32) for _ in range(2))
DOWN = DRAW.normal(size=(E, D, F)).astype(np.float32)
ROUTER = np.eye(E, D, dtype=np.float32)


def config(model_type, **rest):
    count = {"num_hidden_layers": 1, "num_experts": E, "num_local_experts": E, "n_routed_experts": E}
    return {"model_type": model_type, **count, "num_experts_per_tok": 1, **rest}


def experts_of(folder):
    checkpoint = Checkpoint.open(folder)
    blocks = Model.of(checkpoint)
    return Experts(checkpoint, blocks.moe[0])


def check(folder, gate=GATE):
    """Every expert comes out as (gate, up, down), and flat as all of them end to end."""
    experts = experts_of(folder)
    assert len(experts) == E
    for e in range(E):
        found = experts[e]
        assert found[0] is None if gate is None else np.array_equal(found[0], gate[e])
        assert np.array_equal(found[1], UP[e]) and np.array_equal(found[2], DOWN[e])
        parts = [UP[e], DOWN[e]] if gate is None else [gate[e], UP[e], DOWN[e]]
        assert np.array_equal(experts.flat(e), np.concatenate([p.ravel() for p in parts]))
    with pytest.raises(IndexError):
        experts[E]


def test_numbered_experts(tmp_path):
    """One tensor per expert and matrix."""
    tensors = {"model.layers.0.mlp.gate.weight": ROUTER}
    for e in range(E):
        for name, values in (("gate", GATE), ("up", UP), ("down", DOWN)):
            tensors[f"model.layers.0.mlp.experts.{e}.{name}_proj.weight"] = values[e]
    check(save(tmp_path, config("qwen2_moe"), [tensors]))


def test_fused_experts(tmp_path):
    """All experts in two tensors (E, 2F, D) and (E, D, F), gate above up."""
    tensors = {
        "model.layers.0.mlp.gate.weight": ROUTER,
        "model.layers.0.mlp.experts.gate_up_proj": np.concatenate([GATE, UP], 1),
        "model.layers.0.mlp.experts.down_proj": DOWN,
    }
    check(save(tmp_path, config("qwen3_moe"), [tensors]))


def transposed(array):
    return np.ascontiguousarray(array.transpose(0, 2, 1))


def gpt_oss_tensors():
    interleaved = np.stack([GATE, UP], 2).reshape(E, 2 * F, D)  # gate and up alternate
    return {
        "model.layers.0.mlp.router.weight": ROUTER,
        "model.layers.0.mlp.router.bias": np.zeros(E, np.float32),
        "model.layers.0.mlp.experts.gate_up_proj": transposed(interleaved),
        "model.layers.0.mlp.experts.gate_up_proj_bias": np.zeros((E, 2 * F), np.float32),
        "model.layers.0.mlp.experts.down_proj": transposed(DOWN),
        "model.layers.0.mlp.experts.down_proj_bias": np.zeros((E, D), np.float32),
    }


def test_transposed_and_interleaved_experts(tmp_path):
    """gpt-oss stores (E, in, out), gate and up row by row in turn."""
    check(save(tmp_path, config("gpt_oss"), [gpt_oss_tensors()]))


def test_flat_experts(tmp_path):
    """dbrx stacks the experts' rows: three tensors (E F, D), the third transposed."""
    tensors = {
        "transformer.blocks.0.ffn.router.layer.weight": ROUTER,
        "transformer.blocks.0.ffn.experts.mlp.w1": GATE.reshape(E * F, D),
        "transformer.blocks.0.ffn.experts.mlp.v1": UP.reshape(E * F, D),
        "transformer.blocks.0.ffn.experts.mlp.w2": transposed(DOWN).reshape(E * F, D),
    }
    ffn = {"moe_num_experts": E, "moe_top_k": 1}
    check(save(tmp_path, {"model_type": "dbrx", "n_layers": 1, "ffn_config": ffn}, [tensors]))


def test_experts_without_a_gate(tmp_path):
    """nemotron_h has up and down only."""
    tensors = {
        "backbone.layers.0.mixer.gate.weight": ROUTER,
        "backbone.layers.0.mixer.gate.e_score_correction_bias": np.zeros(E, np.float32),
    }
    for e in range(E):
        tensors[f"backbone.layers.0.mixer.experts.{e}.up_proj.weight"] = UP[e]
        tensors[f"backbone.layers.0.mixer.experts.{e}.down_proj.weight"] = DOWN[e]
    check(save(tmp_path, config("nemotron_h"), [tensors]), gate=None)


def test_float8_experts_with_block_scales(tmp_path):
    """DeepSeek's FP8: `weight_scale_inv` beside each weight holds one factor per block."""
    draw = np.random.default_rng(1)
    tensors = {"model.layers.0.mlp.gate.weight": torch.from_numpy(ROUTER)}
    values, scales = {}, {}
    for e in range(E):
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            stem = f"model.layers.0.mlp.experts.{e}.{name}_proj.weight"
            values[e, name] = torch.from_numpy(draw.normal(size=shape)).to(torch.float8_e4m3fn)
            scales[e, name] = torch.from_numpy(draw.normal(size=(shape[0] // 2, shape[1] // 2)).astype(np.float32))
            tensors |= {stem: values[e, name], f"{stem}_scale_inv": scales[e, name]}
    (tmp_path / "config.json").write_text(json.dumps(config("deepseek_v3")))
    save_file(tensors, tmp_path / "model.safetensors")
    experts = experts_of(tmp_path)
    for e in range(E):
        for found, name in zip(experts[e], ("gate", "up", "down"), strict=True):
            expected = values[e, name].float() * torch.kron(scales[e, name], torch.ones(2, 2))
            assert np.array_equal(found, expected.numpy())


def mxfp4_tensors(**changes):
    """gpt-oss with D = 64 and F = 32, all weights 0.5 in MXFP4 but expert 1's, which are -6 * 2."""
    tensors = {
        "model.layers.0.mlp.router.weight": np.ones((E, 64), np.float32),
        "model.layers.0.mlp.router.bias": np.zeros(E, np.float32),
        "model.layers.0.mlp.experts.gate_up_proj_blocks": np.full((E, 64, 2, 16), 0x11, np.uint8),
        "model.layers.0.mlp.experts.gate_up_proj_scales": np.full((E, 64, 2), 127, np.uint8),
        "model.layers.0.mlp.experts.down_proj_blocks": np.full((E, 64, 1, 16), 0x11, np.uint8),
        "model.layers.0.mlp.experts.down_proj_scales": np.full((E, 64, 1), 127, np.uint8),
    }
    for name, values in tensors.items():
        if name.endswith(("blocks", "scales")):
            values[1] = 0xFF if name.endswith("blocks") else 128
    return tensors | {f"model.layers.0.mlp.experts.{name}": values for name, values in changes.items()}


def test_mxfp4_experts(tmp_path):
    """gpt-oss on the hub: blocks and scales, read one expert at a time."""
    experts = experts_of(save(tmp_path, config("gpt_oss"), [mxfp4_tensors()]))
    for e, value in ((0, 0.5), (1, -12), (2, 0.5)):
        gate, up, down = experts[e]
        assert gate.shape == up.shape == (32, 64) and down.shape == (64, 32)
        assert (gate == value).all() and (up == value).all() and (down == value).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"down_proj_scales": np.zeros((E, 64), np.uint8)},
        {"down_proj_scales": np.zeros((E, 64, 1), np.float32)},
        {"down_proj_blocks": np.zeros((E, 64, 1, 8), np.uint8)},
        {"down_proj_blocks": np.zeros((2 * E, 64, 1, 16), np.uint8)},
    ],
)
def test_mxfp4_of_other_shapes_is_refused(tmp_path, changes):
    """Blocks and scales that do not belong together are refused with their shapes."""
    experts = experts_of(save(tmp_path, config("gpt_oss"), [mxfp4_tensors(**changes)]))
    with pytest.raises(CoterieError, match="down_proj_blocks"):
        experts[0]


@pytest.mark.parametrize("shape", [(E, 3, D), (E,), (E, D), (2 * E, 2 * F, D), (E, 2, F, D)])
def test_fused_experts_of_odd_shapes_are_refused(tmp_path, shape):
    """A fused tensor without an even number of rows per expert holds no gate and up."""
    tensors = {
        "model.layers.0.mlp.gate.weight": ROUTER,
        "model.layers.0.mlp.experts.gate_up_proj": np.zeros(shape, np.float32),
        "model.layers.0.mlp.experts.down_proj": DOWN,
    }
    experts = experts_of(save(tmp_path, config("qwen3_moe"), [tensors]))
    with pytest.raises(CoterieError, match="expected"):
        experts[0]


def test_packed_integers_are_refused(tmp_path):
    """Weights packed by a scheme we do not know are refused, not read as numbers."""
    tensors = {"model.layers.0.mlp.gate.weight": ROUTER}
    for e in range(E):
        for name in ("gate", "up", "down"):
            tensors[f"model.layers.0.mlp.experts.{e}.{name}_proj.weight"] = np.zeros((2, 2), np.int32)
    with pytest.raises(CoterieError, match="packed integers"):
        experts_of(save(tmp_path / "plain", config("qwen2_moe"), [tensors]))[0]
    renamed = {name.replace("proj.weight", "proj.qweight"): values for name, values in tensors.items()}
    with pytest.raises(CoterieError, match="no 'up_proj' weight in a form that we know"):
        experts_of(save(tmp_path / "gptq", config("qwen2_moe"), [renamed]))[0]
