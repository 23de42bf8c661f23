"""Data files: how they are named, what they may hold, and how bad ones are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from coterie.errors import CoterieError
from coterie.forward import sources
from coterie.forward.data import parse_data, read_documents
from coterie.forward.documents import Document
from coterie.forward.tokens import draw, encode


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_names_and_files(tmp_path):
    """`NAME=FILE` splits at the first equals sign and keeps the order."""
    a, b = write(tmp_path, "a.txt", "a"), write(tmp_path, "b=c.txt", "b")
    assert list(parse_data([f"prose={a}", f"code={b}"]).items()) == [("prose", a), ("code", b)]


def test_a_file_alone_is_named_by_its_stem(tmp_path):
    """What stands before the first dot of its name; two of one stem are refused like two of one name."""
    a, b = write(tmp_path, "prose.txt", "a"), write(tmp_path, "c4.jsonl.gz", "b")
    assert parse_data([str(a), str(b)]) == {"prose": a, "c4": b}
    with pytest.raises(CoterieError, match="'prose' is taken by"):
        parse_data([str(a), f"prose={b}"])
    with pytest.raises(CoterieError, match="missing: no such file"):
        parse_data([str(tmp_path / "missing")])


@pytest.mark.parametrize("item", ["", "=a.txt", " =a.txt", "prose="])
def test_other_forms_are_refused(item):
    """Whatever is not `NAME=FILE` is refused with the form that was expected."""
    with pytest.raises(CoterieError, match="expected NAME=FILE"):
        parse_data([item])


def test_a_name_is_given_once(tmp_path):
    """Two files under one name would hide one another."""
    a = write(tmp_path, "a.txt", "a")
    with pytest.raises(CoterieError, match=r"'x' is taken by .*a\.txt"):
        parse_data([f"x={a}", f"x={a}"])


def test_what_is_no_file_is_refused(tmp_path):
    """Missing files, folders, pipes, empty files and impossible names are refused before anything is read."""
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path, "empty.txt", "")
    faults = {"missing.txt": "no such file", ".": "a folder", "pipe": "not a regular file", "empty.txt": "is empty"}
    for name, message in faults.items():
        with pytest.raises(CoterieError, match=message):
            parse_data([f"x={tmp_path / name}"])
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(CoterieError):
            parse_data([f"x={name}"])


def test_plain_text_is_one_document(tmp_path):
    """What is not JSON is one text, newlines and all, without a byte order mark."""
    path = write(tmp_path, "a.md", b"\xef\xbb\xbf{}\n\nzwei\xc3\xa4\r\n")
    assert list(read_documents(path)) == [Document(str(path), text="{}\n\nzweiä\r\n")]


def test_json_lines(tmp_path):
    """A line is a text or a sequence of token ids; blank lines and further keys do not matter."""
    path = write(tmp_path, "a.jsonl", '{"text": "a\\u2028b", "id": 7}\n\n{"input_ids": [3, 0]}\r\n')
    expected = [Document(f"{path}:1", text="a\u2028b"), Document(f"{path}:3", input_ids=(3, 0))]
    assert list(read_documents(path)) == expected


def test_problems(tmp_path):
    """A problem has a prompt, kept as it is, and an answer, a string or a whole number."""
    path = write(tmp_path, "a.JSONL", '{"prompt": " 2+2 ", "answer": 4}\n{"prompt": "?", "answer": " x ", "work": ""}')
    documents = list(read_documents(path))
    assert [(d.prompt, d.answer) for d in documents] == [(" 2+2 ", "4"), ("?", "x")]
    assert all(d.is_problem for d in documents)


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[" * 100_000,
        '{"input_ids": [' + "9" * 5000 + "]}",
        '"text"',
        "null",
        "{}",
        '{"prompt": "a"}',
        '{"text": "a", "input_ids": [1]}',
        '{"text": "a", "prompt": "a", "answer": "b"}',
        '{"text": 7}',
        '{"text": "\\ud800"}',
        '{"input_ids": []}',
        '{"input_ids": "12"}',
        '{"input_ids": [1, true]}',
        '{"input_ids": [-1]}',
        '{"input_ids": [2147483648]}',
        '{"input_ids": [1.0]}',
        '{"input_ids": [[1]]}',
        '{"prompt": "a", "answer": 1.5}',
        '{"prompt": "a", "answer": true}',
        '{"prompt": "a", "answer": " "}',
        '{"prompt": "", "answer": "a"}',
        b"\xff",
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    """A bad line is refused with the file and the line's number, whatever is bad about it."""
    raw = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, "a.jsonl", b'{"text": "fine"}\n' + raw + b"\n")
    with pytest.raises(CoterieError, match=r"a\.jsonl:2: "):
        list(read_documents(path))


