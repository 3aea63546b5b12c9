"""A job's cgroups on whatever layout is here, below a base of the caller's own: made, limited, shared, taken away."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import discover
from acctd.cgroup.limits import value_of
from acctd.errors import InUseError, KernelRefusedError
from acctd.kernel.cgroupfs import CgroupDir
from acctd.model import Limits

MIB = 1 << 20
_REPO = Path(__file__).parents[2]

_LIMITS = (
    ("memory", "memory.limit_in_bytes", "memory.max"),
    ("memory", "memory.soft_limit_in_bytes", "memory.low"),
    ("cpu", "cpu.cfs_quota_us", "cpu.max"),
    ("cpu", "cpu.shares", "cpu.weight"),
    ("cpuset", "cpuset.cpus", "cpuset.cpus"),
    ("pids", "pids.max", "pids.max"),
)
"""Controller, its file on v1, its file on v2."""


class Place:
    """A base and the jobs below it. Close it: what is left is ended, removed and reported."""

    def __init__(self, base: str) -> None:
        self.layout, self.base = discover(), base
        self._children: list[subprocess.Popen[str]] = []

    def job(self, name: str = "job_1", below: str = "") -> JobCgroups:
        return JobCgroups(self.layout, self.base + below, name)

    def tops(self) -> list[CgroupDir]:
        """The base, once a hierarchy."""
        return [CgroupDir(h.top.mount, tuple(self.base.split("/"))) for h in self.layout.hierarchies]

    def is_there(self) -> bool:
        return any(top.exists() for top in self.tops())

    def start(self, job: JobCgroups) -> "subprocess.Popen[str]":
        """A process in a job, which does nothing."""
        with job.joining() as doors:
            script = "".join(f"echo $$ >'{path}/cgroup.procs' && " for path in doors.values())
        script += "echo ready && exec sleep 1000"
        child = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
        self._children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    def finish(self, job: JobCgroups) -> None:
        assert job.kill() == set()
        assert job.remove()

    def close(self) -> None:
        for child in self._children:
            child.kill()
            child.communicate()
        left = [str(top.path) for top in self.tops() if top.exists()]
        for name in {cgroup.path.name for top in self.tops() for cgroup in top.children()}:
            job = self.job(name)
            job.kill()
            job.remove()
        for top in self.tops():
            top.remove()
        assert left == []


def directories_are_marked_and_hold_what_is_started(place: Place) -> None:
    """One a hierarchy, with every controller somewhere; they go with the job, and the base with the last one."""
    for controller in ("memory", "cpu", "cpuacct", "cpuset", "blkio", "freezer", "pids"):
        assert place.layout.of(controller) is not None, controller
    job = place.job()
    job.create(Limits())
    assert len(job.all()) == len(place.layout.hierarchies)
    assert job.kill() == set()
    child = place.start(job)
    for hierarchy, directory in job.all():
        assert directory.marked() and directory.parent.marked()
        assert [pid for cgroup in directory.subtree() for pid in cgroup.procs()] == [child.pid], hierarchy
    place.finish(job)
    assert child.wait() == -signal.SIGKILL
    assert not place.is_there()
    assert job.remove()  # nothing there is fine
    assert job.kill() == job.procs() == set()


def the_base_goes_with_the_last_job(place: Place) -> None:
    """However deep it is, and not before."""
    first, second = place.job("job_1", "/deep/er"), place.job("job_2", "/deep/er")
    first.create(Limits())
    second.create(Limits())
    place.finish(first)
    assert all(directory.exists() for _, directory in second.all())
    place.finish(second)
    assert not place.is_there()


def a_base_that_an_admin_made_stays(place: Place) -> None:
    """And takes jobs: on v1 its cpuset has no CPUs, on v2 it gives no controllers."""
    for top in place.tops():
        os.makedirs(top.path)
    try:
        job = place.job()
        job.create(Limits())
        place.start(job)
        place.finish(job)
        assert all(top.exists() for top in place.tops())
    finally:
        for top in place.tops():
            while top.parts:
                top.remove()
                top = top.parent


def limits_reach_the_kernel(place: Place, cpu: str) -> None:
    """Each in its own file, in the words of its version. A soft limit is kept to whole pages."""
    job = place.job()
    job.create(Limits(memory=64 * MIB, memory_soft=32 * MIB + 5, cpus=0.5, cpu_shares=512, cpuset=cpu, pids=20))
    expected = {
        "memory.limit_in_bytes": str(64 * MIB), "memory.max": str(64 * MIB),
        "memory.soft_limit_in_bytes": str(32 * MIB), "memory.low": str(32 * MIB),
        "cpu.cfs_quota_us": "50000", "cpu.max": "50000 100000", "cpu.shares": "512", "cpu.weight": "20",
        "cpuset.cpus": cpu, "pids.max": "20",
    }  # fmt: skip
    shown = {}
    for controller, v1, v2 in _LIMITS:
        hierarchy, directory = place.layout.of(controller), job.directory(controller)
        assert hierarchy is not None and directory is not None
        file = v1 if hierarchy.version == 1 else v2
        shown[file] = value_of(directory, file)
    assert shown == {file: expected[file] for file in shown}
    child = place.start(job)
    assert os.sched_getaffinity(child.pid) == {int(cpu)}
    place.finish(job)


def a_limit_that_the_kernel_refuses_leaves_nothing(place: Place, cpuset: str) -> None:
    with pytest.raises(KernelRefusedError, match=rf"\Acpuset: cannot write '{cpuset}' to /.*cpuset\.cpus: "):
        place.job().create(Limits(memory=64 * MIB, cpuset=cpuset))
    assert not place.is_there()


def cpus_outside_the_bases_are_refused(place: Place) -> None:
    """By the limit's name. v1 says EACCES, which would be no matter of rights; v2 would run the job elsewhere."""
    neighbour, job = place.job("job_0"), place.job()
    neighbour.create(Limits(cpuset="0"))
    directory, hierarchy = neighbour.directory("cpuset"), place.layout.of("cpuset")
    assert directory is not None and hierarchy is not None
    directory.parent.write("cpuset.cpus", "0")
    said = r"outside the parent's" if hierarchy.version == 1 else r"of CPUs '1' only '0' would be used"
    with pytest.raises(KernelRefusedError, match=rf"cpuset: .*{said}"):
        job.create(Limits(cpuset="1"))
    assert not any(directory.exists() for _, directory in job.all())
    place.finish(neighbour)


