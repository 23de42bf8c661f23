"""Lays out what `coterie report` measured: which tables and plots the page has, and what they say.

Reads the result of `judge/lineup.py` and nothing else; `page.py` renders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest

from coterie.edits.plan import LEVELS
from coterie.judge.lineup import Comparison, Measured
from coterie.judge.paired import Interval
from coterie.pages.page import (
    Ceiling,
    Cell,
    Code,
    Fold,
    Grid,
    Heatmap,
    Number,
    Part,
    Plot,
    Point,
    Row,
    Rows,
    Scatter,
    Table,
    Text,
    View,
    page,
    sized,
)
from coterie.pages.verdict import Verdict, exact
from coterie.storage.record import object_at

LOSS = "loss, nats per token (lower is better)"
GAIN, WORSE = "Log-likelihood against the original", "nats per token; below zero is worse"
CHANGE = "change of log-likelihood"
SCATTER = "Quality against bytes; the broken line is the best at each size"
BITS = "bits per original parameter"
SPEEDS = ("prefill, tokens/s", "decode, tokens/s")
SEVERAL, UNKNOWN, ORIGINAL = "several ways", "not recorded", "original"


def render(found: Comparison, verdict: Verdict) -> str:
    models, entries = found["models"], [*found["models"], *found["references"]]
    original = models[0]["name"]
    title = f"{original} and what was made of it" if len(models) > 1 else original
    intro = (
        "Quality against bytes against speed, made by coterie report. Brackets hold 95 % intervals unless the text "
        f"says otherwise; differences are against {original}, on the same tokens."
    )
    sections = {
        "Verdict": _verdict(models, verdict) + _notes(found["notes"]),
        "Quality against bytes": _quality(entries, found["references"], verdict),
        "By data set": _plots_first(_by_data_set(entries) + _answers(entries)),
        "Experts": _plots_first(_experts([m for m in models if m.get("fate")]) + _overlap(models)),
        "Speed": _speed([m for m in models if "speed" in m]),
        "How this was measured": _provenance(found),
    }
    return page(title, intro, sections, numbers={**found, "verdict": verdict})


def _plots_first(parts: list[Part]) -> list[Part]:
    """Plots, which stand side by side, before what they leave to say."""
    return sorted(parts, key=lambda part: not isinstance(part, Plot))


def _verdict(models: list[Measured], verdict: Verdict) -> list[Part]:
    """The best within a budget, and the first table of the page: one row per model, and no other row."""
    steps = tuple((step["bytes"], step["sentence"]) for step in verdict["steps"])
    most = max(max(m["bytes"] for m in models), verdict["budget"])
    measure = CHANGE if models[0]["perplexity"] else "exact match"
    parts: list[Part] = []
    if len(models) > 1:
        parts = [Ceiling("Budget, which you can move:", steps, verdict["budget"], most)]
    qualities = _quality_head(models[0])
    head = ("model", "size", *qualities, "of the original", "made by", "experts per layer", BITS, *SPEEDS)
    rows = tuple((m["name"], _size(m), *_qualities(m), *_facts(m, models[0]), *_speeds(m)) for m in models)
    caption = f"Best: by {measure}, mean over data sets. In bold: no other is both smaller and better."
    return [*parts, Table(head, rows, caption, marked=tuple(verdict["front"]))]


def _notes(notes: list[str]) -> list[Part]:
    title = f"What to know before trusting these numbers ({len(notes)})"
    return [Fold(title, (Text(tuple(f"• {note}" for note in notes)),))] if notes else []


def _size(model: Measured) -> Number:
    return Number(model["bytes"], sized(model["bytes"]), exact=f"{model['bytes']:,} bytes")


def _facts(model: Measured, original: Measured) -> tuple[Cell, ...]:
    """Beside size and quality: share of the original's bytes, what was done, what is left."""
    by_layer = model["experts"]
    counts, experts = sorted((by_layer or {}).values()), "unknown" if by_layer is None else "none"
    if counts:
        experts = f"{' to '.join(map(str, sorted({counts[0], counts[-1]})))} in {len(counts)} layers"
    share = _percent(model["bytes"] / original["bytes"])
    return share, ", ".join(model["ways"]) or _kind(model, original), experts, _fixed(model["bits_per_parameter"], 2)


def _kind(model: Measured, original: Measured) -> str:
    """What gives a model its colour and shape: the one way in which it was made smaller."""
    if model["ways"]:
        return model["ways"][0] if len(model["ways"]) == 1 else SEVERAL
    return ORIGINAL if model is original or model["hash"] == original["hash"] else UNKNOWN


