"""Both netfilter back ends beside the rules of others: what those do to a job, and that nothing is done to them.

Each test has a node of its own, because it fills the node's tables with what a site may have there.
"""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab import traffic
from lab.topology import Topology
from tests.kernel.conftest import REPO, Node, make_node

CLIENT = f"{sys.executable} -S {REPO / 'lab/traffic.py'}"
SIZE = 48_000
INTERNAL = "198.51.100.0/24,2001:db8:1::/64"
ZERO = {way + cls: 0 for way in ("Outgoing", "Incoming") for cls in ("Internal", "External")}

# What docker and ufw leave in the legacy tables, much shortened; the last rule of INPUT counts a service of the node.
LEGACY = """*filter
:INPUT ACCEPT [0:0]
:FORWARD {policy} [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-USER - [0:0]
:ufw-before-forward - [0:0]
:ufw-user-forward - [0:0]
-A INPUT -p tcp -m tcp --dport 4242 -m comment --comment "a \\"service\\"" -j ACCEPT
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -j ufw-before-forward
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-USER -j RETURN
-A ufw-before-forward -m conntrack --ctstate INVALID -j DROP
-A ufw-before-forward -j ufw-user-forward
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
COMMIT
*mangle
:FORWARD ACCEPT [0:0]
-A FORWARD -i acnothing -j DROP
COMMIT
"""
LEGACY6 = "\n".join(
    line for line in LEGACY.splitlines() if "172.17" not in line and "-m addrtype" not in line
)  # fmt: skip
NFT = """
table inet filter {
  set friends { type ipv4_addr; elements = { 192.0.2.1, 192.0.2.2 }; }
  chain input {
    type filter hook input priority filter; policy accept
    tcp dport 4242 counter comment "a service"
  }
  chain forward {
    type filter hook forward priority filter; policy accept
    ip saddr @friends counter packets 7 bytes 700 drop comment "kept"
    jump site
  }
  chain site { ct state invalid drop; }
}
table ip nat {
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept
    ip saddr 172.18.0.0/16 counter packets 3 bytes 300 masquerade
  }
}
"""


@pytest.fixture
def own() -> Iterator[Topology]:
    """A topology for this test alone, with servers in campus and wan."""
    with Topology() as made, ExitStack() as servers:
        for site in (made.campus, made.wan):
            with made.enter(site):
                servers.enter_context(traffic.Server())
        yield made


@pytest.fixture(params=["nftables", "iptables"])
def node(request: pytest.FixtureRequest, own: Topology, tmp_path: Path) -> Iterator[Node]:
    yield from make_node(own, tmp_path, backend=request.param)


def backend(node: Node) -> str:
    return node.config.read_text().partition('backend = "')[2].partition('"')[0]


