"""Use spread over cuts: exact integers that add up, whatever the cuts and whatever was read at midnight."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.model import Limits, Midnight, Record
from acctd.usage import Usage, decode, nanoseconds, parts, payer
from tests.unit.billing import usage


def ten(*, midnights: tuple[Midnight, ...] = (), **totals: int | dict[str, int]) -> Usage:
    """A job of 10 ns."""
    return msgspec.structs.replace(usage("1", 0.0, 0, midnights=midnights, **totals), wall_ns=10)


def test_a_record_is_decoded_as_far_as_it_is_billed() -> None:
    record = Record(
        id="1",
        owner="alice",
        uid=1000,
        node="n1",
        state="done",
        started=1763722354.123456,
        ended=1763722355.0,
        wall_ns=10**9,
        exit_code=0,
        exit_signal=None,
        network="nat",
        limits=Limits(),
        tags={"account": "physics"},
        totals={"cpu_user": {"": 2**63 - 1}, "memory_peak": {"": 5}},
        midnights=(Midnight(5, {"cpu_user": {"": 1}}),),
        parent="p",
    )
    found = decode(msgspec.json.encode(record))
    assert (found.id, found.owner, found.node, found.parent) == ("1", "alice", "n1", "p")
    assert (found.started, found.wall_ns, found.totals) == (1763722354.123456, 10**9, record.totals)
    assert found.midnights == record.midnights
    with pytest.raises(msgspec.DecodeError):
        decode(b'{"id": 5}')


def test_use_is_even_and_floored() -> None:
    """7 bytes in 10 ns: 7 x 3 / 10 = 2.1 up to 3 ns, 7 x 5 / 10 = 3.5 up to 5 ns."""
    assert parts(ten(block_read=7), [3, 5]) == [{"block_read": {"": n}} for n in (2, 1, 4)]
    assert parts(ten(block_read=7), []) == [{"block_read": {"": 7}}]


def test_midnights_bend_the_line() -> None:
    """6 of 7 bytes in the first 4 ns: up to 2 ns 6 x 2 / 4 = 3, up to 4 ns 6, up to 7 ns 6 + 1 x 3 / 6 = 6.5."""
    job = ten(block_read=7, midnights=(Midnight(4, {"block_read": {"": 6}}),))
    assert parts(job, [2, 4, 7]) == [{"block_read": {"": n}} for n in (3, 3, 0, 1)]


def test_a_counter_that_midnight_did_not_know_was_zero() -> None:
    job = ten(network={"A": 4, "B": 6}, midnights=(Midnight(5, {"network": {"A": 4}}),))
    assert parts(job, [5]) == [{"network": {"A": 4, "B": 0}}, {"network": {"A": 0, "B": 6}}]


def test_only_what_is_billed_is_spread() -> None:
    assert parts(ten(cpu_user=4, memory_peak=10**9, io_stall=5), [5]) == [{"cpu_user": {"": 2}}] * 2


@pytest.mark.parametrize("ns", [-1, 0, 10, 11])
def test_a_midnight_outside_the_job_says_nothing(ns: int) -> None:
    assert parts(ten(block_read=8, midnights=(Midnight(ns, {"block_read": {"": 1}}),)), [5]) == [
        {"block_read": {"": 4}},
        {"block_read": {"": 4}},
    ]


def test_midnights_that_make_no_sense_take_nothing_back() -> None:
    """More than the total, then less than before: all of it was used at the first."""
    seen = (Midnight(2, {"block_read": {"": 99}}), Midnight(4, {"block_read": {"": 3}}))
    assert parts(ten(block_read=8, midnights=seen), [2, 4]) == [{"block_read": {"": n}} for n in (8, 0, 0)]


COUNTS = st.integers(0, 2**63 - 1)


@given(
    st.integers(2, 10**17),
    st.lists(st.integers(1, 10**17), max_size=6),
    st.lists(st.tuples(st.integers(1, 10**17), COUNTS, COUNTS), max_size=4),
    COUNTS,
    COUNTS,
)
def test_parts_add_up_and_another_cut_moves_none(
    wall: int, cuts: list[int], seen: list[tuple[int, int, int]], a: int, b: int
) -> None:
    midnights = tuple(Midnight(ns, {"network": {"A": x, "B": y}}) for ns, x, y in sorted(seen))
    job = msgspec.structs.replace(usage("1", 0.0, 0, network={"A": a, "B": b}, midnights=midnights), wall_ns=wall)
    inside = sorted({cut % wall for cut in cuts} - {0})
    found = parts(job, inside)
    assert len(found) == len(inside) + 1
    for label, total in (("A", a), ("B", b)):
        counts = [part["network"][label] for part in found]
        assert sum(counts) == total
        assert min(counts) >= 0
        for place, cut in enumerate(inside):
            before, after = parts(job, [cut])
            assert sum(counts[: place + 1]) == before["network"][label]
            assert sum(counts[place + 1 :]) == after["network"][label]


@given(st.integers(0, 8 * 10**15))
def test_a_stamp_is_kept_to_the_microsecond(microseconds: int) -> None:
    """Up to the year 2223; a double has 53 bits, 9 x 10^15."""
    assert nanoseconds(microseconds / 10**6) == microseconds * 1000
    assert nanoseconds(math.nextafter(microseconds / 10**6, 0)) in (microseconds * 1000, microseconds * 1000 - 1000)


@pytest.mark.parametrize(
    ("tags", "who"),
    [
        ({}, "alice"),
        ({"account": "physics"}, "physics"),
        ({"Account": "physics"}, "physics"),
        ({"ACCOUNT": "physics", "x": "y"}, "physics"),
        ({"accounting": "physics"}, "alice"),
        ({"account": ""}, "alice"),
    ],
)
def test_the_account_pays_else_the_owner(tags: dict[str, str], who: str) -> None:
    assert payer(usage("1", 0.0, 0, tags=tags)) == who
