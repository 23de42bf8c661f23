"""Data as people have it: what a file's content says it is, the forms of records, and how other ones are refused."""

import gzip
import json

import pytest

from coterie.errors import CoterieError
from coterie.forward.data import read_all, read_documents
from coterie.forward.documents import Document
from coterie.forward.tokens import draw, encode

TEXTS = [f"The {i}. passage, in [brackets]." for i in range(3)]
LINES = "\n".join(json.dumps({"text": text, "url": f"https://example.com/{i}"}) for i, text in enumerate(TEXTS))
ROWS = [{"text": text, "url": "u"} for text in TEXTS]


class Characters:
    """A tokenizer: a token a character; a template that names the tools, and begins each turn with its role."""

    eos_token_id = 0

    def __init__(self, template: bool = True) -> None:
        self.chat_template = "given" if template else None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [1] * add_special_tokens + list(map(ord, text))}

    def apply_chat_template(self, messages, tokenize, tools=()):
        said = [tool["function"]["name"] for tool in tools]
        return "".join(said + [f"<{m['role']}>{m.get('content') or m.get('tool_calls')}" for m in messages])


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path):
    return [document.text for document in read_documents(path)]


def spelled(folder, record, template=True):
    """What a model reads of a record that stands alone in a file."""
    (document,) = read_documents(put(folder, "a.jsonl", json.dumps(record)))
    ids = encode(document, Characters(template))
    return "".join(map(chr, ids[ids[0] == 1 :]))


# --- content ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json", "a.jsonl", "a.ndjson", "a.txt", "a", "a.md"])
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        "\ufeff\n \n" + LINES.replace("\n", "\r\n\n") + "\n",
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        "[\n" + LINES.replace("\n", ",\n") + "\n]\n",
    ],
    ids=["lines", "lines with blanks", "list", "list over lines", "list of lines"],
)
def test_json_is_read_as_json_whatever_its_name(tmp_path, name, content):
    """Its records are the documents, in order; nothing of its syntax is text."""
    assert texts(put(tmp_path, name, content)) == TEXTS


def test_objects_over_several_lines_follow_each_other(tmp_path):
    """As pretty-printers write them; one alone is one document."""
    content = "\n".join(json.dumps(row, indent=2) for row in ROWS)
    assert texts(put(tmp_path, "a.json", content)) == texts(put(tmp_path, "a.txt", content)) == TEXTS
    assert texts(put(tmp_path, "b.txt", json.dumps(ROWS[0], indent=2))) == TEXTS[:1]


@pytest.mark.parametrize(
    "text",
    [
        "{}\nis an object",
        "[1] A. Author, a title. [2] Another.",
        "[link](https://example.com)\n",
        "{% set x = 1 %}",
        "[[1, 2], [3, 4]]",
        "1984 was a year",
        '"Who?" she said.',
        "[",
        " \n",
        '[{"a": 1, and so on',
        "{'a': 1}",
    ],
)
def test_text_that_begins_like_json_is_text(tmp_path, text):
    """One document, as it stands: only objects, in a list or one after another, are records."""
    assert texts(put(tmp_path, "a.txt", text)) == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "plain words", r"a\.json, record 1: not JSON"),
        ("a.json", json.dumps(ROWS)[:-1], "a comma nor the list's end follows; is the file cut"),
        ("a.json", json.dumps(ROWS)[:-9], r"a\.json, record 3: not JSON"),
        ("a.json", json.dumps(ROWS) + "x", "more follows after the list"),
        ("a.txt", LINES[:-4], r"a\.txt:3: not JSON"),
        ("a.txt", LINES.replace("}\n", "},\n"), r"a\.txt, record 2: not JSON"),
        ("a.txt", '{"text": "a"} and words', r"a\.txt, record 2: not JSON"),
        ("a.json", "[]", "or no records"),
        ("a.json", "[" * 100_000, r"a\.json, record 1: not JSON"),
        ("a.json", '[{"text": "a", "text": "b"}]', "record 1: an object names a key twice"),
        ("a.txt", '{"text": "a", "text": "b"}', r"a\.txt:1: an object names a key twice"),
        ("a.json", '["a", "b"]', "record 1: found str; expected an object"),
        ("a.json", "7", "record 1: found int; expected an object"),
    ],
)
def test_json_with_a_fault_is_refused_at_its_record(tmp_path, name, content, message):
    """Whether it is JSON by its name or by its beginning: a cut file, more after its end, no objects."""
    with pytest.raises(CoterieError, match=message):
        texts(put(tmp_path, name, content))


