"""The legacy iptables back end on a real kernel: a router between jobs behind their pipes and a world of classes.

Every test runs in a network namespace of its own; only sockets are made in the peers' namespaces, and a socket stays
where it was made. The kernel's state is read back with iptables' own programs.
"""

import ctypes
import errno
import os
import random
import socket
import subprocess
import threading
from contextlib import contextmanager
from ipaddress import ip_network

import pytest

from acctd.errors import KernelRefusedError
from acctd.kernel import xtables
from acctd.model import chain_name, parse_class
from acctd.network import xtrules
from acctd.network.backend import ChainPlan, Count, Pools
from acctd.network.iptables import Iptables

POOLS = Pools(ip_network("10.99.0.0/16"), ip_network("fd99::/64"))
CAMPUS, LAB, WORLD, CAMPUS6, WORLD6 = "129.93.1.1", "129.93.5.1", "203.0.113.1", "2001:db8:1::1", "2001:db8:9::1"
CLASSES = (
    parse_class("Internal", ["129.93.0.0/16", "2001:db8:1::/48"]),
    parse_class("Lab", ["129.93.5.0/24"]),  # nested: the longer prefix wins
)
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def enter(fd):
    if _libc.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def here():
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def run(*words):
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def ipt(line, version=4):
    return run("iptables-legacy" if version == 4 else "ip6tables-legacy", *line.split())


def saved(version=4, counters=True):
    command = "iptables-legacy-save" if version == 4 else "ip6tables-legacy-save"
    return [line for line in run(command, *["-c"] * counters).splitlines() if not line.startswith("#")]


def plan(job="7", ifname="ac3f20", classes=CLASSES, ipv6=True):
    return ChainPlan(chain_name(job), ifname, classes, ipv6)


def counted(chains, chain=None):
    return {name: sample.counts for name, sample in chains.read(chain).items()}


@pytest.fixture
def router():
    """An empty namespace around the test."""
    home = here()
    assert _libc.unshare(CLONE_NEWNET) == 0
    try:
        run("ip", "link", "set", "lo", "up")
        yield
    finally:
        enter(home)
        os.close(home)


@pytest.fixture
def backend(router):
    made = Iptables(POOLS)
    yield made
    made.close()


class Peer:
    """A namespace at the other end of a veth pair."""

    def __init__(self, outer, addresses, gateways, peers):
        home = here()
        assert _libc.unshare(CLONE_NEWNET) == 0
        self.fd = here()
        enter(home)
        os.close(home)
        inside = f"/proc/{os.getpid()}/fd/{self.fd}"
        run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", inside)
        for gateway in gateways:
            run("ip", "address", "add", gateway, "dev", outer, *["nodad"] * (":" in gateway))
        run("ip", "link", "set", outer, "up")
        with self.inside():
            run("ip", "link", "set", "lo", "up")
            run("ip", "link", "set", "eth0", "up")
            for address in addresses:
                run("ip", "address", "add", address, "dev", "eth0", *["nodad"] * (":" in address))
            for gateway in gateways:
                family = "-6" if ":" in gateway else "-4"
                run("ip", family, "route", "replace", "default", "via", gateway.split("/")[0], "dev", "eth0")
        for network in peers:
            via = addresses[0 if "." in network else -1].split("/")[0]
            run("ip", "route", "add", network, "via", via, "dev", outer)

    @contextmanager
    def inside(self):
        home = here()
        enter(self.fd)
        try:
            yield
        finally:
            enter(home)
            os.close(home)

    def socket(self, address, kind=socket.SOCK_DGRAM, bind=True):
        with self.inside():
            made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
            made.settimeout(10)
            if bind:
                made.bind((address, 0))
        return made


@pytest.fixture
def lab(backend):
    """One job behind ac3f20, another behind ac3f21, and the world."""
    for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        with open(f"/proc/sys/net/{switch}", "w") as file:
            file.write("1")
    job = Peer("ac3f20", ["10.99.0.2/30", "fd99::2/126"], ["10.99.0.1/30", "fd99::1/126"], [])
    other = Peer("ac3f21", ["10.99.0.6/30"], ["10.99.0.5/30"], [])
    world = Peer(
        "up0",
        [
            "192.0.2.2/24",
            *(f"{a}/32" for a in (CAMPUS, LAB, WORLD)),
            f"{CAMPUS6}/128",
            f"{WORLD6}/128",
            "2001:db8::2/64",
        ],
        ["192.0.2.1/24", "2001:db8::1/64"],
        [*(f"{a}/32" for a in (CAMPUS, LAB, WORLD)), CAMPUS6, WORLD6],
    )
    yield job, other, world
    for peer in (job, other, world):
        os.close(peer.fd)


