"""The nftables back end on a real kernel: campus plays the job behind its pipe, wan the world."""

import json
import os
import socket
import subprocess
from ipaddress import ip_address, ip_network

import pytest

from acctd.errors import KernelRefusedError
from acctd.kernel import conntrack
from acctd.kernel.libnftables import Libnftables
from acctd.model import DestinationClass, chain_name
from acctd.network.backend import ChainPlan, Count, Pools
from acctd.network.nftables import Nftables
from lab.topology import Topology

POOLS = Pools(ip_network("198.51.100.0/24"), ip_network("2001:db8:1::/64"))
PIPE = "ac1"
CAMPUS = DestinationClass("Campus", (ip_network("192.0.2.0/24"), ip_network("2001:db8:5::/48")))
STORAGE = DestinationClass("Storage", (ip_network("192.0.2.128/25"), ip_network("2001:db8:5:8::/64")))
CLASSES = (CAMPUS, STORAGE)
IN_CAMPUS, IN_STORAGE, OUTSIDE = "192.0.2.1", "192.0.2.129", "203.0.113.2"
IN_CAMPUS6, IN_STORAGE6, OUTSIDE6 = "2001:db8:5::1", "2001:db8:5:8::1", "2001:db8:2::2"
FOREIGN = """
table inet filter { chain forward { type filter hook forward priority filter; counter accept comment "theirs"; }; }
table ip acctd { chain JOB_theirs { counter accept comment "OutgoingExternal"; }; }
"""


@pytest.fixture(scope="module")
def topology():
    with Topology() as made:
        made.forward()
        made.run(made.node, ["sh", "-c", f"ip link set campus down; ip link set campus name {PIPE} up"])
        # The rename took routes and addresses of the second family along with the link's down.
        made.run(made.node, ["ip", "-6", "address", "replace", "2001:db8:1::1/64", "dev", PIPE, "nodad"])
        # Without a link-local address a router cannot ask again for a neighbour it has not heard of for a while.
        made.run(made.node, ["ip", "-6", "address", "replace", "fe80::1/64", "dev", PIPE, "nodad"])
        for address in (IN_CAMPUS, IN_STORAGE, IN_CAMPUS6, IN_STORAGE6):
            made.run(made.wan, ["ip", "address", "add", address, "dev", "lo", "nodad"])
        made.run(made.campus, ["sh", "-c", "ip -6 route replace default via 2001:db8:1::1"])
        yield made


