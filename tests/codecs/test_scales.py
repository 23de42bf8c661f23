"""Scales of quantised experts, numbered and fused: each weight gets its own, and what is unclear is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from coterie import prune
from coterie.errors import CoterieError
from coterie.model.experts import Experts
from coterie.model.family import detect
from coterie.model.layer import find_blocks
from coterie.model.moe import read_expert
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.apply import apply

E, D, F = 2, 2, 2
F8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
EXPERTS = "model.layers.0.mlp.experts."


def quantised(**settings):
    return {"quant_method": "fp8", **settings}


def blocks_of(rows, columns, **settings):
    return quantised(weight_block_size=[rows, columns], **settings)


def save(folder, tensors, quantization=None, router=((1, 0), (0, 1))):
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 1,
        "num_experts": len(router),
        "num_experts_per_tok": 1,
        "vocab_size": 5,
    }
    if quantization is not None:
        config["quantization_config"] = quantization
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {EXPERTS + name: values.contiguous().clone() for name, values in tensors.items()}
    save_file(
        {"model.layers.0.mlp.gate.weight": torch.tensor(router).float(), **tensors},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def experts_of(folder):
    checkpoint = Checkpoint.open(folder)
    return Experts(checkpoint, find_blocks(checkpoint, detect(checkpoint.config)).moe[0])


def numbered(spelling="weight_scale_inv", rows=F, columns=D, dtype=F8, beside=None, **scales):
    """Weights of ones; expert e's scale is e + 1 unless given by part. `beside` stands beside every expert's."""
    tensors = {}
    for e in range(E):
        for part in ("gate", "up", "down"):
            shape = (columns, rows) if part == "down" else (rows, columns)
            tensors[f"{e}.{part}_proj.weight"] = torch.ones(shape).to(dtype)
            tensors[f"{e}.{part}_proj.{spelling}"] = scales.get(part, torch.full((1, 1), e + 1.0))
        tensors |= {f"{e}.{name}": values for name, values in (beside or {}).items()}
    return tensors


def fused(scale, down_scale, rows=F, columns=D, **beside):
    """Weights of ones: gate_up (E, 2F, D) and down (E, D, F)."""
    return {
        "gate_up_proj": torch.ones(E, 2 * rows, columns).to(F8),
        "gate_up_proj_scale_inv": scale,
        "down_proj": torch.ones(E, columns, rows).to(F8),
        "down_proj_scale_inv": down_scale,
        **beside,
    }


# --- which tensor is the scale -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_every_spelling_of_a_scale_multiplies(tmp_path, spelling):
    """Numbered experts; what scales their inputs is no scale of theirs."""
    others = {"gate_proj.input_scale": torch.ones(1), "gate_proj.activation_scale": torch.ones(1)}
    experts = experts_of(save(tmp_path, numbered(spelling, beside=others), quantised()))
    for e in range(E):
        assert all((matrix == e + 1).all() for matrix in experts[e])


def test_fused_scales_multiply(tmp_path):
    """One scale per row of 1 x 2 blocks, under transformers' own names; those of activations are none of ours."""
    scale = torch.tensor([[[1.0], [2], [3], [4]], [[5], [6], [7], [8]]])
    down = torch.tensor([[[10.0], [20]], [[30], [40]]])
    activations = {f"{part}_proj_activation_scale": torch.ones(E) for part in ("gate_up", "down")}
    experts = experts_of(save(tmp_path, fused(scale, down, **activations), blocks_of(1, 2)))
    for e in range(E):
        gate, up, found_down = experts[e]
        assert gate.tolist() == [[4 * e + 1] * 2, [4 * e + 2] * 2] and up.tolist() == [[4 * e + 3] * 2, [4 * e + 4] * 2]
        assert found_down.tolist() == [[20 * e + 10] * 2, [20 * e + 20] * 2]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_scale_without_an_axis_of_experts_serves_all(tmp_path, shape):
    """Static scales, of weights and of what enters: read for every expert, and kept whole when some go."""
    static = {"gate_up_proj_input_scale": torch.full(shape, 7.0), "down_proj_input_scale": torch.full(shape, 8.0)}
    tensors = fused(torch.full(shape, 2.0), torch.full(shape, 3.0), **static)
    source = save(tmp_path / "source", tensors, quantised())
    for e in range(E):
        assert [float(matrix.max()) for matrix in experts_of(source)[e]] == [2, 2, 3]
    apply(source, {"layers": {"0": {"kept": [1]}}}, tmp_path / "out")
    before, after = (Checkpoint.open(folder) for folder in (source, tmp_path / "out"))
    for name in before.tensors:
        if "scale" in name:
            assert (after.raw(name), after.tensors[name].shape) == (before.raw(name), shape)
    assert after.tensors[EXPERTS + "down_proj"].shape == (1, D, F)
    assert [float(matrix.max()) for matrix in experts_of(tmp_path / "out")[0]] == [2, 2, 3]


