"""A pipe and a chain on this kernel, through the command line: what left the job, to the byte."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.topology import Topology
from tests.kernel.conftest import Node, make_node


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node that takes the back end which this guest is for; what a job leaves behind fails the test."""
    with Topology() as topology:
        yield from make_node(topology, tmp_path, backend=os.environ["ACCTD_VM_BACKEND"])


def test_bytes_of_a_nat_job(node: Node) -> None:
    lab = node.topology
    with lab.enter(lab.wan):
        # Somebody listens: no ICMP answer comes back to be counted.
        four = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with four, six:
        four.bind((lab.wan.v4, 9999))
        six.bind((lab.wan.v6, 9999))
        send = "for to in {} {}; do for i in 1 2 3; do printf %01000d 0 >/dev/udp/$to/9999 || exit 1; done; done"
        record = node.job("--", "bash", "-c", send.format(lab.wan.v4, lab.wan.v6))
        for listener in (four, six):
            listener.settimeout(10)
            assert [len(listener.recv(2000)) for _ in range(3)] == [1000] * 3
    network = record["totals"]["network"]
    assert network["OutgoingExternal"] == 3 * (1000 + 28) + 3 * (1000 + 48)
    assert network["OutgoingInternal"] == network["IncomingInternal"] == network["IncomingExternal"] == 0
