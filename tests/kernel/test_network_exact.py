"""A job's network totals against an independent count on the far side of its pipe: equal to the byte, and the packet.

The jobs are run by the real command; what campus and wan saw is read from the packets there (lab/wire.py). `pytest -s`
prints, for each transfer, what was counted and what it is on a real wire: the figures of docs/network.md.
"""

import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import traffic
from lab.topology import Site, Topology
from lab.wire import Count, WireCounter
from tests.kernel.conftest import REPO, Node, make_node

TAKE, GIVE = 10_000_000, 3_000_000
INTERNAL = "198.51.100.0/24,2001:db8:1::/64"
CLIENT = f"{sys.executable} -S {REPO / 'lab/traffic.py'}"
RULES = ("IncomingInternal", "IncomingExternal", "OutgoingInternal", "OutgoingExternal")
OFFLOADS_OFF = "ethtool -K eth0 gso off tso off gro off >/dev/null 2>&1; "
# A sender that may have more on its way than a CPU's backlog holds (1000 packets) loses some before the node: then the
# two sides of the node differ for a reason that is not acctd's.
MODEST = "echo 4096 16384 262144 >/proc/sys/net/ipv4/tcp_wmem; "
HEADERS = {4: 52, 6: 72}  # IP and TCP with timestamps: what cutting a super-packet repeats


