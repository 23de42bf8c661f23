"""What `coterie report` decides, on hand-sized numbers; and its page about many models, from numbers alone."""

import html
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_page import EVIL, browser, opened  # noqa: F401 - fixtures

from coterie.errors import CoterieError
from coterie.pages.report import render
from coterie.pages.verdict import decide, front, read_budget

WAYS = ("pruned", "merged", "condensed", "layers dropped", "zeros", "quantised")
SETS = ("code", "docs", "prose", "spanish", "arithmetic")


def around(value, width=0.1):
    return {"value": value, "low": value - width, "high": value + width, "tokens": 1000, "count": 50}


def model(name, num_bytes, change, right=None, ways=(), **more):
    """An entry of the report: bytes, mean change of log-likelihood (None: the original), exact match."""
    loss = 2 - (change or 0)
    paired = {
        "against": "original", "interval": "95 %", "difference": {s: around(change or 0, 0.01) for s in SETS},
        "flipped": {"sums": 0.1}, "repetition": {"sums": {"model": 0.1, "against": 0.2}},
        "router_overlap": {"0": 0.9, "1": 0.8}, "mean": around(change or 0, 0.01),
    }  # fmt: skip
    return {
        "name": name, "path": name, "bytes": num_bytes, "parameters": 100, "bits_per_parameter": 8.0, "hash": name,
        "ways": list(ways), "experts": {"0": 64, "1": 64}, "command": f"coterie prune {name}", "sparsity": 0.25,
        "kurtosis": {"as it is": 3.0}, "mean": around(loss), "cut": {"sums": 0.0},
        "perplexity": {s: around(7.4) for s in SETS}, "exact_match": {} if right is None else {"sums": around(right)},
    } | ({} if change is None else {"paired": paired, "fate": {"0": [1] * 60 + [0] * 4}}) | more  # fmt: skip


def found(*models, references=()):
    return {
        "models": list(models), "references": list(references), "options": {"data": {}}, "notes": [],
        "versions": {}, "seconds": 1.0, "peak_rss_bytes": 1,
    }  # fmt: skip


ORIGINAL = model("original", 100, None, 0.8)
LARGE, MIDDLE, SMALL = model("large", 80, -0.1, 0.75), model("middle", 60, -0.01, 0.6), model("small", 40, -0.5, 0.1)


@pytest.mark.parametrize(
    ("budget", "best"),
    [(None, "middle"), (39, None), (40, "small"), (59, "small"), (60, "middle"), (99, "middle"), (100, "original")],
)
def test_the_verdict_is_the_best_that_fits(budget, best):
    """Without a budget, of all that is smaller than the original."""
    verdict = decide(found(ORIGINAL, SMALL, LARGE, MIDDLE), budget)
    assert verdict["best"] == best and verdict["budget"] == (80 if budget is None else budget)
    assert verdict["front"] == ["small", "middle", "original"]


def test_the_sentence_has_the_numbers():
    """Size, share, change, exact match; who clearly answers more; the reference that beats it, with its command."""
    assert decide(found(ORIGINAL, LARGE, MIDDLE), None)["sentence"] == (
        "middle is best: 60 B, 60 % of the original, -0.0100 nats of log-likelihood per token, exact match 60.0 % "
        "(original 80.0 %). large answers more: exact match 75.0 %."
    )
    for change, better in ((-0.001, False), (0.001, True)):  # the interval of the best ends at 0
        reference = model("4 bits", 50, change, 0.8, makes="coterie quantize m OUT")
        said = decide(found(ORIGINAL, MIDDLE, references=[reference]), None)["sentence"]
        assert said.endswith(" 4 bits would be smaller and better: coterie quantize m OUT") == better
    assert decide(found(ORIGINAL), None)["sentence"] == "original, the original, fits, and nothing smaller is as good."


