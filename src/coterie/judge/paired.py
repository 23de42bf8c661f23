"""Two models on the same tokens: what `coterie eval --against` adds, and what `coterie report` shows.

A difference between two models is known far better than either's own value, since texts that are hard for one are hard
for the other. `judge/quality.py` fills a `Kept` per model while it measures; `compare` sets two of them side by side.
Axes: T token, K top-k.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from coterie.edits.lineage import Fate, fate, plans_between
from coterie.errors import CoterieError
from coterie.forward.documents import Document
from coterie.forward.tokens import encode
from coterie.model import loading
from coterie.model.layer import Model
from coterie.model.moe import experts_modules
from coterie.storage.checkpoint import Checkpoint

logger = logging.getLogger("coterie")

RESAMPLES = 1000  # of the bootstrap
GRAM = 4  # tokens that make up a repetition
MOST_ROUTED = 16384  # tokens of each data set whose experts are compared: their ids stay in memory
INTERVAL = "95 %, bootstrap over windows"

ARRAYS = ("losses", "counts", "right", "cut")  # of what is kept, by data set

Choices = dict[str, np.ndarray]  # layer -> chosen ids (T, K)
Interval = dict[str, float]  # "value", "low", "high", and of how many "tokens" or problems ("count")


class Paired(TypedDict):
    """One model against another on the same data; by data set, unless another key is named.

    difference: of log-likelihood per token, nats, this model's minus the original's: negative is worse. flipped: the
    share of problems that one of the two solves and the other does not. repetition: of "model" and "against".
    router_overlap: by original layer; layers that are no longer routed, or whose experts no record leads back to the
    original's, have none. mean: difference over data sets, which `report` adds.
    """

    against: str
    interval: str
    difference: dict[str, Interval]
    flipped: dict[str, float]
    repetition: dict[str, dict[str, float | None]]
    router_overlap: dict[str, float]
    mean: NotRequired[Interval | None]


@dataclass
class Kept:
    """What one model's evaluation leaves to be compared, by data set."""

    routers: bool = True  # whether to look at them
    losses: dict[str, np.ndarray] = field(default_factory=dict)  # nats, summed over what each window newly scores
    counts: dict[str, np.ndarray] = field(default_factory=dict)  # of the tokens in those sums
    right: dict[str, np.ndarray] = field(default_factory=dict)  # of each problem
    generated: dict[str, list[list[int]]] = field(default_factory=dict)  # tokens
    cut: dict[str, np.ndarray] = field(default_factory=dict)  # of each problem: ended before its answer was complete
    chosen: dict[str, Choices] = field(default_factory=dict)
    num_experts: dict[str, int] = field(default_factory=dict)  # that the router of each layer chooses among

    def save(self, path: Path) -> None:
        """All of it in one file: arrays by field and data set, and the rest as JSON."""
        by_set = {f"{name}/{key}": value for name in ARRAYS for key, value in getattr(self, name).items()}
        chosen = {f"chosen/{layer}/{key}": ids for key, found in self.chosen.items() for layer, ids in found.items()}
        rest = {"routers": self.routers, "generated": self.generated, "num_experts": self.num_experts}
        rest |= {"sets": [*self.chosen]}
        save_file({k: np.ascontiguousarray(v) for k, v in (by_set | chosen).items()}, path, {"rest": json.dumps(rest)})

    @classmethod
    def load(cls, path: Path) -> Kept:
        """What `save` wrote. Raises: CoterieError for a damaged file."""
        try:
            with safe_open(path, "np") as file:
                rest, found = json.loads(file.metadata()["rest"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            kept = cls(rest["routers"], generated=rest["generated"], num_experts=rest["num_experts"])
            kept.chosen = {name: {} for name in rest["sets"]}
            for key, value in found.items():
                name, _, key = key.partition("/")
                if name == "chosen":
                    layer, _, data_set = key.partition("/")
                    kept.chosen[data_set][layer] = value
                else:
                    getattr(kept, name)[key] = value
        except Exception as error:  # a damaged file can provoke anything in there
            raise CoterieError(f"{path}: damaged ({error!s:.200}); start anew with --overwrite") from error
        return kept

    @contextmanager
    def watch(self, name: str, model: Any) -> Iterator[None]:
        """While entered, notes which experts every layer's router chooses, for the first tokens of a data set."""
        found: dict[str, list[np.ndarray]] = {}
        routers = routing_modules(model) if self.routers else {}
        self.num_experts = {key: n for key, (_, n) in routers.items()}
        with ExitStack() as hooks:
            for key, (module, _) in routers.items():
                note = partial(_note, found.setdefault(key, []))
                hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
            yield
        self.chosen[name] = {key: np.concatenate(parts) for key, parts in found.items() if parts}


def routing_modules(model: Any) -> dict[str, tuple[torch.nn.Module, int]]:
    """Layer -> the module that is handed chosen ids, and how many experts the router chooses among.

    Layers whose experts transformers does not open are left out, and so are layers with several.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or not experts_modules(decoder):
        return {}
    routers = {}
    for index, layer in enumerate(loading.decoder_layers(decoder, type(model).__name__)):
        found = experts_modules(layer)
        if len(found) != 1:
            continue
        routes = next((m for m in layer.modules() if hasattr(m, "routes") and found[0] in m.children()), None)
        num_experts = len(routes.routes) if routes is not None else int(found[0].num_experts)  # type: ignore[arg-type]
        routers[str(index)] = (routes or found[0], num_experts)
    return routers


def _note(parts: list[np.ndarray], module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Keeps the chosen ids, the second argument of every experts module, until there are enough."""
    room = MOST_ROUTED - sum(map(len, parts))
    if room > 0:
        ids = args[1] if len(args) > 1 else kwargs["top_k_index"]
        parts.append(ids.reshape(-1, ids.shape[-1])[:room].to(torch.int32).cpu().numpy())


# Before anything is measured


def check_tokens(against: str | Path, paths: Sequence[str | Path], documents: Mapping[str, Sequence[Document]]) -> None:
    """Raises: CoterieError where a model's tokenizer makes other tokens of the data than the original's."""
    needed = {name: entries for name, entries in documents.items() if any(d.input_ids is None for d in entries)}
    if not needed:
        return
    original = loading.load_tokenizer(against)
    for path in paths:
        if same_model(path, against):
            continue
        other = loading.load_tokenizer(path)
        for entries in needed.values():
            for document in entries:
                if encode(document, original) != encode(document, other):
                    raise CoterieError(
                        f"{path}: its tokenizer makes other tokens of {document.where} than that of {against}; "
                        "expected the same tokens for a paired comparison: evaluate it without --against"
                    )


def same_model(one: str | Path, other: str | Path) -> bool:
    """Whether two arguments name one folder, or one hub id."""
    return str(one) == str(other) or (
        Path(one).is_dir() and Path(other).is_dir() and Path(one).resolve() == Path(other).resolve()
    )


# Comparing


def compare(path: str | Path, kept: Kept, against: str | Path, original: Kept, *, seed: int) -> Paired:
    """`kept` of the model at `path` against `original`, measured on the same data with the same options.

    Raises: CoterieError where windows differ, as they do when a model has fewer positions.
    """
    for name, counts in original.counts.items():
        if not np.array_equal(counts, kept.counts[name]):
            raise CoterieError(
                f"{path}: {name} falls into {len(kept.counts[name])} windows, and for {against} into {len(counts)}; "
                "expected the same: give a --window that fits the positions of both"
            )
    return {
        "against": str(against),
        "interval": INTERVAL,
        "difference": {name: _difference(name, kept, original, seed) for name in original.losses},
        "flipped": {name: float(np.mean(right != kept.right[name])) for name, right in original.right.items()},
        "repetition": {
            name: {"model": repetition(kept.generated[name]), "against": repetition(original.generated[name])}
            for name in original.generated
        },
        "router_overlap": router_overlap(path, kept, against, original),
    }


def _difference(name: str, kept: Kept, original: Kept, seed: int) -> Interval:
    counts = original.counts[name]
    value, low, high = bootstrap_mean(original.losses[name] - kept.losses[name], counts, seed)
    return {"value": value, "low": low, "high": high, "tokens": int(counts.sum())}


def bootstrap_mean(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float, float, float]:
    """sum s_b / sum n_b over blocks b, with its 95 % interval (low, high) from a block bootstrap.

    Neighbouring tokens share their context, so blocks are resampled, not tokens: block b is the tokens newly scored by
    one window, with the sum s_b (`sums`) over n_b of them (`counts`). Of 1000 draws of as many blocks, with
    replacement, each gives a mean; the interval is the 2.5th to the 97.5th percentile. One block gives no width.
    """
    value = float(sums.sum() / counts.sum())
    low, high = (float(p) for p in np.percentile(resampled_means(sums, counts, seed), [2.5, 97.5]))
    return value, min(low, value), max(high, value)  # equal blocks differ in the last bit by order of addition


def resampled_means(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """The means of 1000 draws of blocks with replacement: the same draws for the same seed and number of blocks."""
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    return means


def mean_of_sets(sets: Mapping[str, tuple[np.ndarray, np.ndarray]], seed: int) -> Interval | None:
    """The mean over data sets, each counting once, of their means per token, with its 95 % interval; None without any.

    `sets`: sums and counts by block, as for `bootstrap_mean`; each data set is resampled on its own.
    """
    if not sets:
        return None
    value = float(np.mean([sums.sum() / counts.sum() for sums, counts in sets.values()]))
    draws = [resampled_means(sums, counts, seed + i) for i, (sums, counts) in enumerate(sets.values())]
    low, high = (float(p) for p in np.percentile(np.mean(draws, axis=0), [2.5, 97.5]))
    return {"value": value, "low": min(low, value), "high": max(high, value)}


def repetition(texts: Sequence[Sequence[int]]) -> float | None:
    """The share of 4-grams of tokens that stood earlier in the same text; nothing where no text has four tokens."""
    repeated = total = 0
    for tokens in texts:
        grams = Counter(tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1))
        total += grams.total()
        repeated += grams.total() - len(grams)
    return repeated / total if total else None


# Routers


def router_overlap(path: str | Path, kept: Kept, against: str | Path, original: Kept) -> dict[str, float]:
    """By original layer, the mean over tokens of |A n B| / |A u B|, A and B the experts that each model chose.

    An average of a cluster counts as the expert whose place it took.
    """
    if not any(kept.chosen.values()) or not any(original.chosen.values()):
        return {}
    places = _places(path, kept, against, original)
    sums: dict[str, float] = {}
    sizes: Counter[str] = Counter()
    for name, choices in original.chosen.items():
        for key, (layer, ids) in places.items():
            if layer in choices and key in kept.chosen[name]:
                found = jaccard(choices[layer], np.asarray(ids)[kept.chosen[name][key]])
                sums[layer] = sums.get(layer, 0.0) + float(found.sum())
                sizes[layer] += len(found)
    return {layer: sums[layer] / sizes[layer] for layer in sorted(sums, key=int)}


def jaccard(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """|A n B| / |A u B| of each row of two arrays (T, K) of distinct ids; K may differ."""
    common = (one[:, :, None] == other[:, None, :]).any(-1).sum(-1)
    return common / (one.shape[1] + other.shape[1] - common)


def _places(
    path: str | Path, kept: Kept, against: str | Path, original: Kept
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Layer of the model at `path` -> the original's layer, and the original ids of its experts."""
    known = experts_fate(path, against)
    if known is not None:
        return known.routed
    if kept.num_experts == original.num_experts:
        return {key: (key, tuple(range(n))) for key, n in kept.num_experts.items()}
    logger.warning(
        "%s: no coterie.json leads back to %s, so its experts' original ids are unknown: no router overlap",
        path,
        against,
    )
    return {}


def experts_fate(path: str | Path, against: str | Path) -> Fate | None:
    """What became of the experts of `against` in the model at `path`; nothing where no record says so.

    Raises: CoterieError for a damaged record.
    """
    checkpoint = Checkpoint.open(against)
    plans = plans_between(path, checkpoint.hash)
    if plans is None:
        return None
    source = Model.of(checkpoint)
    return fate(plans, {block.key: block.num_experts for block in source.main})
