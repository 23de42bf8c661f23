"""Data files: how they are named, what they may hold, and how bad ones are refused."""

import json
import os
import subprocess
import sys

import pytest

from coterie.data import Document, encode, parse_data, read_documents
from coterie.errors import CoterieError


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_names_and_files(tmp_path):
    """`NAME=FILE` splits at the first equals sign and keeps the order."""
    a, b = write(tmp_path, "a.txt", "a"), write(tmp_path, "b=c.txt", "b")
    assert list(parse_data([f"prose={a}", f"code={b}"]).items()) == [("prose", a), ("code", b)]


@pytest.mark.parametrize("item", ["", "prose", "=a.txt", " =a.txt", "prose="])
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
    """Everything but `.jsonl` and `.ndjson` is one text, newlines and all, without a byte order mark."""
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
    with pytest.raises(CoterieError, match=r"a\.txt: byte 3 is not UTF-8"):
        list(read_documents(write(tmp_path, "a.txt", b"abc\xff")))


def test_token_ids_need_no_tokenizer():
    """Token ids are used as given; text without a tokenizer is refused."""
    assert encode(Document("a:1", input_ids=(5, 6)), None) == [5, 6]
    with pytest.raises(CoterieError, match="a:2: text needs a tokenizer"):
        encode(Document("a:2", text="hello"), None)


def test_import_is_light():
    """The module imports neither torch nor transformers, so that the command line starts at once."""
    code = (
        "import json, sys, coterie.data; print(json.dumps([m for m in ('torch', 'transformers') if m in sys.modules]))"
    )
    assert json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout) == []
