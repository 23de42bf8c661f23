"""Opening a checkpoint: what a safetensors file and a model folder may hold, and that anything else is refused."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file as save_torch

from coterie.errors import CoterieError
from coterie.storage.checkpoint import BITS, INDEX, Checkpoint, load_json, read_header, resolve
from handmade import qwen, qwen_config, save

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def pack(header, data=bytes(11), length=None):
    """A safetensors file: the header's length, the header (JSON text or an object), the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def read(raw):
    """The header of a file with these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(raw)
        return read_header(path)


# --- one file ----------------------------------------------------------------------------------------------


def test_a_header_gives_names_dtypes_shapes_and_places():
    """Offsets count from the beginning of the file; tensors come in file order; metadata stays apart."""
    tensors, metadata = read(pack({"b": B, "a": A, "__metadata__": {"format": "pt"}}))
    assert list(tensors) == ["a", "b"] and metadata == {"format": "pt"}
    a, b = tensors.values()
    assert (a.dtype, a.shape, a.num_bytes, a.num_parameters) == ("F32", (2,), 8, 2)
    assert b.start == a.end and b.end - b.start == 3 and b.file == "x.safetensors"


FAULTS = {
        "empty file": (b"", "truncated"),
        "seven bytes": (b"\x00" * 7, "truncated"),
        "header longer than the file": (pack({"a": A}, length=10_000), "header claims 10,000"),
        "header length of 2^64 - 1": (b"\xff" * 8 + b"{}", "truncated or not safetensors"),
        "no header": (pack(b"", b""), "not valid JSON"),
        "a list": (pack([]), "found a JSON list, expected an object"),
        "not JSON": (pack(b"{'a': 1}"), "not valid JSON"),
        "invalid UTF-8": (pack(b'{"\xff": 1}'), "not valid JSON"),
        "half a surrogate pair": (pack(b'{"\\ud800": 1}'), "surrogate"),
        "deep nesting": (pack(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested"),
        "nesting too deep to copy": (pack(b'{"a":' + b"[" * 700 + b"]" * 700 + b"}"), "nested"),
        "huge integer": (pack(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        "duplicate name": (pack(b'{"a": 1, "a": 2}'), "key 'a' appears twice"),
        "duplicate key": (pack(b'{"a": {"dtype": "U8", "dtype": "F32"}}'), "key 'dtype' appears twice"),
        "metadata is a list": (pack({"__metadata__": []}), "__metadata__ must map"),
        "metadata value is a number": (pack({"__metadata__": {"a": 1}}), "__metadata__ must map"),
        "entry is a number": (pack({"a": 1}), "tensor 'a': expected an object"),
        "entry lacks its shape": (pack({"a": {"dtype": "U8", "data_offsets": [0, 1]}}), "expected an object with"),
        "entry has a key too many": (pack({"a": A | {"x": 1}}), "expected an object with"),
        "unknown dtype": (pack({"a": A | {"dtype": "F33"}}), "unknown dtype 'F33'"),
        "dtype is a list": (pack({"a": A | {"dtype": ["F32"]}}), "unknown dtype"),
        "shape is a number": (pack({"a": A | {"shape": 2}}), "shape must be a list"),
        "shape with a boolean": (pack({"a": B | {"shape": [True], "data_offsets": [0, 1]}}), "shape must be a list"),
        "shape with a float": (pack({"a": A | {"shape": [2.0]}}), "shape must be a list"),
        "negative shape": (pack({"a": A | {"shape": [-2]}}), "shape must be a list"),
        "shape beyond 63 bits": (pack({"a": A | {"shape": [2**63]}}), "shape must be a list"),
        "more elements than a float can count": (pack({"a": A | {"shape": [2**62] * 40}}), "data_offsets give 8"),
        "sixty-five axes": (pack({"a": A | {"shape": [1] * 65}}), "shape must be a list"),
        "offsets with a boolean": (pack({"a": A | {"data_offsets": [False, 8]}}), "data_offsets must be"),
        "three offsets": (pack({"a": A | {"data_offsets": [0, 4, 8]}}), "data_offsets must be"),
        "offsets backwards": (pack({"a": A | {"data_offsets": [8, 0]}}), "data_offsets must be"),
        "shape needs more bytes": (pack({"a": A | {"shape": [3]}}, bytes(8)), "needs 12 bytes, data_offsets give 8"),
        "half a byte": (pack({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"1"), "needs 1.5 bytes"),
        "overlap": (pack({"a": A, "b": B | {"data_offsets": [7, 10]}}), "'b' overlaps the tensor before it"),
        "hole": (pack({"a": A, "b": B | {"data_offsets": [9, 12]}}, bytes(12)), "'b' leaves a hole before it"),
        "hole at the beginning": (pack({"b": B}), "'b' leaves a hole before it"),
        "beyond the end of the file": (pack({"a": A, "b": B}, bytes(10)), "truncated"),
        "trailing bytes": (pack({"a": A, "b": B}, bytes(12)), "trailing bytes"),
        "trailing bytes without tensors": (pack({}, b"x"), "trailing bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_file_is_refused_with_its_fault(raw, fault):
    """Each way in which a header can lie is told apart, and the file is named."""
    with pytest.raises(CoterieError, match=fault) as caught:
        read(raw)
    assert "x.safetensors" in str(caught.value)


def test_a_header_over_the_limit_is_not_read(tmp_path):
    """A header of more than 100 MB is refused by its length, not parsed."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)
    with pytest.raises(CoterieError, match="expected at most 100,000,000"):
        read_header(path)


