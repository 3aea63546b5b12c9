"""The source document's four pictures of two jobs on one machine, with swap: on v2, and on v1 by a kernel of its own.

A pilot is the machine; both jobs want 60 % of it. Job 1 asked for more than that, job 2 for 25 %, and goes over it. In
the fifth test the machine is the machine. Swap is on this guest's own disk.
"""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from acctd.cgroup.change import change
from acctd.cgroup.layout import discover
from acctd.cgroup.limits import value_of
from acctd.cgroup.pushback import push_back
from acctd.errors import KernelRefusedError
from acctd.job import Job
from acctd.kernel.cgroupfs import CgroupDir
from acctd.model import Limits
from collectors.memory import MemoryReader
from lab.hog import Hog
from tests.vm.inside.conftest import Machine

MIB = 1 << 20
DISK = "/dev/vda"
MACHINE, WANTED, ASKED_1, ASKED_2 = 40, 24, 28, 10
"""MiB: what there is for both, what each wants (60 %), and what each asked for."""
SOFT_1 = Limits(memory=ASKED_1 * MIB, memory_policy="soft")
SOFT_2 = Limits(memory=ASKED_2 * MIB, memory_policy="soft")


@pytest.fixture(scope="module", autouse=True)
def swap() -> Iterator[None]:
    subprocess.run(["mkswap", DISK], check=True, capture_output=True)
    subprocess.run(["swapon", DISK], check=True)
    yield
    subprocess.run(["swapoff", DISK], check=True)


@dataclass
class OneOfTwo:
    """A job with one process in it."""

    job: Job
    hog: Hog
    directory: CgroupDir

    def take(self, mib: int) -> None:
        assert self.hog.take(mib), "nobody is killed in any of these"

    def lost(self) -> float:
        """MiB of its memory that are not in memory any more: what it took, less what is there."""
        reader = MemoryReader(self.directory)
        readings = {metric.name: value for (metric, _), value in reader.read().items()}
        reader.close()
        return self.taken - readings["memory_anon"] / MIB

    taken: int = 0

    def hold(self, mib: int) -> None:
        self.take(mib)
        self.taken += mib


@dataclass
class Pair:
    """A pilot and who is in it."""

    machine: Machine
    stack: ExitStack
    pilot: Job | None

    def job(self, name: str, limits: Limits) -> OneOfTwo:
        job = self.machine.create(name, limits, parent=self.pilot)
        hog = self.stack.enter_context(Hog())
        job.cgroups.attach(hog.pid)
        return OneOfTwo(job, hog, self.machine.cgroup(job, "memory"))

    def two(self, first: Limits, second: Limits) -> tuple[OneOfTwo, OneOfTwo]:
        return self.job("one", first), self.job("two", second)

    def usage(self) -> float:
        assert self.pilot is not None
        directory = self.machine.cgroup(self.pilot, "memory")
        text = value_of(directory, "memory.usage_in_bytes") or value_of(directory, "memory.current")
        return int(text) / MIB


@pytest.fixture
def pair(machine: Machine) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(machine, stack, machine.create("pilot", Limits(memory=MACHINE * MIB, memory_policy="hard")))


def _v1() -> bool:
    memory = discover().of("memory")
    assert memory is not None
    return memory.version == 1


def test_first_picture_there_is_room(pair: Pair) -> None:
    """Job 2 goes over what it asked for while job 1 uses little: with a soft limit it may, and nobody swaps."""
    one, two = pair.two(SOFT_1, SOFT_2)
    one.hold(8)
    two.hold(WANTED)
    assert one.lost() <= 0
    assert two.lost() <= 0


def test_second_picture_a_hard_limit_although_there_is_room(pair: Pair) -> None:
    """The same with a hard limit: job 2 swaps from the first byte above."""
    one, two = pair.two(Limits(), Limits(memory=ASKED_2 * MIB, memory_policy="hard"))
    one.hold(8)
    two.hold(WANTED)
    assert one.lost() <= 0
    assert two.lost() >= WANTED - ASKED_2
    assert pair.usage() < MACHINE - 10


