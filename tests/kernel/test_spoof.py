"""A job that sends from an address of another job: nothing leaves, and nobody is billed for an answer."""

import functools
import sys

import pytest

from lab.wire import WireCounter
from tests.kernel.conftest import Node

# IPV6_FREEBIND (78) needs no privilege; IP_TRANSPARENT (19) does, and a root job has it.
_V6 = """
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IPV6, 78, 1)
s.bind(("fd61:6363:7464::f1", 0))
s.sendto(b"x" * 1000, ("2001:db8:2::2", 9))
"""
_V4 = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, 19, 1)
s.bind(("10.181.0.241", 0))
s.sendto(b"x" * 1000, ("203.0.113.2", 9))
"""
_HONEST = "import socket; socket.socket(socket.{0}, socket.SOCK_DGRAM).sendto(b'x' * 1000, ('{1}', 9))"


@pytest.mark.parametrize(("user", "script"), [("nobody", _V6), ("root", _V4)], ids=["v6", "v4"])
def test_a_foreign_source_gets_nowhere(each_backend: Node, user: str, script: str) -> None:
    node = each_backend
    lab = node.topology
    python = sys.executable if user == "root" else "/usr/bin/python3"
    with WireCounter(functools.partial(lab.enter, lab.wan), lab.wan.dev) as counter:
        record = node.job("--user", user, "--", python, "-c", script)
        wire = counter.stop()
    assert set(record["totals"]["network"].values()) == {0}
    # The node's own complaint to nobody may cross; the 1000 bytes may not.
    assert sum(count.bytes for count in wire.received.values()) < 1000


@pytest.mark.parametrize(
    ("family", "address", "size"), [("AF_INET6", "2001:db8:2::2", 1048), ("AF_INET", "203.0.113.2", 1028)]
)
def test_the_jobs_own_source_passes(each_backend: Node, family: str, address: str, size: int) -> None:
    # The first IPv6 packet of a fresh pipe waits for its neighbour to be found: the job must not end before that.
    script = _HONEST.format(family, address)
    record = each_backend.job("--", sys.executable, "-c", f"import time\n{script}\ntime.sleep(0.2)")
    assert record["totals"]["network"]["OutgoingExternal"] == size