def test_what_is_not_a_file_is_refused(tmp_path):
    """A missing file and a folder become our error, which names them."""
    for path in (tmp_path, tmp_path / "missing.safetensors"):
        with pytest.raises(CoterieError, match="cannot be read"):
            read_header(path)


def test_empty_tensors_and_scalars_have_a_place():
    """A shape with a zero takes no bytes, and the shape [] one value."""
    none = {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]}
    scalar = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    tensors, _ = read(pack({"scalar": scalar, "none": none}, bytes(4)))
    assert (tensors["none"].num_bytes, tensors["scalar"].num_parameters) == (0, 1)


def only_our_error(action):
    try:
        return action()
    except CoterieError:
        return None


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_header_or_our_error(raw):
    """Whatever a file holds, the reader answers with tensors or a CoterieError."""
    only_our_error(lambda: read(raw))
    only_our_error(lambda: read(pack(raw, b"")))


@given(st.dictionaries(st.text(), JSON, max_size=3), st.binary(max_size=20))
def test_arbitrary_json_is_a_header_or_our_error(header, data):
    """So it does for any JSON in the place of the header."""
    only_our_error(lambda: read(pack(header, data)))


@given(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON | st.lists(st.integers(0, 12), max_size=3))
def test_a_valid_header_with_one_value_changed(key, value):
    """A changed value either describes the same bytes as consistently, or is refused."""
    found = only_our_error(lambda: read(pack({"a": A | {key: value}, "b": B})))
    if found:
        for tensor in found[0].values():
            assert tensor.num_parameters * BITS[tensor.dtype] == 8 * tensor.num_bytes


@given(st.data())
def test_a_valid_file_with_bytes_changed_or_cut(data):
    """Bit rot in the header, and files cut anywhere, never raise anything else."""
    raw = bytearray(pack({"a": A, "b": B, "__metadata__": {"format": "pt"}}))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    only_our_error(lambda: read(bytes(raw[: data.draw(st.integers(0, len(raw)))])))
    only_our_error(lambda: read(bytes(raw)))


def torch_dtypes():
    names = (
        "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex64 "
        "float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz"
    )
    return [getattr(torch, name) for name in names.split()]