def test_problems_and_documents_do_not_mix(tmp_path):
    """A file is an exact-match set or a text, not both."""
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"prompt": "a", "answer": "b"}')
    with pytest.raises(CoterieError, match=r"a\.jsonl:2: found problems and documents"):
        list(read_documents(path))


def test_blank_lines_alone_are_no_data(tmp_path):
    """A JSONL file of blank lines is refused."""
    with pytest.raises(CoterieError, match="blank lines only"):
        list(read_documents(write(tmp_path, "a.jsonl", "\n \n")))


def test_text_must_be_utf8(tmp_path):
    """Plain text in another encoding is refused with the place of the first wrong byte."""
    with pytest.raises(CoterieError, match=r"a\.txt:2: byte 3 is not UTF-8"):
        list(read_documents(write(tmp_path, "a.txt", b"ab\n\xff")))


def test_token_ids_need_no_tokenizer():
    """Token ids are used as given; text without a tokenizer is refused."""
    assert encode(Document("a:1", input_ids=(5, 6)), None) == [5, 6]
    with pytest.raises(CoterieError, match="a:2: text needs a tokenizer"):
        encode(Document("a:2", text="hello"), None)


def test_import_is_light():
    """The module imports neither torch nor transformers, so that the command line starts at once."""
    code = (
        "import json, sys, coterie.forward.data; "
        "print(json.dumps([m for m in ('torch', 'transformers') if m in sys.modules]))"
    )
    assert json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout) == []


# --- further sources ----------------------------------------------------------------------------------------------


def test_conversations(tmp_path):
    """A line of messages is a conversation; each message has a role, and text if anything."""
    path = write(tmp_path, "a.jsonl", '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant"}]}')
    (document,) = read_documents(path)
    assert document.messages == ({"role": "user", "content": "hi"}, {"role": "assistant"})
    for bad in ("[]", '"x"', "[1]", '[{"content": "x"}]', '[{"role": 1}]', '[{"role": "user", "content": 3}]'):
        with pytest.raises(CoterieError, match=r"a\.jsonl:1: "):
            list(read_documents(write(tmp_path, "a.jsonl", f'{{"messages": {bad}}}')))


