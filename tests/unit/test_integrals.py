"""What a job had, summed over time: the same however often it is looked at, stored, changed and read again."""

from fractions import Fraction
from itertools import pairwise

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from acctd.integrals import Integral, Integrals, Sums, cores_asked
from acctd.metrics import CPU_RESERVED, MEMORY_RESERVED_TIME, MEMORY_RESIDENT_TIME
from acctd.model import INT64_MAX, MEMORY_MIN, Limits

CPU, RESERVED, HELD = ((metric, "") for metric in (CPU_RESERVED, MEMORY_RESERVED_TIME, MEMORY_RESIDENT_TIME))
BEGIN = 10**12
KIB_S = 1024 * 10**9

steps = st.lists(st.integers(0, 10**11), max_size=20)
quotas = st.floats(0.01, 65536)
memories = st.integers(MEMORY_MIN, 2**40)


def shown(integrals: Integrals, now: int) -> dict:
    totals: dict = {}
    integrals.show(totals, now)
    return totals


def stored(integrals: Integrals, limits: Limits, resident: int | None, cpus: str = "") -> Integrals:
    """As the next agent has them."""
    sums = msgspec.json.decode(msgspec.json.encode(integrals.sums()), type=Sums)
    return Integrals(BEGIN, limits, cpus, sums, resident)


@given(quotas, memories, steps)
@example(1.5, 1 << 30, [5_000_000])  # a job of 5 ms
@example(0.1, MEMORY_MIN + 1, [1] * 20)
@example(0.012345678901234567, MEMORY_MIN, [3, 3, 3])
def test_unchanged_limits_are_limit_times_time_rounded_down_once(quota: float, memory: int, gaps: list[int]) -> None:
    """However many readings there are, and whichever agent makes them."""
    limits, now = Limits(cpus=quota, memory=memory), BEGIN
    integrals = Integrals(BEGIN, limits, "", Sums(), None)
    for gap in gaps:
        now += gap
        integrals.reserve(limits, "", now)
        wall = now - BEGIN
        assert shown(integrals, now) == {CPU: int(Fraction(repr(quota)) * wall), RESERVED: memory * wall // KIB_S}
        integrals = stored(integrals, limits, None)


@given(st.lists(st.tuples(st.integers(0, 10**11), quotas | st.none(), memories | st.none(), memories), max_size=20))
def test_each_value_counts_for_as_long_as_it_held(changes: list[tuple[int, float | None, int | None, int]]) -> None:
    """Nothing is lost by many small parts: the sum of exact products, rounded down once."""
    now, limits, resident = BEGIN, Limits(), None
    integrals = Integrals(BEGIN, limits, "", Sums(), resident)
    sums = {CPU: Fraction(0), RESERVED: Fraction(0), HELD: Fraction(0)}
    there = set()
    for gap, quota, memory, read in changes:
        now += gap
        sums[CPU] += Fraction(repr(limits.cpus or 0)) * gap
        sums[RESERVED] += Fraction((limits.memory or 0) * gap, KIB_S)
        sums[HELD] += Fraction((resident or 0) * gap, KIB_S)
        limits, resident = Limits(cpus=quota, memory=memory), read
        integrals.reserve(limits, "", now)
        integrals.hold(read, now)
        there |= {HELD} | ({CPU} if quota else set()) | ({RESERVED} if memory else set())
        assert shown(integrals, now) == {key: int(sums[key]) for key in there}
        integrals = stored(integrals, limits, resident)


def test_a_total_never_goes_back_when_it_is_looked_at_before() -> None:
    integrals = Integrals(BEGIN, Limits(), "", Sums(), 1 << 20)
    seen = shown(integrals, BEGIN + 10**9)
    assert seen == {HELD: 1024}
    integrals.hold(0, BEGIN + 10**9 + 1)
    assert shown(integrals, BEGIN + 10**12) == {HELD: 1024}


@pytest.mark.parametrize(
    ("limits", "cpus", "cores"),
    [
        (Limits(), "", None),
        (Limits(cpuset="0-3"), "", None),  # shared with others
        (Limits(cpuset="linear:3"), "1-2,5", 3),
        (Limits(cpuset="linear:1", cpus=2.5), "7", Fraction(5, 2)),
        (Limits(cpuset="linear:4", cpus=0.5), "0-3", 4),
    ],
)
def test_cores_are_the_quota_or_those_for_itself(limits: Limits, cpus: str, cores: Fraction | None) -> None:
    found = shown(Integrals(BEGIN, limits, cpus, Sums(), None), BEGIN + 1000)
    assert found == ({} if cores is None else {CPU: cores * 1000})
    assert cores_asked(limits, cpus) == cores


@pytest.mark.parametrize("quota", [0.01, 0.1, 1 / 3, 2.675, 1e5 / 7])
def test_cores_asked_for_are_said_as_they_were_given(quota: float) -> None:
    assert cores_asked(Limits(cpus=quota), "") == quota


@pytest.mark.parametrize("policy", ["hard", "soft", "custom", "none"])
def test_memory_is_reserved_whatever_becomes_of_it(policy: str) -> None:
    limits = Limits(memory=1 << 30, memory_policy=policy)  # type: ignore[arg-type]
    hour = 3600 * 10**9
    assert shown(Integrals(0, limits, "", Sums(), None), hour) == {RESERVED: 3774873600}


def test_what_was_asked_for_once_stays_in_the_account() -> None:
    integrals = Integrals(BEGIN, Limits(cpus=1), "", Sums(), None)
    integrals.reserve(Limits(), "", BEGIN + 7)
    assert shown(stored(integrals, Limits(), None), BEGIN + 100) == {CPU: 7}


def test_what_was_before_the_begin_is_void() -> None:
    """A job is made, and may be read, before it begins; the ledger may have what was before."""
    limits = Limits(cpus=1)
    integrals = Integrals(BEGIN, limits, "", Sums(), None)
    integrals.hold(1 << 30, BEGIN + 5)
    before = integrals.sums()
    integrals.begin(BEGIN + 10**9)
    assert shown(integrals, BEGIN + 10**9) == {CPU: 0, HELD: 0}
    assert shown(Integrals(BEGIN + 10**9, limits, "", before, None), BEGIN + 10**9 + 3) == {CPU: 3}


def test_a_sum_that_no_database_can_hold_stops_there() -> None:
    """Who asks for 2^63-1 bytes means all there is; the ledger must be written all the same."""
    limits = Limits(memory=INT64_MAX)
    integrals = Integrals(0, limits, "", Sums(), None)
    assert shown(integrals, 10**18)[RESERVED] == INT64_MAX
    integrals.reserve(Limits(memory=1 << 30), "", 10**18)
    kept = integrals.sums().parts["memory_reserved_time"]
    assert all(value <= INT64_MAX for value in kept)
    assert shown(integrals, 2 * 10**18)[RESERVED] == INT64_MAX


@given(st.integers(0, 2**50), st.lists(st.integers(0, 10**10), min_size=1, max_size=8))
def test_parts_of_a_time_telescope(rate: int, gaps: list[int]) -> None:
    """Differences between any times sum to the whole."""
    integral = Integral(MEMORY_RESIDENT_TIME, KIB_S, rate, 0)
    times = [0]
    for gap in gaps:
        times.append(times[-1] + gap)
    values = [integral.at(time) for time in times]
    assert sum(b - a for a, b in pairwise(values)) == integral.at(times[-1]) - integral.at(0)
    assert values == sorted(values)
