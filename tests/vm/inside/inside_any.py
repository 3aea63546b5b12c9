"""What holds on every cgroup layout: limits in force, a record with nothing missing, an end that leaves nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from acctd.model import Limits
from tests.vm.inside.conftest import BASE, Machine

MIB = 1 << 20
DISK = "/dev/vda"

# Holds each kind of memory at once, says so, and waits to be let go.
_HOLDER = f"""
import mmap, os, sys
anon = mmap.mmap(-1, 30 << 20, flags=mmap.MAP_PRIVATE)
piece = b"x" * (1 << 20)
for _ in range(30): anon.write(piece)
shared = mmap.mmap(-1, 10 << 20)
for _ in range(10): shared.write(piece)
disk = os.open("{DISK}", os.O_RDONLY)
os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_RANDOM)
for _ in range(20): os.read(disk, 1 << 20)
open(sys.argv[1], "w").close()
open(sys.argv[2]).close()
"""


def test_every_controller_has_its_place(machine: Machine) -> None:
    layout = machine.agent.layout
    for controller in ("memory", "cpu", "cpuacct", "cpuset", "blkio", "freezer", "pids"):
        assert layout.of(controller) is not None, controller
    job = machine.create("placed")
    process = machine.start(job, "sleep", "1000")
    for hierarchy, directory in job.cgroups.all():
        assert [pid for cgroup in directory.subtree() for pid in cgroup.procs()] == [process.pid], hierarchy
    assert job.cgroups.kill() == set()
    assert process.wait() == -signal.SIGKILL
    machine.finish(job, -signal.SIGKILL)


def test_a_family_lies_in_its_parent_and_is_counted_in_both(machine: Machine) -> None:
    spin = "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done; sleep 1000"
    parent = machine.create("parent", Limits(memory=256 * MIB))
    pilot = machine.start(parent, "sleep", "1000")
    child = machine.create("child", Limits(pids=20, memory=64 * MIB), parent=parent)
    payload = machine.start(child, "sh", "-c", spin)
    while len(child.cgroups.living()) < 2:
        assert payload.poll() is None
    assert child.cgroups.living() < parent.cgroups.living()
    assert child.cgroups.kill() == set()
    assert (payload.wait(), pilot.poll()) == (-signal.SIGKILL, None)
    inner = machine.finish(child, -signal.SIGKILL)
    assert parent.cgroups.kill() == set()
    assert pilot.wait() == -signal.SIGKILL
    outer = machine.finish(parent, -signal.SIGKILL)
    used = [sum(record.totals[name][""] for name in ("cpu_user", "cpu_system")) for record in (inner, outer)]
    assert 0 < used[0] <= used[1]
    assert inner.totals["memory_peak"][""] <= outer.totals["memory_peak"][""]
    assert (inner.parent, outer.parent) == ("parent", None)


def test_limits_reach_the_kernel(machine: Machine) -> None:
    limits = Limits(memory=64 * MIB, memory_soft=32 * MIB, cpus=0.5, cpu_shares=512, cpuset="1", pids=20)
    job = machine.create("limits", limits)
    shown = {}
    for controller, v1, v2 in (
        ("memory", "memory.limit_in_bytes", "memory.max"),
        ("memory", "memory.soft_limit_in_bytes", "memory.low"),
        ("cpu", "cpu.cfs_quota_us", "cpu.max"),
        ("cpu", "cpu.shares", "cpu.weight"),
        ("cpuset", "cpuset.cpus", "cpuset.cpus"),
        ("pids", "pids.max", "pids.max"),
    ):
        hierarchy = machine.agent.layout.of(controller)
        assert hierarchy is not None
        file = v1 if hierarchy.version == 1 else v2
        shown[file] = (machine.cgroup(job, controller).read(file) or b"").decode().strip()
    expected = {
        "memory.limit_in_bytes": str(64 * MIB), "memory.max": str(64 * MIB),
        "memory.soft_limit_in_bytes": str(32 * MIB), "memory.low": str(32 * MIB),
        "cpu.cfs_quota_us": "50000", "cpu.max": "50000 100000", "cpu.shares": "512", "cpu.weight": "20",
        "cpuset.cpus": "1", "pids.max": "20",
    }  # fmt: skip
    assert shown == {file: expected[file] for file in shown}
    seen = machine.directory / "status"
    process = machine.start(job, "sh", "-c", f"cat /proc/self/status >{seen}")
    assert process.wait() == 0
    machine.finish(job, 0)
    assert "Cpus_allowed_list:\t1\n" in seen.read_text()


def test_limits_are_in_force(machine: Machine) -> None:
    hungry = ["dd", "if=/dev/zero", "of=/dev/null", "bs=60M", "count=1"]
    hog = machine.run("hog", hungry, Limits(memory=16 * MIB, swap=0))
    assert hog.exit_signal == signal.SIGKILL
    assert hog.totals["memory_oom_kills"][""] == 1
    # v1 without swap stops at the limit of memory and swap together.
    assert sum(hog.totals.get(name, {}).get("", 0) for name in ("memory_failcnt", "memory_swap_failcnt")) > 0
    assert 15 * MIB < hog.totals["memory_peak"][""] <= 16 * MIB
    forks = machine.run("forks", ["sh", "-c", "for i in 1 2 3 4 5 6; do sleep 1000 & done"], Limits(pids=4))
    assert forks.totals["pids_refused"][""] > 0
    assert forks.totals["pids_peak"][""] <= 4
    spin = machine.run("spin", ["dd", "if=/dev/zero", "of=/dev/null", "bs=64k", "count=20000"], Limits(cpus=0.2))
    assert spin.totals["cpu_throttled_periods"][""] > 0
    assert spin.totals["cpu_throttled"][""] > 0


def test_a_complete_record(machine: Machine, fifo: Callable[[str], Path]) -> None:
    ready, go = fifo("ready"), fifo("go")
    disk = f"{os.major(os.stat(DISK).st_rdev)}:{os.minor(os.stat(DISK).st_rdev)}"
    _drop_caches()
    job = machine.create("whole")
    script = (
        f"dd if=/dev/zero of={DISK} bs=1M count=20 oflag=direct 2>/dev/null || exit 9; "
        'exec "$0" -I -S -c "$1" "$2" "$3"'
    )
    process = machine.start(job, "sh", "-c", script, sys.executable, _HOLDER, str(ready), str(go))
    ready.open().close()
    machine.agent.poll([job])
    now = job.meter.now()
    go.open("w").close()
    assert process.wait() == 0
    record = machine.finish(job, 0)
    totals = record.totals
    assert (record.state, record.exit_code) == ("done", 0)
    assert totals["block_write"][disk] == 20 * MIB
    assert totals["block_writes"][disk] >= 20
    assert totals["block_read"][disk] == 20 * MIB
    assert totals["block_reads"][disk] >= 20
    # The interpreter itself comes on top of the 30; each kind is apart from the others.
    assert 30 * MIB <= totals["memory_anon_peak"][""] < 40 * MIB
    assert 10 * MIB <= totals["memory_shmem_peak"][""] < 12 * MIB
    assert 20 * MIB <= totals["memory_file_peak"][""] < 30 * MIB
    assert totals["memory_resident_peak"][""] >= 40 * MIB
    assert 60 * MIB <= totals["memory_peak"][""] < 100 * MIB
    assert now["memory_kernel"][""] > 0
    assert now["memory_swap"][""] == 0
    assert now["pids"][""] == 1
    assert totals["pids_peak"][""] >= 1
    # Of two CPUs, no job can use more than twice the time that passed.
    used = totals["cpu_user"][""] + totals["cpu_system"][""]
    assert 0 < used <= 2 * record.wall_ns
    stalls = {name for name in totals if name.endswith("_stall")}
    assert stalls == ({"cpu_stall", "io_stall", "memory_stall"} if machine.agent.layout.unified else set())
    if stalls:
        assert totals["io_stall"][""] > 0


def test_what_forks_while_it_is_killed_dies(machine: Machine, fifo: Callable[[str], Path]) -> None:
    job = machine.create("forks")
    ready = fifo("ready")
    spin = "spin() { while :; do (:) & wait $!; done; }; for i in 1 2 3 4 5; do spin & done"
    process = machine.start(job, "sh", "-c", f"{spin}; echo up >{ready}; spin")
    assert ready.read_text() == "up\n"
    assert job.cgroups.kill() == set()
    assert process.wait() == -signal.SIGKILL
    machine.finish(job, -signal.SIGKILL)


def test_nested_cgroups_of_the_job_are_counted_and_removed(machine: Machine) -> None:
    job = machine.create("nests")
    # As a runtime in the job does it: a cgroup of its own below, with processes.
    steps = []
    for hierarchy, directory in job.cgroups.all():
        inner = directory.child("inner").path
        steps.append(f"mkdir {inner}")
        if hierarchy.version == 1 and "cpuset" in hierarchy.controllers:
            # v1's cpuset takes no task before it has CPUs and memory nodes.
            steps += [f"cat {inner}/../{file} >{inner}/{file}" for file in ("cpuset.cpus", "cpuset.mems")]
        steps.append(f"echo $$ >{inner}/cgroup.procs")
    steps.append("exec dd if=/dev/zero of=/dev/null bs=20M count=2 status=none")
    process = machine.start(job, "sh", "-c", " && ".join(steps))
    assert process.wait() == 0
    record = machine.finish(job, 0)
    assert record.totals["memory_peak"][""] >= 20 * MIB
    assert record.totals["cpu_user"][""] + record.totals["cpu_system"][""] > 0


def test_the_base_goes_with_the_last_job(machine: Machine) -> None:
    tops = [hierarchy.top for hierarchy in machine.agent.layout.hierarchies]
    job = machine.create("first")
    assert all((top.path / BASE).is_dir() for top in tops)
    other = machine.create("second")
    machine.finish(job, 0)
    assert all((top.path / BASE).is_dir() for top in tops)
    machine.finish(other, 0)
    assert not any((top.path / BASE.partition("/")[0]).exists() for top in tops)


def _drop_caches() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
