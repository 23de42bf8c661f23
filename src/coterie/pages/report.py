"""Lays out what `coterie report` measured: which tables and plots the page has, and what they say.

Reads the result of `judge/lineup.py` and nothing else; `page.py` renders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

from coterie.edits.plan import LEVELS
from coterie.judge.lineup import Comparison, Measured
from coterie.judge.paired import Interval, Paired
from coterie.pages.page import (
    Bar,
    Bars,
    Cell,
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
from coterie.storage.record import object_at

LOSS = "loss, nats per token (lower is better)"
GAIN = "log-likelihood against the original, nats per token (below zero is worse)"
SPEEDS = ("prefill, tokens/s", "decode, tokens/s")


def render(found: Comparison) -> str:
    models, entries = found["models"], [*found["models"], *found["references"]]
    original = models[0]["name"]
    title = f"{original} and what was made of it" if len(models) > 1 else original
    intro = (
        "Quality against bytes against speed, made by coterie report. Brackets hold 95 % intervals unless the text "
        f"says otherwise; differences are against {original}, on the same tokens."
    )
    sections = {
        "At a glance": _glance(models, found["notes"]),
        "Quality against bytes": _quality(entries, found["references"]),
        "Loss by data set": _losses(entries),
        "Paired with the original": _differences([(m["name"], m["paired"]) for m in entries if "paired" in m]),
        "Answers": _answers(entries),
        "Experts": _experts([m for m in models if m.get("fate")]),
        "Kurtosis of expert weights": _kurtosis(models),
        "Speed": _speed([m for m in models if "speed" in m]),
        "How this was measured": _provenance(found),
    }
    return page(title, intro, sections, numbers=found)


def _glance(models: list[Measured], notes: list[str]) -> list[Part]:
    """The first table of the page: one row per model, and no other row."""
    sizes = ("bytes", "bits per original parameter", "parameters", "experts per layer")
    head = ("model", *sizes, *_quality_head(models[0]), *SPEEDS)
    rows = tuple((m["name"], *_sizes(m), *_qualities(m), *_speeds(m)) for m in models)
    parts: list[Part] = [Table(head, rows, "Means over data sets; each data set counts once.")]
    if notes:
        parts.append(Text(("What to know before trusting these numbers:", *(f"• {note}" for note in notes))))
    return parts


def _sizes(model: Measured) -> tuple[Cell, ...]:
    by_layer = model["experts"]
    counts, experts = sorted((by_layer or {}).values()), "unknown" if by_layer is None else "none"
    if counts:
        experts = f"{' to '.join(map(str, sorted({counts[0], counts[-1]})))} in {len(counts)} layers"
    return model["bytes"], _fixed(model["bits_per_parameter"], 2), model["parameters"], experts


def _qualities(model: Measured) -> tuple[Cell, ...]:
    losses = (_cell(model["mean"], 3), _cell(model["paired"]["mean"] if "paired" in model else None, 4, sign=True))
    exact = [m["value"] for m in model["exact_match"].values()]
    return (*losses, _percent(sum(exact) / len(exact))) if exact else losses


def _quality_head(original: Measured) -> tuple[str, ...]:
    return (LOSS, "change of log-likelihood", *(("exact match",) if original["exact_match"] else ()))


def _speeds(model: Measured) -> tuple[Cell, ...]:
    speed = model.get("speed")
    return tuple(_fixed(speed[kind]["value"], 1) if speed else None for kind in ("prefill", "decode"))


def _quality(entries: list[Measured], references: list[Measured]) -> list[Part]:
    """Quality against bytes, with the original and its 4-bit version to be held against."""
    original = entries[0]
    measured = {"loss, mean over data sets": [m["mean"] for m in entries]}
    for name in original["perplexity"]:
        measured[f"loss, {name}"] = [_loss(m["perplexity"][name]) for m in entries]
    for name in original["exact_match"]:
        measured[f"exact match, {name} (higher is better)"] = [m["exact_match"][name] for m in entries]
    views = (View(what, points) for what, values in measured.items() if (points := _points(entries, values)))
    parts: list[Part] = [Scatter("Quality against bytes", "bytes", "loss (nats per token) or share", tuple(views))]
    if references:
        rows = tuple((r["name"], r["bytes"], _fixed(r["bits_per_parameter"], 2), *_qualities(r)) for r in references)
        head = ("reference", "bytes", "bits per original parameter", *_quality_head(original))
        said = (
            f"The reference is the original with {references[0]['what']}: the weights are rounded in memory "
            "and judged, the bytes are counted and not written. A result that is larger and worse than this point is "
            "no gain over plain rounding."
        )
        parts += [Table(head, rows), Text((said,))]
    return parts


def _points(entries: list[Measured], values: list[Interval | None]) -> tuple[Point, ...]:
    return tuple(
        Point(
            m["name"], m["bytes"], value["value"], value["low"], value["high"],
            f"{m['bits_per_parameter']:.2f} bits per original parameter", m is entries[0] or "what" in m,
        )
        for m, value in zip(entries, values, strict=True)
        if value
    )  # fmt: skip


def _losses(entries: list[Measured]) -> list[Part]:
    of = [(m["name"], n, p) for m in entries for n, p in m["perplexity"].items()]
    if not of:
        return []
    plot = _bars("Loss by data set", LOSS, [(model, name, _loss(p)) for model, name, p in of], dots=True)
    rows = tuple((model, name, _cell(_loss(p), 4), _cell(p, 3), p["tokens"]) for model, name, p in of)
    return [plot, Table(("model", "data set", LOSS, "perplexity", "tokens"), rows)]


def _differences(pairs: list[tuple[str, Paired]]) -> list[Part]:
    """Paired with the original on the same tokens, by name."""
    of = [(model, name, d) for model, pair in pairs for name, d in pair["difference"].items()]
    parts: list[Part] = []
    if of:
        rows = tuple((model, name, _cell(d, 4, sign=True)) for model, name, d in of)
        parts = [_bars("Against the original", GAIN, of, dots=False), Table(("model", "data set", GAIN), rows)]
        parts.append(Text((f"Intervals: {pairs[0][1]['interval']}, of the difference itself.",)))
    overlaps = {model: pair["router_overlap"] for model, pair in pairs if pair["router_overlap"]}
    return parts + _overlap(overlaps) if overlaps else parts


def _overlap(overlaps: dict[str, dict[str, float]]) -> list[Part]:
    lines = tuple(Line(m, tuple(map(float, o)), tuple(o.values())) for m, o in overlaps.items())
    rows = tuple(
        (m, _fixed(sum(o.values()) / len(o), 3), min(o, key=lambda key: o[key]), min(o.values()))
        for m, o in overlaps.items()
    )
    return [
        Lines("Router overlap", "layer", "shared part of the chosen experts (1: the same)", (View("all", lines),)),
        Table(("model", "router overlap, mean over layers", "lowest in layer", "lowest"), rows),
        Text(("Mean over tokens of the experts chosen by both over those chosen by either, by original id.",)),
    ]


def _answers(entries: list[Measured]) -> list[Part]:
    of = [(m["name"], n, match) for m in entries for n, match in m["exact_match"].items()]
    if not of:
        return []
    ours = next((m["paired"]["repetition"] for m in entries if "paired" in m), {})
    original = {name: repeated["against"] for name, repeated in ours.items()}
    rows = tuple(_answer_row(m, n, original) for m in entries for n in m["exact_match"])
    said = (
        "Flipped: the share of problems that one of the two solves and the other does not. Models with one score may "
        "differ in many answers."
    )
    counts = ("exact match", "problems", "cut off unfinished", "answers that flipped", "repeated 4-grams")
    plot = _bars("Exact match", "share of problems", of, dots=False)
    return [plot, Table(("model", "data set", *counts), rows), Text((said,))]


def _answer_row(model: Measured, name: str, original: dict[str, float | None]) -> tuple[Cell, ...]:
    """original: the share of repeated 4-grams in its answers, which only a pair knows."""
    match, pair = model["exact_match"][name], model.get("paired")
    repeated = pair["repetition"][name]["model"] if pair else original.get(name)
    shown = f"{100 * match['value']:.1f} % [{100 * match['low']:.1f}, {100 * match['high']:.1f}]"
    shares = (model["cut"][name], pair["flipped"][name] if pair else None, repeated)
    return (model["name"], name, Number(match["value"], shown), match["count"], *map(_percent, shares))


def _experts(models: list[Measured]) -> list[Part]:
    """Which of the original's experts are left, layer by layer."""
    if not models:
        return []
    views = tuple(View(m["name"], (_grid(m["fate"]),)) for m in models)
    rows: list[tuple[Cell, ...]] = [
        (m["name"], key, *map(levels.count, range(len(LEVELS)))) for m in models for key, levels in m["fate"].items()
    ]
    plot = Heatmap("What became of the original's experts", "expert", "layer", views, LEVELS)
    return [plot, Table(("model", "layer", *LEVELS), tuple(rows))]


