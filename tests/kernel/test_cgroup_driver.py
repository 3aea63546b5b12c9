"""A job's cgroups on this host's own hierarchies, below a base of the test's own: made, joined, killed, taken away."""

import itertools
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from acctd.cgroup.driver import JobCgroups, arm_block_counters, sweep_sentinels
from acctd.cgroup.layout import Layout, discover
from acctd.kernel import procs
from acctd.kernel.cgroupfs import CgroupDir
from acctd.model import Limits
from tests.bodies import cgroups
from tests.bodies.cgroups import Place
from tests.kernel.conftest import REPO

_serial = itertools.count()

Starter = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def layout() -> Layout:
    return discover()


def tops(layout: Layout, base: str) -> list[CgroupDir]:
    return [CgroupDir(h.top.mount, (base,)) for h in layout.hierarchies]


@pytest.fixture
def base(layout: Layout) -> Iterator[str]:
    """A base of this test's own; what is still below it at the end is ended, removed and reported."""
    name = f"acctdtest-{os.getpid()}-d{next(_serial)}"
    yield name
    left = [top for top in tops(layout, name) if top.exists()]
    _thaw(layout, name)
    for top in left:
        for cgroup in top.subtree():
            for pid in cgroup.procs():
                os.kill(pid, signal.SIGKILL)
        _empty(top)
    assert left == []


def _empty(top: CgroupDir) -> None:
    for _ in range(2000):
        if all([cgroup.remove() for cgroup in top.subtree()]):
            return
        select.select([], [], [], 0.001)


@pytest.fixture
def place(base: str) -> Iterator[Place]:
    """For what tests/vm runs on other layouts too."""
    made = Place(base)
    yield made
    made.close()


@pytest.fixture
def job(layout: Layout, base: str) -> JobCgroups:
    return JobCgroups(layout, base, "job_1")


def _thaw(layout: Layout, base: str) -> None:
    """Let frozen processes go, or the test could wait for ever for their end."""
    freezer = layout.of("freezer")
    if freezer is not None and freezer.version == 1:
        for cgroup in reversed(list(CgroupDir(freezer.top.mount, (base,)).subtree())):
            if cgroup.exists():
                cgroup.write("freezer.state", "THAWED")


@pytest.fixture
def start(layout: Layout, base: str) -> Iterator[Starter]:
    """Start a process in a job's cgroups, past its own first line; ended and reaped at the end of the test."""
    children: list[subprocess.Popen[str]] = []

    def starter(cgroups: JobCgroups, script: str) -> subprocess.Popen[str]:
        join = "import os, sys\nfor path in sys.argv[2:]: open(path, 'w').write('0')\n"
        run = "os.execvp(sys.executable, [sys.executable, '-c', sys.argv[1]])"
        argv = [sys.executable, "-c", join + run, script, *(f"{d.path}/cgroup.procs" for _, d in cgroups.all())]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    yield starter
    _thaw(layout, base)
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGCONT)
            child.kill()
        child.communicate()


WAIT = "import time\nprint('ready', flush=True)\ntime.sleep(1000)"


def finish(job: JobCgroups) -> None:
    assert job.kill() == set()
    assert job.remove()


def test_directories_are_marked_and_hold_what_is_started(place: Place) -> None:
    cgroups.directories_are_marked_and_hold_what_is_started(place)


def test_the_base_goes_with_the_last_job(place: Place) -> None:
    cgroups.the_base_goes_with_the_last_job(place)


def test_a_base_that_an_admin_made_stays(place: Place) -> None:
    cgroups.a_base_that_an_admin_made_stays(place)


def test_limits_reach_the_kernel(place: Place) -> None:
    cgroups.limits_reach_the_kernel(place, str(max(os.sched_getaffinity(0))))


@pytest.mark.parametrize("cpuset", ["99", "4095", "3-1", "99999999999"])
def test_a_limit_that_the_kernel_refuses_leaves_nothing(place: Place, cpuset: str) -> None:
    cgroups.a_limit_that_the_kernel_refuses_leaves_nothing(place, cpuset)


def test_cpus_outside_the_bases_are_refused(place: Place) -> None:
    cgroups.cpus_outside_the_bases_are_refused(place)


