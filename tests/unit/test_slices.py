"""Slices of time: months and days of real timezones, whose clocks do what they did."""

from datetime import UTC, date, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.errors import UsageError
from acctd.slices import Calendar, midnight
from acctd.usage import nanoseconds
from tests.unit.billing import HOUR, at, tariff

WALL = '[[period.item]]\nname = "wall"\nmeter = "wall"\nunit = "hour"\nprice = 1\n'
FAR = nanoseconds(at("2100-01-01 00:00"))


def utc(ns: int) -> str:
    return datetime.fromtimestamp(ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M")


@pytest.mark.parametrize(
    ("zone", "day", "begins"),
    [
        ("UTC", date(2026, 3, 29), "2026-03-29 00:00"),
        ("Europe/Zurich", date(2026, 3, 29), "2026-03-28 23:00"),
        ("Europe/Zurich", date(2026, 3, 30), "2026-03-29 22:00"),
        ("Europe/Zurich", date(2026, 10, 25), "2026-10-24 22:00"),
        ("Europe/Zurich", date(2026, 10, 26), "2026-10-25 23:00"),
        # Clocks went from 0:00 to 1:00: the day began when it would have been 0:00.
        ("America/Sao_Paulo", date(2018, 11, 4), "2018-11-04 03:00"),
        ("America/Sao_Paulo", date(2018, 11, 5), "2018-11-05 02:00"),
        # Clocks went back from 1:00 to 0:00: the day began when it was 0:00 for the first time.
        ("America/Havana", date(2025, 11, 2), "2025-11-02 04:00"),
        # At 0:01 clocks went back to 23:01 of the day before.
        ("America/St_Johns", date(2010, 11, 7), "2010-11-07 02:30"),
        # Samoa had no 30 December 2011.
        ("Pacific/Apia", date(2011, 12, 30), "2011-12-30 10:00"),
        ("Pacific/Apia", date(2011, 12, 31), "2011-12-30 10:00"),
        ("Asia/Kathmandu", date(2026, 1, 1), "2025-12-31 18:15"),
    ],
)
def test_when_a_day_begins(zone: str, day: date, begins: str) -> None:
    assert utc(midnight(day, ZoneInfo(zone))) == begins


ZONES = ["UTC", "Europe/Zurich", "America/Sao_Paulo", "America/Havana", "America/St_Johns", "Pacific/Apia"]


@given(
    st.sampled_from(ZONES),
    st.integers(int(at("2009-01-01 00:00")), int(at("2019-12-01 00:00"))),
    st.integers(1, 40 * 24),
    st.booleans(),
    st.none() | st.integers(-20, 20 * 24),
)
def test_slices_leave_no_gap(zone: str, begin: int, hours: int, days: bool, since: int | None) -> None:
    """And each is of one day or month, one period, one side of since."""
    priced = tariff(
        f"[[period]]\nvalid_from = 2010-05-05\n{WALL}[[period]]\nvalid_from = 2015-03-01\n{WALL}", timezone=zone
    )
    start = begin * 10**9
    border = None if since is None else start + since * HOUR
    calendar = Calendar(priced, border, FAR, days=days)
    slices = list(calendar.between(start, start + hours * HOUR))
    assert slices[0].begin <= start < slices[0].end
    assert slices[-1].begin < start + hours * HOUR <= slices[-1].end
    for a, b in pairwise(slices):
        assert a.end == b.begin
        assert (a.day, a.part) != (b.day, b.part)
        assert a.part <= b.part
    for found in slices:
        assert calendar.at(found.begin) is calendar.at(found.end - 1) is found
        assert found.part.month == found.day[:7]
        assert found.part.counted == (border is None or found.begin >= border)
        assert border is None or not found.begin < border < found.end
        valid = [date(2010, 5, 5), date(2015, 3, 1)]
        assert found.part.period == sum(found.begin >= midnight(day, ZoneInfo(zone)) for day in valid) - 1


def test_the_period_ends_at_until_and_reaches_back_to_the_month_of_since() -> None:
    since, until = nanoseconds(at("2026-03-10 12:00")), nanoseconds(at("2026-04-02 06:00"))
    calendar = Calendar(tariff(WALL), since, until, days=False)
    assert calendar.first is not None
    assert utc(calendar.first) == "2026-03-01 00:00"
    found = [(utc(s.begin), utc(s.end), s.part.counted) for s in calendar.between(calendar.first, until)]
    assert found == [
        ("2026-03-01 00:00", "2026-03-10 12:00", False),
        ("2026-03-10 12:00", "2026-04-01 00:00", True),
        ("2026-04-01 00:00", "2026-04-02 06:00", True),
    ]


@pytest.mark.parametrize("ns", [10**30, -(10**30)])
def test_a_time_in_no_calendar_is_told(ns: int) -> None:
    with pytest.raises(UsageError, match="in no calendar"):
        Calendar(tariff(WALL), None, FAR, days=False).at(ns)
