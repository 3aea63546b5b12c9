"""A job's network totals against an independent count on the far side of its pipe: equal to the byte, and the packet.

The jobs are run by the real command; what campus and wan saw is read from the packets there (lab/wire.py). `pytest -s`
prints, for each transfer, what was counted and what it is on a real wire: the figures of docs/network.md.
"""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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


def wait(condition: Callable[[], object]) -> bool:
    """Until true, or for twenty seconds; whether it came true. Who has numbers to show compares them afterwards."""
    deadline = time.monotonic() + 20
    while not (met := bool(condition())) and time.monotonic() < deadline:
        os.sched_yield()
    return met


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
        # Each packet once more costs a header: what is left is the payload, options of TCP's control packets, and what
        # TCP sent again. A busy machine was seen to resend 9 %; all of it counted double would be 100 %.
        assert size <= count.bytes - count.packets * HEADERS[version] < size * 1.9
        assert (count.packets < count.wire_packets) == offload
        assert (count.bytes < count.wire_bytes) == offload


def test_a_super_packet_of_the_job_is_counted_whole_where_the_links_cut_it(tmp_path: Path) -> None:
    """The pipe has its offloads, the node's links have none: the difference is one header a cut, and nothing else."""
    with Topology(offload=False) as topology:
        with topology.enter(topology.wan):
            server = traffic.Server()
        with server, contextmanager(make_node)(topology, tmp_path) as node, tap(topology, topology.wan) as wan:
            job = f"{MODEST}{CLIENT} give {topology.wan.v4} {traffic.PORT} {GIVE}"
            octets, packets = totals(node.job("--", "sh", "-ec", job))["OutgoingExternal"]
            wait(lambda: headless(wan.now().received[4]) == octets - packets * HEADERS[4])
            cut = wan.stop().received[4]
    print(f"\ncounted {octets} bytes in {packets} packets, {cut}")
    assert packets < cut.packets == cut.wire_packets
    assert headless(cut) == octets - packets * HEADERS[4] >= GIVE


SEGMENTED = """
import socket, sys
with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.setsockopt(socket.IPPROTO_UDP, 103, 1200)  # UDP_SEGMENT
    sock.connect((sys.argv[1], 7009))
    for _ in range(50):
        sock.send(bytes(40 * 1200))
"""


@pytest.mark.parametrize("version", [4, 6])
def test_datagrams_segmented_by_the_kernel_are_one_packet(node: Node, version: int) -> None:
    """UDP_SEGMENT, as QUIC uses it: 50 super-packets of 40 datagrams."""
    topology = node.topology
    with topology.enter(topology.wan):
        sink = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with sink, tap(topology, topology.wan) as wan:
        sink.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sink.bind(("::", 7009))
        record = node.job("--", sys.executable, "-S", "-c", SEGMENTED, hosts(topology, version)[1])
        got = totals(record)["OutgoingExternal"]
        wait(lambda: wan.now().received[version].packets == got[1])
        seen = wan.stop().received[version]
    header = {4: 28, 6: 48}[version]
    print(f"\nUDP_SEGMENT IPv{version}: counted {got}, {seen}")
    assert got == seen[:2] == (50 * (40 * 1200 + header), 50)
    assert seen[2:] == (2000 * (1200 + header), 2000)


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


# To each HOST, COUNT datagrams of SIZE bytes, each answered by one of the same size before the next.
PING = """
import socket, sys
for host, size, count in zip(*[iter(sys.argv[1:])] * 3):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.connect((host, 7007))
        for _ in range(int(count)):
            sock.send(bytes(int(size)))
            sock.recv(2048)
"""


@contextmanager
def echoing(topology: Topology, site: Site, addresses: tuple[str, ...]) -> Iterator[None]:
    """Addresses of a site that answer PING from themselves; those the site lacks are its own meanwhile."""
    bits = {address: "128" if ":" in address else "32" for address in addresses}
    new = [f"{address}/{bits[address]}" for address in addresses if address not in (site.v4, site.v6)]

    def echo(sock: socket.socket) -> None:
        while True:
            data, peer = sock.recvfrom(2048)
            if not data:
                return  # shut down
            sock.sendto(data, peer)

    with ExitStack() as undo:
        for address in new:
            topology.run(
                site, ["ip", "address", "add", address, "dev", site.dev, *(["nodad"] if ":" in address else [])]
            )
            undo.callback(topology.run, site, ["ip", "address", "del", address, "dev", site.dev])
        for address in addresses:
            with topology.enter(site):
                sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
            undo.enter_context(sock)
            sock.bind((address, 7007))
            thread = threading.Thread(target=echo, args=(sock,))
            thread.start()
            undo.callback(thread.join)
            undo.callback(hush, sock)
        yield


def hush(sock: socket.socket) -> None:
    with suppress(OSError):  # an unconnected socket says ENOTCONN, yet its reader wakes up
        sock.shutdown(socket.SHUT_RDWR)


