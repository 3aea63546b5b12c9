"""Changing a living job's limits on v2, where a memory limit below what is in use would kill: it never does here."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from acctd.cgroup import change as change_module
from acctd.cgroup.change import change
from acctd.cgroup.limits import value_of
from acctd.errors import KernelRefusedError
from acctd.job import Job
from acctd.model import Limits
from lab.hog import Hog
from tests.vm.inside.conftest import Machine

MIB = 1 << 20
DISK = Path("/dev/vda")
FILES = ("memory.max", "memory.low", "memory.high", "memory.swap.max", "cpu.max", "cpu.max.burst", "cpu.weight",
         "cpuset.cpus", "cpuset.mems", "pids.max")  # fmt: skip
START = Limits(memory=64 * MIB, swap=0)
ALL = Limits(
    memory=64 * MIB, memory_soft=48 * MIB, swap=0, cpus=0.5, cpu_burst=0.05, cpu_shares=512, cpuset="0", pids=40
)  # fmt: skip


def shown(machine: Machine, job: Job) -> dict[str, str]:
    directory = machine.cgroup(job, "memory")
    return {file: value_of(directory, file) for file in FILES}


@pytest.fixture
def job(machine: Machine) -> Job:
    return machine.create("changed", START)


@pytest.fixture
def hog(job: Job) -> Iterator[Hog]:
    """A process in the job; at the end it lives, and the kernel killed nothing."""
    with Hog() as started:
        job.cgroups.attach(started.pid)
        yield started
        assert started.lives()
        directory = job.cgroups.directory("memory")
        assert directory is not None
        assert "oom_kill 0" in value_of(directory, "memory.events")


@pytest.mark.parametrize(
    "limits",
    [Limits(), Limits(memory=32 * MIB, memory_policy="soft", swap=MIB), Limits(memory=32 * MIB, memory_policy="none"),
     Limits(memory=32 * MIB, memory_policy="hard", cpus=1.5, cpu_burst=0.15, cpuset="1")],
)  # fmt: skip
def test_a_changed_job_stands_as_one_that_was_made_so(machine: Machine, limits: Limits) -> None:
    changed, fresh = machine.create("changed", ALL), machine.create("fresh", limits)
    base = machine.cgroup(changed, "memory").parent
    at_first = shown(machine, changed)
    change(changed.cgroups, ALL, limits, reclaim=False)
    assert shown(machine, changed) == shown(machine, fresh)
    assert value_of(base, "memory.low") == str(2 * (limits.soft or 0)), "the sum of what the jobs inside protect"
    change(changed.cgroups, limits, ALL, reclaim=False)
    assert shown(machine, changed) == at_first


def test_below_what_is_in_use_is_refused_and_nobody_dies(machine: Machine, job: Job, hog: Hog) -> None:
    assert hog.take(16)
    assert hog.read(16, DISK)
    before, in_use = shown(machine, job), int(value_of(machine.cgroup(job, "memory"), "memory.current"))
    with pytest.raises(
        KernelRefusedError, match=rf"memory: {24 * MIB} is below the \d+ bytes in use, of which \d+ are"
    ):
        change(job.cgroups, START, Limits(memory=24 * MIB, swap=0, pids=9), reclaim=False)
    assert shown(machine, job) == before
    assert int(value_of(machine.cgroup(job, "memory"), "memory.current")) >= in_use - MIB, "nothing reclaimed unasked"


@pytest.mark.parametrize("has_reclaim", [True, False], ids=["memory.reclaim", "an older kernel"])
def test_asked_to_reclaim_the_kernel_makes_room_first(
    machine: Machine, job: Job, hog: Hog, monkeypatch: pytest.MonkeyPatch, has_reclaim: bool
) -> None:
    if not has_reclaim:
        monkeypatch.setattr(change_module, "_reclaim", lambda *_: None)  # as where there is no such file
    assert hog.take(16)
    assert hog.read(32, DISK)
    directory = machine.cgroup(job, "memory")
    assert int(value_of(directory, "memory.current")) > 47 * MIB
    change(job.cgroups, START, Limits(memory=24 * MIB, swap=0), reclaim=True)
    assert value_of(directory, "memory.max") == str(24 * MIB)
    assert value_of(directory, "memory.high") == "max"
    assert 16 * MIB <= int(value_of(directory, "memory.current")) <= 24 * MIB


def test_what_cannot_be_reclaimed_is_refused_while_the_job_grows(machine: Machine, job: Job, hog: Hog) -> None:
    assert hog.take(20)
    before = shown(machine, job)
    answers: list[bool] = []
    grower = threading.Thread(target=lambda: answers.extend(hog.take(1) for _ in range(20)))
    grower.start()
    refused = rf"memory: {16 * MIB} is below .* the kernel reclaimed what it could; choose a higher limit"
    for _ in range(5):
        with pytest.raises(KernelRefusedError, match=refused):
            change(job.cgroups, START, Limits(memory=16 * MIB, swap=0, cpus=0.5), reclaim=True)
    grower.join()
    assert answers == [True] * 20
    assert shown(machine, job) == before
