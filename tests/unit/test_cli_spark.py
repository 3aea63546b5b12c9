"""Plots of one line: they show what was, at any width, and only where they can be seen."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.cli.spark import bar, coloured, draw, growth, highest, steps, usable

SECOND = 10**9
EPOCH = 1_795_258_627 * SECOND  # so large that floats round it


def test_the_highest_of_each_part() -> None:
    points = [(EPOCH + n, value) for n, value in enumerate([1, 9, 2, 3, 8, 4])]
    assert highest(points, 1) == [9]
    assert highest(points, 5) == [9, 9, 3, 8, 8]
    assert highest(points, 80) == highest(points, 5)  # no part is shorter than a nanosecond


def test_a_part_without_a_point_has_what_was_last_seen() -> None:
    assert highest([(0, 5), (10, 1), (100, 7)], 10) == [5, 1, 1, 1, 1, 1, 1, 1, 1, 7]


def test_growth_is_even_between_points() -> None:
    points = [(0, 0), (10 * SECOND, 100), (20 * SECOND, 100), (40 * SECOND, 400)]
    assert growth(points, 4) == [10, 0, 15, 15]
    assert growth(points, 1) == [10]
    assert growth(points, 2) == [5, 15]
    assert steps(points) == [10, 0, 15]


@pytest.mark.parametrize("points", [[], [(5, 1)], [(5, 1), (5, 2)]])
def test_too_little_for_a_rate(points: list[tuple[int, int]]) -> None:
    assert growth(points, 10) == []
    assert steps(points) == []


def test_too_little_for_a_height() -> None:
    assert highest([], 10) == []
    assert highest([(5, 1), (5, 2)], 10) == [2]
    assert draw([]) == ""


_series = st.lists(st.tuples(st.integers(1, 10**13), st.integers(0, 10**15)), min_size=2, max_size=50)


@given(_series, st.integers(1, 200), st.sampled_from([0, EPOCH]))
def test_parts_of_a_growing_total_make_the_whole(increments: list[tuple[int, int]], width: int, start: int) -> None:
    points = []
    time, total = start, 0
    for seconds, more in increments:
        points.append((time, total))
        time, total = time + seconds, total + more
    rates = growth(points, width)
    assert len(rates) == min(width, points[-1][0] - points[0][0])
    assert all(rate is not None and rate >= 0 for rate in rates)
    if len(rates) == width:
        length = (points[-1][0] - points[0][0]) / width / SECOND
        assert math.isclose(sum(rate or 0 for rate in rates) * length, points[-1][1], rel_tol=0.01, abs_tol=1)
    assert max(rate or 0 for rate in rates) <= max(steps(points)) * 1.01 + 1


@given(_series, st.integers(1, 200))
def test_no_width_hides_the_highest(increments: list[tuple[int, int]], width: int) -> None:
    points = sorted(increments)
    found = highest(points, width)
    assert len(found) <= width
    assert max(value or 0 for value in found) == max(value for _, value in points)
    assert found[-1] is not None and found[-1] >= points[-1][1]


def test_heights() -> None:
    assert draw([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert draw([0, 0, 0]) == "▁▁▁"
    assert draw([0, 0.001, 7]) == "▁▂█"  # a little is not nothing
    assert draw([None, 5, None]) == " █ "
    assert draw([7], top=14) == "▅"
    assert draw([28, 14], top=14) == "█▅"


def test_bars() -> None:
    assert bar(0, 4) == "    "
    assert bar(0.5, 4) == "██  "
    assert bar(1, 4) == bar(7, 4) == "████"
    assert bar(-1, 4) == "    "
    assert bar(1 / 32, 4) == "▏   "
    assert bar(15 / 32, 4) == "█▉  "
    assert bar(1 / 1000, 4) == "    "


@given(st.floats(0, 1), st.integers(1, 40))
def test_a_bar_has_its_width(part: float, width: int) -> None:
    assert len(bar(part, width)) == width


def test_where_blocks_can_be_seen() -> None:
    assert usable("utf-8", {"TERM": "xterm-256color"})
    assert usable("UTF-8", {"TERM": "screen"})
    for encoding, term in (("ascii", "xterm"), (None, "xterm"), ("iso8859-1", "xterm")):
        assert not usable(encoding, {"TERM": term})
    for term in ("dumb", "unknown", "linux", ""):
        assert not usable("utf-8", {"TERM": term})
    assert not usable("utf-8", {})


def test_where_colours_are_wanted() -> None:
    assert coloured({"TERM": "xterm"})
    assert coloured({"TERM": "xterm", "NO_COLOR": ""})  # as no-color.org has it: set and not empty
    assert not coloured({"TERM": "xterm", "NO_COLOR": "1"})
    assert not coloured({"TERM": "dumb"})
    assert not coloured({})