@pytest.mark.parametrize("dtype", torch_dtypes(), ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3, 4)], ids=str)
def test_what_torch_saves_is_read_back_bit_for_bit(tmp_path, dtype, shape):
    """Names, shapes, dtypes and bytes agree with what the safetensors library wrote."""
    raw = np.random.default_rng(0).integers(0, 2, math.prod(shape) * dtype.itemsize, np.uint8)
    values = (
        torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if raw.size else torch.empty(shape, dtype=dtype)
    )
    save_torch({"a": values, "b": torch.ones(5, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors["a"].shape == shape
    assert checkpoint.raw("a") == raw.tobytes() and checkpoint.raw("b") == b"\1" * 5


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("fiu?"), st.lists(st.integers(0, 3), max_size=3)), min_size=1, max_size=5))
def test_what_numpy_saves_is_read_back(tmp_path, kinds):
    """Any mixture of dtypes and shapes reads back equal, and rows read alone equal the rows of the whole."""
    draw = np.random.default_rng(0)
    arrays = {
        f"t{i}.weight": draw.integers(0, 2, shape).astype({"f": "f4", "i": "i8", "u": "u2", "?": "?"}[kind])
        for i, (kind, shape) in enumerate(kinds)
    }
    save_numpy(arrays, tmp_path / "model.safetensors", metadata={"format": "np"})
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.metadata == {"model.safetensors": {"format": "np"}}
    assert checkpoint.num_bytes == sum(a.nbytes for a in arrays.values())
    assert checkpoint.num_parameters == sum(a.size for a in arrays.values())
    for name, values in arrays.items():
        found = checkpoint.read(name)
        assert found.dtype == values.dtype and np.array_equal(found, values)
        if values.ndim and values.shape[0] > 1:
            assert np.array_equal(checkpoint.read_rows(name, 1, 2), values[1:2])


# --- a folder ----------------------------------------------------------------------------------------------

TENSORS = [{"a": np.ones(2, np.float32)}, {"b": np.ones(3, np.float32)}]
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model", qwen_config(), TENSORS)


