"""What only the unified hierarchy has: delegation of controllers, and cgroup.kill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import discover
from acctd.errors import KernelRefusedError, UnavailableError
from acctd.model import Limits
from tests.vm.inside.conftest import BASE, Machine

TOP = Path("/sys/fs/cgroup")


def test_this_is_a_v2_only_host() -> None:
    layout = discover()
    assert layout.kind == "v2"
    assert [str(h.top.path) for h in layout.hierarchies] == [str(TOP)]


def test_controllers_are_delegated_down_to_the_job(machine: Machine) -> None:
    job = machine.create("deep")
    for cgroup in (TOP, TOP / BASE.partition("/")[0], TOP / BASE):
        have = set((cgroup / "cgroup.subtree_control").read_text().split())
        assert {"cpu", "cpuset", "io", "memory", "pids"} <= have, cgroup
    assert (TOP / BASE / "job_deep" / "memory.max").exists()
    machine.finish(job, 0)


def test_kill_is_the_kernels_own(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    job = machine.create("killed")
    process = machine.start(job, "sleep", "1000")
    unified = job.cgroups.unified
    assert unified is not None
    unified.write("cgroup.freeze", "1")  # as an admin may have left it
    # With a kill(2) that does nothing there is only the kernel's own way left.
    monkeypatch.setattr(os, "kill", lambda *_: None)
    assert job.cgroups.kill() == set()
    assert process.wait() == -signal.SIGKILL
    machine.finish(job, -signal.SIGKILL)


@pytest.fixture
def occupied() -> Iterator[str]:
    """A cgroup with a process in it: this one."""
    (TOP / "taken").mkdir()
    (TOP / "taken" / "cgroup.procs").write_text(str(os.getpid()))
    yield "taken"
    (TOP / "cgroup.procs").write_text(str(os.getpid()))
    (TOP / "taken").rmdir()


def test_a_base_below_processes_is_refused_in_one_sentence(occupied: str) -> None:
    cgroups = JobCgroups(discover(), f"{occupied}/acctd", "job_1")
    with pytest.raises(UnavailableError, match=r"cgroup /sys/fs/cgroup/taken holds processes.*set cgroup\.base") as e:
        cgroups.create(Limits())
    assert "\n" not in str(e.value)
    assert not (TOP / occupied / "acctd").exists()


def test_a_process_whose_leader_exited_first_is_killed(machine: Machine, fifo: Callable[[str], Path]) -> None:
    """cgroup.kill of 6.1 passes over it."""
    ready = fifo("ready")
    script = (
        "import ctypes, sys, threading, time\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "open(sys.argv[1], 'w').write('up')\n"
        "ctypes.CDLL(None).syscall(60, 0)\n"
    )
    job = machine.create("leaderless")
    process = machine.start(job, sys.executable, "-I", "-S", "-c", script, str(ready))
    assert ready.read_text() == "up"
    leader = Path(f"/proc/{process.pid}/task/{process.pid}/stat")
    deadline = time.monotonic() + 60
    while leader.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
    assert job.cgroups.kill() == set()
    machine.finish(job, process.wait())


def test_cpus_outside_the_bases_are_refused(machine: Machine) -> None:
    """The kernel itself takes them, and runs the job elsewhere."""
    keeper = machine.create("keeper")
    machine.cgroup(keeper, "cpuset").parent.write("cpuset.cpus", "0")
    with pytest.raises(KernelRefusedError, match=r"cpuset: of CPUs '1' only '0' would be used"):
        machine.create("elsewhere", Limits(cpuset="1"))
    machine.finish(keeper, 0)


def test_jobs_come_and_go_below_one_base_at_once(machine: Machine) -> None:
    """None finds a base that another has just made anew and not yet given its controllers."""
    code = (
        "import sys\n"
        "from acctd.cgroup.driver import JobCgroups\n"
        "from acctd.cgroup.layout import discover\n"
        "from acctd.model import Limits\n"
        "for turn in range(60):\n"
        "    job = JobCgroups(discover(), 'acctdvm/race', f'job_{sys.argv[1]}')\n"
        "    job.create(Limits(pids=10))\n"
        "    assert job.remove()\n"
    )
    argv = [sys.executable, "-c", code]
    racers = [subprocess.Popen([*argv, str(n)], stderr=subprocess.PIPE, text=True) for n in range(3)]
    assert [racer.communicate(timeout=120)[1] for racer in racers] == [""] * 3
