"""How far a command is: stages as one share of the whole, the time left, and a line now and then."""

import time

import pytest

import coterie
from coterie.pages import progress
from coterie.pages.progress import SHARES, Gauge, shown, spelled


class Clock:
    """A clock that stands until it is moved."""

    now = 100.0

    def __call__(self):
        return self.now


def test_stages_count_by_their_shares_of_the_time():
    """Half of a stage that takes 80 % of the time is 40 % of the whole; a later stage counts those before as over."""
    gauge = Gauge({"measuring": 0.8, "writing": 0.2}, Clock())
    gauge.advance("measuring", 5, 10)
    assert gauge.share == pytest.approx(0.4)
    gauge.advance("writing", 0, 10)
    assert gauge.share == pytest.approx(0.8)
    gauge.advance("writing", 10, 10)
    assert gauge.share == pytest.approx(1)


def test_stages_that_never_come_take_no_share():
    """What was passed over is left out, so that a run without it ends at the whole as well."""
    gauge = Gauge({"measuring": 0.6, "guessing": 0.2, "writing": 0.2}, Clock())
    gauge.advance("writing", 5, 10)
    assert gauge.share == pytest.approx(0.5)
    gauge.advance("writing", 10, 10)
    assert gauge.share == pytest.approx(1)


def test_the_share_never_falls():
    """Whatever a stage says, or if one comes again."""
    gauge, found = Gauge({"a": 0.5, "b": 0.5}, Clock()), []
    for stage, done in (("a", 9), ("a", 1), ("b", 5), ("a", 0), ("b", 6), ("unknown", 0), ("b", 10)):
        gauge.advance(stage, done, 10)
        found.append(gauge.share)
    assert found == sorted(found) and found[-1] == pytest.approx(1)


def test_a_command_without_a_table_has_one_stage():
    """Its own total is the whole."""
    gauge = Gauge({}, Clock())
    gauge.advance("analyzing layers", 3, 4)
    assert gauge.share == pytest.approx(0.75)


def test_rounds_of_a_stage_are_one_stage():
    """What follows the comma says which of several."""
    gauge = Gauge({"searching": 0.5, "writing": 0.5}, Clock())
    gauge.advance("searching, round 1", 10, 10)
    gauge.advance("searching, round 2", 5, 10)
    assert gauge.share == pytest.approx(0.5)


def test_the_time_left_follows_from_the_pace():
    """A quarter in a minute: three minutes are left. At first, and at the end, nothing is said."""
    clock = Clock()
    gauge = Gauge({"a": 1.0}, clock)
    assert gauge.left == "" and gauge.line() == "0 % · starting"
    clock.now += 60
    gauge.advance("a", 1, 4)
    assert gauge.left == "about 3 min left"
    assert gauge.line() == "25 % · a, 1 of 4 · about 3 min left"
    gauge.advance("a", 4, 4)
    assert gauge.left == ""


def test_bytes_are_told_in_their_units_and_how_fast():
    """Never as 0.0 of 0.0 GB."""
    clock = Clock()
    gauge = Gauge({}, clock)
    gauge.advance("writing", 0, 2_500_000)
    assert gauge.amount == "0 bytes of 2.5 MB"
    clock.now += 2
    gauge.advance("writing", 2_000_000, 2_500_000)
    assert gauge.amount == "2.0 MB of 2.5 MB, 1 MB/s"


@pytest.mark.parametrize(("seconds", "says"), [(4.4, "4 s"), (89, "89 s"), (150, "2 min"), (7200, "2.0 h")])
def test_durations_are_said_as_people_say_them(seconds, says):
    """In the unit that fits."""
    assert spelled(seconds) == says


def test_where_nobody_watches_a_line_comes_now_and_then(monkeypatch):
    """Also while a stage takes long and says nothing; none after the end."""
    monkeypatch.setattr(progress, "EVERY", 0.01)
    lines = []
    with shown("collect", False, lines.append) as on_progress:
        on_progress("measuring layers", 1, 8)
        while len(lines) < 3:
            time.sleep(0.01)
    count = len(lines)
    assert lines[-1].startswith("12 % · measuring layers, 1 of 8")
    time.sleep(0.05)
    assert len(lines) == count


def test_every_command_with_shares_exists():
    """A command that was renamed would lose its bar's shares in silence."""
    assert SHARES.keys() <= coterie.VERBS.keys()
    assert all(0 < share <= 1 for stages in SHARES.values() for share in stages.values())