def reindex(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_folder_with_an_index(folder):
    """The shards come sorted, each tensor knows its shard, and nothing is loaded."""
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.shards == (ONE, TWO) and checkpoint.indexed
    assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == {"a": ONE, "b": TWO}
    assert checkpoint.metadata[TWO] == {"format": "pt", "part": "2"}


def test_a_single_file_beats_others_without_an_index(tmp_path):
    """Without an index model.safetensors is the checkpoint, and other files are only files."""
    save(tmp_path, qwen_config(), [TENSORS[0]])
    save_numpy(TENSORS[1], tmp_path / "consolidated.safetensors")
    assert Checkpoint.open(tmp_path).shards == ("model.safetensors",)


def test_numbered_shards_need_no_index(tmp_path):
    """Shards without an index are all read."""
    checkpoint = Checkpoint.open(save(tmp_path, qwen_config(), TENSORS, index=False))
    assert checkpoint.shards == (ONE, TWO) and not checkpoint.indexed


def test_an_index_naming_a_missing_tensor(folder):
    """A tensor that the index places in a shard must be there."""
    reindex(folder, {"a": ONE, "b": TWO, "c": TWO})
    with pytest.raises(CoterieError, match=f"says tensor 'c' is in {TWO}"):
        Checkpoint.open(folder)


def test_an_index_naming_the_wrong_shard(folder):
    """A tensor in another shard than the index says is as wrong as a missing one."""
    reindex(folder, {"a": TWO, "b": ONE})
    with pytest.raises(CoterieError, match="says tensor 'a' is in"):
        Checkpoint.open(folder)


def test_an_index_naming_a_missing_shard(folder):
    """A shard that is not there is named."""
    (folder / TWO).unlink()
    with pytest.raises(CoterieError, match=f"{TWO}: missing, though the index names it"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "names",
    [{"a": TWO, "b": ONE}, {"a": ONE, "b": TWO, "c": TWO}, {"a": "old-1.safetensors", "b": "old-2.safetensors"}],
)
def test_a_stale_index_can_be_deleted(folder, names):
    """Where files were saved anew below an index, its error says what helps, and it does."""
    reindex(folder, names)
    with pytest.raises(CoterieError, match=f"delete {INDEX}"):
        Checkpoint.open(folder)
    (folder / INDEX).unlink()
    assert set(Checkpoint.open(folder).tensors) == {"a", "b"}


def test_a_file_beside_the_shards_of_a_stale_index(folder):
    """model.safetensors is then the whole model; without it, what is left of the shards is not."""
    (folder / TWO).unlink()
    with pytest.raises(CoterieError, match=r"download it again$"):
        Checkpoint.open(folder)
    save_numpy(TENSORS[0] | TENSORS[1], folder / "model.safetensors")
    with pytest.raises(CoterieError, match=rf"saved anew as model\.safetensors, delete {INDEX}"):
        Checkpoint.open(folder)
    (folder / INDEX).unlink()
    assert set(Checkpoint.open(folder).tensors) == {"a", "b"}


def test_an_adapter_is_refused(folder):
    """Beside the weights of its model, which are not what transformers loads then, or alone: it is to be merged."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/name"}')
    save_numpy({"x.lora_A.weight": np.ones(2, np.float32)}, folder / "adapter_model.safetensors")
    with pytest.raises(CoterieError, match=r"adapter_config\.json: an adapter beside the weights.*; merge it first"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CoterieError, match="an adapter without its model"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors", "a/b.safetensors", "/etc/x.safetensors", "..", "", "model.bin", "a\\b.safetensors",
        "a\x00.safetensors", "a\n.safetensors", "\x1b[2J.safetensors", "a\u202e.safetensors", 1, None, ["x"], {},
    ],
)  # fmt: skip
def test_an_index_naming_something_other_than_a_plain_file(folder, shard):
    """Paths, control characters and other suffixes never reach the file system."""
    reindex(folder, {"a": shard})
    with pytest.raises(CoterieError, match=r"expected a plain \*.safetensors name"):
        Checkpoint.open(folder)


def test_an_index_naming_an_impossibly_long_file(folder):
    """A name that no file system takes is a missing shard."""
    reindex(folder, {"a": "a" * 400 + ".safetensors"})
    with pytest.raises(CoterieError):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", '{"weight_map": null}']
)
def test_an_index_without_a_map(folder, content):
    """An index file that maps nothing is refused, not ignored."""
    (folder / INDEX).write_text(content)
    with pytest.raises(CoterieError, match=r"index\.json"):
        Checkpoint.open(folder)


def test_a_tensor_in_two_shards(folder):
    """Two tensors of one name would hide one another."""
    save_numpy(TENSORS[0] | TENSORS[1], folder / TWO)
    with pytest.raises(CoterieError, match=f"tensor 'a' is in {ONE} and again in {TWO}"):
        Checkpoint.open(folder)


def test_only_pickles(tmp_path):
    """Pickled weights are never opened; the error says how to convert them."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CoterieError, match=r"only pickled weights \(pytorch_model.bin\), which can run code"):
        Checkpoint.open(tmp_path)


def test_no_weights(tmp_path):
    """A folder with a config alone is no checkpoint."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CoterieError, match=r"no \*\.safetensors file"):
        Checkpoint.open(tmp_path)


def test_no_config(folder):
    """A folder without config.json is refused, and so is one where it is a folder."""
    (folder / "config.json").unlink()
    with pytest.raises(CoterieError, match=r"no config\.json"):
        Checkpoint.open(folder)
    (folder / "config.json").mkdir()
    with pytest.raises(CoterieError, match=r"no config\.json"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'"x"', b"\xff\xfe{}", b"{" * 99_999, b'{"a": 1, "a": 1}'])
def test_a_config_that_is_not_one_object(folder, content):
    """config.json must hold one JSON object; the file is named."""
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CoterieError, match=r"config\.json: "):
        Checkpoint.open(folder)


@given(st.binary(max_size=60))
def test_arbitrary_json_files_are_an_object_or_our_error(raw):
    """The JSON reader has two answers, whatever the bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.json")
        path.write_bytes(raw)
        assert isinstance(only_our_error(lambda: load_json(path)), dict | None)


def test_a_json_file_over_its_limit(tmp_path):
    """JSON of absurd size is refused by its size, not read."""
    path = tmp_path / "x.json"
    path.write_text('{"a": "%s"}' % ("x" * 100))
    with pytest.raises(CoterieError, match="109 bytes of JSON; expected at most 108"):
        load_json(path, limit=108)
    assert load_json(path, limit=109)


def test_a_file_cut_after_it_was_opened(folder):
    """Reading past the end of a file that changed is an error, not a short answer."""
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / TWO, 20)
    with pytest.raises(CoterieError, match="ended while reading 'b'"):
        checkpoint.raw("b")
    (folder / TWO).unlink()
    with pytest.raises(CoterieError, match="cannot be read"):
        checkpoint.raw("b")
    with pytest.raises(CoterieError, match="cannot be read"):
        _ = checkpoint.hash