def pingpong(job, world, address, rounds, size):
    """Datagrams of `size` bytes there and back, one at a time: nothing can be dropped for want of room."""
    with world.socket(address) as server, job.socket("::" if ":" in address else "0.0.0.0") as client:  # noqa: S104
        client.connect(server.getsockname()[:2])
        for _ in range(rounds):
            client.send(bytes(size))
            _, sender = server.recvfrom(65536)
            server.sendto(bytes(size), sender)
            assert len(client.recv(65536)) == size
    return Count(rounds * (size + (48 if ":" in address else 28)), rounds)


def l3_bytes(interface):
    """What an interface received and sent, without its Ethernet headers; a GSO super-packet has one."""
    with open("/proc/thread-self/net/dev") as file:
        line = next(line for line in file if line.strip().startswith(f"{interface}:"))
    numbers = [int(word) for word in line.split(":")[1].split()]
    return numbers[0] - 14 * numbers[1], numbers[8] - 14 * numbers[9]


def test_the_chain_is_the_source_documents(backend):
    backend.add(plan())
    lines = [line.split() for line in ipt("-L JOB_7 -v").splitlines()]
    assert lines[0] == ["Chain", "JOB_7", "(2", "references)"]
    inside, state = ["ACCEPT", "all", "--", "ac3f20", "any", "anywhere"], ["state", "RELATED,ESTABLISHED"]
    back = ["ACCEPT", "all", "--", "any", "ac3f20"]
    assert [line[2:] for line in lines[2:]] == [
        [*inside, "129.93.5.0/24", "/*", "OutgoingLab", "*/"],
        [*inside, "129.93.0.0/16", "/*", "OutgoingInternal", "*/"],
        [*inside, "anywhere", "/*", "OutgoingExternal", "*/"],
        ["DROP", *inside[1:], "anywhere"],
        [*back, "129.93.5.0/24", "anywhere", *state, "/*", "IncomingLab", "*/"],
        [*back, "129.93.0.0/16", "anywhere", *state, "/*", "IncomingInternal", "*/"],
        [*back, "anywhere", "anywhere", *state, "/*", "IncomingExternal", "*/"],
        ["REJECT", "all", "--", "any", "any", "anywhere", "anywhere", "reject-with", "icmp-port-unreachable"],
        ["RETURN", "all", "--", "any", "any", "anywhere", "anywhere"],
    ]
    assert "-A JOB_7 -j REJECT --reject-with icmp6-port-unreachable" in saved(6, counters=False)


@pytest.mark.parametrize("version", [4, 6])
def test_every_byte_is_what_iptables_itself_writes(backend, version):
    """Rules are built without python-iptables' help, so they are held against those of the real program."""
    backend.add(plan())
    family = xtables.V4 if version == 4 else xtables.V6
    tables = [xtables.Table(family, name) for name in ("filter", "nat")]
    ours = [bytes(table.entries()) for table in tables]
    restore = "iptables-legacy-restore" if version == 4 else "ip6tables-legacy-restore"
    text = "\n".join(saved(version)) + "\n"
    subprocess.run([restore, "-c"], input=text, text=True, check=True)
    assert [bytes(table.entries()) for table in tables] == ours


def test_only_the_tables_it_needs_are_loaded(backend):
    backend.add(plan())
    for names in ("ip_tables_names", "ip6_tables_names"):
        with open(f"/proc/thread-self/net/{names}") as file:
            assert set(file.read().split()) == {"filter", "nat"}


def test_reading_where_nobody_made_a_table_makes_none(backend):
    assert _libc.unshare(CLONE_NEWNET) == 0  # a fresh one; the fixture brings the test home
    assert counted(backend) == {}
    with open("/proc/thread-self/net/ip_tables_names") as file:
        assert file.read() == ""