def test_third_picture_no_room_and_both_swap(pair: Pair) -> None:
    """Together they want 120 %, and there are no limits but the machine's: random pages from both."""
    one, two = pair.two(Limits(), Limits())
    one.hold(WANTED)
    two.hold(WANTED)
    assert one.lost() > 1
    assert one.lost() + two.lost() >= 2 * WANTED - MACHINE


@pytest.mark.parametrize("families", [False, True], ids=["alone", "with a family each"])
def test_fourth_picture_only_the_one_that_went_over_swaps(pair: Pair, families: bool) -> None:
    """Job 2 takes what is free, and only it swaps: v2's kernel does it; on v1 with the agent's push."""
    one, two = pair.two(SOFT_1, SOFT_2)
    for job in (one, two) if families else ():
        pair.machine.create(f"inside-{job.job.spec.id}", parent=job.job)
    one.hold(WANTED)
    for _ in range(0, WANTED, 2):
        if _v1() and pair.usage() > 0.9 * MACHINE:  # what the agent hears of by an eventfd
            assert push_back(one.directory, ASKED_1 * MIB) == 0, "it is not over"
            assert push_back(two.directory, ASKED_2 * MIB) > 0
        two.hold(2)
    assert one.lost() <= 0.5
    assert two.lost() >= 2 * WANTED - MACHINE


def test_when_the_whole_machine_is_short_only_the_one_that_went_over_swaps(machine: Machine) -> None:
    """No pilot: the two jobs beside each other, and somebody who is no job takes what the machine has, for good."""
    with ExitStack() as stack:
        one, two = Pair(machine, stack, None).two(SOFT_1, SOFT_2)
        one.hold(WANTED)
        two.hold(WANTED)
        if not _v1():
            carried = value_of(one.directory.parent, "memory.low")
            assert carried == value_of(one.directory.parent.parent, "memory.low") == str((ASKED_1 + ASKED_2) * MIB)
        outsider = stack.enter_context(Hog())
        Path(f"/proc/{outsider.pid}/oom_score_adj").write_text("1000")
        available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
        assert outsider.pin(int(available.split()[1]) // 1024 - 32)
        for _ in range(30):
            if two.lost() > 1:
                break
            assert outsider.pin(2)
        assert two.lost() > 1
        assert one.lost() <= 0.5


def test_a_job_without_swap_is_not_swapped_for_its_neighbours(pair: Pair) -> None:
    one, two = pair.two(Limits(memory=ASKED_1 * MIB, swap=0), Limits())
    one.hold(WANTED)
    two.hold(WANTED)
    assert one.lost() <= 0
    assert two.lost() >= 2 * WANTED - MACHINE


def test_a_lower_limit_swaps_the_job_out_when_asked(pair: Pair) -> None:
    old = Limits(memory=32 * MIB, swap=32 * MIB)
    one = pair.job("one", old)
    one.hold(WANTED)
    with pytest.raises(KernelRefusedError, match=r"memory: 8388608 is below the \d+ bytes in use"):
        change(one.job.cgroups, old, Limits(memory=8 * MIB, swap=32 * MIB), reclaim=False)
    assert one.lost() <= 0
    change(one.job.cgroups, old, Limits(memory=8 * MIB, swap=32 * MIB), reclaim=True)
    assert one.lost() >= WANTED - 8
    if _v1():
        refused = rf"swap: memory and swap together of {8 * MIB} is below the \d+ bytes in use"
        with pytest.raises(KernelRefusedError, match=refused):
            change(one.job.cgroups, Limits(memory=8 * MIB, swap=32 * MIB), Limits(memory=8 * MIB, swap=0), reclaim=True)
        assert value_of(one.directory, "memory.memsw.limit_in_bytes") == str(40 * MIB)
    assert one.hog.lives()
