"""What `sparsify` refuses: by name, with what was found, and mostly before a byte is written."""

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from coterie.errors import CoterieError
from coterie.verbs.sparsify import sparsify

CALIBRATED = ("wanda", "owl", "moe-pruner", "sparsegpt")


def lines(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """8 samples of 16 token ids."""
    ids = np.random.default_rng(0).integers(3, 120, (8, 16)).tolist()
    return {"a": lines(tmp_path_factory.mktemp("data") / "ids.jsonl", *({"input_ids": row} for row in ids))}


@pytest.fixture
def reader(tiny_checkpoint, tmp_path):
    """A checkpoint with a tokenizer, one token a word."""
    folder = tmp_path / "reader"
    shutil.copytree(tiny_checkpoint("qwen3_moe"), folder)
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "word": 5}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def refused(folder, tmp_path, match, **options):
    """Refused with these words before anything is written: neither OUT nor OUT.partial is there."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CoterieError, match=match):
        sparsify(folder, tmp_path / "out", **options)
    assert sorted(tmp_path.rglob("*")) == before


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", r"a\.txt: the file is empty"),
        ("a.txt", " \n\n ", r"a\.txt: no tokens"),
        ("a.jsonl", '{"text": ""}\n{"text": " "}\n', r"a\.jsonl:1: no tokens"),
        ("a.jsonl", "\n\n", r"a\.jsonl: found blank lines only"),
        ("a.jsonl", '{"input_ids": [5]}\n{"input_ids": []}\n', r"a\.jsonl:2: 'input_ids' is empty"),
        ("a.jsonl", '{"input_ids": [5]}\n{"input_ids": [5, -1]}\n', r"a\.jsonl:2: 'input_ids' holds -1"),
        ("a.jsonl", '{"input_ids": [5]}\n{"text": "word"}\n', r"a\.jsonl:2: found texts and token ids"),
        ("a.jsonl", '{"input_ids": [5]\n', r"a\.jsonl:1: not JSON"),
        ("a.jsonl", '{"prompt": "word", "answer": "4"}\n', r"a\.jsonl:1: problems are for eval"),
    ],
)
def test_data_without_tokens_or_sense_is_refused(reader, tmp_path, name, content, says):
    """Naming the file, and the line where there are lines."""
    (tmp_path / name).write_text(content)
    refused(reader, tmp_path, says, data={"a": tmp_path / name})


def test_text_without_a_tokenizer_is_refused(tiny_checkpoint, tmp_path):
    """Tiny checkpoints have none."""
    (tmp_path / "a.txt").write_text("word " * 20)
    refused(tiny_checkpoint("qwen3_moe"), tmp_path, "tokenizer", data={"a": tmp_path / "a.txt"})


def test_sequences_longer_than_the_model_are_refused(tiny_checkpoint, tmp_path):
    """Naming line and both numbers: 129 token ids for 128 positions; 128 fit."""
    path = lines(tmp_path / "ids.jsonl", {"input_ids": [5] * 128}, {"input_ids": [5] * 129})
    says = r"ids\.jsonl:2: 129 token ids; the model has 128 positions"
    refused(tiny_checkpoint("qwen3_moe"), tmp_path, says, data={"a": path})
    lines(path, {"input_ids": [5] * 128})
    assert sparsify(tiny_checkpoint("qwen3_moe"), tmp_path / "out", data={"a": path}).report


def test_token_ids_beyond_the_vocabulary_are_refused(tiny_checkpoint, tmp_path):
    """An id that the embedding has no row for."""
    path = lines(tmp_path / "ids.jsonl", {"input_ids": [5, 6]}, {"input_ids": [5, 128]})
    says = "token id 128; expected one id or more, all below 128"
    refused(tiny_checkpoint("qwen3_moe"), tmp_path, says, data={"a": path})


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "astrology"}, "'astrology': unknown; expected one of magnitude, moe-pruner, owl, sparsegpt, wanda"),
        ({"dtype": "int3"}, "'int3': unknown; expected one of auto, float32"),
        ({"samples": 0}, "--samples 0: expected a whole number, at least 1"),
        ({"seq_len": 0}, "--seq-len 0"),
        ({"seed": -1}, "--seed -1"),
        ({"min_tokens": 0}, "--min-tokens 0"),
        ({"sparsity": 1.0}, r"1\.0: the share of zeros must be in \[0, 1\)"),
        ({"sparsity": -0.1}, r"-0\.1: the share of zeros"),
        ({"pattern": "4:2"}, "'4:2': expected n:m"),
        ({"pattern": "2:4:8"}, "'2:4:8': expected n:m"),
        ({"method": "owl", "pattern": "2:4"}, "use wanda"),
        ({"method": "magnitude"}, "would be ignored"),
        ({"data": {"a": "missing.txt"}}, r"missing\.txt: no such file"),
        ({"data": ["missing.txt"]}, r"missing\.txt: no such file"),
    ],
)
def test_bad_options_leave_nothing_behind(tiny_checkpoint, tmp_path, data, options, says):
    """Unknown names, numbers out of range, and options that exclude each other."""
    refused(tiny_checkpoint("qwen3_moe"), tmp_path, says, **{"data": data} | options)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "moe-pruner", "sparsegpt"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_pattern_that_does_not_divide_the_columns_is_refused(tiny_checkpoint, tmp_path, data, model_type, method):
    """Rows of 32 and 16 or 48 weights: no groups of five; and 16 do not make groups of 32, where 32 do."""
    given = {} if method == "magnitude" else {"data": data}
    for pattern in ("2:5", "16:32"):
        says = f"pattern {pattern}: rows of (32|16|48) weights do not divide"
        refused(tiny_checkpoint(model_type), tmp_path, says, method=method, pattern=pattern, **given)


@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "deepseek"])
def test_families_that_cannot_be_calibrated_are_refused(tiny_checkpoint, tmp_path, data, model_type):
    """With the advice to use a method that needs no data, which works."""
    refused(tiny_checkpoint(model_type), tmp_path, "needs no data", data=data)
    assert sparsify(tiny_checkpoint(model_type), tmp_path / "out", method="magnitude", sparsity=0.5).report


def test_layers_that_pass_more_than_hidden_states_are_refused(tiny_checkpoint, tmp_path, data):
    """Though it takes the data to see it."""
    refused(tiny_checkpoint("glm_moe_dsa"), tmp_path, "more than hidden states.*needs no data", data=data)


# --- damaged weights ----------------------------------------------------------------------------------------------


def damaged(folder, source, name, value, place=0):
    """A copy of a checkpoint with one weight of one tensor replaced."""
    tensors, config = tiny.read(source)
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[place] = value
    return tiny.write(folder, tensors, config)


@pytest.mark.parametrize("method", ["magnitude", *CALIBRATED])
@pytest.mark.parametrize(
    ("model_type", "name", "value"),
    [
        ("qwen3_moe", "model.layers.2.mlp.experts.3.down_proj.weight", np.nan),
        ("gpt_oss", "model.layers.2.mlp.experts.gate_up_proj", -np.inf),
    ],
)
def test_bad_expert_weights_are_refused(tiny_checkpoint, tmp_path, data, model_type, name, value, method):
    """Naming the layer, by every method; no OUT."""
    folder = damaged(tmp_path / "m", tiny_checkpoint(model_type), name, value)
    given = {} if method == "magnitude" else {"data": data}
    with pytest.raises(CoterieError, match=r"layer 2\D.*(NaN|infinite)"):
        sparsify(folder, tmp_path / "out", method=method, **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("method", ["wanda", "owl"])
@pytest.mark.parametrize("part", ["self_attn.v_proj", "mlp.gate"])
@pytest.mark.parametrize("layer", [0, 3])
def test_bad_weights_beside_the_experts_are_refused(tiny_checkpoint, tmp_path, data, layer, part, method, value):
    """Activations or the router's weights become NaN, in the first layer or the last: it is named; no OUT."""
    source = tiny_checkpoint("qwen3_moe")
    folder = damaged(tmp_path / "m", source, f"model.layers.{layer}.{part}.weight", value)
    with pytest.raises(CoterieError, match=rf"layer {layer}\D.*(NaN|infinite)"):
        sparsify(folder, tmp_path / "out", method=method, data=data)
    assert not (tmp_path / "out").exists()


