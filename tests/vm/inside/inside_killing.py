"""Ending a job that does not want to end: by cgroup.kill, by what v2 has before 5.14, and by v1's freezer alone."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from acctd.job import Job
from acctd.kernel import procs
from acctd.kernel.cgroupfs import CgroupDir
from acctd.model import Limits
from tests.vm.inside.conftest import Machine

_REPO = Path(__file__).parents[3]
_PATIENCE = 120.0  # s; a guest's CPU is thirty times slower
_SIZES = {"stopped": 2, "traced": 2, "parent": 2, "init": 4}


def soon(true: Callable[[], object]) -> bool:
    """Whether something comes true."""
    deadline = time.monotonic() + _PATIENCE
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def outlaw(job: Job, kind: str) -> "subprocess.Popen[str]":
    """A program of lab/outlaws.py in a job; it ends once nobody is left who comes from it."""
    with job.cgroups.joining() as doors:
        join = [f"--join={path}/cgroup.procs" for path in doors.values()]
    argv = [sys.executable, "-I", "-S", str(_REPO / "lab/outlaws.py"), *join, kind]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout as said:
        assert said.readline() == "up\n"
    return child


def grown(job: Job, kind: str) -> bool:
    """Whether an outlaw has come to what it is."""
    if kind == "bomb":
        return len(job.cgroups.procs()) > 20
    if kind == "leader":
        leaders = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in job.cgroups.living()]
        return leaders == ["Z"]
    return kind == "comet" or len(job.cgroups.living()) == _SIZES.get(kind, 1)


def end(machine: Machine, kind: str, *, frozen: bool = False) -> None:
    """One outlaw from its start to the record of its job, in which nobody is left."""
    job = machine.create(f"{kind}-{frozen}", Limits(memory=64 << 20, pids=64))
    child = outlaw(job, kind)
    assert soon(lambda: grown(job, kind)), kind
    if frozen:
        job.cgroups.freeze()
    assert job.cgroups.kill(_PATIENCE) == set(), kind
    assert job.cgroups.procs() == set(), kind
    assert child.wait(_PATIENCE) == 0, kind
    directory = machine.cgroup(job, "pids")
    assert directory.read("pids.max") == b"64\n"
    assert machine.finish(job, 0).notes == ()


def test_every_outlaw_ends(machine: Machine) -> None:
    for kind in ("bomb", "comet", "deaf", "stopped", "traced", "parent", "leader", "init"):
        end(machine, kind)
    end(machine, "bomb", frozen=True)


def test_every_outlaw_ends_without_the_kernels_help(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel before 5.14, which has no cgroup.kill."""
    has = CgroupDir.has
    monkeypatch.setattr(CgroupDir, "has", lambda self, file: file != "cgroup.kill" and has(self, file))
    for kind in ("bomb", "comet", "stopped", "traced", "leader"):
        end(machine, kind)
    end(machine, "bomb", frozen=True)


def test_a_family_inside_a_suspended_job_ends(machine: Machine) -> None:
    outer = machine.create("outer")
    pilot = outlaw(outer, "deaf")
    inner = machine.create("inner", parent=outer)
    payload = outlaw(inner, "deaf")
    outer.cgroups.freeze()
    assert inner.cgroups.kill(_PATIENCE) == set()
    assert payload.wait(_PATIENCE) == 0
    machine.finish(inner, 0)
    assert pilot.poll() is None
    freezer = machine.cgroup(outer, "freezer")
    if freezer.has("freezer.state"):
        assert soon(lambda: freezer.read("freezer.state") == b"FROZEN\n")
    else:
        assert soon(lambda: b"frozen 1" in (freezer.read("cgroup.events") or b""))
    assert outer.cgroups.kill(_PATIENCE) == set()
    assert pilot.wait(_PATIENCE) == 0
    machine.finish(outer, 0)


def test_one_that_waits_in_the_kernel_is_named(machine: Machine) -> None:
    """A parent in vfork(2) is in state D, and can be killed all the same."""
    job = machine.create("waiting")
    child = outlaw(job, "parent")
    waiting: list[procs.Stuck] = []

    def found() -> bool:
        waiting[:] = [why for pid in job.cgroups.living() if (why := procs.stuck(pid)) and why.state == "D"]
        return bool(waiting)

    assert soon(found)
    assert waiting[0].function
    assert waiting[0].name in str(waiting[0])
    assert job.cgroups.kill(_PATIENCE) == set()
    assert child.wait(_PATIENCE) == 0
    machine.finish(job, 0)
