"""The agent's ledger on a full disk, damaged, gone, or from before a reboot: no job loses anything, somebody is told.

Real disks are filled (a small tmpfs) and real files damaged; totals are of datagrams whose sizes are known.
"""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from acctd.cgroup.layout import discover
from acctd.kernel import netns
from acctd.kernel.cgroupfs import CgroupDir
from acctd.ledger import FILE, Ledger
from acctd.model import Record
from lab.traffic import Server, expected_udp
from tests.kernel.conftest import Node, scrub, sleeper
from tests.kernel.served import Served
from tests.kernel.test_family import give, worker
from tests.kernel.test_hook import hook

__all__ = ["sleeper"]  # a fixture

DISK = "8m"  # more than SQLite's log grows to before it is begun anew
FULL = "cannot be used now"
ROOM = "can be written again"


class Logged(Served):
    """A node with an agent whose log is kept, over restarts."""

    @property
    def log(self) -> Path:
        return self.node.directory / "log"

    def start(self, argv: Sequence[str] = ()) -> None:
        """Until it serves; `argv` may be something else that ends in `acctd serve`."""
        before = self.said("serving on")
        self.launch(argv)
        until(lambda: self.process.poll() is not None or self.said("serving on") > before)
        assert self.process.poll() is None, self.log.read_text()

    def launch(self, argv: Sequence[str] = ()) -> None:
        """Start it, and do not wait."""
        environ = {key: value for key, value in self.node.environ.items() if key != "NOTIFY_SOCKET"}
        with self.log.open("a") as log:
            self.process = self.node.topology.popen(
                self.node.topology.node, argv or self.node.argv("serve"), env=environ, stderr=log, text=True
            )

    def die(self) -> None:
        assert self.stop(signal.SIGKILL) == -signal.SIGKILL

    def said(self, what: str) -> int:
        """How many lines of the log have these words."""
        return self.log.read_text().count(what) if self.log.exists() else 0

    def sent(self, job: str) -> int:
        return sent(self.ok("Usage", job=job)["job"])

    def events(self, **which: Any) -> list[str]:
        return [event["text"] for event in self.ok("Events", **which)["events"]]

    def records(self, name: str) -> list[Record]:
        """The records of an id in the ledger; each must be as it was signed."""
        with Ledger(self.node.directory / "state" / FILE) as ledger:
            assert all(ledger.record(record.id).id == record.id for record in ledger.records())
            return [record for record in ledger.records() if record.id == name]


@dataclass
class Disk:
    """The file system that the ledger is on."""

    place: Path

    def fill(self) -> None:
        """To the last byte."""
        with (self.place / "filler").open("wb", buffering=0) as filler:
            for size in (1 << 16, 4096, 1):
                try:
                    while filler.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        (self.place / "filler").unlink()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def sent(job: dict[str, Any]) -> int:
    """What a job, or a record, has of bytes sent into the world."""
    return int(job["totals"]["network"]["OutgoingExternal"])


def octets(*sizes: int) -> int:
    return sum(expected_udp(size, 4).data_bytes for size in sizes)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small one, mounted where the agent's state goes."""
    place = tmp_path / "state"
    place.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "acctdtest", place], check=True)
    yield Disk(place)
    subprocess.run(["umount", "--lazy", place], check=True)  # an agent of a failed test may still be there


@pytest.fixture
def cramped(disk: Disk, node: Node) -> Iterator[tuple[Logged, Disk]]:
    """An agent with its ledger on the small disk; there is room again at the end."""
    with serving(node) as made:
        try:
            yield made, disk
        finally:
            (disk.place / "filler").unlink(missing_ok=True)


@pytest.fixture
def kept(node: Node) -> Iterator[Logged]:
    with serving(node) as made:
        yield made


@pytest.fixture
def each_kept(each_backend: Node) -> Iterator[Logged]:
    with serving(each_backend) as made:
        yield made