def test_an_existing_cgroup_is_in_use_and_is_left_alone(place: Place) -> None:
    cgroups.an_existing_cgroup_is_in_use_and_is_left_alone(place)


def test_a_name_taken_in_one_hierarchy_only_is_in_use(place: Place) -> None:
    cgroups.a_name_taken_in_one_hierarchy_only_is_in_use(place)


def test_of_many_that_make_one_job_at_once_one_gets_it(place: Place) -> None:
    cgroups.of_many_that_make_one_job_at_once_one_gets_it(place, rounds=20)


def test_processes_make_and_remove_below_one_base_at_once(place: Place) -> None:
    cgroups.processes_make_and_remove_below_one_base_at_once(place, turns=40)


def test_cgroups_that_the_job_made_itself_go_with_what_is_inside(place: Place) -> None:
    cgroups.cgroups_that_the_job_made_itself_go_with_what_is_inside(place)


def test_cpusets_inherit_and_a_limit_narrows_them(job: JobCgroups, layout: Layout) -> None:
    job.create(Limits(cpuset="0"))
    try:
        directory, top = job.directory("cpuset"), layout.of("cpuset")
        assert directory is not None
        assert top is not None
        assert directory.read("cpuset.cpus") == b"0\n"
        if top.version == 1:
            for file in ("cpuset.cpus", "cpuset.mems"):
                assert directory.parent.read(file) == top.top.read(file)
            assert directory.read("cpuset.mems") == top.top.read("cpuset.mems")
    finally:
        finish(job)


def test_a_fork_bomb_ends(job: JobCgroups, start: Starter) -> None:
    job.create(Limits(pids=60))
    start(
        job,
        "import os\nprint('ready', flush=True)\nwhile True:\n try: os.fork()\n except OSError: pass",
    )
    pids = job.directory("pids")
    assert pids is not None
    assert job.kill() == set()
    assert {pid for pid in job.procs() if not _zombie(pid)} == set()
    assert _removed(job)


def test_processes_that_ignore_stop_or_leave_their_session_end(job: JobCgroups, start: Starter) -> None:
    job.create(Limits())
    ignoring = start(
        job,
        "import os, signal, time\nfor n in range(1, 32):\n if n not in (9, 17, 19): signal.signal(n, signal.SIG_IGN)\n"
        "os.setsid()\nprint('ready', flush=True)\nwhile True: time.sleep(1000)",
    )
    stopped = start(job, WAIT)
    stopped.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
    assert job.procs() == {ignoring.pid, stopped.pid}
    assert job.kill() == set()
    assert (ignoring.wait(10), stopped.wait(10)) == (-9, -9)
    assert job.remove()


def test_one_that_the_job_has_frozen_by_itself_dies_too(job: JobCgroups, start: Starter, layout: Layout) -> None:
    freezer = layout.of("freezer")
    assert freezer is not None
    job.create(Limits())
    child = start(job, WAIT)
    directory = job.directory("freezer")
    assert directory is not None
    nested = directory.child("nested")
    nested.make()
    nested.write("cgroup.procs", str(child.pid))
    if freezer.version == 1:
        nested.write("freezer.state", "FROZEN")
    else:
        nested.write("cgroup.freeze", "1")
    finish(job)
    assert child.wait(10) == -9


def test_leaving_one_hierarchy_hides_nobody(job: JobCgroups, start: Starter, layout: Layout) -> None:
    """Whichever one it is, the freezer's among them."""
    for hierarchy in layout.hierarchies:
        job.create(Limits())
        child = start(job, WAIT)
        hierarchy.top.write("cgroup.procs", str(child.pid))
        assert hierarchy.job(job.base, job.name).procs() == []
        assert child.pid in job.procs()
        finish(job)
        assert child.wait(10) == -9


def test_a_job_without_its_freezer_directory_is_ended_all_the_same(
    job: JobCgroups, start: Starter, layout: Layout
) -> None:
    """As after a removal that got half-way."""
    freezer = layout.of("freezer")
    assert freezer is not None
    job.create(Limits())
    child = start(job, WAIT)
    freezer.top.write("cgroup.procs", str(child.pid))
    assert freezer.job(job.base, job.name).remove()
    finish(job)
    assert child.wait(10) == -9