@pytest.mark.parametrize(
    ("name", "shape"), [("down_proj", (1, D, F)), ("down_proj_scale_inv", (3, 1)), ("down_proj_scale_inv", (0,))]
)
def test_what_experts_cannot_share_is_refused(tmp_path, name, shape):
    """Weights of one expert where two are, and scales of three."""
    tensors = fused(torch.ones(E, 1, 1), torch.ones(E, 1, 1)) | {name: torch.ones(shape).to(torch.float32)}
    with pytest.raises(CoterieError, match=rf"experts\.{name}' has shape .*, which 2 experts cannot share"):
        experts_of(save(tmp_path, tensors, quantised()))


@pytest.mark.parametrize(
    "name", ["gate_proj.weight_scale_2", "gate_proj.weight_zero_point", "gate_proj.scales", "gate_up_scale", "scale"]
)
def test_scales_of_unknown_names_are_refused(tmp_path, name):
    """A second level of scales, zero points, a scale of the expert's own: any of them changes the weights."""
    experts = experts_of(save(tmp_path, numbered(beside={name: torch.ones(1, 1)}), quantised()))
    with pytest.raises(CoterieError, match=rf"_proj\.weight': beside it stands .*experts\.0\.{name}; expected one"):
        experts[0]


def test_two_scales_are_refused(tmp_path):
    """Which of them multiplies?"""
    experts = experts_of(save(tmp_path, numbered(beside={"gate_proj.scale": torch.ones(1, 1)})))
    with pytest.raises(CoterieError, match=r"beside it stands .*weight_scale_inv"):
        experts[0]


def test_fused_scales_of_unknown_names_are_refused(tmp_path):
    """As of numbered experts."""
    odd = {"gate_up_proj_scale_2": torch.ones(E, 1, 1)}
    experts = experts_of(save(tmp_path, fused(torch.ones(E, 1, 1), torch.ones(E, 1, 1), **odd)))
    with pytest.raises(CoterieError, match=r"beside it stands .*gate_up_proj_scale_2"):
        experts[0]


def test_float8_without_a_scale(tmp_path):
    """Refused where the config says that the model was quantised; else the values are what they are."""
    plain = {name: values for name, values in numbered().items() if "scale" not in name}
    assert (experts_of(save(tmp_path / "cast", plain))[1][0] == 1).all()
    with pytest.raises(CoterieError, match=r"gate_proj\.weight.*without a scale|up_proj\.weight.*without a scale"):
        experts_of(save(tmp_path / "lost", plain, quantised()))[1]
    stacked = {n: v for n, v in fused(torch.ones(E), torch.ones(E)).items() if "scale" not in n}
    with pytest.raises(CoterieError, match=r"gate_up_proj'.*without a scale"):
        experts_of(save(tmp_path / "fused", stacked, quantised()))[1]


def test_floats_with_a_scale_are_not_read_past_it(tmp_path):
    """The reader that takes plain floats as they lie in the file sees the scale too, in both layouts."""
    scales = torch.tensor([2.0, 3.0]).view(E, 1, 1)
    stacked = {n: v.to(torch.bfloat16) if v.dtype == F8 else v for n, v in fused(scales, scales).items()}
    for folder in (save(tmp_path / "a", stacked), save(tmp_path / "b", numbered("scale", dtype=torch.bfloat16))):
        experts = experts_of(folder)
        expert = read_expert(experts.checkpoint, experts.block, 1, torch.float32)
        value = experts[1][0][0, 0]
        assert value > 1 and (expert.gate_up == value).all() and (expert.down == value).all()