@contextmanager
def serving(node: Node) -> Iterator[Logged]:
    """An agent and somebody to send to; what is still open is finished at the end."""
    made = Logged(node, None)  # type: ignore[arg-type]  # start() sets it
    with node.topology.enter(node.topology.wan):
        server = Server()
    with server:
        made.start()
        yield made
        if made.process.poll() is not None:
            made.start()
        for job in made.ok("List")["jobs"]:
            made.call("Finish", job=job["id"])
        made.ok("Snapshot")
        assert made.stop() == 0


# A full disk


def test_a_full_disk_stops_nobody_but_who_wants_a_new_job(
    cramped: tuple[Logged, Disk], sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    served, disk = cramped
    for name in ("busy", "waiting", "done"):
        served.ok("Create", job=name)
    served.ok("Attach", job="done", pid=sleeper().pid)
    with worker(served, "busy", "busy") as run:
        run(give(20_000))
        disk.fill()
        run(give(30_000))
        for _ in range(3):
            served.ok("Snapshot")
        assert served.sent("busy") == octets(20_000, 30_000)
        served.ok("Attach", job="waiting", pid=sleeper().pid)
        record = served.ok("Finish", job="done", exit_code=3)["record"]
        assert served.ok("Finish", job="done")["record"] == record
        refused = hook(served, "create", "--job", "new")
        assert refused.returncode == 74, refused
        assert refused.stderr.count("\n") == 1
        assert "disk is full" in refused.stderr
        assert {job["id"]: job["phase"] for job in served.ok("List")["jobs"]} == {
            "busy": "running", "waiting": "running",
        }  # fmt: skip
        assert (served.said(FULL), served.said(ROOM)) == (1, 0)
        assert served.records("done") == []
        disk.free()
        served.ok("Snapshot")
        assert [(r.exit_code, r.state) for r in served.records("done")] == [(3, "done")]
        assert served.ok("Finish", job="done")["record"] == record
        assert (served.said(FULL), served.said(ROOM)) == (1, 1)
        told = [event["text"] for event in served.ok("Events")["events"] if event["event"] == "ledger"]
        assert ["waits in memory" in told[0], "written again" in told[1]] == [True, True]
        assert len(told) == 2
        served.ok("Create", job="new")
        assert sent(served.ok("Finish", job="busy", exit_code=0)["record"]) == octets(20_000, 30_000)


def test_an_agent_killed_while_the_disk_is_full_is_followed_by_one_that_knows_all(
    cramped: tuple[Logged, Disk],
) -> None:
    served, disk = cramped
    served.ok("Create", job="busy")
    served.ok("Create", job="waiting")
    with worker(served, "busy", "busy") as run:
        run(give(20_000))
        disk.fill()
        served.ok("Snapshot")
        run(give(30_000))
        served.die()
        run(give(40_000))
        served.start()
        assert {job["id"]: job["phase"] for job in served.ok("List")["jobs"]} == {"busy": "running", "waiting": "made"}
        assert served.sent("busy") == octets(20_000, 30_000, 40_000)
        disk.free()
        served.ok("Snapshot")
        # Once more, with what is in the ledger now.
        served.die()
        served.start()
        run(give(50_000))
        record = served.ok("Finish", job="busy", exit_code=0)["record"]
    assert sent(record) == octets(20_000, 30_000, 40_000, 50_000)
    assert [r.state for r in served.records("busy")] == ["done"]


def test_a_job_finished_on_a_full_disk_has_its_record_though_the_agent_dies(cramped: tuple[Logged, Disk]) -> None:
    """The kernel keeps its counts until the record is written."""
    served, disk = cramped
    served.ok("Create", job="done")
    with worker(served, "done", "done") as run:
        run(give(20_000))
        disk.fill()
        run(give(30_000))
        first = served.ok("Finish", job="done", exit_code=3)["record"]
    served.die()
    disk.free()
    served.start()
    (record,) = served.records("done")
    assert record.totals["network"] == first["totals"]["network"]
    assert sent(first) == octets(20_000, 30_000)
    # How it ended was known to the dead agent alone, and the record says so.
    assert record.state == "lost"
    assert any("exit status is unknown" in note for note in record.notes)


def test_a_job_begun_on_a_full_disk_has_run_though_the_agent_dies(
    cramped: tuple[Logged, Disk], sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """Its beginning could not be written: what it has used says that it began."""
    served, disk = cramped
    for name in ("lives", "ended"):
        served.ok("Create", job=name, network="host")
    disk.fill()
    child = sleeper()
    served.ok("Attach", job="lives", pid=child.pid)
    spin = subprocess.Popen(
        ["sh", "-c", "read _; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"], stdin=subprocess.PIPE
    )
    served.ok("Attach", job="ended", pid=spin.pid)
    spin.communicate(b"\n")
    served.stop(signal.SIGKILL)
    disk.free()
    served.start()
    assert {job["id"]: job["phase"] for job in served.ok("List")["jobs"]} == {"lives": "running"}
    record = served.ok("Finish", job="ended")["record"]
    assert record["totals"]["cpu_user"][""] + record["totals"]["cpu_system"][""] > 0
    child.kill()
    child.wait()
    served.ok("Snapshot")
    assert served.ok("Events", job="lives")["events"][-1]["event"] == "ended"


def test_an_agent_that_cannot_begin_on_a_full_disk_waits_for_room(cramped: tuple[Logged, Disk]) -> None:
    """Stopped cleanly, it has left nothing beside the file that SQLite could go on in."""
    served, disk = cramped
    served.ok("Create", job="busy")
    with worker(served, "busy", "busy") as run:
        run(give(20_000))
        assert served.stop() == 0
        disk.fill()
        before = served.said("serving on")
        served.launch()
        until(lambda: served.said("waiting for it"))
        run(give(30_000))
        disk.free()
        until(lambda: served.said("serving on") > before)
        assert served.sent("busy") == octets(20_000, 30_000)
        assert served.said("waiting for it") == 1
        served.ok("Finish", job="busy", exit_code=0)
    assert [r.totals["network"]["OutgoingExternal"] for r in served.records("busy")] == [octets(20_000, 30_000)]


# acctd with one function that fills the disk after its first call.
FILLING = """
import importlib, sys
from pathlib import Path
from tests.faults.test_ledger_serve import Disk
module, _, name = sys.argv[1].partition(":")
owner, _, last = name.partition(".")
owner = getattr(importlib.import_module(module), owner)
original, called = getattr(owner, last), []

def filling(*arguments, **options):
    result = original(*arguments, **options)
    if not called:
        called.append(True)
        Disk(Path(sys.argv[2])).fill()
    return result

setattr(owner, last, filling)
from acctd.cli.main import main
main(["serve"])
"""


@pytest.mark.parametrize("step", ["acctd.ledger:Ledger.open_job", "acctd.agent:Agent.create"])
def test_a_disk_that_fills_while_a_job_is_made(cramped: tuple[Logged, Disk], step: str) -> None:
    """The creation is refused and undone; its id and its lease are free once there is room."""
    served, disk = cramped
    before = served.node.left()
    assert served.stop() == 0
    served.start([sys.executable, "-c", FILLING, step, str(disk.place)])
    refused = hook(served, "create", "--job", "x")
    assert refused.returncode == 74, refused
    assert served.ok("List")["jobs"] == []
    disk.free()
    served.ok("Snapshot")
    assert served.node.left() == before
    served.ok("Create", job="x")
    served.ok("Finish", job="x", exit_code=0)


# A damaged ledger


def overwrite(path: Path, at: int, text: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(text)


def damage(state: Path, how: str) -> None:
    path = state / FILE
    size, page = path.stat().st_size, 4096
    if how == "middle":
        overwrite(path, size // 2 // page * page, os.urandom(2 * page))
    elif how == "header":
        overwrite(path, 0, os.urandom(100))
    elif how == "everything":
        overwrite(path, 0, os.urandom(size))
    elif how == "row":
        overwrite(path, path.read_bytes().index(b'"id":"pilot"'), b"\xff" * 8)
    elif how == "empty":
        os.truncate(path, 0)
    else:
        for file in state.glob(f"{FILE}*"):
            file.unlink()
        if how == "directory":
            path.mkdir()


DAMAGE = ["middle", "header", "everything", "row", "empty", "directory", "gone"]


@contextmanager
def family(served: Logged) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """A pilot and a payload inside it with a pipe of its own, both with a worker; and one nobody has entered."""
    served.ok("Create", job="pilot", tags={"Vo": "cms"}, limits={"pids": 99})
    served.ok("Create", job="payload", parent="pilot", network="nat")
    served.ok("Create", job="waiting")
    with ExitStack() as stack:
        yield (
            stack.enter_context(worker(served, "pilot", "pilot")),
            stack.enter_context(worker(served, "payload", "payload")),
        )


def check_family(served: Logged, pilot: int, payload: int) -> None:
    """All three are held, as what they were, and their totals are these."""
    jobs = {job["id"]: job for job in served.ok("List")["jobs"]}
    assert {name: (job["parent"], job["phase"]) for name, job in jobs.items()} == {
        "pilot": (None, "running"), "payload": ("pilot", "running"), "waiting": (None, "made"),
    }  # fmt: skip
    assert (jobs["pilot"]["tags"], jobs["pilot"]["limits"]["pids"]) == ({"Vo": "cms"}, 99)
    assert served.sent("payload") == payload
    assert served.sent("pilot") == pilot + payload


def finish_family(served: Logged, pilot: int, payload: int) -> None:
    """Records with these totals are in a ledger that is whole."""
    for name, total in (("payload", payload), ("pilot", pilot + payload)):
        assert sent(served.ok("Finish", job=name, exit_code=0)["record"]) == total
        (record,) = served.records(name)
        assert record.totals["network"]["OutgoingExternal"] == total


@pytest.mark.parametrize("how", DAMAGE)
def test_a_ledger_found_damaged_is_moved_aside_and_the_jobs_go_on(each_kept: Logged, how: str) -> None:
    served = each_kept
    state = served.node.directory / "state"
    with family(served) as (in_pilot, in_payload):
        in_pilot(give(20_000))
        served.ok("Snapshot")
        served.die()
        in_payload(give(30_000))
        sqlite3.connect(state / FILE).execute("PRAGMA wal_checkpoint(TRUNCATE)").connection.close()
        damage(state, how)
        served.start()
        check_family(served, octets(20_000), octets(30_000))
        if how not in ("empty", "gone"):  # there is nothing then that could be kept
            (aside,) = (path for path in state.glob(f"{FILE}.corrupt-*") if not path.name.endswith(("-wal", "-shm")))
            assert any(str(aside) in text for text in served.events())
        for name in ("pilot", "payload", "waiting"):
            assert any(f"job {name} " in text and "known again" in text for text in served.events())
        in_pilot(give(40_000))
        finish_family(served, octets(20_000, 40_000), octets(30_000))


@pytest.mark.parametrize("how", DAMAGE)
def test_a_ledger_damaged_under_a_living_agent(kept: Logged, how: str) -> None:
    """Found at once or by the one that comes after; jobs signed off meanwhile have their records all the same."""
    served = kept
    state = served.node.directory / "state"
    with family(served) as (in_pilot, in_payload):
        in_pilot(give(20_000))
        served.ok("Snapshot")
        other = sqlite3.connect(state / FILE)
        other.execute("PRAGMA wal_checkpoint(PASSIVE)")
        other.close()
        numbers = [event["number"] for event in served.ok("Events")["events"]]
        damage(state, how)
        in_payload(give(30_000))
        served.ok("Snapshot")
        check_family(served, octets(20_000), octets(30_000))
        served.ok("Create", job="late")
        record = served.ok("Finish", job="late", exit_code=0)["record"]
        served.ok("Snapshot")
        served.die()
        served.start()
        check_family(served, octets(20_000), octets(30_000))
        if how in ("directory", "empty", "gone"):
            # The agent still had the file itself open, and has written all of it again.
            assert served.ok("Finish", job="late")["record"] == record
            assert any("taken away, and written again" in text for text in served.events())
            assert [event["number"] for event in served.ok("Events")["events"]][: len(numbers)] == numbers
        assert served.ok("Events")["events"][-1]["number"] > numbers[-1]
        in_pilot(give(40_000))
        finish_family(served, octets(20_000, 40_000), octets(30_000))


def test_without_a_ledger_the_kernel_says_what_is_whose(
    each_kept: Logged, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """A living job is held again, an ended one gets its record, a half-made one goes, a foreign one stays."""
    served = each_kept
    base = served.node.base
    for name in ("living", "ended"):
        served.ok("Create", job=name)
    with worker(served, "living", "living") as run:
        run(give(20_000))
        with worker(served, "ended", "ended") as last:
            last(give(30_000))
        served.die()
        damage(served.node.directory / "state", "gone")
        hierarchies = discover().hierarchies
        for hierarchy in hierarchies[: len(hierarchies) // 2 + 1]:
            assert hierarchy.job(base, "job_half").make()
        foreign = [hierarchy.job(base, "job_foreign").path for hierarchy in hierarchies]
        for path in foreign:
            path.mkdir()
        inside = sleeper()
        (foreign[0] / "cgroup.procs").write_text(str(inside.pid))
        served.start()
        assert [job["id"] for job in served.ok("List")["jobs"]] == ["living"]
        assert not any(hierarchy.job(base, "job_half").exists() for hierarchy in hierarchies)
        assert all(path.is_dir() for path in foreign)
        assert (foreign[0] / "cgroup.procs").read_text().split() == [str(inside.pid)]
        assert inside.poll() is None
        (record,) = served.records("ended")
        assert (record.state, record.totals["network"]["OutgoingExternal"]) == ("lost", octets(30_000))
        assert served.sent("living") == octets(20_000)
        inside.kill()
        inside.wait()
        served.ok("Finish", job="living", exit_code=0)
        for hierarchy in hierarchies:
            until(hierarchy.job(base, "job_foreign").remove)
            CgroupDir(hierarchy.top.mount, (base,)).remove()


# A reboot


def test_jobs_of_an_earlier_boot_are_closed_with_their_last_totals(kept: Logged) -> None:
    served = kept
    runtime = served.node.directory / "run"
    with family(served) as (in_pilot, in_payload):
        in_pilot(give(20_000))
        in_payload(give(30_000))
        served.ok("Snapshot")
        walls = {job["id"]: job["wall_ns"] for job in served.ok("List")["jobs"]}
        # Since the last reading: gone with the kernel.
        in_pilot(give(40_000))
        served.die()
    scrub(served.node.base)
    for path in (runtime / "netns").iterdir():
        netns.remove(path)
    shutil.rmtree(runtime)
    lab = served.node.topology
    lab.run(lab.node, ["nft", "flush", "ruleset"])
    with sqlite3.connect(served.node.directory / "state" / FILE) as ledger:
        ledger.execute("UPDATE job SET boot_id = '6d8e9c4b-0000-4000-8000-000000000000'")
    ledger.close()
    served.start()
    assert served.ok("List")["jobs"] == []
    for name, total in (("pilot", octets(20_000, 30_000)), ("payload", octets(30_000))):
        (record,) = served.records(name)
        assert (record.state, record.totals["network"]["OutgoingExternal"]) == ("lost", total)
        assert any("rebooted" in note for note in record.notes)
        assert any("rebooted" in text for text in served.events(job=name))
        # Not beyond the last reading: on another boot's clock nobody can tell.
        assert 0 < record.wall_ns <= walls[name]
    assert served.records("waiting") == []
    served.ok("Create", job="pilot")
    assert sent(served.ok("Finish", job="pilot", exit_code=0)["record"]) == 0
