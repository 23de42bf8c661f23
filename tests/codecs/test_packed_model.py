"""A checkpoint whose zeros are packed is a model like any other: every command gives what it gives on the dense one."""

import json
import re
import shutil

import numpy as np
import pytest

import coterie
import tiny
from coterie import codecs
from coterie.codecs.bits import GROUP, quantise
from coterie.codecs.open import opened
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.model.stats import Stats
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.planned import view
from coterie.storage.shards import whole


@pytest.fixture(scope="module", params=[False, True], ids=["numbered", "fused"])
def home(request, tiny_checkpoint, tmp_path_factory):
    """A folder with `dense`, half of its expert weights zero, `packed`, and `unpacked` again; to be read only."""
    folder = tmp_path_factory.mktemp("packed-model")
    coterie.sparsify(tiny_checkpoint("qwen3_moe", request.param), folder / "dense", method="magnitude", sparsity=0.5)
    coterie.pack(folder / "dense", folder / "packed")
    coterie.unpack(folder / "packed", folder / "unpacked")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few token sequences."""
    path = tmp_path_factory.mktemp("ids") / "ids.jsonl"
    lines = ({"input_ids": [(7 * i + j) % 120 + 3 for j in range(24)]} for i in range(4))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"data": [f"a={path}"], "samples": 4, "seq_len": 24}


@pytest.fixture(scope="module")
def stats(home, data):
    """Statistics of the packed and of the dense folder."""
    found = {}
    for name in ("packed", "unpacked"):
        found[name] = home / f"{name}-stats"
        coterie.collect(home / name, found[name], **data)
    return found


def written(folder):
    """Tensors and config: all that a loader reads."""
    checkpoint = Checkpoint.open(folder)
    tensors = {n: (t.dtype, t.shape, t.file, checkpoint.raw(n)) for n, t in checkpoint.tensors.items()}
    return list(tensors.items()), checkpoint.config, checkpoint.metadata


def same(home, tmp_path, act):
    """Runs act(MODEL, OUT) on both; the packed folder's result is the dense one's, and says what it was made from."""
    act(home / "packed", tmp_path / "a")
    act(home / "unpacked", tmp_path / "b")
    assert written(tmp_path / "a") == written(tmp_path / "b")
    a, b = (json.loads((tmp_path / name / "coterie.json").read_text()) for name in ("a", "b"))
    assert cleaned(a["plan"]) == cleaned(b["plan"]) and a["report"]["sparsity"] == b["report"]["sparsity"]
    assert a["source"]["hash"] == Checkpoint.open(home / "packed").hash != b["source"]["hash"]
    assert a["report"]["after"] == b["report"]["after"]
    assert a["report"]["before"]["parameters"] == b["report"]["before"]["parameters"]
    assert a["report"]["before"]["bytes"] == Checkpoint.open(home / "packed").num_bytes
    result = coterie.verify(tmp_path / "a", against=home / "packed")
    assert result["ok"], result
    return tmp_path / "a"


# --- what rewrites a checkpoint -----------------------------------------------------------------------------------


def test_prune_writes_the_bytes_that_it_writes_of_the_dense_one(home, tmp_path):
    """From router rows alone, and an experts' representative chosen from their weights."""
    same(home, tmp_path, lambda model, out: coterie.prune(model, out, ratio=0.25))


def test_a_criterion_reads_the_statistics_of_the_packed_model(home, tmp_path, stats):
    """REAP, by statistics that carry the packed folder's fingerprint."""

    def act(model, out):
        coterie.prune(model, out, method="reap", stats=stats[model.name], ratio=0.25)

    same(home, tmp_path, act)


def test_routers_that_keep_rows_for_experts_that_are_gone(home, tmp_path, stats):
    """With constants, in our own layout."""

    def act(model, out):
        coterie.prune(model, out, method="mone", stats=stats[model.name], ratio=0.25)

    same(home, tmp_path, act)


def test_merge_averages_what_is_packed(home, tmp_path, data):
    """Members are decoded when their mean is taken."""
    same(home, tmp_path, lambda model, out: coterie.merge(model, out, experts=6, **data))


def test_apply_executes_a_plan_on_the_packed_model(home, tmp_path):
    """One that was made on the dense one."""
    plan = coterie.prune(home / "unpacked", tmp_path / "plan", ratio=0.5).as_dict()
    same(home, tmp_path, lambda model, out: coterie.apply(model, plan, out))


