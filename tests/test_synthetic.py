"""Synthetic checkpoints: as published models are spelled and sized, whole or with holes for weights."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import coterie
from coterie.forward.data import read_documents
from coterie.model.experts import Experts
from coterie.model.layer import Model
from coterie.storage import checkpoint
from coterie.storage.checkpoint import Checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import synthetic

SMALL = {"layers": 4, "hidden": 64, "experts": 16, "intermediate": 32, "vocabulary": 128}
# Parameters as the hub counts them (Arctic: "480B").
PUBLISHED = {
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "arctic": 478_584_608_768,
    "deepseek-v3": 684_531_386_000,
    "deepseek-v2-lite": 15_706_484_224,
}


def small(model, folder, **changes):
    return synthetic.make(model, folder / model, **(SMALL | changes))


@pytest.mark.parametrize("model", synthetic.MODELS)
@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
def test_every_model_is_recognised(model, sparse, tmp_path):
    """`inspect` knows family, layers and experts, and claims every tensor, with holes or without."""
    found = coterie.inspect(small(model, tmp_path, sparse=sparse))
    assert found["model_type"] == synthetic.MODELS[model][0]["model_type"]
    dense = {"deepseek-v3": 3, "kimi-k2": 1, "deepseek-v2-lite": 1}.get(model.removesuffix("-bf16"), 0)
    assert found["experts"] == {str(i): 16 for i in range(dense, 4)}


@pytest.mark.parametrize("model", PUBLISHED)
def test_full_sizes_are_the_published_ones(model):
    """The number of parameters is that of the model's page, to the last one."""
    config, tensors = synthetic.MODELS[model]
    assert sum(int(np.prod(spec.shape)) for spec in tensors(config)) == PUBLISHED[model]


def test_gpt_oss_has_the_published_bytes():
    """Four bits a weight and a scale for 32: the index of the model's page gives this sum."""
    config, tensors = synthetic.MODELS["gpt-oss-20b"]
    assert sum(spec.num_bytes for spec in tensors(config)) == 13_761_264_768


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v2-lite", "deepseek-v3-bf16"])
def test_a_full_one_loads_in_stock_transformers(model, tmp_path):
    """No key is missing or unexpected, and a forward pass stays finite and far from constant."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = small(model, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits = loaded(input_ids=torch.arange(40)[None], use_cache=False).logits.float()
    assert torch.isfinite(logits).all() and logits.std() > 0.1


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """Weights depend on the seed and nothing else."""
    first, again, other = (small("mixtral-8x7b", tmp_path / str(i), seed=s) for i, s in enumerate((1, 1, 2)))
    name = "model-00001-of-00001.safetensors"
    assert (first / name).read_bytes() == (again / name).read_bytes() != (other / name).read_bytes()


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "deepseek-v3"])
def test_tensors_differ_and_have_the_right_size(model, tmp_path):
    """No two matrices are alike; weights are near 1/sqrt(fan-in), with their scales where they are FP8."""
    opened = Model.open(small(model, tmp_path, hidden=256, intermediate=128))
    experts = [Experts(opened.checkpoint, block).flat(e) for block in opened.main for e in range(block.num_experts)]
    assert len({vector.tobytes() for vector in experts}) == len(experts)
    for vector in experts:
        assert 0.03 < vector.std() < 0.12  # 1/sqrt(128) and 1/sqrt(256), to the nearest power of two


def test_shards_are_cut_at_the_limit_and_indexed(tmp_path):
    """Files hold at most so many bytes, and the index says which holds what."""
    folder = small("qwen3-30b-a3b", tmp_path, shard_bytes=200_000)
    opened = Checkpoint.open(folder)
    sizes = [sum(t.num_bytes for t in opened.tensors.values() if t.file == shard) for shard in opened.shards]
    assert len(sizes) > 3 and max(sizes) <= 200_000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) and len(index["weight_map"]) == len(opened.tensors)


def test_data_need_no_tokenizer(tmp_path):
    """Samples of token ids below the vocabulary, as many and as long as asked."""
    file = synthetic.write_data(tmp_path / "ids.jsonl", vocabulary=50, samples=3, seq_len=7)
    rows = [document.input_ids for document in read_documents(file)]
    assert [len(row) for row in rows] == [7, 7, 7] and min(map(min, rows)) >= 0 and max(map(max, rows)) < 50


@pytest.mark.slow
@pytest.mark.parametrize("model", ["arctic", "kimi-k2-bf16"])
def test_a_terabyte_is_planned_from_headers_and_routers(model, tmp_path, monkeypatch):
    """At full size a dry run reads no more bytes of tensors than the routers have."""
    folder = synthetic.make(model, tmp_path / model, sparse=True)
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    assert on_disk < 600e6
    router = coterie.inspect(folder)["roles"]["router"]["bytes"]
    read, lengths = checkpoint.read_bytes, []

    def counted(path, start, length, name):
        lengths.append(length)
        return read(path, start, length, name)

    monkeypatch.setattr(checkpoint, "read_bytes", counted)
    report = coterie.prune(folder, tmp_path / "out", ratio=0.25, dry_run=True).report
    assert sum(lengths) <= router
    assert report["before"]["bytes"] > 900e9 and report["sparsity"]["experts"] == pytest.approx(0.25)
