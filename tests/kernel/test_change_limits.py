"""Limits of a living job changed on this host's v1 controllers: all or none, and nobody is killed. v2: tests/vm."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from acctd.cgroup.change import change
from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import discover
from acctd.errors import KernelRefusedError, NotFoundError, UnavailableError, UsageError
from acctd.model import Limits
from lab.hog import Hog, cold_file
from tests.kernel.conftest import BASE, scrub

MIB = 1 << 20
_serial = itertools.count()

FILES = {
    "memory": (
        "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.swappiness",
    ),
    "cpu": ("cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.cfs_burst_us", "cpu.shares"),
    "cpuset": ("cpuset.cpus", "cpuset.mems"),
    "pids": ("pids.max",),
}  # fmt: skip
ALL = Limits(
    memory=64 * MIB, memory_soft=48 * MIB, swap=0, cpus=0.5, cpu_burst=0.05, cpu_shares=512, cpuset="0", pids=40
)  # fmt: skip


@pytest.fixture
def base() -> Iterator[str]:
    name = f"{BASE}{os.getpid()}-c{next(_serial)}"
    yield name
    scrub(name)


@pytest.fixture
def job(base: str) -> Iterator[JobCgroups]:
    made = JobCgroups(discover(), base, "job_1")
    yield made
    made.kill()
    assert made.remove()


def shown(job: JobCgroups) -> dict[str, str]:
    """Every limit's file as it stands."""
    text: dict[str, str] = {}
    for controller, files in FILES.items():
        directory = job.directory(controller)
        assert directory is not None
        text |= {file: (directory.read(file) or b"").decode().strip() for file in files}
    return text


@pytest.fixture
def hog(job: JobCgroups) -> Iterator[Callable[[Limits], Hog]]:
    """A hog in the job, which is made with some limits."""
    with Hog() as started:

        def into(limits: Limits) -> Hog:
            job.create(limits)
            job.attach(started.pid)
            return started

        yield into


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """40 MiB that are in nobody's page cache."""
    return cold_file(tmp_path / "data", 40)


def memory(job: JobCgroups, file: str) -> int:
    directory = job.directory("memory")
    assert directory is not None
    return int(directory.read(file) or b"-1")


@pytest.mark.parametrize(
    ("before", "after"),
    list(itertools.permutations([(16, 0), (64, 0), (32, 16), (16, 128), (None, None), (40, None)], 2)),
)
def test_memory_and_swap_go_up_and_down_in_the_order_the_kernel_takes(
    job: JobCgroups, before: tuple[int | None, int | None], after: tuple[int | None, int | None]
) -> None:
    old, new = (
        Limits(memory=m and m * MIB, swap=s if s is None else s * MIB) for m, s in (before, after)
    )  # fmt: skip
    job.create(old)
    change(job, old, new, reclaim=False)
    neighbour = JobCgroups(job.layout, job.base, "job_2")
    neighbour.create(new)
    try:
        assert shown(job) == shown(neighbour)
    finally:
        assert neighbour.remove()


@pytest.mark.parametrize(
    "limits",
    [ALL, Limits(), Limits(memory=32 * MIB, memory_policy="soft", swap=0),
     Limits(memory=32 * MIB, memory_policy="none"),
     Limits(memory=32 * MIB, memory_policy="hard", cpus=1.5, cpu_burst=0.15), Limits(pids=7, cpus=0.1)],
)  # fmt: skip
def test_a_changed_job_stands_as_one_that_was_made_so(job: JobCgroups, limits: Limits) -> None:
    """From all limits to some or none, and back; none is what the kernel gives a fresh cgroup."""
    neighbour = JobCgroups(job.layout, job.base, "job_2")
    neighbour.create(limits)
    job.create(ALL)
    try:
        at_first = shown(job)
        change(job, ALL, limits, reclaim=False)
        assert shown(job) == shown(neighbour)
        change(job, limits, ALL, reclaim=False)
        assert shown(job) == at_first
    finally:
        assert neighbour.remove()


def test_a_limit_below_what_is_in_use_is_refused_with_the_figures(
    job: JobCgroups, hog: Callable[[Limits], Hog], file: Path
) -> None:
    limits = Limits(memory=64 * MIB, swap=0)
    eater = hog(limits)
    assert eater.take(16)
    assert eater.read(16, file)
    before = shown(job)
    with pytest.raises(KernelRefusedError) as e:
        change(job, limits, Limits(memory=24 * MIB, swap=0), reclaim=False)
    words = str(e.value)
    assert f"memory: {24 * MIB} is below the " in words
    used, cache = (
        int(text) for text in (words.split("below the ")[1].split()[0], words.split("of which ")[1].split()[0])
    )
    assert 32 * MIB <= used <= 40 * MIB
    assert 15 * MIB <= cache <= 18 * MIB
    assert "ask for reclaim" in words
    assert "\n" not in words
    assert shown(job) == before
    assert memory(job, "memory.usage_in_bytes") >= 32 * MIB, "nothing was reclaimed unasked"
    assert eater.lives()


