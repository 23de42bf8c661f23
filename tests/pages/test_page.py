"""The renderer of pages: everything escaped, nothing fetched, and in a real browser plots are drawn and tables sort."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from coterie.pages.page import (
    Ceiling,
    Code,
    Finding,
    Findings,
    Fold,
    Grid,
    Heatmap,
    Line,
    Lines,
    Number,
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

EVIL = "<script>alert(1)</script>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def sections(name="out"):
    """One of everything, with a name that comes from outside."""
    points = (
        Point("original", 100, 2.0, 1.9, 2.1, front=True),
        Point(name, 60, 2.2, 2.1, 2.3, "a note", kind="pruned", front=True),
        Point("4 bits", 30, 2.1, reference=True),
    )
    bars = (Row("original", 2.0, 1.9, 2.1), Row(name, -0.5, -0.6, -0.4, kind=name), Row("code", None))
    grid = Grid(("0", name), ("0", "1", "2"), ((0, 1, 1), (1, None, 0)))
    rows = (("b", 2, Number(10.0, "10.0", "[9, 11]")), (name, 10, None), ("a", 1, Number(9.0, "9.0", "[8, 10]", name)))
    findings = Findings((Finding(name, name, name, f"coterie prune '{name}' OUT"),))
    return {
        "Numbers": (
            Ceiling("Budget", ((0, name), (60, "sixty"), (100, "a hundred")), 60, 100),
            Text(("One.", name)),
            findings,
            Table(("model", "count", "loss"), rows, "a caption", marked=(name,)),
            Fold(name, (Table((name, "command"), ((name, Code(name)),)),)),
        ),
        "Plots": (
            Scatter("Quality", "bytes", "loss", (View("all", points), View(name, points[:2]))),
            Rows("Losses", "nats", "", (View("all", bars),)),
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
    """No address anywhere but the name of SVG, which is not one to fetch; in attributes those of its sections."""
    text = page("Title", "Intro", sections())
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    places = [value for _, attrs in Tags(text).tags for key, value in attrs.items() if key in ("src", "href")]
    assert places == ["data:,", "#s0", "#s1"]


@pytest.mark.parametrize("name", [EVIL, "</script><b>x", "<!--", "\"'><img src=x onerror=alert(1)>", "&amp;"])
def test_names_from_outside_stay_text(name):
    """A hostile name adds no tag to the page, and comes back from the data as it was."""
    found, plain = Tags(page(name, name, sections(name), numbers={"path": name})), Tags(page("t", "i", sections()))
    assert [tag for tag, _ in found.tags if tag != "button"] == [tag for tag, _ in plain.tags if tag != "button"]
    data = json.loads(found.scripts[0])
    assert data["title"] == data["numbers"]["path"] == data["plots"][0]["views"][1]["name"] == name
    (steps,) = (dict(attrs)["data-steps"] for tag, attrs in found.tags if "data-steps" in attrs)
    assert json.loads(steps)[0] == [0, name]


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


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (33_317_376, "33.3 MB"), (999_600_000, "1 GB"), (1.5e15, "1500 TB")],
)
def test_bytes_are_said_as_people_say_them(num_bytes, said):
    """Three digits and a unit of a thousand; the exact number is in the cell's title."""
    assert sized(num_bytes) == said
    text = page("t", "i", {"s": (Table(("size",), ((Number(5, sized(5), exact="5 bytes"),),)),)})
    assert '<td class="number" data-value="5" title="5 bytes">5 B</td>' in text


def test_the_contents_lead_to_every_section():
    """A link for each, in order; a section without parts has none."""
    found = Tags(page("t", "i", {"a": (Text(("x",)),), "b": (), "c": (Text(("y",)),)}))
    targets = [attrs["href"] for tag, attrs in found.tags if tag == "a"]
    assert targets == [f"#{attrs['id']}" for tag, attrs in found.tags if tag == "h2"] == ["#s0", "#s1"]


@pytest.mark.parametrize(("budget", "said"), [(0, "none"), (59, "none"), (60, "sixty"), (1000, "a hundred")])
def test_the_sentence_of_a_budget_is_that_of_the_last_step_that_fits(budget, said):
    """Without a script too."""
    text = page("t", "i", {"s": (Ceiling("Budget", ((0, "none"), (60, "sixty"), (100, "a hundred")), budget, 1000),)})
    assert f"<strong>{said}</strong>" in text


