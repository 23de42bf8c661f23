"""Attacks by arrays: statistics files, and the packed tensors of a sparse checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from attacks.corpus import ESCAPE, JSON_BOMBS, TB, Make, add_all, alone, pipe, shard
from coterie.codecs import bits as fmt
from coterie.model.stats import FORMAT, SUMS, Stats
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.pack import pack
from handmade import HIDDEN, WIDTH, qwen, read_all, save

SIZES = {"E": 8, "D": HIDDEN, "F": WIDTH}


def sound_stats(model: Path) -> Stats:
    """Statistics that `prune` takes: every sum of every layer, all ones."""
    stats = Stats(Checkpoint.open(model).hash, {"d": 4})
    for layer in ("0", "1"):
        for name, (axes, _) in SUMS.items():
            stats.add("d", layer, name, np.ones((2, *(SIZES[a] for a in axes))))
    return stats


def stats(change: Callable[[dict[str, np.ndarray], dict[str, str]], Any]) -> Make:
    """A statistics file whose arrays or metadata were changed."""

    def make(folder: Path) -> Path:
        from safetensors.numpy import save_file

        found = sound_stats(qwen(folder / "model"))
        arrays = {"/".join(key): value for key, value in found.sums.items()}
        metadata = {"format": FORMAT, "model": found.model, "samples": json.dumps(found.samples), "notes": "[]"}
        change(arrays, metadata)
        save_file(arrays, folder / "stats", metadata=metadata)
        return folder / "stats"

    return make


def filled(value: float, name: str = "d/0/gated_output_norms") -> Make:
    return stats(lambda arrays, _: arrays.update({name: np.full_like(arrays[name], value)}))


def metadata(**changes: str) -> Make:
    return stats(lambda _, found: found.update(changes))


def reshaped(*shape: int) -> Make:
    return stats(lambda arrays, _: arrays.update({"d/0/gated_output_norms": np.ones(shape)}))


TERABYTE = shard(
    {
        "__metadata__": {"format": FORMAT, "model": "", "samples": '{"d":1}'},
        "d/0/tokens": {"dtype": "F64", "shape": [2, TB // 16], "data_offsets": [0, TB]},
    }
)
add_all(
    "stats",
    {
        "sums-nan": ("A sum that is no number.", filled(np.nan)),
        "sums-infinite": ("A sum that is infinite.", filled(np.inf)),
        "sums-overflow": ("Sums whose squares overflow.", filled(1e300)),
        "sums-of-other-experts": ("Sums of three experts, of a model with eight.", reshaped(2, 3)),
        "sums-of-no-experts": ("Sums of no experts.", reshaped(2, 0)),
    },
    "ties",  # which reads other sums
)
add_all(
    "stats",
    {
        "sums-of-one-half": ("Sums of one half.", reshaped(1, 8)),
        "sums-with-axes": ("Sums with an axis too many.", reshaped(2, 8, 8)),
        "sums-unknown": (
            "A sum that nobody knows, named by escape sequences.",
            stats(lambda a, _: a.update({f"d/0/{ESCAPE}": np.ones(2)})),
        ),
        "sums-missing": (
            "A layer without sums.",
            stats(lambda a, _: [a.pop(n) for n in list(a) if n.startswith("d/1/")]),
        ),
        "sums-of-nobody": ("Sums of a domain that gave no samples.", metadata(samples="{}")),
        "model-escapes": ("A fingerprint that holds escape sequences.", metadata(model=ESCAPE)),
        "samples-long": (
            "A count of samples of 100,000 digits in a string.",
            metadata(samples=json.dumps({"d": "9" * 100_000})),
        ),
        "samples-infinite": ("A count of samples that is infinite.", metadata(samples='{"d":Infinity}')),
        "samples-deep": ("Samples of 100,000 nested lists.", metadata(samples="[" * 100_000)),
        "samples-surrogate": (
            "A domain named by half a surrogate pair.",
            metadata(samples='{"d":4,"\\ud800":4}', model="0"),
        ),
        "samples-many-lists": (
            "Samples of 10 million empty lists.",
            stats(lambda _, found: found.update(samples='{"d":[' + "[]," * 10**7 + "[]]}")),
        ),
        "notes-a-number": ("Notes that are a number.", metadata(notes="3")),
        "format-escapes": ("A format named by escape sequences.", metadata(format=ESCAPE)),
        "stats-are-weights": (
            "Weights where statistics should be.",
            alone("stats", shard({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8))),
        ),
        "stats-a-pipe": ("A named pipe, to wait for ever.", pipe("stats")),
        "stats-sparse": (
            "A sum of a terabyte in a sparse file.",
            alone("stats", TERABYTE, len(TERABYTE) + TB),
        ),
    },
)
add_all(
    "stats",
    {
        f"stats-{name}": (f"Statistics: {tries}", alone("stats", lambda raw=raw: shard(raw())))
        for name, (tries, raw) in JSON_BOMBS.items()
    },
)


# --- sparse checkpoints -------------------------------------------------------------------------------------------


def packed(change: Callable[[dict[str, np.ndarray], str], Any]) -> Make:
    """A packed checkpoint whose parts were changed; `name` is a packed tensor's."""

    def make(folder: Path) -> Path:
        draw = np.random.default_rng(0)
        dense = qwen(folder / "dense", layers=1)
        tensors = read_all(dense)
        for name in [n for n in tensors if "experts." in n and n.endswith("up_proj.weight")]:
            values = draw.normal(size=(64, 96)).astype(np.float32)
            tensors[name] = values * (draw.random((64, 96)) < 0.5)
        config = json.loads((dense / "config.json").read_text())
        save(dense, config, [tensors])
        pack(dense, folder / "model")
        arrays = read_all(folder / "model")
        name = min(n.removesuffix(".layout") for n in arrays if n.endswith(".layout"))
        change(arrays, name)
        save(folder / "model", json.loads((folder / "model" / "config.json").read_text()), [arrays])
        return folder / "model"

    return make


