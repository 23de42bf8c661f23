"""The page of `coterie analyze`: advice first, then the same numbers as tables and plots with a layer to select.

Matrices of many experts are shown as means over groups of neighbours, and where all of them would make a page of
many megabytes they are left out of the numbers that it carries; it says so, and `--json` has them whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coterie.judge.rounding import LEVELS
from coterie.pages.page import (
    Bar,
    Bars,
    Cell,
    Grid,
    Heatmap,
    Number,
    Part,
    Point,
    Scatter,
    Section,
    Table,
    Text,
    View,
    page,
)

MOST_ROWS = 64  # of a heatmap
MOST_CELLS = 2**21  # numbers of all matrices that the page carries
MATRICES = {  # what a heatmap is called: where its numbers are, of each layer
    "outputs of the same tokens": ("cosine", "outputs"),
    "weights as stored": ("cosine", "weights"),
    "weights, neurons aligned": ("alignment", "cosine"),
    "router rows": ("cosine", "router"),
}
Layers = list[dict[str, Any]]


def shown(result: dict[str, Any]) -> str:
    """The page of what `analyze` returns, as HTML."""
    layers: Layers = result["layers"]
    tokens = sum(domain["tokens"] for domain in result["domains"].values())
    title = f"The experts of {result['model']['path']}"
    intro = (
        f"{len(layers)} MoE layers, {layers[0]['num_experts']} experts, {layers[0]['chosen']} chosen per token; "
        f"measured on {tokens:,} tokens of {', '.join(result['domains'])}."
    )
    numbers, left_out = _carried(result)
    sections = [
        Section("Advice", (_advice(result["advice"]), Text((*result["notes"], *left_out)))),
        Section("How alike experts are", _likeness(layers)),
        Section("Norms against gates", _norms(layers)),
        Section("What if others had run", (_counterfactual(layers),)),
        Section("What compression could use", _compression(layers)),
        Section("Who works when", _routing(layers)),
    ]
    return page(title, intro, sections, numbers=numbers)


def _carried(result: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The numbers that the page offers to save, and what is missing from them."""
    layers: Layers = result["layers"]
    cells = sum((len(entry["cosine"]) + 3) * entry["num_experts"] ** 2 for entry in layers)
    if cells <= MOST_CELLS:
        return result, []
    matrices = ("cosine", "alignment", "coactivation")
    less = [{name: value for name, value in entry.items() if name not in matrices} for entry in layers]
    return result | {"layers": less}, [
        f"Matrices ({cells:,} numbers) are not among the numbers that this page saves; "
        "coterie analyze --json prints them."
    ]


def _advice(advice: list[dict[str, Any]]) -> Text:
    return Text(tuple(f"{item['about'].capitalize()}: {item['text']}" for item in advice))


def _likeness(layers: Layers) -> tuple[Part, ...]:
    head = ("layer", "outputs", "weights", "aligned", "aligned, by chance", "router rows", "pairs of 0.9", "R² by gate")
    rows = tuple(
        (
            _key(entry),
            entry["probe"]["outputs_mean"],
            _mean_pair(entry["cosine"]["weights"]),
            _of(entry, "alignment", "mean"),
            _of(entry, "alignment", "chance"),
            _mean_pair(entry["cosine"]["router"]),
            entry["redundancy"]["pairs"],
            _of(entry, "router", "r2").get("gate"),
        )
        for entry in layers
    )
    caption = (
        "Mean cosines between two experts of a layer. R²: how much of router rows' likeness mean gate neurons explain."
    )
    maps = [_heatmap(name, path, layers) for name, path in MATRICES.items()]
    return Table(head, rows, caption), *(part for part in maps if part)


def _heatmap(name: str, path: tuple[str, str], layers: Layers) -> Heatmap | None:
    views = tuple(
        View(f"layer {entry['layer']}", (_grid(np.array(_of(entry, *path)), _ids(entry, path)),))
        for entry in layers
        if entry[path[0]]
    )
    title = f"Cosine of {name}, without the diagonal (0 and less: palest)"
    return Heatmap(title, "expert", "expert", views) if views else None


def _ids(entry: dict[str, Any], path: tuple[str, str]) -> list[int]:
    found: list[int] = entry[path[0]].get("experts") or list(range(entry["num_experts"]))
    return found


def _grid(matrix: np.ndarray, ids: list[int]) -> Grid:
    """A matrix without its diagonal; of many rows, means over groups of neighbours."""
    matrix = matrix.astype(np.float64)
    np.fill_diagonal(matrix, np.nan)
    groups = np.array_split(np.arange(len(matrix)), min(len(matrix), MOST_ROWS))
    names = tuple(str(ids[g[0]]) if len(g) == 1 else f"{ids[g[0]]}-{ids[g[-1]]}" for g in groups)
    return Grid(names, names, tuple(tuple(_mean(matrix[np.ix_(a, b)]) for b in groups) for a in groups))


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return round(float(known.mean()), 4) if known.size else None


