"""Lays out what `coterie report` measured: which tables and plots the page has, and what they say.

Reads the result of `summary.report` and nothing else; `page.py` renders.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from coterie.edits.plan import LEVELS
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
    Section,
    Table,
    Text,
    View,
    page,
)

LOSS = "loss, nats per token (lower is better)"
GAIN = "log-likelihood against the original, nats per token (below zero is worse)"
Found = dict[str, Any]


def render(found: Found) -> str:
    """The whole page."""
    original = found["models"][0]["name"]
    title = f"{original} and what was made of it" if len(found["models"]) > 1 else original
    intro = (
        "Quality against bytes against speed, made by coterie report. Brackets hold 95 % intervals unless the text "
        f"says otherwise; differences are against {original}, on the same tokens."
    )
    makers = (_glance, _quality, _losses, _differences, _answers, _experts, _kurtosis, _speed, _provenance)
    sections = [Section(name, tuple(parts)) for name, parts in (make(found) for make in makers) if parts]
    return page(title, intro, sections, numbers=found)


def _glance(found: Found) -> tuple[str, list[Part]]:
    """The first table of the page: one row per model, and no other row."""
    sizes = ("bytes", "bits per original parameter", "parameters", "experts per layer")
    head = ("model", *sizes, *_quality_head(found), "prefill, tokens/s", "decode, tokens/s")
    rows = tuple((m["name"], *_sizes(m), *_qualities(m), *_speeds(m)) for m in found["models"])
    parts: list[Part] = [Table(head, rows, "Means over data sets; each data set counts once.")]
    if found["notes"]:
        parts.append(Text(("What to know before trusting these numbers:", *(f"• {note}" for note in found["notes"]))))
    return "At a glance", parts


def _sizes(model: Found) -> tuple[Cell, ...]:
    counts, experts = sorted((model["experts"] or {}).values()), "unknown" if model["experts"] is None else "none"
    if counts:
        experts = f"{' to '.join(map(str, sorted({counts[0], counts[-1]})))} in {len(counts)} layers"
    bits = model["bits_per_parameter"]
    return model["bytes"], Number(bits, f"{bits:.2f}"), model["parameters"], experts


def _qualities(model: Found) -> tuple[Cell, ...]:
    losses = (_cell(model["mean"], 3), _cell(model.get("paired", {}).get("mean"), 4, sign=True))
    exact = [m["value"] for m in model["exact_match"].values()]
    return (*losses, _percent(sum(exact) / len(exact))) if exact else losses


def _quality_head(found: Found) -> tuple[str, ...]:
    exact = ("exact match",) if found["models"][0]["exact_match"] else ()
    return (LOSS, "change of log-likelihood", *exact)


def _speeds(model: Found) -> tuple[Cell, ...]:
    speed = model.get("speed")
    return tuple(
        Number(speed[k]["value"], f"{speed[k]['value']:,.1f}") if speed else None for k in ("prefill", "decode")
    )


def _quality(found: Found) -> tuple[str, list[Part]]:
    """Quality against bytes, with the original and its 4-bit version to be held against."""
    entries = [*found["models"], *found["references"]]
    views = [View("loss, mean over data sets", _points(entries, lambda m: m["mean"]))] if entries[0]["mean"] else []
    for name in entries[0]["perplexity"]:
        views.append(View(f"loss, {name}", _points(entries, lambda m, name=name: _loss(m["perplexity"][name]))))
    for name in entries[0]["exact_match"]:
        views.append(
            View(
                f"exact match, {name} (higher is better)", _points(entries, lambda m, name=name: m["exact_match"][name])
            )
        )
    parts: list[Part] = [Scatter("Quality against bytes", "bytes", "loss (nats per token) or share", tuple(views))]
    if found["references"]:
        rows = tuple(
            (r["name"], r["bytes"], Number(r["bits_per_parameter"], f"{r['bits_per_parameter']:.2f}"), *_qualities(r))
            for r in found["references"]
        )
        head = ("reference", "bytes", "bits per original parameter", *_quality_head(found))
        said = (
            f"The reference is the original with {found['references'][0]['what']}: the weights are rounded in memory "
            "and judged, the bytes are counted and not written. A result that is larger and worse than this point is "
            "no gain over plain rounding."
        )
        parts += [Table(head, rows), Text((said,))]
    return "Quality against bytes", parts


def _points(entries: list[Found], measure: Any) -> tuple[Point, ...]:
    return tuple(
        Point(
            m["name"], m["bytes"], value["value"], value["low"], value["high"],
            f"{m['bits_per_parameter']:.2f} bits per original parameter", m is entries[0] or "what" in m,
        )
        for m in entries
        for value in [measure(m)]
    )  # fmt: skip


def _losses(found: Found) -> tuple[str, list[Part]]:
    """Of every data set, with intervals."""
    entries = [*found["models"], *found["references"]]
    names = list(entries[0]["perplexity"])
    if not names:
        return "Loss by data set", []
    bars = tuple(_bar(m["name"], n, _loss(m["perplexity"][n])) for m in entries for n in names)
    rows = tuple(
        (m["name"], n, _cell(_loss(p), 4), _cell(p, 3), p["tokens"])
        for m in entries
        for n, p in m["perplexity"].items()
    )
    plot = Bars("Loss by data set", LOSS, (View("all", bars),), dots=True)
    return "Loss by data set", [plot, Table(("model", "data set", LOSS, "perplexity", "tokens"), rows)]


def _differences(found: Found) -> tuple[str, list[Part]]:
    """Paired with the original on the same tokens."""
    entries = [m for m in [*found["models"], *found["references"]] if "paired" in m]
    names = list(entries[0]["paired"]["difference"]) if entries else []
    parts: list[Part] = []
    if names:
        bars = tuple(_bar(m["name"], n, m["paired"]["difference"][n]) for m in entries for n in names)
        rows = tuple(
            (m["name"], n, _cell(d, 4, sign=True)) for m in entries for n, d in m["paired"]["difference"].items()
        )
        parts = [Bars("Against the original", GAIN, (View("all", bars),)), Table(("model", "data set", GAIN), rows)]
        parts.append(Text((f"Intervals: {entries[0]['paired']['interval']}, of the difference itself.",)))
    overlap = [m for m in entries if m["paired"]["router_overlap"]]
    if overlap:
        parts += _overlap(overlap)
    return "Paired with the original", parts


def _overlap(entries: list[Found]) -> list[Part]:
    lines = tuple(
        Line(m["name"], tuple(float(key) for key in o), tuple(o.values()))
        for m in entries
        for o in [m["paired"]["router_overlap"]]
    )
    rows = tuple(
        (
            m["name"],
            Number(sum(o.values()) / len(o), f"{sum(o.values()) / len(o):.3f}"),
            min(o, key=o.get),
            min(o.values()),
        )
        for m in entries
        for o in [m["paired"]["router_overlap"]]
    )
    return [
        Lines("Router overlap", "layer", "shared part of the chosen experts (1: the same)", (View("all", lines),)),
        Table(("model", "router overlap, mean over layers", "lowest in layer", "lowest"), rows),
        Text(("Mean over tokens of the experts chosen by both over those chosen by either, by original id.",)),
    ]


def _answers(found: Found) -> tuple[str, list[Part]]:
    """Generated answers: right, changed, repetitive."""
    entries = [*found["models"], *found["references"]]
    names = list(entries[0]["exact_match"])
    if not names:
        return "Answers", []
    bars = tuple(_bar(m["name"], n, m["exact_match"][n]) for m in entries for n in names)
    rows = tuple(_answer_row(m, n, entries) for m in entries for n in names)
    head = (
        "model",
        "data set",
        "exact match",
        "problems",
        "cut off unfinished",
        "answers that flipped",
        "repeated 4-grams",
    )
    said = (
        "Flipped: the share of problems that one of the two solves and the other does not. Models with one score may "
        "differ in many answers."
    )
    return "Answers", [Bars("Exact match", "share of problems", (View("all", bars),)), Table(head, rows), Text((said,))]


def _answer_row(model: Found, name: str, entries: list[Found]) -> tuple[Cell, ...]:
    match, pair = model["exact_match"][name], model.get("paired")
    ours = next((m["paired"]["repetition"][name]["against"] for m in entries if "paired" in m), None)
    repeated = pair["repetition"][name]["model"] if pair else ours
    shown = f"{100 * match['value']:.1f} % [{100 * match['low']:.1f}, {100 * match['high']:.1f}]"
    return (
        model["name"],
        name,
        Number(match["value"], shown),
        match["count"],
        _percent(model["cut"][name]),
        _percent(pair["flipped"][name] if pair else None),
        _percent(repeated),
    )


def _experts(found: Found) -> tuple[str, list[Part]]:
    """Which of the original's experts are left, layer by layer."""
    entries = [m for m in found["models"] if m.get("fate")]
    if not entries:
        return "Experts", []
    views = tuple(View(m["name"], (_grid(m["fate"]),)) for m in entries)
    rows = tuple((m["name"], key, *_tally(levels)) for m in entries for key, levels in m["fate"].items())
    return "Experts", [
        Heatmap("What became of the original's experts", "expert", "layer", views, LEVELS),
        Table(("model", "layer", *LEVELS), rows),
    ]


