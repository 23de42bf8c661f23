"""Our own layout: what its section of config.json may say, who writes it, and that nothing else loads."""

import contextlib
import json
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from coterie.errors import CoterieError
from coterie.model.loading import check_routable, load, load_ours, load_stock
from coterie.model.own import OwnLayout, own_layout, own_section, renumber
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.apply import apply
from coterie.verbs.verify import verify

STOCK = {"model_type": "olmoe", "num_hidden_layers": 3}
SECTION = {"format": 1, "model_type": "olmoe", "num_experts": {"0": 2, "1": 4}}
CONDENSED = {"condensed": {"experts": [5, 0], "gates": [0.7, -0.3]}}


def config(**entries):
    return {"model_type": "coterie", "num_hidden_layers": 3, "coterie": SECTION | entries}


def kept(*counts):
    """A plan that keeps the first experts of each layer."""
    layers = {str(layer): {"kept": list(range(n))} for layer, n in enumerate(counts)}
    return {"layers": layers, "budget": {"layout": "coterie"}}


# --- reading and writing the section ------------------------------------------------------------------------------


def test_the_section_is_read_by_layer():
    """Counts, routes and widths; a prediction layer may have a count, numbered on or named."""
    found = own_layout(config(num_experts={"0": 2, "3": 4, "mtp.0": 8}, routes={"0": [1, -1, 0]}, dense={"2": 6}))
    assert found == OwnLayout("olmoe", {"0": 2, "3": 4, "mtp.0": 8}, {"0": (1, -1, 0)}, {"2": 6})
    assert own_layout(STOCK) == OwnLayout() and own_layout({}) == OwnLayout()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": None}, "coterie.model_type is None"),
        ({"model_type": ""}, "expected the stock model's"),
        ({"model_type": "coterie"}, "expected the stock model's"),
        ({"format": 2}, "this version reads 1"),
        ({"format": True}, "this version reads 1"),
        ({"num_experts": []}, "must be an object"),
        ({"num_experts": {"0": 0}}, "1 to 8192 experts"),
        ({"num_experts": {"0": True}}, "1 to 8192 experts"),
        ({"num_experts": {"00": 1}}, "by the layer's number"),
        ({"num_experts": {"\u0663": 1}}, "by the layer's number"),
        ({"dense": []}, "must be an object"),
        ({"dense": {"2": 0}}, "a width of 1 to"),
        ({"dense": {"2": 2**31 + 1}}, "a width of 1 to"),
        ({"dense": {"2": 4.0}}, "a width of 1 to"),
        ({"dense": {"3": 4}}, "the decoder has 3"),
        ({"dense": {"-1": 4}}, "by the layer's number"),
        ({"dense": {"mtp.0": 4}}, "speaks of layer mtp.0"),
        ({"dense": {"1": 4}}, "layer 1 is dense, and how many experts"),
        ({"routes": {"0": [0, 2, -1]}}, "each of its 2 stored experts"),
        ({"routes": {"2": [-1]}, "num_experts": {}}, None),
        ({"routes": {"0": []}}, "for every router row"),
        ({"routes": {"0": [False, 1]}}, "for every router row"),
    ],
)
def test_a_section_that_we_do_not_write_is_refused(entries, message):
    """By one line that says what was found; a layer may lead nowhere at all."""
    if message is None:
        assert own_layout(config(**entries)).routes == {"2": (-1,)}
        return
    with pytest.raises(CoterieError, match=message):
        own_layout(config(**entries))


@pytest.mark.parametrize(
    "found", [{"model_type": "coterie"}, STOCK | {"coterie": SECTION}, {"model_type": "coterie", "coterie": 3}]
)
def test_model_type_and_section_come_together(found):
    """Either without the other is refused."""
    with pytest.raises(CoterieError, match="or neither"):
        own_layout(found)


LAYERS = st.dictionaries(
    st.sampled_from(["0", "1", "99", "x"]), st.integers() | st.lists(st.integers(-1, 2)) | st.none()
)


@given(st.dictionaries(st.sampled_from([*SECTION, "routes", "dense"]), LAYERS | st.integers() | st.text(max_size=3)))
def test_no_section_raises_anything_else(entries):
    """Whatever the section holds, the answer is a layout or our error."""
    with contextlib.suppress(CoterieError):
        assert own_layout(config(**entries)).model_type


def test_the_section_is_written_over_what_it_said():
    """The stock model type is remembered once, entries that are not given stay."""
    found = dict(STOCK)
    own_section(found, num_experts={"0": 2, "1": 4})
    assert found == {"model_type": "coterie", "num_hidden_layers": 3, "coterie": SECTION}
    own_section(found, num_experts={"0": 2}, dense={"1": 6})
    assert found["coterie"] == SECTION | {"num_experts": {"0": 2}, "dense": {"1": 6}}


def test_layers_move_up_where_others_go():
    """Of layers 0 to 4 and a named one, 1 and 3 go: 2 becomes 1, 4 becomes 2."""
    found = config(num_experts={"0": 2, "1": 3, "2": 4, "mtp.0": 8}, dense={"3": 5, "4": 6})
    renumber(found, (1, 3))
    assert found["coterie"] == SECTION | {"num_experts": {"0": 2, "1": 4, "mtp.0": 8}, "dense": {"2": 6}}


# --- plans on top of plans ----------------------------------------------------------------------------------------


def section_of(folder):
    return json.loads((folder / "config.json").read_text()).get("coterie")


