"""Out of memory on this host's cgroups, by the bodies that guests run too; and what only this host can bear."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from acctd.cgroup.layout import discover
from acctd.policies import OomPolicy
from tests.bodies import oom, pressure
from tests.bodies.living import MIB, Living
from tests.bodies.oom import KERNEL
from tests.kernel.conftest import BASE, Node, Topology, scrub


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, topology: Topology) -> Iterator[Living]:
    """One for all: to start it costs more than a job."""
    base = f"{BASE}{os.getpid()}-oom"
    made = Living(tmp_path_factory.mktemp("living"), base)
    try:
        yield made
    finally:
        try:
            made.close()
        finally:
            scrub(base)


@pytest.fixture
def living(agent: Living) -> Iterator[Living]:
    """Nothing of a test is left: no cgroup, no process, no lease."""
    agent.configure()
    try:
        yield agent
        assert agent.daemon.jobs == {}
        assert agent.agent.ledger.open_jobs() == []
        assert not [h.top.path for h in discover().hierarchies if (h.top.path / agent.base).exists()]
    finally:
        agent.clear()


@pytest.fixture
def disk_file(tmp_path: Path) -> Path:
    """A file that does not lie in memory."""
    path = tmp_path / "source"
    with open(path, "wb") as file:
        for _ in range(48):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
    return path


@pytest.mark.parametrize("field", oom.fields(), ids=lambda field: oom.named(*field))
def test_the_matrix(living: Living, field: tuple[oom.Policy, oom.Shape]) -> None:
    print(f"\n{oom.play(living, *field).row(oom.version())}")


@pytest.mark.parametrize("action", pressure.POLICIES)
def test_page_cache_is_no_shortage(living: Living, disk_file: Path, action: str) -> None:
    pressure.page_cache_is_no_shortage(living, disk_file, action)


def test_thresholds_are_told_once(living: Living) -> None:
    pressure.thresholds_are_told_once(living)


def test_coming_and_going_below_the_limit_is_no_shortage(living: Living) -> None:
    pressure.coming_and_going_below_the_limit_is_no_shortage(living)


def test_what_was_raised_once_is_enough_the_next_time(living: Living) -> None:
    pressure.what_was_raised_once_is_enough_the_next_time(living)


def test_one_call_takes_more_than_a_step(living: Living) -> None:
    pressure.one_call_takes_more_than_a_step(living)


def test_a_raised_limit_ends_a_shortage(living: Living) -> None:
    pressure.a_raised_limit_ends_a_shortage(living)


def test_a_suspended_job_runs_out_when_it_goes_on(living: Living) -> None:
    pressure.a_suspended_job_runs_out_when_it_goes_on(living)


@pytest.mark.parametrize("count", [2, 50])
def test_many_at_a_time(living: Living, count: int) -> None:
    pressure.many_at_a_time(living, count)


def test_a_waiting_job_is_dealt_with_by_the_next_agent(living: Living) -> None:
    pressure.a_waiting_job_is_dealt_with_by_the_next_agent(living)


def test_no_descriptor_is_left_by_a_hundred_jobs(living: Living) -> None:
    pressure.no_descriptor_is_left(living, 100)


@pytest.mark.parametrize("rounds", range(5))
def test_it_is_finished_while_it_runs_out(living: Living, rounds: int) -> None:
    job = living.job(f"finished-{rounds}", 24, OomPolicy("hold"))
    hog = living.hog(job)
    hog.tell("take 64", last=True)
    record = living.finish(job)
    living.until(lambda: hog.code is not None, "its end")
    assert {each.action for each in record.shortages} <= {"held"}
    assert len(record.shortages) <= 1


_CALL = """
import mmap, os, sys
zero, room = os.open("/dev/zero", os.O_RDONLY), memoryview(mmap.mmap(-1, 60 << 20))
sys.stdin.readline()
done = os.readv(zero, [room])
try:
    os.readv(zero, [room[done:]])
except OSError as e:
    os._exit(e.errno)
"""


def test_on_v1_a_system_call_fails_and_does_not_wait(living: Living) -> None:
    """What oom_kill_disable means to who needs memory inside the kernel: an error, of which nobody is told."""
    if oom.version() != "v1":
        pytest.skip("v2 has no waiting OOM")
    job = living.job("call", 24, OomPolicy("hold"))
    argv = [sys.executable, "-I", "-S", "-c", _CALL]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        living.attach(job, process.pid)
        process.communicate("\n")
    assert process.returncode == errno.EFAULT
    record = living.finish(job)
    assert record.shortages == ()
    assert record.totals["memory_failcnt"][""] > 0


RUN = {
    "kernel": ([], [KERNEL], 137),
    "kill": ([], ["killed"], 137),
    "hold": ([], ["held"], 137),
    "grow": (["--oom-ceiling", "64M"], ["grown", "grown"], 0),
    "exec": ([], ["killed"], 137),
}
GREEDY = "import sys; sys.stdin.readline(); kept = [b'x' * (1 << 20) for _ in range(int(sys.argv[1]))]"


def decide(node: Node, script: str) -> None:
    """Let the node's site decide by a shell script."""
    program = node.directory / "decide"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    node.config.write_text(f'{node.config.read_text()}[oom]\nprogram = "{program}"\n')


@pytest.mark.parametrize("action", RUN)
def test_acctd_run_does_the_same(node: Node, action: str) -> None:
    options, acts, code = RUN[action]
    decide(node, 'echo \'{"action": "kill", "reason": "so  be it"}\'')
    record = node.directory / "record"
    argv = ["run", "--json", str(record), "--network", "host", "--memory", "24M", "--oom", action, *options]
    # Interpreter included, unlike in a hog that is attached.
    done = node.acctd(*argv, "--", sys.executable, "-I", "-S", "-c", GREEDY, "30" if code == 0 else "64", input="\n")
    assert done.returncode == code, done.stderr
    found = json.loads(record.read_text())
    assert [(each["level"], each["action"]) for each in found["shortages"]] == [("job", act) for act in acts]
    assert all(each["text"] for each in found["shortages"])
    # The summary tells its user.
    assert found["shortages"][-1]["text"].split(" (")[0] in done.stderr
    assert found["exit_signal"] == (9 if code else None)
    assert found["notes"] == (["the site says: so be it"] if action == "exec" else [])


def test_ctrl_c_while_the_site_decides(node: Node) -> None:
    """acctd run stays answerable for the job: it ends at the deadline at the latest, and is on record."""
    asked = node.directory / "asked"
    os.mkfifo(asked)
    decide(node, f"echo yes >{asked}; exec sleep 1000")
    record = node.directory / "record"
    argv = node.argv("run", "-q", "--json", str(record), "--network", "host", "--memory", "24M", "--oom", "exec")
    argv += ["--oom-deadline", "2", "--", sys.executable, "-I", "-S", "-c", GREEDY, "64"]
    with subprocess.Popen(argv, env=node.environ, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdin is not None
        run.stdin.write("\n")
        run.stdin.flush()
        assert asked.read_text() == "yes\n"
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    # Whichever reached it first once it went on: the signal, or the kernel's killer.
    assert run.returncode in (1, 130, 137), said
    found = json.loads(record.read_text())
    assert [each["action"] for each in found["shortages"]] == ["released"]
