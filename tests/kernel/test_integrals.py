"""What a job reserved and held over its time, exactly, whatever befell its agent; and its midnights."""

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from acctd import ledgers, statement
from acctd.cgroup.cpus import parse_list
from acctd.job import Ending, boottime
from acctd.ledger import FILE, Ledger
from acctd.metrics import BILLED
from acctd.midnights import following
from acctd.model import Limits
from lab.traffic import PORT, Server, expected_udp
from tests.bodies.machine import Machine, machine
from tests.kernel.conftest import BASE, REPO, Node, scrub
from tests.kernel.served import Served

MIB, NS = 1 << 20, 10**9
KIB_S = 1024 * NS
DAY = 86_400 * NS
CPU = str(min(os.sched_getaffinity(0)))
_serial = itertools.count()

_HOLDER = """
import mmap, sys
held = mmap.mmap(-1, 30 << 20, flags=mmap.MAP_PRIVATE)
for _ in range(30): held.write(b"x" * (1 << 20))
open(sys.argv[1], "w").close()
open(sys.argv[2]).close()
"""


@pytest.fixture
def agent(node: Node) -> Iterator[Served]:
    """A node with a living agent."""
    made = Served(node, None)  # type: ignore[arg-type]  # start() sets it
    made.start()
    yield made
    if made.process.poll() is None:
        for job in reversed(made.ok("List")["jobs"]):
            made.call("Finish", job=job["id"])
        assert made.stop() == 0


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Machine]:
    """An agent in this process."""
    base = f"{BASE}{os.getpid()}-i{next(_serial)}"
    try:
        with machine(tmp_path, base) as made:
            yield made
    finally:
        scrub(base)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the boottime clock of this process be so many ns later than it is."""
    by = 0

    def clock() -> int:
        return boottime() + by

    def go(ns: int) -> None:
        nonlocal by
        by += ns

    for room in ("acctd.agent", "acctd.job"):
        monkeypatch.setattr(f"{room}.boottime", clock)
    return go


def total(record: dict[str, Any], name: str) -> int | None:
    return record["totals"].get(name, {}).get("")


def killed(agent: Served) -> None:
    agent.process.send_signal(signal.SIGKILL)
    agent.process.wait()


def ledger(agent: Served) -> Path:
    return agent.node.directory / "state" / FILE


@pytest.mark.parametrize("network", ["host", "nat"])
def test_what_a_run_reserved_is_limit_times_wall(node: Node, network: str) -> None:
    """Also of one that lasts some milliseconds."""
    for command in (["true"], ["sleep", "0.3"]):
        record = node.job("--network", network, "--cpus", "1.5", "--memory", "100M", "--", *command)
        wall = record["wall_ns"]
        assert total(record, "cpu_reserved") == wall * 3 // 2
        assert total(record, "memory_reserved_time") == 100 * MIB * wall // KIB_S
        assert record["midnights"] == []


def test_who_asks_for_nothing_has_reserved_nothing(node: Node) -> None:
    record = node.job("--network", "host", "--", "true")
    assert total(record, "cpu_reserved") is total(record, "memory_reserved_time") is None
    assert total(record, "memory_resident_time") is not None


@pytest.mark.parametrize("policy", ["soft", "none"])
def test_memory_is_reserved_whatever_the_policy_makes_of_it(node: Node, policy: str) -> None:
    record = node.job("--network", "host", "--memory", "64M", "--memory-policy", policy, "--", "true")
    assert total(record, "memory_reserved_time") == 64 * MIB * record["wall_ns"] // KIB_S


def test_cores_of_its_own_are_reserved(here: Machine) -> None:
    record = here.run("alone", ["true"], Limits(cpuset="linear:1"))
    assert record.totals["cpu_reserved"][""] == len(parse_list(record.cpus)) * record.wall_ns


def test_what_was_reserved_outlives_its_agent(agent: Served, sleeper: Callable[[], "subprocess.Popen[bytes]"]) -> None:
    """Twice killed, and an idle job is not stored anew each tick: its account goes by the time all the same."""
    agent.ok("Create", job="j", network="host", limits={"cpus": 0.3, "memory": 64 * MIB})
    agent.ok("Attach", job="j", pid=sleeper().pid)
    for _ in range(2):
        agent.ok("Snapshot")
        killed(agent)
        with Ledger(ledger(agent)) as book:
            (so_far,) = statement.living(book)
        assert (so_far.state, so_far.id) == ("running", "j")
        assert so_far.totals["cpu_reserved"][""] == so_far.wall_ns * 3 // 10
        assert so_far.totals["memory_reserved_time"][""] == 64 * MIB * so_far.wall_ns // KIB_S
        agent.start()
    record = agent.ok("Finish", job="j", exit_code=0)["record"]
    assert record["wall_ns"] > so_far.wall_ns
    assert total(record, "cpu_reserved") == record["wall_ns"] * 3 // 10
    assert total(record, "memory_reserved_time") == 64 * MIB * record["wall_ns"] // KIB_S


def test_time_after_a_jobs_end_is_not_its_own(agent: Served) -> None:
    """Its starter may take long to ask for its record; it is read at ticks until then."""
    agent.ok("Create", job="j", network="host", limits={"cpus": 2, "memory": 64 * MIB})
    child = subprocess.Popen(["sleep", "1000"])
    agent.ok("Attach", job="j", pid=child.pid)
    child.kill()
    child.wait()
    deadline = time.monotonic() + 30
    while "ended" not in {event["event"] for event in agent.ok("Events", job="j")["events"]}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first = agent.ok("Usage", job="j")["job"]
    agent.ok("Snapshot")
    record = agent.ok("Finish", job="j", exit_signal=9)["record"]
    assert record["wall_ns"] == first["wall_ns"]
    assert total(record, "cpu_reserved") == total(first, "cpu_reserved") == 2 * record["wall_ns"]
    assert total(record, "memory_reserved_time") == 64 * MIB * record["wall_ns"] // KIB_S
    assert total(record, "memory_resident_time") == total(first, "memory_resident_time")


def test_each_limit_counts_for_as_long_as_it_held(
    agent: Served, sleeper: Callable[[], "subprocess.Popen[bytes]"]
) -> None:
    """The moment of the change is the same for cores and memory, and survives the agent."""
    agent.ok("Create", job="j", network="host", limits={"cpus": 1, "memory": 64 * MIB})
    agent.ok("Attach", job="j", pid=sleeper().pid)
    before = agent.ok("Usage", job="j")["job"]["wall_ns"]
    done = agent.node.acctd("limit", "j", "--cpus", "3", "--memory", "80M")
    assert done.returncode == 0, done.stderr
    after = agent.ok("Usage", job="j")["job"]["wall_ns"]
    killed(agent)
    agent.start()
    record = agent.ok("Finish", job="j", exit_code=0)["record"]
    wall, cores = record["wall_ns"], total(record, "cpu_reserved")
    assert cores is not None
    changed, rest = divmod(3 * wall - cores, 2)
    assert rest == 0
    assert before <= changed <= after
    kib = (64 * MIB * changed + 80 * MIB * (wall - changed)) // KIB_S
    assert total(record, "memory_reserved_time") == kib


def test_a_limit_that_is_taken_away_reserves_no_more(here: Machine, ahead: Callable[[int], None]) -> None:
    job = here.create("j", Limits(cpus=2, memory=64 * MIB))
    process = here.start(job, "sleep", "1000")
    ahead(10 * DAY)
    low = boottime() + 10 * DAY - job.row.boot_ns
    here.agent.set_limits(job, Limits(), reclaim=False)
    high = boottime() + 10 * DAY - job.row.boot_ns
    ahead(10 * DAY)
    here.agent.set_limits(job, Limits(memory=32 * MIB), reclaim=False)
    ahead(DAY)
    process.kill()
    record = here.finish(job, process.wait())
    assert 2 * low <= record.totals["cpu_reserved"][""] <= 2 * high
    most = 64 * MIB * high + 32 * MIB * (record.wall_ns - 20 * DAY)
    assert 64 * MIB * low + 32 * MIB * DAY <= record.totals["memory_reserved_time"][""] * KIB_S <= most
    assert record.wall_ns >= 21 * DAY


def test_memory_that_is_held_counts_from_its_reading_on(here: Machine, ahead: Callable[[int], None]) -> None:
    ready, go = here.fifo("ready"), here.fifo("go")
    job = here.create("j")
    process = here.start(job, sys.executable, "-I", "-S", "-c", _HOLDER, str(ready), str(go))
    ready.open().close()
    here.agent.poll([job])
    resident = job.meter.now()["memory_resident"][""]
    assert 30 * MIB <= resident < 45 * MIB
    ahead(3600 * NS)
    assert job.meter.now()["memory_resident_time"][""] == 0
    go.open("w").close()
    record = here.finish(job, process.wait())
    assert record.totals["memory_resident_time"][""] >= resident * 3600 // 1024
    assert record.totals["memory_resident_time"][""] <= resident * record.wall_ns // KIB_S


def test_days_that_nobody_read_have_one_midnight(here: Machine, ahead: Callable[[int], None]) -> None:
    job = here.create("j", Limits(cpus=0.5))
    process = here.start(job, "sleep", "1000")
    assert job.midnight == job.row.boot_ns + following(job.row.created, 0)
    here.agent.poll([job])
    assert job.midnights == []
    ahead(3 * DAY)
    for _ in range(3):
        here.agent.poll([job])
        here.agent.store([job])
    ahead(DAY)
    here.agent.poll([job])
    assert [midnight.ns // DAY for midnight in job.midnights] == [3, 4]
    assert [midnight.totals["cpu_reserved"][""] for midnight in job.midnights] == [
        midnight.ns // 2 for midnight in job.midnights
    ]
    assert {name for midnight in job.midnights for name in midnight.totals} <= {metric.name for metric in BILLED}
    here.agent.store([job])
    (row,) = here.agent.ledger.open_jobs()
    assert list(row.midnights) == job.midnights
    process.kill()
    record = here.finish(job, process.wait())
    assert list(record.midnights) == job.midnights
    assert here.agent.ledger.record("j").midnights == record.midnights
    assert here.agent.ledger._rows("SELECT * FROM midnight") == []


def test_a_job_that_ended_before_midnight_has_none(here: Machine, ahead: Callable[[int], None]) -> None:
    job = here.create("j", Limits(cpus=1))
    process = here.start(job, "true")
    ending = Ending.now(process.wait())
    ahead(3 * DAY)
    record = here.agent.finish(job, ending)
    here.jobs.remove(job)
    assert record.midnights == ()
    assert record.wall_ns < DAY
    assert record.totals["cpu_reserved"][""] == record.wall_ns


def to_midnight(agent: Served) -> None:
    """Let the jobs of an agent that is dead have begun a millisecond before midnight, UTC."""
    now = time.time()
    with sqlite3.connect(ledger(agent)) as db:
        db.execute("UPDATE job SET created = ?", (now - now % 86_400 - 0.001,))


def test_a_midnight_is_kept_with_what_families_used_and_outlives_agents(agent: Served) -> None:
    lab = agent.node.topology
    with lab.enter(lab.wan):
        server = Server()
    traffic = f"{sys.executable} {REPO}/lab/traffic.py give 203.0.113.2 {PORT} {{}} --udp"
    agent.ok("Create", job="pilot", network="none", limits={"cpus": 2})
    agent.ok("Create", job="payload", parent="pilot", network="nat", limits={"cpus": 1})
    pilot = subprocess.Popen(["sleep", "1000"])
    payload = subprocess.Popen(
        ["nsenter", f"--net={agent.node.directory}/run/netns/payload", "sh"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def send(size: int) -> None:
        assert payload.stdin is not None
        assert payload.stdout is not None
        payload.stdin.write(traffic.format(size) + " >&2; echo done\n")
        payload.stdin.flush()
        assert payload.stdout.readline() == "done\n"

    with server:
        try:
            agent.ok("Attach", job="pilot", pid=pilot.pid)
            agent.ok("Attach", job="payload", pid=payload.pid)
            send(50_000)
            agent.ok("Snapshot")
            killed(agent)
            to_midnight(agent)
            agent.start()
            killed(agent)
            agent.start()
            with Ledger(ledger(agent)) as book:
                stored = {record.id: record for record in statement.living(book)}
            send(70_000)
            records = [agent.ok("Finish", job=name, exit_code=0)["record"] for name in ("payload", "pilot")]
        finally:
            for process in (pilot, payload):
                process.kill()
                process.wait()
    assert payload.stdin is not None
    payload.stdin.close()
    if payload.stdout is not None:
        payload.stdout.close()
    sent = [expected_udp(size, 4)[0] for size in (50_000, 70_000)]
    for record, cpus in zip(records, (1, 2), strict=True):
        (midnight,) = record["midnights"]
        assert midnight["totals"]["network"]["OutgoingExternal"] == sent[0]
        assert record["totals"]["network"]["OutgoingExternal"] == sum(sent)
        assert midnight["totals"]["cpu_reserved"] == {"": cpus * midnight["ns"]}
        assert total(record, "cpu_reserved") == cpus * record["wall_ns"]  # the family's is in its parent's
        assert NS // 1000 <= midnight["ns"] < record["wall_ns"]
        for name, labels in midnight["totals"].items():
            assert all(value <= record["totals"][name][label] for label, value in labels.items())
        (kept,) = stored[record["id"]].midnights
        assert (kept.ns, kept.totals) == (midnight["ns"], midnight["totals"])


def test_a_run_over_midnight(node: Node) -> None:
    """The clock by which a job is labelled stands a moment before midnight, and goes on by boottime alone."""
    code = (
        "import time\n"
        "from acctd.cli.main import main\n"
        "before = time.time() // 86400 * 86400 - 1\n"
        "time.time = lambda: before\n"
        "main()\n"
    )
    done = node.python(code, "run", "-q", "--network", "host", "--cpus", "1", "--id", "r", "--", "sleep", "2.5")
    assert done.returncode == 0, done.stderr
    with Ledger(node.directory / "state" / FILE) as book:
        record = book.record("r")
    (midnight,) = record.midnights
    assert midnight.ns < record.wall_ns
    assert midnight.totals["cpu_reserved"][""] == midnight.ns
    assert record.totals["cpu_reserved"][""] == record.wall_ns


def test_midnights_are_in_a_ledger_that_is_written_again(
    agent: Served, sleeper: Callable[[], "subprocess.Popen[bytes]"]
) -> None:
    agent.ok("Create", job="j", network="host", limits={"cpus": 1})
    agent.ok("Attach", job="j", pid=sleeper().pid)
    killed(agent)
    to_midnight(agent)
    agent.start()
    # Taken away while it is open: what SQLite still holds of it goes into a new one at the next tick.
    ledger(agent).unlink()
    agent.ok("Snapshot")
    assert ledger(agent).exists()
    killed(agent)
    agent.start()
    record = agent.ok("Finish", job="j", exit_code=0)["record"]
    assert len(record["midnights"]) == 1
    assert total(record, "cpu_reserved") == record["wall_ns"]


def test_midnights_and_sums_are_in_a_new_ledger_too(here: Machine, ahead: Callable[[int], None]) -> None:
    """One that takes a corrupt one's place has what the agent holds."""
    job = here.create("j", Limits(cpus=1))
    process = here.start(job, "sleep", "1000")
    ahead(2 * DAY)
    here.agent.poll([job])
    here.agent.set_limits(job, Limits(cpus=2), reclaim=False)
    begun = boottime() + 2 * DAY - job.row.boot_ns
    here.agent.ledger, aside = ledgers.begun_anew(here.agent.ledger, here.agent.held, [])
    here.agent.held = {job.row.seq: job}
    assert aside.exists()
    (row,) = here.agent.ledger.open_jobs()
    assert list(row.midnights) == job.midnights
    assert len(row.midnights) == 1
    assert row.account.integrals.parts["cpu_reserved"][0] <= begun
    ahead(DAY)
    process.kill()
    record = here.finish(job, process.wait())
    assert [midnight.ns // DAY for midnight in record.midnights] == [2]
    assert 2 * record.wall_ns - begun <= record.totals["cpu_reserved"][""] <= 2 * record.wall_ns - 2 * DAY


def test_a_job_starts_when_its_first_process_enters(
    agent: Served, sleeper: Callable[[], "subprocess.Popen[bytes]"]
) -> None:
    """Not when it was made: a bill lays what it used on the time from its start."""
    agent.ok("Create", job="j", network="host", limits={"cpus": 1})
    made = time.time()
    time.sleep(0.2)
    agent.ok("Attach", job="j", pid=sleeper().pid)
    attached = time.time()
    killed(agent)
    agent.start()
    record = agent.ok("Finish", job="j", exit_code=0)["record"]
    assert made + 0.2 <= record["started"] <= attached
    assert record["started"] + record["wall_ns"] / 1e9 == pytest.approx(record["ended"], abs=1)
