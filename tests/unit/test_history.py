"""The kept samples: what thinning leaves, what the bound takes, and what befalls a file."""

import itertools
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acctd.errors import LedgerError
from acctd.history import FILE, History, Whose, kept, reading
from acctd.metrics import (
    BLOCK_READ_BYTES,
    BLOCK_WRITES,
    CPU_USER,
    MEMORY_ANON,
    MEMORY_FILE,
    NETWORK_BYTES,
    NETWORK_PACKETS,
    PIDS,
)
from acctd.model import Limits, Record
from acctd.points import Point, decode, encode, ended, last_point, packed, point, pressed

S = 10**9
START = 1_800_000_000.0  # s since the epoch, when all jobs here began
FULL, MINUTES = 3600.0, 86400.0


def at(ns: int, used: int = 0) -> Point:
    return Point(ns, 2**30, 0, 2**20, 0, 0, 2**31, used, 0, 0, 0, 0, 0, 0, 3, {"OutgoingExternal": used})


def job(seq: int) -> Whose:
    return Whose(seq, f"j{seq}", START)


def record(whose: Whose, wall_ns: int, used: int = 0) -> Record:
    return Record(
        id=whose.id, owner="alice", uid=1000, node="n", state="done", started=whose.started, ended=0.0,
        wall_ns=wall_ns, exit_code=0, exit_signal=None, network="nat", limits=Limits(memory=2**31), tags={},
        totals={"cpu_user": {"": used}, "block_read": {"8:0": 5, "253:0": 5}}, stacked=("253:0",),
    )  # fmt: skip


def fed(history: History, whose: Whose, seconds: list[int]) -> None:
    """As an agent does it: each point when it was read, thinning in between."""
    for second in seconds:
        history.append([(whose, at(second * S, second))], START + second)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE


@pytest.fixture
def history(path: Path) -> Iterator[History]:
    with closing(History(path)) as opened:
        yield opened


def test_a_point_has_the_totals_and_counts_stacked_devices_once() -> None:
    totals = {
        (MEMORY_ANON, ""): 7, (MEMORY_FILE, ""): 8, (CPU_USER, ""): 9, (PIDS, ""): 2,
        (BLOCK_READ_BYTES, "8:0"): 100, (BLOCK_READ_BYTES, "8:16"): 10, (BLOCK_READ_BYTES, "253:0"): 110,
        (BLOCK_WRITES, "8:0"): 3, (NETWORK_BYTES, "OutgoingExternal"): 5, (NETWORK_BYTES, "IncomingExternal"): 0,
        (NETWORK_PACKETS, "OutgoingExternal"): 99,
    }  # fmt: skip
    made = point(17, totals, None, ["253:0"])
    assert (made.at, made.memory_anon, made.memory_file, made.cpu_user, made.pids) == (17, 7, 8, 9, 2)
    assert (made.block_read, made.block_write, made.block_reads, made.block_writes) == (110, 0, 0, 3)
    assert made.network == {"OutgoingExternal": 5} and made.memory_limit is None


def test_a_piece_is_read_as_it_was_written_pressed_or_not() -> None:
    points = [at(n, 2**60 + n) for n in range(0x1FF)]
    body = packed(map(encode, points))
    assert decode(len(points), body) == decode(len(points), pressed(body)) == points
    assert pressed(pressed(body)) == pressed(body) and len(pressed(body)) < len(body) // 3


