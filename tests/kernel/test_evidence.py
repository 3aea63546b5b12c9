"""Evidence of a shortage, from real cgroups and processes: the kinds against the usage, and who had most."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from acctd.cgroup import evidence
from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import discover
from acctd.kernel.cgroupfs import CgroupDir
from acctd.model import Limits
from tests.kernel.conftest import BASE, REPO, scrub

MIB = 1 << 20
PATIENCE = 60.0
LOAD = str(REPO / "lab" / "load.py")

LATE = 2 * 64 * os.sysconf("SC_PAGE_SIZE") * (os.cpu_count() or 1)
"""What memory.stat may be behind, and what the kernel charges ahead: 64 pages a CPU each. mm/memcontrol.c."""

_serial = itertools.count()

JOIN = "import os, sys\nfor path in sys.argv[1].split('|'): open(path, 'w').write('0')\n"

SAY = "print('ready', flush=True); sys.stdin.read()\n"

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def job() -> Iterator[JobCgroups]:
    base = f"{BASE}{os.getpid()}-e{next(_serial)}"
    made = JobCgroups(discover(), base, "job_1")
    made.create(Limits(memory=96 * MIB))
    try:
        yield made
    finally:
        scrub(base)


@pytest.fixture
def memory(job: JobCgroups) -> CgroupDir:
    directory = job.directory("memory")
    assert directory is not None
    return directory


@pytest.fixture
def start(job: JobCgroups) -> Iterator[Start]:
    """Start Python in the job: a script that says a line when it is ready, and ends when its input does."""
    with ExitStack() as stack:

        def starter(script: str, *arguments: str) -> subprocess.Popen[str]:
            with job.joining() as doors:
                paths = "|".join(f"{path}/cgroup.procs" for path in doors.values())
            argv = [sys.executable, "-c", JOIN + script, paths, *arguments]
            child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(child.communicate)
            return child

        yield starter
        # All of them first: whoever holds the pipe would be waited for.
        assert job.kill() == set()


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline()


def usage(directory: CgroupDir) -> int:
    text = directory.read("memory.usage_in_bytes") or directory.read("memory.current")
    assert text is not None
    return int(text)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def breakdown(directory: CgroupDir) -> dict[str, int]:
    kinds = evidence.breakdown(directory)
    assert kinds is not None
    return kinds


def test_the_kinds_come_to_what_is_in_use(memory: CgroupDir, start: Start, tmp_path: Path) -> None:
    wanted = {"anon": 20 * MIB, "shmem": 8 * MIB, "file": 4 * MIB}
    sizes = ("--anon", str(wanted["anon"]), "--shm", str(wanted["shmem"]), "--file", str(wanted["file"]))
    script = f"os.execv(sys.executable, [sys.executable, {LOAD!r}, '--hold', *sys.argv[2:]])"
    child = start(script, *sizes, "--directory", str(tmp_path))
    assert json.loads(line(child))["anon"] == wanted["anon"]

    def counted(kinds: dict[str, int]) -> bool:
        # The file is shared memory where it lies on a tmpfs.
        off = (kinds["anon"] - wanted["anon"], kinds["shmem"] + kinds["file"] - wanted["shmem"] - wanted["file"])
        return max(map(abs, off)) <= LATE and kinds["shmem"] >= wanted["shmem"] - LATE

    until(lambda: counted(breakdown(memory)))
    kinds, used = breakdown(memory), usage(memory)
    apart = sum(kinds.get(kind, 0) for kind in ("anon", "shmem", "file", "kernel", "sock"))
    print(f"\nin use {used}, kinds {apart}, {kinds}")
    assert abs(apart - used) <= LATE
    assert kinds["swap"] == 0
    assert kinds["file_dirty"] + kinds["file_writeback"] <= kinds["file"]
    for part in ("kernel_stack", "pagetables", "slab"):
        assert kinds.get(part, 0) <= kinds["kernel"]


def test_nested_cgroups_are_within_and_a_gone_one_has_none(memory: CgroupDir, job: JobCgroups, start: Start) -> None:
    child = start(f"block = bytearray({10 * MIB}); {SAY}")
    assert line(child) == "ready\n"
    until(lambda: breakdown(memory)["anon"] >= 10 * MIB - LATE)
    above = breakdown(memory.parent)
    assert above["anon"] >= 10 * MIB - LATE
    child.communicate("")
    assert job.kill() == set()
    assert job.remove()
    assert evidence.breakdown(memory) is None


def test_the_ten_largest_in_order(job: JobCgroups, start: Start) -> None:
    before = time.time()
    children = [start(f"block = bytearray({size * MIB}); {SAY}") for size in (3, 1, 7, 2, 9, 4, 0, 8, 5, 6, 0, 0)]
    for child in children:
        assert line(child) == "ready\n"
    sizes = {child.pid: resident(child.pid) for child in children}
    found = evidence.largest(job.procs(), budget=PATIENCE)
    assert found.unseen == 0
    assert len(found.processes) == 10
    assert [process.pid for process in found.processes[:9]] == sorted(sizes, key=lambda pid: -sizes[pid])[:9]
    assert found.processes[9].pid in sizes
    tick = 1 / os.sysconf("SC_CLK_TCK")
    for process in found.processes:
        # By another count of the kernel's, which walks the page tables: since 6.2 the quick one is a little late.
        assert abs(process.resident - sizes[process.pid]) <= LATE
        assert process.name == Path(f"/proc/{process.pid}/comm").read_text().removesuffix("\n")
        # Ticks are rounded down.
        assert before - 2 * tick <= process.started <= time.time() + tick
    first = [process.pid for process in found.processes]
    assert [process.pid for process in evidence.largest(job.procs(), 2, PATIENCE).processes] == first[:2]


def resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith("Rss:"))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b") R 1 1 (", ") R 1 1 ("),
        (b"two\nlines", "two\nlines"),
        (b"\nTgid:\t1\nx", "\nTgid:\t1\nx"),
        (b"caf\xe9", "caf\ufffd"),
        (b"\x1b[31mred", "\x1b[31mred"),
        ("加速器".encode(), "加速器"),
        (b"twenty characters long", "twenty characte"),
    ],
)
def test_a_name_is_told_whatever_is_in_it(job: JobCgroups, start: Start, name: bytes, shown: str) -> None:
    rename = f"import ctypes; ctypes.CDLL(None).prctl(15, {name!r}, 0, 0, 0)\n"  # PR_SET_NAME
    child = start(rename + SAY)
    assert line(child) == "ready\n"
    (process,) = evidence.largest(job.procs(), budget=PATIENCE).processes
    assert (process.pid, process.name) == (child.pid, shown)
    json.dumps(process.name).encode()


def test_threads_zombies_and_the_gone_are_no_processes(job: JobCgroups, start: Start) -> None:
    threads = "import threading; [threading.Thread(target=sys.stdin.read).start() for _ in range(3)]\n"
    zombie = "pid = os.fork()\nif not pid: os._exit(0)\nos.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)\n"
    child = start(threads + zombie + "print(pid, flush=True); sys.stdin.read()")
    dead = int(line(child))
    tasks = [int(task) for task in os.listdir(f"/proc/{child.pid}/task")]
    assert len(tasks) == 4
    gone = subprocess.Popen(["true"])
    gone.wait()
    found = evidence.largest({dead, gone.pid, *tasks}, budget=PATIENCE)
    assert [process.pid for process in found.processes] == [child.pid]
    assert found.unseen == 0


def test_hundreds_of_processes(job: JobCgroups, start: Start) -> None:
    """The largest is the last of 302; without time for all, it is said how many were left."""
    forks = (
        "import subprocess\n"
        "for i in range(300):\n"
        "    subprocess.Popen(['sleep', '1000'])\n"
        "pid = os.fork()\n"
        f"block = bytearray(0 if pid else {10 * MIB})\n"
        "print(pid, flush=True); sys.stdin.read()\n"
    )
    child = start(forks)
    last = max(int(line(child)) for _ in range(2))
    pids = job.procs()
    assert len(pids) == 302
    took = []
    for _ in range(20):
        began = time.perf_counter()
        found = evidence.largest(pids, budget=PATIENCE)
        took.append((time.perf_counter() - began) * 1000)
        assert found.processes[0].pid == last
        assert len(found.processes) == 10
        assert found.unseen == 0
    began = time.perf_counter()
    hurried = evidence.largest(pids)
    short = (time.perf_counter() - began) * 1000
    print(
        f"\n302 processes: {min(took):.2f} to {max(took):.2f} ms; in the budget {short:.2f} ms, unseen {hurried.unseen}"
    )
    none = evidence.largest(pids, budget=-1)
    assert none == evidence.Largest((), 302)


# What a job may be doing when its memory runs out: touching pages, the same in threads while others change the
# mappings, or in many processes. What the kernel touches for it does not wait on v1: read(2) fails there with EFAULT.
HOGS = {
    "touching": "blocks = []\nwhile True: blocks.append(bytearray(1 << 20))",
    "mapping": (
        "import mmap, threading\n"
        "def maps():\n"
        "    while True: mmap.mmap(-1, 1 << 20).close()\n"
        "def grows():\n"
        "    blocks = []\n"
        "    while True: blocks.append(bytearray(1 << 20))\n"
        "for each in (maps, grows, maps, grows): threading.Thread(target=each).start()"
    ),
    "forking": "for _ in range(4): os.fork()\nblocks = []\nwhile True: blocks.append(bytearray(1 << 20))",
}


@pytest.mark.parametrize("hog", HOGS)
def test_nothing_waits_for_a_job_that_waits_for_memory(
    memory: CgroupDir, job: JobCgroups, start: Start, hog: str
) -> None:
    """v1: its tasks wait until somebody acts. v2: they are slowed down above memory.high, below the limit."""
    if memory.has("memory.oom_control"):
        memory.write("memory.oom_control", "1")
    else:
        memory.write("memory.high", str(32 * MIB))
    start("print('begun', flush=True)\n" + HOGS[hog])

    def waits() -> bool:
        if (control := memory.read("memory.oom_control")) is not None:
            return b"under_oom 1" in control
        return b"high 0\n" not in (memory.read("memory.events") or b"high 0\n")

    until(waits)
    taken: list[object] = []

    def take() -> None:
        pids = job.procs()
        taken.append(evidence.largest(pids, budget=PATIENCE))
        taken.append(evidence.breakdown(memory))

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert waits()
    assert len(taken) == 2, "it waits"
    largest, kinds = taken
    assert isinstance(largest, evidence.Largest)
    assert isinstance(kinds, dict)
    assert largest.unseen == 0
    assert len(largest.processes) == min(10, len(job.procs()))
    assert kinds["anon"] >= 16 * MIB
    assert job.kill() == set()
