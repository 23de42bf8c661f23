"""Attacks on a model folder: its index, its links, its devices and pipes, and what else lies in it."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from attacks.corpus import ESCAPE, JSON_BOMBS, TB, add_all, attack, with_file
from handmade import block, qwen, qwen_config, save

INDEX = "model.safetensors.index.json"


def index_to(shard: Any) -> Any:
    """An index that places a tensor in `shard`."""
    return with_file(INDEX, json.dumps({"weight_map": {"model.embed_tokens.weight": shard}}).encode())


add_all(
    "model",
    {
        "index-climbs": ("A shard above the folder.", index_to("../outside.safetensors")),
        "index-absolute": ("A shard at an absolute path.", index_to("/etc/passwd.safetensors")),
        "index-backslashes": ("A shard above the folder, as Windows spells it.", index_to("..\\outside.safetensors")),
        "index-null-byte": ("A shard's name cut short by a null byte.", index_to("a\0.safetensors")),
        "index-escapes": ("A shard's name that holds escape sequences.", index_to(f"{ESCAPE}.safetensors")),
        "index-not-a-string": ("A list where a shard's name should be.", index_to(["model.safetensors"])),
        "index-of-a-device": ("A device where a shard should be.", index_to("/dev/zero")),
        "index-long-name": ("A shard's name that no file system takes.", index_to("a" * 5000 + ".safetensors")),
        "index-pickle": ("A pickle where a shard should be.", index_to("pytorch_model.bin")),
        "index-missing-shard": ("A shard that is not there.", index_to("model-00009-of-00009.safetensors")),
        "index-maps-nothing": ("An index without tensors.", with_file(INDEX, b'{"weight_map":{}}')),
    },
)
add_all(
    "model",
    {f"index-{name}": (f"Index: {tries}", with_file(INDEX, raw)) for name, (tries, raw) in JSON_BOMBS.items()},
)
add_all(
    "model",
    {
        f"config-{name}": (f"Config: {tries}", with_file("config.json", raw))
        for name, (tries, raw) in JSON_BOMBS.items()
    },
)


def linked(name: str, target: str | Path) -> Any:
    """A sound model, one of whose files is a link to `target`."""

    def make(folder: Path) -> Path:
        model = qwen(folder / "model", layers=1)
        if target == "outside":
            (model / name).rename(folder / "outside")
        else:
            (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(folder / "outside" if target == "outside" else target)
        return model

    return make


add_all(
    "model",
    {
        "weights-linked-outside": (
            "Weights that are a link out of the folder.",
            linked("model.safetensors", "outside"),
        ),
        "weights-linked-to-a-device": ("Weights that never end.", linked("model.safetensors", "/dev/zero")),
        "weights-linked-in-a-circle": (
            "Weights that are a link to themselves.",
            linked("model.safetensors", "model.safetensors"),
        ),
        "weights-linked-to-passwd": (
            "Weights that are a link to a file of the system.",
            linked("model.safetensors", "/etc/passwd"),
        ),
        "config-linked-outside": ("A config that shows a file of somebody else.", linked("config.json", "outside")),
        "config-linked-to-a-device": ("A config that never ends.", linked("config.json", "/dev/zero")),
        "config-linked-to-the-process": (
            "A config of no size that never ends.",
            linked("config.json", "/proc/self/mem"),
        ),
        "index-linked-outside": ("An index that shows a file of somebody else.", linked(INDEX, "/etc/passwd")),
    },
)


@attack("model", "Weights that are a named pipe, to wait for ever.")
def weights_are_a_pipe(folder: Path) -> Path:
    model = qwen(folder / "model", layers=1)
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    return model


@attack("model", "A config that is a named pipe, to wait for ever.")
def config_is_a_pipe(folder: Path) -> Path:
    model = qwen(folder / "model", layers=1)
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    return model


@attack("model", "An index of 10 TB in a sparse file.")
def index_sparse(folder: Path) -> Path:
    model = with_file(INDEX, b"{")(folder)
    os.truncate(model / INDEX, 10 * TB)
    return model


@attack("model", "A tokenizer of 10 TB in a sparse file, to fill the disk when it is copied.", "inspect", "verify")
def tokenizer_fills_the_disk(folder: Path) -> Path:
    model = with_file("vocab.txt", b"a")(folder)
    os.truncate(model / "vocab.txt", 10 * TB)
    return model


class _Bomb:
    """Runs when it is unpickled: makes the folder PWNED where the program stands."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("PWNED",)