def an_existing_cgroup_is_in_use_and_is_left_alone(place: Place) -> None:
    job = place.job()
    job.create(Limits())
    child = place.start(job)
    with pytest.raises(InUseError, match=rf"{place.base}/job_1 exists already"):
        place.job().create(Limits())
    assert child.poll() is None
    assert child.pid in job.procs()
    place.finish(job)


def a_name_taken_in_one_hierarchy_only_is_in_use(place: Place) -> None:
    """In whichever one it is."""
    job = place.job()
    for _, taken in job.all():
        for depth in range(1, len(taken.parts)):
            CgroupDir(taken.mount, taken.parts[:depth]).make()
        os.mkdir(taken.path)
        with pytest.raises(InUseError):
            job.create(Limits())
        assert [directory.path for _, directory in job.all() if directory.exists()] == [taken.path]
        assert job.remove()


def of_many_that_make_one_job_at_once_one_gets_it(place: Place, rounds: int) -> None:
    job = place.job()
    for _ in range(rounds):
        outcomes: list[object] = []
        barrier = threading.Barrier(4)

        def make(outcomes: list[object] = outcomes, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                place.job().create(Limits())
                outcomes.append("made")
            except Exception as e:
                outcomes.append(type(e))

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Two may have collided in different hierarchies and both have given way; never do two have it.
        assert outcomes.count("made") <= 1
        assert set(outcomes) <= {"made", InUseError}
        if "made" in outcomes:
            assert all(directory.exists() for _, directory in job.all())
        assert job.remove()


_RACE = """
import sys
from acctd.cgroup.driver import JobCgroups, arm_block_counters
from acctd.cgroup.layout import discover
from acctd.model import Limits
layout = discover()
for turn in range(int(sys.argv[3])):
    job = JobCgroups(layout, sys.argv[1], f"job_{sys.argv[2]}_{turn}")
    job.create(Limits(cpuset="0", pids=10))
    for _, directory in job.all():
        assert directory.exists(), directory
    arm_block_counters(layout, sys.argv[1], [])
    assert job.remove()
"""


def processes_make_and_remove_below_one_base_at_once(place: Place, turns: int) -> None:
    """Each one's last job takes the base away from under the others, who find none without its controllers."""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACE, place.base, str(number), str(turns)],
            stderr=subprocess.PIPE, text=True, cwd=_REPO,
        )
        for number in range(3)
    ]  # fmt: skip
    for racer in racers:
        _, errors = racer.communicate(timeout=120)
        assert (racer.returncode, errors) == (0, "")
    assert not place.is_there()


def cgroups_that_the_job_made_itself_go_with_what_is_inside(place: Place) -> None:
    job = place.job()
    job.create(Limits())
    inner = []
    for hierarchy, directory in job.all():
        for name in (b"plain", b"odd \xff name"):
            nested = os.path.join(os.fsencode(directory.path), name, b"deeper")
            os.makedirs(nested)
            if hierarchy.version == 1 and "cpuset" in hierarchy.controllers:
                continue  # without CPUs nobody can join
            inner.append((nested, name))
    child = place.start(job)
    for nested, name in inner:
        if name == b"plain":
            Path(os.fsdecode(nested), "cgroup.procs").write_text(str(child.pid))
    assert child.pid in job.procs()
    place.finish(job)
    assert child.wait() == -signal.SIGKILL
