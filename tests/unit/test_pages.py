"""Pages of records: everybody's own, all of them in the end, and none larger or dearer than one may be."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from acctd import pages
from acctd.caller import Caller
from acctd.errors import AcctdError, ExhaustedError, UsageError
from acctd.ledger import FILE, Ledger
from tests.unit.test_sources import ledger, record

ADA, ROOT = Caller(1, 1000, 1000, ""), Caller(1, 0, 0, "")


def page(path: Path, caller: Caller, after: int, *, every: bool) -> dict[str, Any]:
    with Ledger(path) as book:
        # As much of a daemon as is asked: its ledger, by way of its books.
        daemon: Any = SimpleNamespace(
            agent=SimpleNamespace(ledger=book), books=SimpleNamespace(read=lambda act: act()), jobs={}
        )

        async def asked() -> dict[str, Any]:
            return await pages.records(daemon, caller, after, pages.Turns().of(caller), every=every)

        return asyncio.run(asked())


def numbers(path: Path, caller: Caller, *, every: bool) -> tuple[list[int], int]:
    """Of all records that one gets, and how many pages that took."""
    found, last, more, turns = [], 0, True, 0
    while more:
        answer = page(path, caller, last, every=every)
        size = sum(len(signed["body"]) for signed in answer["records"])
        assert size <= pages._BYTES + 4096
        found += [signed["number"] for signed in answer["records"]]
        assert answer["last"] > last or not answer["more"], "each page goes on"
        last, more, turns = answer["last"], answer["more"], turns + 1
    return found, turns


def test_a_user_gets_own_records_and_root_all(tmp_path: Path) -> None:
    path = ledger(tmp_path / FILE, [record(number, uid=1000 + number % 3) for number in range(1000)])
    own, _ = numbers(path, ADA, every=False)
    assert own == list(range(1, 1001, 3))
    everything, turns = numbers(path, ROOT, every=True)
    assert everything == list(range(1, 1001))
    assert turns >= 2, "more than one page holds"
    assert page(path, ADA, 0, every=False)["all"] is False


def test_a_page_of_nothing_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_LOOKED", 2 * pages._AT_ONCE)
    path = ledger(tmp_path / FILE, [record(number, uid=7) for number in range(1, 1301)])
    answer = page(path, ADA, 0, every=False)
    assert (answer["records"], answer["last"], answer["more"]) == ([], 2 * pages._AT_ONCE, True)
    assert numbers(path, ADA, every=False) == ([], 3)


def test_the_last_page_is_told_as_such_also_where_it_is_full(tmp_path: Path) -> None:
    path = ledger(tmp_path / FILE, [record(number) for number in range(pages._AT_ONCE)])
    found, _ = numbers(path, ROOT, every=True)
    assert found == list(range(1, pages._AT_ONCE + 1))


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE record SET body = x'ff' WHERE number = 2",
        "UPDATE record SET body = 7 WHERE number = 2",
        "UPDATE record SET body = CAST(body AS TEXT) WHERE number = 2",
        "UPDATE record SET body = CAST(replace(CAST(body AS TEXT), ':1000', ':1001') AS BLOB) WHERE number = 2",
        "DELETE FROM record WHERE number = 2",
    ],
)
def test_who_gets_records_gets_none_from_a_ledger_that_was_altered(tmp_path: Path, change: str) -> None:
    path = ledger(tmp_path / FILE, [record(1), record(2), record(3)])
    with Ledger(path) as book:
        assert book._db.execute(change).rowcount == 1
    for caller, every in ((ADA, False), (ROOT, True)):
        with pytest.raises(AcctdError, match=r"record [23] was altered"):
            page(path, caller, 0, every=every)


def test_newest_records_that_are_missing_show(tmp_path: Path) -> None:
    path = ledger(tmp_path / FILE, [record(1), record(2), record(3)])
    with Ledger(path) as book:
        book._db.execute(
            "INSERT OR REPLACE INTO meta SELECT 'last', number || ' ' || digest FROM record WHERE number = 3"
        )
        assert numbers(path, ADA, every=False)[0] == [1, 2, 3]
        book._db.execute("DELETE FROM record WHERE number = 3")
    for after in (0, 2):
        with pytest.raises(AcctdError, match="record 3 was signed last and is missing"):
            page(path, ADA, after, every=False)


def test_records_that_are_archived_while_they_are_read_are_asked_for_again(tmp_path: Path) -> None:
    path = ledger(tmp_path / FILE, [record(number) for number in range(10)])
    assert numbers(path, ADA, every=False)[0] == list(range(1, 11))
    with Ledger(path) as book:
        book.take_out(6)
    assert numbers(path, ADA, every=False)[0] == list(range(7, 11))
    assert page(path, ADA, 6, every=False)["last"] == 10
    with pytest.raises(ExhaustedError, match="ask again"):
        page(path, ADA, 3, every=False)


def test_bodies_are_those_that_were_signed(tmp_path: Path) -> None:
    made = record(1, tags={"account": "ä\n"})
    path = ledger(tmp_path / FILE, [made])
    (signed,) = page(path, ROOT, 0, every=True)["records"]
    assert bytes(signed["body"]) == msgspec.json.encode(made)
    assert msgspec.json.encode(msgspec.json.decode(signed["body"])) == msgspec.json.encode(made)


def test_many_pages_of_one_user_take_no_more_turns_than_one(tmp_path: Path) -> None:
    """Between two pieces of work for a user everybody else has a turn: with as many pages as a user may ask for."""
    path = ledger(tmp_path / FILE, [record(number, uid=7) for number in range(1, 4 * pages._AT_ONCE)])
    others, rounds = [Caller(1, uid, uid, "") for uid in (1000, 1001)], [0]
    worked: list[tuple[int, int]] = []  # in which round of the loop, for whom

    async def asked(book: Ledger) -> None:
        turns = pages.Turns()

        def read(act: Callable[[], Any]) -> Any:
            if act.func is pages._signed:  # type: ignore[attr-defined]
                worked.append((rounds[0], len(worked)))
            return act()

        daemon: Any = SimpleNamespace(agent=SimpleNamespace(ledger=book), books=SimpleNamespace(read=read), jobs={})
        tasks = [
            asyncio.create_task(pages.records(daemon, caller, 0, turns.of(caller), every=False))
            for caller in others * 20
        ]
        while not all(task.done() for task in tasks):
            rounds[0] += 1
            await asyncio.sleep(0)

    with Ledger(path) as book:
        asyncio.run(asked(book))
    each = Counter(turn for turn, _ in worked)
    assert len(worked) == 2 * 20 * 4
    assert max(each.values()) <= len(others), "a piece for each user between two rounds of the loop"


def test_a_page_tells_until_when_records_were_taken_out(tmp_path: Path) -> None:
    path = ledger(tmp_path / FILE, [record(number) for number in range(1, 10)])
    assert page(path, ADA, 0, every=False)["archived"] is None
    with Ledger(path) as book:
        book.take_out(3)
        assert page(path, ADA, 0, every=False)["archived"] == book.taken_until() > 0
        book._db.execute("DELETE FROM meta WHERE key = 'taken_until'")
    assert page(path, ADA, 0, every=False)["archived"] > 2e11, "nobody noted it: any time may be meant"


@pytest.mark.parametrize("after", [-1, 2**63])
def test_numbers_that_are_none(tmp_path: Path, after: int) -> None:
    path = ledger(tmp_path / FILE, [])
    with pytest.raises(UsageError):
        page(path, ROOT, after, every=True)
