"""The page of `coterie analyze`: findings first, then the same numbers as tables and plots with a layer to select.

Matrices of many experts are shown as means over groups of neighbours, and where all of them would make a page of
many megabytes they are left out of the numbers that it carries; it says so, and `--json` has them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from coterie.judge.numbers import Found, Layers, at
from coterie.judge.rounding import LEVELS
from coterie.pages.page import (
    Cell,
    Finding,
    Findings,
    Fold,
    Grid,
    Heatmap,
    Line,
    Lines,
    Number,
    Part,
    Point,
    Scatter,
    Table,
    Text,
    View,
    page,
)

MOST_ROWS = 64  # of a heatmap
MOST_CELLS = 2**16  # numbers of all matrices that the page carries
MATRICES = {  # what a heatmap is called: where its numbers are in each layer's entry
    "outputs of the same tokens": "cosine outputs",
    "weights as stored": "cosine weights",
    "weights, neurons aligned": "alignment cosine",
    "router rows": "cosine router",
}
# The columns of tables with a row a layer, and where their cells are in its entry.
LIKENESS = {
    "outputs": "probe outputs_mean",
    "weights": "cosine weights",
    "aligned": "alignment mean",
    "aligned, by chance": "alignment chance",
    "router rows": "cosine router",
    "pairs of 0.9": "redundancy pairs",
    "R² by gate": "router r2 gate",
}
NORMS = {
    "gate and norm": "norms gate_norm",
    "gate and contribution": "norms gate_contribution",
    "score and norm, all experts": "norms score_norm",
    "chosen are largest": "norms chosen_largest",
    "by chance": "norms chance",
}
COUNTERFACTUAL = {
    "next best": "probe counterfactual next error",
    "random": "probe counterfactual random error",
    "first alone": "probe counterfactual first error",
    "all, by logits": "probe counterfactual all error",
}
IF_OTHERS = "Squared error of the experts' sum, had these run instead on the same tokens; 1: as if the sum were gone."
COMPRESSION = {
    "spare experts": "redundancy spare",
    "condensed: captured": "condense captured",
    "routed share": "condense routed",
    "lost": "condense lost",
    "barycentre": "energy aligned",
    "by chance": "energy chance",
    "with rank 1/4": "energy ranks 0.25 aligned",
}
ROUTING = {
    "repeated": "locality repeat",
    "by chance": "locality chance",
    "cache: recent": "locality cache lru",
    "cache: hottest": "locality cache hot",
    "cache: size": "locality cache uniform",
    "entropy of load": "load entropy",
    "unused": "load unused",
    "between domains": "load domain_gap",
}


def shown(result: Found) -> str:
    """The page of what `analyze` returns, as HTML."""
    layers: Layers = at(result, "layers")
    domains: Mapping[str, Found] = at(result, "domains")
    tokens = sum(at(domain, "tokens") for domain in domains.values())
    title = f"The experts of {at(result, 'model path')}"
    intro = (
        f"{len(layers)} MoE layers, {layers[0]['num_experts']} experts, {layers[0]['chosen']} chosen per token; "
        f"measured on {tokens:,} tokens of {', '.join(domains)}."
    )
    numbers, left_out = _carried(result, layers)
    findings = Findings(
        tuple(Finding(a["verdict"], a["number"], a["text"], a["command"]) for a in at(result, "advice"))
    )
    sections: dict[str, tuple[Part, ...]] = {
        "Findings": (findings, Text((*at(result, "notes"), *left_out))),
        "How alike experts are": _likeness(layers),
        "Norms against gates, and what if others had run": (
            *_norms(layers),
            _table(layers, COUNTERFACTUAL, IF_OTHERS, "Errors with others"),
        ),
        "What compression could use": _compression(layers),
        "Who works when": _routing(layers),
    }
    return page(title, intro, sections, numbers=numbers)


def _carried(result: Found, layers: Layers) -> tuple[Found, list[str]]:
    """The numbers that the page offers to save, and what is missing from them."""
    cells = sum((len(at(entry, "cosine")) + 3) * at(entry, "num_experts") ** 2 for entry in layers)
    if cells <= MOST_CELLS:
        return result, []
    matrices = ("cosine", "alignment", "coactivation")
    less = [{name: value for name, value in entry.items() if name not in matrices} for entry in layers]
    return {**result, "layers": less}, [
        f"Matrices ({cells:,} numbers) are not among the numbers that this page saves; "
        "coterie analyze --json prints them."
    ]


def _likeness(layers: Layers) -> tuple[Part, ...]:
    caption = (
        "Mean cosines between two experts of a layer. R²: how much of router rows' likeness mean gate neurons explain."
    )
    titles = {name: f"Cosine of {name}, without the diagonal" for name in MATRICES}
    maps = [_heatmap(titles[name], path, layers) for name, path in MATRICES.items()]
    return *(part for part in maps if part.views), _table(layers, LIKENESS, caption, "Likeness")


def _heatmap(title: str, path: str, layers: Layers) -> Heatmap:
    """A matrix of each layer, over the experts that its numbers are of: some may have been left out."""

    def grid(entry: Found) -> tuple[Grid]:
        ids = at(entry, f"{path.split()[0]} experts") or range(at(entry, "num_experts"))
        return (_grid(np.array(at(entry, path)), ids),)

    return Heatmap(title, "expert", "expert", _views([entry for entry in layers if at(entry, path)], grid))


def _norms(layers: Layers) -> tuple[Part, ...]:
    def points(entry: Found) -> tuple[Point, ...]:
        return tuple(Point("", gate, norm, kind="a chosen expert") for gate, norm in at(entry, "norms points"))

    caption = "Correlations, and the share of chosen experts whose outputs are among the largest of their token."
    plot = Scatter("Output norm against gate", "gate", "norm of the output", _views(layers, points))
    return plot, _table(layers, NORMS, caption, "Correlations")


def _compression(layers: Layers) -> tuple[Part, ...]:
    paths = {f"{bits} bits": f"bits {bits} layer" for bits in at(layers[0], "bits")}
    keys = tuple(float(str(entry["layer"])) for entry in layers)
    lines = tuple(Line(name, keys, tuple(at(entry, path) for entry in layers)) for name, path in paths.items())
    caption = (
        f"Error of a layer's sum with rounded experts, norm over norm. Rounded to {LEVELS}, which makes 4 bits "
        f"{at(layers[0], 'bits 4 stored')}; those of coterie report are symmetric about zero, and 4.25."
    )
    return (
        Lines("Error of rounded experts", "layer", "norm over norm", (View("all layers", lines),)),
        _table(layers, paths, caption, "Errors"),
        _table(layers, COMPRESSION, "Shares of energy (squared norms).", "Energy"),
    )


def _routing(layers: Layers) -> tuple[Part, ...]:
    def coactive(entry: Found) -> tuple[Grid]:
        return (_grid(np.array(entry["coactivation"]), range(at(entry, "num_experts"))),)

    caption = (
        "Repeated: experts of a token that the next chose again. Cache: hit rates, and the share of experts it holds."
    )
    return (
        Heatmap("Tokens that chose both", "expert", "expert", _views(layers, coactive)),
        Heatmap("Share of a domain's choices", "expert", "domain", _views(layers, _load)),
        _table(layers, ROUTING, caption, "Routing"),
    )


def _load(entry: Found) -> tuple[Grid]:
    """The share of choices by domain and expert; of many experts, sums over groups of neighbours."""
    groups, domains = _groups(range(at(entry, "num_experts"))), at(entry, "load domains")
    values = tuple(
        tuple(round(float(np.array(shares)[group].sum()), 6) for group in groups.values())
        for shares in domains.values()
    )
    return (Grid(tuple(domains), tuple(groups), values),)


def _table(layers: Layers, columns: Mapping[str, str], caption: str, what: str) -> Fold:
    """A row a layer, folded: its key, then the values at the columns' places; a matrix shows as its mean over pairs."""
    keys = [str(entry["layer"]) for entry in layers]
    cells = [[_cell(at(entry, path)) for path in columns.values()] for entry in layers]
    rows = tuple((Number(int(key), key), *row) for key, row in zip(keys, cells, strict=True))
    return Fold(f"{what} layer by layer", (Table(("layer", *columns), rows, caption),))


def _cell(value: Any) -> Cell:
    return _mean(np.array(value)[np.triu_indices(len(value), 1)]) if isinstance(value, list) else value


def _views(layers: Layers, marks: Callable[[Found], Any]) -> tuple[View, ...]:
    return tuple(View(f"layer {entry['layer']}", marks(entry)) for entry in layers)


def _groups(ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Name -> positions of neighbours that are shown as one: each alone, as long as there are not too many."""
    groups = np.array_split(np.arange(len(ids)), min(len(ids), MOST_ROWS))
    return {str(ids[g[0]]) if len(g) == 1 else f"{ids[g[0]]}-{ids[g[-1]]}": g for g in groups}


def _grid(matrix: np.ndarray, ids: Sequence[int]) -> Grid:
    """A matrix without its diagonal; of many rows, means over groups of neighbours."""
    matrix = matrix.astype(np.float64)
    np.fill_diagonal(matrix, np.nan)
    groups = _groups(ids)
    values = tuple(tuple(_mean(matrix[np.ix_(a, b)]) for b in groups.values()) for a in groups.values())
    return Grid(tuple(groups), tuple(groups), values)


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return round(float(known.mean()), 4) if known.size else None
