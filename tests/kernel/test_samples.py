"""Kept samples of real jobs, of a living agent and of `acctd run` without one; and what the file may do to no job."""

import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from acctd.errors import LedgerError
from acctd.history import FILE, History, Point, Whose, kept
from acctd.ledger import FILE as LEDGER
from acctd.ledger import Ledger
from acctd.metrics import BLOCK_READ_BYTES
from lab.topology import Topology
from tests.kernel.conftest import Node, make_node
from tests.kernel.served import Served
from tests.kernel.test_export import Sleeper, until

POINT = Point(10**9, 2**30, 0, 0, 0, 0, None, 1, 1, 0, 0, 0, 0, 0, 1)

BURN = "t=$(($(date +%s)+{})); while [ $(date +%s) -lt $t ]; do :; done"


@pytest.fixture
def ticking(topology: Topology, tmp_path: Path) -> Iterator[Served]:
    """A node whose agent ticks often."""
    for node in make_node(topology, tmp_path):
        node.config.write_text(f"poll_interval = 0.1\n{node.config.read_text()}")
        served = Served(node, None)  # type: ignore[arg-type]  # start() sets it
        served.start()
        yield served
        if served.process.poll() is None:
            for job in served.ok("List")["jobs"]:
                served.call("Finish", job=job["id"])
            assert served.stop() == 0


@pytest.fixture
def worker() -> Iterator[Sleeper]:
    """Makes processes that do a little all the time; all gone at the end."""
    with ExitStack() as stack:

        def start() -> "subprocess.Popen[bytes]":
            child = subprocess.Popen(["sh", "-c", "while sleep 0.02; do :; done"], start_new_session=True)
            stack.callback(child.wait)
            stack.callback(child.kill)
            return child

        yield start


def path(node: Node) -> Path:
    return node.directory / "state" / FILE


def started(node: Node, job: str) -> float:
    """Of an open job, or of one that has its record."""
    with Ledger(node.directory / "state" / LEDGER) as ledger:
        for row in ledger.open_jobs():
            if row.spec.id == job:
                return row.created
        return ledger.record(job).started


def points(served: Served, job: str) -> list[Point]:
    return kept(path(served.node), job, started(served.node, job))


def begin(served: Served, worker: Sleeper, job: str, **parameters: Any) -> None:
    served.ok("Create", job=job, **{"network": "none", **parameters})
    served.ok("Attach", job=job, pid=worker().pid)


def ticks(served: Served) -> int:
    found: int = served.ok("Cost")["cost"]["ticks"]
    return found


def rises(found: list[Point]) -> bool:
    return [p.at for p in found] == sorted({p.at for p in found})


def test_a_job_of_the_agent_has_points_and_its_record_is_the_last(ticking: Served, worker: Sleeper) -> None:
    begin(ticking, worker, "j", limits={"memory": 64 << 20})
    until(lambda: len(points(ticking, "j")) >= 8)
    record = ticking.ok("Finish", job="j", exit_code=0)["record"]
    found = until(lambda: [p for p in points(ticking, "j") if p.at >= record["wall_ns"]] and points(ticking, "j"))
    assert rises(found) and found[0].at < 2 * 10**9
    assert {p.memory_limit for p in found} == {64 << 20} and {p.pids for p in found[:-1]} <= {1, 2}
    assert found[-1].cpu_user == record["totals"]["cpu_user"][""]
    assert (found[-1].at, found[-1].pids) == (record["wall_ns"], 0)


def test_a_familys_use_is_in_its_parents_points(ticking: Served, worker: Sleeper) -> None:
    begin(ticking, worker, "outer")
    begin(ticking, worker, "inner", parent="outer", network="parent")
    until(lambda: points(ticking, "inner") and points(ticking, "outer")[-1].pids >= 2)
    assert points(ticking, "inner")[-1].pids <= 2
    ticking.ok("Finish", job="outer")
    ends = until(lambda: [p for p in points(ticking, "outer") if p.pids == 0])
    assert len(ends) == 1


def test_points_go_on_where_a_killed_agent_left_off(ticking: Served, worker: Sleeper) -> None:
    begin(ticking, worker, "j")
    before = until(lambda: (found := points(ticking, "j"))[5:] and found)
    ticking.stop(signal.SIGKILL)
    ticking.start()
    until(lambda: len(points(ticking, "j")) > len(before) + 5)
    after = points(ticking, "j")
    assert after[: len(before)] == before and rises(after)