def test_experts_that_no_token_meets_are_checked(tiny_checkpoint, tmp_path):
    """One token visits two of eight experts; each of them may hold the infinity."""
    path = lines(tmp_path / "ids.jsonl", {"input_ids": [5]})
    for e in range(tiny.NUM_EXPERTS):
        name = f"model.layers.1.mlp.experts.{e}.up_proj.weight"
        folder = damaged(tmp_path / f"m{e}", tiny_checkpoint("qwen3_moe"), name, np.inf)
        with pytest.raises(CoterieError, match=rf"layer 1, expert {e}\D.*(NaN|infinite)"):
            sparsify(folder, tmp_path / f"out{e}", data={"a": path})


def test_activations_too_large_for_float16_are_refused(tiny_checkpoint, tmp_path, data):
    """Weights are finite; the products are not: float32 is advised, and works."""
    tensors, config = tiny.read(tiny_checkpoint("qwen3_moe"))
    tensors |= {n: 3e4 * v for n, v in tensors.items() if ".layers.1.mlp.experts." in n}
    folder = tiny.write(tmp_path / "m", tensors, config)
    with pytest.raises(CoterieError, match=r"layer 1\D.*need float32"):
        sparsify(folder, tmp_path / "out", data=data, dtype="float16")
    shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    assert sparsify(folder, tmp_path / "out", data=data, dtype="float32").report
