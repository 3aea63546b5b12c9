"""Axes with round numbers, samples that lose neither a peak nor a byte, and paths that stay in their frame."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.points import Point, last_point
from acctd.report import plot, series, units
from acctd.report.plot import Band, Level, Mark, Plot
from acctd.report.units import Scale
from tests.unit.reporting import GIB, SECOND, points, record

MINUTE, HOUR, DAY = 60 * SECOND, 3600 * SECOND, 86400 * SECOND


def labels(scale: Scale) -> list[str]:
    return [text for _, text in scale.ticks]


def test_memory_has_powers_of_two() -> None:
    scale = units.bytes_scale(int(1.2 * GIB))
    assert (labels(scale), scale.unit) == (["0", "0.25", "0.50", "0.75", "1.00", "1.25"], "GiB")
    scale = units.bytes_scale(16 * GIB)
    assert (labels(scale), scale.unit) == (["0", "4", "8", "12", "16"], "GiB")
    assert units.bytes_scale(0).top >= 1024


def test_rates_have_powers_of_ten() -> None:
    scale = units.decimal_scale(12.9e6, "B/s")
    assert (labels(scale), scale.unit) == (["0", "5", "10", "15"], "MB/s")
    assert units.decimal_scale(0, "B/s").unit == "B/s"
    assert labels(units.plain_scale(1.7, "cores")) == ["0", "0.5", "1.0", "1.5", "2.0"]
    assert labels(units.plain_scale(0.0, "cores")) == ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]


@pytest.mark.parametrize(
    ("length", "unit", "ticks"),
    [
        (5 * 10**6, "ms", ["0", "1", "2", "3", "4", "5"]),
        (42 * SECOND, "seconds", ["0", "10", "20", "30", "40"]),
        (12000 * SECOND, "hours", ["0", "1", "2", "3"]),
        (50 * MINUTE, "minutes", ["0", "10", "20", "30", "40", "50"]),
        (31 * DAY, "days", ["0", "7", "14", "21", "28"]),
        (0, "ns", ["0", "1"]),
    ],
)
def test_time_has_the_unit_that_a_person_would_choose(length: int, unit: str, ticks: list[str]) -> None:
    scale = units.time_scale(length)
    assert (scale.unit, labels(scale)) == (unit, ticks)


@given(st.floats(0, 1e18))
def test_every_value_fits_below_the_last_tick_and_ticks_are_few(highest: float) -> None:
    for scale in (units.bytes_scale(highest), units.decimal_scale(highest, "B"), units.plain_scale(highest, "")):
        assert scale.top >= highest * (1 - 1e-6)
        assert 2 <= len(scale.ticks) <= 7
        assert len(set(labels(scale))) == len(scale.ticks), "two ticks that say the same"


@given(st.integers(0, 2**62))
def test_times_have_few_ticks_that_differ(length: int) -> None:
    scale = units.time_scale(length)
    assert 1 <= len(scale.ticks) <= 30
    assert len(set(labels(scale))) == len(scale.ticks)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (units.size(1023), "1023 B"),
        (units.size(int(1.2 * GIB)), "1.2 GiB"),
        (units.size(16 * GIB), "16 GiB"),
        (units.size((1 << 20) - 1), "1 MiB"),
        (units.decimal(8192, "B"), "8.2 kB"),
        (units.decimal(0, "B/s"), "0 B/s"),
        (units.duration(5 * 10**6), "5 ms"),
        (units.duration(3.25 * SECOND), "3.25 s"),
        (units.duration(125 * SECOND), "2 min 5 s"),
        (units.duration(12000 * SECOND), "3 h 20 min"),
        (units.duration(31 * DAY), "31 d"),
        (units.duration(999_999_700), "1,000 ms"),
        (units.duration(999_700), "1,000 us"),
        (units.duration(0), "0 s"),
        (units.few(0), "0"),
        (units.few(5e-05), "less than 0.01"),
        (units.few(5e-05, 0), "0.00005"),
        (units.few(0.0123), "0.0123"),
        (units.few(0.5), "0.5"),
        (units.few(1.2345), "1.23"),
        (units.few(100), "100"),
        (units.few(1234.5), "1,234"),
        (units.in_cores(0.9999), "1 core"),
        (units.in_cores(1), "1 core"),
        (units.in_cores(1e6), "1,000,000 cores"),
        (units.counted(1, "job"), "1 job"),
        (units.counted(0, "job"), "0 jobs"),
        (units.counted(1, "family", "families"), "1 family"),
        (units.counted(1000, "family", "families"), "1,000 families"),
        (units.mebibytes("over 100 MB (in use 2 KB), 5 GB, 1 MBps"), "over 100 MiB (in use 2 KiB), 5 GB, 1 MBps"),
        (units.amount(0), "0.00"),
        (units.amount(1234.567), "1,234.57"),
        (units.amount(0.00012345), "0.000123"),
    ],
)
def test_what_a_person_reads(said: str, text: str) -> None:
    assert said == text


def gauge(at: int, anon: int, **given: int) -> Point:
    none: dict[str, Any] = {"network": {}, "memory_limit": None}
    known = dict.fromkeys(Point.__struct_fields__, 0) | none | {"at": at, "memory_anon": anon, **given}
    return Point(**known)


def test_a_peak_of_one_reading_is_not_lost() -> None:
    many = [gauge(n, 5) for n in range(100_000)]
    many[77_777] = gauge(77_777, 999)
    drawn = series.memory(many, 100_000)
    assert len(drawn.at) == series.COLUMNS
    assert max(drawn.values["anonymous"]) == 999
    assert drawn.at[drawn.values["anonymous"].index(999)] == 77_777


def test_kinds_without_any_use_are_left_out_and_page_cache_where_it_is_not_wanted() -> None:
    two = [gauge(0, 5, memory_file=7), gauge(10, 6, memory_file=8)]
    assert list(series.memory(two, 10).values) == ["anonymous", "page cache"]
    assert list(series.memory(two, 10, cached=False).values) == ["anonymous"]


def test_the_limit_is_where_it_was_changed() -> None:
    of = [gauge(0, 1, memory_limit=5), gauge(10, 1, memory_limit=5), gauge(20, 1, memory_limit=9)]
    assert series.limits(of, 100) == [(0, 20, 5), (20, 100, 9)]
    taken = [gauge(0, 1), gauge(10, 1, memory_limit=5), gauge(20, 1), gauge(30, 1), gauge(40, 1, memory_limit=5)]
    assert series.limits(taken, 100) == [(10, 20, 5), (40, 100, 5)], "none where it was taken away"
    assert series.limits([gauge(0, 1), gauge(10, 1)], 100) == []


def test_memory_begins_at_nothing_and_its_last_reading_stands_to_the_end() -> None:
    levels = series.memory([gauge(10, 5), gauge(20, 7)], 25)
    drawn = series.whole(levels, 25)
    assert (drawn.at, drawn.values) == ([0, 10, 20, 25], {"anonymous": [0, 5, 7, 7]})
    assert series.whole(series.memory([gauge(0, 5), gauge(9, 7)], 10), 10).values == {"anonymous": [5, 7, 7]}
    late = series.whole(series.memory([gauge(80, 5), gauge(90, 7)], 100), 100)
    assert (late.at, late.values) == ([80, 90, 100], {"anonymous": [5, 7, 7]}), "older readings are gone"


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=60), st.integers(1, 1000))
def test_the_area_of_a_rate_is_the_total(growths: list[int], columns: int) -> None:
    total, many = 0, []
    for n, growth in enumerate(growths):
        total += growth
        many.append(gauge((n + 1) * SECOND, 0, cpu_user=total))
    final = gauge(len(growths) * SECOND + 7, 0, cpu_user=total + 3)
    drawn = series.rates(many, final, {"user": lambda point: point.cpu_user}, columns)
    assert drawn.edges[0] == 0
    assert drawn.edges[-1] == final.at
    assert list(drawn.edges) == sorted(set(drawn.edges))
    assert len(drawn.values["user"]) == len(drawn.edges) - 1 <= columns + 1
    spans = [later - earlier for earlier, later in zip(drawn.edges, drawn.edges[1:], strict=False)]
    area = sum(rate * span / SECOND for rate, span in zip(drawn.values["user"], spans, strict=True))
    assert area == pytest.approx(total + 3)


def test_samples_after_the_end_and_counters_that_went_back_draw_nothing_below_zero() -> None:
    many = [gauge(10, 0, cpu_user=50), gauge(20, 0, cpu_user=40), gauge(999, 0, cpu_user=99)]
    drawn = series.rates(many, gauge(100, 0, cpu_user=60), {"user": lambda point: point.cpu_user})
    assert drawn.edges == [0, 10, 20, 100]
    assert min(drawn.values["user"]) == 0


def picture(bands: Sequence[Band], **given: object) -> Plot:
    known: dict[str, object] = {
        "name": "a",
        "title": "T <1>",
        "description": "D",
        "x": units.time_scale(100),
        "y": Scale(10.0, ((0.0, "0"), (10.0, "10")), "cores"),
        "edges": [0, 50, 100],
        "bands": bands,
    }
    return Plot(**(known | given))  # type: ignore[arg-type]


def drawn(of: Plot) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{plot.draw(of)}</div>")  # noqa: S314  # ours


def paths(of: Plot) -> list[str]:
    return [element.attrib["d"] for element in drawn(of).iter("path")]


def corners(d: str) -> list[tuple[int, int]]:
    """The points of a path, reckoned anew."""
    x = y = 0
    found = []
    for letter, numbers in re.findall(r"([MLlhvz])([-\d ]*)", d):
        given = [int(number) for number in re.findall(r"-?\d+", numbers)]
        match letter:
            case "M" | "L":
                x, y = given
            case "l":
                x, y = x + given[0], y + given[1]
            case "h":
                x += given[0]
            case "v":
                y += given[0]
        found.append((x, y))
    return found


def test_a_stack_stands_on_the_band_below() -> None:
    first, second = Band("one", [2, 4, 2], 0), Band("two", [1, 1, 1], 1)
    lower, edge, upper, _ = paths(picture([first, second]))
    assert corners(lower)[:3] == corners(edge) == [(0, 800), (500, 600), (1000, 800)]
    assert corners(upper)[:3] == [(0, 700), (500, 500), (1000, 700)]
    assert corners(upper)[3:6] == [(1000, 800), (500, 600), (0, 800)], "and back along the lower one"


def test_steps_go_from_edge_to_edge() -> None:
    _, edge = paths(picture([Band("one", [5, 10], 0)], stepped=True))
    assert edge == "M0 500h500v-500h500"


@given(st.lists(st.floats(0, 1e6), min_size=3, max_size=3))
def test_nothing_is_drawn_outside_the_frame(values: list[float]) -> None:
    for d in paths(picture([Band("one", values, 0), Band("two", values, 1)])):
        assert all(0 <= x <= 1000 and 0 <= y <= 1000 for x, y in corners(d))


def test_a_plot_says_what_it_is() -> None:
    of = picture(
        [Band("<b>", [5, 5, 5, 5], 0), Band("two", [0.1, 0.1, 0.1, 0.1], 1)],
        edges=[0, 25, 50, 100],
        levels=[Level("limit 9", 9.0), Level("far above", 99.0)],
        marks=[Mark(50, "OOM", "Out of memory")],
    )
    svg = drawn(of)[0]
    assert svg.attrib["role"] == "img"
    named = {element.attrib["id"]: element.text for element in svg.iter() if "id" in element.attrib}
    assert named[svg.attrib["aria-labelledby"]] == "T <1>"
    assert named[svg.attrib["aria-describedby"]] == "D"
    texts = [element.text for element in svg.iter("text")]
    assert {"<b>", "limit 9", "OOM"} <= set(texts)
    assert not {"far above", "two"} & set(texts), "what lies above the frame, and a name in too thin a band"
    key = ["".join(element.itertext()).strip() for element in drawn(of).iter("li")]
    assert key == ["two", "<b>"], "from above, as the stack is seen"


def test_no_band_is_told_by_its_colour_alone() -> None:
    made = ElementTree.fromstring(str(plot.patterns(6)))  # noqa: S314  # ours
    drawings = [tuple(path.attrib["d"] for path in pattern.iter("path")) for pattern in made.iter("pattern")]
    assert len(drawings) == 6
    assert all(one != other for one, other in pairwise(drawings)), "neighbours differ"


def test_a_plot_of_a_month_is_as_small_as_one_of_an_hour() -> None:
    def size(number: int) -> int:
        of = record(seconds=31 * 86400)
        rates = series.rates(points(of, number), last_point(of), {"user": lambda point: point.cpu_user})
        name = "CPU"
        return len(plot.draw(picture([Band(name, list(rates.values["user"]), 0)], edges=rates.edges, stepped=True,
                                     x=units.time_scale(of.wall_ns), y=units.plain_scale(3e9, ""))))  # fmt: skip

    assert size(44_640) < 1.1 * size(1000) < 20_000
