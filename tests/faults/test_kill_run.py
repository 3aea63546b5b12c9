"""`acctd run` dies by SIGKILL at every step of a job's life; the next run on the node puts everything right.

Afterwards there is exactly one record of a job that had begun, none of one that had not, and nothing in the kernel.
"""

import os
import select
import signal
import subprocess
import time

import pytest

from acctd.cgroup.layout import discover
from acctd.ledger import FILE, Ledger
from tests.faults.bed import CHAINS
from tests.kernel.conftest import Node

DYING = "from tests.faults.dying import main; main()"

# The name {chains} stands for the back end's class. JobCgroups.remove is called for the sentinel cgroup first.
MAKING = [
    ("acctd.ledger:Ledger.open_job", "before", 1),
    ("acctd.ledger:Ledger.open_job", "after", 1),
    ("acctd.kernel.cgroupfs:CgroupDir.make", "after", 1),  # a base without a job
    ("acctd.kernel.cgroupfs:CgroupDir.make", "after", 4),  # a job in some of the hierarchies
    ("acctd.cgroup.driver:JobCgroups._limit", "before", 1),
    ("acctd.cgroup.driver:JobCgroups.create", "after", 1),
    ("{chains}.add", "before", 1),
    ("{chains}.add", "after", 1),
    ("acctd.kernel.netns:create", "after", 1),
    ("acctd.kernel.libc:mount", "before", 1),  # the name is a file, and nothing is mounted on it
    ("acctd.network.host:keep_in", "after", 1),
    ("acctd.kernel.rtnetlink:RouteSocket.apply", "after", 2),  # a link without addresses
    ("acctd.network.pipe:make", "after", 1),
    ("acctd.cgroup.driver:JobCgroups.remove", "before", 1),  # the sentinel stays
    ("acctd.readers:open_for", "before", 1),
    ("acctd.agent:Agent.create", "after", 1),
    ("acctd.ledger:Ledger.begin", "before", 1),
]
BEGUN = [
    ("acctd.ledger:Ledger.begin", "after", 1),
    ("acctd.launch:start", "before", 1),
    ("acctd.launch:start", "after", 1),
    ("acctd.agent:Agent.finish", "before", 1),
    ("acctd.cgroup.driver:JobCgroups.kill", "after", 1),
    ("acctd.agent:Agent.take_pipe", "before", 1),
    ("acctd.network.pipe:_remove_link", "after", 1),  # the link is gone, its name is not
    ("acctd.agent:Agent.take_pipe", "after", 1),
    ("acctd.ledger:Ledger.sign_off", "before", 1),
    ("acctd.ledger:Ledger.sign_off", "after", 1),
    ("acctd.agent:Agent.dismantle", "before", 1),
    ("{chains}.remove", "before", 1),
    ("acctd.network.host:let_go", "before", 1),
    ("{chains}.remove", "after", 1),
    ("acctd.kernel.conntrack:forget", "after", 1),
    ("acctd.cgroup.driver:JobCgroups.remove", "before", 2),
    ("acctd.kernel.cgroupfs:CgroupDir.remove", "after", 3),  # gone from some of the hierarchies
    ("acctd.cgroup.driver:JobCgroups.remove", "after", 2),
    ("acctd.ledger:Ledger.forget", "before", 1),
    ("acctd.ledger:Ledger.forget", "after", 1),
]


def _name(point: object) -> str | None:
    return point.rpartition(":")[2] if isinstance(point, str) else None


@pytest.mark.parametrize(("point", "when", "number"), MAKING, ids=_name)
def test_a_job_that_never_began_leaves_no_record(each_backend: Node, point: str, when: str, number: int) -> None:
    _die_and_recover(each_backend, point, when, number, records=0)


@pytest.mark.parametrize(("point", "when", "number"), BEGUN, ids=_name)
def test_a_job_that_had_begun_has_one_record(each_backend: Node, point: str, when: str, number: int) -> None:
    _die_and_recover(each_backend, point, when, number, records=1)


def _die_and_recover(node: Node, point: str, when: str, number: int, *, records: int) -> None:
    backend = "nftables" if '"nftables"' in node.config.read_text() else "iptables"
    point = point.format(chains=CHAINS[backend])
    arguments = ["run", "-q", "--id", "victim", "--memory", "100M", "--", "true"]
    died = node.python(DYING, point, when, str(number), *arguments, timeout=60)
    assert died.returncode == -signal.SIGKILL, died.stderr
    _until_nobody_is_left(node)
    # As often as one likes: the first puts right, the others find nothing.
    for turn in range(2):
        done = node.acctd("run", "-q", "--id", f"next{turn}", "--", "true", timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    with Ledger(node.directory / "state" / FILE) as ledger:
        assert [r.id for r in ledger.records() if r.id == "victim"] == ["victim"] * records
        for record in ledger.records():
            assert ledger.record(record.id) == record
        if records:
            assert ledger.record("victim").totals["cpu_user"][""] >= 0
    if not records:
        # Its id is free again.
        assert node.acctd("run", "-q", "--id", "victim", "--", "true").returncode == 0


def _until_nobody_is_left(node: Node) -> None:
    """The command outlives acctd by a moment."""
    deadline = time.monotonic() + 20
    for hierarchy in discover().hierarchies:
        job = hierarchy.job(node.base, "job_victim")
        while job.procs():
            assert time.monotonic() < deadline
            select.select([], [], [], 0.001)


def test_killed_while_the_job_runs_what_it_used_is_not_lost(each_backend: Node) -> None:
    """The counters are the kernel's: what the job did after acctd's death is in the record too."""
    node = each_backend
    spin = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"
    work = f"echo up; read line; {spin}; head -c 30000000 /dev/zero | tail | wc -c"
    child = node.topology.popen(
        node.topology.node, node.argv("run", "-q", "--id", "victim", "--", "sh", "-c", work), env=node.environ,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdin.write("go\n")
    child.stdin.flush()
    assert child.stdout.read() == "30000000\n"
    _until_nobody_is_left(node)
    assert node.acctd("run", "-q", "--", "true").returncode == 0
    with Ledger(node.directory / "state" / FILE) as ledger:
        record = ledger.record("victim")
    assert (record.state, record.exit_code, record.exit_signal) == ("lost", None, None)
    assert record.totals["cpu_user"][""] + record.totals["cpu_system"][""] > 20_000_000
    assert record.totals["memory_peak"][""] > 25_000_000
    assert any("exit status is unknown" in note for note in record.notes)


def test_killed_while_recovering_the_next_one_recovers(each_backend: Node) -> None:
    """The rescuer dies too, at each of its steps."""
    node = each_backend
    arguments = ["run", "-q", "--id", "victim", "--", "true"]
    died = node.python(DYING, "acctd.agent:Agent.finish", "before", "1", *arguments, timeout=60)
    assert died.returncode == -signal.SIGKILL, died.stderr
    _until_nobody_is_left(node)
    for point, when in (
        ("acctd.ledger:Ledger.claim", "after"),
        ("acctd.agent:Agent.take_pipe", "after"),
        ("acctd.ledger:Ledger.sign_off", "after"),
        ("acctd.ledger:Ledger.forget", "before"),
    ):
        died = node.python(DYING, point, when, "1", "run", "-q", "--id", "rescuer", "--", "true", timeout=60)
        assert died.returncode == -signal.SIGKILL, died.stderr
    assert node.acctd("run", "-q", "--id", "rescuer", "--", "true").returncode == 0
    with Ledger(node.directory / "state" / FILE) as ledger:
        assert sorted(r.id for r in ledger.records()) == ["rescuer", "victim"]