def test_a_folder_is_all_its_files(tmp_path):
    """Sorted, at any depth, of known endings; empty and hidden ones are left out, as is what is no data."""
    (tmp_path / "b" / ".git").mkdir(parents=True)
    for name in ("c.txt", "a.md", "b/x.py", "b/y.jsonl", "b/.git/z.txt", "b/empty.py", "b/image.png", ".hidden.txt"):
        write(tmp_path, name, "" if "empty" in name else '{"text": "t"}' if "y." in name else "t")
    notes = []
    found = [d.where.removeprefix(f"{tmp_path}/") for d in read_documents(tmp_path, notes)]
    assert found == ["a.md", "b/x.py", "b/y.jsonl:1", "c.txt"]
    assert notes == [f"{tmp_path}: files of other kinds are left out: 1 (.png)"]
    assert parse_data([f"x={tmp_path}"], folders=True) == {"x": tmp_path}
    with pytest.raises(CoterieError, match="a folder; expected a text or JSONL file"):
        parse_data([f"x={tmp_path}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CoterieError, match="no file to read"):
        list(read_documents(tmp_path / "empty"))


def test_a_folders_other_files_are_counted_aloud(tmp_path):
    """Seven of three kinds, the most frequent first; four kinds are named at most."""
    for name in ("a.txt", "1.png", "2.PNG", "3.png", "4.png", "LICENSE", "5.gz", "6.gz"):
        write(tmp_path, name, "x")
    notes = []
    assert len(list(read_documents(tmp_path, notes))) == 1
    assert notes == [f"{tmp_path}: files of other kinds are left out: 7 (.png, .gz, no suffix)"]
    for suffix in "pqr":
        write(tmp_path, f"b.{suffix}", "x")
    list(read_documents(tmp_path, notes))
    assert notes[1].endswith(" left out: 10 (.png, .gz, no suffix, .p, ...)")


def parquet(path, **columns):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path)
    return path


def test_parquet(tmp_path):
    """Rows are objects as JSON lines are; columns that data does not have are not read."""
    path = parquet(tmp_path / "a.parquet", text=["one", "two"], url=["x", "y"])
    assert list(read_documents(path)) == [Document(f"{path}:1", text="one"), Document(f"{path}:2", text="two")]
    path = parquet(tmp_path / "b.parquet", input_ids=[[1, 2], [3]])
    assert [d.input_ids for d in read_documents(path)] == [(1, 2), (3,)]


def test_parquet_that_is_no_data_is_refused(tmp_path):
    """Without a column of ours, with a null, or damaged."""
    with pytest.raises(CoterieError, match="columns url, n; expected those of one of "):
        list(read_documents(parquet(tmp_path / "a.parquet", url=["x"], n=[1])))
    with pytest.raises(CoterieError, match=r"b\.parquet:2: 'text' is NoneType"):
        list(read_documents(parquet(tmp_path / "b.parquet", text=["x", None])))
    with pytest.raises(CoterieError, match="cannot be read as Parquet"):
        list(read_documents(write(tmp_path, "c.parquet", b"PAR1 and nothing more")))


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    """Parquet and the hub's data sets need libraries that are not installed with coterie alone."""
    for module in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    for source in (write(tmp_path, "a.parquet", "x"), "hub:owner/name"):
        with pytest.raises(CoterieError, match=r"needs the extra: pip install 'coterie\[data\]'"):
            list(read_documents(source))


@pytest.fixture
def hub(monkeypatch):
    """`hub(rows)`: a stand-in for the datasets library, and the list of what was asked of it."""
    asked = []

    def install(rows):
        def load_dataset(*args, split, **how):
            asked.append((*args, split))
            if isinstance(rows, Exception):
                raise rows
            return iter(rows)

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return asked

    return install


def test_the_hubs_data_sets(hub):
    """Name, configuration, split and column; the split is train and the column text unless named."""
    asked = hub([{"text": "a", "n": 1}, {"text": "b", "n": 2}])
    assert [d.text for d in read_documents("hub:allenai/c4/en")] == ["a", "b"]
    assert [d.where for d in read_documents("hub:o/n:test")] == ["hub:o/n:test, row 1", "hub:o/n:test, row 2"]
    asked = hub([{"body": "a"}])
    assert [d.text for d in read_documents("hub:squad:test:body")] == ["a"]
    assert asked == [("allenai/c4", "en", "train"), ("o/n", "test"), ("squad", "test")]
    assert parse_data(["x=hub:o/n:test"], folders=True) == {"x": Path("hub:o/n:test")}


def test_rows_of_the_hub_that_are_not_read_are_said_aloud(hub, monkeypatch):
    """Two of three rows; with two there is nothing to say."""
    monkeypatch.setattr(sources, "HUB_ROWS", 2)
    notes = []
    for last in ("b", "c"):
        hub([{"text": text} for text in "abc"[: "abc".index(last) + 1]])
        assert [d.text for d in read_documents("hub:o/n", notes)] == ["a", "b"]
        assert notes == ["hub:o/n: its first 2 rows are read, and no more"] * (last == "c")


def test_what_the_hub_does_not_give_is_refused(hub):
    """Offline, without the column, empty, or named in another way: one clear error each."""
    hub(ConnectionError("cannot reach the hub\nfor many reasons"))
    with pytest.raises(
        CoterieError, match=r"hub:o/n: the hub did not give it \(ConnectionError: cannot reach the hub\)"
    ):
        list(read_documents("hub:o/n"))
    hub([{"body": "a"}])
    with pytest.raises(CoterieError, match="columns body; expected 'content'"):
        list(read_documents("hub:o/n:train:content"))
    with pytest.raises(CoterieError, match="columns body; name the one with the text"):
        list(read_documents("hub:o/n"))
    for form in ("hub:", "hub:a:b:c:d", "hub:a/b/c/d", "hub:o/n:"):
        with pytest.raises(CoterieError, match="expected hub:NAME"):
            list(read_documents(form))


# --- calibration --------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer: one token a letter (a is 10), 0 ends a text, 1 begins it if special tokens are asked for."""

    eos_token_id = 0
    chat_template = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert verbose is False
        return {"input_ids": [1] * add_special_tokens + [ord(c) - ord("a") + 10 for c in text]}


def drawn(data, tokenizer, *, samples=128, seq_len=2048, seed=0, max_positions=None):
    """What `draw` gives of files."""
    documents = {name: list(read_documents(file)) for name, file in data.items()}
    return draw(documents, tokenizer, samples=samples, seq_len=seq_len, seed=seed, max_positions=max_positions)


def ids(text):
    return tuple(0 if c == "|" else ord(c) - ord("a") + 10 for c in text)


def text_file(folder, name, *texts):
    return write(folder, name, "\n".join(json.dumps({"text": t}) for t in texts))


def test_texts_are_joined_and_cut(tmp_path):
    """End-of-text between texts, no special tokens, no padding, and what is left of the last block is dropped."""
    data = {"x": text_file(tmp_path, "x.jsonl", "abc", "", "defgh")}
    found, notes = drawn(data, Letters(), samples=4, seq_len=2)
    assert found == {"x": [ids("ab"), ids("c|"), ids("de"), ids("fg")]} and notes == []


def test_blocks_are_drawn_without_replacement_in_their_order(tmp_path):
    """By numpy's generator from the seed, the same each time; another seed, other blocks."""
    text = "".join(chr(ord("a") + i % 26) for i in range(300))
    data = {"x": write(tmp_path, "x.txt", text)}
    found, notes = drawn(data, Letters(), samples=10, seq_len=3, seed=5)
    chosen = sorted(np.random.default_rng(5).choice(100, 10, replace=False).tolist())
    assert found["x"] == [ids(text[3 * i : 3 * i + 3]) for i in chosen] and notes == []
    assert drawn(data, Letters(), samples=10, seq_len=3, seed=5)[0] == found
    assert drawn(data, Letters(), samples=10, seq_len=3, seed=6)[0] != found


def test_a_short_text_is_one_shorter_sample(tmp_path):
    """Said aloud where more were its share."""
    data = {"x": write(tmp_path, "x.txt", "abc")}
    assert drawn(data, Letters(), samples=1, seq_len=8) == ({"x": [ids("abc")]}, [])
    assert drawn(data, Letters(), samples=5, seq_len=8)[1] == ["data 'x' gives 1 of the 5 samples that were its share"]


def test_samples_are_spread_over_the_names(tmp_path):
    """Eight over three names: 3, 3, 2."""
    data = {n: write(tmp_path, f"{n}.txt", 40 * n) for n in "abc"}
    found, notes = drawn(data, Letters(), samples=8, seq_len=4)
    assert [len(s) for s in found.values()] == [3, 3, 2] and list(found) == list("abc") and notes == []
    with pytest.raises(CoterieError, match="--samples 2: expected a whole number, at least 3"):
        drawn(data, Letters(), samples=2)


def test_token_ids_are_used_as_given(tmp_path):
    """A line is a sample, in order, whatever its length and the seed; too many are left, too few said aloud."""
    lines = [[5], [7, 6, 5, 4, 3, 2], [9, 9]]
    data = {"x": write(tmp_path, "x.jsonl", "\n".join(json.dumps({"input_ids": i}) for i in lines))}
    for seed in (0, 1):
        found, notes = drawn(data, None, samples=2, seq_len=4, seed=seed, max_positions=6)
        assert found == {"x": [(5,), (7, 6, 5, 4, 3, 2)]} and notes == []
    found, notes = drawn(data, None, samples=9, seq_len=4)
    assert len(found["x"]) == 3 and notes == ["data 'x' gives 3 of the 9 samples that were its share"]
    with pytest.raises(CoterieError, match=r"x\.jsonl:2: 6 token ids; the model has 5 positions"):
        drawn(data, None, samples=2, max_positions=5)


def test_blocks_fit_the_models_positions(tmp_path):
    """The length is clamped, aloud."""
    data = {"x": write(tmp_path, "x.txt", "abcdef")}
    found, notes = drawn(data, Letters(), samples=3, seq_len=2048, max_positions=2)
    assert found == {"x": [ids("ab"), ids("cd"), ids("ef")]}
    assert notes == ["--seq-len 2048 is more than the model's 2 positions: blocks have 2 tokens"]


def test_what_calibration_cannot_use_is_refused(tmp_path):
    """Problems, texts among token ids, texts of no tokens, and numbers out of range."""
    cases = {
        '{"prompt": "a", "answer": "b"}': r"x\.jsonl:1: problems are for eval",
        '{"text": "a"}\n{"input_ids": [1]}': r"x\.jsonl:2: found texts and token ids under one name",
        '{"text": ""}\n{"text": ""}': r"x\.jsonl:1: no tokens",
        '{"messages": [{"role": "user", "content": "a"}]}': r"x\.jsonl:1: the tokenizer has no chat template",
    }
    for content, message in cases.items():
        with pytest.raises(CoterieError, match=message):
            drawn({"x": write(tmp_path, "x.jsonl", content)}, Letters(), samples=1)
    data = {"x": write(tmp_path, "x.txt", "abc")}
    with pytest.raises(CoterieError, match=r"x\.txt: text needs a tokenizer"):
        drawn(data, None)
    for option in ({"samples": 0}, {"samples": 1.5}, {"seq_len": 0}, {"seed": -1}):
        with pytest.raises(CoterieError, match="expected a whole number"):
            drawn(data, Letters(), **option)


def test_texts_without_an_end_token_are_joined_aloud(tmp_path):
    """Some tokenizers have none."""
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    data = {"x": text_file(tmp_path, "x.jsonl", "ab", "cd")}
    found, notes = drawn(data, tokenizer, samples=1, seq_len=4)
    assert found == {"x": [ids("abcd")]}
    assert notes == ["the tokenizer has no end-of-text token: texts are joined without one"]


def test_conversations_go_through_the_chat_template(tmp_path):
    """The template's text is tokenised as it is; what the template refuses is refused."""
    tokenizer = Letters()
    tokenizer.chat_template = "given"

    def apply_chat_template(messages, tokenize):
        assert tokenize is False
        if messages[0]["role"] == "tool":
            raise ValueError("no such role")
        return "".join(m["role"][0] + m["content"] for m in messages)

    tokenizer.apply_chat_template = apply_chat_template
    line = '{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]}'
    data = {"x": write(tmp_path, "x.jsonl", f"{line}\n{line}")}
    assert drawn(data, tokenizer, samples=1, seq_len=11)[0] == {"x": [ids("uabac|uabac")]}
    assert encode(next(read_documents(data["x"])), tokenizer) == list(ids("uabac"))
    bad = {"x": write(tmp_path, "x.jsonl", line.replace("user", "tool"))}
    with pytest.raises(CoterieError, match=r"x\.jsonl:1: the chat template refuses the messages \(no such role\)"):
        drawn(bad, tokenizer, samples=1)
