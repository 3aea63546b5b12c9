"""The guardian on a living kernel: what waits in OOM (v1) or is frozen is let go, whatever became of its keeper.

That something does not happen is shown beside a witness, a job for which it does happen, and later.
"""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from acctd.cgroup.layout import discover
from acctd.guard import Deed, released
from acctd.guardian import ENDLESS, Memory
from acctd.kernel.cgroupfs import CgroupDir
from tests.kernel.conftest import BASE, REPO, scrub

MIB = 1 << 20
PATIENCE = 60.0  # s until a wait is a failure; nothing is concluded from how long it took
_serial = itertools.count()

KEEPER = """
import json, os, select, signal, sys
from pathlib import Path
from acctd.guard import Guard
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as acctd run does
guard = Guard(Path(sys.argv[1]), lambda e: print(json.dumps({"trouble": str(e)}), flush=True))
while True:
    for fd in select.select([0, guard] if sys.argv[2] == "attentive" else [0], [], [])[0]:
        if fd is guard:
            for deed in guard.news():
                print(json.dumps({"name": deed.name, "what": deed.what, "text": deed.text}), flush=True)
                deed.remove()
            continue
        line = sys.stdin.readline()
        if not line:
            guard.close()
            sys.exit()
        call = json.loads(line)
        fields = [Path(field) if str(field)[0] == "/" else field for field in call[1:]]
        getattr(guard, call[0])(*fields)
        print(json.dumps("done"), flush=True)
"""

HOG = """
import sys
with open(sys.argv[1] + "/cgroup.procs", "w") as door:
    door.write("0")
kept = bytearray(int(sys.argv[2]))
print("full", flush=True)
sys.stdin.read()
"""


def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


class Bench:
    """A base of the test's own, its keepers and its hogs."""

    def __init__(self, directory: Path) -> None:
        self.runtime = directory / "run"
        self.base = f"{BASE}{os.getpid()}-guardian-{next(_serial)}"
        self.guardians: list[psutil.Process] = []
        self.stack = ExitStack()
        self.stack.callback(scrub, self.base)

    def cgroup(self, name: str, controller: str = "memory") -> Path:
        hierarchy = discover().of(controller)
        assert hierarchy is not None
        top = CgroupDir(hierarchy.top.mount, (self.base,))
        top.make()
        directory = top.child(name)
        assert directory.make()
        return directory.path

    def waiting_room(self, name: str, mib: int = 16) -> Path:
        """A cgroup whose tasks wait in OOM."""
        directory = self.cgroup(name)
        (directory / "memory.limit_in_bytes").write_text(str(mib * MIB))
        (directory / "memory.oom_control").write_text("1")
        return directory

    def hog(self, directory: Path, mib: int = 64) -> subprocess.Popen[str]:
        """A process that wants so much."""
        argv = [sys.executable, "-c", HOG, str(directory), str(mib * MIB)]
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.stack.callback(child.wait)
        self.stack.callback(child.kill)
        return child

    def keeper(self, *, attentive: bool = True) -> "Keeper":
        return Keeper(self, "attentive" if attentive else "silent")

    def deeds(self) -> list[tuple[str, str]]:
        return [(deed.name, deed.what) for deed in self.traces()]

    def traces(self) -> list[Deed]:
        return released(self.runtime)

    def until_deed(self, name: str, what: str) -> None:
        until(lambda: (name, what) in self.deeds(), f"{name} is not {what}: {self.deeds()}")


