"""The lab itself: what measures acctd must be right first."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import traffic
from lab.topology import NETNS, PREFIX, Topology, sweep
from lab.wire import Count, LostError, WireCounter

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "lab/traffic.py")


def names(pid=None):
    """The lab namespaces of one process."""
    return [entry.name for entry in NETNS.iterdir() if entry.name.startswith(f"{PREFIX}{pid or os.getpid()}-")]


def counter(topology, site):
    return WireCounter(functools.partial(topology.enter, site), site.dev)


def wait(condition):
    """Until true; packets that are on their way come within a scheduler's whim, not within a sleep we choose."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


@pytest.fixture(scope="module")
def topology():
    others = names()  # another fixture of this process may have its own
    with Topology() as made:
        made.forward()
        yield made
    assert names() == others


@pytest.fixture(scope="module")
def server(topology):
    with topology.enter(topology.campus):
        made = traffic.Server()
    with made:
        yield made


def host(topology, version):
    return topology.campus.v4 if version == 4 else topology.campus.v6


def client(topology, *words, check=True):
    argv = [sys.executable, SCRIPT, *map(str, words)]
    return topology.run(topology.wan, argv, capture_output=True, text=True, check=check)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("action", ["take", "give"])
@pytest.mark.parametrize("size", [24, 100 * 1200, 1201, 38401, 500_000])
def test_udp_through_the_node_is_counted_to_the_byte_at_both_ends(topology, server, version, action, size):
    expected = traffic.expected_udp(size, version)
    data = Count(expected.data_bytes, expected.data_packets, expected.data_bytes, expected.data_packets)
    control = Count(*expected[2:], *expected[2:])
    with counter(topology, topology.campus) as campus, counter(topology, topology.wan) as wan:
        with topology.enter(topology.wan):
            getattr(traffic, action)(host(topology, version), traffic.PORT, size, udp=True)
        at_campus, at_wan = campus.stop(), wan.stop()
    sent, received = (data, control) if action == "take" else (control, data)
    assert (at_campus.sent[version], at_campus.received[version]) == (sent, received)
    assert (at_wan.received, at_wan.sent) == (at_campus.sent, at_campus.received)
    assert at_campus.sent[10 - version] == Count()


def settled(campus, wan):
    """Whether what one end sent has arrived at the other: TCP's last acknowledgements outlive the client."""
    at_campus, at_wan = campus.now(), wan.now()
    return all(
        sum(count.wire_packets for count in sent.values()) == sum(count.wire_packets for count in received.values())
        for sent, received in ((at_campus.sent, at_wan.received), (at_wan.sent, at_campus.received))
    )


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("action", ["take", "give"])
def test_tcp_super_packets_are_the_same_at_both_ends(topology, server, version, action):
    size = 10_000_000
    with counter(topology, topology.campus) as campus, counter(topology, topology.wan) as wan:
        client(topology, action, host(topology, version), traffic.PORT, size)
        wait(lambda: settled(campus, wan))
        at_campus, at_wan = campus.stop(), wan.stop()
    assert (at_wan.received, at_wan.sent) == (at_campus.sent, at_campus.received)
    bulk = at_campus.sent[version] if action == "take" else at_campus.received[version]
    assert bulk.packets < bulk.wire_packets
    # Cutting repeats headers and nothing else; TCP may have sent some payload twice.
    headers = 52 if version == 4 else 72
    assert bulk.bytes - bulk.packets * headers == bulk.wire_bytes - bulk.wire_packets * headers >= size


