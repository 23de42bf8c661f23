"""The renderer of pages: everything escaped, nothing fetched, and in a real browser plots are drawn and tables sort."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from coterie.pages.page import (
    Bar,
    Bars,
    Grid,
    Heatmap,
    Line,
    Lines,
    Number,
    Point,
    Scatter,
    Table,
    Text,
    View,
    page,
)

EVIL = "<script>alert(1)</script>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def sections(name="out"):
    """One of everything, with a name that comes from outside."""
    points = (
        Point("original", 100, 2.0, 1.9, 2.1),
        Point(name, 60, 2.2, 2.1, 2.3, "a note"),
        Point("4 bits", 30, 2.1, reference=True),
    )
    bars = (Bar("original", "prose", 2.0, 1.9, 2.1), Bar(name, "prose", -0.5, -0.6, -0.4), Bar(name, "code", None))
    grid = Grid(("0", "1"), ("0", "1", "2"), ((0, 1, 1), (1, None, 0)))
    rows = (("b", 2, Number(10.0, "10.0 [9, 11]")), (name, 10, None), ("a", 1, Number(9.0, "9.0 [8, 10]")))
    return {
        "Numbers": (Text(("One.", name)), Table(("model", "count", "loss"), rows, "a caption")),
        "Plots": (
            Scatter("Quality", "bytes", "loss", (View("all", points), View(name, points[:2]))),
            Bars("Losses", "nats", (View("all", bars),)),
            Bars("Dots", "nats", (View("all", bars),), dots=True),
            Lines("By layer", "layer", "share", (View("all", (Line(name, (0, 1, 2), (0.5, None, 0.7)),)),)),
            Heatmap("Kept", "expert", "layer", (View(name, (grid,)),), levels=("removed", "kept")),
            Heatmap("Shades", "expert", "layer", (View("all", (grid,)),)),
        ),
    }


class Tags(HTMLParser):
    """Every start tag with its attributes, and the text inside scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def test_the_page_fetches_nothing():
    """No address anywhere but the name of SVG, which is not one to fetch, and none in an attribute."""
    text = page("Title", "Intro", sections())
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    places = [value for _, attrs in Tags(text).tags for key, value in attrs.items() if key in ("src", "href")]
    assert places == ["data:,"]


@pytest.mark.parametrize("name", [EVIL, "</script><b>x", "<!--", "\"'><img src=x onerror=alert(1)>", "&amp;"])
def test_names_from_outside_stay_text(name):
    """A hostile name adds no tag to the page, and comes back from the data as it was."""
    found, plain = Tags(page(name, name, sections(name), numbers={"path": name})), Tags(page("t", "i", sections()))
    assert [tag for tag, _ in found.tags if tag != "button"] == [tag for tag, _ in plain.tags if tag != "button"]
    data = json.loads(found.scripts[0])
    assert data["title"] == data["numbers"]["path"] == data["plots"][0]["views"][1]["name"] == name


def test_names_that_are_no_unicode_can_be_written():
    """Bytes of a folder's name that are no UTF-8 reach Python as lone surrogates; the page is still UTF-8."""
    assert page("\udcff", "\udcff", sections("\udcff")).encode("utf-8")


def test_numbers_that_are_none_are_refused():
    """NaN is not JSON: a page with it would be blank."""
    with pytest.raises(ValueError):
        page("t", "i", {}, numbers={"loss": float("nan")})


def test_a_table_is_there_without_a_script():
    """Rows in the order given, thousands apart, and what was not measured says so."""
    text = page("t", "i", {"s": (Table(("model", "bytes"), (("a", 1234567), ("b", None))),)})
    assert re.findall(r"<td[^>]*>([^<]*)</td>", text) == ["a", "1,234,567", "b", "–"]


# In a browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium or Chrome of this machine."""
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser on this machine; looked for {', '.join(BROWSERS)}")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, tmp_path):
    """`opened(html, width, ...)`: the page from disk without a network; afterwards, no error may have been said."""
    faults, contexts = [], []

    def open_page(text, width=1200, **how):
        (tmp_path / "report.html").write_text(text, encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, offline=True, **how))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
        tab.goto((tmp_path / "report.html").as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_plot_is_drawn(opened, width, scheme):
    """Each figure holds a drawing with marks, no wider than the screen, in the colours of the scheme."""
    tab = opened(page("Title", EVIL, sections(EVIL)), width, color_scheme=scheme)
    marks = "f => f.querySelectorAll('svg[role=img] :is(circle, rect:not(.cover), path, polygon)').length"
    drawn = [tab.evaluate(marks, figure) for figure in tab.query_selector_all("figure")]
    assert len(drawn) == 6 and min(drawn) >= 2, drawn
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.slow
def test_a_click_on_a_head_sorts(opened):
    """Once ascending, twice descending, by value rather than by spelling; what was not measured stays last."""
    tab = opened(page("t", "i", sections("c")))

    def column(number):
        return tab.locator(f"tbody tr td:nth-child({number})").all_text_contents()

    tab.locator("th button").nth(1).click()
    assert column(2) == ["1", "2", "10"]
    tab.locator("th button").nth(1).click()
    assert column(2) == ["10", "2", "1"]
    assert tab.locator("th").nth(1).get_attribute("aria-sort") == "descending"
    for expected in (["9.0 [8, 10]", "10.0 [9, 11]", "–"], ["10.0 [9, 11]", "9.0 [8, 10]", "–"]):
        tab.locator("th button").nth(2).click()
        assert column(3) == expected
    tab.locator("th button").nth(0).click()
    assert column(1) == ["a", "b", "c"]


@pytest.mark.slow
def test_a_selector_changes_what_is_shown(opened):
    """The second view of the scatter plot has two points, not three."""
    tab = opened(page("t", "i", sections()))
    figure = tab.locator("figure").nth(0)
    assert figure.locator("svg[role=img] circle").count() == 3
    figure.locator("select").select_option("1")
    assert figure.locator("svg[role=img] circle").count() == 2


@pytest.mark.slow
def test_a_point_says_what_it_is(opened):
    """The tooltip of a mark, as text."""
    tab = opened(page("t", "i", sections(EVIL)))
    tab.locator("figure").nth(0).locator("svg[role=img] circle").nth(1).hover()
    assert tab.locator("#tip").inner_text() == f"{EVIL}\nbytes: 60\nloss: 2.2 [2.1, 2.3]\na note"


@pytest.mark.slow
def test_the_numbers_can_be_saved(opened):
    """The button gives the JSON that the page carries."""
    numbers = {"path": EVIL, "loss": [1.5, None]}
    tab = opened(page("t", "i", {}, numbers=numbers))
    with tab.expect_download() as saved:
        tab.locator("#save").click()
    with open(saved.value.path(), encoding="utf-8") as file:
        assert json.load(file) == numbers
