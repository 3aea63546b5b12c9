"""When a job comes to another day, and what is kept of it then."""

from datetime import UTC, datetime
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.metrics import BILLED
from acctd.midnights import billed, following

DAY = 86_400 * 10**9


@pytest.mark.parametrize(
    ("started", "ns", "expected"),
    [
        ("2026-01-31T23:59:59+00:00", 0, 10**9),
        ("2026-01-31T23:59:59+00:00", 10**9 - 1, 10**9),
        ("2026-01-31T23:59:59+00:00", 10**9, 10**9 + DAY),
        ("2026-02-01T00:00:00+00:00", 0, DAY),
        ("2024-02-28T12:00:00+00:00", 40 * 3600 * 10**9, 60 * 3600 * 10**9),  # a leap day
        ("2026-06-15T20:00:00-05:00", 0, 23 * 3600 * 10**9),  # days are UTC's
    ],
)
def test_the_end_of_a_day(started: str, ns: int, expected: int) -> None:
    assert following(datetime.fromisoformat(started).timestamp(), ns) == expected


@given(st.floats(0, 4e9), st.integers(0, 10**17))
def test_it_is_the_first_midnight_after(started: float, ns: int) -> None:
    found = following(started, ns)
    assert ns < found <= ns + DAY
    label = datetime.fromtimestamp((int(Fraction(started) * 10**9) + found) // 10**9, UTC)
    assert (label.hour, label.minute, label.second) == (0, 0, 0)


def test_what_is_kept_is_what_a_tariff_can_price() -> None:
    totals = {metric.name: {"": 3} for metric in BILLED}
    assert billed(totals | {"memory_peak": {"": 9}, "cpu_stall": {"": 9}, "of_tomorrow": {"": 1}}) == totals
    assert billed({"network": {"OutgoingExternal": 1, "IncomingExternal": 2}, "pids": {"": 4}}) == {
        "network": {"OutgoingExternal": 1, "IncomingExternal": 2}
    }
