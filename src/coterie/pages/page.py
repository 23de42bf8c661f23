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
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Number:
    """A table's cell that sorts by its value and shows its text, such as an interval."""

    value: float
    text: str


Cell = str | int | float | Number | None  # None: not measured, sorted last


@dataclass(frozen=True)
class Text:
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table that sorts by the column whose head is clicked. Each row has as many cells as the head."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot; `low` and `high` draw an interval of y; a reference is drawn hollow."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""  # added to the tooltip
    reference: bool = False


@dataclass(frozen=True)
class Bar:
    """A value of one series in one group, with its interval; None: not measured."""

    series: str
    group: str
    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


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
    marks: tuple[Point, ...] | tuple[Bar, ...] | tuple[Line, ...] | tuple[Grid]


@dataclass(frozen=True)
class Bars:
    """Bars from zero with intervals; with `dots`, points with intervals on an axis that need not hold zero."""

    title: str
    y: str  # the axis' label, with units
    views: tuple[View, ...]
    dots: bool = False


@dataclass(frozen=True)
class Scatter:
    title: str
    x: str
    y: str
    views: tuple[View, ...]


class Lines(Scatter):
    """Series instead of single points."""


@dataclass(frozen=True)
class Heatmap(Scatter):
    """One grid per view. With `levels`, values are indices into these names; without, shades from 0 to the largest."""

    levels: tuple[str, ...] = ()


Part = Text | Table | Bars | Scatter


def page(title: str, intro: str, sections: Mapping[str, Sequence[Part]], *, numbers: Any = None) -> str:
    """The page as one string of HTML, to be written as UTF-8.

    sections: parts by title; those without any are left out.
    numbers: JSON data that the page carries along and offers to save; all floats in it and in plots are finite.
    """
    plots: list[dict[str, object]] = []
    body = "\n".join(_section(name, parts, plots) for name, parts in sections.items() if parts)
    # No HTML parser sees the end of a script, or a comment, in it.
    data = json.dumps({"title": title, "plots": plots, "numbers": numbers}, allow_nan=False).replace("<", "\\u003c")
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


def _section(title: str, parts: Sequence[Part], plots: list[dict[str, object]]) -> str:
    text = "\n".join(_part(part, plots) for part in parts)
    return f"<section>\n<h2>{_escape(title)}</h2>\n{text}\n</section>"


def _part(part: Part, plots: list[dict[str, object]]) -> str:
    """HTML of a part; a plot leaves its data in `plots` and a place to be drawn."""
    if isinstance(part, Text):
        return "\n".join(f"<p>{_escape(paragraph)}</p>" for paragraph in part.paragraphs)
    if isinstance(part, Table):
        return _table(part)
    plots.append({"kind": type(part).__name__.lower(), **asdict(part)})
    return f'<figure data-plot="{len(plots) - 1}"><figcaption>{_escape(part.title)}</figcaption></figure>'


def _table(table: Table) -> str:
    assert all(len(row) == len(table.head) for row in table.rows), "a row does not fit its head"
    heads = "".join(f'<th scope="col"><button type="button">{_escape(name)}</button></th>' for name in table.head)
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    caption = f"<caption>{_escape(table.caption)}</caption>" if table.caption else ""
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )


def _cell(cell: Cell) -> str:
    """A string as it is; a number with the value that it sorts by."""
    if cell is None:
        return '<td class="none">–</td>'
    if isinstance(cell, str):
        return f"<td>{_escape(cell)}</td>"
    if not isinstance(cell, Number):
        cell = Number(cell, f"{cell:,}" if isinstance(cell, int) else f"{cell:,.4g}")
    return f'<td class="number" data-value="{cell.value!r}">{_escape(cell.text)}</td>'


def _escape(text: str) -> str:
    """For text and quoted attributes. Bytes of file names that are no UTF-8 become question marks."""
    return html.escape(text.encode("utf-8", "replace").decode())


def _digest(text: str) -> str:
    """The source expression of a content policy that allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
