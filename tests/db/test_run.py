"""`acctd run --influx` against a real influxd: the agent's series, the ledger's numbers, and nothing lost."""

import itertools
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from acctd import spool
from acctd.ledger import FILE, Ledger
from acctd.metrics import BY_NAME
from lab.topology import Topology
from tests.db.conftest import Influx1, until
from tests.kernel.conftest import Node, make_node, topology
from tests.kernel.served import Served

__all__ = ["topology"]

_WORK = "head -c 30000000 /dev/zero | sha256sum; sleep 0.3"


class Database(Influx1):
    """One on the node's own loopback."""

    topology: Topology

    def on(self, node: Node) -> "Database":
        self.topology = node.topology
        return self

    def start(self) -> None:
        with self.topology.enter(self.topology.node):
            super().start()

    def ask(self, text: str) -> list[dict[str, Any]]:
        with self.topology.enter(self.topology.node):
            found = self.query(text)
            self._http.clear()  # a kept connection would be another namespace's
        return found


@pytest.fixture
def node(topology: Topology, tmp_path: Path) -> Iterator[Node]:
    yield from make_node(topology, tmp_path)


@pytest.fixture
def database(node: Node, tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "influx").on(node)
    yield made
    made.kill()


def run(node: Node, database: Database, name: str, *command: str) -> tuple[dict[str, Any], str]:
    """A job with series; its record, and what acctd said."""
    path = node.directory / f"{name}.json"
    url = f"{database.url}?db=acctd&records_retention_policy=years&timeout=1"
    argv = ["run", "--id", name, "--network", "none", "--influx", url, "--json", str(path), "--tag", "account=cms"]
    done = node.acctd(*argv, "--", *command)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(path.read_text())
    return record, done.stderr


def test_the_last_points_are_the_record(node: Node, database: Database) -> None:
    database.start()
    record, said = run(node, database, "one", "sh", "-c", _WORK)
    assert "waits" not in said
    assert list((node.directory / "state" / "outbox").iterdir()) == []
    for name in ("cpu_user", "memory_anon_peak", "memory_peak", "pids_peak"):
        metric = BY_NAME[name]
        rows = database.ask(f"SELECT last({metric.field}) AS v FROM {metric.measurement} WHERE job = 'one'")  # noqa: S608
        assert rows[0]["v"] == record["totals"][name][""], name
    rows = database.ask("SELECT * FROM years.acctd_record WHERE job = 'one'")
    assert len(rows) == 1
    assert (rows[0]["cpu_user_ns"], rows[0]["account"]) == (record["totals"]["cpu_user"][""], "cms")
    assert len(database.ask("SELECT anon_bytes FROM acctd_memory WHERE job = 'one'")) >= 1, "a living job is sampled"


def test_agent_and_run_write_the_same_series(node: Node, database: Database) -> None:
    database.start()
    run(node, database, "alone", "sh", "-c", _WORK)
    node.config.write_text(
        node.config.read_text().replace("[cgroup]", "poll_interval = 0.2\n[cgroup]")
        + f'[export]\nspool_dir = "{node.directory}/spool"\npositions_dir = "{node.directory}/positions"\n'
        f'[influxdb.db]\nurl = "{database.url}"\nversion = 1\ndatabase = "acctd"\nrecords_retention_policy = "years"\n'
    )
    served = Served(node, None)  # type: ignore[arg-type]  # start() sets it
    served.start()
    served.ok("Create", job="held", network="none", tags={"account": "cms"})
    work = node.topology.popen(node.topology.node, ["sh", "-c", f"read -r _; {_WORK}"], stdin=-1, stdout=-3)
    served.ok("Attach", job="held", pid=work.pid)
    work.communicate(b"\n")
    served.ok("Snapshot")
    served.ok("Finish", job="held", exit_code=0)
    served.ok("Snapshot")
    until(lambda: node.acctd("export", "--once").returncode == 0)
    assert served.stop() == 0
    tags = {row["name"] for row in database.ask("SHOW TAG KEYS")}
    for measurement in sorted(tags - {"acctd_agent", "acctd_event"}):
        place = "years." if measurement == "acctd_record" else ""
        keys = {
            job: {key for row in database.ask(f"SELECT * FROM {place}{measurement} WHERE job = '{job}'")  # noqa: S608
                  for key, value in row.items() if value is not None}
            for job in ("alone", "held")
        }  # fmt: skip
        # Whether a job's programs come from the disk or from the page cache is not its doing.
        if measurement == "acctd_blkio" and not all(keys.values()):
            continue
        keys = {job: {key for key in found if not key.startswith("block_")} for job, found in keys.items()}
        assert keys["alone"] == keys["held"], measurement
        assert keys["alone"], measurement
    hosts = {row["value"] for row in database.ask('SHOW TAG VALUES WITH KEY = "host"')}
    assert len(hosts) == 1