def nft(topology, *words, text=None):
    done = topology.run(topology.node, ["nft", *words], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def chains(topology):
    with topology.enter(topology.node):
        made = Nftables(POOLS)
    yield made
    made.close()
    nft(topology, "flush", "ruleset")


def plan(job="7.0", ifname=PIPE, classes=CLASSES, ipv6=True):
    return ChainPlan(chain_name(job), ifname, classes, ipv6)


def counted(chains, chain=None):
    return {name: sample.counts for name, sample in chains.read(chain).items()}


def talk(topology, peer, *, out=0, back=0, size=100):
    """`out` datagrams of `size` bytes from the job to one address of the world, then `back` in answer to the first."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with topology.enter(topology.wan):
        server = socket.socket(family, socket.SOCK_DGRAM)
    with topology.enter(topology.campus):
        client = socket.socket(family, socket.SOCK_DGRAM)
    with server, client:
        server.settimeout(10)
        client.settimeout(10)
        server.bind((peer, 0))
        client.connect(server.getsockname()[:2])
        for _ in range(out):
            client.send(bytes(size))
            sender = server.recvfrom(2048)[1]
        for _ in range(back):
            server.sendto(bytes(size), sender)
            client.recv(2048)
    return sender[0]


def l3(packets, size, version):
    return Count(packets * (size + (28 if version == 4 else 48)), packets)


def test_counts_are_what_was_forwarded_by_the_longest_prefix_and_both_families_are_summed(topology, chains):
    chains.add(plan())
    zero = Count(0, 0)
    names = [way + name for way in ("Outgoing", "Incoming") for name in ("Campus", "Storage", "External")]
    assert counted(chains) == {"JOB_7.0": dict.fromkeys(names, zero)}
    for version, peers in ((4, (IN_CAMPUS, IN_STORAGE, OUTSIDE)), (6, (IN_CAMPUS6, IN_STORAGE6, OUTSIDE6))):
        for number, peer in enumerate(peers, start=1):
            talk(topology, peer, out=number * version, back=number, size=100 * number)
    expected = {}
    for number, name in enumerate(("Campus", "Storage", "External"), start=1):
        for way, factors in (("Outgoing", (4, 6)), ("Incoming", (1, 1))):
            parts = [l3(number * f, 100 * number, v) for f, v in zip(factors, (4, 6), strict=True)]
            expected[way + name] = Count(sum(p.bytes for p in parts), sum(p.packets for p in parts))
    assert counted(chains) == {"JOB_7.0": expected}
    assert counted(chains, "JOB_7.0") == {"JOB_7.0": expected}
    talk(topology, OUTSIDE, out=1)
    assert counted(chains)["JOB_7.0"]["OutgoingExternal"].packets == expected["OutgoingExternal"].packets + 1
    chains.remove(plan())


def test_the_world_sees_the_node_and_not_the_pool(topology, chains):
    chains.add(plan())
    assert talk(topology, OUTSIDE, out=1) == topology.node.v4
    assert talk(topology, OUTSIDE6, out=1) == topology.node.v6


@pytest.mark.parametrize("version", [4, 6])
def test_a_new_connection_to_the_job_is_rejected_and_not_billed(topology, chains, version):
    chains.add(plan())
    job = topology.campus.v4 if version == 4 else topology.campus.v6
    with topology.enter(topology.wan):
        stranger = socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    with stranger:
        stranger.settimeout(10)
        with pytest.raises(ConnectionRefusedError):
            stranger.connect((job, 22))
    assert all(count == Count(0, 0) for count in counted(chains)["JOB_7.0"].values())


def test_a_packet_from_job_to_job_is_rejected_before_anyone_is_billed(topology, chains):
    chains.add(plan("1", PIPE))
    chains.add(plan("2", "wan"))
    with topology.enter(topology.campus), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.settimeout(10)
        sender.connect((OUTSIDE, 9))
        sender.send(b"to a neighbour")
        with pytest.raises(ConnectionRefusedError):  # the ICMP port unreachable
            sender.recv(1)
    assert {count for counts in counted(chains).values() for count in counts.values()} == {Count(0, 0)}


def test_without_ipv6_the_remainder_still_counts(topology, chains):
    chains.add(plan(ipv6=False))
    talk(topology, IN_CAMPUS6, out=2)
    counts = counted(chains)["JOB_7.0"]
    assert counts["OutgoingExternal"] == l3(2, 100, 6)
    assert counts["OutgoingCampus"] == Count(0, 0)


def test_the_chain_is_in_nfts_own_list_and_the_table_goes_with_the_last(topology, chains):
    chains.add(plan("1"))
    chains.add(plan("2", "ac2"))
    listed = nft(topology, "list", "table", "inet", "acctd")
    assert listed.count('comment "OutgoingStorage"') == 4
    assert "chain JOB_1 {" in listed
    assert '"ac2" : goto JOB_2' in listed
    chains.remove(plan("1"))
    listed = nft(topology, "list", "table", "inet", "acctd")
    assert "JOB_1" not in listed
    assert "JOB_2" in listed
    chains.remove(plan("2", "ac2"))
    assert nft(topology, "list", "ruleset") == ""
    chains.remove(plan("2", "ac2"))
    chains.remove(plan("never"))
    assert counted(chains) == {}
    assert counted(chains, "JOB_2") == {}


def test_a_leftover_chain_is_replaced_with_all_that_led_to_it(topology, chains):
    chains.add(plan("1", "ac9"))
    chains.add(plan("2", PIPE))
    talk(topology, OUTSIDE, out=1)
    # The same job on another pipe, and the pipe's name used by another job before.
    chains.add(plan("1", PIPE, classes=()))
    listed = nft(topology, "list", "table", "inet", "acctd")
    assert "ac9" not in listed
    assert counted(chains, "JOB_1") == {"JOB_1": {"OutgoingExternal": Count(0, 0), "IncomingExternal": Count(0, 0)}}
    assert nft(topology, "list", "map", "inet", "acctd", "outgoing").count("goto") == 1
    # Found by the chain, whatever interface the plan names.
    chains.remove(plan("1", "ac77"))
    assert nft(topology, "list", "map", "inet", "acctd", "outgoing").count("goto") == 0
    chains.remove(plan("2", "ac77"))
    assert nft(topology, "list", "ruleset") == ""


def test_foreign_tables_are_neither_read_nor_touched(topology, chains):
    nft(topology, "-f", "-", text=FOREIGN)
    before = nft(topology, "list", "ruleset")
    chains.add(plan())
    assert counted(chains).keys() == {"JOB_7.0"}
    chains.remove(plan())
    assert nft(topology, "list", "ruleset") == before


def test_what_a_foreign_filter_drops_is_not_billed(topology, chains):
    nft(topology, "-f", "-", text=FOREIGN.replace("counter accept", "counter drop", 1))
    chains.add(plan())
    with topology.enter(topology.campus), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"lost", (OUTSIDE, 9))
    assert '"theirs"' in nft(topology, "list", "table", "inet", "filter")
    assert "packets 1 " in nft(topology, "list", "table", "inet", "filter")
    assert counted(chains)["JOB_7.0"]["OutgoingExternal"] == Count(0, 0)


@pytest.mark.parametrize(
    "damage",
    [
        ["flush", "ruleset"],
        ["flush", "table", "inet", "acctd"],
        ["flush", "chain", "inet", "acctd", "forward"],
        ["add", "rule", "inet", "acctd", "postrouting", "counter"],
    ],
)
def test_shared_parts_that_someone_damaged_are_whole_again_with_the_next_job(topology, chains, damage):
    chains.add(plan("1", "ac9"))
    whole = nft(topology, "list", "chain", "inet", "acctd", "forward")
    masquerade = nft(topology, "list", "chain", "inet", "acctd", "postrouting")
    nft(topology, *damage)
    counted(chains)
    chains.add(plan("2"))
    assert nft(topology, "list", "chain", "inet", "acctd", "forward") == whole
    assert nft(topology, "list", "chain", "inet", "acctd", "postrouting") == masquerade
    talk(topology, OUTSIDE, out=3)
    assert counted(chains)["JOB_2"]["OutgoingExternal"] == l3(3, 100, 4)
    chains.remove(plan("1", "ac9"))
    chains.remove(plan("2"))
    assert nft(topology, "list", "ruleset") == ""


def test_a_flush_between_looking_and_changing(topology, chains):
    class FlushedAfterLooking:
        """The reader, but for a foreign program that flushes everything once the base was found whole."""

        def __init__(self, reader):
            self._reader = reader
            self._flushed = False

        def __getattr__(self, name):
            return getattr(self._reader, name)

        def chain_exists(self, chain):
            found = self._reader.chain_exists(chain)
            if not self._flushed:
                self._flushed = True
                nft(topology, "flush", "ruleset")
            return found

    chains.add(plan("1", "ac9"))
    chains._reader = FlushedAfterLooking(chains._reader)
    chains.add(plan("2"))
    assert counted(chains).keys() == {"JOB_2"}
    chains.add(plan("1", "ac9"))
    chains._reader._flushed = False
    chains.remove(plan("1", "ac9"))
    assert nft(topology, "list", "ruleset") == ""


def test_odd_classes(topology, chains):
    whole = DestinationClass("Whole", (ip_network("0.0.0.0/0"), ip_network("::/0")))
    ends = DestinationClass("Ends", (ip_network("0.0.0.0/32"), ip_network("255.255.255.255/32")))
    many = DestinationClass("Many", tuple(ip_network(f"10.{n // 250}.{n % 250}.{n % 64 * 4}/30") for n in range(600)))
    longest = plan("x" * 200, classes=(whole, ends, many))
    chains.add(longest)
    talk(topology, OUTSIDE, out=1)
    talk(topology, OUTSIDE6, out=1)
    counts = counted(chains)[longest.chain]
    assert counts["OutgoingWhole"].packets == 2
    assert counts["OutgoingExternal"].packets == 0
    chains.remove(longest)
    assert nft(topology, "list", "ruleset") == ""


def test_300_jobs_come_and_go_and_every_read_is_right(topology, chains):
    for number in range(300):
        chains.add(plan(str(number), f"ac{number + 2:x}", classes=(CAMPUS,)))
    chains.add(plan())
    for packets in (1, 2):
        talk(topology, IN_CAMPUS, out=1)
        counts = counted(chains)
        assert len(counts) == 301
        assert counts["JOB_7.0"]["OutgoingCampus"].packets == packets
        assert counts["JOB_299"]["OutgoingCampus"].packets == 0
    for number in range(0, 300, 2):
        chains.remove(plan(str(number), f"ac{number + 2:x}"))
    # The places of all that is left have moved.
    talk(topology, IN_CAMPUS, out=1)
    counts = counted(chains)
    assert len(counts) == 151
    assert counts["JOB_7.0"]["OutgoingCampus"].packets == 3
    listed = json.loads(nft(topology, "-j", "list", "table", "inet", "acctd"))["nftables"]
    expected = {}
    for rule in (entry["rule"] for entry in listed if "rule" in entry):
        for counter in (part["counter"] for part in rule["expr"] if "counter" in part):
            of_chain = expected.setdefault(rule["chain"], {})
            before = of_chain.get(rule["comment"], Count(0, 0))
            of_chain[rule["comment"]] = Count(before.bytes + counter["bytes"], before.packets + counter["packets"])
    assert counts == expected
    for number in range(1, 300, 2):
        chains.remove(plan(str(number), f"ac{number + 2:x}"))
    chains.remove(plan())
    assert nft(topology, "list", "ruleset") == ""


def test_libnftables_says_why_and_changes_nothing(topology):
    with topology.enter(topology.node):
        context = Libnftables()
    with context:
        table = {"family": "inet", "name": "t"}
        missing = {"family": "inet", "table": "t", "name": "nowhere"}
        with pytest.raises(KernelRefusedError, match="No such file or directory"):
            context.run([{"add": {"table": table}}, {"delete": {"chain": missing}}])
        assert nft(topology, "list", "ruleset") == ""
        with pytest.raises(KernelRefusedError, match="nftables refused"):
            context.run([{"add": {"nonsense": {}}}])
        context.run([{"add": {"table": table}}])
        context.run([{"delete": {"table": table}}])
    with pytest.raises(KernelRefusedError, match="closed"):
        context.run([])


def test_no_descriptor_is_left_open(topology):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    def work():
        with topology.enter(topology.node):
            made = Nftables(POOLS)
        made.add(plan())
        made.read()
        made.remove(plan())
        made.close()
        with topology.enter(topology.node):
            conntrack.forget([ip_address("192.0.2.77")])

    work()
    before = descriptors()
    work()
    assert descriptors() == before


def entries(topology):
    lists = [
        topology.run(
            topology.node,
            ["conntrack", "-L", "-f", family],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ).stdout
        for family in ("ipv4", "ipv6")
    ]
    return "".join(lists).splitlines()


@pytest.mark.parametrize("few", [2000, 0])
def test_a_jobs_connections_are_forgotten_and_nobody_elses(topology, chains, few, monkeypatch):
    # 0: as on a node with many connections, where the kernel is asked to filter.
    monkeypatch.setattr(conntrack, "_FEW", few)
    job = [ip_address(topology.campus.v4), ip_address(topology.campus.v6)]
    ports = ["-p", "udp", "--sport", "1", "--dport", "2", "-t", "99"]
    stranger = ["-s", "198.51.100.9", "-d", "192.0.2.33", *ports]
    # As one looks whose peer went on while nobody masqueraded.
    turned = ["-s", "198.51.100.9", "-d", topology.campus.v4, *ports]
    zoned = ["-s", topology.campus.v4, "-d", "192.0.2.9", *ports]

    def forget():
        with topology.enter(topology.node):
            return conntrack.forget(job)

    forget()
    topology.run(topology.node, ["conntrack", "-F"], capture_output=True)
    assert forget() == 0
    chains.add(plan())
    for peer in (OUTSIDE, OUTSIDE, IN_CAMPUS, OUTSIDE6):
        talk(topology, peer, out=1, back=1)
    for words in (stranger, turned, [*zoned, "-w", "7"]):
        topology.run(topology.node, ["conntrack", "-I", *words], capture_output=True)
    assert len(entries(topology)) == 7
    assert forget() == 6
    (left,) = entries(topology)
    assert "src=198.51.100.9" in left
    assert forget() == 0