@attack("model", "Pickled weights only, which run code when they are opened.")
def pickles_only(folder: Path) -> Path:
    model = qwen(folder / "model", layers=1)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    return model


@attack("model", "Two weight files that both hold a tensor, without an index.")
def tensor_in_two_shards(folder: Path) -> Path:
    model = qwen(folder / "model", layers=1, num_shards=2)
    (model / INDEX).unlink()
    first, second = sorted(model.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    return model


@attack("model", "A weight file whose name holds escape sequences, named by no index, and is damaged.")
def shard_name_escapes(folder: Path) -> Path:
    model = qwen(folder / "model", layers=1)
    (model / "model.safetensors").rename(model / f"model-{ESCAPE}.safetensors")
    os.truncate(model / f"model-{ESCAPE}.safetensors", 100)
    return model


@attack(
    "model",
    "Files whose names hold escape sequences or are no UTF-8, to be named in a note.",
    "inspect",
    "dry",
    "prune",
    "verify",
)
def other_names_escape(folder: Path) -> Path:
    model = qwen(folder / "model", layers=1)
    for name in (f"{ESCAPE}.py", f"a\n{ESCAPE}.bin", f"{ESCAPE}.txt"):
        (model / name).write_bytes(b"import os")
    Path(os.fsdecode(bytes(model) + b"/\xff\xfe.py")).write_bytes(b"import os")
    return model


@attack("model", "Two layers of one number in two stacks, so that one decision would cut both.")
def layer_in_two_stacks(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    router = draw.normal(size=(8, 4))
    tensors = block("model.layers.0.", router, draw) | block("decoder.layers.0.", router, draw)
    return save(folder / "model", qwen_config(num_hidden_layers=1), [tensors])


@attack("model", "Layers 0 and 00, one number to who converts it.")
def layer_with_zeros(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    router = draw.normal(size=(8, 4))
    tensors = block("model.layers.0.", router, draw) | block("model.layers.00.", router, draw)
    return save(folder / "model", qwen_config(num_hidden_layers=1), [tensors])


@attack("model", "A layer's number in Arabic digits.")
def layer_in_other_digits(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    tensors = block("model.layers.\u0660.", draw.normal(size=(8, 4)), draw)
    return save(folder / "model", qwen_config(num_hidden_layers=1), [tensors])


@attack("model", "A router with NaN, which every distance and every mean takes over.", "inspect", "verify", "pack")
def router_nan(folder: Path) -> Path:
    return _with_router(folder, np.nan)


@attack("model", "A router with infinity.", "inspect", "verify", "pack")
def router_infinite(folder: Path) -> Path:
    return _with_router(folder, np.inf)


@attack("model", "A router of zeros, to divide by its norm.", "inspect", "dry", "prune", "verify", "pack")
def router_zero(folder: Path) -> Path:
    return qwen(folder / "model", layers=1, routers=[np.zeros((8, 4))])


@attack("model", "A router of the largest floats, whose squares overflow.", "inspect", "dry", "prune", "verify", "pack")
def router_overflows(folder: Path) -> Path:
    return qwen(folder / "model", layers=1, routers=[np.full((8, 4), 3e38) * np.array([[1], [-1]] * 4)])


def _with_router(folder: Path, value: float) -> Path:
    router = np.random.default_rng(0).normal(size=(8, 4))
    router[3, 1] = value
    return qwen(folder / "model", layers=1, routers=[router])
