"""A job that sends from an address of another job: nothing leaves, and nobody is billed for an answer."""

import functools
import sys
from collections.abc import Iterator

import pytest

from lab.topology import Topology
from lab.traffic import PORT, Server
from lab.wire import WireCounter
from tests.kernel.conftest import Node

SIZE = 1_000

# A datagram, and then a connection over the same pipe: once that stands, the datagram has had its chance. For the
# foreign source: IPV6_FREEBIND (78) needs no privilege; IP_TRANSPARENT (19) does, and a root job has it.
_SEND = f"""
import socket, sys
family, level, option, source, peer = sys.argv[1:]
s = socket.socket(getattr(socket, family), socket.SOCK_DGRAM)
if source:
    s.setsockopt(getattr(socket, level), int(option), 1)
    s.bind((source, 0))
s.sendto(b"x" * {SIZE}, (peer, 9))
socket.create_connection((peer, {PORT}), timeout=20).close()
"""
WAYS = {
    "v6": ("AF_INET6", "IPPROTO_IPV6", "78", "fd61:6363:7464::f1", "2001:db8:2::2"),
    "v4": ("AF_INET", "IPPROTO_IP", "19", "10.181.0.241", "203.0.113.2"),
}


@pytest.fixture(scope="module")
def server(topology: Topology) -> Iterator[None]:
    with topology.enter(topology.wan):
        made = Server()
    with made:
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("foreign", [True, False])
def test_only_the_jobs_own_source_passes(each_backend: Node, server: None, way: str, foreign: bool) -> None:
    node, lab = each_backend, each_backend.topology
    family, level, option, source, peer = WAYS[way]
    user, python = ("nobody", "/usr/bin/python3") if way == "v6" else ("root", sys.executable)
    with WireCounter(functools.partial(lab.enter, lab.wan), lab.wan.dev) as counter:
        record = node.job(
            "--user", user, "--", python, "-c", _SEND, family, level, option, source if foreign else "", peer
        )  # fmt: skip
        wire = counter.stop()
    sent = record["totals"]["network"]["OutgoingExternal"]
    arrived = sum(count.bytes for count in wire.received.values())
    # The connection alone is some hundred bytes.
    assert (sent > SIZE, arrived > SIZE) == (not foreign, not foreign)