@pytest.mark.parametrize("verb", ["sparsify", "stun", "condense", "drop"])
def test_commands_that_compute_weights(home, tmp_path, data, verb):
    """More zeros, condensed layers, dropped layers."""
    act = {
        "sparsify": lambda model, out: coterie.sparsify(model, out, method="wanda", sparsity=0.7, **data),
        "stun": lambda model, out: coterie.stun(model, out, sparsity=0.7, **data),
        "condense": lambda model, out: coterie.condense(model, out, layer_ids=[1], **data),
        "drop": lambda model, out: coterie.drop(model, out, count=1, **data),
    }[verb]
    same(home, tmp_path, act)


def test_saving_sparse_from_a_packed_model(home, tmp_path):
    """Zeros stay packed: the result is that of the dense one, packed."""
    for name in ("packed", "unpacked"):
        coterie.prune(home / name, tmp_path / name, ratio=0.25, save="sparse")
    assert written(tmp_path / "packed") == written(tmp_path / "unpacked")


def test_in_place_is_refused_for_its_own_reason(home, tmp_path):
    """The bytes of a packed model are not OUT's; it stays as it was."""
    shutil.copytree(home / "packed", tmp_path / "model")
    with pytest.raises(CoterieError, match=r"--in-place: .* is computed, not copied"):
        coterie.prune(tmp_path / "model", tmp_path / "out", ratio=0.25, in_place=True)
    assert written(tmp_path / "model") == written(home / "packed") and not (tmp_path / "out").exists()


# --- what measures ------------------------------------------------------------------------------------------------


def test_collect_measures_the_same_numbers(home, stats):
    """Every sum of every layer, under another fingerprint."""
    packed, dense = (Stats.load(stats[name]) for name in ("packed", "unpacked"))
    assert packed.model == Checkpoint.open(home / "packed").hash != dense.model
    assert packed.sums.keys() == dense.sums.keys() and packed.sums
    assert all(np.array_equal(packed.sums[key], values) for key, values in dense.sums.items())


def test_compare_ranks_alike(home, stats):
    """Criteria that read statistics, and those that read weights."""
    packed, dense = (coterie.compare(home / name, stats[name]) for name in ("packed", "unpacked"))
    assert cleaned(packed) == cleaned(dense)


def test_analyze_finds_the_same(home, data, tmp_path):
    """Of weights and of activations."""
    found = []
    for name in ("packed", "unpacked"):
        found.append(coterie.analyze(home / name, out=tmp_path / f"{name}.html", **data))
    assert cleaned(found[0]) == cleaned(found[1])


def cleaned(value):
    """Without paths, the commands that name them, fingerprints and times."""
    if isinstance(value, dict):
        left = {"path", "model", "out", "command", "hash", "seconds", "peak_rss_bytes", "versions", "bytes", "stats"}
        return {key: cleaned(child) for key, child in value.items() if key not in left}
    return [cleaned(child) for child in value] if isinstance(value, list) else value