def _qualities(model: Measured) -> tuple[Cell, ...]:
    """In the order of `_quality_head`."""
    change = _cell(model["paired"]["mean"], 4, sign=True) if "paired" in model else None
    losses = (change, _cell(model["mean"], 3))
    return (losses[0], _percent(exact(model)), losses[1]) if model["exact_match"] else losses


def _quality_head(original: Measured) -> tuple[str, ...]:
    return (CHANGE, *(("exact match",) if original["exact_match"] else ()), "loss")


def _speeds(model: Measured) -> tuple[Cell, ...]:
    speed = model.get("speed")
    return tuple(_fixed(speed[kind]["value"], 1) if speed else None for kind in ("prefill", "decode"))


def _quality(entries: list[Measured], references: list[Measured], verdict: Verdict) -> list[Part]:
    """Quality against bytes, with the original and its 4-bit version to be held against."""
    original = entries[0]
    measured: dict[str, list[Interval | None]] = {}
    if any("paired" in m for m in entries):
        measured["loss beyond the original's, mean over data sets"] = [_beyond(m, original) for m in entries]
    measured["loss, mean over data sets"] = [m["mean"] for m in entries]
    for name in original["perplexity"]:
        measured[f"loss, {name}"] = [_loss(m["perplexity"][name]) for m in entries]
    for name in original["exact_match"]:
        measured[f"exact match, {name} (higher is better)"] = [m["exact_match"][name] for m in entries]
    first = next((what for what, values in measured.items() if any(values)), "")  # the measure of the verdict
    views = [
        View(what, points)
        for what, values in measured.items()
        if (points := _points(entries, values, verdict["front"] if what == first else ()))
    ]
    parts: list[Part] = [Scatter(SCATTER, "bytes", "loss (nats per token) or share", tuple(views))]
    if references:
        head = ("reference", "size", *_quality_head(original), "made by")
        rows = tuple((r["name"], _size(r), *_qualities(r), Code(r["makes"])) for r in references)
        said = (
            f"The reference is the original with {references[0]['what']}: the weights are rounded in memory "
            "and judged, the bytes are counted and not written. A result that is larger and worse than this point is "
            "no gain over plain rounding."
        )
        parts += [Table(head, rows), Fold("What the reference is", (Text((said,)),))]
    return parts


def _beyond(model: Measured, original: Measured) -> Interval | None:
    """Loss minus the original's, on the same tokens."""
    if "paired" in model:
        change = model["paired"]["mean"]
        return change and {"value": -change["value"], "low": -change["high"], "high": -change["low"]}
    return {"value": 0.0, "low": 0.0, "high": 0.0} if model is original and model["mean"] else None


def _points(entries: list[Measured], values: list[Interval | None], front: Sequence[str]) -> tuple[Point, ...]:
    original = entries[0]
    return tuple(
        Point(
            m["name"], m["bytes"], value["value"], value["low"], value["high"], note=_note(m, original),
            reference=m is original or "what" in m, kind=_kind(m, original), front=m["name"] in front,
        )
        for m, value in zip(entries, values, strict=True)
        if value
    )  # fmt: skip


def _note(model: Measured, original: Measured) -> str:
    """What a point says besides: exact bytes, and what was done."""
    ways = ", ".join(model["ways"]) or _kind(model, original)
    return f"{model['bytes']:,} bytes, {model['bits_per_parameter']:.2f} bits per original parameter; {ways}"


def _by_data_set(entries: list[Measured]) -> list[Part]:
    """Log-likelihood against the original's where there is a pair, else losses; tables of both."""
    names, pairs = entries[0]["perplexity"], [m for m in entries if "paired" in m]
    if not names:
        return []
    losses = _wide(entries, names, lambda m, name: _loss_cell(m["perplexity"][name]))
    said = f"{LOSS}; its exponential, perplexity, on hover"
    table = Fold("Losses", (Table(("model", *names), losses, said),))
    if not pairs:
        views = _views(entries, entries[0], names, lambda m, name: _loss(m["perplexity"][name]))
        return [Rows("Loss", LOSS, "", views), table]
    changes = _wide(pairs, names, lambda m, name: _cell(m["paired"]["difference"][name], 4, sign=True))
    views = _views(pairs, entries[0], names, lambda m, name: m["paired"]["difference"][name])
    if len(names) > 1:
        views = (*_views(pairs, entries[0], ["mean over data sets"], lambda m, _: m["paired"]["mean"]), *views)
    said = f"Intervals: {pairs[0]['paired']['interval']}, of the difference itself."
    plot = Rows(GAIN, WORSE, "", views)
    return [plot, Fold("Differences", (Table(("model", *names), changes, f"{GAIN}, {WORSE}. {said}"),)), table]