def test_json_that_takes_gigabytes_of_memory_is_refused(tmp_path, monkeypatch):
    """Before it is parsed, in a list as in a line."""
    monkeypatch.setattr("coterie.forward.json_records.MAX_NESTED_ALL", 5)
    monkeypatch.setattr("coterie.forward.json_records.MAX_NESTED", 5)
    for content in ('[{"text": "a", "x": [[[[[]]]]]}]', '{"text": "a", "x": [[[[[]]]]]}'):
        for name in ("a.json", "a.txt"):
            with pytest.raises(CoterieError, match="lists and objects; expected at most 5"):
                texts(put(tmp_path, name, content))


@pytest.mark.parametrize("name", ["c4.json.gz", "c4.jsonl.gz", "c4.jsonl"])
def test_gzip_is_unpacked(tmp_path, name):
    """By content, parts one after another too; what is cut or damaged is refused."""
    half = len(LINES) // 2
    packed = gzip.compress(LINES[:half].encode()) + gzip.compress(LINES[half:].encode())
    assert texts(put(tmp_path, name, packed)) == TEXTS
    assert texts(put(tmp_path, "a.txt.gz", gzip.compress(b"words\n"))) == ["words\n"]
    for bad in (packed[:-9], packed[:20] + b"\xff" * 9 + packed[29:], packed + b"more"):
        with pytest.raises(CoterieError, match="cannot be read"):
            texts(put(tmp_path, name, bad))


def test_what_grows_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    """No more is unpacked than a file may have."""
    monkeypatch.setattr("coterie.forward.sources.MAX_DATA", 1000)
    assert texts(put(tmp_path, "a.txt.gz", gzip.compress(b"x" * 1000))) == ["x" * 1000]
    with pytest.raises(CoterieError, match=r"1,00\d bytes or more; expected at most 1,000"):
        texts(put(tmp_path, "a.txt.gz", gzip.compress(bytes(10**6))))


def test_zstd_is_unpacked(tmp_path):
    """By content, with the library that reads tables; what is cut is refused."""
    pyarrow = pytest.importorskip("pyarrow", reason="zstd is read by pyarrow, of the extra [data]")
    half = len(LINES) // 2
    parts = [pyarrow.compress(part.encode(), codec="zstd", asbytes=True) for part in (LINES[:half], LINES[half:])]
    for name in ("c4.jsonl.zst", "c4.json.zstd", "c4"):
        assert texts(put(tmp_path, name, b"".join(parts))) == TEXTS
    with pytest.raises(CoterieError, match="cannot be read as zstd"):
        texts(put(tmp_path, "a.zst", b"".join(parts)[:-3]))


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    """zstd and Arrow need one that is not installed with coterie alone."""
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for name, content in (("a.jsonl.zst", b"\x28\xb5\x2f\xfd"), ("a.arrow", b"ARROW1")):
        with pytest.raises(CoterieError, match=r"needs the extra: pip install 'coterie\[data\]'"):
            texts(put(tmp_path, name, content))


# --- tables -------------------------------------------------------------------------------------------------------