def _grid(fate: dict[str, list[int]]) -> Grid:
    width = max(map(len, fate.values()))
    values = tuple(tuple(levels) + (None,) * (width - len(levels)) for levels in fate.values())
    return Grid(tuple(fate), tuple(map(str, range(width))), values)


def _tally(levels: Iterable[int]) -> list[int]:
    found = list(levels)
    return [found.count(level) for level in range(len(LEVELS))]


def _kurtosis(found: Found) -> tuple[str, list[Part]]:
    """Of expert weights: as a command recorded it before, between and after its steps, or as it is."""
    entries = [m for m in found["models"] if m["kurtosis"]]
    if not entries:
        return "Kurtosis of expert weights", []
    bars = tuple(Bar(m["name"], stage, value) for m in entries for stage, value in m["kurtosis"].items())
    rows = tuple((m["name"], stage, value) for m in entries for stage, value in m["kurtosis"].items())
    said = (
        "Of the weights that are left, zeros not counted; a normal distribution has 3. Removing whole experts leaves "
        "it where it was, zeroing small weights lowers it."
    )
    plot = Bars("Kurtosis of expert weights", "kurtosis", (View("all", bars),))
    return "Kurtosis of expert weights", [plot, Table(("model", "stage", "kurtosis"), rows), Text((said,))]


