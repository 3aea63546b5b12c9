"""`python -m bench.oom`: from the moment that a job's memory runs out until it is frozen, has SIGKILL, and is dead.

A real `acctd serve` with other jobs standing, which it reads as ever, and then one job after the other with a limit of
24 MiB and a hog in it. The clock is CLOCK_MONOTONIC everywhere. *event*: the kernel said so, as seen by another process
than the agent, which has an eventfd of its own and goes before all others to be awake in time; or by the agent if that
woke up first. *frozen*, *killed*: in the agent, the write to the freezer had returned, SIGKILL was sent to all
(bench/stamped.py). *dead*: the hog's pidfd became readable. And that this may be believed:

- *last page*: the hog's last sign of life, which it writes outside of the job before each page that it touches. Between
  it and the event lie the kernel's own attempts to find memory.
- *ran on*: how long after *frozen* a second process in the job, which had all the memory it needs, still ran.
- Each record must say what was done, or the benchmark ends with an error.

Peers: the kernel's own killer (oom action kernel, where the agent only tells), and a C program that waits for the same
event of a job that no agent holds and does no more than freeze, kill and thaw it (oom.c): what cannot be beaten.
"""

import argparse
import contextlib
import mmap
import os
import random
import select
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import Layout, discover
from acctd.kernel import memevents
from acctd.kernel.cgroupfs import CgroupDir
from acctd.model import Limits
from bench.agent import percentile
from bench.report import machine, table
from bench.served import Connection, Served

GOAL = 10.0  # ms, the 99th percentile from the event to frozen, and to killed
ACTIONS = {"hold": "held", "kill": "killed", "kernel": "killed by the kernel"}  # and what the record calls it
_ACTED = ("frozen", "killed", "dead")
_STEPS = ("heard", "guarded", "frozen", "examined", "killed")
_LIMIT = 24 << 20
_PATIENCE = 60.0  # s until something that does not come is an error
_PAUSE = 0.02  # s at most between two jobs, so that they do not keep in step with the agent's ticks

Times = dict[str, int]
"""What happened when, ns."""


@dataclass(slots=True)
class Situation:
    """Under which circumstances jobs ran out of memory, and what was seen of each."""

    name: str
    seen: list[Times] = field(default_factory=list)

    def spans(self, first: str, then: str) -> list[float]:
        """ms from one to the other, of each job; empty where nobody could see them."""
        return [(times[then] - times[first]) / 1e6 for times in self.seen if first in times and then in times]

    def ran_on(self) -> list[float]:
        """ms that a process of the job still ran after it was frozen, of each job."""
        return [max(0.0, span) for span in self.spans("frozen", "still")]


class Hog:
    """A process that will use up its job's memory, and its child that will not; a context manager."""

    def __init__(self, program: Path, stamps: Path) -> None:
        self._stamps = stamps
        stamps.write_bytes(bytes(mmap.PAGESIZE))
        argv = [str(program), "hog", str(stamps), str(4 * _LIMIT)]
        self._process = subprocess.Popen(argv, start_new_session=True, stdin=subprocess.PIPE)
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    def __enter__(self) -> "Hog":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.pidfd)
        self._process.kill()  # and its child with it
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"g")
        self._process.stdin.flush()

    def last(self) -> Times:
        """The last signs of life of both."""
        hog, bystander = struct.unpack_from("QQ", self._stamps.read_bytes())
        return {"last page": hog, "still": bystander}


def observe(directory: CgroupDir, hog: Hog) -> Times:
    """Let it run, and see when its memory runs out, and when it is dead. Raises RuntimeError for what does not come."""
    if (ear := memevents.out_of_memory(directory)) is None:
        raise RuntimeError(f"{directory.path} is gone before anything ran in it")
    times: Times = {}
    deadline = time.monotonic() + _PATIENCE
    with contextlib.closing(ear), contextlib.closing(select.epoll()) as epoll, _before_all_others():
        epoll.register(ear.fileno(), ear.events)
        epoll.register(hog.pidfd, select.EPOLLIN)
        hog.go()
        while "dead" not in times:
            ready = epoll.poll(max(0.0, deadline - time.monotonic()))
            now = time.monotonic_ns()
            if not ready:
                raise RuntimeError(f"a job out of memory is not dead after {_PATIENCE:g} s; seen of it: {times}")
            for fd, _ in ready:
                if fd == hog.pidfd:
                    times["dead"] = now
                elif ear.clear():
                    times.setdefault("event", now)
    if "event" not in times:
        raise RuntimeError("a hog ended before its job's memory ran out")
    return times | hog.last()