def test_asked_to_reclaim_the_kernel_makes_room_first(
    job: JobCgroups, hog: Callable[[Limits], Hog], file: Path
) -> None:
    limits = Limits(memory=64 * MIB, swap=0)
    eater = hog(limits)
    assert eater.take(16)
    assert eater.read(32, file)
    assert memory(job, "memory.usage_in_bytes") > 47 * MIB
    change(job, limits, Limits(memory=24 * MIB, swap=0), reclaim=True)
    assert memory(job, "memory.limit_in_bytes") == memory(job, "memory.memsw.limit_in_bytes") == 24 * MIB
    assert 16 * MIB <= memory(job, "memory.usage_in_bytes") <= 24 * MIB
    assert eater.lives()


def test_what_cannot_be_reclaimed_is_refused_too_and_nobody_dies(job: JobCgroups, hog: Callable[[Limits], Hog]) -> None:
    limits = Limits(memory=64 * MIB, swap=0, pids=20, cpus=1)
    eater = hog(limits)
    assert eater.take(32)
    before = shown(job)
    refused = (
        rf"memory: {16 * MIB} is below the \d+ bytes in use, .* the kernel reclaimed what it could; choose a higher"
    )
    with pytest.raises(KernelRefusedError, match=refused):
        change(job, limits, Limits(memory=16 * MIB, swap=0, pids=10, cpus=0.5, cpu_shares=100), reclaim=True)
    assert shown(job) == before, "what was changed before the memory is put back"
    assert eater.take(8)
    control = job.directory("memory")
    assert control is not None
    assert b"oom_kill 0" in (control.read("memory.oom_control") or b"")


def test_what_stood_there_is_put_back_and_not_what_the_old_limits_say(
    job: JobCgroups, hog: Callable[[Limits], Hog]
) -> None:
    """A job whose limit has grown since it was made."""
    limits = Limits(memory=32 * MIB, swap=32 * MIB)
    eater = hog(limits)
    assert eater.take(16)
    directory = job.directory("memory")
    assert directory is not None
    directory.write("memory.limit_in_bytes", str(56 * MIB))
    with pytest.raises(KernelRefusedError, match=r"memory: 8388608 is below"):
        change(job, limits, Limits(memory=8 * MIB, memory_soft=4 * MIB, swap=0), reclaim=False)
    assert memory(job, "memory.limit_in_bytes") == 56 * MIB
    assert memory(job, "memory.memsw.limit_in_bytes") == 64 * MIB
    assert memory(job, "memory.soft_limit_in_bytes") > 1 << 62


@pytest.mark.parametrize(
    ("new", "kind", "said"),
    [(Limits(memory=32 * MIB, pids=5, cpuset="4095"), KernelRefusedError, r"cpuset: cannot write '4095'"),
     (Limits(memory=32 * MIB, cpus=0.5, cpu_burst=0.2), UsageError, r"cpu_burst 0\.2 is above .* 0\.05 seconds"),
     (Limits(memory=32 * MIB, memory_policy="soft", swap=MIB, pids=5), UnavailableError, r"swap 1048576 cannot be "),
     (Limits(cpuset="linear:1", pids=5), UnavailableError, r"'linear:1': no cores were chosen")],
)  # fmt: skip
def test_a_change_that_is_refused_changes_nothing(
    job: JobCgroups, new: Limits, kind: type[Exception], said: str
) -> None:
    old = Limits(memory=64 * MIB, pids=20)
    job.create(old)
    before = shown(job)
    with pytest.raises(kind, match=said):
        change(job, old, new, reclaim=False)
    assert shown(job) == before


def test_chosen_cores_stay_when_other_limits_change(job: JobCgroups) -> None:
    old = Limits(cpuset="linear:1", pids=20)
    job.create(old, cpus="1", mems="0")
    change(job, old, Limits(cpuset="linear:1", pids=30), reclaim=False)
    assert shown(job)["cpuset.cpus"] == "1"
    assert shown(job)["pids.max"] == "30"


def test_a_job_that_is_gone_is_refused(job: JobCgroups) -> None:
    job.create(Limits(pids=20))
    assert job.remove()
    with pytest.raises(NotFoundError, match=r"cgroup /.*/job_1 is gone"):
        change(job, Limits(pids=20), Limits(pids=30), reclaim=False)