def test_an_unkillable_process_is_reported_and_dealt_with_later(
    job: JobCgroups, layout: Layout, base: str, start: Starter
) -> None:
    freezer = layout.of("freezer")
    if freezer is None or freezer.version != 1:
        pytest.fail("nothing here to stand for an uninterruptible sleep")
    prison = freezer.job(base, "prison")
    job.create(Limits())
    child = start(job, WAIT)
    prison.make()
    try:
        # Frozen from outside, it stands for a process in state D: SIGKILL waits until the thaw.
        prison.write("cgroup.procs", str(child.pid))
        prison.write("freezer.state", "FROZEN")
        assert job.kill(timeout=0.05) == {child.pid}
        assert job.remove(timeout=0.05) is False
        assert child.pid in job.procs()
    finally:
        prison.write("freezer.state", "THAWED")
        assert child.wait(10) == -9
        prison.remove()
    finish(job)


def test_a_process_of_another_pid_namespace_does_not_make_acctd_kill_its_own_group(
    job: JobCgroups, start: Starter, layout: Layout, base: str
) -> None:
    """v2 shows a process that has no pid here as 0, and kill(0, ...) means the caller's process group."""
    job.create(Limits())
    child = start(job, WAIT)
    code = (
        "import sys\nfrom acctd.cgroup.driver import JobCgroups\nfrom acctd.cgroup.layout import discover\n"
        "job = JobCgroups(discover(), sys.argv[1], 'job_1')\n"
        "assert job.kill(timeout=0.05) == set()\nassert not job.remove(timeout=0.05)\nprint('alive')"
    )
    argv = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code, base]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=REPO, start_new_session=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")
    assert child.poll() is None
    # Some directories may be gone: those in which this process, unseen, was not.
    assert job.kill() == set()
    assert job.remove()


def test_a_leader_that_exits_before_its_threads_is_not_dead(job: JobCgroups, start: Starter) -> None:
    script = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "print('ready', flush=True)\n"
        "ctypes.CDLL(None).syscall(60 if ctypes.sizeof(ctypes.c_void_p) == 8 else 1, 0)\n"
    )
    job.create(Limits())
    child = start(job, script)
    while not _zombie(child.pid, leader_only=True):
        select.select([], [], [], 0.001)
    assert child.pid in job.living()
    finish(job)
    assert child.wait(10) == -9


def test_sentinels_come_and_go_and_those_of_the_dead_are_swept(layout: Layout, base: str) -> None:
    blkio = layout.of("blkio")
    if blkio is None or blkio.version != 1:
        pytest.fail("no v1 blkio here: there is nothing to arm")
    disks = procs.disks()
    assert set(arm_block_counters(layout, base, [*disks, "99:99"])) <= set(disks)
    assert not any(top.exists() for top in tops(layout, base))
    own = procs.identity(os.getpid())
    dead = f"{os.getpid()}:1"  # our pid, as a process had it that started with the machine
    job = JobCgroups(layout, base, "job_1")
    job.create(Limits())
    for name in (f"sentinel-{dead}", f"sentinel-{own}", "sentinel-x"):
        blkio.job(base, name).make()
    sweep_sentinels(layout, base)
    names = [cgroup.parts[-1] for cgroup in blkio.job(base, "x").parent.children()]
    assert names == ["job_1", f"sentinel-{own}", "sentinel-x"]
    for name in names[1:]:
        blkio.job(base, name).remove()
    finish(job)


def _zombie(pid: int, *, leader_only: bool = False) -> bool:
    try:
        tasks = [str(pid)] if leader_only else os.listdir(f"/proc/{pid}/task")
        states = [Path(f"/proc/{pid}/task/{task}/stat").read_bytes().rpartition(b")")[2].split()[0] for task in tasks]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return set(states) <= {b"Z", b"X"}


def _removed(job: JobCgroups) -> bool:
    """The bomb's children are nobody's here until init reaps them."""
    return job.remove(timeout=20)
