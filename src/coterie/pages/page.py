"""One self-contained HTML page from plain data: sections of text, tables that sort and plots that answer to a pointer.

Last step of the flow: it knows nothing of models. Tables are written as HTML; plots travel as JSON and are drawn as
SVG by the page's own script (`page.js`), so that the page opens from disk, without a network. Names come from folders
and files of others: everything is escaped, and the page's content policy lets no script run but that one.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

SHADES = 255  # of a heatmap's values, which travel as bytes; 0 stands for nothing


@dataclass(frozen=True)
class Number:
    """A table's cell that sorts by its value and shows its text.

    interval: shown smaller beside it. exact: what is said when a pointer rests on it.
    """

    value: float
    text: str
    interval: str = ""
    exact: str = ""


@dataclass(frozen=True)
class Code:
    """A command to be copied whole."""

    text: str


Cell = str | int | float | Number | Code | None  # None: not measured, sorted last


@dataclass(frozen=True)
class Text:
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table that sorts by the column whose head is clicked. Each row has as many cells as the head.

    marked: names, in the first column, of rows that stand out.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    marked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ceiling:
    """A sentence that depends on a budget of bytes, which the reader moves; plots along bytes show it as a line.

    steps: (bytes, sentence): each holds from so many bytes on; the first from 0. budget: where the line stands first.
    """

    title: str
    steps: tuple[tuple[int, str], ...]
    budget: int
    most: int  # bytes that the reader can choose


@dataclass(frozen=True)
class Finding:
    """A verdict, the number it rests on, why, and the command to run next."""

    verdict: str
    number: str
    text: str
    command: str


@dataclass(frozen=True)
class Findings:
    items: tuple[Finding, ...]


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot; `low` and `high` draw an interval of y; a reference is drawn hollow.

    kind: gives colour and shape, and stands in the legend. front: whether the line of the best goes through it.
    """

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""  # added to the tooltip
    reference: bool = False
    kind: str = ""
    front: bool = False


@dataclass(frozen=True)
class Row:
    """A named value with its interval; None: not measured. kind, reference, note: as of a `Point`."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""
    reference: bool = False
    kind: str = ""


@dataclass(frozen=True)
class Line:
    """A series of points joined in order; a y of None leaves a gap."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]


@dataclass(frozen=True)
class Grid:
    """A heatmap's values, one row per row label, None where there is nothing to show."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class View:
    """What a plot shows at a time; of several views, a selector shows one."""

    name: str
    marks: tuple[Point, ...] | tuple[Row, ...] | tuple[Line, ...] | tuple[Grid]


@dataclass(frozen=True)
class Plot:
    """The axes have units in their names; an axis called "bytes" counts them as people do."""

    title: str
    x: str
    y: str
    views: tuple[View, ...]


class Scatter(Plot):
    """Points with their names beside them."""


class Rows(Plot):
    """A row for each named value, along x."""


class Lines(Plot):
    """Series of points over x."""


@dataclass(frozen=True)
class Heatmap(Plot):
    """One grid per view. With `levels`, values are indices into these names; without, shades of one scale for all."""

    levels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fold:
    """What stands behind its title until it is opened."""

    title: str
    parts: tuple[Part, ...]


Part = Text | Table | Ceiling | Findings | Plot | Fold


def page(title: str, intro: str, sections: Mapping[str, Sequence[Part]], *, numbers: Any = None) -> str:
    """The page as one string of HTML, to be written as UTF-8.

    sections: parts by title; those without any are left out.
    numbers: JSON data that the page carries along and offers to save; all floats in it and in plots are finite.
    """
    plots: list[dict[str, object]] = []
    filled = {name: parts for name, parts in sections.items() if parts}
    body = "\n".join(_section(f"s{i}", name, parts, plots) for i, (name, parts) in enumerate(filled.items()))
    links = "".join(f'<li><a href="#s{i}">{_escape(name)}</a></li>' for i, name in enumerate(filled))
    # No HTML parser sees the end of a script, or a comment, in it.
    data = json.dumps({"title": title, "plots": plots, "numbers": numbers}, allow_nan=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    style, script = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}"
    save = '<button id="save" type="button">Save the numbers as JSON</button>' if numbers is not None else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{_escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{_escape(title)}</h1>
<p class="intro">{_escape(intro)}</p>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<noscript><p>Plots need JavaScript; the tables hold the same numbers.</p></noscript>
{body}
{save}
</main>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def _section(key: str, title: str, parts: Sequence[Part], plots: list[dict[str, object]]) -> str:
    return f'<section>\n<h2 id="{key}">{_escape(title)}</h2>\n{_parts(parts, plots)}\n</section>'


def _parts(parts: Sequence[Part], plots: list[dict[str, object]]) -> str:
    """HTML of parts in order; plots that follow each other stand side by side where there is room."""
    text = []
    for are_plots, some in groupby(parts, lambda part: isinstance(part, Plot)):
        inner = "\n".join(_part(part, plots) for part in some)
        text.append(f'<div class="plots">\n{inner}\n</div>' if are_plots else inner)
    return "\n".join(text)


def _part(part: Part, plots: list[dict[str, object]]) -> str:
    """HTML of a part; a plot leaves its data in `plots` and a place to be drawn."""
    if isinstance(part, Text):
        return "\n".join(f"<p>{_escape(paragraph)}</p>" for paragraph in part.paragraphs)
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Ceiling):
        return _ceiling(part)
    if isinstance(part, Fold):
        return _folded(part.title, _parts(part.parts, plots))
    if isinstance(part, Findings):
        return _findings(part)
    plots.append(_packed(part) if isinstance(part, Heatmap) else _as_data(part))
    return f'<figure data-plot="{len(plots) - 1}"><figcaption>{_escape(part.title)}</figcaption></figure>'


def _ceiling(ceiling: Ceiling) -> str:
    """The sentence for the first budget, which a slider changes; `data-steps` holds the others."""
    sentence = next(said for num_bytes, said in reversed(ceiling.steps) if num_bytes <= ceiling.budget)
    steps = _escape(json.dumps(ceiling.steps))
    return f"""<div id="budget" data-steps="{steps}" data-budget="{ceiling.budget}">
