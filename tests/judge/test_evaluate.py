"""Perplexity, exact match and tasks: against slow obvious versions, hand-sized numbers, and refusals."""

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from coterie.errors import CoterieError
from coterie.judge.quality import bootstrap_perplexity, extract_answer, normalise_answer, wilson_interval, windows
from coterie.model.loading import load
from coterie.verbs import eval as eval_verb
from coterie.verbs.eval import evaluate

CHARS = "\n +-*=.,:?0123456789" + "".join(map(chr, range(65, 91))) + "".join(map(chr, range(97, 123)))
END = "<|endoftext|>"
SIZES = {
    "vocab_size": len(CHARS) + 1,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "initializer_range": 0.5,  # far from uniform
}
EXPERTS = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
PROBLEM = "Question: Ana has 34 coins.\nWork:"


def make_tokenizer():
    """One token a character, and no padding token."""
    tokenizer = Tokenizer(models.WordLevel({END: 0} | {c: i + 1 for i, c in enumerate(CHARS)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def make_model(family="llama"):
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **EXPERTS, output_router_logits=True)).eval()


class Scripted(LlamaForCausalLM):
    """A model that answers known prompts (tuples of ids) with known continuations (lists of ids)."""

    def forward(self, input_ids, past_key_values=None, **_):
        if all(tuple(row) in self.script for row in input_ids.tolist()):
            self.rows, self.step = [self.script[tuple(row)] for row in input_ids.tolist()], 0
        logits = torch.zeros(len(self.rows), 1, self.config.vocab_size)
        for i, row in enumerate(self.rows):
            logits[i, 0, row[min(self.step, len(row) - 1)]] = 1.0
        self.step += 1
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def scripted(answers):
    """A loader of the scripted model that continues each prompt of `answers` with its text."""
    tokenizer, model = make_tokenizer(), Scripted(LlamaConfig(**SIZES | {"max_position_embeddings": 512}))
    model.script = {tuple(tokenizer(p)["input_ids"]): tokenizer(text)["input_ids"] for p, text in answers.items()}
    return model, lambda path: model


@pytest.fixture(scope="module", params=["llama", "qwen2_moe"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A llama checkpoint to damage."""
    path = tmp_path / "model"
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def write(path: Path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def text_of(count, seed=0):
    return "".join(np.random.default_rng(seed).choice(list(CHARS), count))


def slow_perplexity(model, sequences, window, stride):
    """One forward a token, with the context that the first window holding the token gives."""
    losses = []
    for ids in sequences:
        for t in range(1, len(ids)):
            begin = next(b for b in range(0, len(ids), stride) if b + window > t)
            with torch.no_grad():
                logits = model(torch.tensor([ids[begin:t]])).logits[0, -1].double()
            losses.append(-logits.log_softmax(0)[ids[t]].item())
    return math.exp(sum(losses) / len(losses)), len(losses)


# Perplexity


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_every_token_but_the_first_is_scored_once(num_tokens, window, data):
    """Windows score tokens 1, 2, ... in order, each with a token before it, in windows that begin a stride apart."""
    stride = data.draw(st.integers(1, window - 1))
    found = list(windows(num_tokens, window, stride))
    assert [t for w in found for t in range(w.first, w.end)] == list(range(1, num_tokens))
    assert all(w.begin < w.first < w.end <= w.begin + window for w in found)
    assert [w.begin for w in found] == [i * stride for i in range(len(found))]


@pytest.mark.parametrize(("window", "stride"), [(8, None), (8, 3), (8, 7), (2, 1), (64, None)])
def test_perplexity_is_that_of_one_forward_a_token(checkpoint, tmp_path, window, stride):
    """Windows, batches and kept logits change the speed, not the number."""
    texts = [text_of(29, 1), text_of(2, 2), text_of(29, 3)]
    data = write(tmp_path / "a.jsonl", *({"text": text} for text in texts), {"input_ids": [5, 4, 3, 2]})
    sequences = [make_tokenizer()(text)["input_ids"] for text in texts] + [[5, 4, 3, 2]]
    value, tokens = slow_perplexity(load(checkpoint), sequences, window, stride or window // 2)
    result = evaluate([checkpoint], data={"a": data}, window=window, stride=stride, batch_size=3)
    found = result["models"][0]["perplexity"]["a"]
    assert found["value"] == pytest.approx(value, rel=1e-5)
    assert found["low"] <= found["value"] <= found["high"]
    assert found["tokens"] == tokens == 28 + 1 + 28 + 3


def test_batch_size_and_logits_budget_do_not_matter(folder, tmp_path, monkeypatch):
    """The same number comes out however few windows go together."""
    (tmp_path / "a.txt").write_text(text_of(200))
    values = []
    for batch_size, budget in [(1, 2**28), (7, 2**28), (7, 1)]:
        monkeypatch.setattr("coterie.judge.quality.MAX_LOGITS", budget)
        result = evaluate(folder, data=[f"a={tmp_path / 'a.txt'}"], window=16, batch_size=batch_size)
        values.append(result["models"][0]["perplexity"]["a"]["value"])
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_the_tokenizers_own_special_tokens_are_used(folder, tmp_path):
    """Where the tokenizer puts a token before each text, that is the one not scored."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    tokenizer.save_pretrained(folder)
    (tmp_path / "a.txt").write_text("abcde")
    assert evaluate([folder], data={"a": tmp_path / "a.txt"})["models"][0]["perplexity"]["a"]["tokens"] == 5


def test_the_window_is_clamped_aloud(folder, tmp_path, caplog):
    """A window beyond the model's positions becomes those positions, and the log says so."""
    data = {"a": write(tmp_path / "a.jsonl", {"input_ids": [1, 2] * 100})}
    with caplog.at_level(logging.WARNING, "coterie"):
        long = evaluate([folder], data=data)
    assert "clamped to the model's 64 positions" in caplog.text
    assert long == evaluate([folder], data=data, window=64, stride=32)


def test_files_of_a_folder_that_are_left_out_are_said_aloud(folder, tmp_path, caplog):
    """One of two files is no data by its ending; the log says so once, whatever the number of models."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.jsonl", {"input_ids": [1, 2, 3]})
    write(tmp_path / "data" / "b.rst", {"input_ids": [1, 2, 3]})
    with caplog.at_level(logging.WARNING, "coterie"):
        evaluate([folder, folder], data={"a": tmp_path / "data"})
    assert caplog.text.count("files of other kinds are left out: 1 (.rst)") == 1


def test_bootstrap_of_two_blocks():
    """Losses 1 and 3 a token in two blocks of four: the mean is 2 and draws of one block alone are its ends."""
    value, low, high = bootstrap_perplexity(np.array([4.0, 12.0]), np.array([4, 4]), seed=0)
    assert (value, low, high) == pytest.approx((math.exp(2), math.exp(1), math.exp(3)))


def test_bootstrap_of_one_block_has_no_width():
    """With one block nothing is known about the spread."""
    assert bootstrap_perplexity(np.array([3.0]), np.array([3]), seed=0) == (math.e, math.e, math.e)


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50)), min_size=1, max_size=8), st.integers(0, 3))
def test_the_interval_holds_the_value_and_repeats(blocks, seed):
    """The same seed gives the same interval, around the value."""
    means, counts = (np.array(column) for column in zip(*blocks, strict=True))
    value, low, high = bootstrap_perplexity(means * counts, counts, seed)
    assert low <= value <= high
    assert (value, low, high) == bootstrap_perplexity(means * counts, counts, seed)


def test_the_interval_has_its_coverage():
    """The true perplexity of made-up blocks lies in about 95 of 100 intervals."""
    rng = np.random.default_rng(0)
    draws = rng.normal(2.0, 0.5, size=(100, 40))
    hits = sum(low <= math.exp(2) <= high for _, low, high in (bootstrap_perplexity(d, np.ones(40), 0) for d in draws))
    assert 88 <= hits <= 99


# Exact match


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 34 + 27 = 61.\nAnswer: 46\n", "46"),
        ("Answer: 46", "46"),
        ("Answer:46.\n", "46"),
        ("Answer: 1,234,567.\n", "1234567"),
        ("Answer: 1,23\n", "1,23"),
        ("Answer: -3.50 \n", "-3.50"),
        ("Answer: forty six.\nmore", "forty six"),
        ("Answer: 46\nQuestion: And Ben?\nWork: 1\nAnswer: 7\n", "46"),
        ("Answer:\n46\n", ""),
        ("so 34 + 27 = 61, and 61 - 15 = 46.", "46"),
        ("it is 1,234.5 in all", "1234.5"),
        ("from 5 to -7 degrees", "-7"),
        ("5-3", "3"),
        ("answer: none", None),
        ("", None),
    ],
)
def test_the_answer_in_a_text(text, answer):
    """The answer follows the first `Answer:` on its line; without one it is the last number."""
    assert extract_answer(text) == answer


def test_expected_answers_are_normalised_alike():
    """Expected and found answers go through the same normalisation."""
    assert normalise_answer(" 12,345. ") == "12345"


def test_wilson_intervals():
    """Published values for 8 of 10; at 0 and 100 % the interval keeps a width."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)


def test_right_answers_are_all_counted(folder, tmp_path):
    """A model that is right scores 100 %, also if it would run on to a question of its own."""
    answers = {
        PROBLEM: " 34 + 12 = 46.\nAnswer: 46\n" + END,
        PROBLEM.replace("34", "35"): " so\nAnswer: 1,046.\nQuestion: Ben?\nWork: 1\nAnswer: 9\n" + END,
        PROBLEM.replace("coins", "pens"): " it is 12" + END + "Answer: 13\n",
    }
    problems = [{"prompt": p, "answer": a} for p, a in zip(answers, ["46", "1046", 12], strict=True)]
    _, load = scripted(answers)
    result = evaluate([folder], data={"a": write(tmp_path / "a.jsonl", *problems)}, load=load)
    assert result["models"][0]["perplexity"] == {}
    assert result["models"][0]["exact_match"]["a"] == {
        "value": 1.0,
        "low": pytest.approx(0.4385, abs=1e-4),
        "high": 1.0,
        "count": 3,
    }


def test_generation_stops_at_a_complete_answer(folder, tmp_path):
    """Nothing is generated once every row has its line `Answer: ...`."""
    model, load = scripted({PROBLEM: "\nAnswer: 46\nQuestion: and so on without end"})
    data = {"a": write(tmp_path / "a.jsonl", {"prompt": PROBLEM, "answer": "46"})}
    assert evaluate([folder], data=data, load=load)["models"][0]["exact_match"]["a"]["value"] == 1.0
    assert model.step == len("\nAnswer: 46\n")


def test_a_text_ends_where_the_config_says(folder, tmp_path):
    """The end of text of config.json counts beside that of the generation settings and the tokenizer."""
    model, load = scripted({PROBLEM: " it is 46x or 7" + END})
    (model.config.eos_token_id,) = make_tokenizer()("x")["input_ids"]
    assert model.generation_config.eos_token_id == 0
    data = {"a": write(tmp_path / "a.jsonl", {"prompt": PROBLEM, "answer": "46"})}
    assert evaluate([folder], data=data, load=load)["models"][0]["exact_match"]["a"]["value"] == 1.0


def test_wrong_and_missing_answers_do_not_count(folder, tmp_path):
    """A wrong digit, and no answer within the allowed tokens, are both wrong."""
    _, load = scripted({PROBLEM: "\nAnswer: 47\n", PROBLEM[1:]: "Hm. " * 30 + "\nAnswer: 46\n"})
    problems = [{"prompt": p, "answer": "46"} for p in (PROBLEM, PROBLEM[1:])]
    data = {"a": write(tmp_path / "a.jsonl", *problems)}
    assert evaluate([folder], data=data, load=load, max_new_tokens=50)["models"][0]["exact_match"]["a"]["value"] == 0.0


def test_generation_is_greedy_and_batches_do_not_matter(checkpoint, tmp_path):
    """Answers are those of one full forward a token, even if the checkpoint asks for sampling and penalties."""
    tokenizer, model = make_tokenizer(), load(checkpoint)
    problems = []
    for prompt in ("abc", "bcd", "cdef", "1 2"):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        while len(ids) < start + 40 and ids[-1] != 0:
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        found = extract_answer(tokenizer.decode(ids[start:], skip_special_tokens=True))
        problems.append({"prompt": prompt, "answer": found or "none"})
    expected = sum(p["answer"] != "none" for p in problems) / len(problems)
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=5.0, temperature=9.0)
    data = {"a": write(tmp_path / "a.jsonl", *problems)}
    result = evaluate([checkpoint], data=data, load=lambda path: model, max_new_tokens=40, batch_size=2)
    assert result["models"][0]["exact_match"]["a"]["value"] == expected > 0
    assert model.generation_config.repetition_penalty == 5.0


def test_generation_ends_with_the_models_positions(folder, tmp_path, caplog):
    """A prompt that leaves little room gets fewer tokens, aloud; one that leaves none is refused."""
    data = {"a": write(tmp_path / "a.jsonl", {"prompt": "a" * 60, "answer": "1"})}
    with caplog.at_level(logging.WARNING, "coterie"):
        evaluate([folder], data=data)
    assert "fewer than 128 new tokens" in caplog.text
    data = {"b": write(tmp_path / "b.jsonl", {"prompt": "a" * 64, "answer": "1"})}
    with pytest.raises(CoterieError, match=r"b\.jsonl:1: the prompt has 64 tokens"):
        evaluate([folder], data=data)


# The whole


def test_the_result_is_machine_readable(folder, tmp_path, capfd):
    """The result has the documented shape, is JSON, and comes without a word printed; progress reaches its end."""
    (tmp_path / "a.txt").write_text(text_of(100))
    problems = write(tmp_path / "p.jsonl", {"prompt": PROBLEM, "answer": "46"})
    calls = []
    result = evaluate(
        [folder, str(folder)],
        data=[f"text={tmp_path / 'a.txt'}", f"sums={problems}"],
        window=16,
        on_progress=lambda *call: calls.append(call),
    )
    assert json.loads(json.dumps(result)) == result
    for model in result["models"]:
        assert set(model) == {"path", "dtype", "perplexity", "exact_match"}
        assert model["path"] == str(folder)
        assert set(model["perplexity"]["text"]) == {"value", "low", "high", "tokens"}
        assert set(model["exact_match"]["sums"]) == {"value", "low", "high", "count"}
    assert result["models"][0] == result["models"][1]
    assert {what for what, _, _ in calls} == {f"judging, {folder}: text", f"judging, {folder}: sums"}
    assert calls[-1][1] == calls[-1][2]
    assert capfd.readouterr() == ("", "")


def test_without_data_the_shipped_texts_judge(folder, tmp_path, monkeypatch, caplog):
    """And that is said; with tasks alone nothing is added to them."""
    (tmp_path / "a.txt").write_text(text_of(100))
    monkeypatch.setattr(eval_verb, "HELD_OUT", {"prose": tmp_path / "a.txt"})
    found = evaluate(folder, window=16)["models"][0]
    assert list(found["perplexity"]) == ["prose"] and "judged on the held-out texts that ship" in caplog.text


def test_token_ids_need_no_tokenizer(folder, tmp_path):
    """Without a tokenizer token ids are evaluated as given, and text is refused."""
    for file in folder.glob("tokenizer*"):
        file.unlink()
    ids = write(tmp_path / "ids.jsonl", {"input_ids": [1, 2, 3]})
    assert evaluate([folder], data={"a": ids})["models"][0]["perplexity"]["a"]["tokens"] == 2
    with pytest.raises(CoterieError, match="tokenizer"):
        evaluate([folder], data={"a": write(tmp_path / "t.jsonl", {"text": "abc"})})


def test_an_empty_stand_in_for_a_tokenizer_is_refused(tmp_path):
    """For qwen2_moe transformers invents a tokenizer that knows no text: that is a missing one."""
    make_model("qwen2_moe").save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(CoterieError, match="found none of"):
        evaluate([tmp_path / "model"], data={"a": tmp_path / "a.txt"})


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_checkpoint_that_does_not_fit_is_refused(folder, tmp_path, fault, key):
    """A tensor missing, unexpected or of another shape is fatal; stock loading would only log it."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if fault == "missing":
        del tensors[key]
    else:
        tensors[key if fault == "mismatched" else key + "2"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CoterieError, match=str(folder)):
        evaluate([folder], data={"a": write(tmp_path / "a.jsonl", {"input_ids": [1, 2]})})


def test_what_is_no_checkpoint_is_refused(tmp_path):
    """Missing folders, folders without a config and damaged weights are refused, not looked up elsewhere."""
    data = {"a": write(tmp_path / "a.jsonl", {"input_ids": [1, 2]})}
    with pytest.raises(CoterieError, match="no such folder"):
        evaluate([tmp_path / "nothing"], data=data)
    with pytest.raises(CoterieError, match=r"no config\.json; expected a folder with"):
        evaluate([tmp_path], data=data)
    make_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CoterieError, match="truncated or not safetensors"):
        evaluate([tmp_path / "model"], data=data)


@pytest.mark.parametrize("entry", [{"text": "abc"}, {"prompt": "abc", "answer": "1"}])
def test_nan_is_refused(folder, tmp_path, entry):
    """NaN logits name the model and the data set."""
    model = make_model()
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(CoterieError, match=rf"{folder}: sums: the model's logits hold NaN"):
        evaluate([folder], data={"sums": write(tmp_path / "a.jsonl", entry)}, load=lambda path: model)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"text": "a"}, r"a\.jsonl:2: found 1 token"),
        ({"text": ""}, r"a\.jsonl:2: found 0 token"),
        ({"input_ids": [1, 10_000]}, r"a\.jsonl:2: token 10000 is not among the model's 73"),
    ],
)
def test_documents_that_cannot_be_scored_are_named(folder, tmp_path, entry, message):
    """A document too short, or with tokens unknown to the model, is refused by file and line."""
    with pytest.raises(CoterieError, match=message):
        evaluate([folder], data={"a": write(tmp_path / "a.jsonl", {"text": "fine"}, entry)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ["x"]}, "x: no such file"),
        ({"data": ["=x"]}, "expected NAME=FILE"),
        ({"models": []}, "no model"),
        ({"window": 1}, "window is 1"),
        ({"window": 8.0}, "--window 8.0: expected a whole number"),
        ({"stride": 0}, "stride is 0"),
        ({"window": 8, "stride": 8}, "a stride of at most 7"),
        ({"batch_size": True}, "--batch-size True: expected a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"dtype": "int8"}, "expected one of auto"),
        ({"dtype": "float32", "load": lambda path: None}, "let that choose the dtype"),
        ({"task_path": "."}, "no tasks were asked"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    """No option is silently ignored or mended, and all are checked before a model is loaded."""
    data = {"a": write(tmp_path / "a.jsonl", {"input_ids": [1, 2]})}
    with pytest.raises(CoterieError, match=message):
        evaluate(**({"models": ["no/model"], "data": data} | options))


# Tasks

TASK = """
task: local_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {file}.cache}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_tasks_go_to_the_harness(folder, tmp_path, capfd):
    """A local task over a file of problems runs offline; the harness's numbers are returned under its names."""
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    data = write(tmp_path / "a.jsonl", {"prompt": PROBLEM, "answer": "46"}, {"prompt": PROBLEM + " ", "answer": "7"})
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.format(file=data))
    _, load = scripted({PROBLEM: "46\n", PROBLEM + " ": "46\n"})
    result = evaluate([folder], tasks="local_sums", task_path=tmp_path / "tasks", batch_size=1, load=load)
    assert result["models"][0]["tasks"]["local_sums"]["exact_match,none"] == 0.5
    assert capfd.readouterr() == ("", "")


