"""Families in families: own cgroups, own totals, the parent's include them once; and who ends with whom."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from acctd.cgroup.layout import discover
from lab.traffic import PORT, Server, expected_udp
from tests.kernel.conftest import REPO
from tests.kernel.served import Served

WAN = "203.0.113.2"
SPIN = "i=0; while [ $i -lt {} ]; do i=$((i+1)); done"


@contextmanager
def worker(served: Served, job: str, network: str | None = None) -> Iterator[Callable[[str], None]]:
    """A shell inside a job, in the network of another one where it is named, that runs what it is told, one by one."""
    enter = ["nsenter", f"--net={served.node.directory}/run/netns/{network}"] if network else []
    child = subprocess.Popen([*enter, "sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    stdin, stdout = child.stdin, child.stdout
    served.ok("Attach", job=job, pid=child.pid)

    def run(line: str) -> None:
        stdin.write(f"{line} >&2; echo done\n")
        stdin.flush()
        assert stdout.readline() == "done\n"

    try:
        yield run
    finally:
        child.kill()
        child.wait()
        stdin.close()
        stdout.close()


def give(size: int) -> str:
    return f"{sys.executable} {REPO}/lab/traffic.py give {WAN} {PORT} {size} --udp"


def ended(served: Served, job: str) -> bool:
    """Whether the agent has seen the end of its last process."""
    return any(event["event"] == "ended" for event in served.ok("Events", job=job)["events"])


def cpu(job: dict[str, dict[str, dict[str, int]]]) -> int:
    return job["totals"]["cpu_user"][""] + job["totals"]["cpu_system"][""]


def test_a_parent_is_its_own_use_and_its_families(served: Served) -> None:
    """Two levels below a pilot, each with a known load; the totals before and after the families end."""
    lab = served.node.topology
    with lab.enter(lab.wan):
        server = Server()
    with server:
        served.ok("Create", job="pilot")
        served.ok("Create", job="payload", parent="pilot", network="nat")
        served.ok("Create", job="step", parent="payload")
        loads = {"pilot": 30_000, "payload": 50_000, "step": 70_000}
        spins = {"pilot": 100_000, "payload": 200_000, "step": 400_000}
        own = {}
        with ExitStack() as stack:
            for job, network in (("pilot", "pilot"), ("payload", "payload"), ("step", "payload")):
                run = stack.enter_context(worker(served, job, network))
                before = {name: cpu(served.ok("Usage", job=name)["job"]) for name in loads}
                run(SPIN.format(spins[job]))
                run(give(loads[job]))
                after = {name: cpu(served.ok("Usage", job=name)["job"]) for name in loads}
                own[job] = after[job] - before[job]
            used = {name: served.ok("Usage", job=name)["job"]["totals"] for name in loads}
            sent = {name: expected_udp(size, 4)[0] for name, size in loads.items()}
            # The step shares the payload's pipe, and is counted there.
            assert "network" not in used["step"]
            assert used["payload"]["network"]["OutgoingExternal"] == sent["payload"] + sent["step"]
            assert used["pilot"]["network"]["OutgoingExternal"] == sum(sent.values())
            assert [used[name]["pids"][""] for name in loads] == [3, 2, 1]
        assert own["step"] > own["payload"] > 0
        records = {name: served.ok("Finish", job=name, exit_code=0)["record"] for name in reversed(loads)}
    assert records["payload"]["totals"]["network"]["OutgoingExternal"] == sent["payload"] + sent["step"]
    assert records["pilot"]["totals"]["network"]["OutgoingExternal"] == sum(sent.values())
    times = {name: cpu(record) for name, record in records.items()}
    # The kernel adds a child's time to its parent; what a parent used itself is what is left, and of the known size.
    assert times["payload"] - times["step"] >= own["payload"] * 0.9
    assert times["pilot"] - times["payload"] >= own["pilot"] * 0.9
    assert times["pilot"] < sum(own.values()) * 1.5
    peaks = [records[name]["totals"]["memory_peak"][""] for name in ("pilot", "payload", "step")]
    assert peaks == sorted(peaks, reverse=True)
    assert [records[name].get("parent") for name in loads] == [None, "pilot", "payload"]


def test_killing_a_payload_spares_the_pilot_and_killing_the_pilot_takes_all(
    served: Served,
    sleeper: Callable[[], subprocess.Popen[bytes]],
) -> None:
    pilot, payload, step = sleeper(), sleeper(), sleeper()
    served.ok("Register", job="pilot", pid=pilot.pid)
    for name, parent, child in (("payload", "pilot", payload), ("step", "payload", step)):
        served.ok("Create", job=name, parent=parent)
        served.ok("Attach", job=name, pid=child.pid)
    assert served.ok("Kill", job="payload") == {"survivors": []}
    assert [child.poll() is None for child in (pilot, payload, step)] == [True, False, False]
    later = sleeper()
    served.ok("Attach", job="step", pid=later.pid)
    assert served.ok("Finish", job="pilot", exit_signal=9)["record"]["exit_signal"] == 9
    assert pilot.wait() == later.wait() == -signal.SIGKILL
    # Those inside are closed with it.
    for name in ("payload", "step"):
        assert served.ok("Finish", job=name)["record"]["state"] == "lost"
    assert served.ok("List")["jobs"] == []


def test_an_unregistered_family_goes_on_in_its_parent(
    served: Served,
    sleeper: Callable[[], subprocess.Popen[bytes]],
) -> None:
    pilot, payload, step = sleeper(), sleeper(), sleeper()
    served.ok("Register", job="pilot", pid=pilot.pid)
    served.ok("Attach", job="pilot", pid=payload.pid)
    served.ok("Attach", job="pilot", pid=step.pid)
    served.ok("Register", job="payload", pid=payload.pid, parent="pilot")
    served.ok("Register", job="step", pid=step.pid, parent="payload")
    record = served.ok("Unregister", job="payload")["record"]
    assert (record["id"], record["parent"]) == ("payload", "pilot")
    assert served.ok("Usage", job="pilot")["job"]["pids"] == sorted([pilot.pid, payload.pid, step.pid])
    assert served.call("Unregister", job="pilot")["error"].endswith(".UsageError")
    assert payload.poll() is None
    served.ok("Kill", job="pilot")
    assert served.ok("Unregister", job="pilot")["record"]["id"] == "pilot"


def test_a_registered_process_brings_its_descendants(served: Served) -> None:
    child = subprocess.Popen(["sh", "-c", "sleep 1000 & (sleep 1000; :) & wait"])
    try:
        deadline = time.monotonic() + 20
        while len(_descendants(child.pid)) < 4:
            assert time.monotonic() < deadline
        served.ok("Register", job="tree", pid=child.pid)
        assert set(served.ok("Usage", job="tree")["job"]["pids"]) == _descendants(child.pid)
        assert served.ok("Usage", job="tree")["job"]["network"] == "host"
    finally:
        if served.call("Kill", job="tree").get("error"):
            os.kill(child.pid, signal.SIGKILL)
        child.wait()


def _descendants(root: int) -> set[int]:
    found = {root}
    for name in Path("/proc").iterdir():
        if name.name.isdecimal():
            try:
                fields = (name / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[1]) in found:
                found.add(int(name.name))
    return found if len(found) == 1 or found == _grown(found) else _grown(found)


def _grown(found: set[int]) -> set[int]:
    more = set(found)
    for pid in found:
        tasks = Path(f"/proc/{pid}/task")
        for task in tasks.iterdir() if tasks.exists() else ():
            more.update(int(word) for word in (task / "children").read_text().split())
    return more if more == found else _grown(more)


def test_a_watcher_that_ends_gives_its_family_up(
    served: Served,
    sleeper: Callable[[], subprocess.Popen[bytes]],
) -> None:
    pilot, payload, watcher = sleeper(), sleeper(), sleeper()
    served.ok("Register", job="pilot", pid=pilot.pid)
    served.ok("Create", job="payload", parent="pilot", watcher=watcher.pid)
    served.ok("Attach", job="payload", pid=payload.pid)
    served.ok("Create", job="unused", watcher=watcher.pid)
    watcher.kill()
    watcher.wait()
    deadline = time.monotonic() + 20
    while len(served.ok("List")["jobs"]) != 1:
        assert time.monotonic() < deadline
    assert served.ok("Usage", job="pilot")["job"]["pids"] == sorted([pilot.pid, payload.pid])
    assert payload.poll() is None
    assert [event["event"] for event in served.ok("Events", job="payload")["events"]] == [
        "created", "began", "abandoned", "finished",
    ]  # fmt: skip
    # One that nobody ever entered leaves no record.
    assert served.call("Finish", job="unused")["error"].endswith(".NotFound")


@pytest.mark.parametrize("rule", ["environment", "login", "group"])
def test_processes_are_tracked_by_what_they_carry(
    served: Served,
    rule: str,
    sleeper: Callable[[], subprocess.Popen[bytes]],
) -> None:
    """One that is there already, and one that comes later; neither is a child of anything in the job."""
    mark = f"ACCTD_TEST={os.getpid()}-{time.monotonic_ns()}"
    gid = 3_000_000 + os.getpid()
    how = {
        "environment": (["env", mark], {"environment": mark}),
        "login": (["setpriv", "--reuid=games", "--clear-groups"], {"login": "games"}),
        "group": (["setpriv", f"--groups={gid}"], {"group": gid}),
    }
    start, parameters = how[rule]
    first = sleeper()
    served.ok("Register", job="family", pid=first.pid)
    children = [subprocess.Popen([*start, "sleep", "1000"])]
    try:
        _until_exec(children[0].pid)
        assert served.ok("Track", job="family", **parameters) == {"pids": [children[0].pid]}
        children.append(subprocess.Popen([*start, "sleep", "1000"]))
        _until_exec(children[1].pid)
        served.stop(signal.SIGKILL)
        served.start()
        served.ok("Snapshot")
        pids = served.ok("Usage", job="family")["job"]["pids"]
        assert pids == sorted([first.pid, *(child.pid for child in children)])
    finally:
        for child in children:
            child.kill()
            child.wait()


def _until_exec(pid: int) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/comm").read_text() != "sleep\n":
        assert time.monotonic() < deadline


def test_a_family_and_its_parent_outlive_the_agent(
    served: Served,
    sleeper: Callable[[], subprocess.Popen[bytes]],
) -> None:
    pilot, payload = sleeper(), sleeper()
    served.ok("Register", job="pilot", pid=pilot.pid)
    served.ok("Create", job="payload", parent="pilot", network="nat")
    served.ok("Attach", job="payload", pid=payload.pid)
    served.ok("Create", job="waiting", parent="pilot")
    served.stop(signal.SIGKILL)
    served.start()
    jobs = {job["id"]: job for job in served.ok("List")["jobs"]}
    assert {name: (job["parent"], job["phase"]) for name, job in jobs.items()} == {
        "pilot": (None, "running"), "payload": ("pilot", "running"), "waiting": ("pilot", "made"),
    }  # fmt: skip
    served.stop(signal.SIGKILL)
    payload.kill()
    payload.wait()
    served.start()
    assert {job["id"] for job in served.ok("List")["jobs"]} == {"pilot", "waiting"}
    assert served.ok("Finish", job="payload")["record"]["parent"] == "pilot"
    assert served.ok("Finish", job="pilot")["record"]["state"] == "lost"


def test_a_family_lies_in_its_parents_directories(
    served: Served,
    sleeper: Callable[[], subprocess.Popen[bytes]],
) -> None:
    served.ok("Register", job="p", pid=sleeper().pid)
    made = served.ok("Create", job="c", parent="p", limits={"pids": 3})["cgroups"]
    assert made == [str(h.top.path / served.node.base / "job_p" / "job_c") for h in discover().hierarchies]
    assert (Path(made[0]).parent.parent / "job_p").is_dir()
    served.ok("Finish", job="c")
    assert [job["id"] for job in served.ok("List")["jobs"]] == ["p"]


def test_a_parent_goes_on_with_a_family_that_waits(
    served: Served, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """Its own processes have ended while nobody looked; the family inside it can be entered all the same."""
    pilot = sleeper()
    served.ok("Register", job="par", pid=pilot.pid)
    served.ok("Create", job="kid", parent="par")
    served.stop(signal.SIGKILL)
    pilot.kill()
    pilot.wait()
    served.start()
    assert sorted(job["id"] for job in served.ok("List")["jobs"]) == ["kid", "par"]
    served.ok("Attach", job="kid", pid=sleeper().pid)
    served.ok("Kill", job="par")
    assert served.ok("Finish", job="kid")["record"]["parent"] == "par"


def test_a_parent_lasts_as_long_as_what_is_inside_it(
    served: Served, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """Its own process ends at once: what a bill asks for its cores and its time is for all that ran in it."""
    pilot, payload = sleeper(), sleeper()
    served.ok("Create", job="pilot", network="none", limits={"cpus": 1})
    served.ok("Create", job="early", parent="pilot")
    served.ok("Attach", job="pilot", pid=pilot.pid)
    served.ok("Attach", job="early", pid=payload.pid)
    pilot.kill()
    pilot.wait()
    served.ok("Snapshot")
    before = ended(served, "pilot")
    payload.kill()
    payload.wait()
    deadline = time.monotonic() + 30
    while not ended(served, "pilot"):
        assert time.monotonic() < deadline
    assert not before
    later = sleeper()
    served.ok("Create", job="late", parent="pilot")
    served.ok("Attach", job="late", pid=later.pid)
    time.sleep(0.3)
    inside = served.ok("Finish", job="late", exit_code=0)["record"]
    record = served.ok("Finish", job="pilot", exit_code=0)["record"]
    assert record["wall_ns"] > inside["wall_ns"] > 3 * 10**8
    assert record["started"] + record["wall_ns"] / 1e9 >= inside["started"] + inside["wall_ns"] / 1e9 - 0.001
    assert record["totals"]["cpu_reserved"][""] == record["wall_ns"]