<p><strong>{_escape(sentence)}</strong></p>
<label>{_escape(ceiling.title)} <output>{sized(ceiling.budget)}</output>
<input type="range" min="0" max="{ceiling.most}" step="any" value="{ceiling.budget}" autocomplete="off"></label>
</div>"""


def _findings(findings: Findings) -> str:
    items = "\n".join(
        f"<li><h3>{_escape(item.verdict)}</h3>\n<p>{_escape(item.number)}</p>\n<pre>{_escape(item.command)}</pre>\n"
        f"{_folded('Why', f'<p>{_escape(item.text)}</p>')}</li>"
        for item in findings.items
    )
    return f'<ol class="findings">\n{items}\n</ol>'


def _table(table: Table) -> str:
    assert all(len(row) == len(table.head) for row in table.rows), "a row does not fit its head"
    heads = "".join(f'<th scope="col"><button type="button">{_escape(name)}</button></th>' for name in table.head)
    classes = [' class="marked"' if row[0] in table.marked else "" for row in table.rows]
    rows = "\n".join(
        f"<tr{look}>{''.join(map(_cell, row))}</tr>" for look, row in zip(classes, table.rows, strict=True)
    )
    caption = f"<caption>{_escape(table.caption)}</caption>" if table.caption else ""
    label = _escape(table.caption or ", ".join(table.head))
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>{caption}<thead><tr>{heads}</tr>'
        f"</thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{_escape(title)}</summary>\n{text}\n</details>"


def _cell(cell: Cell) -> str:
    """A string as it is; a number with the value that it sorts by."""
    if cell is None:
        return '<td class="none">–</td>'
    if isinstance(cell, str):
        return f"<td>{_escape(cell)}</td>"
    if isinstance(cell, Code):
        return f'<td class="code"><code>{_escape(cell.text)}</code></td>'
    if not isinstance(cell, Number):
        cell = Number(cell, f"{cell:,}" if isinstance(cell, int) else f"{cell:,.4g}")
    exact = f' title="{_escape(cell.exact)}"' if cell.exact else ""
    interval = f" <small>{_escape(cell.interval)}</small>" if cell.interval else ""
    return f'<td class="number" data-value="{cell.value!r}"{exact}>{_escape(cell.text)}{interval}</td>'


def _as_data(plot: Plot) -> dict[str, object]:
    """The plot's data, without what is nothing."""

    def said(pairs: list[tuple[str, object]]) -> dict[str, object]:
        return {name: value for name, value in pairs if value is not None and value is not False and value != ""}

    return {"kind": type(plot).__name__.lower(), **asdict(plot, dict_factory=said)}


def _packed(plot: Heatmap) -> dict[str, object]:
    """The plot's data; each grid's values as bytes in base64: 0 for nothing, else 1 + level, or 1 to 255 on a scale."""
    grids = [grid for view in plot.views for grid in view.marks if isinstance(grid, Grid)]
    known = [v for grid in grids for row in grid.values for v in row if v is not None]
    low, high = (0.0, SHADES - 1.0) if plot.levels else (min(known, default=0.0), max(known, default=1.0))
    step = (high - low) / (SHADES - 1) or 1.0
    views: list[dict[str, object]] = []
    for view, grid in zip(plot.views, grids, strict=True):
        codes = bytes(0 if v is None else 1 + round((v - low) / step) for row in grid.values for v in row)
        mark = {"rows": grid.rows, "columns": grid.columns, "codes": base64.b64encode(codes).decode()}
        views.append({"name": view.name, "marks": [mark]})
    axes = {"title": plot.title, "x": plot.x, "y": plot.y, "levels": plot.levels}
    return {"kind": "heatmap", **axes, "low": low, "step": step, "views": views}


def sized(num_bytes: float) -> str:
    """Bytes as people say them, in three digits: 33.3 MB. The page's script says them likewise."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = next((p for p in range(len(units)) if num_bytes < 999.5 * 1000**p), len(units) - 1)
    value = num_bytes / 1000**power
    return f"{round(value, 0 if value >= 99.5 else 1 if value >= 9.95 else 2):g} {units[power]}"


def _escape(text: str) -> str:
    """For text and quoted attributes. Bytes of file names that are no UTF-8 become question marks."""
    return html.escape(text.encode("utf-8", "replace").decode())


def _digest(text: str) -> str:
    """The source expression of a content policy that allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
