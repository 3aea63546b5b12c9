"""The source document's four pictures of two jobs on one machine, on v1 with page cache: a pilot is the machine here.

Both jobs want 60 % of what there is. Job 1 asked for more than that, job 2 for 25 %, and goes over it. v2, and v1 with
swap and a whole machine short of memory, are in tests/vm/inside/inside_soft.py.
"""

import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import discover
from acctd.cgroup.limits import value_of
from acctd.cgroup.pushback import push_back
from acctd.errors import UnavailableError
from acctd.kernel.cgroupfs import CgroupDir
from acctd.metrics import MEMORY_FILE
from acctd.model import Limits
from collectors.memory import parse_memory_stat_v1
from lab.hog import Hog, cold_file
from tests.kernel.conftest import BASE, scrub

MIB = 1 << 20
MACHINE, WANTED, ASKED_1, ASKED_2 = 60, 36, 40, 15
"""MiB: what there is for both, what each wants (60 %), and what each asked for."""

_serial = itertools.count()
SOFT_1 = Limits(memory=ASKED_1 * MIB, memory_policy="soft")
SOFT_2 = Limits(memory=ASKED_2 * MIB, memory_policy="soft")


@dataclass
class OneOfTwo:
    """A job in the pilot, with one process that reads a file of its own."""

    cgroups: JobCgroups
    hog: Hog
    file: Path

    @property
    def directory(self) -> CgroupDir:
        directory = self.cgroups.directory("memory")
        assert directory is not None
        return directory

    def cached(self) -> float:
        """MiB of its files that are in memory."""
        readings = parse_memory_stat_v1(self.directory.read("memory.stat") or b"", "memory.stat")
        return readings[MEMORY_FILE, ""] / MIB

    def read(self, mib: int) -> None:
        assert self.hog.read(mib, self.file), "nobody is killed in any of these"


@pytest.fixture
def pilot() -> Iterator[JobCgroups]:
    base = f"{BASE}{os.getpid()}-s{next(_serial)}"
    made = JobCgroups(discover(), base, "pilot")
    made.create(Limits(memory=MACHINE * MIB, swap=0))
    yield made
    made.kill()
    assert made.remove()
    scrub(base)


@pytest.fixture
def hogs(tmp_path: Path) -> Iterator[list[tuple[Hog, Path]]]:
    files = [cold_file(tmp_path / f"data{n}", WANTED) for n in (1, 2)]
    with Hog() as first, Hog() as second:
        yield [(first, files[0]), (second, files[1])]


def two_jobs(pilot: JobCgroups, hogs: list[tuple[Hog, Path]], *limits: Limits) -> list[OneOfTwo]:
    made = []
    for n, ((hog, file), asked) in enumerate(zip(hogs, limits, strict=True), start=1):
        cgroups = JobCgroups(pilot.layout, f"{pilot.base}/{pilot.name}", f"job_{n}")
        cgroups.create(asked)
        cgroups.attach(hog.pid)
        made.append(OneOfTwo(cgroups, hog, file))
    return made


def usage(pilot: JobCgroups) -> float:
    directory = pilot.directory("memory")
    assert directory is not None
    return int(value_of(directory, "memory.usage_in_bytes")) / MIB


def test_first_picture_there_is_room(pilot: JobCgroups, hogs: list[tuple[Hog, Path]]) -> None:
    """Job 2 goes over what it asked for while job 1 uses little: with a soft limit it may, and nobody loses a page."""
    job_1, job_2 = two_jobs(pilot, hogs, SOFT_1, SOFT_2)
    job_1.read(12)
    job_2.read(WANTED)
    assert job_1.cached() >= 11
    assert job_2.cached() >= WANTED - 1 > ASKED_2


def test_second_picture_a_hard_limit_although_there_is_room(pilot: JobCgroups, hogs: list[tuple[Hog, Path]]) -> None:
    """The same with a hard limit: job 2 is pushed back with the first byte above, for nobody's good."""
    job_1, job_2 = two_jobs(pilot, hogs, Limits(), Limits(memory=ASKED_2 * MIB, memory_policy="hard"))
    job_1.read(12)
    job_2.read(WANTED)
    assert job_1.cached() >= 11
    assert job_2.cached() <= ASKED_2
    assert usage(pilot) < MACHINE - 10