def part(name: str, index: Any, value: Any) -> Make:
    """One value of one part changed."""

    def change(arrays: dict[str, np.ndarray], tensor: str) -> None:
        arrays[f"{tensor}.{name}"][index] = value

    return packed(change)


def swapped(name: str, new: Callable[[np.ndarray], np.ndarray]) -> Make:
    """One part replaced."""

    def change(arrays: dict[str, np.ndarray], tensor: str) -> None:
        arrays[f"{tensor}.{name}"] = np.ascontiguousarray(new(arrays[f"{tensor}.{name}"]))

    return packed(change)


add_all(
    "packed",
    {
        "columns-huge": ("A matrix of 2^62 columns.", part("layout", 0, 2**62)),
        "columns-more": ("More columns than the mask has bits.", part("layout", 0, 2000)),
        "columns-fewer": ("Fewer columns than the mask keeps.", part("layout", 0, 90)),
        "columns-none": ("No columns.", part("layout", 0, 0)),
        "columns-negative": ("A negative number of columns.", part("layout", 0, -96)),
        "group-huge": ("Scales for groups of 2^62 columns.", part("layout", 1, 2**62)),
        "group-without-scales": ("Groups, and no scales.", part("layout", 1, fmt.GROUP)),
        "checksum-wrong": ("A checksum of other values.", part("layout", 2, 1)),
        "checksum-negative": ("A negative checksum.", part("layout", 2, -1)),
        "rows-keep-more": ("A row that keeps more values than are stored, to read behind them.", part("rows", 0, 255)),
        "rows-all-full": ("Rows whose sum goes far beyond the values.", part("rows", slice(None), 255)),
        "rows-swapped": ("Two rows that swapped their counts.", swapped("rows", lambda r: np.roll(r, 1))),
        "mask-full": ("A mask that keeps everything.", part("mask", slice(None), 2**32 - 1)),
        "mask-flipped": ("One bit of the mask.", part("mask", (0, 0), 0)),
        "mask-flat": ("A mask without rows.", swapped("mask", lambda m: m.reshape(-1))),
        "mask-of-floats": ("A mask of floats.", swapped("mask", lambda m: m.astype(np.float32))),
        "mask-empty": ("A mask without a word.", swapped("mask", lambda m: m[:0])),
        "values-cut": ("Half of the values.", swapped("values", lambda v: v[: len(v) // 2])),
        "values-square": ("Values with two axes.", swapped("values", lambda v: v.reshape(2, -1))),
        "values-of-integers": ("Values as integers of 64 bits.", swapped("values", lambda v: v.astype(np.int64))),
        "values-changed": ("One value changed.", part("values", 0, 12345.0)),
        "layout-empty": ("A layout of nothing.", swapped("layout", lambda x: x[:0])),
        "layout-long": ("A layout of a million matrices.", swapped("layout", lambda x: np.resize(x, 10**6))),
        "layout-missing": ("Parts without their layout.", packed(lambda a, n: a.pop(f"{n}.layout"))),
        "mask-missing": ("A layout without its mask.", packed(lambda a, n: a.pop(f"{n}.mask"))),
        "stored-twice": (
            "A tensor packed, and dense beside it.",
            packed(lambda a, n: a.update({n: np.ones((64, 96), np.float32)})),
        ),
        "scales-too-many": (
            "Scales that belong to nothing.",
            packed(lambda a, n: a.update({f"{n}.scales": np.ones((64, 1), np.float32)})),
        ),
    },
)