@pytest.mark.parametrize("version", [4, 6])
def test_the_kernel_cuts_a_super_packet_as_the_counter_says(version):
    with Topology() as topology:
        topology.forward()
        topology.run(topology.node, ["ethtool", "-K", "campus", "gso", "off", "tso", "off"], capture_output=True)
        with topology.enter(topology.campus):
            server = traffic.Server()
        with server, counter(topology, topology.campus) as campus, counter(topology, topology.wan) as wan:
            client(topology, "give", host(topology, version), traffic.PORT, 10_000_000)
            wait(lambda: settled(campus, wan))
            whole, cut = wan.stop().sent[version], campus.stop().received[version]
    assert whole.packets < whole.wire_packets == cut.packets == cut.wire_packets
    assert whole.bytes < whole.wire_bytes == cut.bytes == cut.wire_bytes


def test_without_offloads_the_wire_has_no_super_packets():
    with Topology(offload=False) as topology:
        topology.forward()
        with topology.enter(topology.campus):
            server = traffic.Server()
        with server, counter(topology, topology.campus) as campus:
            client(topology, "take", topology.campus.v4, traffic.PORT, 1_000_000)
            wire = campus.stop()
    assert wire.sent[4].packets == wire.sent[4].wire_packets >= 1_000_000 // 1448
    assert wire.sent[4].bytes == wire.sent[4].wire_bytes


def test_nothing_is_forwarded_until_the_node_is_told_to(topology):
    with Topology() as other:
        argv = [sys.executable, "-c", f"import socket; socket.create_connection(({other.campus.v4!r}, 1), 0.2)"]
        assert "timed out" in other.run(other.wan, argv, check=False, capture_output=True, text=True).stderr
        other.forward()
        # Nobody listens there: only the campus itself can say so.
        assert "refused" in other.run(other.wan, argv, check=False, capture_output=True, text=True).stderr


def test_noise_that_no_node_forwards_is_not_counted(topology, server):
    with counter(topology, topology.campus) as campus:
        for family in ("-4", "-6"):
            topology.run(topology.campus, ["ip", family, "neigh", "flush", "dev", "node"])
        with topology.enter(topology.wan):
            traffic.take(topology.campus.v6, traffic.PORT, 24, udp=True)
        wire = campus.stop()
    assert wire.received[6] == wire.sent[6] == Count(72, 1, 72, 1)
    assert wire.received[4] == wire.sent[4] == Count()


def test_a_counter_that_lost_packets_says_so(topology, server, monkeypatch):
    monkeypatch.setattr(WireCounter, "_follow", lambda _: None)
    monkeypatch.setattr("lab.wire._BLOCKS", 1)
    monkeypatch.setattr("lab.wire._FRAMES", 1024)
    with counter(topology, topology.campus) as campus, topology.enter(topology.wan):
        traffic.take(topology.campus.v4, traffic.PORT, 1_300_000, udp=True)
        with pytest.raises(LostError, match=r"dropped [1-9]"):
            campus.stop()


def test_the_client_says_why_it_failed(topology):
    done = client(topology, "take", topology.node.v4, 9, 100, check=False)
    assert (done.returncode, "take failed: " in done.stderr) == (1, True)
    done = client(topology, "give", topology.node.v4, 9, 3, "--udp", check=False)
    assert (done.returncode, "too few for UDP" in done.stderr) == (1, True)


def test_a_child_still_running_and_an_exception_leave_nothing():
    before = names()
    with pytest.raises(ZeroDivisionError), Topology() as topology:
        child = topology.popen(topology.campus, ["sleep", "600"])
        raise ZeroDivisionError
    assert child.poll() == -signal.SIGKILL
    assert names() == before


HOLD = "import sys, threading; from lab.topology import Topology\nwith Topology(): print(flush=True); sys.stdin.read()"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(number):
    # A background shell has its children ignore SIGINT.
    hold = ["env", "--default-signal", sys.executable, "-c", HOLD]
    with subprocess.Popen(
        hold, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        child.stdout.readline()
        assert len(names(child.pid)) == 3
        child.send_signal(number)
        child.wait()
    assert names(child.pid) == []


def test_what_a_killed_run_left_is_swept():
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        child.kill()
        child.wait()
    assert len(names(child.pid)) == 3
    sweep()
    assert names(child.pid) == []