def _grid(fate: dict[str, list[int]]) -> Grid:
    values = tuple(zip(*zip_longest(*fate.values()), strict=True))  # short rows are filled with None
    return Grid(tuple(fate), tuple(map(str, range(len(values[0])))), values)


def _kurtosis(models: list[Measured]) -> list[Part]:
    """The kurtosis of expert weights, as a command recorded it before, between and after its steps, or as it is."""
    rows = tuple((m["name"], stage, value) for m in models for stage, value in m["kurtosis"].items())
    if not rows:
        return []
    said = (
        "Of the weights that are left, zeros not counted; a normal distribution has 3. Removing whole experts leaves "
        "it where it was, zeroing small weights lowers it."
    )
    plot = Bars("Kurtosis of expert weights", "kurtosis", (View("all", tuple(Bar(*row) for row in rows)),))
    return [plot, Table(("model", "stage", "kurtosis"), rows), Text((said,))]


def _speed(models: list[Measured]) -> list[Part]:
    if not models:
        return []
    of = [(m["name"], m["speed"]) for m in models]
    views = tuple(View(k, tuple(_bar(name, k, speed[k]) for name, speed in of)) for k in ("decode", "prefill"))
    rows = tuple((name, _cell(s["prefill"], 1), _cell(s["decode"], 1), s["relative_decode"]) for name, s in of)
    first = of[0][1]
    said = (
        f"Measured as by coterie bench: one sequence at a time, {first['prompt']} prompt tokens and {first['new']} new "
        "ones, in one process, the models taking turns call by call. Medians of single calls, with the 10th and 90th "
        "percentile in brackets (no intervals), by processor time if torch has one thread, else by the wall clock. The "
        "machine of this run, not yours; a weight of zero that is stored costs as much time as any other."
    )
    head = ("model", *SPEEDS, "decode against the original")
    return [Bars("Speed", "tokens per second (higher is better)", views), Table(head, rows), Text((said,))]