def test_what_was_appended_is_read_in_order_by_another_process_too(history: History, path: Path) -> None:
    fed(history, job(1), [10, 20, 30])
    fed(history, job(2), [15])
    assert [p.at // S for p in history.points(1)] == [10, 20, 30]
    assert [p.at // S for p in kept(path, "j1", START)] == [10, 20, 30]
    assert kept(path, "j1", START + 1) == kept(path, "j3", START) == kept(path.with_name("no"), "j1", START) == []
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_the_record_is_the_last_point(history: History) -> None:
    fed(history, job(1), [10, 20])
    history.append([], START + 25, [record(job(1), 24 * S, 77)])
    *_, end = history.points(1)
    assert end == last_point(record(job(1), 24 * S, 77)) and (end.at, end.cpu_user, end.memory_anon) == (24 * S, 77, 0)
    assert end.block_read == 5


def test_a_job_that_was_read_after_its_end_still_ends_with_its_record(history: History) -> None:
    fed(history, job(1), [10, 20])
    history.append([], START + 25, [record(job(1), 15 * S, 77)])
    assert [(p.at, p.cpu_user) for p in history.points(1)] == [(10 * S, 10), (20 * S, 20), (20 * S + 1, 77)]


def test_a_job_without_a_reading_has_no_points(history: History) -> None:
    history.append([], START, [record(job(1), 5 * S)])
    assert history.points(1) == [] and history.size().jobs == 0


def test_the_end_takes_along_what_waits(path: Path) -> None:
    with closing(History(path, together=6)) as history:
        for n in range(1, 20):
            history.append([(job(1), at(n * S))], START + n, [record(job(1), 19 * S + 1)] if n == 19 else [])
        assert [p.at for p in history.points(1)] == [*(n * S for n in range(1, 20)), 19 * S + 1]


def test_jobs_take_turns_and_the_first_points_are_there_at_once(path: Path) -> None:
    with closing(History(path, together=6)) as history:
        seen = []
        for n in range(1, 31):
            history.append([(job(seq), at(n * S)) for seq in range(6)], START + n)
            seen.append([len(history.points(seq)) for seq in range(6)])
        assert all(counts == [n] * 6 for n, counts in enumerate(seen[:6], 1))
        written = [sum(after) - sum(before) for before, after in itertools.pairwise(seen[10:])]
        assert set(written) == {6}, "in each tick one job's six points"
    assert len(kept(path, "j3", START)) == 30, "all is written at the end"


def expected(seconds: list[int], now: float) -> list[int]:
    """What the words say, point by point, of an ended job whose pieces are all written at their points' times."""

    def span(second: int, length: int) -> float:
        first = next(s for s in seconds if s // length == second // length)
        return now - START - first - length

    left = []
    for second in seconds:
        first_of = {unit: next(s for s in seconds if s // unit == second // unit) == second for unit in (60, 3600)}
        old = span(second, 300) >= FULL
        older = old and span(second, 3600) >= MINUTES
        if not old or second == seconds[-1] or (first_of[3600] if older else first_of[60]):
            left.append(second)
    return left


SECONDS = st.lists(st.integers(1, 400_000), min_size=1, max_size=60, unique=True).map(sorted)


@settings(max_examples=60, deadline=None)
@given(SECONDS, st.integers(0, 700_000), st.lists(st.integers(0, 700_000), max_size=4))
def test_thinning_leaves_the_first_of_each_minute_and_hour_whenever_it_runs(
    seconds: list[int], age: int, before: list[int]
) -> None:
    now = START + seconds[-1] + age
    with TemporaryDirectory() as directory, closing(History(Path(directory) / FILE)) as history:
        fed(history, job(1), seconds)
        history.settle((), START + seconds[-1])
        for earlier in sorted(before):
            history.thin(min(now, START + seconds[-1] + earlier), limit=3)
        while history.thin(now):
            pass
        found = [p.at // S for p in history.points(1)]
        assert found == expected(seconds, now)
        assert found[0] == seconds[0] and found[-1] == seconds[-1]
        assert history.size().dropped == 0


@settings(max_examples=30, deadline=None)
@given(SECONDS)
def test_thinning_while_a_job_lives_leaves_no_less_than_thinning_after(seconds: list[int]) -> None:
    now = START + seconds[-1] + 10**6
    with TemporaryDirectory() as directory, closing(History(Path(directory) / FILE)) as history:
        for second in seconds:
            history.append([(job(1), at(second * S, second))], START + second)
            while history.thin(START + second):
                pass
        while history.thin(now):
            pass
        found = [p.at // S for p in history.points(1)]
        # Beside those, a point may be left that was the job's last one for longer than all are kept.
        assert set(expected(seconds, now)) <= set(found) and found[-1] == seconds[-1]


def test_a_month_is_small(history: History) -> None:
    for first in range(30, 30 * 86400, 300):
        history.append([(job(1), at(second * S, second)) for second in range(first, first + 300, 30)], START + first)
        if first % 3600 == 30:
            history.thin(START + first)
    points = history.points(1)
    assert 600 + 1300 + 120 < len(points) < 800 + 1600 + 150
    with sqlite3.connect(history.path) as db:
        assert db.execute("PRAGMA page_count").fetchone()[0] * 4096 < 2**19


def test_a_step_of_the_clock_bends_no_time(history: History) -> None:
    fed(history, job(1), [10, 20])
    history.append([(job(1), at(30 * S))], START - 10**8)
    history.append([(job(1), at(40 * S))], START + 10**8)
    assert [p.at // S for p in history.points(1)] == [10, 20, 30, 40]


def filled(history: History, jobs: range, points: int, ends: bool) -> None:
    for seq in jobs:
        body = [(job(seq), at(n * S, seq * n)) for n in range(1, points + 1)]
        history.append(body, START + seq, [record(job(seq), points * S + 1)] if ends else [])


def test_the_file_is_bounded_and_ended_jobs_go_first_the_oldest_of_them_before(path: Path) -> None:
    with closing(History(path, max_bytes=4 * 2**20)) as history:
        filled(history, range(1, 3), 250, ends=False)
        filled(history, range(10, 500), 250, ends=True)
        size = history.size()
        assert size.bytes <= 4 * 2**20 + 2**17, "with SQLite's log and its index"
        there = [seq for seq in range(10, 500) if history.points(seq)]
        assert there == list(range(there[0], 500)) and 10 < there[0] < 490
        assert all(len(history.points(seq)) == 250 for seq in (1, 2))
        assert size.dropped == (there[0] - 10) * 251 and size.lost == 0


def test_living_jobs_lose_their_oldest_points_when_nothing_else_is_there(path: Path) -> None:
    with closing(History(path, max_bytes=4 * 2**20)) as history:
        for n in range(1, 1600):
            history.append([(job(seq), at(n * 60 * S, n)) for seq in range(1, 60)], START + n * 60)
            if n % 50 == 0:
                assert history.size().bytes <= 4 * 2**20 + 2**17
        size = history.size()
        assert size.dropped > 0 and size.lost == 0
        assert size.points + size.dropped == 1599 * 59
        for seq in range(1, 60):
            points = history.points(seq)
            assert points[-1].at == 1599 * 60 * S, "the newest is there"
            assert [p.at for p in points] == [n * 60 * S for n in range(1600 - len(points), 1600)]


def test_a_lower_bound_shrinks_the_file(path: Path) -> None:
    with closing(History(path, max_bytes=2**26)) as history:
        filled(history, range(1, 600), 250, ends=True)
    before = path.stat().st_size
    with closing(History(path, max_bytes=2**22)) as history:
        for n in range(1, 50):
            history.append([(job(1000), at(n * S))], START + 10**6)
            history.thin(START + 10**6)
    assert before > 2**23 > 2**22 >= path.stat().st_size


def test_jobs_that_nobody_holds_any_more_are_among_the_ended(path: Path) -> None:
    with closing(History(path, max_bytes=4 * 2**20)) as history:
        filled(history, range(1, 20), 250, ends=False)
        history.settle({3}, START + 100)
        filled(history, range(100, 500), 250, ends=True)
        assert history.points(3) and not history.points(2) and not history.points(4)


def test_a_number_that_another_ledger_gave_again_is_another_job(history: History, path: Path) -> None:
    fed(history, job(1), [10, 20])
    with closing(History(path)) as other:
        other.append([(Whose(1, "new", START + 99), at(S))], START + 100)
        assert [p.at for p in other.points(1)] == [S] and other.size().dropped == 2


def test_a_locked_file_delays_points_and_loses_the_oldest_only_after_long(path: Path) -> None:
    with closing(History(path, patience=0.01)) as history, closing(sqlite3.connect(path)) as other:
        fed(history, job(1), [1])
        other.execute("BEGIN IMMEDIATE")
        for second in range(2, 12):
            with pytest.raises(LedgerError, match="locked"):
                history.append([(job(1), at(second * S))], START)
        other.execute("ROLLBACK")
        history.append([(job(1), at(12 * S))], START)
        assert [p.at // S for p in history.points(1)] == list(range(1, 13)) and history.size().lost == 0
        other.execute("BEGIN IMMEDIATE")
        for second in range(13, 200):
            with pytest.raises(LedgerError):
                history.append([(job(1), at(second * S))], START)
        other.execute("ROLLBACK")
        history.append([(job(1), at(200 * S))], START)
        points = [p.at // S for p in history.points(1)]
        assert points[:12] == list(range(1, 13)) and points[12:] == list(range(200 - len(points) + 13, 201))
        size = history.size()
        assert size.lost == 200 - len(points) > 0


@pytest.mark.parametrize("damage", ["nonsense", "empty", "another schema", "no table", "torn"])
def test_a_file_of_no_use_is_put_aside_and_begun_anew(path: Path, damage: str) -> None:
    with closing(History(path)) as history:
        filled(history, range(1, 100), 250, ends=True)
    if damage == "nonsense":
        path.write_bytes(b"no database " * 1000)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "another schema":
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version = 99")
    elif damage == "no table":
        with closing(sqlite3.connect(path)) as db:
            db.execute("DROP TABLE piece")
    else:
        whole = bytearray(path.read_bytes())
        whole[8192:] = b"\xa5" * (len(whole) - 8192)
        path.write_bytes(whole)
    with closing(History(path)) as history:
        history.append([(job(1000), at(S))], START)
        assert len(history.points(1000)) == 1
        assert len(history.told) == (0 if damage == "empty" else 1), history.told
        assert history.size().jobs == 1
    assert sorted(p.name for p in path.parent.iterdir() if "corrupt" in p.name) == (
        [] if damage == "empty" else ["samples.sqlite.corrupt"]
    )


def test_a_file_that_is_taken_away_is_begun_anew(history: History, path: Path) -> None:
    fed(history, job(1), [10])
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    fed(history, job(1), [20])
    assert [p.at // S for p in kept(path, "j1", START)] == [20]
    assert [text.partition(" were ")[2] for text in history.told] == [
        "taken away or emptied by somebody, and are begun anew"
    ]


def test_two_who_write_at_once_lose_nothing(path: Path) -> None:
    def write(first: int) -> None:
        with closing(History(path, patience=30)) as history:
            for n in range(1, 60):
                history.append([(job(seq), at(n * S)) for seq in range(first, first + 5)], START + n)
                history.thin(START)

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 5, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with reading(path) as samples:
        assert samples is not None and samples.size().points == 15 * 59


def test_who_looks_waits_for_nobody_who_writes(history: History, path: Path) -> None:
    fed(history, job(1), [10])
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM piece")
        assert [p.at // S for p in kept(path, "j1", START)] == [10]


def test_nothing_is_made_by_who_looks(path: Path) -> None:
    with reading(path) as samples:
        assert samples is None
    assert not list(path.parent.iterdir())


def test_a_job_has_its_end_where_an_agent_died_between_signing_and_keeping_it(history: History) -> None:
    history.append([(job(1), at(10 * S, 4))], START)
    history.settle([], START + 60)
    signed = record(job(1), 12 * S, used=9)
    assert ended(history.points(1), signed) == [at(10 * S, 4), last_point(signed)]
    history.append([(job(2), at(10 * S, 4))], START, [record(job(2), 12 * S, used=9)])
    assert ended(history.points(2), record(job(2), 12 * S, used=9)) == history.points(2), "not twice"
    assert ended([], signed) == [], "a job that was never read has none"