@contextlib.contextmanager
def _before_all_others() -> Iterator[None]:
    """This thread runs as soon as it has anything to do, on a busy machine too. sched(7)."""
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _agreed(times: Times) -> Times:
    """The event is when the first one heard of it."""
    return times | {"event": min(times["event"], times.get("heard", times["event"]))}


@dataclass(frozen=True, slots=True)
class Stage:
    """Where all of it happens."""

    layout: Layout
    directory: Path
    program: Path
    first: bool  # whoever acts goes before all others, the observer too: as on an idle machine

    @property
    def stamps(self) -> Path:
        """What the agent writes down, see bench/stamped.py."""
        return self.directory / "stamps"

    def put_first(self, pid: int) -> None:
        """What this process does next, it does before all others, its children not; if that is wanted."""
        if self.first:
            os.sched_setscheduler(pid, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(2))

    def hog(self) -> Hog:
        return Hog(self.program, self.directory / "life")


def held_by_agent(stage: Stage, served: Served, connection: Connection, action: str, name: str) -> Times:
    """One job's life under an agent that deals with its shortage. Raises RuntimeError if the record does not say so."""
    connection.call(
        "Create", job=name, network="host", limits={"memory": _LIMIT, "swap": 0}, oom={"action": action}
    )  # fmt: skip
    directory = JobCgroups(stage.layout, served.base, f"job_{name}").directory("memory")
    assert directory is not None
    with stage.hog() as hog:
        connection.call("Attach", job=name, pid=hog.pid)
        times = observe(directory, hog)
    record = connection.call("Finish", job=name)["record"]
    said = [(each["action"], each["level"]) for each in record["shortages"]]
    if said != [(ACTIONS[action], "job")]:
        raise RuntimeError(f"the record of {name}, oom action {action}, says {said}")
    if action == "kernel":
        del times["still"]  # the kernel takes the largest process; the other one lives on
        return times
    written = [line.split() for line in stage.stamps.read_text().splitlines()]
    times |= {what: int(at) for cgroup, what, at in written if cgroup == f"job_{name}"}
    if missing := [step for step in _STEPS if step not in times]:
        raise RuntimeError(f"the agent did not write down when job {name} was {', '.join(missing)}")
    return _agreed(times)


def _tick(connection: Connection, _: str) -> None:
    connection.call("Snapshot")


def _make_and_finish(connection: Connection, name: str) -> None:
    connection.call("Create", job=name, network="nat", limits={"memory": _LIMIT})
    connection.call("Finish", job=name)


MEANWHILE = {"ticks back to back": _tick, "others made and finished": _make_and_finish}
"""What keeps the agent busy, over and over."""


@contextlib.contextmanager
def meanwhile(served: Served, act: Callable[[Connection, str], None]) -> Iterator[None]:
    """Another caller has the agent do something without a pause."""
    over = threading.Event()
    failed: list[Exception] = []

    def caller() -> None:
        try:
            with served.connect() as connection:
                while not over.is_set():
                    act(connection, f"{served.prefix}-other")
        except Exception as e:  # whatever it is, the other thread raises it
            failed.append(e)

    thread = threading.Thread(target=caller, name="caller")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failed:
        raise failed[0]


def with_agent(stage: Stage, standing: int, rounds: int, network: str) -> list[Situation]:
    """All that an agent with so many standing jobs is measured for."""
    stage.stamps.write_bytes(b"")
    situations = []
    with Served(program=("-m", "bench.stamped", str(stage.stamps))) as served:
        served.stand(standing, network)
        stage.put_first(served.pid)
        with served.connect() as connection:
            plan = [(action, "") for action in ACTIONS]
            if standing:
                plan += [("hold", how) for how in MEANWHILE]
            for action, how in plan:
                situation = Situation(f"{action}, {standing} standing" + (f", {how}" if how else ""))
                situations.append(situation)
                # The first of its kind loads what later ones find there.
                held_by_agent(stage, served, connection, action, f"{served.prefix}-first-{len(situations)}")
                with meanwhile(served, MEANWHILE[how]) if how else contextlib.nullcontext():
                    for number in range(rounds):
                        pause()
                        name = f"{served.prefix}-{len(situations)}-{number}"
                        situation.seen.append(held_by_agent(stage, served, connection, action, name))
        if troubles := [line for line in served.log().splitlines() if " trouble: " in line]:
            raise RuntimeError(f"the agent logged trouble {len(troubles)} times; the first: {troubles[0]}")
    return situations


