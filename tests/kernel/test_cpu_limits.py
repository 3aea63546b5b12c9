"""CPU limits on a living kernel: quota and its throttling, burst, shares, and cores of a job's own."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from acctd.cgroup.cpus import chooser, format_list, parse_list, read_topology
from acctd.cgroup.layout import discover
from tests.kernel.conftest import Node
from tests.kernel.served import Served

SPIN = ["sh", "-c", "while :; do :; done"]
CPU = str(min(os.sched_getaffinity(0)))
NS = 10**9


@pytest.fixture
def agent(node: Node) -> Iterator[Served]:
    """A node with a living agent; none of these tests is about networks."""
    made = Served(node, None)  # type: ignore[arg-type]  # start() sets it
    made.start()
    yield made
    if made.process.poll() is None:
        # Families first: they end before the job they are in.
        for job in reversed(made.ok("List")["jobs"]):
            made.call("Finish", job=job["id"])
        assert made.stop() == 0


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts processes; all gone at the end."""
    with ExitStack() as stack:

        def run(*command: str) -> subprocess.Popen[bytes]:
            child = subprocess.Popen(command)
            stack.callback(child.wait)
            stack.callback(child.kill)
            return child

        yield run


def create(agent: Served, name: str, **limits: Any) -> None:
    agent.ok("Create", job=name, network="host", limits=limits)


def used(agent: Served, name: str) -> int:
    """CPU time of a job so far, ns."""
    totals = agent.ok("Usage", job=name)["job"]["totals"]
    return sum(totals.get(metric, {}).get("", 0) for metric in ("cpu_user", "cpu_system"))