def test_without_texts_answers_decide():
    """Exact match is then the measure."""
    bare = [m | {"mean": None, "perplexity": {}} for m in (ORIGINAL, LARGE, MIDDLE)]
    for m in bare[1:]:
        m["paired"] = m["paired"] | {"mean": None, "difference": {}}
    verdict = decide(found(*bare), None)
    assert verdict["best"] == "large" and verdict["sentence"].startswith(
        "large is best: 80 B, 80 % of the original, ex"
    )
    assert "Best: by exact match" in render(found(*bare), verdict)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-9, 0)), min_size=1, max_size=8))
def test_the_front_is_what_nothing_beats(points):
    """Against the definition; of models that are equal in both, one stays."""
    models = [{"name": str(i), "bytes": size} for i, (size, _) in enumerate(points)]
    names = front(models, [value for _, value in points])
    kept = [points[int(name)] for name in names]
    unbeaten = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    assert set(kept) == unbeaten and kept == sorted(unbeaten)


@pytest.mark.parametrize(
    ("asked", "num_bytes"),
    [(None, None), (5, 5), ("20GB", 20 * 10**9), ("1.5 tb", 15 * 10**11), ("2GiB", 2**31), ("7", 7), ("8k", 8000)],
)
def test_budgets_are_read(asked, num_bytes):
    """Bytes, in units of a thousand; of 1024 with an i."""
    assert read_budget(asked) == num_bytes


@pytest.mark.parametrize("asked", ["", "GB", "-1", "1e9", "20 GBs", "nan", True, 1.5e300])
def test_what_is_no_budget_is_refused(asked):
    """With an example."""
    with pytest.raises(CoterieError, match="expected bytes, as in 20GB"):
        read_budget(asked)


# The page


def many():
    """An original, one model of each way and some of several, speeds and a reference."""
    speed = {"prefill": around(900, 9), "decode": around(90, 9), "relative_decode": 1.0, "prompt": 9, "new": 9}
    kinds = [*((way,) for way in WAYS), ("pruned", "zeros"), ()]
    made = [model(f"{'-'.join(w) or EVIL}", 90 - 7 * i, -0.01 * 2**i, 0.5, w) for i, w in enumerate(kinds)]
    reference = model("4-bit experts", 45, -0.002, 0.8, ["quantised"], what="rounding", makes="coterie quantize m OUT")
    return found(*(m | {"speed": speed} for m in (ORIGINAL, *made)), references=[reference])


def test_the_first_plot_has_every_kind_on_it():
    """Told by the record: each way, several ways, none recorded, the original and the reference."""
    text = render(many(), decide(many(), None))
    kinds = re.findall(r'"kind":"([a-z ]+)"', text.split('"kind":"scatter"')[1].split('"name":"loss, code"')[0])
    assert set(kinds) == {"original", *WAYS, "several ways", "not recorded"}
    assert "<img" not in text


def test_first_columns_are_size_and_quality():
    """What a phone shows without scrolling; those that nothing beats are marked."""
    text = render(many(), decide(many(), None))
    heads = re.findall(r"<th[^>]*><button[^>]*>([^<]*)", text.split("<table>")[1])
    assert heads[:4] == ["model", "size", "change of log-likelihood", "exact match"]
    marked = [html.unescape(name) for name in re.findall(r'<tr class="marked"><td>([^<]*)', text)]
    assert sorted(marked) == sorted(decide(many(), None)["front"]) and len(marked) == 9


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), itertools.product((1440, 390), ("light", "dark")))
def test_a_page_of_nine_models_is_short(opened, width, scheme):  # noqa: F811
    """Below 4,000 pixels as it opens, at both widths; no wider than the screen; every plot is drawn."""
    tab = opened(render(many(), decide(many(), None)), width, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollHeight") < 4000
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    drawn = tab.locator("figure").evaluate_all("all => all.map(f => f.querySelectorAll('svg[role=group] path').length)")
    assert len(drawn) >= 5 and min(drawn) > 0
    assert tab.locator("h2").all_inner_texts()[0] == "Verdict"
    sizes = (
        tab.locator("table")
        .first.locator("tbody td:nth-child(-n+4)")
        .evaluate_all("all => Math.max(...all.map(cell => cell.getBoundingClientRect().right))")
    )
    assert sizes <= width
