"""A node whose agent dies where a test says, and a starter's and a job's part in what comes before and after."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acctd import varlink
from acctd.ledger import FILE
from acctd.network.backend import PREFIX
from lab.traffic import expected_udp
from tests.faults.dying import Death
from tests.faults.nursery import PATIENCE, Nursery, Worker
from tests.kernel.conftest import NOTHING, Node
from tests.kernel.test_block_io import Loop

WAN4, WAN6 = "203.0.113.2", "2001:db8:2::2"
BLOCK = 1 << 17

CHAINS = {"nftables": "acctd.network.nftables:Nftables", "iptables": "acctd.network.iptables:Iptables"}


class DiedError(Exception):
    """The agent is gone, and a call has no answer."""


@dataclass
class Bed:
    """One test's node, its agent of the moment, and its workers."""

    node: Node
    nursery: Nursery
    backend: str
    disk: Loop
    agent: int | None = None
    log: str = ""
    workers: list[Worker] = field(default_factory=list)
    _pipe: int = -1
    _death: Death | None = None

    # The agent

    def start(self, death: Death | None = None, *, at_once: bool = False) -> bool:
        """Start an agent that may have to die, when it does what it dies of after arm(), or at once.

        Whether it serves; if not, it died.
        """
        assert self.agent is None
        if death is not None:
            death = death._replace(point=death.point.format(chains=CHAINS[self.backend]))
        self._trigger.unlink(missing_ok=True)
        if at_once:
            self._trigger.touch()
        self._pipe, write = os.pipe()
        self._death = death
        self.agent = self.nursery.agent(self.node.config, write, death, self._trigger)
        os.close(write)
        self.log += f"--- agent {self.agent} {death or ''}\n"
        text = b""
        while b"serving on" not in text:
            received = os.read(self._pipe, 1 << 16)
            if not received:
                self.log += text.decode()
                self.bury()
                return False
            text += received
        self.log += text.decode()
        return True

    def arm(self) -> None:
        """From now on the agent dies of what it was told to."""
        self._trigger.touch()

    def bury(self, number: int = signal.SIGKILL) -> None:
        """Wait for the agent's end, which must be by this signal; 0 is none."""
        assert self.agent is not None
        while received := os.read(self._pipe, 1 << 16):
            self.log += received.decode()
        os.close(self._pipe)
        status, self.agent = self.nursery.wait(self.agent), None
        assert status == -number, f"the agent ended with {status}: {self.log}"

    def kill(self) -> None:
        assert self.agent is not None
        os.kill(self.agent, signal.SIGKILL)
        self.bury()

    def stop(self) -> None:
        assert self.agent is not None
        os.kill(self.agent, signal.SIGTERM)
        self.bury(0)

    @property
    def _trigger(self) -> Path:
        return self.node.directory / "trigger"

    # The starter

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call; raises DiedError where the agent does not live to answer it."""
        data = b""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(PATIENCE)
                connection.connect(str(self.node.directory / "run" / "s"))
                frame = {"method": f"{varlink.INTERFACE}.{method}", "parameters": parameters}
                connection.sendall(json.dumps(frame).encode() + b"\0")
                while not data.endswith(b"\0"):
                    received = connection.recv(1 << 16)
                    if not received:
                        raise DiedError(method)
                    data += received
        except ConnectionError as e:
            raise DiedError(method) from e
        reply: dict[str, Any] = json.loads(data[:-1])
        return reply

    def ok(self, method: str, **parameters: Any) -> dict[str, Any]:
        reply = self.call(method, **parameters)
        assert "error" not in reply, (method, reply, self.log)
        found: dict[str, Any] = reply["parameters"]
        return found

    def dies(self, method: str, **parameters: Any) -> None:
        """A call that the agent dies of."""
        self.arm()
        try:
            reply = self.call(method, **parameters)
        except DiedError:
            self.bury()
            return
        raise AssertionError(f"the agent lived through {self._death} and answered {reply}: {self.log}")

    def phases(self) -> dict[str, str]:
        return {job["id"]: job["phase"] for job in self.ok("List")["jobs"]}

    def create(self, job: str = "victim", **parameters: Any) -> None:
        """As a starter does after its first call had no answer: again, unless the job is there."""
        if job not in self.phases():
            assert (left := self.node.left()) == left | NOTHING, self.log
            self.ok("Create", job=job, **parameters)

    # The job

    def worker(self, namespace: str | None = "victim") -> Worker:
        """A process in the network of a job."""
        place = self.node.directory / "run" / "netns" / namespace if namespace else None
        self.workers.append(self.nursery.worker(place))
        return self.workers[-1]

    def first(self, worker: Worker) -> None:
        """One half of a job's traffic."""
        worker.do("give", WAN4, 30_000)
        worker.do("take", WAN6, 20_000)

    def second(self, worker: Worker) -> None:
        """The other half."""
        worker.do("give", WAN6, 40_000)
        worker.do("take", WAN4, 10_000)

    def read(self, worker: Worker, blocks: int) -> None:
        """So much from the disk, in pieces that the kernel never divides."""
        for _ in range(blocks):
            worker.do("read", self.disk.path, BLOCK)

    def spoil_ledger(self, how: str) -> None:
        """Take the ledger away ("lost"), or make it unreadable ("corrupt")."""
        state = self.node.directory / "state"
        if how == "lost":
            for path in state.iterdir():
                path.unlink()
            return
        # Whoever has it open has to read it anew after this.
        with contextlib.closing(sqlite3.connect(state / FILE)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with (state / FILE).open("r+b") as file:
            file.write(os.urandom((state / FILE).stat().st_size))

    def harm(self, how: str) -> None:
        """What another program may do to the chains: "flush" takes all away, "cut off" leaves them and no way there.

        A living agent does not see one half of it.
        """
        if self.agent is not None:
            os.kill(self.agent, signal.SIGSTOP)
        if how == "flush":
            self._flush()
        else:
            self._cut_off()
        if self.agent is not None:
            os.kill(self.agent, signal.SIGCONT)

    def _flush(self) -> None:
        commands = {
            "nftables": [["nft", "flush", "ruleset"]],
            "iptables": [
                [tool, "-t", table, flag]
                for tool in ("iptables-legacy", "ip6tables-legacy")
                for table in ("filter", "nat")
                for flag in ("-F", "-X")
            ],
        }
        for argv in commands[self.backend]:
            self.node.topology.run(self.node.topology.node, argv)

    def _cut_off(self) -> None:
        commands = {
            "nftables": [["nft", "flush", "chain", "inet", "acctd", "forward"]],
            "iptables": [[tool, "-F", "FORWARD"] for tool in ("iptables-legacy", "ip6tables-legacy")],
        }
        for argv in commands[self.backend]:
            self.node.topology.run(self.node.topology.node, argv)

    def end(self) -> None:
        """After a test."""
        self.stop()
        for worker in self.workers:
            worker.end()

    def clean(self) -> None:
        """After a failed test: the next one's node is as new."""
        for worker in self.workers:
            worker.end()
        if self.agent is not None:
            with contextlib.suppress(AssertionError):
                self.kill()
        self._flush()
        site = self.node.topology.node
        for link in self.node.left()["links"]:
            if link.startswith(PREFIX):
                # One whose namespace has just gone goes by itself.
                self.node.topology.run(site, ["ip", "link", "delete", link], check=False, capture_output=True)
        for family in ("-4", "-6"):
            self.node.topology.run(site, ["ip", family, "route", "flush", "type", "blackhole"])


def network(firsts: int, seconds: int) -> dict[str, dict[str, int]]:
    """What so many halves put on the wire, as records have it."""
    bytes_, packets = {"Out": 0, "In": 0}, {"Out": 0, "In": 0}
    for count, way, size, version in (
        (firsts, "Out", 30_000, 4), (firsts, "In", 20_000, 6), (seconds, "Out", 40_000, 6), (seconds, "In", 10_000, 4),
    ):  # fmt: skip
        expected, back = expected_udp(size, version), "In" if way == "Out" else "Out"
        bytes_[way] += count * expected.data_bytes
        packets[way] += count * expected.data_packets
        bytes_[back] += count * expected.control_bytes
        packets[back] += count * expected.control_packets
    none = {"OutgoingInternal": 0, "IncomingInternal": 0}
    names = {"Out": "OutgoingExternal", "In": "IncomingExternal"}
    return {
        "network": none | {names[way]: value for way, value in bytes_.items()},
        "network_packets": none | {names[way]: value for way, value in packets.items()},
    }