class Keeper:
    """A process with a guard, told what to do."""

    def __init__(self, bench: Bench, manner: str) -> None:
        self.bench = bench
        self.process = subprocess.Popen(
            [sys.executable, "-c", KEEPER, str(bench.runtime), manner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )
        bench.stack.callback(self.process.wait)
        bench.stack.callback(self.process.kill)
        self.told: list[dict[str, str]] = []

    def do(self, method: str, *arguments: object) -> None:
        assert self.process.stdin is not None
        fields = [str(a) if isinstance(a, Path) else a for a in arguments]
        self.process.stdin.write(json.dumps([method, *fields]) + "\n")
        self.process.stdin.flush()
        while (said := self.line()) != "done":
            self.told.append(said)  # type: ignore[arg-type]  # a line that is not "done" is an object
        for child in psutil.Process(self.process.pid).children():
            if child not in self.bench.guardians:
                self.bench.guardians.append(child)

    def line(self) -> object:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the keeper ended"
        return json.loads(line)

    def hears(self, **words: str) -> dict[str, str]:
        """What it was told of that has these words; waits for it."""
        while True:
            for said in self.told:
                if words.items() <= said.items():
                    return said
            self.told.append(self.line())  # type: ignore[arg-type]

    @property
    def guardian(self) -> psutil.Process:
        return self.bench.guardians[-1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(PATIENCE) == 0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Nothing of it may be left: cgroups, processes."""
    made = Bench(tmp_path)
    with made.stack:
        yield made
        made.stack.close()
        for guardian in made.guardians:
            until(lambda it=guardian: not alive(it), f"{guardian} stays though its jobs are gone")  # type: ignore[misc]
    for guardian in made.guardians:
        assert not alive(guardian)


@pytest.fixture
def v1(bench: Bench) -> Bench:
    memory = discover().of("memory")
    if memory is None or memory.version != 1:
        pytest.skip("on v2 nothing waits in OOM")
    return bench


def alive(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def waits(directory: Path) -> bool:
    return "under_oom 1" in (directory / "memory.oom_control").read_text()


def is_patient(directory: Path) -> bool:
    """Whether the kernel's killer is off."""
    return "oom_kill_disable 1" in (directory / "memory.oom_control").read_text()


def until_waits(directory: Path) -> None:
    until(lambda: waits(directory), f"{directory} does not run out of memory")


@pytest.mark.parametrize("fate", ["speaks", "silent", "killed", "stopped"])
def test_a_job_that_waits_is_released_at_its_deadline(v1: Bench, fate: str) -> None:
    keeper = v1.keeper(attentive=fate == "speaks")
    room = v1.waiting_room("job")
    keeper.do("watch", "job_1", room, 1.0)
    begun = time.monotonic()
    hog = v1.hog(room)
    if fate in ("killed", "stopped"):
        until_waits(room)
        os.kill(keeper.process.pid, signal.SIGKILL if fate == "killed" else signal.SIGSTOP)
    assert hog.wait(PATIENCE) == -signal.SIGKILL
    assert time.monotonic() - begun >= 1.0, "released before its deadline"
    assert not is_patient(room)
    if fate == "speaks":
        said = keeper.hears(name="job_1")
        assert said["what"] == "released" and said["text"].startswith("it had waited in OOM for 1.")
        assert v1.deeds() == []  # it removed the trace
    else:
        v1.until_deed("job_1", "released")
        (deed,) = v1.traces()
        assert abs(deed.time - time.time()) < PATIENCE
        assert deed.trace is not None and deed.trace.stat().st_mode & 0o777 == 0o600
        deed.remove()
        assert v1.traces() == []
    if fate == "stopped":
        os.kill(keeper.process.pid, signal.SIGCONT)


def test_a_job_that_is_dealt_with_in_time_is_let_be(v1: Bench) -> None:
    """Its limit is raised, or it is killed; or nobody wants it watched any more."""
    keeper = v1.keeper(attentive=False)
    rooms = {name: v1.waiting_room(name) for name in ("raised", "killed", "forgotten", "witness")}
    for name, room in rooms.items():
        keeper.do("watch", name, room, 2.0 if name != "witness" else 2.5)
    hogs = {name: v1.hog(room) for name, room in rooms.items()}
    for name in ("raised", "killed", "forgotten", "witness"):
        until_waits(rooms[name])
    (rooms["raised"] / "memory.limit_in_bytes").write_text(str(100 * MIB))
    hogs["killed"].kill()
    keeper.do("forget", "forgotten")
    v1.until_deed("witness", "released")
    assert v1.deeds() == [("witness", "released")]
    out = hogs["raised"].stdout
    assert out is not None and out.readline() == "full\n"
    assert all(is_patient(rooms[name]) for name in ("raised", "killed", "forgotten"))
    assert waits(rooms["forgotten"])


def test_each_event_gives_the_whole_deadline_but_not_for_ever(v1: Bench) -> None:
    """On a clock of the test's own, in seconds."""
    room = v1.waiting_room("job")
    memory = Memory(b"job", b"10", os.fsencode(room / "memory.oom_control"))
    v1.stack.callback(memory.close)
    memory.heard(0.0)
    assert memory.began is None
    hog = v1.hog(room)
    until_waits(room)
    memory.heard(100.0)
    assert [memory.due(now) for now in (100.0, 109.9, 110.0)] == [False, False, True]
    memory.heard(109.0)  # reached again
    assert [memory.due(now) for now in (111.0, 118.9, 119.0)] == [False, False, True]
    (room / "memory.limit_in_bytes").write_text(str(100 * MIB))
    assert hog.stdout is not None and hog.stdout.readline() == "full\n"
    assert not memory.due(118.0) and memory.began is None
    hog.kill()
    hog.wait()
    (room / "memory.limit_in_bytes").write_text(str(16 * MIB))
    v1.hog(room)
    until_waits(room)
    for now in range(200, 200 + 10 * ENDLESS, 5):
        memory.heard(float(now))
        assert not memory.due(float(now))
    memory.heard(200.0 + 10 * ENDLESS)
    assert memory.due(200.0 + 10 * ENDLESS), "events without end keep it from being released"


def test_what_a_job_lacks_is_not_put_down_to_a_family_in_it(v1: Bench) -> None:
    keeper = v1.keeper(attentive=False)
    outer = v1.waiting_room("outer")
    inner = outer / "inner"
    inner.mkdir()
    (inner / "memory.limit_in_bytes").write_text(str(100 * MIB))
    assert is_patient(inner), "the kernel hands it down"
    keeper.do("watch", "inner", inner, 0.2)
    keeper.do("watch", "outer", outer, 1.5)
    hog = v1.hog(inner)
    assert hog.wait(PATIENCE) == -signal.SIGKILL
    v1.until_deed("outer", "released")
    assert v1.deeds() == [("outer", "released")] and is_patient(inner)
    # Its own limit is another matter.
    (inner / "memory.limit_in_bytes").write_text(str(8 * MIB))
    assert v1.hog(inner).wait(PATIENCE) == -signal.SIGKILL
    v1.until_deed("inner", "released")


def test_a_guardian_that_dies_is_replaced(v1: Bench) -> None:
    keeper = v1.keeper()
    room, other = v1.waiting_room("job"), v1.waiting_room("other")
    keeper.do("watch", "job", room, 2.0)
    first = keeper.guardian
    keeper.do("watch", "other", other, 2.0)
    hog = v1.hog(room)
    until_waits(room)
    first.kill()
    assert "ended with -9" in keeper.hears()["trouble"]
    assert hog.wait(PATIENCE) == -signal.SIGKILL
    assert keeper.hears(name="job")["what"] == "released"
    assert v1.hog(other).wait(PATIENCE) == -signal.SIGKILL
    assert keeper.hears(name="other")["what"] == "released"
    keeper.do("forget", "job")
    assert keeper.guardian != first


def test_a_next_keeper_has_the_whole_deadline(v1: Bench) -> None:
    first, second = v1.keeper(), v1.keeper()
    room, witness = v1.waiting_room("job"), v1.waiting_room("witness")
    first.do("watch", "job", room, 2.0)
    first.do("watch", "witness", witness, 2.0)
    old = first.guardian
    hog = v1.hog(room)
    until_waits(room)
    first.kill()
    second.do("watch", "job", room, 600.0)
    assert v1.hog(witness).wait(PATIENCE) == -signal.SIGKILL
    v1.until_deed("witness", "released")
    assert v1.deeds() == [("witness", "released")] and waits(room), "released by the guardian of a dead keeper"
    # That one goes as soon as it sees that nothing is its own any more.
    scrub(f"{v1.base}/witness")
    assert not witness.exists()
    until(lambda: not alive(old), "the guardian of a dead keeper stays")
    assert alive(second.guardian) and hog.poll() is None


def test_keepers_that_leave(v1: Bench) -> None:
    """An idle guardian ends with its keeper; one with a job stays until the job is gone, and does its work."""
    idle, busy = v1.keeper(), v1.keeper()
    room = v1.waiting_room("job")
    idle.do("watch", "job", room, 600.0)
    idle.do("forget", "job")
    idle.leave()
    assert not alive(v1.guardians[0])
    busy.do("watch", "job", room, 0.5)
    busy.leave()
    assert alive(busy.guardian)
    assert v1.hog(room).wait(PATIENCE) == -signal.SIGKILL
    v1.until_deed("job", "released")
    assert alive(busy.guardian)
    scrub(v1.base)
    until(lambda: not alive(busy.guardian), "the guardian stays though its job is gone")


def test_sigterm_without_a_keeper_lets_all_go(v1: Bench) -> None:
    keeper = v1.keeper()
    room, idle = v1.waiting_room("waiting"), v1.waiting_room("idle")
    keeper.do("watch", "waiting", room, 600.0)
    keeper.do("watch", "idle", idle, 600.0)
    hog = v1.hog(room)
    until_waits(room)
    for number in (signal.SIGINT, signal.SIGHUP):
        keeper.guardian.send_signal(number)
    keeper.kill()
    # It must have seen that: with a keeper it would leave the jobs to that and to the next guardian.
    until(lambda: not reads_lines(keeper.guardian), "it does not see its keeper's end")
    keeper.guardian.terminate()
    assert hog.wait(PATIENCE) == -signal.SIGKILL
    until(lambda: len(v1.deeds()) == 2, "no traces")
    assert sorted(v1.deeds()) == [("idle", "unguarded"), ("waiting", "released")]
    assert not is_patient(idle)


def reads_lines(guardian: psutil.Process) -> bool:
    """Whether its epoll still has descriptor 0."""
    infos = []
    for fd in os.listdir(f"/proc/{guardian.pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            infos.append(Path(f"/proc/{guardian.pid}/fdinfo/{fd}").read_text())
    return any(line.split()[:2] == ["tfd:", "0"] for info in infos for line in info.splitlines())


def test_an_idle_guardian_does_nothing(v1: Bench) -> None:
    """Also for a job in OOM that does not wait, and after one that was released."""
    idle, busy = v1.keeper(), v1.keeper(attentive=False)
    room, other, witness = v1.waiting_room("room"), v1.waiting_room("other"), v1.waiting_room("witness")
    idle.do("watch", "room", room, 0.5)
    guardian = idle.guardian
    assert v1.hog(room).wait(PATIENCE) == -signal.SIGKILL
    assert idle.hears(name="room")["what"] == "released"
    idle.do("watch", "other", other, 0.5)
    until(lambda: guardian.status() == psutil.STATUS_SLEEPING and sees(guardian, other), "not watched")
    before = guardian.num_ctx_switches().voluntary
    busy.do("watch", "witness", witness, 1.0)
    v1.hog(witness)
    v1.until_deed("witness", "released")
    assert guardian.num_ctx_switches().voluntary == before


def sees(guardian: psutil.Process, directory: Path) -> bool:
    """Whether it has the file open, and is asleep in epoll_wait after that."""
    held = set()
    for fd in os.listdir(f"/proc/{guardian.pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            held.add(os.readlink(f"/proc/{guardian.pid}/fd/{fd}"))
    wanted = f"{directory}/memory.oom_control"
    return wanted in held and Path(f"/proc/{guardian.pid}/wchan").read_text() in ("ep_poll", "do_epoll_wait", "0")


def test_what_it_cannot_watch_is_told(v1: Bench) -> None:
    keeper = v1.keeper()
    first, second = v1.waiting_room("first"), v1.waiting_room("second")
    keeper.do("watch", "first", first, 600.0)
    until(lambda: sees(keeper.guardian, first), "not watched")
    most = max(int(fd) for fd in os.listdir(f"/proc/{keeper.guardian.pid}/fd")) + 2
    resource.prlimit(keeper.guardian.pid, resource.RLIMIT_NOFILE, (most, most))
    keeper.do("watch", "second", second, 600.0)
    said = keeper.hears(name="second")
    assert said["what"] == "unguarded" and "Too many open files" in said["text"]
    keeper.do("watch", "gone", v1.runtime, 600.0)
    assert keeper.hears(name="gone")["what"] == "unguarded"


def test_it_stands_apart(v1: Bench) -> None:
    """In a session of its own, with nothing of its keeper's that it could hold up."""
    keeper = v1.keeper()
    keeper.do("watch", "job", v1.waiting_room("job"), 600.0)
    pid = keeper.guardian.pid
    until(lambda: sees(keeper.guardian, discover_room(v1)), "not watched")
    assert os.getsid(pid) == pid and os.readlink(f"/proc/{pid}/cwd") == "/"
    links = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert links["2"] == "/dev/null"
    kept = {os.readlink(f"/proc/{os.getpid()}/fd/{fd}") for fd in ("0", "1", "2")}
    assert not {link for link in links.values() if link != "/dev/null"} & kept
    blocked = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigBlk:")]
    assert blocked == ["SigBlk:\t0000000000000000"]


def discover_room(bench: Bench) -> Path:
    memory = discover().of("memory")
    assert memory is not None
    return memory.job(bench.base, "job").path


FREEZERS = {1: ("freezer.state", "FROZEN", "THAWED"), 2: ("cgroup.freeze", "1", "0")}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("fate", ["silent", "killed", "stopped", "thawed"])
def test_a_frozen_job_is_thawed_at_its_deadline(bench: Bench, version: int, fate: str) -> None:
    keeper = bench.keeper(attentive=False)
    job, witness = (freezing(bench, version, name) for name in ("job", "witness"))
    file, frozen, thawed = FREEZERS[version]
    for name, place in (("job", job), ("witness", witness)):
        keeper.do("frozen", name, place / file, thawed, 0.5 if name == "job" else 1.0)
        (place / file).write_text(frozen)
        until(lambda at=place: stands_still(at, version), "it is not frozen")  # type: ignore[misc]
    if fate in ("killed", "stopped"):
        os.kill(keeper.process.pid, signal.SIGKILL if fate == "killed" else signal.SIGSTOP)
    if fate == "thawed":
        keeper.do("thawed", "job")
    bench.until_deed("witness", "thawed")
    assert not stands_still(witness, version)
    assert (("job", "thawed") in bench.deeds()) == (fate != "thawed")
    assert stands_still(job, version) == (fate == "thawed")
    if fate == "stopped":
        os.kill(keeper.process.pid, signal.SIGCONT)


def freezing(bench: Bench, version: int, name: str) -> Path:
    """A cgroup of this version with a process in it, that can be frozen."""
    for hierarchy in discover().hierarchies:
        fits = "freezer" in hierarchy.controllers if version == 1 else hierarchy.version == 2
        if hierarchy.version == version and fits:
            top = CgroupDir(hierarchy.top.mount, (bench.base,))
            top.make()
            directory = top.child(name)
            assert directory.make()
            child = subprocess.Popen(["sleep", "1000"])
            bench.stack.callback(child.wait)
            bench.stack.callback(child.kill)
            directory.write("cgroup.procs", str(child.pid))
            # Before the process is killed, which on v1 a frozen one does not heed.
            bench.stack.callback(directory.write, FREEZERS[version][0], FREEZERS[version][2])
            return directory.path
    pytest.skip(f"no freezer of version {version} here")


def stands_still(place: Path, version: int) -> bool:
    if version == 1:
        return (place / "freezer.state").read_text() == "FROZEN\n"
    return "frozen 1" in (place / "cgroup.events").read_text()