# --- blocks ------------------------------------------------------------------------------------------------------


def test_448_rows_in_blocks_of_128(tmp_path):
    """Four scales, the last for 64 rows; not four for 112 each."""
    scale = torch.tensor([[1.0], [2], [3], [4]])
    tensors = numbered(rows=448, gate=scale, up=scale + 4, down=scale.T)
    gate, up, down = experts_of(save(tmp_path / "known", tensors, blocks_of(128, 128)))[1]
    expected = [1] * 128 + [2] * 128 + [3] * 128 + [4] * 64
    assert gate[:, 1].tolist() == expected and down[1].tolist() == expected
    assert up[:, 0].tolist() == [n + 4 for n in expected]
    with pytest.raises(CoterieError, match=r"_proj\.weight': scale of shape \(4, 1\) does not divide"):
        experts_of(save(tmp_path / "unknown", tensors, quantised()))[1]


@pytest.mark.parametrize("apart", [False, True])
def test_448_fused_rows_in_blocks_of_128(tmp_path, apart):
    """Gate above up has 896 rows: seven blocks as one matrix, where one reaches from gate into up, or twice four."""
    lengths = [128, 128, 128, 64] * 2 if apart else [128] * 7
    scale = torch.arange(1.0, 1 + len(lengths)).view(1, -1, 1)
    down = torch.ones(E, 1, 4)
    folder = save(tmp_path, fused(torch.cat([scale, 10 * scale]), down, rows=448), blocks_of(128, 128))
    gate, up, _ = experts_of(folder)[1]
    expected = np.repeat(10 * np.arange(1, 1 + len(lengths)), lengths)
    assert gate[:, 0].tolist() == expected[:448].tolist() and up[:, 1].tolist() == expected[448:].tolist()


def test_one_scale_for_gate_and_one_for_up(tmp_path):
    """transformers' fused scale of weights without blocks: one per matrix. Three rows each are no power of two."""
    scale = torch.tensor([[[2.0], [3]], [[4], [5]]])
    gate, up, _ = experts_of(save(tmp_path, fused(scale, torch.ones(E, 1, 1), rows=3), quantised()))[1]
    assert (gate == 4).all() and (up == 5).all()


def test_fused_scales_that_fit_twice_are_refused(tmp_path):
    """2 x 3 rows in blocks of 4: two scales, whether blocks are 4 and 2 rows of one matrix or 3 of each."""
    experts = experts_of(save(tmp_path, fused(torch.ones(E, 2, 1), torch.ones(E, 1, 1), rows=3), blocks_of(4, 4)))
    with pytest.raises(CoterieError, match="both as one matrix and as gate and up apart"):
        experts[0]


@pytest.mark.parametrize("size", [[128], [0, 128], "128", [128.0, 128], [True, 1], 128])
def test_block_sizes_that_are_none_are_refused(tmp_path, size):
    """Whatever a config may hold there."""
    experts = experts_of(save(tmp_path, numbered(), quantised(weight_block_size=size)))
    with pytest.raises(CoterieError, match=r"config\.json: weight_block_size must be"):
        experts[0]


def test_a_quantization_config_that_is_none_is_refused(tmp_path):
    """A string says nothing of scales."""
    with pytest.raises(CoterieError, match=r"config\.json: quantization_config must be"):
        experts_of(save(tmp_path, numbered(), "fp8"))[0]


# --- what its numbers mean ---------------------------------------------------------------------------------------

EXPONENTS = torch.tensor([[128], [126]], dtype=torch.uint8)  # 2 and 1/2