def test_arrow_files_and_streams(tmp_path):
    """By content; columns that data does not have are not read, and a file without any is refused."""
    pyarrow = pytest.importorskip("pyarrow", reason="Arrow is read by pyarrow, of the extra [data]")
    table = pyarrow.table({"text": TEXTS, "url": ["u"] * 3})
    for kind in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream):
        for name in ("a.arrow", "a"):
            with pyarrow.OSFile(str(tmp_path / name), "wb") as sink, kind(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
            assert list(read_documents(tmp_path / name))[2] == Document(f"{tmp_path / name}:3", text=TEXTS[2])
    with pytest.raises(CoterieError, match="cannot be read as Arrow"):
        texts(put(tmp_path, "b.arrow", (tmp_path / "a.arrow").read_bytes()[:-200]))
    with pyarrow.OSFile(str(tmp_path / "c"), "wb") as sink, kind(sink, table.select(["url"]).schema) as writer:
        writer.write_table(table.select(["url"]))
    with pytest.raises(CoterieError, match="columns url; expected those of one of"):
        texts(tmp_path / "c")


def test_nulls_of_a_table_are_no_keys(tmp_path):
    """Every object of a column has all keys of its column: what one of them lacks is null."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow, of the extra [data]")
    from pyarrow.parquet import write_table

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    write_table(pyarrow.table({"text": [None, "t"], "messages": [turns, None]}), tmp_path / "a.parquet")
    first, second = read_documents(tmp_path / "a.parquet")
    assert first.messages == tuple(turns) and second.text == "t"


def test_a_folder_that_datasets_saved(tmp_path):
    """All of its files; of several splits train, aloud; where there is none of that name, one has to be named."""
    datasets = pytest.importorskip("datasets", reason="the data set is saved by datasets, of the extra [data]")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"text": TEXTS, "url": ["u"] * 3})
    data.save_to_disk(tmp_path / "one", num_shards=2)
    assert texts(tmp_path / "one") == TEXTS
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    notes = []
    assert [d.text for d in read_documents(tmp_path / "two", notes)] == TEXTS
    assert notes == [f"{tmp_path / 'two'}: of the splits train, test, train is read"]
    assert texts(tmp_path / "two" / "test") == TEXTS[:1]
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(tmp_path / "three")
    with pytest.raises(CoterieError, match=r"splits a, b; name one as .*three/SPLIT"):
        texts(tmp_path / "three")


def test_a_saved_folder_names_its_own_files_alone(tmp_path):
    """What its state says is not believed beyond its folder."""
    put(tmp_path, "dataset_info.json", "{}")
    for files, message in (([{"filename": "../a.arrow"}], "no file beside it"), ([], "names no data files")):
        put(tmp_path, "state.json", json.dumps({"_data_files": files}))
        with pytest.raises(CoterieError, match=message):
            texts(tmp_path)


def test_json_files_of_a_folder(tmp_path):
    """Those of documents are read, others are left out aloud; where there are only others, the first is refused."""
    put(tmp_path, "package.json", '{"name": "x", "version": "1"}')
    with pytest.raises(CoterieError, match=r"found an object with keys \['name', 'version'\]"):
        texts(tmp_path)
    put(tmp_path, "a.json", LINES)
    put(tmp_path, "b.json.gz", gzip.compress(json.dumps(ROWS).encode()))
    notes = []
    assert [d.text for d in read_documents(tmp_path, notes)] == TEXTS + TEXTS
    assert len(notes) == 1 and "1 .json files without documents are left out" in notes[0] and "'version'" in notes[0]


# --- forms --------------------------------------------------------------------------------------------------------


def test_conversations_in_the_names_of_sharegpt(tmp_path):
    """from and value, or role and content; speakers are the roles that templates know."""
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d"), ("observation", "e")]
    record = {"id": 7, "conversations": [{"from": who, "value": what} for who, what in turns]}
    assert spelled(tmp_path, record) == "<system>s<user>a<assistant>b<user>c<assistant>d<tool>e"
    assert spelled(tmp_path, {"conversations": [{"role": "user", "content": "a"}]}) == "<user>a"
    assert spelled(tmp_path, {"messages": [{"from": "human", "value": "a"}]}) == "<user>a"
    columns = {"from": ["human", "gpt"], "value": ["a", "b"]}
    assert spelled(tmp_path, {"conversations": columns}) == "<user>a<assistant>b"


def test_contents_in_parts(tmp_path):
    """Parts of text are one text; others are refused, since nothing here could read them."""
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    assert spelled(tmp_path, {"messages": [{"role": "user", "content": parts}]}) == "<user>abc"
    with pytest.raises(CoterieError, match=r"a\.jsonl:1: a message has a part 'image_url'"):
        spelled(tmp_path, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]})


@pytest.mark.parametrize("pack", [list, json.dumps], ids=["a list", "the text of one"])
def test_tools_reach_the_chat_template(tmp_path, pack):
    """With the calls, whose content is null."""
    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": ["sun"]}]
    assert spelled(tmp_path, {"messages": messages, "tools": pack(tools)}) == "weather<user>a<assistant>['sun']"
    with pytest.raises(CoterieError, match="'tools' is dict"):
        spelled(tmp_path, {"messages": messages, "tools": {"a": 1}})


def test_a_template_that_leaves_the_messages_out_is_refused(tmp_path):
    """Such as one that wants parts and finds a text."""
    (document,) = read_documents(put(tmp_path, "a.jsonl", '{"messages": [{"role": "user", "content": "hello"}]}'))
    tokenizer = Characters()
    tokenizer.apply_chat_template = lambda messages, tokenize: "<user>"
    with pytest.raises(CoterieError, match="leaves out what the messages say"):
        encode(document, tokenizer)


def test_instructions(tmp_path):
    """A user and an assistant where there is a chat template, else joined by blank lines; input may be missing."""
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert spelled(tmp_path, record) == "<user>Add.\n\n1 and 2<assistant>3"
    assert spelled(tmp_path, record, template=False) == "Add.\n\n1 and 2\n\n3"
    for empty in ({"input": ""}, {"input": None}, {}):
        assert spelled(tmp_path, {"instruction": "Add.", "output": "3", **empty}, template=False) == "Add.\n\n3"


def test_prompts_and_completions(tmp_path):
    """As they stand, with a blank line where nothing is between them; or two lists of messages."""
    assert spelled(tmp_path, {"prompt": "The sky is", "completion": " blue."}) == "The sky is blue."
    assert spelled(tmp_path, {"prompt": "Say it.", "completion": "It."}) == "Say it.\n\nIt."
    turns = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    assert spelled(tmp_path, dict(zip(("prompt", "completion"), turns, strict=True))) == "<user>a<assistant>b"


def test_a_record_that_says_it_twice_is_read_once(tmp_path):
    """As the first form of the list: a text before its instruction, messages before their prompt."""
    assert spelled(tmp_path, {"text": "t", "instruction": "i", "output": "o"}) == "t"
    assert (
        spelled(tmp_path, {"prompt": "p", "completion": "c", "messages": [{"role": "user", "content": "a"}]})
        == "<user>a"
    )


@pytest.mark.parametrize(
    "record",
    [
        {"url": "u", "body": "b"},
        {"instruction": "i", "input": "x"},
        {"prompt": "p", "chosen": "c"},
        {"instruction": 1, "output": "o"},
        {"instruction": "i", "output": None},
        {"prompt": "p", "completion": ["c"]},
        {"conversations": []},
        {"conversations": {"from": ["human"], "value": []}},
        {"conversations": {"from": [], "value": []}},
        {"conversations": "x"},
        {"conversations": [{"from": "nobody", "value": "a"}]},
        {"conversations": [{"from": "human", "value": 1}]},
        {"conversations": [{"speaker": "human"}]},
        {"messages": [{"role": "user", "content": [1]}]},
        {"messages": [{"role": "user", "content": {"a": 1}}]},
        {"messages": [{"role": "user", "content": "a"}], "tools": "[{"},
    ],
)
def test_a_record_without_text_is_refused(tmp_path, record):
    """Naming its place, and the keys or values found."""
    with pytest.raises(CoterieError, match=r"a\.jsonl:1"):
        texts(put(tmp_path, "a.jsonl", json.dumps(record)))


def test_the_keys_found_are_named(tmp_path):
    """In a list of records as in lines."""
    with pytest.raises(CoterieError, match=r"found an object with keys \['body', 'url'\]; expected exactly one of"):
        texts(put(tmp_path, "a.json", json.dumps([{"url": "u", "body": "b"}])))


# --- together -----------------------------------------------------------------------------------------------------


def test_what_was_read_is_said_in_one_line(tmp_path):
    """How many documents of which form, by name."""
    chat = [{"conversations": [{"from": "human", "value": "a"}]}, {"messages": [{"role": "user", "content": "a"}]}]
    files = {
        "c4": put(tmp_path, "c4.json", LINES),
        "book": put(tmp_path, "book.txt", "words"),
        "chat": put(tmp_path, "chat.json", json.dumps(chat)),
    }
    documents, notes = read_all(files)
    assert list(map(len, documents.values())) == [3, 1, 2]
    assert notes == ["documents read: c4: 3 of text; book: 1 of plain text; chat: 1 of conversations, 1 of messages"]


def test_calibration_sees_no_syntax(tmp_path):
    """Every file that `calibration_files` of a user may hold gives tokens of its texts alone."""
    answers = [{"instruction": "Say it.", "input": "", "output": text} for text in TEXTS]
    shares = [{"conversations": [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": t}]} for t in TEXTS]
    for number, content in enumerate((LINES, json.dumps(ROWS), json.dumps(answers, indent=1), json.dumps(shares))):
        documents, _ = read_all({"x": put(tmp_path, f"{number}.json", content)})
        found, _ = draw(documents, Characters(), samples=100, seq_len=5, seed=0, max_positions=None)
        drawn = "".join(chr(token) for sample in found["x"] for token in sample)
        assert "2. passage" in drawn and not set(drawn) & set('{}"') and "http" not in drawn