def with_floor(stage: Stage, rounds: int) -> Situation:
    """The C program instead of an agent, on cgroups of the same kind."""
    situation = Situation("C program, 0 standing")
    base = f"acctdbench-{os.getpid()}-floor"
    floor = subprocess.Popen([str(stage.program), "floor"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stdin, stdout = floor.stdin, floor.stdout
    assert stdin is not None and stdout is not None
    try:
        stage.put_first(floor.pid)
        for number in range(rounds):
            pause()
            cgroups = JobCgroups(stage.layout, base, f"job_{number}")
            cgroups.create(Limits(memory=_LIMIT, swap=0))
            try:
                memory, freezer = cgroups.directory("memory"), cgroups.directory("freezer")
                assert memory is not None and freezer is not None
                stdin.write(f"{memory.path}\n{freezer.path}\n".encode())
                stdin.flush()
                if stdout.readline() != b"r\n":
                    raise RuntimeError("the C program gave up; see above")
                with stage.hog() as hog:
                    cgroups.attach(hog.pid)
                    times = observe(memory, hog)
                said = stdout.readline().split()
                times |= dict(zip(("heard", "frozen", "killed"), map(int, said), strict=True))
                situation.seen.append(_agreed(times))
            finally:
                cgroups.kill()
                if not cgroups.remove():
                    raise RuntimeError(f"left behind below {base}: {cgroups.name}")
    finally:
        stdin.close()
        stdout.close()
        floor.wait()
    return situation


def pause() -> None:
    time.sleep(random.uniform(0, _PAUSE))  # noqa: S311  # no secret


def figures(values: Sequence[float]) -> list[str]:
    """The 50th and the 99th percentile and the highest."""
    return [f"{percentile(values, share):.2f}" for share in (50, 99, 100)] if values else ["-", "-", "-"]


def head(measures: Sequence[str]) -> list[str]:
    return ["ms", "jobs", *(cell for measure in measures for cell in (f"{measure}: p50", "p99", "max"))]


def rows(situations: Sequence[Situation], measures: Sequence[str]) -> list[list[object]]:
    """A row for each situation: what happened so long after the event."""
    return [
        [each.name, len(each.seen), *(cell for measure in measures for cell in figures(each.spans("event", measure)))]
        for each in situations
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.oom", description="from out of memory to the action")
    parser.add_argument("--rounds", type=int, default=200, help="jobs of each kind")
    parser.add_argument("--standing", type=int, nargs="*", default=[0, 500], help="jobs standing meanwhile")
    parser.add_argument("--network", choices=("nat", "host", "none"), default="nat", help="of the standing ones")
    parser.add_argument("--first", action="store_true", help="let the agent go before all others, if they are many")
    parser.add_argument("--steps", action="store_true", help="also: where the agent's time goes")
    parser.add_argument("--quick", action="store_true", help="small figures: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.standing = 3, [0, 2]
    layout = discover()
    if (memory := layout.of("memory")) is None or memory.version != 1:
        parser.exit(
            69, "bench.oom needs the memory controller on cgroup v1: on v2 there is no moment to measure from\n"
        )
    situations: list[Situation] = []
    with tempfile.TemporaryDirectory(prefix="acctdbench-") as name:
        stage = Stage(layout, Path(name), Path(name) / "oom", options.first)
        subprocess.run(["gcc", "-O2", "-o", stage.program, Path(__file__).with_suffix(".c")], check=True)
        situations.append(with_floor(stage, options.rounds))
        for number in options.standing:
            situations += with_agent(stage, number, options.rounds, options.network)
    _print(stage, situations, steps=options.steps)


def _print(stage: Stage, situations: list[Situation], *, steps: bool) -> None:
    acted = [each for each in situations if each.spans("event", "killed")]
    first = "; the agent and the C program go before all others" if stage.first else ""
    print(f"ms since the event, of jobs one after the other, limit {_LIMIT >> 20} MiB; standing jobs are read each "
          f"10 s where it does not say otherwise{first}. {machine()}\n")  # fmt: skip
    print(table(head(_ACTED), rows(situations, _ACTED)))
    print("\nHow far that may be believed, ms:\n")
    doubts = [
        [f"{each.name}, bounds", *figures(each.spans("last page", "event")), *figures(each.ran_on())] for each in acted
    ]
    print(table(["ms", "last page to event: p50", "p99", "max", "ran on when frozen: p50", "p99", "max"], doubts))
    if steps:
        print("\nThe agent's steps, ms since the event:\n")
        print(table(head(_STEPS), rows([each for each in acted if each.spans("event", "examined")], _STEPS)))
    print()
    goals = []
    for each in acted:
        seen = [percentile(each.spans(first, what), 99)
                for first in ("event", "last page") for what in ("frozen", "killed")]  # fmt: skip
        goals.append([f"{each.name}, goal", f"{GOAL:g}", *(f"{value:.2f}" for value in seen)])
    head_ = ["99th percentile, ms", "at most", "event to frozen", "to killed", "last page to frozen", "to killed"]
    print(table(head_, goals))


if __name__ == "__main__":
    main()