def test_nothing_is_left_and_removing_twice_is_fine(backend):
    before = saved(4), saved(6)
    for job, ifname in (("7", "ac3f20"), ("8", "ac3f21"), ("9", "ac"), ("10", "ac4"), ("11", "ac45")):
        backend.add(plan(job, ifname))
    assert len(counted(backend)) == 5
    for job, ifname in (("7", "ac3f20"), ("7", "ac3f20"), ("9", "ac"), ("10", "ac4"), ("11", "ac45")):
        backend.remove(plan(job, ifname))
    assert set(counted(backend)) == {"JOB_8"}
    assert {line.split()[0] for line in saved(4) if "ACCTD_I" in line and line[0] == ":"} == {
        ":ACCTD_I", ":ACCTD_I3", ":ACCTD_I3f"
    }  # fmt: skip
    for _ in range(2):
        backend.remove(plan("8", "ac3f21"))
    assert (saved(4), saved(6)) == before


def test_a_leftover_of_the_same_name_or_on_the_same_interface_is_replaced(backend):
    backend.add(plan("7", "ac3f20"))
    backend.add(plan("7", "ac1234", classes=()))
    backend.add(plan("8", "ac1234"))
    text = "\n".join(saved(4, counters=False))
    assert text.count("-g JOB_8") == 2
    assert "-g JOB_7" not in text
    assert [line for line in saved(4, counters=False) if line.startswith("-A JOB_7 -i")] == [
        "-A JOB_7 -i ac1234 -m comment --comment OutgoingExternal -j ACCEPT",
        "-A JOB_7 -i ac1234 -j DROP",
    ]


def test_a_job_without_ipv6_and_a_host_without_it(router):
    chains = Iptables(Pools(POOLS.v4, None))
    chains.add(plan(ipv6=True))
    with open("/proc/thread-self/net/ip6_tables_names") as file:
        assert file.read() == ""
    chains.remove(plan())
    chains = Iptables(POOLS)
    before = saved(6)
    chains.add(plan(ipv6=False))
    assert saved(6) == before
    assert set(counted(chains)) == {"JOB_7"}


def walked(lines, ifname, flag):
    """The rules a packet meets from ACCTD_FORWARD on, until it is sent to a job's chain: (how many, the chain)."""
    chains = {}
    for line in lines:
        words = line.split()
        if words[0] == "-A":
            chains.setdefault(words[1], []).append(words[2:])
    met = 0

    def descend(chain):
        nonlocal met
        for direction, name, jump, target in chains.get(chain, []):
            met += 1
            if direction != flag or not (ifname.startswith(name[:-1]) if name.endswith("+") else ifname == name):
                continue
            if jump == "-g":
                return target
            if found := descend(target):
                return found
        return None

    return descend("ACCTD_FORWARD"), met


def test_three_hundred_jobs_make_a_tree_and_no_list(router):
    chains = Iptables(Pools(POOLS.v4, None))
    before = saved()
    plans = [plan(str(slot), f"ac{f'{slot:04x}'[::-1]}", ipv6=False) for slot in range(300)]
    for one in plans:
        chains.add(one)
    lines = saved(counters=False)
    assert [line for line in lines if line.startswith("-A FORWARD")] == ["-A FORWARD -j ACCTD_FORWARD"]
    for one in plans:
        for flag in ("-o", "-i"):
            target, met = walked(lines, one.ifname, flag)
            assert target == one.chain
            assert met <= 2 + 16 + 16 + 2
    assert len(counted(chains)) == 300
    random.Random(1).shuffle(plans)
    for count, one in enumerate(plans[:-1], start=1):
        chains.remove(one)
        if count % 60 == 0:
            lines = saved(counters=False)
            assert {walked(lines, left.ifname, "-o")[0] for left in plans[count:]} == {p.chain for p in plans[count:]}
            assert {walked(lines, gone.ifname, "-o")[0] for gone in plans[:count]} == {None}
    chains.remove(plans[-1])
    assert saved() == before


FOREIGN = (
    "-A INPUT -m quota --quota 4096 -j ACCEPT",  # its state lives in the kernel's copy of the rule
    "-A INPUT -m limit --limit 3/min -c 11 1100 -j LOG",
    "-A INPUT -m hashlimit --hashlimit-above 5/sec --hashlimit-name x -c 12 1200 -j DROP",
    "-A INPUT -m u32 --u32 0&0xFFFF=0x100:0xFFFF -j DROP",
    "-A INPUT -m recent --name y --set -j DROP",
    "-A INPUT -m bpf --bytecode 1,6_0_0_1 -j DROP",
    "-A INPUT -m connlimit --connlimit-above 3 -j DROP",
    "-A FORWARD -s 198.51.100.0/24 -c 5 500 -j ACCEPT",
    "-A FORWARD -o ac+ -c 6 600 -m comment --comment OutgoingExternal -j JOBS",
    "-A JOBS -p tcp --dport 22 -c 7 700 -j RETURN",
)