def test_values_of_a_heatmap_travel_as_bytes_on_one_scale():
    """Of all views: 1 for the lowest value, 255 for the highest, 0 for none; of levels, one more than the level."""
    views = (View("a", (Grid(("r",), ("x", "y"), ((-1.0, None),)),)), View("b", (Grid(("r",), ("x",), ((3.0,),)),)))
    text = page(
        "t", "i", {"s": (Heatmap("h", "x", "y", views), Heatmap("h", "x", "y", views[1:], ("a", "b", "c", "d")))}
    )
    first, second = json.loads(Tags(text).scripts[0])["plots"]
    assert [list(base64.b64decode(view["marks"][0]["codes"])) for view in first["views"]] == [[1, 0], [255]]
    assert first["low"] + 254 * first["step"] == 3
    assert list(base64.b64decode(second["views"][0]["marks"][0]["codes"])) == [4]


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
    marks = "f => f.querySelectorAll('svg[role=group] path').length"
    drawn = [tab.evaluate(marks, figure) for figure in tab.query_selector_all("figure")]
    assert len(drawn) == 5 and min(drawn) >= 2, drawn
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.slow
def test_a_click_on_a_head_sorts(opened):
    """Once ascending, twice descending, by value rather than by spelling; what was not measured stays last."""
    tab = opened(page("t", "i", sections("c")))

    def column(number):
        return tab.locator("table").first.locator(f"tbody tr td:nth-child({number})").all_text_contents()

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
    assert figure.locator("svg[role=group] .mark").count() == 3
    figure.locator("select").select_option("1")
    assert figure.locator("svg[role=group] .mark").count() == 2


@pytest.mark.slow
def test_a_point_says_what_it_is(opened):
    """The tooltip of a mark, as text, under a pointer and with the keyboard; Escape takes it away."""
    tab = opened(page("t", "i", sections(EVIL)))
    mark = tab.locator("figure").nth(0).locator("svg[role=group] .mark").nth(1)
    said = f"{EVIL}\nbytes: 60 B\nloss: 2.2 [2.1, 2.3]\na note"
    mark.hover()
    assert tab.locator("#tip").inner_text() == said == mark.get_attribute("aria-label")
    tab.keyboard.press("Escape")
    assert not tab.locator("#tip").is_visible()
    tab.locator("figure select").first.focus()
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab")
    assert tab.locator("#tip").inner_text() == said


@pytest.mark.slow
def test_kinds_differ_in_colour_and_shape(opened):
    """Of the two points of different kinds; both stand in the legend as they are drawn, and names beside points."""
    tab = opened(page("t", "i", sections()))
    marks = tab.locator("figure").nth(0).locator("svg[role=group] .mark")
    looks = [(mark.get_attribute("class"), mark.get_attribute("d")) for mark in marks.all()]
    assert len({colour for colour, _ in looks}) == len({path for _, path in looks}) == 3
    assert tab.locator("figure").nth(0).locator(".legend").inner_text() == "pruned"
    texts = tab.locator("figure").nth(0).locator("svg[role=group] text").all_text_contents()
    assert {"original", "out", "4 bits"} <= set(texts)


@pytest.mark.slow
def test_the_reader_moves_the_budget(opened):
    """By keys alone: the sentence, the size and the line in the plot follow."""
    tab = opened(page("t", "i", sections()))
    line = tab.locator("svg .budget")
    assert (
        tab.locator("#budget strong").inner_text() == "sixty" and tab.locator("#budget output").inner_text() == "60 B"
    )
    before = float(line.get_attribute("x1"))
    tab.locator("#budget input").focus()
    tab.keyboard.press("End")
    assert tab.locator("#budget strong").inner_text() == "a hundred"
    assert float(line.get_attribute("x1")) > before
    tab.keyboard.press("Home")
    assert tab.locator("#budget strong").inner_text() == "out" and tab.locator("#budget output").inner_text() == "0 B"


@pytest.mark.slow
def test_arrow_keys_read_a_grid(opened):
    """Cell by cell, levels by name and values by number."""
    tab = opened(page("t", "i", sections("last")))
    tab.locator("figure").nth(3).locator(".cover").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#tip").inner_text() == "layer 0, expert 1: kept"
    tab.keyboard.press("ArrowDown")
    assert tab.locator("#tip").inner_text() == "layer last, expert 1: nothing"
    tab.locator("figure").nth(4).locator(".cover").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#tip").inner_text() == "layer 0, expert 1: 1"
    assert tab.locator("figure").nth(4).locator(".legend").inner_text().split() == ["0", "1"]


@pytest.mark.slow
def test_a_printed_page_is_unfolded_and_light(opened):
    """Whatever the reader's scheme."""
    tab = opened(page("t", "i", sections()), color_scheme="dark")
    assert not tab.locator("details").last.evaluate("d => d.open")
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    tab.emulate_media(media="print")
    assert tab.locator("details").evaluate_all("all => all.every(d => d.open)")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.slow
def test_the_numbers_can_be_saved(opened):
    """The button gives the JSON that the page carries."""
    numbers = {"path": EVIL, "loss": [1.5, None]}
    tab = opened(page("t", "i", {}, numbers=numbers))
    with tab.expect_download() as saved:
        tab.locator("#save").click()
    with open(saved.value.path(), encoding="utf-8") as file:
        assert json.load(file) == numbers