def test_what_a_dead_database_does_not_take_is_delivered_by_the_next_run(node: Node, database: Database) -> None:
    record, said = run(node, database, "first", "true")
    assert "for the next --influx" in said
    assert len(list((node.directory / "state" / "outbox").iterdir())) == 1
    database.start()
    # A busy machine may take more than one.
    used: list[str] = []

    def delivered() -> bool:
        used.append(f"later-{len(used)}")
        run(node, database, used[-1], "sh", "-c", "sleep 1")
        return list((node.directory / "state" / "outbox").iterdir()) == []

    until(delivered)
    rows = database.ask("SELECT * FROM years.acctd_record")
    assert {row["job"] for row in rows} == {"first", *used}
    assert next(row for row in rows if row["job"] == "first")["wall_ns"] == record["wall_ns"]


def test_runs_at_one_time_and_what_many_left_keep_nobody_waiting(node: Node, database: Database) -> None:
    """Each with a place of its own; 8 that were left cost the next one no time of their own."""
    argv = node.argv("run", "-q", "--network", "none", "--influx", f"{database.url}?db=acctd&timeout=0.3", "--", "true")
    many = [node.topology.popen(node.topology.node, argv, env=node.environ, stderr=-1, text=True) for _ in range(8)]
    outboxes = node.directory / "state" / "outbox"
    until(lambda: sum(_has_its_record(place) for place in outboxes.glob("[!.]*")) == 8)
    for process in many:
        process.send_signal(signal.SIGINT)  # its job has ended, and it waits for the database
    for process in many:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
        assert "cannot be delivered" not in said
    assert len(list(outboxes.iterdir())) == 8
    _, said = run(node, database, "next", "true")
    assert said.count("for the next --influx") == 1, "it speaks of its own alone"
    database.start()
    # One does for all of them on a quiet machine.
    numbers = itertools.count()
    until(lambda: run(node, database, f"last-{next(numbers)}", "sleep", "2") and list(outboxes.iterdir()) == [])
    assert len(database.ask("SELECT wall_ns FROM acctd_record")) == 8


def _has_its_record(place: Path) -> bool:
    lines = b"".join(spool.content(segment) for segment in spool.segments(place / "spool" / "records"))
    return lines.count(b"\n") == 2  # a mark and the record


def test_the_record_of_a_run_that_was_killed_is_sent_too(node: Node, database: Database) -> None:
    argv = node.argv(
        "run", "--id", "cut", "--network", "none", "--influx", f"{database.url}?db=acctd&timeout=0.3", "--"
    )
    over = node.directory / "over"
    job = ["sh", "-c", f"until test -e {over}; do sleep 0.1; done"]
    process = node.topology.popen(node.topology.node, [*argv, *job], env=node.environ, stderr=-3)
    outboxes = node.directory / "state" / "outbox"
    until(lambda: list(outboxes.glob("cut.*/spool/samples/*")))
    process.kill()
    process.wait()
    database.start()
    run(node, database, "while-it-lives", "true")
    assert "cut" in {path.name.split(".")[0] for path in outboxes.iterdir()}, "its job goes on"
    over.touch()
    until(lambda: node.acctd("run", "-q", "--network", "none", "--", "true") and _has_record(node, "cut"))
    numbers = itertools.count()
    until(lambda: run(node, database, f"after-{next(numbers)}", "sleep", "1") and list(outboxes.iterdir()) == [])
    rows = database.ask("SELECT state FROM acctd_record WHERE job = 'cut'")
    assert [row["state"] for row in rows] == ["lost"]


def _has_record(node: Node, name: str) -> bool:
    with Ledger(node.directory / "state" / FILE) as ledger:
        return name in {record.id for record in ledger.records()}


def test_a_state_directory_without_room_costs_the_series_and_not_the_job(node: Node, database: Database) -> None:
    node.acctd("run", "-q", "--network", "none", "--", "true")
    (node.directory / "state" / "outbox").write_text("in the way")
    record, said = run(node, database, "alone", "true")
    assert record["state"] == "done"
    assert "no series are sent" in said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://x?db=a", "write it like"),
        ("http://x", "bucket is missing"),
        ("http://u:p@x?db=a", "has a user or password in it"),
        ("http://x?db=a&colour=red", "colour"),
        ("http://[x", "is no URL"),
        ("", "is no URL"),
        ("http://x?db=\udcff", "is no URL"),
        ("http://x?db=%00", "printable"),
        ("http://x?db=a&url=http://y", "url in its query"),
        ("http://u:secret@x?db=a&foo=1", "foo"),
    ],
)
def test_a_url_that_is_none_costs_no_job(node: Node, url: str, said: str) -> None:
    done = node.acctd("run", "--influx", url, "--", "touch", str(node.directory / "ran"))
    assert done.returncode == 64
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert "secret" not in done.stderr
    assert not (node.directory / "ran").exists()