def _speed(found: Found) -> tuple[str, list[Part]]:
    """Tokens per second, the models in turns."""
    entries = [m for m in found["models"] if "speed" in m]
    if not entries:
        return "Speed", []
    views = tuple(
        View(what, tuple(_bar(m["name"], what, m["speed"][what]) for m in entries)) for what in ("decode", "prefill")
    )
    rows = tuple(
        (m["name"], *(_cell(m["speed"][k], 1) for k in ("prefill", "decode")), m["speed"]["relative_decode"])
        for m in entries
    )
    first = entries[0]["speed"]
    said = (
        f"Measured as by coterie bench: one sequence at a time, {first['prompt']} prompt tokens and {first['new']} new "
        "ones, in one process, the models taking turns call by call. Medians of single calls, with the 10th and 90th "
        "percentile in brackets (no intervals), by processor time if torch has one thread, else by the wall clock. The "
        "machine of this run, not yours; a weight of zero that is stored costs as much time as any other."
    )
    head = ("model", "prefill, tokens/s", "decode, tokens/s", "decode against the original")
    return "Speed", [Bars("Speed", "tokens per second (higher is better)", views), Table(head, rows), Text((said,))]


def _provenance(found: Found) -> tuple[str, list[Part]]:
    """What was measured, made by what, and how."""
    rows = tuple((m["name"], m["path"], m["command"], _percent(m["sparsity"]), m["hash"][:16]) for m in found["models"])
    head = ("model", "path", "made by", "expert weights removed or zero", "fingerprint")
    options = ", ".join(f"{k} {v}" for k, v in found["options"].items() if k != "data" and v not in (None, ()))
    data = ", ".join(f"{name} ({file})" for name, file in found["options"]["data"].items())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    said = (
        f"Data: {data}.",
        f"Options: {options}. Each token but a text's first is scored once, with the most context its window gives.",
        f"Versions: {versions}. Measured in {found['seconds']:.0f} s, {found['peak_rss_bytes'] / 1e6:,.0f} MB at most.",
        "Loss is the mean negative log-likelihood, and perplexity its exponential. Neither is a task: a model can keep "
        "its loss and lose an ability that these texts do not ask for. Judge on your own data, and read its answers.",
    )
    return "How this was measured", [Table(head, rows), Text(said)]


def _loss(perplexity: Found) -> Found:
    """Mean loss, with its interval, from perplexity."""
    return {key: math.log(perplexity[key]) for key in ("value", "low", "high")}


def _bar(series: str, group: str, measured: Found) -> Bar:
    return Bar(series, group, measured["value"], measured["low"], measured["high"])


def _cell(measured: Found | None, digits: int, *, sign: bool = False) -> Cell:
    """A value with its interval."""
    if measured is None:
        return None
    form = f"{'+' if sign else ''},.{digits}f"
    low, high = (format(measured[key], form) for key in ("low", "high"))
    return Number(measured["value"], f"{measured['value']:{form}} [{low}, {high}]")


def _percent(share: float | None) -> Cell:
    return None if share is None else Number(share, f"{100 * share:.1f} %")
