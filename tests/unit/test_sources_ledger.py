"""Bills from a ledger: as it was signed, with the open jobs, and with an archive where records were taken out."""

import gzip
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from acctd.bill import Tally
from acctd.errors import AcctdError, UsageError
from acctd.frames import RecordFrame, encode
from acctd.ledger import FILE, Ledger
from acctd.sources import crew, gather
from acctd.sources.crew import Reader
from acctd.sources.looked import Key
from acctd.usage import decode
from tests.unit.test_sources import BEGAN, TARIFF, begin, body, jobs, ledger, line, make, record


def test_the_ledger_by_one_reader_or_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ledger(tmp_path / FILE, [record(number) for number in range(500)])
    alone = gather.from_ledger(path, [], make, begin)
    assert (jobs(alone), alone.reader.looked.records) == (500, 500)
    with Ledger(path) as book:
        first, last = book.digest(1), book.digest(500)
    assert (alone.reader.looked.first, alone.reader.looked.last) == ((1, first), (500, last))
    monkeypatch.setattr(crew, "WORTH", 1)
    monkeypatch.setattr("acctd.sources.books.STEP", 60)
    monkeypatch.setattr("acctd.sources.books.BATCH", 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    together = gather.from_ledger(path, [], make, begin)
    assert together.reader.looked == alone.reader.looked
    assert together.reader.tally.bill() == alone.reader.tally.bill()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "UPDATE record SET body = replace(CAST(body AS TEXT), '\"ada\"', '\"bob\"') WHERE number = 7",
            "record 7 .*altered",
        ),
        ("DELETE FROM record WHERE number = 7", "record 7 .*missing"),
        ("UPDATE record SET digest = 'x' WHERE number = 1", "record 1 .*altered"),
    ],
)
def test_a_ledger_that_is_not_as_it_was_signed_makes_no_bill(tmp_path: Path, change: str, words: str) -> None:
    path = ledger(tmp_path / FILE, [record(number) for number in range(20)])
    with sqlite3.connect(path) as db:
        db.execute(change)
    with pytest.raises(AcctdError, match=words):
        gather.from_ledger(path, [], make, begin)


def test_a_bill_goes_on_after_what_was_archived(tmp_path: Path) -> None:
    path = ledger(tmp_path / FILE, [record(number) for number in range(20)])
    with Ledger(path) as book:
        assert book.take_out(8) == 8
    found = gather.from_ledger(path, [], make, begin, partly=True)
    assert jobs(found) == 12
    assert found.reader.looked.first is not None and found.reader.looked.first[0] == 9


@pytest.mark.parametrize("since", [BEGAN - 1, BEGAN + 60 * 86400])
def test_a_ledger_whose_newest_record_is_missing_makes_no_bill(tmp_path: Path, since: float) -> None:
    path = ledger(tmp_path / FILE, [record(number) for number in range(20)])
    with sqlite3.connect(path) as db:
        db.execute("INSERT OR REPLACE INTO meta SELECT 'last', number || ' ' || digest FROM record WHERE number = 20")
        assert gather.from_ledger(path, [], make_since(since), begin).kind == "ledger"
        db.execute("DELETE FROM record WHERE number = 20")
    with pytest.raises(AcctdError, match=r"record 20 .* missing"):
        gather.from_ledger(path, [], make_since(since), begin)


def archived(tmp_path: Path, upto: int) -> tuple[Path, Path]:
    """A ledger of 20 records of which the first are in an archive, and its directory."""
    path, directory = ledger(tmp_path / FILE, [record(number) for number in range(20)]), tmp_path / "archive"
    directory.mkdir()
    with Ledger(path) as book, gzip.open(directory / "node1-2027-01-1.jsonl.gz", "wb") as packed:
        for number, digest, text in book.records_after(0, upto):
            packed.write(encode(RecordFrame(number, digest, 1, msgspec.Raw(text))) + b"\n")
        assert book.take_out(upto) == upto
    return path, directory


def make_since(since: float) -> Callable[[frozenset[Key]], Reader]:
    def made(watched: frozenset[Key] = frozenset()) -> Reader:
        tally = Tally(TARIFF, since, BEGAN + 10**8)
        return Reader(tally, tally.needed_from, watched)

    return made


def test_a_ledger_of_which_the_period_was_archived_makes_no_bill_without_the_archive(tmp_path: Path) -> None:
    path, directory = archived(tmp_path, 8)
    with pytest.raises(AcctdError, match=r"records up to 8 of .* were archived.*--from records DIR"):
        gather.from_ledger(path, [], make, begin)
    part = gather.from_ledger(path, [], make, begin, partly=True)
    assert jobs(part) == 12 and "records up to 8" in part.reader.looked.missing
    whole = gather.from_ledger(path, [], make, begin, directories=[directory])
    assert (jobs(whole), whole.reader.looked.missing, whole.kind) == (20, "", "both")
    later = gather.from_ledger(path, [], make_since(BEGAN + 60 * 86400), begin)  # and the month before it
    assert (jobs(later), later.reader.looked.missing) == (0, "")
    with Ledger(path) as book:
        book._db.execute("DELETE FROM meta WHERE key = 'taken_until'")  # of an acctd that did not note it
    with pytest.raises(AcctdError, match="archived"):
        gather.from_ledger(path, [], make_since(BEGAN + 60 * 86400), begin)


def test_an_archive_that_is_not_all_of_it_makes_no_bill(tmp_path: Path) -> None:
    path, directory = archived(tmp_path, 8)
    (file,) = directory.iterdir()
    lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
    file.write_bytes(gzip.compress(b"".join(lines[:-1])))
    with pytest.raises(AcctdError, match="the last of them is in no file below"):
        gather.from_ledger(path, [], make, begin, directories=[directory])


def test_ledger_and_files_together_count_each_record_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, directory = archived(tmp_path, 8)
    (directory / "again.json").write_bytes(msgspec.json.format(body(record(12)), indent=2))
    (directory / "other").write_bytes(line(record(3, "node2")))
    ended, open_job = decode(body(record(3, cpu=1))), decode(body(record(77)))
    alone = gather.from_ledger(path, [ended, open_job], make, begin, directories=[directory])
    assert (jobs(alone), alone.reader.looked.records, alone.reader.looked.repeated) == (22, 21, 1)
    assert alone.living == [open_job]
    assert alone.reader.looked.first is not None and alone.reader.looked.first[0] == 9
    monkeypatch.setattr(crew, "WORTH", 1)
    monkeypatch.setattr("acctd.sources.books.STEP", 5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    together = gather.from_ledger(path, [ended, open_job], make, begin, directories=[directory])
    assert together.reader.looked == alone.reader.looked
    assert together.reader.tally.bill() == alone.reader.tally.bill()
    (directory / "again.json").write_bytes(body(record(12, cpu=7)))
    with pytest.raises(UsageError) as caught:
        gather.from_ledger(path, [], make, begin, directories=[directory])
    assert f"record 13 of {path}" in str(caught.value) and "again.json:1" in str(caught.value)


def test_an_open_job_counts_so_far_and_not_beside_its_record(tmp_path: Path) -> None:
    path = ledger(tmp_path / FILE, [record(number) for number in range(5)])
    ended, open_job = decode(body(record(3, cpu=1))), decode(body(record(77)))
    found = gather.from_ledger(path, [ended, open_job], make, begin)
    assert jobs(found) == 6
    assert found.living == [open_job]
    assert found.reader.tally.bill().living == ("77.0",)
