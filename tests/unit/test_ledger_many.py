"""Records read many at once: as a stream, by all their digests, and taken out."""

import sqlite3

import pytest

from acctd.errors import AcctdError
from acctd.ledger import FILE, Ledger, Span
from acctd.verification import verify
from tests.unit.test_ledger import SPEC, finish, open_job, record


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / FILE


@pytest.fixture
def ledger(path):
    with Ledger(path) as opened:
        yield opened


def many(ledger, count, **changes):
    for number in range(1, count + 1):
        owner = "ada" if number % 3 else "bob"
        finish(ledger, f"j{number}", owner=owner, started=1000.0 + number, wall_ns=10**9, ended=5.0, **changes)


def numbers(ledger, **wanted):
    return [number for number, _, _ in ledger.stream(**wanted)]


def test_records_are_read_as_a_stream_of_those_that_are_wanted(ledger, monkeypatch):
    monkeypatch.setattr("acctd.ledger._CHUNK", 4)
    many(ledger, 11)
    assert list(ledger.stream()) == ledger.records_after(0, 100)
    assert numbers(ledger, owner="bob") == [3, 6, 9]
    assert numbers(ledger, owner="nobody") == []
    assert numbers(ledger, after=4, upto=9) == [5, 6, 7, 8, 9]
    # A job's time ends at started + wall, whatever the clock said when it was signed.
    assert numbers(ledger, since=1007.5) == [7, 8, 9, 10, 11]
    assert numbers(ledger, since=1008.0) == [7, 8, 9, 10, 11]  # to its end, which a bill tells exactly
    assert numbers(ledger, since=1008.5) == [8, 9, 10, 11]
    assert numbers(ledger, since=1007.5, owner="ada", upto=10) == [7, 8, 10]
    assert numbers(ledger, since=2000.0) == []


def test_a_stream_holds_nobody_up_and_ends_where_it_began_to_read(ledger, path, monkeypatch):
    monkeypatch.setattr("acctd.ledger._CHUNK", 2)
    many(ledger, 5)
    stream = ledger.stream()
    assert next(stream)[0] == 1
    with Ledger(path) as other:
        finish(other, "late")
        assert other._rows("PRAGMA wal_checkpoint(TRUNCATE)")[0][0] == 0  # nobody's transaction is in its way
    assert [number for number, *_ in stream] == [2, 3, 4, 5]


def test_the_span_of_what_there_is(ledger):
    assert ledger.span() == Span(0, "", 0, "", 0)
    many(ledger, 3)
    assert ledger.span() == Span(1, ledger.digest(1), 3, ledger.digest(3), 3)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            "UPDATE record SET body = CAST(replace(body, 'j4', 'j0') AS BLOB) WHERE number = 4",
            "record 4 of job 'j4' was a",
        ),
        ("UPDATE record SET body = replace(body, 'j4', 'j0') WHERE number = 4", "record 4 of job 'j4' was altered"),
        ("UPDATE record SET digest = 'x' WHERE number = 4", "record 4 of job 'j4' was altered"),
        ("UPDATE record SET digest = x'00' WHERE number = 4", "record 4 of job 'j4' was altered"),
        ("DELETE FROM record WHERE number = 4", "record 4 is missing, 5 comes next"),
        ("DELETE FROM record WHERE number = 1", "record 1 is missing, 2 comes next"),
        ("DELETE FROM record WHERE number >= 6", "records 6 to 7 were signed and are missing"),
        ("UPDATE record SET number = 9 WHERE number = 7", "record 7 is missing, 9 comes next"),
        ("UPDATE record SET ended = 1 WHERE number = 4", "record 4 .*what it is found by was altered.*ended 1.0"),
        ("UPDATE record SET owner = 'eve' WHERE number = 4", "record 4 .*what it is found by was altered.*owner 'eve'"),
        ("UPDATE record SET id = 'x' WHERE number = 4", "record 4 .*what it is found by was altered: id 'x'"),
        ("INSERT OR REPLACE INTO meta VALUES ('anchor', 'x y')", "corrupt"),
    ],
)
def test_all_digests_are_followed_to_the_first_that_does_not_fit(ledger, path, monkeypatch, damage, told):
    monkeypatch.setattr("acctd.verification._CHUNK", 2)
    assert list(verify(ledger)) == []
    many(ledger, 7)
    assert list(verify(ledger)) == [2, 4, 6, 7]
    with sqlite3.connect(path) as db:
        db.execute(damage)
    seen = []
    with pytest.raises(AcctdError, match=told):
        seen.extend(verify(ledger))
    assert seen == sorted(seen)


def test_what_is_taken_out_leaves_its_digest_and_numbers_go_on(ledger):
    many(ledger, 6)
    digests = {number: ledger.digest(number) for number in range(1, 7)}
    assert (ledger.anchor(), ledger.taken_until()) == ((0, ""), 0.0)
    assert ledger.take_out(4) == 4
    assert ledger.taken_until() == 1005.0
    assert (ledger.anchor(), ledger.take_out(4)) == ((4, digests[4]), 0)
    assert ledger.record("j5").id == "j5"
    assert list(verify(ledger)) == [6]
    assert ledger.span() == Span(5, digests[5], 6, digests[6], 2)
    assert ledger.take_out(99) == 2
    assert ledger.newest()[:2] == (6, digests[6])
    assert ledger.digest(6) == digests[6]
    finish(ledger, "next")
    assert ledger.record("next").id == "next"
    assert numbers(ledger) == [7]
    assert list(verify(ledger)) == [7]


def test_what_is_taken_out_while_digests_are_followed_is_not_missing(ledger, path, monkeypatch):
    monkeypatch.setattr("acctd.verification._CHUNK", 2)
    many(ledger, 8)
    found = verify(ledger)
    assert next(found) == 2
    with Ledger(path) as other:
        other.take_out(5)
    assert list(found) == [7, 8]


def test_a_record_whose_job_is_still_to_be_removed_stays(ledger):
    """Its next acctd must see that it has one."""
    many(ledger, 2)
    row = open_job(ledger)
    assert ledger.sign_off(row.seq, record(SPEC.id))
    finish(ledger, "after")
    assert ledger.take_out(4) == 2
    assert numbers(ledger) == [3, 4]
    assert not ledger.sign_off(row.seq, record(SPEC.id))


def test_what_follows_a_record_that_was_removed_by_hand_does_not_hide_it(ledger, path):
    many(ledger, 3)
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM record WHERE number = 3")
    finish(ledger, "next")
    with pytest.raises(AcctdError, match="record 3 is missing, 4 comes next"):
        list(verify(ledger))