def test_the_fingerprint_tells_checkpoints_apart(tmp_path):
    """Equal files give equal fingerprints wherever they are; a changed weight, name or config another."""
    first = Checkpoint.open(qwen(tmp_path / "a")).hash
    assert Checkpoint.open(qwen(tmp_path / "b")).hash == first
    assert Checkpoint.open(qwen(tmp_path / "c", seed=1)).hash != first
    assert Checkpoint.open(qwen(tmp_path / "d", vocab_size=6)).hash != first
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "other.safetensors")
    assert Checkpoint.open(tmp_path / "a").hash != first


# --- links and the hub's cache -----------------------------------------------------------------------------


def test_a_shard_linked_to_elsewhere_is_refused(folder, tmp_path):
    """A link out of the folder could show any file of the machine: refused, naming its target."""
    (folder / TWO).rename(tmp_path / "elsewhere.safetensors")
    (folder / TWO).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CoterieError, match=r"a link to .*elsewhere\.safetensors, outside the model's folder"):
        Checkpoint.open(folder)


def test_a_shard_linked_inside_the_folder(folder):
    """A link to a file of the same folder is fine."""
    (folder / TWO).rename(folder / "data")
    (folder / TWO).symlink_to("data")
    assert "b" in Checkpoint.open(folder).tensors


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    """What the user names may be a link: only shards are judged."""
    (tmp_path / "link").symlink_to(folder)
    assert "b" in Checkpoint.open(tmp_path / "link").tensors


REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(folder, tmp_path):
    """The hub's cache with one model `owner/name`: blobs, and a snapshot of links to them."""
    repo = tmp_path / "cache" / "models--owner--name"
    snapshot = repo / "snapshots" / REVISION
    for path in (repo / "blobs", repo / "refs", snapshot):
        path.mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repo / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return tmp_path / "cache"


def test_a_snapshot_of_the_hubs_cache_opens(cache):
    """Links from a snapshot to the blobs beside it are the hub's own layout."""
    checkpoint = Checkpoint.open(cache / "models--owner--name" / "snapshots" / REVISION)
    assert np.array_equal(checkpoint.read("b"), [1, 1, 1])


def test_a_snapshot_linking_out_of_its_cache_is_refused(cache, tmp_path):
    """Links from a snapshot to anywhere else are refused as in any folder."""
    shard = cache / "models--owner--name" / "snapshots" / REVISION / TWO
    (tmp_path / "x.safetensors").write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(tmp_path / "x.safetensors")
    with pytest.raises(CoterieError, match="outside the model's folder"):
        Checkpoint.open(shard.parent)


def test_a_hub_id_is_found_in_the_cache_without_network(cache, tmp_path):
    """`owner/name` opens from HF_HUB_CACHE with HF_HUB_OFFLINE=1, in a fresh process and without a word."""
    code = (
        "from coterie.storage.checkpoint import Checkpoint; c = Checkpoint.open('owner/name'); "
        "print(c.path, sorted(c.tensors))"
    )
    env = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split(maxsplit=1) == [
        str(cache / "models--owner--name" / "snapshots" / REVISION),
        "['a', 'b']\n",
    ]
    assert done.stderr == ""


def test_a_hub_id_that_is_not_in_the_cache(cache, monkeypatch, tmp_path):
    """Offline, an unknown hub id is refused as neither a folder nor known to the hub."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("owner/name") == cache / "models--owner--name" / "snapshots" / REVISION
    assert resolve(f"owner/name@{REVISION}") == resolve("owner/name@main") == resolve("owner/name")
    for other in ("owner/other", "owner/name@v2"):
        with pytest.raises(CoterieError, match=f"{other}: not a folder, and the hub did not give it"):
            resolve(other)


def test_a_folder_beats_a_hub_id(cache, monkeypatch, tmp_path):
    """A local folder `owner/name` is taken before the hub is asked."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")


@pytest.mark.parametrize(
    "model", ["", "name", "/no/such", "./no/such", "~/x", "a/b/c", "a/" + "b" * 5000, "a\0/b", "a/b\0"]
)
def test_what_is_neither_a_folder_nor_a_hub_id(model):
    """Anything else is refused before the hub is asked; the empty name is not the current folder."""
    with pytest.raises(CoterieError):
        resolve(model)


def test_a_file_is_no_model(tmp_path):
    """A file where a folder was expected is called a file."""
    (tmp_path / "x.gguf").touch()
    with pytest.raises(CoterieError, match="found a file; expected a model folder"):
        resolve(tmp_path / "x.gguf")
