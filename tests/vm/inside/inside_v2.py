"""What only the unified hierarchy has: delegation of controllers, and cgroup.kill."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import discover
from acctd.errors import UnavailableError
from acctd.model import Limits
from tests.bodies.cgroups import Place, processes_make_and_remove_below_one_base_at_once
from tests.bodies.machine import Machine
from tests.vm.inside.conftest import BASE

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


def test_jobs_come_and_go_below_one_base_at_once() -> None:
    processes_make_and_remove_below_one_base_at_once(Place("acctdvm/race"), turns=60)