def _wide(
    models: Sequence[Measured], names: Sequence[str] | dict[str, Interval], cell: Callable[[Measured, str], Cell]
) -> tuple[tuple[Cell, ...], ...]:
    """A row a model, a column a data set."""
    return tuple((m["name"], *(cell(m, name) for name in names)) for m in models)


def _views(
    models: Sequence[Measured],
    original: Measured,
    names: Sequence[str] | dict[str, Interval],
    value: Callable[[Measured, str], Interval | None],
) -> tuple[View, ...]:
    """A view a data set, a row a model."""
    return tuple(View(name, tuple(_row(m, original, value(m, name)) for m in models)) for name in names)


def _row(model: Measured, original: Measured, measured: Interval | None, *, factor: float = 1) -> Row:
    value, low, high = (factor * measured[key] if measured else None for key in ("value", "low", "high"))
    return Row(model["name"], value, low, high, reference="what" in model, kind=_kind(model, original))


def _loss_cell(perplexity: Interval) -> Number:
    value, low, high = (_loss(perplexity)[key] for key in ("value", "low", "high"))
    said = f"perplexity {perplexity['value']:,.3f} [{perplexity['low']:,.3f}, {perplexity['high']:,.3f}], "
    return Number(value, f"{value:.4f}", f"[{low:.4f}, {high:.4f}]", f"{said}{perplexity['tokens']:,} tokens")


def _overlap(models: list[Measured]) -> list[Part]:
    overlaps = {m["name"]: m["paired"]["router_overlap"] for m in models if "paired" in m}
    overlaps = {name: overlap for name, overlap in overlaps.items() if overlap}
    if not overlaps:
        return []
    layers = tuple(sorted({key for overlap in overlaps.values() for key in overlap}, key=int))
    values = tuple(tuple(overlap.get(key) for key in layers) for overlap in overlaps.values())
    rows = tuple(
        (m, _fixed(sum(o.values()) / len(o), 3), min(o, key=lambda key: o[key]), min(o.values()))
        for m, o in overlaps.items()
    )
    head = ("model", "mean over layers", "lowest in layer", "lowest")
    said = "Mean over tokens of the experts chosen by both over those chosen by either, by original id; 1: the same."
    grid = Grid(tuple(overlaps), layers, values)
    plot = Heatmap("Experts chosen as in the original: router overlap", "layer", "model", (View("all", (grid,)),))
    return [Fold("Router overlap layer by layer", (plot, Table(head, rows, said)))]


def _answers(entries: list[Measured]) -> list[Part]:
    names = entries[0]["exact_match"]
    if not names:
        return []
    ours = next((m["paired"]["repetition"] for m in entries if "paired" in m), {})
    original = {name: repeated["against"] for name, repeated in ours.items()}
    rows = tuple(_answer_row(m, n, original) for m in entries for n in names)
    said = (
        "Flipped: the share of problems that one of the two solves and the other does not. Models with one score may "
        "differ in many answers."
    )
    views = tuple(
        View(name, tuple(_row(m, entries[0], m["exact_match"][name], factor=100) for m in entries)) for name in names
    )
    counts = ("exact match", "problems", "cut off unfinished", "answers that flipped", "repeated 4-grams")
    plot = Rows("Exact match", "% of problems (higher is better)", "", views)
    return [plot, Fold("Answers in numbers", (Table(("model", "data set", *counts), rows, said),))]


def _answer_row(model: Measured, name: str, original: dict[str, float | None]) -> tuple[Cell, ...]:
    """original: the share of repeated 4-grams in its answers, which only a pair knows."""
    match, pair = model["exact_match"][name], model.get("paired")
    repeated = pair["repetition"][name]["model"] if pair else original.get(name)
    between = f"[{100 * match['low']:.1f}, {100 * match['high']:.1f}]"
    shares = (model["cut"][name], pair["flipped"][name] if pair else None, repeated)
    right = Number(match["value"], f"{100 * match['value']:.1f} %", between)
    return (model["name"], name, right, match["count"], *map(_percent, shares))