def test_foreign_rules_survive_byte_for_byte_with_their_counts(backend):
    ipt("-N JOBS")
    ipt("-P FORWARD DROP")
    taken = 0
    for rule in FOREIGN:
        words = [word.replace("1,6_0_0_1", "1,6 0 0 1") for word in rule.split()]
        taken += subprocess.run(["iptables-legacy", *words], stderr=subprocess.DEVNULL, check=False).returncode == 0
    ipt("-t nat -A POSTROUTING -s 198.51.100.0/24 -c 8 800 -j SNAT --to-source 192.0.2.9")
    assert taken >= 6, "this kernel has too few extensions for the test to say anything"
    before = saved()
    raw = bytes(xtables.Table(xtables.V4, "filter").entries())
    backend.add(plan("7", "ac3f20"))
    backend.add(plan("8", "ac3f21"))
    during = saved()
    assert [line for line in during if line in before] == before
    assert set(counted(backend)) == {"JOB_7", "JOB_8"}
    backend.remove(plan("7", "ac3f20"))
    backend.remove(plan("8", "ac3f21"))
    assert saved() == before
    assert bytes(xtables.Table(xtables.V4, "filter").entries()) == raw


def test_what_a_firewall_reload_took_comes_back_with_the_next_add(backend):
    backend.add(plan("7", "ac3f20"))
    expected = saved(counters=False)
    for lost in ("-F", "-F FORWARD", "-F ACCTD_FORWARD", "-F ACCTD_I3", "-t nat -F", "-I FORWARD -s 192.0.2.7 -j DROP"):
        ipt(lost)
        backend.add(plan("7", "ac3f20"))
        ours = [line for line in saved(counters=False) if "192.0.2.7" not in line]
        assert sorted(ours) == sorted(expected)
        assert next(line for line in saved(counters=False) if "-A FORWARD" in line) == "-A FORWARD -j ACCTD_FORWARD"
    ipt("-F")
    backend.remove(plan("7", "ac3f20"))
    assert not [line for line in saved() if "ACCTD" in line or "JOB" in line]


def test_if_the_second_family_fails_the_first_is_taken_back(backend, monkeypatch):
    before = saved(4), saved(6)
    monkeypatch.setitem(xtrules._REJECT, 6, 6)  # a TCP reset, which the kernel refuses in a rule for all protocols
    with pytest.raises(KernelRefusedError, match="ip6tables table filter: can't commit: Invalid argument"):
        backend.add(plan())
    assert (saved(4), saved(6)) == before


def test_counts_are_exact_by_class_and_ip_version(backend, lab):
    job, _, world = lab
    backend.add(plan())
    backend.add(plan("8", "ac3f21"))
    lab4 = pingpong(job, world, LAB, 3, 100)
    internal = [pingpong(job, world, CAMPUS, 5, 1000), pingpong(job, world, CAMPUS6, 2, 50)]
    external = [pingpong(job, world, WORLD, 7, 10), pingpong(job, world, WORLD6, 4, 1200)]
    both = {"Lab": lab4} | {
        name: Count(sum(c.bytes for c in counts), sum(c.packets for c in counts))
        for name, counts in (("Internal", internal), ("External", external))
    }
    read = counted(backend)
    assert read["JOB_7"] == {f"{way}{name}": count for way in ("Outgoing", "Incoming") for name, count in both.items()}
    assert set(read["JOB_8"].values()) == {Count(0, 0)}
    assert counted(backend) == read
    assert counted(backend, "JOB_7") == {"JOB_7": read["JOB_7"]}
    assert counted(backend, "JOB_gone") == {}


def test_tcp_is_counted_as_the_interface_counts_it(backend, lab):
    job, _, world = lab
    backend.add(plan())
    before = l3_bytes("ac3f20")
    with world.socket(LAB, socket.SOCK_STREAM) as server, job.socket("0.0.0.0", socket.SOCK_STREAM) as client:  # noqa: S104
        server.listen()
        client.connect(server.getsockname())
        taken, (peer, _) = 0, server.accept()
        with peer:
            assert peer.getpeername()[0] == "192.0.2.1"  # masqueraded
            thread = threading.Thread(target=client.sendall, args=(bytes(3_000_000),))
            thread.start()
            while taken < 3_000_000:
                taken += len(peer.recv(1 << 20))
            thread.join()
            counts = counted(backend)["JOB_7"]
            received, sent = (now - then for now, then in zip(l3_bytes("ac3f20"), before, strict=True))
    out, back = counts["OutgoingLab"], counts["IncomingLab"]
    assert out.bytes > 3_000_000
    # The interface also carries neighbour discovery, and segments still on their way between the two readings.
    assert abs(out.bytes - received) < 2000
    assert abs(back.bytes - sent) < 2000
    assert counts["OutgoingInternal"] == counts["OutgoingExternal"] == Count(0, 0)


