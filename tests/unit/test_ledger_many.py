"""Records read many at once: as a stream, by all their digests, and taken out."""

import sqlite3

import pytest

from acctd.errors import AcctdError
from acctd.ledger import FILE, Ledger, Span
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
    ("damage", "number"),
    [
        ("UPDATE record SET body = CAST(replace(body, 'j4', 'j0') AS BLOB) WHERE number = 4", 4),
        ("UPDATE record SET body = replace(body, 'j4', 'j0') WHERE number = 4", 4),
        ("UPDATE record SET digest = 'x' WHERE number = 4", 4),
        ("UPDATE record SET digest = x'00' WHERE number = 4", 4),
        ("DELETE FROM record WHERE number = 4", 5),
        ("DELETE FROM record WHERE number = 1", 2),
    ],
)
def test_all_digests_are_followed_to_the_first_that_does_not_fit(ledger, path, monkeypatch, damage, number):
    monkeypatch.setattr("acctd.ledger._CHUNK", 2)
    assert list(ledger.verify()) == []
    many(ledger, 7)
    assert list(ledger.verify()) == [2, 4, 6, 7]
    with sqlite3.connect(path) as db:
        db.execute(damage)
    seen = []
    with pytest.raises(AcctdError, match=f"record {number} of job 'j{number}' was altered after it was signed off"):
        seen.extend(ledger.verify())
    assert seen == sorted(seen)


def test_what_is_taken_out_leaves_its_digest_and_numbers_go_on(ledger):
    many(ledger, 6)
    digests = {number: ledger.digest(number) for number in range(1, 7)}
    assert ledger.anchor() == (0, "")
    assert ledger.take_out(4) == 4
    assert (ledger.anchor(), ledger.take_out(4)) == ((4, digests[4]), 0)
    assert ledger.record("j5").id == "j5"
    assert list(ledger.verify()) == [6]
    assert ledger.span() == Span(5, digests[5], 6, digests[6], 2)
    assert ledger.take_out(99) == 2
    assert ledger.newest()[:2] == (6, digests[6])
    assert ledger.digest(6) == digests[6]
    finish(ledger, "next")
    assert ledger.record("next").id == "next"
    assert numbers(ledger) == [7]
    assert list(ledger.verify()) == [7]


def test_what_is_taken_out_while_digests_are_followed_is_not_missing(ledger, path, monkeypatch):
    monkeypatch.setattr("acctd.ledger._CHUNK", 2)
    many(ledger, 8)
    found = ledger.verify()
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
