"""What becomes a point of a job that was read, on jobs that are only rows; and what is told when none is written."""

import itertools
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from acctd import samples
from acctd.config import SamplesConfig
from acctd.history import FILE, History, Point, kept, reading
from acctd.job import Job
from acctd.metrics import CPU_USER, MEMORY_ANON, NETWORK_BYTES
from acctd.model import Limits, Record
from acctd.samples import Samples
from tests.unit.test_family import job, tree

S = 10**9
CONFIG = SamplesConfig(max=2**24, full=3600, minutes=86400)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The time since boot, in s."""
    now = [0]
    monkeypatch.setattr(samples, "boottime", lambda: now[0] * S)
    yield now


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Samples]:
    with closing(Samples(CONFIG, tmp_path, [], patience=0.01)) as made:
        yield made


def tick(box: Samples, clock: list[int], *jobs: Job, at: int) -> list[object]:
    clock[0] = at
    named = {each.spec.id: each for each in jobs}
    box.begin_tick(jobs)
    box.sample(named, jobs)
    return list(box.write(box.take()))


def record(name: str, seconds: int, cpu: int = 0) -> Record:
    return Record(
        id=name, owner="root", uid=0, node="n", state="done", started=0.0, ended=12.0, wall_ns=seconds * S, exit_code=0,
        exit_signal=None, network="host", limits=Limits(), tags={}, totals={"cpu_user": {"": cpu}},
    )  # fmt: skip


def found(directory: Path, name: str) -> list[Point]:
    return kept(directory / FILE, name, 0.0)


def test_a_job_that_does_nothing_has_a_point_a_minute_and_no_plot_rises_too_early(
    box: Samples, clock: list[int], tmp_path: Path
) -> None:
    one = job("one", 1)
    one.meter.feed({(MEMORY_ANON, ""): 5})
    for at in range(10, 200, 10):
        if at == 150:
            one.meter.feed({(MEMORY_ANON, ""): 7})
        assert tick(box, clock, one, at=at) == []
    assert [(p.at // S, p.memory_anon) for p in found(tmp_path, "one")] == [
        (10, 5), (70, 5), (130, 5), (140, 5), (150, 7),
    ]  # fmt: skip


def test_a_job_that_works_has_a_point_at_each_reading(box: Samples, clock: list[int], tmp_path: Path) -> None:
    one = job("one", 1)
    for at in range(10, 200, 10):
        one.meter.feed({(CPU_USER, ""): at})
        tick(box, clock, one, at=at)
    assert [(p.at // S, p.cpu_user) for p in found(tmp_path, "one")] == [(at, at) for at in range(10, 200, 10)]


def test_another_limit_is_another_point(box: Samples, clock: list[int], tmp_path: Path) -> None:
    one = job("one", 1)
    tick(box, clock, one, at=10)
    tick(box, clock, one, at=20)
    one.row = replace(one.row, spec=replace(one.spec, limits=Limits(memory=2**30)))
    tick(box, clock, one, at=30)
    assert [(p.at // S, p.memory_limit) for p in found(tmp_path, "one")] == [(10, None), (20, None), (30, 2**30)]


def test_a_parents_points_have_what_its_families_used(box: Samples, clock: list[int], tmp_path: Path) -> None:
    jobs = tree(version=2)
    jobs["step"].meter.feed({(NETWORK_BYTES, "OutgoingExternal"): 30})
    jobs["pilot"].meter.feed({(NETWORK_BYTES, "OutgoingExternal"): 4})
    tick(box, clock, *jobs.values(), at=10)
    jobs["step"].meter.feed({(NETWORK_BYTES, "OutgoingExternal"): 31})
    tick(box, clock, *jobs.values(), at=20)
    assert [p.network for p in found(tmp_path, "pilot")] == [{"OutgoingExternal": 34}, {"OutgoingExternal": 35}]
    assert [p.network for p in found(tmp_path, "other")] == [{}]


def test_jobs_that_do_not_run_have_no_points(box: Samples, clock: list[int], tmp_path: Path) -> None:
    made, ended = job("made", 1), job("ended", 2)
    made.row = replace(made.row, phase="made")
    ended.row = replace(ended.row, terms=replace(ended.row.terms, ended_ns=5))
    tick(box, clock, made, ended, at=10)
    with reading(tmp_path / FILE) as file:
        assert file is not None and file.size().points == 0


def test_one_bad_job_costs_no_other_its_points(box: Samples, clock: list[int], tmp_path: Path) -> None:
    good, bad = job("good", 1), job("bad", 2)
    bad.stacked = None  # type: ignore[assignment]
    tick(box, clock, bad, good, at=10)
    assert len(found(tmp_path, "good")) == 1
    with reading(tmp_path / FILE) as file:
        assert file is not None and file.size().lost == 1


def test_a_file_that_cannot_be_had_is_told_and_its_points_are_counted_once_it_can(
    box: Samples, clock: list[int], tmp_path: Path
) -> None:
    one = job("one", 1)
    (tmp_path / FILE).mkdir()
    for at in (10, 20):
        one.meter.feed({(CPU_USER, ""): at})
        assert FILE in str(tick(box, clock, one, at=at)[0])
    (tmp_path / FILE).rmdir()
    one.meter.feed({(CPU_USER, ""): 30})
    assert tick(box, clock, one, at=30) == []
    assert [p.at // S for p in found(tmp_path, "one")] == [30]
    with reading(tmp_path / FILE) as file:
        assert file is not None and file.size().lost == 2


def test_an_end_that_comes_while_the_file_is_locked_is_written_later(
    box: Samples, clock: list[int], tmp_path: Path
) -> None:
    one = job("one", 1)
    tick(box, clock, one, at=10)
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        box.finished(record("one", 12, cpu=9))
        assert "locked" in str(tick(box, clock, at=20)[0])
    assert tick(box, clock, at=30) == []
    assert [(p.at // S, p.cpu_user) for p in found(tmp_path, "one")] == [(10, 0), (12, 9)]


def test_what_is_remembered_of_jobs_does_not_grow(box: Samples, clock: list[int]) -> None:
    for seq in range(1, 300):
        tick(box, clock, job(f"j{seq}", seq), at=seq)
    assert len(box._newest) <= 3


def test_many_jobs_are_written_in_turns(clock: list[int], tmp_path: Path) -> None:
    jobs = [job(f"j{seq}", seq) for seq in range(1, 61)]
    with closing(Samples(CONFIG, tmp_path, [], interval=10)) as box:
        seen = []
        for at in range(10, 400, 10):
            for each in jobs:
                each.meter.feed({(CPU_USER, ""): at})
            tick(box, clock, *jobs, at=at)
            with reading(tmp_path / FILE) as file:
                assert file is not None
                seen.append(file.size().points)
    assert {after - before for before, after in itertools.pairwise(seen[12:])} == {60}
    assert sum(len(found(tmp_path, each.spec.id)) for each in jobs) == 39 * 60


def test_a_point_and_an_end_that_come_while_others_are_written_wait_for_the_next_time(
    box: Samples, clock: list[int], tmp_path: Path
) -> None:
    one = job("one", 1)
    box.sample({"one": one}, [one])
    first = box.take()
    clock[0] = 10
    one.meter.feed({(CPU_USER, ""): 5})
    box.sample({"one": one}, [one])
    box.finished(record("one", 12))
    assert box.write(first) == [] and [p.at // S for p in found(tmp_path, "one")] == [0]
    assert box.write(box.take()) == [] and [p.at // S for p in found(tmp_path, "one")] == [0, 10, 12]


def test_points_are_counted_while_the_file_does_not_take_what_it_is_told_first(
    box: Samples, clock: list[int], tmp_path: Path
) -> None:
    with reading(tmp_path / FILE) as none:
        assert none is None
    with closing(History(tmp_path / FILE)):
        pass
    one = job("one", 1)
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
        tick(box, clock, one, at=0)
        with closing(Samples(CONFIG, tmp_path, [], patience=0.01)) as fresh:
            fresh._history = History(tmp_path / FILE, patience=0.01)
            other.execute("BEGIN IMMEDIATE")
            assert "locked" in str(tick(fresh, clock, one, at=10)[0])
            other.execute("ROLLBACK")
            assert tick(fresh, clock, at=20) == []
    with reading(tmp_path / FILE) as file:
        assert file is not None and file.size().lost == 1


def test_who_writes_last_leaves_no_file_open(box: Samples, clock: list[int], tmp_path: Path) -> None:
    one = job("one", 1)
    box.sample({"one": one}, [one])
    on_its_way = box.take()
    box.close()
    assert box.write(on_its_way) == [] and box._history is None
    assert [p.at for p in found(tmp_path, "one")] == [0]
