"""Many jobs leave nothing behind: 300 in a row in one long-lived process, 50 at once from the command line.

The node fixture compares cgroups, links, namespaces, rules, leases and connections before and after; here come what
the process itself could lose (descriptors, threads), the ledger's rows, and the bytes of the jobs that had traffic.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from acctd.ledger import FILE, Ledger
from lab.traffic import PORT, Server
from tests.kernel.conftest import Node

# A request of 24 bytes to lab/traffic.py's server and its answer of 24, as the shell can do it in no time: 52 bytes
# each with the headers of IPv4 and UDP, 72 with those of IPv6. The answer is awaited: both have passed the chain.
_ASK = r"""exec 3<>/dev/udp/{host}/{port}; printf '\0\0\0\1%b\30\0\0\0\0' "$zeros" >&3; head -c 24 <&3 >/dev/null"""
_ZEROS = r"zeros='\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0'"
_EACH_WAY = 52 + 72
_NOTHING = {"OutgoingInternal": 0, "IncomingInternal": 0, "OutgoingExternal": 0, "IncomingExternal": 0}
_SOME = _NOTHING | {"OutgoingInternal": _EACH_WAY, "IncomingInternal": _EACH_WAY}

# Prints a line of JSON: what the process holds after some jobs and after all of them, and the totals of every job.
_IN_A_ROW = """
import json, os, signal, sys, threading, time
from pathlib import Path
from acctd import config, launch
from acctd.agent import Agent
from acctd.config import with_default_classes
from acctd.job import Ending
from acctd.model import JobSpec, Owner, parse_class

count, settled, command = int(sys.argv[1]), 20, sys.argv[2:]
settings = config.load(None, os.environ)
classes = (parse_class("Internal", ["198.51.100.0/24", "2001:db8:1::/48"]),)

def held():
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(30)  # a link's removal goes on for some 20 ms after the job's end
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < deadline:
        time.sleep(0.001)  # a thread that was joined is done with Python, and the kernel has still to end it
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own
    return {"fds": fds, "threads": len(os.listdir("/proc/self/task")), "children": children()}

def children():
    return Path("/proc/thread-self/children").read_text().split()

before, totals = None, []
with Agent(settings) as agent:
    for number in range(count):
        spec = JobSpec(id=f"row.{number}", owner=Owner(0, 0, "root"), classes=classes)
        job = agent.create(with_default_classes(spec, settings))
        argv = command if number % 10 == 0 else ["true"]
        process, at = launch.start(job, argv, groups=[0], environ=os.environ, blocked=set())
        agent.begin(job, at)
        agent.poll([job])
        process.wait()
        totals.append(agent.finish(job, Ending.now(process.returncode)).totals["network"])
        if number + 1 == settled:
            before = held()
    after = held()
print(json.dumps({"before": before, "after": after, "totals": totals}))
"""


@pytest.fixture
def site(each_backend: Node) -> Iterator[Node]:
    """A node with either back end and a server on the campus; no connection to it is remembered afterwards."""
    with each_backend.topology.enter(each_backend.topology.campus):
        server = Server()
    with server:
        yield each_backend
    with each_backend.topology.enter(each_backend.topology.node):
        connections = Path("/proc/thread-self/net/nf_conntrack").read_text()
    assert "198.51.100.2" not in connections
    assert "2001:0db8:0001" not in connections


def traffic(node: Node) -> list[str]:
    """A command that asks the campus once over IPv4 and once over IPv6, and has had both answers when it ends."""
    campus = node.topology.campus
    asks = [_ASK.format(host=host, port=PORT) for host in (campus.v4, campus.v6)]
    return ["timeout", "10", "bash", "-c", "; ".join([_ZEROS, *asks])]


def test_three_hundred_in_a_row(site: Node) -> None:
    count = 300
    done = site.python(_IN_A_ROW, str(count), *traffic(site))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["after"] == said["before"]
    assert said["after"]["children"] == []
    assert said["totals"] == [_NOTHING if number % 10 else _SOME for number in range(count)]
    with Ledger(site.directory / "state" / FILE) as ledger:
        records = ledger.records()
    assert {record.id for record in records} == {f"row.{number}" for number in range(count)}
    assert len(records) == count
    assert all((record.state, record.exit_code, record.notes) == ("done", 0, ()) for record in records)


def test_fifty_at_once(site: Node) -> None:
    """Each acctd a process of its own, all after the same ruleset, ledger and addresses; half of them with traffic."""
    argv = site.argv("run", "-q", "--internal", "198.51.100.0/24,2001:db8:1::/48")
    children = []
    for number in range(50):
        command = traffic(site) if number % 2 else ["true"]
        one = [*argv, "--id", f"at-once-{number}", "--", *command]
        children.append(
            site.topology.popen(site.topology.node, one, env=site.environ, stderr=subprocess.PIPE, text=True)
        )
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    with Ledger(site.directory / "state" / FILE) as ledger:
        records = {record.id: record for record in ledger.records()}
    assert len(records) == 50
    for number in range(50):
        assert records[f"at-once-{number}"].totals["network"] == (_SOME if number % 2 else _NOTHING), number
