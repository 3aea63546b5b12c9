"""CPU limits on v2, on a machine of two memory nodes with two cores each."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from acctd.cgroup.cpus import read_topology
from acctd.errors import ExhaustedError, KernelRefusedError
from acctd.job import Job
from acctd.model import Limits
from tests.vm.inside.conftest import Machine

MIB = 1 << 20
SPIN = ("sh", "-c", "while :; do :; done")


@pytest.fixture
def four(machine: Machine) -> Iterator[list[Job]]:
    """A job for itself on each core."""
    jobs = [machine.create(f"core{number}", Limits(cpuset="linear:1")) for number in range(4)]
    yield jobs
    for job in jobs:
        if job in machine.jobs:
            machine.finish(job, 0)


def allowed(pid: int) -> tuple[str, str]:
    """The CPUs and memory nodes of a process, as the kernel tells them."""
    told = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return told["Cpus_allowed_list"], told["Mems_allowed_list"]


def used(machine: Machine, job: Job) -> int:
    """CPU time so far, ns."""
    machine.agent.poll([job])
    now = job.meter.now()
    return now["cpu_user"][""] + now["cpu_system"][""]


def test_this_machine_has_two_nodes() -> None:
    assert [(min(core.cpus), core.package, core.node) for core in read_topology()] == [
        *((0, 0, 0), (1, 0, 0)),
        *((2, 1, 1), (3, 1, 1)),
    ]


def test_each_job_gets_a_core_and_the_memory_beside_it(machine: Machine, four: list[Job]) -> None:
    assert [(job.row.place.cpus, job.row.place.mems) for job in four] == [
        *(("0", "0"), ("1", "0")),
        *(("2", "1"), ("3", "1")),
    ]
    with pytest.raises(ExhaustedError, match=r"cpuset linear:1 .* 0 of 4 are, 4 jobs have the others"):
        machine.create("more", Limits(cpuset="linear:1"))
    # From the third on: the node that is not the one everything starts on.
    shm = Path("/dev/shm/acctd-cpus")
    try:
        for job, node in ((four[1], 0), (four[2], 1)):
            process = machine.start(job, "dd", "if=/dev/zero", f"of={shm}", "bs=1M", "count=8", "status=none")
            assert process.wait() == 0
            text = (machine.cgroup(job, "memory").read("memory.numa_stat") or b"").decode()
            shmem = next(line.split()[1:] for line in text.splitlines() if line.startswith("shmem "))
            assert shmem == [f"N0={(1 - node) * 8 * MIB}", f"N1={node * 8 * MIB}"]
            shm.unlink()
    finally:
        shm.unlink(missing_ok=True)
    process = machine.start(four[3], "sleep", "1000")
    assert allowed(process.pid) == ("3", "1")
    assert four[3].cgroups.kill() == set()
    process.wait()
    assert machine.finish(four[3], -9).cpus == "3"


def test_what_fits_on_one_node_is_put_there(machine: Machine) -> None:
    one = machine.create("one", Limits(cpuset="linear:1"))
    two = machine.create("two", Limits(cpuset="linear:2"))
    assert (two.row.place.cpus, two.row.place.mems) == ("2-3", "1")
    # And what is left is filled up before another node is begun.
    machine.finish(two, 0)
    last = machine.create("last", Limits(cpuset="linear:1"))
    assert (last.row.place.cpus, last.row.place.mems) == ("1", "0")
    machine.finish(one, 0)
    wide = machine.create("wide", Limits(cpuset="linear:3"))
    assert (wide.row.place.cpus, wide.row.place.mems) == ("0,2-3", "0-1")
    family = machine.create("family", Limits(cpuset="linear:2"), parent=wide)
    assert (family.row.place.cpus, family.row.place.mems) == ("2-3", "1")
    assert (machine.cgroup(family, "cpuset").read("cpuset.cpus.effective") or b"").strip() == b"2-3"
    for job in (family, wide, last):
        machine.finish(job, 0)


def test_a_job_whose_core_goes_offline_goes_on_and_gets_it_back(machine: Machine, four: list[Job]) -> None:
    process = machine.start(four[3], "sleep", "1000")
    online = Path("/sys/devices/system/cpu/cpu3/online")
    online.write_text("0")
    try:
        _until(lambda: allowed(process.pid)[0] != "3")
        assert process.poll() is None
        machine.finish(four[0], 0)
        again = machine.create("again", Limits(cpuset="linear:1"))
        assert again.row.place.cpus == "0"
        with pytest.raises(ExhaustedError, match=r"0 of 3 are, 3 jobs have the others"):
            machine.create("more", Limits(cpuset="linear:1"))
    finally:
        online.write_text("1")
    _until(lambda: allowed(process.pid)[0] == "3")
    assert four[3].cgroups.kill() == set()
    process.wait()
    machine.finish(again, 0)


def test_weight_quota_and_burst(machine: Machine) -> None:
    held = Limits(cpus=0.5, cpu_burst=0.02, cpuset="3")
    job = machine.create("held", held)
    cgroup = machine.cgroup(job, "cpu")
    assert [cgroup.read(file) for file in ("cpu.max", "cpu.max.burst")] == [b"50000 100000\n", b"20000\n"]
    process = machine.start(job, *SPIN)
    _until(lambda: (cgroup.read("cpu.stat") or b"").find(b"nr_throttled 0") < 0)
    assert job.cgroups.kill() == set()
    totals = machine.finish(job, process.wait()).totals
    assert totals["cpu_throttled_periods"][""] > 0
    assert totals["cpu_throttled"][""] > 0
    with pytest.raises(KernelRefusedError, match="cpuset"):
        machine.create("nowhere", Limits(cpuset="9"))
    # 1 to 3 in shares is 39 to 118 in weight.
    pair = [machine.create(f"of{shares}", Limits(cpu_shares=shares, cpuset="3")) for shares in (1024, 3072)]
    assert [machine.cgroup(job, "cpu").read("cpu.weight") for job in pair] == [b"39\n", b"118\n"]
    spinning: list[subprocess.Popen[bytes]] = [machine.start(job, *SPIN) for job in pair]
    before = [used(machine, job) for job in pair]

    def gained() -> list[int]:
        return [used(machine, job) - first for job, first in zip(pair, before, strict=True)]

    _until(lambda: sum(gained()) > 3 * 10**9)
    one, three = gained()
    assert 2 < three / one < 4.5
    for job, process in zip(pair, spinning, strict=True):
        assert job.cgroups.kill() == set()
        machine.finish(job, process.wait())


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
