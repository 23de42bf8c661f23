"""`coterie generate`: the tokens of the model, as text that comes piece by piece."""

import io
import json
import shutil

import numpy as np
import pytest
import torch

import coterie
import tiny
from coterie.cli import main
from coterie.errors import CoterieError
from coterie.verbs.generate import BROKEN, Pieces

PROMPT = "w3 w5 w7 w11"


def add_tokenizer(folder):
    """Words w0, w1, ... for the tokens 0, 1, ...; the last token ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{tiny.VOCABULARY - 1}").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory):
    """(dense, packed): half of the expert weights zero, with a tokenizer."""
    home = tmp_path_factory.mktemp("generate")
    source = shutil.copytree(tiny_checkpoint("qwen3_moe"), home / "source")
    coterie.sparsify(add_tokenizer(source), home / "dense", method="magnitude", sparsity=0.5)
    coterie.pack(home / "dense", home / "packed")
    return home / "dense", home / "packed"


def reference(folder, num_tokens):
    """The likeliest token each time, by a whole forward for every one."""
    model = coterie.load(folder, dtype="float32").eval()
    ids = [3, 5, 7, 11]
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[4:]


def test_the_text_is_that_of_the_likeliest_tokens(folders):
    """Token for token what whole forwards give, of the dense and of the packed model; the pieces make the text."""
    wanted = reference(folders[0], 12)
    assert 127 not in wanted
    for folder in folders:
        pieces = []
        found = coterie.generate(folder, PROMPT, max_new_tokens=12, dtype="float32", on_text=pieces.append)
        assert found["text"].split() == [f"w{i}" for i in wanted]
        assert "".join(pieces) == found["text"] and len(pieces) == 12
        assert (found["tokens"], found["prompt_tokens"], found["notes"]) == (12, 4, [])
        assert found["tokens_per_second"] == pytest.approx(12 / found["seconds"], rel=0.05)


def test_the_checkpoints_own_settings_change_nothing(folders, tmp_path):
    """Greedy means greedy, whatever generation_config.json asks for; its end of text ends the text."""
    shutil.copytree(folders[0], tmp_path / "in")
    wanted = reference(folders[0], 6)
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "eos_token_id": wanted[4]}
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps(settings))
    found = coterie.generate(tmp_path / "in", PROMPT, max_new_tokens=6, dtype="float32")
    assert found["text"].split() == [f"w{i}" for i in wanted[:5]] and found["tokens"] == 5


@pytest.mark.parametrize("model_type", ["aria", "llama4"])
def test_a_config_that_names_no_end_of_text_itself(tiny_checkpoint, tmp_path, model_type):
    """Where one config is around another, only the inner one, the settings or the tokenizer name it."""
    folder = add_tokenizer(shutil.copytree(tiny_checkpoint(model_type), tmp_path / "in"))
    assert 1 <= coterie.generate(folder, PROMPT, max_new_tokens=3, dtype="float32")["tokens"] <= 3


def test_a_temperature_draws_by_the_seed(folders):
    """The same seed gives the same text, another seed another; torch's own generator is left as it was."""
    state = torch.get_rng_state()
    a, b, c = (
        coterie.generate(folders[0], PROMPT, max_new_tokens=12, temperature=2.0, seed=seed)["text"]
        for seed in (1, 1, 2)
    )
    assert a == b != c and torch.equal(state, torch.get_rng_state())


def test_positions_end_the_text_and_that_is_said(folders):
    """128 positions: a prompt of 120 tokens leaves 8; one of 128 none."""
    found = coterie.generate(folders[0], "w5 " * 120, max_new_tokens=20)
    assert found["tokens"] <= 8 and found["notes"] == ["8 new tokens at most: the model has 128 positions"]
    with pytest.raises(CoterieError, match="fewer than the model's 128 positions"):
        coterie.generate(folders[0], "w5 " * 128)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"seed": 1}, "would be ignored"),
        ({"seed": -1, "temperature": 1.0}, "--seed"),
        ({"dtype": "int8"}, "--dtype"),
    ],
)
def test_options_out_of_range_are_refused_before_the_model_is_loaded(tmp_path, options, says):
    """By name; there is no model here to load."""
    with pytest.raises(CoterieError, match=says):
        coterie.generate(tmp_path / "none", PROMPT, **options)


def test_what_cannot_be_continued_is_refused(folders, tiny_checkpoint, tmp_path):
    """No tokens, no tokenizer, no model, tokens that the model does not know, and logits that are NaN."""
    with pytest.raises(CoterieError, match="no tokens"):
        coterie.generate(folders[0], "")
    with pytest.raises(CoterieError, match="tokenizer"):
        coterie.generate(tiny_checkpoint("qwen3_moe"), PROMPT)
    with pytest.raises(CoterieError, match="no such folder"):
        coterie.generate(tmp_path / "none", PROMPT)
    shutil.copytree(folders[0], tmp_path / "nan")
    arrays, config = tiny.read(tmp_path / "nan")
    arrays["model.norm.weight"] = np.full_like(arrays["model.norm.weight"], np.nan)
    tiny.write(tmp_path / "nan", arrays, config)
    with pytest.raises(CoterieError, match="NaN"):
        coterie.generate(tmp_path / "nan", PROMPT)


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def test_half_a_character_waits_for_its_other_half():
    """Pieces are whole characters; what is broken at the end is said at the end."""
    said, text = [], "aé€😀b"
    pieces = Pieces(Bytes(), said.append)
    pieces.put(torch.tensor([[1, 2]]))  # the prompt
    for byte in text.encode():
        pieces.put(torch.tensor([byte]))
    pieces.end()
    assert said == list(text) and pieces.ids == list(text.encode())
    broken = Pieces(Bytes(), said.append)
    for ids in ([0], [ord("x")], [0xE2]):
        broken.put(torch.tensor(ids))
    assert broken.texts == ["x"]
    broken.end()
    assert broken.texts == ["x", BROKEN]


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return (stop.value.code or 0, *capsys.readouterr())


def test_the_program_streams_text_and_reads_standard_input(folders, capsys, monkeypatch):
    """The text alone on standard output; `-` takes the prompt from standard input; --json prints one object."""
    wanted = coterie.generate(folders[1], PROMPT, max_new_tokens=5)["text"]
    arguments = ["generate", folders[1], "--max-new-tokens", 5, "--prompt"]
    assert run(capsys, *arguments, PROMPT) == (0, wanted + "\n", "")
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert run(capsys, *arguments, "-") == (0, wanted + "\n", "")
    status, out, _ = run(capsys, *arguments, PROMPT, "--json")
    found = json.loads(out)
    assert status == 0 and found["text"] == wanted and found["tokens"] == 5
    assert {"seconds", "tokens_per_second"} <= set(found)
    status, out, err = run(capsys, *arguments, "")
    assert (status, out) == (2, "") and err.startswith("error: --prompt")