def test_new_incoming_connections_are_rejected_and_billed_to_nobody(backend, lab):
    job, other, world = lab
    backend.add(plan())
    backend.add(plan("8", "ac3f21"))
    with job.socket("0.0.0.0", socket.SOCK_STREAM) as server:  # noqa: S104
        server.listen()
        for caller in (world, other):
            with caller.socket("0.0.0.0", socket.SOCK_STREAM) as client:  # noqa: S104
                assert client.connect_ex(("10.99.0.2", server.getsockname()[1])) == errno.ECONNREFUSED
    read = counted(backend)
    assert {count for job_counts in read.values() for count in job_counts.values()} == {Count(0, 0)}


def test_no_byte_is_lost_or_doubled_while_other_jobs_come_and_go(backend, lab):
    job, _, world = lab
    backend.add(plan())
    sent = []
    stop = threading.Event()

    def talk():
        while not stop.is_set():
            sent.append(pingpong(job, world, CAMPUS, 200, 100))

    def churn():
        for _ in range(100):
            backend.add(plan("8", "ac3f21"))
            backend.remove(plan("8", "ac3f21"))
        churned.set()

    churned = threading.Event()
    threads = [threading.Thread(target=work) for work in (talk, churn)]
    for thread in threads:
        thread.start()
    try:
        last = Count(0, 0)
        while not churned.is_set() and threads[1].is_alive():
            now = counted(backend)["JOB_7"]["OutgoingInternal"]
            assert now >= last, "a reader saw counters between a writer's replace and its add"
            last = now
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert churned.is_set()
    total = Count(sum(c.bytes for c in sent), sum(c.packets for c in sent))
    counts = counted(backend)["JOB_7"]
    assert total.packets > 400
    assert counts["OutgoingInternal"] == counts["IncomingInternal"] == total


def test_a_reader_waits_for_a_writer_to_have_carried_the_counters_over(backend):
    backend.add(plan())
    reader = threading.Thread(target=backend.read)
    with xtables.locked():
        reader.start()
        reader.join(0.05)  # however long we wait, it is not done
        assert reader.is_alive()
    reader.join()


def test_writers_of_every_kind_share_the_table(backend):
    """Two threads of ours beside iptables' own program: what each made is there."""
    script = "for i in $(seq 60); do iptables-legacy -w -N THEIRS$i || exit 1; done"
    theirs = subprocess.Popen(["sh", "-c", script])
    failed = []

    def write(first):
        chains = Iptables(POOLS)
        try:
            for slot in range(first, first + 25):
                chains.add(plan(str(slot), f"ac{slot:x}"))
                counted(chains)
        except Exception as e:
            failed.append(e)

    threads = [threading.Thread(target=write, args=(first,)) for first in (0x1000, 0x2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert theirs.wait() == 0
    assert failed == []
    names = {line.split()[0][1:] for line in saved() if line.startswith(":")}
    assert len([name for name in names if name.startswith("THEIRS")]) == 60
    assert len([name for name in names if name.startswith("JOB_")]) == 50 == len(counted(backend))


def test_no_namespace_is_kept_alive(backend):
    """A back end left behind in a namespace would keep it, and every link in it, for ever."""
    backend.add(plan())
    counted(backend)
    ours = os.stat("/proc/thread-self/ns/net").st_ino
    home = here()
    assert _libc.unshare(CLONE_NEWNET) == 0
    assert os.stat("/proc/thread-self/ns/net").st_ino != ours
    assert counted(backend) == {}
    backend.add(plan("9", "ac9"))  # the calling thread's namespace, not the one of the last call
    assert set(counted(backend)) == {"JOB_9"}
    enter(home)
    os.close(home)
    assert set(counted(backend)) == {"JOB_7"}
    links = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert not [link for link in links if link.startswith("socket:")]
