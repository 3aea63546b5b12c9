"""What acctd_record has for bills comes back as it was, in pieces that a database takes."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from acctd.model import Midnight
from exporters.billfields import Parts, restored, texts
from exporters.lineprotocol import STRING_BYTES, string
from tests.unit.test_sources import record

_LABELS = st.dictionaries(st.text(min_size=1, max_size=300), st.integers(0, 2**70), max_size=4)


def test_a_job_that_its_sums_say_all_about_needs_nothing() -> None:
    assert dict(texts(record())) == {}
    assert dict(texts(record(totals={"block_read": {"8:0": 5, "253:0": 5}}, stacked=("253:0",)))) == {}
    assert restored({"billed": None, "wall_ns": 5}) == Parts()


def test_devices_that_are_counted_again_below_are_left_out() -> None:
    made = record(totals={"block_read": {"8:0": 5, "8:16": 6, "253:0": 11}}, stacked=("253:0",))
    assert restored(dict(texts(made))).totals == {"block_read": {"8:0": 5, "8:16": 6}}


@given(_LABELS, st.lists(st.tuples(st.integers(1, 10**18), _LABELS), max_size=5))
def test_pieces_can_be_stored_and_come_back_as_they_were(
    labels: dict[str, int], days: list[tuple[int, dict[str, int]]]
) -> None:
    totals = {"cpu_user": {"": 5}, "nfs_read": labels, "network": {"OutgoingExternal": 1}}
    midnights = tuple(Midnight(ns, {"nfs_read": found, "cpu_user": {"": 1}}) for ns, found in days)
    fields = dict(texts(replace(record(), totals=totals, midnights=midnights)))
    for text in fields.values():
        stored = string(text)
        assert stored is not None and len(stored.encode()) <= STRING_BYTES
    found = restored(fields)
    assert found.midnights == midnights
    if fields:
        assert found.totals == ({"nfs_read": labels} if labels else found.totals)