def test_the_longest_prefix_wins_among_classes(each_backend: Node) -> None:
    """Networks in networks, single hosts in classes of their own, and one class that would contain everything."""
    topology = each_backend.topology
    classes = (
        "--internal", "198.51.100.0/24,2001:db8:1::/64,203.0.113.3/32",
        "--class", "Storage=198.51.100.3/32,2001:db8:1::3/128",
        "--class", "Research=203.0.113.0/24,2001:db8:2::/120",
        "--class", "World=0.0.0.0/0",
    )  # fmt: skip
    at_campus = {
        topology.campus.v4: "Internal", topology.campus.v6: "Internal",
        "198.51.100.3": "Storage", "2001:db8:1::3": "Storage",
    }  # fmt: skip
    at_wan = {
        topology.wan.v4: "Research", topology.wan.v6: "Research", "203.0.113.3": "Internal", "203.0.113.4": "Research",
        "192.0.2.1": "World", "2001:db8:2::2:1": "External",
    }  # fmt: skip
    expected = {way + cls: (0, 0) for way in ("Outgoing", "Incoming") for cls in ("Internal", "Storage", "Research")}
    expected |= {way + cls: (0, 0) for way in ("Outgoing", "Incoming") for cls in ("World", "External")}
    pings: list[str] = []
    for number, (address, cls) in enumerate((at_campus | at_wan).items()):
        size, count = 100 + number, 1 << number  # no two sets of addresses give the same sums
        pings += [address, str(size), str(count)]
        octets = count * (size + (48 if ":" in address else 28))
        for way in ("Outgoing", "Incoming"):
            before = expected[way + cls]
            expected[way + cls] = before[0] + octets, before[1] + count
    with echoing(topology, topology.campus, tuple(at_campus)), echoing(topology, topology.wan, tuple(at_wan)):
        record = each_backend.job(*classes, "--", sys.executable, "-S", "-c", PING, *pings)
    assert totals(record) == expected


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
        # The SYN and the datagram did leave for the job, in both versions. (Two SYNs may: Linux throws an ICMP error
        # away that comes while connect() still holds the socket.)
        assert all(counter.now().sent[version].packets >= 2 for version in (4, 6))


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


# What passed to and from pipes after acctd's rules; and what came to campus from anybody but the job: the node's own
# answers to packets for a job that is gone, and the wan's.
WATCH = """
table inet lab {
  counter into {}; counter out_of {}; counter others {}
  chain forward {
    type filter hook forward priority 300
    oifname "ac*" counter name into
    iifname "ac*" counter name out_of
    iifname "wan" oifname "campus" counter name others
  }
  chain output {
    type filter hook output priority 300
    oifname "campus" meta l4proto { tcp, icmp } counter name others
    oifname "campus" icmpv6 type destination-unreachable counter name others
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
@pytest.mark.parametrize(("action", "transport"), [("take", "tcp"), ("take", "udp"), ("give", "tcp")])
def test_a_job_killed_in_mid_transfer_is_billed_what_crossed_its_pipe(
    served: Node, action: str, transport: str, version: int
) -> None:
    """Neither end of a transfer stops at once: a server sends on, and the job's kernel sends what the job had written.

    Out: exactly what of the job's reached the far side. In: exactly what was passed on towards the pipe while there was
    one. That is at least what the pipe took and at most what the far side sent; what came later is nobody's.
    """
    topology = served.topology
    host = hosts(topology, version)[0]
    record = served.directory / "killed.json"
    size = str(TAKE if action == "take" else 100 * TAKE)  # more than it can have given when it dies
    argv = served.argv(
        "run", "-q", "--id", "killed", "--internal", INTERNAL, "--json", str(record), "--",
        sys.executable, "-S", "-c", VICTIM, action, transport, host, str(traffic.PORT), size,
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
            assert child.wait(timeout=60) == 128 + signal.SIGKILL
            got = totals(json.loads(record.read_text()))
            crossed = watch()
            if transport == "udp":  # its server never waits for anybody, and is let come to its end
                wait(lambda: taps.seen(version)["IncomingInternal"].packets == len(traffic.datagrams(TAKE)))
            # Not compared again afterwards: a late retransmission may come, and be answered, between two looks.
            settled = wait(lambda: not_the_jobs(taps, version, got) == watch()["others"])
            taken = pipe.stop().sent[version]
        others = watch()["others"]
        assert settled, (not_the_jobs(taps, version, got), others)
        seen = taps.seen(version, now=False)
    print(f"\n{action} {transport} {version}")
    for name, count in (("incoming", seen["IncomingInternal"]), ("outgoing", seen["OutgoingInternal"])):
        print(f"  {name}: far side {count[:2]}, billed {got[f'{name.capitalize()}Internal']}")
    print(f"  pipe took {taken[:2]}, others sent to campus {others}, to wan went {seen['OutgoingExternal'][:2]}")
    assert (got["IncomingInternal"], got["OutgoingInternal"]) == (crossed["into"], crossed["out_of"])
    assert taken.bytes <= got["IncomingInternal"][0] <= seen["IncomingInternal"].bytes
    assert got[{"take": "IncomingInternal", "give": "OutgoingInternal"}[action]][0] > ENOUGH
    assert got["IncomingExternal"] == got["OutgoingExternal"] == (0, 0)


ENOUGH = 600_000
# Asks for SIZE bytes, or says it will give them; in the middle of it, it dies.
VICTIM = f"""
import os, signal, socket, struct, sys
action, transport, host, port, size = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
kind = {{"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}}[transport]
with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as sock:
    sock.connect((host, int(port)))
    sock.send(struct.pack("!IQQI", {{"take": 1, "give": 2}}[action], 0, int(size), 0))
    done = 0
    while done <= {ENOUGH}:
        done += len(sock.recv(65536)) if action == "take" else sock.send(bytes(65536))
    if action == "give":
        sock.setblocking(False)
        try:
            sock.send(bytes(1 << 22))
        except BlockingIOError:
            pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


def not_the_jobs(taps: Taps, version: int, got: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """What campus has received beside what the job was billed for."""
    count, billed = taps.campus.now().received[version], got["OutgoingInternal"]
    return count.bytes - billed[0], count.packets - billed[1]


def outer_end(topology: Topology) -> str:
    """The only pipe there is."""
    text = topology.run(topology.node, ["ip", "-o", "link"], capture_output=True, text=True).stdout
    (name,) = re.findall(r"\d+: (ac[0-9a-f]+)@", text)
    return str(name)