def test_the_task_that_ships(folder, monkeypatch):
    """The reference model's task judges by our answer rule: a model that is always right scores 1."""
    pytest.importorskip("lm_eval")
    from coterie.reference_model import problems, tasks

    path = Path(next(iter(tasks.__path__)))
    chosen = [p for p, _ in zip(problems.problems(2, test=True), range(4), strict=False)]
    monkeypatch.setattr(problems, "problems", lambda seed, *, test: iter(chosen))
    _, load = scripted({p["prompt"]: p["work"] + END for p in chosen})
    result = evaluate([folder], tasks=["coterie_arithmetic"], task_path=path, batch_size=1, load=load)
    assert result["models"][0]["tasks"]["coterie_arithmetic"]["exact_match,none"] == 1.0


def test_unknown_tasks_are_refused(tmp_path):
    """A task that is not found is named before any model is loaded, and so is a missing folder of tasks."""
    pytest.importorskip("lm_eval")
    with pytest.raises(CoterieError, match="tasks no_such_task: not known"):
        evaluate(["no/model"], tasks=["no_such_task"])
    with pytest.raises(CoterieError, match="no such folder"):
        evaluate(["no/model"], tasks=["x"], task_path=tmp_path / "nothing")


def test_tasks_need_the_extra(monkeypatch):
    """Without lm-evaluation-harness the message says how to install it."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(CoterieError, match=r"pip install 'coterie\[eval\]'"):
        evaluate(["no/model"], tasks=["x"])