def test_jobs_that_ended_while_there_was_no_agent_are_ended_here_too(ticking: Served, worker: Sleeper) -> None:
    ticking.ok("Create", job="j", network="none")
    process = worker()
    ticking.ok("Attach", job="j", pid=process.pid)
    until(lambda: points(ticking, "j"))
    ticking.stop(signal.SIGKILL)
    process.kill()
    process.wait()
    ticking.start()
    until(lambda: points(ticking, "j")[-1].pids == 0)


def test_a_corrupt_file_is_put_aside_once_and_costs_no_job(ticking: Served, worker: Sleeper) -> None:
    begin(ticking, worker, "j")
    until(lambda: points(ticking, "j"))
    ticking.stop(signal.SIGKILL)
    for suffix in ("-wal", "-shm"):
        Path(f"{path(ticking.node)}{suffix}").unlink()
    path(ticking.node).write_bytes(b"no database " * 1000)
    ticking.start()
    until(lambda: path(ticking.node).stat().st_size != 12000 and points(ticking, "j"))
    told = [e for e in ticking.ok("Events", limit=100)["events"] if "samples" in e["text"]]
    assert len(told) == 1 and "samples.sqlite.corrupt" in told[0]["text"]
    assert Path(f"{path(ticking.node)}.corrupt").exists()
    assert ticking.ok("Finish", job="j")["record"]["notes"] == []


def test_a_locked_file_holds_up_no_tick_and_no_finish(ticking: Served, worker: Sleeper) -> None:
    begin(ticking, worker, "j")
    until(lambda: points(ticking, "j"))
    with closing(sqlite3.connect(path(ticking.node), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        before = ticks(ticking)
        # Far more than there would be, were each to wait for the lock.
        until(lambda: ticks(ticking) > before + 30)
        ticking.ok("Finish", job="j")
        other.execute("ROLLBACK")
    found = until(lambda: points(ticking, "j")[-1].pids == 0 and points(ticking, "j"))
    assert rises(found)


def test_a_full_disk_delays_points_and_loses_none_in_a_while(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    try:
        whose = Whose(1, "j", 5.0)
        with closing(History(tmp_path / FILE)) as history:
            history.append([(whose, POINT)], 5.0)
            with suppress(OSError), open(tmp_path / "much", "wb", buffering=0) as stream:
                while stream.write(b"x" * 4096):
                    pass
            written = 1
            for n in range(2, 40):
                try:
                    history.append([(whose, msgspec.structs.replace(POINT, at=n * 400 * 10**9))], 5.0)
                    written = n
                except LedgerError as e:
                    assert "full" in str(e)
            assert written < 39
            (tmp_path / "much").unlink()
            history.append([(whose, msgspec.structs.replace(POINT, at=40 * 400 * 10**9))], 5.0)
            assert len(history.points(1)) == 40 and history.size().lost == 0
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_nothing_is_kept_where_it_is_switched_off(ticking: Served, worker: Sleeper) -> None:
    begin(ticking, worker, "j")
    until(lambda: points(ticking, "j"))
    text = ticking.node.config.read_text()
    ticking.node.config.write_text(f"{text}\n[samples]\nmax = 0\n")
    ticking.ok("Reload")
    before = len(points(ticking, "j"))
    tick = ticks(ticking)
    until(lambda: ticks(ticking) > tick + 5)
    assert len(points(ticking, "j")) == before


def test_a_job_of_acctd_run_has_points_without_an_agent(node: Node) -> None:
    record = node.job("--id", "j", "--memory", "64M", "--", "sh", "-c", BURN.format(3), timeout=60)
    found = kept(path(node), "j", record["started"])
    assert len(found) >= 2 and rises(found)
    end = found[-1]
    assert (end.at, end.cpu_user) == (record["wall_ns"], record["totals"]["cpu_user"][""])
    assert end.block_read == sum(record["totals"].get(BLOCK_READ_BYTES.name, {}).values())
    assert (
        found[0].memory_limit == 64 << 20
        and 0 < found[0].cpu_user + found[0].cpu_system < end.cpu_user + end.cpu_system
    )


def test_a_short_job_of_acctd_run_touches_no_file_of_samples(node: Node) -> None:
    node.job("--", "true")
    assert not path(node).exists()


def test_acctd_run_says_what_it_cannot_keep_and_ends_as_its_command_did(node: Node) -> None:
    path(node).mkdir(parents=True)
    done = node.acctd("run", "--network", "none", "--", "sh", "-c", "sleep 2.5; exit 7")
    assert done.returncode == 7 and done.stderr.count(FILE) == 1, done.stderr