def test_exponents_as_bytes_or_as_e8m0(tmp_path):
    """UE8M0: 2^(u - 127), stored as U8 or under a dtype of its own."""
    settings = blocks_of(1, 2, scale_fmt="ue8m0")
    for name, scale in (("bytes", EXPONENTS), ("e8m0", EXPONENTS.view(E8M0))):
        tensors = numbered(gate=scale, up=scale, down=scale)
        for matrix in experts_of(save(tmp_path / name, tensors, settings))[1]:
            assert matrix.tolist() == [[2, 2], [0.5, 0.5]]
        stacked = torch.stack([EXPONENTS.repeat(2, 1)] * E).view(scale.dtype)
        tensors = fused(stacked, stacked[:, :2])
        gate, up, down = experts_of(save(tmp_path / f"fused-{name}", tensors, settings))[1]
        assert gate.tolist() == up.tolist() == down.tolist() == [[2, 2], [0.5, 0.5]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_other_integer_scales_are_refused(tmp_path, dtype):
    """Bytes may be exponents or numbers: without word from the config nobody knows. Others are neither."""
    settings = quantised() if dtype == torch.uint8 else quantised(scale_fmt="ue8m0")
    experts = experts_of(save(tmp_path, numbered(gate=EXPONENTS.to(dtype)), settings))
    with pytest.raises(CoterieError, match=r"gate_proj\.weight_scale_inv': scales as [UI]\d+"):
        experts[0]


def test_packed_integers_with_scales_are_refused(tmp_path):
    """Two 4-bit floats in a byte have scales too: NVFP4 as U8 with a float per 16, DeepSeek-V4's as I8 with E8M0."""
    for name, dtype, scale in (
        ("nvfp4", torch.uint8, torch.ones(F, 2)),
        ("fp4", torch.int8, torch.ones(F, 2).to(E8M0)),
        ("int4", torch.int8, torch.ones(F, 2)),
    ):
        tensors = numbered("weight_scale", gate=scale, columns=4, dtype=dtype)
        with pytest.raises(CoterieError, match="packed integers"):
            experts_of(save(tmp_path / name, tensors))[0]
    rows = numbered("weight_scale", gate=torch.tensor([[2.0], [3]]), dtype=torch.int8)
    assert experts_of(save(tmp_path / "int8", rows))[0][0].tolist() == [[2, 2], [3, 3]]


# --- byte moving -------------------------------------------------------------------------------------------------


def of_four(name, values):
    """A tensor for four experts (4, rows, 2), and the exponents 100, 101, 102, 103 as the experts' scales."""
    marks = torch.arange(100, 104, dtype=torch.uint8).view(4, 1, 1).repeat(1, values.shape[1], 1)
    return {name: values.to(F8), f"{name}_scale_inv": marks.view(E8M0)}


@pytest.mark.parametrize("layout", ["numbered", "fused"])
def test_prune_keeps_scales_with_their_experts(tmp_path, layout):
    """Experts 1 and 3 of four stay: numbered scales are renamed with them, fused ones cut to their entries."""
    tensors = of_four("gate_up_proj", torch.ones(4, 4, 2)) | of_four("down_proj", torch.ones(4, 2, 2))
    tensors |= {"down_proj_activation_scale": torch.arange(4.0)}
    if layout == "numbered":
        parts = {"gate_proj.weight": 2, "up_proj.weight": 2, "down_proj.weight": 2}
        whole = [of_four(name, torch.ones(4, rows, 2)) for name, rows in parts.items()]
        tensors = {f"{e}.{name}": values[e] for each in whole for name, values in each.items() for e in range(4)}
    router = ((1, 0), (3, 0), (2, 0), (4, 0))
    source, out = save(tmp_path / "model", tensors, blocks_of(1, 2, scale_fmt="ue8m0"), router), tmp_path / "out"
    report = prune(source, out, method="router-norm", experts=2)
    assert report.plan["layers"]["0"]["kept"] == [1, 3]
    old, new = experts_of(source), experts_of(out)
    for i, e in enumerate((1, 3)):
        assert all((a == b).all() for a, b in zip(new[i], old[e], strict=True))
        assert all((matrix == 2.0 ** (e - 27)).all() for matrix in new[i])
    names = {name for name in new.checkpoint.tensors if "scale" in name}
    assert len(names) == (6 if layout == "numbered" else 3)
    if layout == "fused":
        raw = new.checkpoint.raw(EXPERTS + "down_proj_activation_scale")
        assert np.frombuffer(raw, "<f4").tolist() == [1, 3]
