"""Which experts of a block count as alike: what is moved as bytes need not be readable, what is missing is named."""

import json

import numpy as np
import pytest

import tiny
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.verbs.apply import apply
from coterie.verbs.condense import condense
from handmade import qwen, read_all

EXPERT = "model.layers.0.mlp.experts.{}.{}"
PARTS = ("gate_proj", "up_proj", "down_proj")
KEEP = {"layers": {"0": {"kept": [0, 5, 7]}}}


def coded(folder, parts, but=()):
    """A one-layer checkpoint whose experts, but for some, hold `parts` (suffix, expert -> array) of every matrix."""
    tensors, config = tiny.read(qwen(folder / "plain", layers=1))
    tensors = {name: values for name, values in tensors.items() if "shared" not in name}
    for e in set(range(8)) - set(but):
        for part in PARTS:
            del tensors[EXPERT.format(e, part) + ".weight"]
            tensors |= {EXPERT.format(e, part) + suffix: values for suffix, values in parts(e).items()}
    return tiny.write(folder / "coded", tensors, config)


def packed(e):
    """Compressed-tensors' int4."""
    return {".weight_packed": np.full((3, 2), e, np.int32), ".weight_scale": np.full((3, 1), e, np.float16)}


def nf4(e):
    """Of bitsandbytes: `quant_state` is JSON, whose length depends on the numbers in it."""
    state = json.dumps({"nested_offset": 10.0**-e}).encode()
    return {
        ".weight": np.full((6, 1), e, np.uint8),
        ".weight.absmax": np.full(1, e, np.uint8),
        ".weight.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
    }


def gptq(e):
    """Rules by name may give some experts other bits and groups."""
    bits = 8 if e == 5 else 4
    return {".qweight": np.full((bits // 4, 3), e, np.int32), ".scales": np.full((e % 2 + 1, 3), e, np.float16)}


def without(parts, *gone):
    return lambda e: {key: value for key, value in parts(e).items() if not (e == 5 and key in gone)}


def changed(parts, **new):
    return lambda e: parts(e) | {f".{name}": values for name, values in new.items() if e == 5}


@pytest.mark.parametrize(("parts", "plain"), [(packed, ()), (packed, (5,)), (packed, (0, 7)), (nf4, ()), (gptq, ())])
def test_coded_experts_are_moved_as_bytes(tmp_path, parts, plain):
    """Whatever their coding; some of them may be plain floats."""
    source = coded(tmp_path, parts, but=plain)
    apply(source, KEEP, tmp_path / "out")
    before, after = read_all(source), read_all(tmp_path / "out")
    for new, old in enumerate([0, 5, 7]):
        for part in PARTS:
            names = [name for name in before if name.startswith(EXPERT.format(old, part) + ".")]
            assert names
            for name in names:
                moved = name.replace(f"experts.{old}.", f"experts.{new}.")
                assert np.array_equal(before[name], after[moved]) and before[name].dtype == after[moved].dtype
    assert Model.open(tmp_path / "out").main[0].num_experts == 3


@pytest.mark.parametrize(
    ("parts", "plain", "message"),
    [
        (without(packed, ".weight_scale"), (), r"down_proj\.weight_scale: missing, there F16 \[3, 1\]"),
        (without(packed, ".weight_packed"), (1,), r"down_proj\.weight_packed: missing, there I32 \[3, 2\]"),
        (without(packed, ".weight_packed", ".weight_scale"), (), r"down_proj\.weight_packed: missing"),
        (changed(packed, weight_packed=np.ones((3, 2), np.uint8)), (), r"weight_packed: U8 \[3, 2\], there I32"),
        (changed(packed, weight_scale=np.ones(3, np.float16)), (), r"weight_scale: F16 \[3\], there F16 \[3, 1\]"),
        (changed(packed, odd=np.ones(3, np.float32)), (), r"down_proj\.odd: F32 \[3\], there missing"),
    ],
)
def test_what_an_expert_lacks_is_named(tmp_path, parts, plain, message):
    """With its tensor, its shape, and the other's."""
    with pytest.raises(CoterieError, match=rf"layer 0: expert 5 differs from expert 0 \(.*{message}"):
        Model.open(coded(tmp_path, parts, but=plain))


def test_plain_experts_are_alike_in_every_shape(tmp_path):
    """Floats are computed with."""
    tensors, config = tiny.read(qwen(tmp_path / "plain", layers=1))
    name = EXPERT.format(3, "up_proj.weight")
    with pytest.raises(CoterieError, match=r"expert 3 .* \(up_proj\.weight: F32 \[2, 4\], there F32 \[3, 4\]\)"):
        Model.open(tiny.write(tmp_path / "odd", tensors | {name: np.ones((2, 4), np.float32)}, config))
    with pytest.raises(CoterieError, match=r"expert 3 differs from expert 0 \(up_proj\.weight: missing, there F32"):
        Model.open(tiny.write(tmp_path / "gone", {n: v for n, v in tensors.items() if n != name}, config))


def test_a_scale_alone_is_no_coding(tmp_path):
    """Of an expert whose weights are missing, beside others that are plain."""
    rest = {".weight_scale": np.ones(1, np.int8)}
    source = coded(tmp_path, lambda e: rest, but=set(range(8)) - {5})
    with pytest.raises(CoterieError, match=r"expert 5 differs from expert 0 \(down_proj: .*, too few bytes"):
        Model.open(source)


def test_no_block_with_a_coded_expert_is_condensed(tmp_path):
    """Though its first experts are plain."""
    source = coded(tmp_path, packed, but=range(5))
    with pytest.raises(CoterieError, match=r"experts\.5\.\w+\.weight_packed': I32 weights cannot be folded"):
        condense(source, tmp_path / "out", layers=1, data=["x=hub:nobody/nothing"])