def test_equal_counts_are_stock_again(tiny_checkpoint, tmp_path):
    """Layers of 4, 6, 8 and 8 experts cut to 4 each need no layout of ours."""
    apply(tiny_checkpoint("olmoe"), kept(4, 6), tmp_path / "unequal")
    assert section_of(tmp_path / "unequal")["num_experts"] == {"0": 4, "1": 6, "2": 8, "3": 8}
    apply(tmp_path / "unequal", kept(4, 4, 4, 4), tmp_path / "out")
    assert section_of(tmp_path / "out") is None
    assert load_stock(tmp_path / "out", "float32")[1] == {}
    assert verify(tmp_path / "out", against=tmp_path / "unequal")["ok"]


def test_dense_layers_outlive_a_second_plan(tiny_checkpoint, tmp_path):
    """A condensed layer stays one when the others are cut to different counts."""
    apply(tiny_checkpoint("olmoe"), {"layers": {"3": CONDENSED}}, tmp_path / "dense")
    apply(tmp_path / "dense", kept(4, 6), tmp_path / "out")
    own = section_of(tmp_path / "out")
    assert own["num_experts"] == {"0": 4, "1": 6, "2": 8} and list(own["dense"]) == ["3"]
    assert verify(tmp_path / "out")["ok"]


def test_dropped_layers_leave_the_section_true(tiny_checkpoint, tmp_path):
    """Layer 0 of four goes: the dense layer 3 is then 2."""
    apply(tiny_checkpoint("olmoe"), {"layers": {"3": CONDENSED}}, tmp_path / "dense")
    apply(tmp_path / "dense", {"layers": {}, "dropped": [0]}, tmp_path / "out")
    own = section_of(tmp_path / "out")
    assert own["num_experts"] == {"0": 8, "1": 8} and list(own["dense"]) == ["2"]
    assert verify(tmp_path / "out")["ok"]


def test_a_text_model_inside_another_can_have_counts_of_its_own(tiny_checkpoint, tmp_path):
    """qwen3_5_moe holds a vision tower: every tensor is loaded, and the config stays as it was."""
    apply(tiny_checkpoint("qwen3_5_moe"), kept(4, 6), tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()
    assert load_ours(tmp_path / "out", "float32")[1] == {}
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    assert verify(tmp_path / "out", against=tiny_checkpoint("qwen3_5_moe"))["ok"]


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(tiny_checkpoint, tmp_path_factory):
    """olmoe with a condensed layer, and layers of 4 and 6 experts."""
    out = tmp_path_factory.mktemp("own") / "ours"
    apply(
        tiny_checkpoint("olmoe"),
        {"layers": {"3": CONDENSED, **kept(4, 6)["layers"]}, "budget": {"layout": "coterie"}},
        out,
    )
    return out


def changed(ours, tmp_path, section=None, **changes):
    """A copy of it with another config; a change to None takes the key away."""
    shutil.copytree(ours, tmp_path / "x")
    found = json.loads((ours / "config.json").read_text())
    found["coterie"] |= section or {}
    found = {key: value for key, value in (found | changes).items() if value is not None}
    (tmp_path / "x" / "config.json").write_text(json.dumps(found))
    return tmp_path / "x"


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        (None, {"coterie": None}),
        ({"model_type": "nothing"}, {}),
        ({"dense": {"99": 4}}, {}),
        ({"dense": []}, {}),
        ({"num_experts": {"0": 4, "1": 5, "2": 8}}, {}),
        (None, {"num_hidden_layers": 10**7}),
        (None, {"num_hidden_layers": None}),
        (None, {"hidden_size": 10**9}),
        (None, {"hidden_act": "none"}),
    ],
)
def test_what_is_not_ours_is_refused_by_every_reader(ours, tmp_path, section, changes):
    """`load` raises our error, `verify` finds a fault."""
    hostile = changed(ours, tmp_path, section, **changes)
    with pytest.raises(CoterieError):
        load(hostile)
    assert not verify(hostile)["ok"]


@pytest.mark.parametrize("dtype", ["x", "nn", "int8", "float8_e4m3fn", ["float32"], 3])
def test_a_dtype_that_no_model_has_is_refused(ours, tmp_path, dtype):
    """Names of torch that are no dtypes, dtypes that nothing computes in, and no names; in `dtype=` as well."""
    with pytest.raises(CoterieError, match="expected one of float64, float32, bfloat16, float16"):
        load(changed(ours, tmp_path, dtype=dtype))
    with pytest.raises(CoterieError, match="expected one of float64"):
        load(ours, dtype="x")


def test_what_the_library_raises_is_our_error(ours, monkeypatch):
    """Its reader of files may refuse what ours accepts."""

    def refuse(*_):
        raise RuntimeError("a header it does not like\nand more")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    with pytest.raises(CoterieError, match=r"cannot load it \(RuntimeError: a header it does not like\)$"):
        load(ours)


def test_constants_of_another_width_are_refused(tiny_checkpoint, tmp_path):
    """Rows of 1 would be added to every value of a hidden state of 32."""
    folder = tiny_checkpoint("olmoe")
    apply(folder, {"layers": {"0": {"kept": [1, 3], "removed": "null"}}}, tmp_path / "out")
    tensors, said = tiny.read(tmp_path / "out")
    tensors["model.layers.0.mlp.experts.constants"] = tensors["model.norm.weight"][:6, None].copy()
    tiny.write(tmp_path / "narrow", tensors, said)
    with pytest.raises(CoterieError, match=r"constants': shape \[6, 1\]; expected rows of 32"):
        load(tmp_path / "narrow")


def test_a_model_is_not_built_for_routes_before_its_sizes_are_checked(tiny_checkpoint):
    """Ten million layers are refused, not counted up to."""
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    with pytest.raises(CoterieError, match="num_hidden_layers 10000000"):
        check_routable(replace(checkpoint, config=checkpoint.config | {"num_hidden_layers": 10**7}), ["0"])