def _mean_pair(matrix: list[list[float]]) -> float | None:
    return _mean(np.array(matrix)[np.triu_indices(len(matrix), 1)])


def _norms(layers: Layers) -> tuple[Part, ...]:
    head = (
        "layer",
        "gate and norm",
        "gate and contribution",
        "score and norm, all experts",
        "chosen are largest",
        "by chance",
    )
    rows = tuple(
        (
            _key(entry),
            *(entry["norms"][n] for n in ("gate_norm", "gate_contribution", "score_norm", "chosen_largest", "chance")),
        )
        for entry in layers
    )
    views = tuple(
        View(f"layer {e['layer']}", tuple(Point("a chosen expert", gate, norm) for gate, norm in e["norms"]["points"]))
        for e in layers
    )
    caption = "Correlations, and the share of chosen experts whose outputs are among the largest of their token."
    return Table(head, rows, caption), Scatter("Output norm against gate", "gate", "norm of the output", views)


def _counterfactual(layers: Layers) -> Table:
    names = {"next": "next best", "random": "random", "first": "first alone", "all": "all, by logits"}
    rows = tuple(
        (_key(entry), *(_of(entry, "probe", "counterfactual", name, "error") for name in names)) for entry in layers
    )
    caption = "Squared error of the experts' sum, had these run instead on the same tokens; 1: as if the sum were gone."
    return Table(("layer", *names.values()), rows, caption)


def _compression(layers: Layers) -> tuple[Part, ...]:
    head = (
        "layer",
        "spare experts",
        "condensed: captured",
        "routed share",
        "lost",
        "barycentre",
        "by chance",
        "with rank 1/4",
    )
    rows = tuple(
        (
            _key(entry),
            entry["redundancy"]["spare"],
            *(entry["condense"][name] for name in ("captured", "routed", "lost")),
            _of(entry, "energy", "aligned"),
            _of(entry, "energy", "chance"),
            _of(entry, "energy", "ranks", "0.25", "aligned"),
        )
        for entry in layers
    )
    bits = tuple(layers[0]["bits"])
    errors = tuple((_key(entry), *(entry["bits"][b]["layer"] for b in bits)) for entry in layers)
    bars = tuple(Bar(f"{b} bits", entry["layer"], entry["bits"][b]["layer"]) for entry in layers for b in bits)
    return (
        Table(head, rows, "Shares of energy (squared norms)."),
        Table(
            ("layer", *(f"{b} bits" for b in bits)),
            errors,
            f"Error of a layer's sum with rounded experts, norm over norm. Rounded to {LEVELS}, which makes 4 bits "
            f"{layers[0]['bits']['4']['stored']}; those of coterie report are symmetric about zero, and 4.25.",
        ),
        Bars("Error of rounded experts", "norm over norm", (View("all layers", bars),)),
    )


def _routing(layers: Layers) -> tuple[Part, ...]:
    head = (
        "layer",
        "repeated",
        "by chance",
        "cache: recent",
        "cache: hottest",
        "cache: size",
        "entropy of load",
        "unused",
        "between domains",
    )
    rows = tuple(
        (
            _key(entry),
            *(entry["locality"][name] for name in ("repeat", "chance")),
            *(entry["locality"]["cache"][name] for name in ("lru", "hot", "uniform")),
            *(entry["load"][name] for name in ("entropy", "unused", "domain_gap")),
        )
        for entry in layers
    )
    views = tuple(
        View(f"layer {entry['layer']}", tuple(_load_bars(entry["load"]["domains"], entry["num_experts"])))
        for entry in layers
    )
    coactive = tuple(
        View(f"layer {entry['layer']}", (_grid(np.array(entry["coactivation"]), list(range(entry["num_experts"]))),))
        for entry in layers
    )
    caption = (
        "Repeated: experts of a token that the next chose again. Cache: hit rates, and the share of experts it holds."
    )
    return (
        Table(head, rows, caption),
        Bars("Load by expert and domain", "share of a domain's choices", views),
        Heatmap("Tokens that chose both", "expert", "expert", coactive),
    )


def _load_bars(domains: dict[str, list[float]], num_experts: int) -> list[Bar]:
    """Of many experts, sums over groups of neighbours."""
    groups = np.array_split(np.arange(num_experts), min(num_experts, MOST_ROWS))
    names = [str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups]
    return [
        Bar(domain, name, round(float(np.array(shares)[group].sum()), 6))
        for domain, shares in domains.items()
        for name, group in zip(names, groups, strict=True)
    ]


def _key(entry: dict[str, Any]) -> Cell:
    return Number(int(entry["layer"]), entry["layer"])


def _of(entry: Any, *path: str) -> Any:
    """A nested value; None where something on the way is."""
    for name in path:
        entry = None if entry is None else entry[name]
    return entry