@pytest.mark.parametrize("limits", [(Limits(), Limits()), (SOFT_1, SOFT_2)], ids=["no limits", "v1's soft limits"])
def test_third_picture_no_room_and_both_lose(
    pilot: JobCgroups, hogs: list[tuple[Hog, Path]], limits: tuple[Limits, Limits]
) -> None:
    """Together they want 120 %: the kernel takes from both. v1's soft limits alone change nothing below a parent."""
    job_1, job_2 = two_jobs(pilot, hogs, *limits)
    job_1.read(WANTED)
    job_2.read(WANTED)
    assert job_1.cached() < WANTED - 2
    assert job_1.cached() + job_2.cached() < MACHINE


def test_fourth_picture_only_the_one_that_went_over_is_pushed_back(
    pilot: JobCgroups, hogs: list[tuple[Hog, Path]]
) -> None:
    """Job 2 takes what is free, and from then on it loses pages and job 1 none: with the agent's push on v1."""
    job_1, job_2 = two_jobs(pilot, hogs, SOFT_1, SOFT_2)
    job_1.read(WANTED)
    before = job_1.cached()
    assert before >= WANTED - 1
    freed = 0
    for _ in range(0, WANTED, 2):
        if usage(pilot) > 0.9 * MACHINE:  # what the agent hears of by an eventfd
            assert push_back(job_1.directory, ASKED_1 * MIB) == 0, "it is not over"
            freed += push_back(job_2.directory, ASKED_2 * MIB)
        job_2.read(2)
    assert freed > 0
    assert job_1.cached() == pytest.approx(before, abs=1), "job 1 kept all it has"
    assert job_2.cached() <= MACHINE - WANTED


def test_a_push_takes_what_is_above_and_leaves_the_limits(pilot: JobCgroups, hogs: list[tuple[Hog, Path]]) -> None:
    job, _ = two_jobs(pilot, hogs, Limits(memory=48 * MIB, memory_soft=16 * MIB), Limits())
    job.read(32)
    freed = push_back(job.directory, 16 * MIB)
    assert 15 * MIB <= freed <= 24 * MIB
    assert 10 < job.cached() <= 16
    assert value_of(job.directory, "memory.limit_in_bytes") == str(48 * MIB)
    assert "oom_kill_disable 0" in value_of(job.directory, "memory.oom_control")
    assert push_back(job.directory, 16 * MIB) == 0, "it is not over any more"
    assert job.cached() > 10


def test_a_push_at_what_cannot_be_reclaimed_hurts_nobody(pilot: JobCgroups, hogs: list[tuple[Hog, Path]]) -> None:
    job, _ = two_jobs(pilot, hogs, Limits(memory=48 * MIB, swap=0), Limits())
    job.directory.write("memory.oom_control", "1")  # as with a policy of acctd's own
    assert job.hog.take(32)
    assert push_back(job.directory, 16 * MIB) < 4 * MIB
    assert value_of(job.directory, "memory.limit_in_bytes") == str(48 * MIB)
    assert "oom_kill_disable 1" in value_of(job.directory, "memory.oom_control")
    assert job.hog.take(8)


def test_a_job_that_grows_under_the_push_is_not_killed(pilot: JobCgroups, hogs: list[tuple[Hog, Path]]) -> None:
    job, _ = two_jobs(pilot, hogs, Limits(memory=56 * MIB, memory_soft=28 * MIB), Limits())
    answers: list[bool] = []

    def grow() -> None:
        for _ in range(24):
            answers.append(job.hog.take(1))
            answers.append(job.hog.read(1, job.file))

    grower = threading.Thread(target=grow)
    grower.start()
    while grower.is_alive():
        push_back(job.directory, 28 * MIB)
    grower.join()
    assert answers == [True] * 48
    control = value_of(job.directory, "memory.oom_control")
    assert "oom_kill_disable 0\nunder_oom 0\noom_kill 0" in control
    assert value_of(job.directory, "memory.limit_in_bytes") == str(56 * MIB)


def test_v2_needs_no_push(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"no v1 memory cgroup; v2 pushes back by itself, by memory\.low"):
        push_back(CgroupDir(tmp_path), MIB)