def _experts(models: list[Measured]) -> list[Part]:
    """Which of the original's experts are left, layer by layer."""
    if not models:
        return []
    views = tuple(View(m["name"], (_grid(m["fate"]),)) for m in models)
    rows: list[tuple[Cell, ...]] = [
        (m["name"], key, *map(levels.count, range(len(LEVELS)))) for m in models for key, levels in m["fate"].items()
    ]
    plot = Heatmap("What became of the original's experts", "expert", "layer", views, LEVELS)
    return [plot, Fold("Experts layer by layer", (Table(("model", "layer", *LEVELS), tuple(rows)),))]


def _grid(fate: dict[str, list[int]]) -> Grid:
    values = tuple(zip(*zip_longest(*fate.values()), strict=True))  # short rows are filled with None
    return Grid(tuple(fate), tuple(map(str, range(len(values[0])))), values)


def _kurtosis(models: list[Measured]) -> list[Part]:
    """The kurtosis of expert weights, as a command recorded it before, between and after its steps, or as it is."""
    rows = tuple((m["name"], stage, value) for m in models for stage, value in m["kurtosis"].items())
    said = (
        "Of the weights that are left, zeros not counted; a normal distribution has 3. Removing whole experts leaves "
        "it where it was, zeroing small weights lowers it."
    )
    table = Table(("model", "stage", "kurtosis"), rows, said)
    return [Fold("Kurtosis of expert weights", (table,))] if rows else []


def _speed(models: list[Measured]) -> list[Part]:
    if not models:
        return []
    first = models[0]["speed"]
    views = (
        View("decode", tuple(_row(m, models[0], m["speed"]["decode"]) for m in models)),
        View("prefill", tuple(_row(m, models[0], m["speed"]["prefill"]) for m in models)),
    )
    speeds = [(m["name"], m["speed"]) for m in models]
    rows = tuple((name, _cell(s["prefill"], 1), _cell(s["decode"], 1), s["relative_decode"]) for name, s in speeds)
    said = (
        f"Measured as by coterie bench: one sequence at a time, {first['prompt']} prompt tokens and {first['new']} new "
        "ones, in one process, the models taking turns call by call. Medians of single calls, with the 10th and 90th "
        "percentile in brackets (no intervals), by processor time if torch has one thread, else by the wall clock. The "
        "machine of this run, not yours; a weight of zero that is stored costs as much time as any other."
    )
    head = ("model", *SPEEDS, "decode against the original")
    plot = Rows("Speed", "tokens per second (higher is better)", "", views)
    return [plot, Fold("Speeds in numbers, and how they were measured", (Text((said,)), Table(head, rows)))]


def _provenance(found: Comparison) -> list[Part]:
    models = found["models"]
    rows = tuple((m["name"], m["path"], _made(m), _percent(m["sparsity"]), m["hash"][:16]) for m in models)
    head = ("model", "path", "made by", "expert weights removed or zero", "fingerprint")
    options = ", ".join(f"{k} {v}" for k, v in found["options"].items() if k != "data" and v not in (None, ()))
    data = ", ".join(f"{name} ({file})" for name, file in object_at(found, "options", "data").items())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    said = (
        f"Data: {data}.",
        f"Options: {options}. Each token but a text's first is scored once, with the most context its window gives.",
        f"Versions: {versions}. Measured in {found['seconds']:.0f} s, {found['peak_rss_bytes'] / 1e6:,.0f} MB at most.",
    )
    loss = (
        "Loss is the mean negative log-likelihood, and perplexity its exponential. Neither is a task: a model can keep "
        "its loss and lose an ability that these texts do not ask for. Judge on your own data, and read its answers."
    )
    return [
        Text((loss,)),
        Fold("The models, and the commands that made them", (Table(head, rows),)),
        *_kurtosis(models),
        Fold("Data, options, versions", (Text(said),)),
    ]


def _made(model: Measured) -> Cell:
    return Code(model["command"]) if model["command"] else None


def _loss(perplexity: Interval) -> Interval:
    """Mean loss, with its interval, from perplexity."""
    return {key: math.log(perplexity[key]) for key in ("value", "low", "high")}


def _cell(measured: Interval | None, digits: int, *, sign: bool = False) -> Cell:
    if measured is None:
        return None
    form = f"{'+' if sign else ''},.{digits}f"
    low, high = (format(measured[key], form) for key in ("low", "high"))
    return Number(measured["value"], f"{measured['value']:{form}}", f"[{low}, {high}]")


def _fixed(value: float, digits: int) -> Number:
    return Number(value, f"{value:,.{digits}f}")


def _percent(share: float | None) -> Cell:
    return None if share is None else Number(share, f"{100 * share:.1f} %")