@pytest.fixture(scope="module", params=[True, False], ids=["gso", "nogso"])
def links(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """A topology with or without segmentation offloads, with servers in campus and wan."""
    with Topology(offload=request.param) as made, ExitStack() as servers:
        for site in (made.campus, made.wan):
            made.run(site, ["sh", "-c", MODEST])
            with made.enter(site):
                servers.enter_context(traffic.Server())
        yield made


@pytest.fixture(params=["nftables", "iptables"])
def plain(request: pytest.FixtureRequest, links: Topology, tmp_path: Path) -> Iterator[Node]:
    yield from make_node(links, tmp_path, backend=request.param)


@pytest.fixture
def served(each_backend: Node) -> Iterator[Node]:
    """A node of the shared topology, with servers in campus and wan for this test."""
    topology = each_backend.topology
    with ExitStack() as servers:
        for site in (topology.campus, topology.wan):
            with topology.enter(site):
                servers.enter_context(traffic.Server())
        yield each_backend


@dataclass
class Taps:
    """A counter at campus and one at wan."""

    campus: WireCounter
    wan: WireCounter

    def seen(self, version: int, *, now: bool = True) -> dict[str, Count]:
        """What the two sites exchanged with the node, named as the job's rules name it."""
        campus, wan = (self.campus.now(), self.wan.now()) if now else (self.campus.stop(), self.wan.stop())
        return {
            "IncomingInternal": campus.sent[version],
            "OutgoingInternal": campus.received[version],
            "IncomingExternal": wan.sent[version],
            "OutgoingExternal": wan.received[version],
        }


def tap(topology: Topology, site: Site, dev: str | None = None) -> WireCounter:
    return WireCounter(functools.partial(topology.enter, site), dev or site.dev)


@contextmanager
def tapped(topology: Topology) -> Iterator[Taps]:
    with tap(topology, topology.campus) as campus, tap(topology, topology.wan) as wan:
        yield Taps(campus, wan)


def wait(condition: Callable[[], object]) -> None:
    """Until true, or for ten seconds: whoever waits asserts what it waited for, and so says what is missing."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        os.sched_yield()


def totals(record: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(bytes, packets) by rule."""
    packets = record["totals"]["network_packets"]
    return {rule: (octets, packets[rule]) for rule, octets in record["totals"]["network"].items()}


def l3(seen: dict[str, Count]) -> dict[str, tuple[int, int]]:
    return {rule: (count.bytes, count.packets) for rule, count in seen.items()}


def hosts(topology: Topology, version: int) -> tuple[str, str]:
    campus, wan = topology.campus, topology.wan
    return (campus.v4, wan.v4) if version == 4 else (campus.v6, wan.v6)


def exchange(topology: Topology, version: int, transport: str, *, before: str = MODEST) -> list[str]:
    """The job: TAKE bytes from campus, then GIVE bytes to wan."""
    campus, wan = hosts(topology, version)
    calls = (f"{CLIENT} take {campus} {traffic.PORT} {TAKE}", f"{CLIENT} give {wan} {traffic.PORT} {GIVE}")
    return ["sh", "-ec", f"{before}{' && '.join(f'{call} --{transport}' for call in calls)}"]


def say(title: str, got: dict[str, tuple[int, int]], seen: dict[str, Count]) -> None:
    print(f"\n{title}")
    for rule in RULES:
        print(f"  {rule:<17} counted {got[rule]}  {seen[rule]}")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_the_four_totals_are_what_the_far_side_saw(
    plain: Node, request: pytest.FixtureRequest, transport: str, version: int
) -> None:
    topology = plain.topology
    offload = "nogso" not in request.node.name
    job = exchange(topology, version, transport, before=MODEST if offload else MODEST + OFFLOADS_OFF)
    with tapped(topology) as taps:
        record = plain.job("--internal", INTERNAL, "--", *job)
        got = totals(record)
        wait(lambda: l3(taps.seen(version)) == got)
        seen = taps.seen(version, now=False)
    say(request.node.name, got, seen)
    assert got == l3(seen)
    if transport == "udp":
        expected = traffic.expected_udp(TAKE, version), traffic.expected_udp(GIVE, version)
        assert got == {
            "IncomingInternal": expected[0][:2],
            "OutgoingInternal": expected[0][2:],
            "OutgoingExternal": expected[1][:2],
            "IncomingExternal": expected[1][2:],
        }
        return
    for rule, size in (("IncomingInternal", TAKE), ("OutgoingExternal", GIVE)):
        count = seen[rule]
        # Each packet once more costs a header: what is left is the payload, and TCP's control packets' options.
        assert size <= count.bytes - count.packets * HEADERS[version] < size * 1.01
        assert (count.packets < count.wire_packets) == offload
        assert (count.bytes < count.wire_bytes) == offload


def test_a_super_packet_of_the_job_is_counted_whole_where_the_links_cut_it(tmp_path: Path) -> None:
    """The pipe has its offloads, the node's links have none: the difference is one header a cut, and nothing else."""
    with Topology(offload=False) as topology:
        with topology.enter(topology.wan):
            server = traffic.Server()
        with server:
            for node in make_node(topology, tmp_path):
                with tap(topology, topology.wan) as wan:
                    job = f"{MODEST}{CLIENT} give {topology.wan.v4} {traffic.PORT} {GIVE}"
                    octets, packets = totals(node.job("--", "sh", "-ec", job))["OutgoingExternal"]
                    wait(lambda: headless(wan.now().received[4]) == octets - packets * HEADERS[4])
                    cut = wan.stop().received[4]
    print(f"\ncounted {octets} bytes in {packets} packets, {cut}")
    assert packets < cut.packets == cut.wire_packets
    assert headless(cut) == octets - packets * HEADERS[4] >= GIVE


def headless(count: Count) -> int:
    return count.bytes - count.packets * HEADERS[4]


def test_both_ip_versions_are_summed_under_one_name(served: Node) -> None:
    topology = served.topology
    with tapped(topology) as taps:
        calls = [call for version in (4, 6) for call in exchange(topology, version, "tcp")[2].split("; ")[1:]]
        got = totals(served.job("--internal", INTERNAL, "--", "sh", "-ec", MODEST + " && ".join(calls)))

        def both(*, now: bool) -> dict[str, tuple[int, int]]:
            four, six = taps.seen(4, now=now), taps.seen(6)
            return {
                rule: (four[rule].bytes + six[rule].bytes, four[rule].packets + six[rule].packets) for rule in RULES
            }

        wait(lambda: both(now=True) == got)
        assert got == both(now=False)


def test_the_longest_prefix_wins_among_classes(served: Node) -> None:
    """Two networks, in each a smaller one of another class, and one of them split between three."""
    topology = served.topology
    extra = {topology.campus: ("198.51.100.3", "2001:db8:1::3"), topology.wan: ("203.0.113.3", "2001:db8:2::3")}
    classes = (
        "--internal", "198.51.100.0/24,2001:db8:1::/64,203.0.113.3/32",
        "--class", "Storage=198.51.100.3/32,2001:db8:1::3/128",
        "--class", "Research=203.0.113.0/24,2001:db8:2::/120",
        "--class", "World=0.0.0.0/0",
    )  # fmt: skip
    calls = []
    expected: dict[str, list[int]] = {}

    def also(rule: str, octets: int, packets: int) -> None:
        sums = expected.setdefault(rule, [0, 0])
        sums[0], sums[1] = sums[0] + octets, sums[1] + packets

    where = [
        (topology.campus.v4, "Internal"), (topology.campus.v6, "Internal"),
        (extra[topology.campus][0], "Storage"), (extra[topology.campus][1], "Storage"),
        (topology.wan.v4, "Research"), (topology.wan.v6, "Research"),
        (extra[topology.wan][0], "Internal"), (extra[topology.wan][1], "Research"),
    ]  # fmt: skip
    for number, (host, cls) in enumerate(where):
        version, size = (6 if ":" in host else 4), 1000 << number  # so that no two sums are alike
        calls += [f"{CLIENT} {what} {host} {traffic.PORT} {size} --udp" for what in ("take", "give")]
        data = traffic.expected_udp(size, version)
        for way in ("Outgoing", "Incoming"):
            also(way + cls, data.data_bytes + data.control_bytes, data.data_packets + data.control_packets)
    for rule in [way + cls for way in ("Outgoing", "Incoming") for cls in ("World", "External")]:
        also(rule, 0, 0)
    for site, addresses in extra.items():
        for address in addresses:
            topology.run(site, ["ip", "address", "add", address, "dev", site.dev, "nodad"])
    try:
        got = totals(served.job(*classes, "--", "sh", "-ec", " && ".join(calls)))
    finally:
        for site, addresses in extra.items():
            for address in addresses:
                bits = "128" if ":" in address else "32"
                topology.run(site, ["ip", "address", "del", f"{address}/{bits}", "dev", site.dev])
    assert got == {rule: tuple(sums) for rule, sums in expected.items()}


# Listens on TCP and UDP, says where, and holds until its input ends; then says whether anybody came.
LISTEN = """
import re, select, socket, subprocess, sys
text = subprocess.run(["ip", "-o", "address", "show", "dev", "eth0", "scope", "global"], capture_output=True, text=True)
tcp = socket.create_server(("::", 7000), family=socket.AF_INET6, dualstack_ipv6=True)
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.bind(("::", 7000))
print(*re.findall(r"inet6? ([0-9a-f.:]+)", text.stdout), flush=True)
sys.stdin.read()
print("came" if select.select([tcp, udp], [], [], 0)[0] else "nobody came", flush=True)
"""


@contextmanager
def listening(node: Node, job: str) -> Iterator[tuple[str, str]]:
    """A job that others could talk to; gives its addresses. Nobody may have come, and it is billed for nothing."""
    path = node.directory / f"{job}.json"
    argv = node.argv("run", "-q", "--id", job, "--json", str(path), "--", sys.executable, "-S", "-c", LISTEN)
    child = node.topology.popen(
        node.topology.node, argv, env=node.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    v4, v6 = child.stdout.readline().split()
    try:
        yield v4, v6
    finally:
        said = child.communicate(timeout=60)[0]
    assert (child.returncode, said) == (0, "nobody came\n")
    assert set(totals(json.loads(path.read_text())).values()) == {(0, 0)}


# A TCP connection and a datagram; the answer to both must be a refusal.
KNOCK = """
import socket, sys
refused = 0
for host in sys.argv[1:]:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as sock:
            sock.settimeout(10)
            try:
                sock.connect((host, 7000))
                sock.send(b"hello")
                sock.recv(1)
            except ConnectionRefusedError:
                refused += 1
print(refused)
"""


@pytest.mark.parametrize("place", ["campus", "wan"])
def test_a_new_connection_into_a_job_is_refused_and_billed_to_nobody(each_backend: Node, place: str) -> None:
    """Both sites have a route to the pool: their default route is the node."""
    topology = each_backend.topology
    site = getattr(topology, place)
    with listening(each_backend, "target") as addresses, tap(topology, site) as counter:
        argv = [sys.executable, "-S", "-c", KNOCK, *addresses]
        assert topology.run(site, argv, capture_output=True, text=True).stdout == "4\n"
        # The SYN and the datagram did leave for the job, in both versions.
        assert [counter.now().sent[version].packets for version in (4, 6)] == [2, 2]


def test_a_job_cannot_reach_another_and_neither_is_billed(each_backend: Node) -> None:
    with listening(each_backend, "target") as addresses:
        record = each_backend.job("--", sys.executable, "-S", "-c", KNOCK, *addresses)
        assert set(totals(record).values()) == {(0, 0)}
        done = each_backend.acctd("run", "-q", "--", sys.executable, "-S", "-c", KNOCK, *addresses)
        assert (done.returncode, done.stdout) == (0, "4\n")


def test_what_stays_on_the_node_is_not_billed(each_backend: Node) -> None:
    """It does not cross the forward path: not the node's own services, under any of its addresses."""
    topology = each_backend.topology
    with topology.enter(topology.node):
        server = traffic.Server()
    with server:
        calls = [f"{CLIENT} take {host} {traffic.PORT} 100000" for host in (topology.node.v4, topology.node.v6)]
        record = each_backend.job("--", "sh", "-ec", " && ".join(calls))
    assert set(totals(record).values()) == {(0, 0)}


# What the kernel itself passed to and from pipes, after acctd's rules; and what the node itself sent, which is not the
# job's: its answers to packets for a job that is gone.
WATCH = """
table inet lab {
  counter into {}; counter out_of {}; counter own {}
  chain forward {
    type filter hook forward priority 300
    oifname "ac*" counter name into
    iifname "ac*" counter name out_of
  }
  chain output {
    type filter hook output priority 300
    oifname "campus" meta l4proto { tcp, icmp } counter name own
    oifname "campus" icmpv6 type destination-unreachable counter name own
  }
}
"""


@contextmanager
def watched(topology: Topology) -> Iterator[Callable[[], dict[str, tuple[int, int]]]]:
    def read() -> dict[str, tuple[int, int]]:
        text = topology.run(topology.node, ["nft", "-j", "list", "counters"], capture_output=True, text=True).stdout
        found = [entry["counter"] for entry in json.loads(text)["nftables"] if "counter" in entry]
        return {one["name"]: (one["bytes"], one["packets"]) for one in found if one["table"] == "lab"}

    topology.run(topology.node, ["nft", "-f", "-"], input=WATCH, text=True)
    try:
        yield read
    finally:
        topology.run(topology.node, ["nft", "delete", "table", "inet", "lab"])


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_job_killed_in_mid_transfer_is_billed_what_crossed_its_pipe(
    served: Node, transport: str, version: int
) -> None:
    """The far side sends on for a while. Out: all that left for it. In: all that was passed on to the pipe while there
    was one, to the last packet; what came later is nobody's.
    """
    topology = served.topology
    host = hosts(topology, version)[0]
    record = served.directory / "killed.json"
    argv = served.argv(
        "run", "-q", "--id", "killed", "--internal", INTERNAL, "--json", str(record), "--",
        sys.executable, "-S", "-c", VICTIM, transport, host, str(traffic.PORT),
    )  # fmt: skip
    with watched(topology) as watch, tapped(topology) as taps:
        child = topology.popen(
            topology.node, argv, env=served.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "ready\n"
        with tap(topology, topology.node, outer_end(topology)) as pipe:
            child.stdin.write("go\n")
            child.stdin.flush()
            assert child.wait(timeout=60) == 128 + 9
            got = totals(json.loads(record.read_text()))
            crossed = watch()
            wait(lambda: received(taps.campus, version) == less(watch()["own"], got["OutgoingInternal"], sign=1))
            own = watch()["own"]
            taken = pipe.stop().sent[version]
        seen = taps.seen(version, now=False)
    print(f"\n{transport} {version}: {got}, own {own}, pipe took {taken}, far side {seen}")
    assert (got["IncomingInternal"], got["OutgoingInternal"]) == (crossed["into"], crossed["out_of"])
    assert less((seen["OutgoingInternal"].bytes, seen["OutgoingInternal"].packets), own) == got["OutgoingInternal"]
    assert taken.bytes <= got["IncomingInternal"][0] <= seen["IncomingInternal"].bytes
    assert got["IncomingInternal"][0] > 500_000
    assert got["IncomingExternal"] == got["OutgoingExternal"] == (0, 0)


# Asks for 30 MB, takes some of it, and dies.
VICTIM = """
import os, signal, socket, struct, sys
transport, host, port = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}[transport]
with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as sock:
    sock.connect((host, int(port)))
    sock.send(struct.pack("!IQQI", 1, 0, 30_000_000, 0))
    got = 0
    while got < 600_000:
        got += len(sock.recv(65536))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def outer_end(topology: Topology) -> str:
    """The only pipe there is."""
    text = topology.run(topology.node, ["ip", "-o", "link"], capture_output=True, text=True).stdout
    (name,) = re.findall(r"\d+: (ac[0-9a-f]+)@", text)
    return str(name)


def received(counter: WireCounter, version: int) -> tuple[int, int]:
    count = counter.now().received[version]
    return count.bytes, count.packets


def less(a: tuple[int, int], b: tuple[int, int], sign: int = -1) -> tuple[int, int]:
    return a[0] + sign * b[0], a[1] + sign * b[1]