def _provenance(found: Comparison) -> list[Part]:
    rows = tuple((m["name"], m["path"], m["command"], _percent(m["sparsity"]), m["hash"][:16]) for m in found["models"])
    head = ("model", "path", "made by", "expert weights removed or zero", "fingerprint")
    options = ", ".join(f"{k} {v}" for k, v in found["options"].items() if k != "data" and v not in (None, ()))
    data = ", ".join(f"{name} ({file})" for name, file in object_at(found, "options", "data").items())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    said = (
        f"Data: {data}.",
        f"Options: {options}. Each token but a text's first is scored once, with the most context its window gives.",
        f"Versions: {versions}. Measured in {found['seconds']:.0f} s, {found['peak_rss_bytes'] / 1e6:,.0f} MB at most.",
        "Loss is the mean negative log-likelihood, and perplexity its exponential. Neither is a task: a model can keep "
        "its loss and lose an ability that these texts do not ask for. Judge on your own data, and read its answers.",
    )
    return [Table(head, rows), Text(said)]


def _loss(perplexity: Interval) -> Interval:
    """Mean loss, with its interval, from perplexity."""
    return {key: math.log(perplexity[key]) for key in ("value", "low", "high")}


def _bars(title: str, y: str, of: Sequence[tuple[str, str, Interval]], *, dots: bool) -> Bars:
    return Bars(title, y, (View("all", tuple(_bar(*each) for each in of)),), dots)


def _bar(series: str, group: str, measured: Interval) -> Bar:
    return Bar(series, group, measured["value"], measured["low"], measured["high"])


def _cell(measured: Interval | None, digits: int, *, sign: bool = False) -> Cell:
    if measured is None:
        return None
    form = f"{'+' if sign else ''},.{digits}f"
    low, high = (format(measured[key], form) for key in ("low", "high"))
    return Number(measured["value"], f"{measured['value']:{form}} [{low}, {high}]")


def _fixed(value: float, digits: int) -> Number:
    return Number(value, f"{value:,.{digits}f}")


def _percent(share: float | None) -> Cell:
    return None if share is None else Number(share, f"{100 * share:.1f} %")
