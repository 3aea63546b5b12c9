"""Bills of real jobs: one over three nodes, living ones so far, and what an ordinary user gets to see."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from acctd import tariff
from acctd.cli import bill, billagent, billforms
from acctd.cli.main import main
from lab.topology import Topology
from tests.kernel.conftest import Node, make_node
from tests.kernel.served import Served

LOADED = bill, billagent, billforms  # before a child is another user, who may not read this tree
USER, OTHER = 65534, 65533
TARIFF = """
name = "lab"
currency = "EUR"
[[period]]
valid_from = 2020-01-01
[[period.item]]
name = "CPU"
meter = "cpu"
unit = "core-second"
price = 0.5
[[period.item]]
name = "Job"
meter = "jobs"
unit = "job"
price = 1
"""
WORK = ["sh", "-c", "read -r _; head -c 20000000 /dev/zero | sha256sum"]


class Host(Node):
    """A node with a name of its own, as the kernel knows it: a UTS namespace, uts_namespaces(7)."""

    @property
    def name(self) -> str:
        return self.directory.name

    def argv(self, *arguments: str) -> list[str]:
        inside = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return [*inside, *super().argv(*arguments)]


def with_prices(node: Node) -> Node:
    config = node.config.read_text() + (
        f'[export]\nspool_dir = "{node.directory}/spool"\npositions_dir = "{node.directory}/positions"\n'
        f'[json.log]\npath = "{node.directory}/log.jsonl"\n[bill]\ntariff = "{node.directory}/tariff.toml"\n'
    )
    node.config.write_text(config)
    (node.directory / "tariff.toml").write_text(TARIFF)
    return node


def begun(node: Node) -> Served:
    made = Served(node, None)  # type: ignore[arg-type]  # start() sets it
    made.start()
    return made


def work(served: Served, job: str, **parameters: Any) -> subprocess.Popen[bytes]:
    """A job with a process in it that waits for a line, and then works."""
    served.ok("Create", job=job, network="none", **parameters)
    process = served.node.topology.popen(served.node.topology.node, WORK, stdin=-1, stdout=-3)
    served.ok("Attach", job=job, pid=process.pid)
    return process


def finished(served: Served, job: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    process.communicate(b"\n")
    record: dict[str, Any] = served.ok("Finish", job=job, exit_code=0)["record"]
    return record


def cpu(record: dict[str, Any]) -> int:
    return sum(record["totals"][name][""] for name in ("cpu_user", "cpu_system"))


def of(document: dict[str, Any], item: str, **group: str) -> list[dict[str, Any]]:
    return [line for line in document["lines"] if line["item"] == item and line["group"].items() >= group.items()]


@pytest.fixture
def hosts(topology: Topology, tmp_path: Path) -> Iterator[list[Host]]:
    with ExitStack() as stack:
        found = []
        for name in ("wn1", "wn2", "wn3"):
            (tmp_path / name).mkdir()
            making = make_node(topology, tmp_path / name)
            stack.callback(next, making, None)
            node = with_prices(next(making))
            found.append(Host(node.topology, node.directory, node.base, node.config))
        yield found


def test_a_job_on_three_nodes_is_one_bill_of_three_records(hosts: list[Host], tmp_path: Path) -> None:
    collected, used = tmp_path / "collected", {}
    collected.mkdir()
    for host in hosts:
        served = begun(host)
        record = finished(served, "42.0", work(served, "42.0", tags={"account": "physics"}))
        assert (record["id"], record["node"]) == ("42.0", host.name)
        used[host.name] = cpu(record)
        served.ok("Snapshot")
        assert served.stop() == 0
        done = host.acctd("export", "--once")
        assert done.returncode == 0, done.stderr

    def billed(*arguments: str) -> dict[str, Any]:
        done = hosts[0].acctd(
            *("bill", "--format", "json", "--job", "42.0", "--group-by", "node", *arguments),
            *("--from", "records", str(collected)),
        )
        assert (done.returncode, done.stderr) == (0, "")
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def quantities(document: dict[str, Any]) -> dict[str, int]:
        return {line["group"]["node"]: int(Decimal(line["quantity"]) * 10**9) for line in of(document, "CPU")}

    for name in ("wn1", "wn2"):
        shutil.copy(tmp_path / name / "log.jsonl", collected / f"{name}.jsonl")
    (collected / "again.gz").write_bytes(gzip.compress((tmp_path / "wn2" / "log.jsonl").read_bytes()))
    before = billed()
    assert quantities(before) == {name: used[name] for name in ("wn1", "wn2")}
    assert (before["source"]["records"], before["source"]["repeated"], before["source"]["nodes"]) == (2, 1, 2)

    late = collected / "wn3.jsonl"
    shutil.copy(tmp_path / "wn3" / "log.jsonl", late)
    after = billed()
    assert quantities(after) == used
    assert (after["source"]["records"], after["source"]["repeated"], after["source"]["nodes"]) == (3, 1, 3)
    assert after["payers"] == ["physics"]
    whole = billed("--group-by", "")
    (line,) = of(whole, "CPU")
    assert int(Decimal(line["quantity"]) * 10**9) == sum(used.values())
    assert Decimal(of(whole, "Job")[0]["quantity"]) == 3
    assert Decimal(whole["total"]) == Decimal(after["total"]) > Decimal(before["total"])
    own = [json.loads(host.acctd("bill", "--format", "json").stdout) for host in hosts]
    assert [int(Decimal(of(each, "CPU")[0]["quantity"]) * 10**9) for each in own] == list(used.values())


@pytest.fixture
def served(node: Node) -> Iterator[Served]:
    made = begun(with_prices(node))
    for parent in [node.directory, *node.directory.parents]:
        if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
            parent.chmod(0o755)
    yield made
    if made.process.poll() is not None:
        made.start()
    for job in made.ok("List")["jobs"]:
        made.call("Finish", job=job["id"])
    assert made.stop() == 0


def billed_as(uid: int, served: Served, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """What `acctd bill` says to a user: exit code, the document, standard error."""
    paths = [served.node.directory / name for name in (f"out-{uid}", f"err-{uid}")]
    tariff.load(str(served.node.directory / "tariff.toml"))  # with whatever that loads: the child may not
    pid = os.fork()
    if pid == 0:
        try:
            for fd, path in zip((1, 2), paths, strict=True):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            config = ["--config", str(served.node.config), "--socket", str(served.path)]
            main(["bill", "--format", "json", *config, *arguments])
        except SystemExit as e:
            sys.stdout.flush()
            os._exit(e.code if isinstance(e.code, int) else 0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = (path.read_text() for path in paths)
    return code, json.loads(out) if code == 0 else {}, err


def test_living_jobs_are_billed_so_far_by_whoever_may_see_them(served: Served) -> None:
    ended = finished(served, "ended", work(served, "ended", user=str(USER)))
    foreign = finished(served, "foreign", work(served, "foreign"))
    processes = [work(served, "mine", user=str(USER)), work(served, "roots")]

    code, document, err = billed_as(USER, served, "--group-by", "job")
    assert (code, err) == (0, "")
    assert {line["group"]["job"] for line in document["lines"]} == {"ended", "mine"}
    assert [line["living"] for line in of(document, "Job", job="mine")] == [True]
    assert [line["living"] for line in of(document, "Job", job="ended")] == [False]
    assert int(Decimal(of(document, "CPU", job="ended")[0]["quantity"]) * 10**9) == cpu(ended)
    assert (document["source"]["kind"], document["source"]["own_only"]) == ("agent", True)
    assert any("own jobs" in note for note in document["notes"])
    assert document["living"] == ["mine"]

    code, document, _ = billed_as(OTHER, served)
    assert (code, document["lines"], document["source"]["records"]) == (0, [], 0)

    def roots() -> dict[str, Any]:
        done = served.node.acctd("bill", "--format", "json", "--group-by", "job", "--socket", str(served.path))
        assert (done.returncode, done.stderr) == (0, "")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    document = roots()
    assert (document["source"]["kind"], document["source"]["own_only"]) == ("ledger", False)
    assert {line["group"]["job"] for line in of(document, "Job")} == {"ended", "foreign", "mine", "roots"}
    assert int(Decimal(of(document, "CPU", job="foreign")[0]["quantity"]) * 10**9) == cpu(foreign)
    assert document["living"] == ["mine", "roots"]

    served.ok("Snapshot")
    assert served.stop() == 0
    assert roots()["living"] == ["mine", "roots"], "from the ledger, where no agent answers"
    code, _, err = billed_as(USER, served)
    assert code == 69 and len(err.splitlines()) == 1
    served.start()
    for name, process in zip(("mine", "roots"), processes, strict=True):
        finished(served, name, process)
    document = roots()
    assert document["living"] == []
    assert Decimal(sum(Decimal(line["quantity"]) for line in of(document, "Job"))) == 4


def test_pages_go_on_where_they_ended(served: Served) -> None:
    for number in range(3):
        finished(served, f"r{number}", work(served, f"r{number}"))
    first = served.ok("Records", after=1)
    assert [signed["number"] for signed in first["records"]] == [2, 3]
    assert (first["last"], first["more"], first["all"]) == (3, False, True)
    assert served.ok("Records", after=3) == {"records": [], "last": 3, "more": False, "all": True, "archived": None}
    process = work(served, "open")
    page = served.ok("Interim")
    assert [(record["id"], record["state"]) for record in page["records"]] == [("open", "running")]
    assert served.ok("Interim", after=page["last"])["records"] == []
    finished(served, "open", process)
    for method in ("Records", "Interim"):
        assert served.call(method, after=-1)["error"].endswith("UsageError")