def root(node: Node, *argv: str, text: str | None = None) -> str:
    done = node.topology.run(node.topology.node, argv, input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def load_legacy(node: Node, policy: str) -> None:
    for command, text in (("iptables-legacy-restore", LEGACY), ("ip6tables-legacy-restore", LEGACY6)):
        root(node, command, text=text.replace("{policy}", policy) + "\n")


def touch_service(topology: Topology) -> None:
    """Make the foreign rules count something: a connection from campus to the node's port 4242."""
    with topology.enter(topology.node):
        server = socket.create_server(("::", 4242), family=socket.AF_INET6, dualstack_ipv6=True)
    with server:
        for address in ("198.51.100.1", "2001:db8:1::1"):
            with topology.enter(topology.campus):
                client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
            with client:
                client.settimeout(10)
                client.connect((address, 4242))
                with server.accept()[0] as connection:
                    client.shutdown(socket.SHUT_WR)
                    assert connection.recv(1) == b""
                assert client.recv(1) == b""


def legacy(node: Node) -> list[str]:
    """Every rule with its counters and every chain with its policy, both versions."""
    text = root(node, "iptables-legacy-save", "-c") + root(node, "ip6tables-legacy-save", "-c")
    return [line for line in text.splitlines() if not line.startswith("#")]


def without_counts(lines: list[str], *chains: str) -> list[str]:
    """The lines, those of these chains less their counters; and no policy's.

    A chain's policy counts whatever reaches its end, the node's own noise too; and libiptc, which iptables-legacy is
    made of, sets those counts to 0 with every change of a table, whoever makes it.
    """
    pattern = re.compile(rf"\[\d+:\d+\] (?=-A ({'|'.join(map(re.escape, chains))}) )" if chains else r"(?!)")
    return [re.sub(r"\[\d+:\d+\]$", "", pattern.sub("", line)) for line in lines]


def nft(node: Node) -> str:
    """The ruleset as nft writes it; what iptables-legacy holds is not in it."""
    return root(node, "nft", "list", "ruleset")


def exchange(topology: Topology) -> list[str]:
    """A job that takes from campus and gives to wan, both versions: SIZE bytes each time."""
    calls = []
    for campus, wan in ((topology.campus.v4, topology.wan.v4), (topology.campus.v6, topology.wan.v6)):
        calls += [
            f"{CLIENT} take {campus} {traffic.PORT} {SIZE} --udp",
            f"{CLIENT} give {wan} {traffic.PORT} {SIZE} --udp",
        ]
    return ["--internal", INTERNAL, "--", "sh", "-ec", " && ".join(calls)]


def billed() -> dict[str, int]:
    """What `exchange` costs."""
    four, six = (traffic.expected_udp(SIZE, version) for version in (4, 6))
    data, control = four.data_bytes + six.data_bytes, four.control_bytes + six.control_bytes
    return {
        "IncomingInternal": data, "OutgoingInternal": control, "OutgoingExternal": data, "IncomingExternal": control,
    }  # fmt: skip


def network(record: dict[str, Any]) -> dict[str, int]:
    totals: dict[str, int] = record["totals"]["network"]
    return totals


def test_foreign_rules_are_the_same_afterwards_byte_for_byte(node: Node) -> None:
    """Legacy tables and nftables both full of what docker, ufw and a site write; jobs come, talk and go."""
    topology = node.topology
    load_legacy(node, "ACCEPT")
    root(node, "nft", "-f", "-", text=NFT)
    touch_service(topology)
    legacy_before, nft_before = legacy(node), nft(node)
    assert any(re.match(r"\[[1-9]\d*:\d+\] -A INPUT", line) for line in legacy_before)
    assert re.search(r"counter packets [1-9]\d* bytes \d+ comment \"a service\"", nft_before)
    for _ in range(2):
        assert network(node.job(*exchange(topology))) == billed()
    assert nft(node) == nft_before
    passed: tuple[str, ...] = ("FORWARD", "DOCKER-USER", "DOCKER-ISOLATION-STAGE-1", "ufw-before-forward")
    if backend(node) == "iptables":
        # Jobs are decided at the top of FORWARD: no foreign rule there has even seen them.
        passed = ()
    else:
        # Their packets go through the foreign filters first, and count there as any forwarded packet does.
        assert legacy(node) != legacy_before
    # The nat chains see the first packet of every connection, of jobs too.
    assert without_counts(legacy(node), "PREROUTING", *passed) == without_counts(legacy_before, "PREROUTING", *passed)


def test_foreign_rules_are_untouched_while_a_job_runs(node: Node) -> None:
    topology = node.topology
    load_legacy(node, "ACCEPT")
    root(node, "nft", "-f", "-", text=NFT)
    touch_service(topology)
    before = legacy(node), nft(node)
    with standing(node, "stands"):
        during = legacy(node), nft(node)
    ours = re.compile(r"ACCTD_|JOB_stands|:JOB")
    during_theirs = [line for line in during[0] if not ours.search(line)]
    assert without_counts(during_theirs, "PREROUTING") == without_counts(before[0], "PREROUTING")
    mine = during[1].find("table inet acctd")
    assert (mine >= 0) == (backend(node) == "nftables")
    tables = re.split(r"(?m)^(?=table )", during[1])
    assert "".join(table for table in tables if not table.startswith("table inet acctd ")) == before[1]


@contextmanager
def standing(node: Node, job: str, *command: str) -> Iterator[subprocess.Popen[str]]:
    """A job that is there until the block ends, then runs the command, if any. It must succeed."""
    script = 'echo up; read _; [ $# = 0 ] || exec "$@"'
    argv = node.argv(
        "run", "-q", "--id", job, "--internal", INTERNAL, "--json", str(node.directory / job), "--",
        "sh", "-c", script, "sh", *command,
    )  # fmt: skip
    child = node.topology.popen(
        node.topology.node, argv, env=node.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    try:
        yield child
    finally:
        said = child.communicate("go\n", timeout=60)[0]
    assert child.returncode == 0, said


# Tries one connection to each address, one second long; a policy of DROP says nothing at all.
TRY = """
import socket, sys
for host in sys.argv[2:]:
    try:
        socket.create_connection((host, int(sys.argv[1])), 1).close()
        print("connected")
    except TimeoutError:
        print("silence")
"""


def test_a_legacy_policy_of_drop(node: Node) -> None:
    """Of the two back ends only iptables stands before it; with nftables the site has to let jobs through."""
    topology = node.topology
    load_legacy(node, "DROP")
    if backend(node) == "iptables":
        assert network(node.job(*exchange(topology))) == billed()
        return
    attempt = [sys.executable, "-S", "-c", TRY, str(traffic.PORT), topology.campus.v4, topology.wan.v6]
    path = node.directory / "blocked"
    done = node.acctd("run", "-q", "--internal", INTERNAL, "--json", str(path), "--", *attempt)
    assert done.stdout.split() == ["silence", "silence"]
    assert network(json.loads(path.read_text())) == ZERO
    dropped = re.compile(r":FORWARD DROP \[[1-9]")
    assert len([line for line in legacy(node) if dropped.match(line)]) == 2
    # The remedy of docs/network.md.
    for command in ("iptables-legacy", "ip6tables-legacy"):
        root(node, command, "-A", "FORWARD", "-i", "ac+", "-j", "ACCEPT")
        root(node, command, "-A", "FORWARD", "-o", "ac+", "-j", "ACCEPT")
    assert network(node.job(*exchange(topology))) == billed()


def test_a_foreign_nft_policy_of_drop(node: Node) -> None:
    """A drop is final in nf_tables, whoever else accepts: both back ends' jobs are blocked, and billed for nothing
    that did not pass before it.
    """
    topology = node.topology
    root(
        node,
        "nft",
        "add table inet site; add chain inet site forward { type filter hook forward priority 0; policy drop; }",
    )
    attempt = [sys.executable, "-S", "-c", TRY, str(traffic.PORT), topology.campus.v4, topology.wan.v6]
    path = node.directory / "blocked"
    done = node.acctd("run", "-q", "--internal", INTERNAL, "--json", str(path), "--", *attempt)
    assert done.stdout.split() == ["silence", "silence"]
    got = network(json.loads(path.read_text()))
    if backend(node) == "nftables":
        assert got == ZERO
    else:
        assert (got["IncomingInternal"], got["IncomingExternal"]) == (0, 0)
    root(
        node, "nft", 'add rule inet site forward iifname "ac*" accept; add rule inet site forward oifname "ac*" accept'
    )
    assert network(node.job(*exchange(topology))) == billed()


def test_a_sites_rule_for_jobs(node: Node) -> None:
    """It belongs where both back ends come after it: legacy mangle FORWARD, or an nft chain of lower priority."""
    topology = node.topology
    root(node, "iptables-legacy", "-t", "mangle", "-A", "FORWARD", "-i", "ac+", "-d", topology.wan.v4, "-j", "DROP")
    root(node, "nft", "add table inet site; add chain inet site early { type filter hook forward priority -150; }")
    root(node, "nft", f'add rule inet site early iifname "ac*" ip6 daddr {topology.wan.v6} drop')
    attempt = [
        sys.executable, "-S", "-c", TRY, str(traffic.PORT),
        topology.campus.v4, topology.campus.v6, topology.wan.v4, topology.wan.v6,
    ]  # fmt: skip
    path = node.directory / "blocked"
    done = node.acctd("run", "-q", "--internal", INTERNAL, "--json", str(path), "--", *attempt)
    assert done.stdout.split() == ["connected", "connected", "silence", "silence"]
    got = network(json.loads(path.read_text()))
    assert (got["OutgoingExternal"], got["IncomingExternal"]) == (0, 0)
    assert got["OutgoingInternal"] > 0


def with_backend(node: Node, name: str) -> Node:
    """The same node - state, cgroups, pool - with another back end."""
    config = node.directory / f"{name}.toml"
    config.write_text(re.sub(r'backend = ".*"', f'backend = "{name}"', node.config.read_text()))
    return replace(node, config=config)


@pytest.mark.parametrize("first", ["nftables", "iptables"])
def test_both_back_ends_at_the_same_time_in_one_namespace(own: Topology, tmp_path: Path, first: str) -> None:
    """Each job is counted once, by its own back end; either may be the one that goes first."""
    second = "iptables" if first == "nftables" else "nftables"
    command = exchange(own)[3:]
    with contextmanager(make_node)(own, tmp_path) as node:
        one, other = with_backend(node, first), with_backend(node, second)
        with standing(one, "one", *command):
            with standing(other, "other", *command):
                rules = nft(node), "\n".join(legacy(node))
                job = {"nftables": rules[0], "iptables": rules[1]}
                assert "JOB_one" in job[first]
                assert "JOB_one" not in job[second]
                assert "JOB_other" in job[second]
                assert "JOB_other" not in job[first]
            # The other is gone, with all of its back end; the first still works.
            rules = nft(node), "\n".join(legacy(node))
            assert "acctd" not in {"nftables": rules[0], "iptables": rules[1].lower()}[second]
        for job_id in ("one", "other"):
            assert network(json.loads((node.directory / job_id).read_text())) == billed()


# One SYN; how the other side answers.
KNOCK = """
import socket, sys
with socket.socket(socket.AF_INET) as sock:
    sock.settimeout(10)
    print(sock.connect_ex((sys.argv[1], 7000)))
"""


@pytest.mark.parametrize("sender", ["nftables", "iptables"])
def test_a_job_of_one_back_end_cannot_reach_a_job_of_the_other(own: Topology, tmp_path: Path, sender: str) -> None:
    receiver = "iptables" if sender == "nftables" else "nftables"
    with contextmanager(make_node)(own, tmp_path) as node:
        with standing(with_backend(node, receiver), "target"):
            outer = root(node, "sh", "-c", "ip -4 -o address show | grep ': ac'")
            match = re.search(r"inet (10\.181\.\d+)\.(\d+)/31", outer)
            assert match
            address = f"{match[1]}.{int(match[2]) + 1}"
            record = with_backend(node, sender).job("--", sys.executable, "-S", "-c", KNOCK, address)
        assert set(network(json.loads((node.directory / "target").read_text())).values()) == {0}
    got = network(record)
    # Legacy rules come first: there a packet is counted for its sender before the receiver's nftables refuse it.
    # (Without --internal, the pool is Internal, as all private networks are.)
    assert got == ZERO | ({"OutgoingInternal": 60} if sender == "iptables" else {})


def test_what_a_later_filter_drops_has_been_billed_to_the_sender(node: Node) -> None:
    topology = node.topology
    late = "add chain inet site late { type filter hook forward priority 50; }"
    root(node, "nft", f'add table inet site; {late}; add rule inet site late iifname "ac*" counter drop')
    path = node.directory / "dropped"
    command = [sys.executable, "-S", "-c", TRY, str(traffic.PORT), topology.campus.v4]
    done = node.acctd("run", "-q", "--internal", INTERNAL, "--json", str(path), "--", *command)
    assert done.stdout == "silence\n"
    match = re.search(r"counter packets (\d+) bytes (\d+) drop", nft(node))
    assert match
    assert network(json.loads(path.read_text())) == ZERO | {"OutgoingInternal": int(match[2])}
    assert int(match[1]) > 0
