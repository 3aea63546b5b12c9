"""Ending a job that does not want to end, on every layout that this host can stand for; and what nothing can end."""

import ctypes
import itertools
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import Layout, discover
from acctd.kernel import procs
from acctd.kernel.cgroupfs import CgroupDir
from acctd.model import Limits
from lab.outlaws import KINDS
from tests.kernel.conftest import BASE, REPO, Node, scrub
from tests.kernel.served import Served
from tests.kernel.test_block_io import fresh_loop

MIB = 1 << 20
_serial = itertools.count()
_PATIENCE = 60.0  # s, for what ends at once on a quiet host


def ways() -> dict[str, Layout]:
    """The host's layout and, where it has v1, what acctd would have to do with less of it."""
    host = discover()
    v1 = tuple(h for h in host.hierarchies if h.version == 1)
    found = {"host": host}
    if any("freezer" in h.controllers for h in v1):
        found["v1"] = Layout(v1)
        found["no freezer"] = Layout(tuple(h for h in v1 if "freezer" not in h.controllers))
        found["nor pids"] = Layout(tuple(h for h in v1 if {"memory", "cpu"} & set(h.controllers)))
    return found


WAYS = ways()
FREEZING = [way for way, layout in WAYS.items() if layout.of("freezer")]


def soon(true: Callable[[], object]) -> bool:
    """Whether something comes true."""
    deadline = time.monotonic() + _PATIENCE
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def state(pid: int) -> str:
    """Of its first thread; "" once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Lair:
    """A base of cgroups with outlaws in its jobs. Nothing is left at the end, or the test fails."""

    def __init__(self) -> None:
        self.base = f"{BASE}{os.getpid()}-k{next(_serial)}"
        self._children: list[subprocess.Popen[str]] = []

    def job(self, way: str, limits: Limits | None = None, name: str = "job_1") -> JobCgroups:
        job = JobCgroups(WAYS[way], self.base, name)
        job.create(limits or Limits(memory=64 * MIB))
        return job

    def start(self, job: JobCgroups, kind: str, uid: int = 0) -> subprocess.Popen[str]:
        """An outlaw that is what its kind says; ends by itself when all that comes from it has ended."""
        with job.joining() as doors:
            join = [f"--join={path}/cgroup.procs" for path in doors.values()]
        return self.run([sys.executable, "-I", "-S", str(REPO / "lab/outlaws.py"), *join, f"--uid={uid}", kind])

    def run(self, argv: list[str]) -> subprocess.Popen[str]:
        """A program that says "up"; ended at the end."""
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        return child

    def clear(self) -> None:
        left = [str(p) for h in discover().hierarchies if (p := h.top.path / self.base).exists()]
        scrub(self.base)
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.communicate()
        assert left == []


@pytest.fixture
def lair() -> Iterator[Lair]:
    made = Lair()
    yield made
    made.clear()


def limits_of(way: str, kind: str) -> Limits:
    """What keeps an outlaw from harming this host: a comet's dead count as long as nobody has collected them."""
    counted = WAYS[way].of("pids") is not None
    return Limits(memory=64 * MIB, cpu_shares=128, pids=64 if counted and kind == "comet" else None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hog"])
def test_every_outlaw_ends(lair: Lair, way: str, kind: str) -> None:
    job = lair.job(way, limits_of(way, kind))
    outlaw = lair.start(job, kind, uid=65534 if kind == "set-uid" else 0)
    if kind == "bomb":
        assert soon(lambda: len(job.procs()) > 30)
    elif kind == "set-uid":
        assert soon(lambda: [euid(pid) for pid in job.living()] == [(65534, 0)])
    elif kind == "leader":
        assert soon(lambda: [state(pid) for pid in job.living()] == ["Z"])
    elif kind != "comet":
        assert soon(lambda: len(job.living()) == {"stopped": 2, "traced": 2, "parent": 2, "init": 4}.get(kind, 1))
    assert job.kill(_PATIENCE) == set()
    assert job.procs() == set()
    assert outlaw.wait(_PATIENCE) == 0  # says that nobody is left, wherever they went
    assert job.remove()


def test_a_job_is_never_taken_for_an_empty_one(lair: Lair) -> None:
    """One that forks and exits without end is gone whenever it is looked at; its job is not over for that."""
    job = lair.job("host", limits_of("host", "comet"))
    outlaw = lair.start(job, "comet")
    for _ in range(500):
        assert job.living()
    assert job.kill(_PATIENCE) == set()
    assert outlaw.wait(_PATIENCE) == 0
    assert job.remove()


def euid(pid: int) -> tuple[int, int]:
    """Real and effective uid."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:"))
    real, effective = line.split()[1:3]
    return int(real), int(effective)


@pytest.mark.parametrize("way", ["v1", "no freezer"])
def test_a_limit_on_processes_is_the_same_after_killing(lair: Lair, way: str) -> None:
    """Killing may forbid forks for a while; the job goes on when it was not finished."""
    job = lair.job(way, Limits(pids=20))
    outlaw = lair.start(job, "bomb")
    assert job.kill(_PATIENCE) == set()
    directory = job.directory("pids")
    assert directory is not None
    assert directory.read("pids.max") == b"20\n"
    assert outlaw.wait(_PATIENCE) == 0
    assert job.remove()


@pytest.mark.parametrize("way", FREEZING)
def test_a_suspended_job_ends(lair: Lair, way: str) -> None:
    job = lair.job(way)
    outlaw = lair.start(job, "deaf")
    job.freeze()
    assert job.kill(_PATIENCE) == set()
    assert outlaw.wait(_PATIENCE) == 0
    assert job.remove()


@pytest.mark.parametrize("way", FREEZING)
def test_a_family_inside_a_suspended_job_ends_and_the_job_stays_suspended(lair: Lair, way: str) -> None:
    outer = lair.job(way)
    pilot = lair.start(outer, "deaf")
    inner = JobCgroups(WAYS[way], f"{lair.base}/job_1", "job_2")
    inner.create(Limits())
    payload = lair.start(inner, "deaf")
    outer.freeze()
    assert inner.kill(_PATIENCE) == set()
    assert payload.wait(_PATIENCE) == 0
    assert inner.remove()
    assert pilot.poll() is None
    assert soon(lambda: is_frozen(outer))
    assert outer.kill(_PATIENCE) == set()
    assert pilot.wait(_PATIENCE) == 0
    assert outer.remove()


def is_frozen(job: JobCgroups) -> bool:
    """By the kernel's own word."""
    directory = job.directory("freezer")
    assert directory is not None
    if directory.has("freezer.state"):
        return directory.read("freezer.state") == b"FROZEN\n"
    return b"frozen 1" in (directory.read("cgroup.events") or b"")


@pytest.mark.parametrize("way", FREEZING)
def test_what_the_job_has_frozen_by_itself_ends(lair: Lair, way: str) -> None:
    """Two levels of it, each by itself: a container manager inside the job, for one."""
    job = lair.job(way)
    outlaw = lair.start(job, "bomb")
    assert soon(lambda: len(job.procs()) > 10)
    directory = job.directory("freezer")
    assert directory is not None
    nested = [directory.child("a"), directory.child("a").child("b")]
    for cgroup, pid in zip(nested, sorted(job.procs()), strict=False):
        cgroup.make()
        cgroup.write("cgroup.procs", str(pid))
        freeze(cgroup)
    assert job.kill(_PATIENCE) == set()
    assert outlaw.wait(_PATIENCE) == 0
    assert job.remove()


def freeze(cgroup: CgroupDir) -> None:
    if cgroup.has("freezer.state"):
        cgroup.write("freezer.state", "FROZEN")
    else:
        cgroup.write("cgroup.freeze", "1")


@pytest.mark.parametrize("kind", ["hog", "bomb"])
@pytest.mark.parametrize("way", [way for way, layout in WAYS.items() if layout.kind != "v2"])
def test_a_job_that_waits_in_oom_ends(lair: Lair, way: str, kind: str) -> None:
    """With the kernel's own killer off, its processes wait in state D, and the freezer stays at FREEZING."""
    job = lair.job(way, Limits(memory=16 * MIB))
    memory = job.directory("memory")
    assert memory is not None
    memory.write("memory.oom_control", "1")
    outlaw = lair.start(job, kind)
    assert soon(lambda: b"under_oom 1" in (memory.read("memory.oom_control") or b""))
    if job.directory("freezer") is not None:
        job.freeze()
    assert job.kill(_PATIENCE) == set()
    assert outlaw.wait(_PATIENCE) == 0
    assert job.remove()


def test_a_process_that_takes_over_a_pid_is_not_killed(lair: Lair) -> None:
    """Neither with a pidfd nor, for a want of descriptors, without."""
    job = lair.job("host")
    child = lair.run(["sh", "-c", "echo up; read line"])

    def ours(pid: int) -> bool:
        return pid in job.living()

    assert not procs.end(child.pid, ours)
    job.attach(child.pid)
    assert procs.end(child.pid, ours)
    assert child.wait() == -signal.SIGKILL
    other = lair.run(["sh", "-c", "echo up; read line"])
    with no_descriptors():
        assert not procs.end(other.pid, lambda _: False)
        assert procs.end(other.pid, lambda _: True)
    assert other.wait() == -signal.SIGKILL
    assert not procs.end(other.pid, lambda _: True)
    assert job.remove()


@pytest.mark.parametrize("way", WAYS)
def test_a_process_does_not_leave_its_job_by_its_leaders_exit(lair: Lair, way: str) -> None:
    """v1 shows such a one at the top of every hierarchy, where those are who are in no job."""
    job = lair.job(way)
    outlaw = lair.start(job, "leader")
    assert soon(lambda: [state(pid) for pid in job.living()] == ["Z"])
    (pid,) = job.living()
    inside = [path for path in procs.cgroups(pid) if path.startswith(f"/{lair.base}/job_1")]
    assert len(inside) == len(WAYS[way].hierarchies)
    assert job.signal(signal.SIGKILL) == {pid}
    assert outlaw.wait(_PATIENCE) == 0
    assert job.remove()


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open nothing more."""
    taken: list[int] = []
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        yield
    finally:
        for fd in taken:
            os.close(fd)


# What nothing can end


@contextmanager
def frozen_disk(directory: Path) -> Iterator[Path]:
    """A file on a file system that takes no writes: whoever tries waits in state D. Mounted for nobody else."""
    image, mount = directory / "image", directory / "mount"
    mount.mkdir()
    with open(image, "wb") as empty:
        empty.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(image)], check=True)
    with fresh_loop(image) as loop:
        script = f"mount {loop.path} {mount} && echo up && exec cat"
        holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        place = Path(f"/proc/{holder.pid}/root{mount}")
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "up\n"
            (place / "file").write_bytes(bytes(mmap.PAGESIZE))
            subprocess.run(["fsfreeze", "--freeze", str(place)], check=True)
            yield place / "file"
        finally:
            thaw(place / "file")
            # Until the last writer has ended it is busy, and so would be the disk.
            leave = ["nsenter", f"--target={holder.pid}", "--mount", "umount", str(mount)]
            assert soon(lambda: subprocess.run(leave, check=False, capture_output=True).returncode == 0)
            holder.communicate()


def thaw(file: Path) -> None:
    """Let writers go on; those who have been told to die do that. Twice is fine."""
    subprocess.run(["fsfreeze", "--unfreeze", str(file.parent)], check=False, capture_output=True)


WRITER = ["sh", "-c", 'echo up; read line; exec dd if=/dev/zero of="$0" bs=1k count=1 conv=notrunc status=none']


def waits_to_write(pid: int) -> bool:
    """In state D, and not for a page of its own program, which comes."""
    return state(pid) == "D" and "vfs_write" in Path(f"/proc/{pid}/stack").read_text()


def test_a_process_in_state_d_is_named_with_what_it_waits_for(lair: Lair, tmp_path: Path) -> None:
    job = lair.job("host")
    with frozen_disk(tmp_path) as file:
        writer = lair.run([*WRITER, str(file)])
        job.attach(writer.pid)
        assert (found := procs.stuck(writer.pid)) is not None
        assert found.state in "SR"
        print(file=writer.stdin, flush=True)
        assert soon(lambda: waits_to_write(writer.pid))
        assert job.kill(timeout=0.05) == {writer.pid}
        found = procs.stuck(writer.pid)
        assert found is not None
        function = Path(f"/proc/{writer.pid}/wchan").read_text()
        stack = Path(f"/proc/{writer.pid}/stack").read_text()
        assert (found.pid, found.name, found.state, found.function) == (writer.pid, "dd", "D", function)
        assert found.callers
        assert all(f" {caller}+" in stack for caller in found.callers)
        assert f"process {writer.pid} (dd) is in state D, waiting in {function}, called by " in str(found)
        thaw(file)
        assert writer.wait(_PATIENCE) == -signal.SIGKILL
    assert procs.stuck(writer.pid) is None
    assert job.kill(_PATIENCE) == set()
    assert job.remove()


def test_one_that_a_tracer_outside_holds_is_named_with_its_tracer(lair: Lair) -> None:
    job = lair.job("host")
    outlaw = lair.start(job, "deaf")
    (pid,) = job.living()
    libc = ctypes.CDLL(None, use_errno=True)
    seize, interrupt, exit_stops = 0x4206, 0x4207, ctypes.c_void_p(0x40)
    assert libc.ptrace(seize, pid, None, exit_stops) == 0, os.strerror(ctypes.get_errno())
    assert libc.ptrace(interrupt, pid, None, None) == 0
    assert soon(lambda: state(pid) == "t")
    left = job.kill(timeout=0.2)
    own = f"process {os.getpid()} ({Path('/proc/self/comm').read_text().strip()})"
    assert left == {pid}
    assert f"process {pid} (" in str(procs.stuck(pid))
    assert "is in state t, waiting in ptrace_stop, called by " in str(procs.stuck(pid))
    assert str(procs.stuck(pid)).endswith(f", held by its tracer, {own}, which has to end or let it go")
    os.waitpid(pid, 0)
    libc.ptrace(7, pid, None, None)  # PTRACE_CONT
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert job.kill(_PATIENCE) == set()
    assert outlaw.wait(_PATIENCE) == 0
    assert job.remove()


def test_a_stuck_process_is_shown_on_one_line_and_without_waiting(tmp_path: Path) -> None:
    """Its name can hold anything, and its stack may be one that cannot be read now."""
    task = tmp_path / "proc" / "42" / "task" / "42"
    task.mkdir(parents=True)
    (task / "stat").write_bytes(b"42 (a) b\n\x1b[2J\xff) D 1 42 42 0 -1")
    (task / "status").write_bytes(b"Name:\ta) b\\n\nTracerPid:\t0\n")
    (task / "wchan").write_bytes(b"0")
    os.mkfifo(task / "stack")
    assert str(procs.stuck(42, tmp_path)) == "process 42 (a) b??[2J\N{REPLACEMENT CHARACTER}) is in state D"
    os.close(os.open(task / "stack", os.O_RDWR))  # lets the reader go, who waits for somebody to write
    (task / "stat").write_bytes(b"42 (gone) Z 1 42 42 0 -1")
    assert procs.stuck(42, tmp_path) is None


def test_a_process_that_holds_the_lock_on_its_memory_holds_up_nobody(lair: Lair, tmp_path: Path) -> None:
    """One thread waits for the disk below a mapping, another to unmap it: ps hangs on such a process."""
    script = (
        "import ctypes, sys, threading, time\n"
        "libc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p\n"
        "libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_long] * 5]\n"
        "libc.munmap.argtypes = libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "place = libc.mmap(None, 4096, 3, 1, file.fileno(), 0)\n"
        "ctypes.string_at(place, 1)\n"
        "threading.Thread(target=libc.memset, args=(place, 1, 1)).start()\n"
        "time.sleep(0.2)\n"  # late or early, it is the same
        "threading.Thread(target=libc.munmap, args=(place, 4096, 0)).start()\n"
        "print('up', flush=True)\ntime.sleep(1000)\n"
    )
    with frozen_disk(tmp_path) as file:
        child = lair.run([sys.executable, "-I", "-S", "-c", script, str(file)])
        assert soon(lambda: [state(int(task)) for task in os.listdir(f"/proc/{child.pid}/task")].count("D") == 2)
        assert procs.environment(child.pid) == set()
        found = procs.stuck(child.pid)
        assert found is not None
        assert found.state == "D"
        thaw(file)
        assert soon(lambda: procs.environment(child.pid))
        child.kill()


@pytest.fixture
def agent(node: Node) -> Iterator[Served]:
    served = Served(node, None)  # type: ignore[arg-type]  # start() sets it
    served.start()
    yield served
    if served.process.poll() is None:
        assert served.stop() == 0


def test_one_that_does_not_die_is_recorded_retried_and_holds_up_nobody(
    agent: Served, lair: Lair, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as callers, frozen_disk(tmp_path) as file:
        agent.ok("Create", job="stuck")
        writer = lair.run([*WRITER, str(file)])
        agent.ok("Attach", job="stuck", pid=writer.pid)
        print(file=writer.stdin, flush=True)
        assert soon(lambda: waits_to_write(writer.pid))
        function = Path(f"/proc/{writer.pid}/wchan").read_text()
        why = f"process {writer.pid} (dd) is in state D, waiting in {function}, called by "

        killing = callers.submit(agent.ok, "Kill", job="stuck")
        lives = others_meanwhile(agent, lair, killing)
        assert killing.result()["survivors"] == [writer.pid]
        assert lives > 3
        assert [
            e["text"]
            for e in events(agent, "stuck", "killed")
            if f"by uid 0; SIGKILL did not end all of it: {why}" in e["text"]
        ]

        finishing = callers.submit(agent.ok, "Finish", job="stuck", exit_signal=9)
        lives = others_meanwhile(agent, lair, finishing)
        record = finishing.result()["record"]
        assert lives > 3
        (note,) = record["notes"]
        assert f"SIGKILL did not end all of it, and what goes on is not counted: {why}" in note
        assert [
            e["text"]
            for e in events(agent, None, "trouble")
            if f"job stuck: its cgroups are still busy: {why}" in e["text"]
        ]

        # It is nobody's job any more, but its name is not free yet; a restart forgets neither.
        assert agent.ok("List")["jobs"] == []
        assert agent.stop() == 0
        agent.start()
        agent.ok("Snapshot")
        assert agent.call("Create", job="stuck")["error"].endswith(".InUse")
        assert events(agent, "stuck", "removed") == []

        thaw(file)
        assert writer.wait(_PATIENCE) == -signal.SIGKILL
        assert soon(lambda: agent.ok("Snapshot") and events(agent, "stuck", "removed"))
        assert agent.node.left()["cgroups"] == []
        agent.ok("Snapshot")
        assert len(events(agent, "stuck", "removed")) == 1
        assert agent.ok("Finish", job="stuck", exit_signal=9)["record"] == record


def others_meanwhile(agent: Served, lair: Lair, waiting: "Future[dict[str, Any]]") -> int:
    """Whole lives of other jobs while one call has no answer yet; twenty at most, for the agent writes of each."""
    lives = 0
    while not waiting.done() and lives < 20:
        name = f"other-{next(_serial)}"
        agent.ok("Create", job=name, network="host")
        child = lair.run(["sh", "-c", "echo up; read line"])
        agent.ok("Attach", job=name, pid=child.pid)
        assert agent.ok("Usage", job=name)["job"]["pids"] == [child.pid]
        assert agent.ok("Finish", job=name, exit_signal=9)["record"]["notes"] == []
        assert child.wait(_PATIENCE) == -signal.SIGKILL
        lives += 1
    return lives


def events(agent: Served, job: str | None, kind: str) -> list[dict[str, Any]]:
    found = agent.ok("Events", job=job)["events"] if job else agent.ok("Events")["events"]
    return [event for event in found if event["event"] == kind]