def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def allowed(pid: int) -> str:
    """The CPUs that a process may run on, as the kernel tells them."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith("Cpus_allowed_list:"))


def file(agent: Served, name: str, controller: str, v1: str, v2: str) -> str:
    hierarchy = discover().of(controller)
    assert hierarchy is not None
    path = hierarchy.job(agent.node.base, f"job_{name}").path
    return (path / (v1 if hierarchy.version == 1 else v2)).read_text().strip()


def refused(agent: Served, name: str, cpuset: str) -> str:
    """The sentence that a job is refused with for want of cores."""
    reply = agent.call("Create", job=name, network="host", limits={"cpuset": cpuset})
    assert reply["error"].endswith(".Exhausted"), reply
    message: str = reply["parameters"]["message"]
    return message


def test_a_quota_holds_and_the_record_tells_what_it_held_back(agent: Served, start: Callable[..., Any]) -> None:
    create(agent, "slow", cpus=0.2)
    began = time.monotonic_ns()
    child = start(*SPIN)
    agent.ok("Attach", job="slow", pid=child.pid)
    until(lambda: used(agent, "slow") > 0.4 * NS, "the job does not get its quota")
    totals = agent.ok("Finish", job="slow", exit_signal=9)["record"]["totals"]
    wall = time.monotonic_ns() - began
    # One quota more at either end, 5 ms of what was handed out to a CPU, and a tick before it is stopped.
    assert totals["cpu_user"][""] + totals["cpu_system"][""] <= 0.2 * wall + 0.055 * NS
    assert totals["cpu_throttled_periods"][""] > 0
    assert totals["cpu_throttled"][""] > 0
    assert totals["cpu_periods"][""] >= totals["cpu_throttled_periods"][""]


def test_without_a_quota_nothing_is_held_back(agent: Served, start: Callable[..., Any]) -> None:
    create(agent, "free")
    agent.ok("Attach", job="free", pid=start(*SPIN).pid)
    until(lambda: used(agent, "free") > 0.2 * NS, "the job does not run")
    totals = agent.ok("Finish", job="free", exit_signal=9)["record"]["totals"]
    assert totals["cpu_throttled_periods"][""] == totals["cpu_throttled"][""] == 0


def test_what_a_job_saved_up_it_may_use_in_a_burst(agent: Served, start: Callable[..., Any]) -> None:
    create(agent, "burst", cpus=0.2, cpu_burst=0.02)
    assert file(agent, "burst", "cpu", "cpu.cfs_burst_us", "cpu.max.burst") == "20000"
    # Works for more than a quota of 20 ms now and then, and saves up meanwhile.
    work = "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done"
    agent.ok("Attach", job="burst", pid=start("sh", "-c", f"while :; do {work}; sleep 0.4; done").pid)

    def bursts() -> int:
        told = dict(line.split() for line in file(agent, "burst", "cpu", "cpu.stat", "cpu.stat").splitlines())
        return int(told["nr_bursts"])

    until(lambda: bursts() > 0, "the job never burst")


def test_shares_divide_a_cpu_that_two_jobs_want(agent: Served, start: Callable[..., Any]) -> None:
    names = {"one": 1024, "three": 3072}
    for name, shares in names.items():
        create(agent, name, cpu_shares=shares, cpuset=CPU)
        agent.ok("Attach", job=name, pid=start(*SPIN).pid)
    before = {name: used(agent, name) for name in names}
    gained = dict.fromkeys(names, 0)

    def enough() -> bool:
        gained.update({name: used(agent, name) - before[name] for name in names})
        return sum(gained.values()) > 3 * NS

    until(enough, "the jobs do not run")
    assert 2 < gained["three"] / gained["one"] < 4.5, gained


# Cores of a job's own


def cores() -> int:
    """How many cores jobs of a test may have."""
    layout = discover()
    hierarchy = layout.of("cpuset")
    assert hierarchy is not None
    count = len(read_topology())
    if count < 2:
        pytest.skip("this host has one core, which two jobs cannot share out")
    cpus, _ = chooser(count, layout, "none")([])
    assert parse_list(cpus) == frozenset().union(*(core.cpus for core in read_topology()))
    return count


def test_jobs_get_cores_of_their_own_until_they_end(agent: Served, start: Callable[..., Any]) -> None:
    count = cores()
    create(agent, "a", cpuset="linear:1")
    create(agent, "b", cpuset=f"linear:{count - 1}")
    children = {name: start("sleep", "1000") for name in "ab"}
    for name, child in children.items():
        agent.ok("Attach", job=name, pid=child.pid)
    have = {name: parse_list(allowed(child.pid)) for name, child in children.items()}
    assert have["a"].isdisjoint(have["b"])
    assert have["a"] | have["b"] == frozenset().union(*(core.cpus for core in read_topology()))
    assert file(agent, "a", "cpuset", "cpuset.mems", "cpuset.mems") == "0"
    assert refused(agent, "c", "linear:1") == (
        f"cpuset linear:1 asks for more cores than are free: 0 of {count} are, 2 jobs have the others; "
        "try again when one has finished"
    )
    # Who asks for no cores of its own runs anywhere, and so does who names its CPUs.
    create(agent, "anywhere")
    create(agent, "named", cpuset=CPU)
    ended = agent.ok("Finish", job="a", exit_signal=9)
    assert parse_list(ended["record"]["cpus"]) == have["a"]
    assert f'AcctdCpus = "{format_list(have["a"])}"\n' in ended["classad"]
    create(agent, "c", cpuset="linear:1")
    assert parse_list(agent.ok("Finish", job="c")["record"]["cpus"]) == have["a"]


def test_families_share_out_what_their_parent_has(agent: Served) -> None:
    count = cores()
    create(agent, "pilot", cpuset=f"linear:{count}")
    for number in range(count):
        agent.ok("Create", job=f"f{number}", parent="pilot", limits={"cpuset": "linear:1"})
    held = [file(agent, f"pilot/job_f{number}", "cpuset", "cpuset.cpus", "cpuset.cpus") for number in range(count)]
    assert len(set(held)) == count
    reply = agent.call("Create", job="more", parent="pilot", limits={"cpuset": "linear:1"})
    # The parent does not count: it shares what it has.
    assert f"0 of {count} are, {count} jobs have the others" in reply["parameters"]["message"]
    assert f"{count + 1} jobs have the others" in refused(agent, "other", "linear:1")
    agent.ok("Finish", job="f0")
    agent.ok("Create", job="more", parent="pilot", limits={"cpuset": "linear:1"})


def test_a_family_takes_from_the_cpus_that_its_parent_was_given(agent: Served) -> None:
    cores()
    last = max(read_topology(), key=lambda core: max(core.cpus))
    create(agent, "pilot", cpuset=format_list(last.cpus))
    agent.ok("Create", job="payload", parent="pilot", limits={"cpuset": "linear:1"})
    assert parse_list(agent.ok("Finish", job="payload")["record"]["cpus"]) == last.cpus
    reply = agent.call("Create", job="wide", parent="pilot", limits={"cpuset": "linear:2"})
    assert "jobs here have 1 core;" in reply["parameters"]["message"]


@pytest.mark.parametrize("ledger", ["kept", "lost"])
def test_a_job_keeps_its_cores_when_the_agent_dies(agent: Served, start: Callable[..., Any], ledger: str) -> None:
    count = cores()
    create(agent, "a", cpuset=f"linear:{count - 1}")
    agent.ok("Attach", job="a", pid=start("sleep", "1000").pid)
    agent.process.kill()
    agent.process.wait()
    if ledger == "lost":
        for path in (agent.node.directory / "state").glob("ledger.sqlite*"):
            path.unlink()
    agent.start()
    assert f"1 of {count} are, 1 job has the others" in refused(agent, "b", "linear:2")
    create(agent, "b", cpuset="linear:1")
    both = [agent.ok("Finish", job=name)["record"]["cpus"] for name in "ab"]
    assert parse_list(both[0]).isdisjoint(parse_list(both[1]))
    create(agent, "all", cpuset=f"linear:{count}")


def test_cores_of_a_run_whose_acctd_was_killed_are_free_once_its_job_has_ended(node: Node) -> None:
    count = cores()
    wanted = ["run", "-q", "--network", "host", "--cpuset"]
    argv = node.argv(*wanted, "linear:1", "--", "sleep", "1000")
    keeper = node.topology.popen(node.topology.node, argv, env=node.environ)
    hierarchy = discover().of("cpuset")
    assert hierarchy is not None
    job = hierarchy.job(node.base, "job_r1")
    # The helper is in it first, and becomes the command there.
    until(lambda: [*map(_name, job.procs())] == ["sleep"] or keeper.poll() is not None, "the job does not start")
    assert keeper.poll() is None
    keeper.kill()
    keeper.wait()
    late = node.acctd(*wanted, f"linear:{count}", "--", "true")
    assert (late.returncode, late.stderr.count("\n")) == (75, 1)
    assert f"{count - 1} of {count} are, 1 job has the others" in late.stderr
    for pid in job.procs():
        os.kill(pid, 9)
    until(lambda: not job.procs(), "the job does not end")
    record = node.job("--network", "host", "--cpuset", f"linear:{count}", "--", "true")
    assert parse_list(record["cpus"]) == frozenset().union(*(core.cpus for core in read_topology()))


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""  # it has just ended