def test_report_sets_a_packed_original_beside_what_was_made_of_it(home, data, tmp_path):
    """Experts, fate and losses as of the dense one; bytes are those stored."""
    coterie.prune(home / "packed", tmp_path / "out", ratio=0.25)
    file = {"a": data["data"][0].removeprefix("a=")}
    found = coterie.report(
        [home / "packed", tmp_path / "out"], tmp_path / "r.html", data=file, speed=False, dtype="float32"
    )
    dense = coterie.report([home / "unpacked"], tmp_path / "d.html", data=file, speed=False, dtype="float32")
    first, second = found["models"]
    assert first["bytes"] == Checkpoint.open(home / "packed").num_bytes
    assert first["parameters"] == dense["models"][0]["parameters"] and first["experts"] == dense["models"][0]["experts"]
    assert first["kurtosis"] == dense["models"][0]["kurtosis"] and set(second["fate"]) == {"0", "1", "2", "3"}
    losses = [m["perplexity"]["a"]["value"] for m in (first, dense["models"][0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_eval_compares_with_a_packed_original(home, data, tmp_path):
    """Same perplexity, and a router overlap that the record of the pruned model leads to."""
    coterie.prune(home / "packed", tmp_path / "out", ratio=0.25)
    found = coterie.eval(
        [home / "packed", tmp_path / "out"], data=data["data"], against=home / "packed", dtype="float32"
    )
    dense = coterie.eval([home / "unpacked"], data=data["data"], dtype="float32")
    value = dense["models"][0]["perplexity"]["a"]["value"]
    assert found["models"][0]["perplexity"]["a"]["value"] == pytest.approx(value, rel=1e-4)
    assert found["models"][1]["paired"]["router_overlap"]


def test_verify_an_unpacked_folder_against_the_packed_one(home):
    """Every byte is what the packed one stands for."""
    result = coterie.verify(home / "unpacked", against=home / "packed")
    assert result["ok"], result
    detail = next(c["detail"] for c in result["checks"] if c["name"] == "accounts for every tensor")
    assert detail == f"{len(Checkpoint.open(home / 'unpacked').tensors)} kept as is"


def test_verify_counts_what_was_kept_of_a_packed_original(home, tmp_path):
    """Decoded tensors that nothing changed are kept, not computed."""
    coterie.prune(home / "packed", tmp_path / "a", ratio=0.25)
    coterie.prune(home / "unpacked", tmp_path / "b", ratio=0.25)
    a, b = (
        {c["name"]: c["detail"] for c in coterie.verify(tmp_path / out, against=home / model)["checks"]}
        for out, model in (("a", "packed"), ("b", "unpacked"))
    )
    name = "accounts for every tensor"
    assert a[name].split(", ")[0] == b[name].split(", ")[0] and not a[name].startswith("0 kept")


# --- int8 values --------------------------------------------------------------------------------------------------


def test_int8_values_decode_to_their_products(home, tmp_path):
    """As F32: codes times scales, whole and in part; nothing else changes its dtype."""
    coterie.pack(home / "dense", tmp_path / "int8", values="int8")
    model, dense = Model.open(tmp_path / "int8").checkpoint, Checkpoint.open(home / "dense")
    rounded = [name for name, tensor in model.tensors.items() if ".experts." in name]
    assert rounded and list(model.tensors) == list(dense.tensors)
    for name in rounded:
        values = dense.read(name)
        codes, scales = quantise(values.reshape(-1, values.shape[-1]))
        expected = (codes * np.repeat(scales, GROUP, 1)[:, : values.shape[-1]]).astype(np.float32)
        assert model.tensors[name].dtype == "F32" and np.array_equal(model.read(name), expected.reshape(values.shape))
        assert model.raw(name, 4, 8) == model.raw(name)[4:12]
    coterie.prune(tmp_path / "int8", tmp_path / "out", ratio=0.25)
    assert coterie.verify(tmp_path / "out", against=tmp_path / "int8")["ok"]
    with pytest.raises(CoterieError, match="was rounded when it was packed"):
        coterie.unpack(tmp_path / "int8", tmp_path / "dense")


def damaged(packed, folder, part):
    """A copy whose first byte of a tensor is another, and the number of the expert that it belongs to."""
    shutil.copytree(packed, folder)
    checkpoint = Checkpoint.open(folder)
    tensor = next(t for n, t in checkpoint.tensors.items() if n.endswith(".values") and part in n)
    with (folder / tensor.file).open("r+b") as file:
        file.seek(tensor.start)
        file.write(b"\xff")
    found = re.search(r"experts\.(\d+)\.", tensor.name)
    return folder, int(found[1]) if found else 0


def test_a_damaged_matrix_is_refused_when_it_is_read(home, tmp_path):
    """By its name and checksum, and no OUT is left."""
    damaged(home / "packed", tmp_path / "wrong", "layers.1.")
    with pytest.raises(CoterieError, match="checksum"):
        coterie.prune(tmp_path / "wrong", tmp_path / "out", method="weight-norm", ratio=0.25)
    assert not (tmp_path / "out").exists()


def test_damage_of_what_goes_is_no_matter(home, tmp_path):
    """An expert that stays is checked before anything is written; one that goes is not read."""
    source, bad = damaged(home / "packed", tmp_path / "wrong", "layers.1.")
    without, within = (
        {"layers": {str(i): {"kept": [e for e in range(8) if e != gone]} for i in range(4)}}
        for gone in (bad, (bad + 1) % 8)
    )
    with pytest.raises(CoterieError, match="checksum"):
        coterie.apply(source, within, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    for folder, out in ((source, tmp_path / "out"), (home / "packed", tmp_path / "same")):
        coterie.apply(folder, without, out)
    assert written(tmp_path / "out") == written(tmp_path / "same")


def test_damage_is_found_under_another_model_type(tiny_checkpoint, tmp_path):
    """Of a packed model that is repackaged, before anything is written."""
    tensors, config = tiny.read(tiny_checkpoint("mixtral"))
    tiny.write(tmp_path / "original", tensors, config | {"sliding_window": None})
    coterie.sparsify(tmp_path / "original", tmp_path / "dense", method="magnitude", sparsity=0.5)
    coterie.pack(tmp_path / "dense", tmp_path / "packed")
    source, _ = damaged(tmp_path / "packed", tmp_path / "wrong", "experts.")
    with pytest.raises(CoterieError, match="checksum"):
        coterie.apply(source, {"layers": {}, "converted": "qwen2_moe"}, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_other_families_are_read_alike(tiny_checkpoint, tmp_path):
    """Transposed and interleaved experts, and a shared expert; a conversion to another type upon a packed model."""
    for model_type in ("gpt_oss", "deepseek_v3"):
        coterie.sparsify(tiny_checkpoint(model_type), tmp_path / model_type, method="magnitude", sparsity=0.5)
        coterie.pack(tmp_path / model_type, tmp_path / f"{model_type}-packed")
        coterie.unpack(tmp_path / f"{model_type}-packed", tmp_path / f"{model_type}-unpacked")
        for kind in ("packed", "unpacked"):
            coterie.prune(tmp_path / f"{model_type}-{kind}", tmp_path / f"{model_type}-{kind}-out", ratio=0.25)
        a, b = (tmp_path / f"{model_type}-{kind}-out" for kind in ("packed", "unpacked"))
        assert written(a) == written(b)
    tensors, config = tiny.read(tiny_checkpoint("mixtral"))
    tiny.write(tmp_path / "m", tensors, config | {"sliding_window": None})
    coterie.sparsify(tmp_path / "m", tmp_path / "mixtral", method="magnitude", sparsity=0.5)
    coterie.pack(tmp_path / "mixtral", tmp_path / "mixtral-packed")
    plan = {"layers": {}, "converted": "qwen2_moe"}
    for kind in ("mixtral", "mixtral-packed"):
        coterie.apply(tmp_path / kind, plan, tmp_path / f"{kind}-out")
    assert written(tmp_path / "mixtral-out") == written(tmp_path / "mixtral-packed-out")


# --- another codec ------------------------------------------------------------------------------------------------

NEGATED = """
from coterie.codecs import Codec, Coded

def read(checkpoint, place):
    name = f"{place.name}.negated"
    if name not in checkpoint.tensors:
        return None
    tensor = checkpoint.tensors[name]
    rows = lambda e: -checkpoint.read(name).reshape(-1, *tensor.shape[-2:])[e]
    return Coded(place.name, tensor.dtype, tensor.shape, (name,), tensor.num_bytes, rows)

CODEC = Codec(parts=(".negated",), read=read, method="negated")
"""


@pytest.mark.parametrize("fused", [False, True], ids=["numbered", "fused"])
def test_a_new_codec_is_one_new_file(tiny_checkpoint, tmp_path, monkeypatch, data, fused):
    """Matrices stored negated under another name: the model is inspected, pruned and measured as the plain one."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "negated.py").write_text(NEGATED)
    monkeypatch.setattr(codecs, "__path__", [*codecs.__path__, str(tmp_path / "more")])
    codecs.codecs.cache_clear()
    tensors, config = tiny.read(tiny_checkpoint("qwen3_moe", fused))
    odd = {f"{n}.negated" if ".experts." in n else n: -a if ".experts." in n else a for n, a in tensors.items()}
    models = tiny.write(tmp_path / "plain", tensors, config), tmp_path / "odd"
    tiny.write(models[1], odd, config | {"quantization_config": {"quant_method": "negated"}})
    plain, found = (coterie.inspect(model) for model in models)
    assert found["roles"] == plain["roles"] and found["packed"]["tensors"] == len(odd) - len(
        tensors.keys() & odd.keys()
    )
    for model in models:
        coterie.prune(model, tmp_path / f"{model.name}-out", ratio=0.25)
        coterie.collect(model, tmp_path / f"{model.name}-stats", **data)
    a, b = ({n: t[-1] for n, t in written(tmp_path / f"{model.name}-out")[0]} for model in models)
    assert a == b and written(tmp_path / "plain-out")[1] == written(tmp_path / "odd-out")[1]
    a, b = (Stats.load(tmp_path / f"{model.name}-stats").sums for model in models)
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert coterie.verify(tmp_path / "odd-out", against=models[1])["checks"][1]["ok"]
    codecs.codecs.cache_clear()


def test_what_a_codec_encodes_it_decodes(tiny_checkpoint, tmp_path):
    """Every codec that writes, through the parts that it makes of each expert matrix: the same bytes come back."""
    for fused in (False, True):
        dense = Model.open(tiny_checkpoint("qwen3_moe", fused)).checkpoint
        for codec in (codec for codec in codecs.codecs() if codec.encode):
            outputs = {shard: [] for shard in dense.shards}
            for name, tensor in dense.tensors.items():
                is_expert = ".experts." in name
                parts = (
                    codec.encode(name, tensor.dtype, tensor.shape, dense.raw(name)) if is_expert else [whole(tensor)]
                )
                outputs[tensor.file] += parts
            said = {"quantization_config": dict(codec.settings)} if codec.settings else {}
            found = opened(view(dense, outputs, dense.config | said))
            assert list(found.tensors) == list(dense.tensors) and found.config == dense.config
            assert all(found.raw(name) == dense.raw(name) for name in dense.tensors)
