"""Attacks by data: what `--data NAME=FILE` names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from attacks.corpus import ESCAPE, JSON_BOMBS, TB, Make, add_all, alone, attack, link, pipe


def rows(*entries: Any) -> Make:
    return alone("data.jsonl", b"".join(json.dumps(e).encode() + b"\n" for e in entries))


IDS = {"input_ids": [1, 2, 3, 4] * 8}
add_all(
    "data",
    {
        "token-huge": ("A token id of 4,000 digits.", rows({"input_ids": [1, 10**4000]})),
        "token-beyond": ("A token id beyond the vocabulary.", rows(IDS, {"input_ids": [1, 4096]})),
        "token-negative": ("Token -1, the last one to an array.", rows({"input_ids": [1, -1]})),
        "token-float": ("A token id that is a float.", rows({"input_ids": [1, 2.0]})),
        "token-true": ("A token id that is a boolean.", rows({"input_ids": [1, True]})),
        "token-infinite": ("A token id that is infinite.", rows({"input_ids": [1, float("inf")]})),
        "tokens-none": ("No token ids.", rows({"input_ids": []})),
        "tokens-nested": ("Token ids in lists.", rows({"input_ids": [[1, 2], [3, 4]]})),
        "text-a-number": ("A text that is a number.", rows({"text": 1})),
        "text-half-surrogate": ("A text with half of a surrogate pair.", rows({"text": "a\ud800b"})),
        "keys-of-escapes": ("A row whose keys hold escape sequences.", rows({ESCAPE: 1})),
        "key-twice": ("A row that gives its text twice.", alone("data.jsonl", b'{"text":"a","text":"b"}\n')),
        "row-mixed": ("Texts and problems in one file.", rows({"text": "a"}, {"prompt": "1+1", "answer": "2"})),
        "messages-of-strings": ("A conversation of strings.", rows({"messages": ["a"]})),
        "messages-role-escapes": ("A role that is a list.", rows({"messages": [{"role": [ESCAPE]}]})),
        "data-blank": ("Blank lines.", alone("data.jsonl", b"\n" * 100_000)),
        "data-null-bytes": ("Null bytes.", alone("data.jsonl", bytes(10**6))),
        "data-not-utf8": ("A text that is no UTF-8.", alone("data.txt", b"abc\xff\xfe" * 100)),
        "data-sparse": ("A text of 10 TB in a sparse file.", alone("data.txt", b"a", 10 * TB)),
        "data-sparse-rows": ("Rows of 10 TB in a sparse file.", alone("data.jsonl", b'{"text":"a"}\n', 10 * TB)),
        "data-of-one-row": ("One row of 200 MB of zeros.", alone("data.jsonl", b"{", 200 << 20)),
        "data-a-pipe": ("A named pipe, to wait for ever.", pipe("data.jsonl")),
        "data-a-device": ("A file that never ends.", link("data.jsonl", "/dev/zero")),
        "data-the-process": ("A file of no size that never ends.", link("data.jsonl", "/proc/self/mem")),
        "data-empty": ("A file without a byte.", alone("data.jsonl", b"")),
        "parquet-garbage": ("A Parquet file that is none.", alone("data.parquet", b"PAR1" + b"\xff" * 1000 + b"PAR1")),
        "parquet-length": (
            "A Parquet footer of 2^32 - 1 bytes.",
            alone("data.parquet", b"PAR1" + bytes(100) + b"\xff\xff\xff\xff" + b"PAR1"),
        ),
    },
)
add_all(
    "data",
    {
        f"row-{name}": (f"Row: {tries}", alone("data.jsonl", lambda raw=raw: raw() + b"\n"))
        for name, (tries, raw) in JSON_BOMBS.items()
    },
)


@attack("data", "A folder whose data are links in circles and pipes.")
def data_folder_of_circles(folder: Path) -> Path:
    data = folder / "data"
    data.mkdir()
    (data / "a.jsonl").symlink_to("a.jsonl")
    (data / "up").symlink_to("..")
    os.mkfifo(data / "b.jsonl")
    return data
