"""What a job's record says of known loads, and limits that are felt, on whatever layout is here."""

import os
import signal
import sys
import time
from pathlib import Path

from acctd.model import Limits
from tests.bodies.machine import Machine

MIB = 1 << 20

# Holds each kind of memory at once, says so, and waits to be let go.
_HOLDER = """
import mmap, os, sys
anon = mmap.mmap(-1, 30 << 20, flags=mmap.MAP_PRIVATE)
piece = b"x" * (1 << 20)
for _ in range(30): anon.write(piece)
shared = mmap.mmap(-1, 10 << 20)
for _ in range(10): shared.write(piece)
disk = os.open(sys.argv[3], os.O_RDONLY)
os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_RANDOM)
for _ in range(20): os.read(disk, 1 << 20)
open(sys.argv[1], "w").close()
open(sys.argv[2]).close()
"""


def a_complete_record(machine: Machine, disk: Path) -> None:
    """20 MiB written to a disk of the caller's own and read again, and each kind of memory held at once."""
    ready, go = machine.fifo("ready"), machine.fifo("go")
    device = f"{os.major(disk.stat().st_rdev)}:{os.minor(disk.stat().st_rdev)}"
    job = machine.create("whole")
    # Past the page cache, which knows nothing of this part of the disk afterwards.
    script = (
        f"dd if=/dev/zero of={disk} bs=1M count=20 oflag=direct 2>/dev/null || exit 9; "
        'exec "$0" -I -S -c "$1" "$2" "$3" "$4"'
    )
    process = machine.start(job, "sh", "-c", script, sys.executable, _HOLDER, str(ready), str(go), str(disk))
    ready.open().close()
    machine.agent.poll([job])
    now = job.meter.now()
    go.open("w").close()
    assert process.wait() == 0
    record = machine.finish(job, 0)
    totals = record.totals
    assert (record.state, record.exit_code) == ("done", 0)
    assert totals["block_write"][device] == 20 * MIB
    assert totals["block_writes"][device] >= 20
    assert totals["block_read"][device] == 20 * MIB
    assert totals["block_reads"][device] >= 20
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
    used = totals["cpu_user"][""] + totals["cpu_system"][""]
    assert 0 < used <= len(os.sched_getaffinity(0)) * record.wall_ns
    stalls = {name for name in totals if name.endswith("_stall")}
    assert stalls == ({"cpu_stall", "io_stall", "memory_stall"} if machine.agent.layout.unified else set())
    if stalls:
        assert totals["io_stall"][""] > 0


def limits_are_felt(machine: Machine) -> None:
    hungry = ["dd", "if=/dev/zero", "of=/dev/null", "bs=60M", "count=1"]
    hog = machine.run("hog", hungry, Limits(memory=16 * MIB, swap=0))
    assert hog.exit_signal == signal.SIGKILL
    assert hog.totals["memory_oom_kills"][""] == 1
    assert 15 * MIB < hog.totals["memory_peak"][""] <= 16 * MIB
    # With a swap limit v1 stops at the limit of memory and swap together, whose own count of that stays 0 on 6.18.
    pressed = machine.run("pressed", hungry, Limits(memory=16 * MIB))
    assert pressed.totals["memory_failcnt"][""] > 0
    forks = machine.run("forks", ["sh", "-c", "for i in 1 2 3 4 5 6; do sleep 1000 & done"], Limits(pids=4))
    assert forks.totals["pids_refused"][""] > 0
    assert forks.totals["pids_peak"][""] <= 4
    job = machine.create("spin", Limits(cpus=0.2))
    process = machine.start(job, "sh", "-c", "while :; do :; done")
    deadline = time.monotonic() + 60
    # The kernel adds the time once the job goes on, the period before that.
    while not job.meter.now().get("cpu_throttled", {}).get(""):
        assert time.monotonic() < deadline
        machine.agent.poll([job])
    assert job.cgroups.kill() == set()
    spin = machine.finish(job, process.wait())
    assert spin.totals["cpu_throttled_periods"][""] > 0
    assert spin.totals["cpu_throttled"][""] > 0


def a_family_lies_in_its_parent_and_is_counted_in_both(machine: Machine) -> None:
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


def nested_cgroups_of_the_job_are_counted_and_removed(machine: Machine) -> None:
    """As a runtime in the job does it: a cgroup of its own below, with processes."""
    job = machine.create("nests")
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


def what_forks_while_it_is_killed_dies(machine: Machine) -> None:
    job, ready = machine.create("forks"), machine.fifo("forking")
    spin = "spin() { while :; do (:) & wait $!; done; }; for i in 1 2 3 4 5; do spin & done"
    process = machine.start(job, "sh", "-c", f"{spin}; echo up >{ready}; spin")
    assert ready.read_text() == "up\n"
    assert job.cgroups.kill() == set()
    assert process.wait() == -signal.SIGKILL
    machine.finish(job, -signal.SIGKILL)
