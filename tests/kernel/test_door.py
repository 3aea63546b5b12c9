"""One user does all it can to shut the others out of a living agent: they are served, and the agent stays small.

The deadlines of half messages, idle connections and unread answers are too long to wait for here; tests/unit/
test_server.py has them, with shorter ones.
"""

import json
import os
import re
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from acctd import varlink
from acctd.shares import HELD_PER_USER, PER_USER
from tests.kernel.conftest import Node
from tests.kernel.served import Served

CROWD, PROCESSES = 10_000, 4
ATTACKER, BYSTANDER = 65534, 65533
DEADLINE = 60.0
ROOM = 16 << 20
"""Bytes by which the agent may grow: four times what is kept for one user."""


class Patient(Served):
    """As a client should be: it blocks in connect(2) while the queue of the socket is full. unix(7), socket(7)."""

    def connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            made.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(DEADLINE), 0))
        made.connect(str(self.path))
        return made


@pytest.fixture
def served(node: Node) -> Iterator[Served]:
    made = Patient(node, None)  # type: ignore[arg-type]  # start() sets it
    made.start()
    for parent in [node.directory, *node.directory.parents]:
        if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
            parent.chmod(0o755)
    yield made
    if made.process.poll() is None:
        assert made.stop() == 0


@dataclass
class Child:
    """A forked process of another user, which tells one thing after the other and waits after each to go on."""

    pid: int
    told: int
    hold: int

    def answer(self) -> Any:
        """What it found; it must come within the deadline."""
        data = b""
        while not data.endswith(b"\n"):
            assert select.select([self.told], [], [], DEADLINE)[0], "the child says nothing"
            received = os.read(self.told, 65536)
            assert received, "the child ended"
            data += received
        return json.loads(data)

    def go_on(self) -> None:
        """Let it do the next thing."""
        os.write(self.hold, b"1")

    def has_answered(self) -> bool:
        return bool(select.select([self.told], [], [], 0)[0])


@contextmanager
def someone(uid: int, act: Callable[[], Iterator[Any]]) -> Iterator[Child]:
    """Run `act` as another user in a process of its own, whose sockets stay open until the block ends.

    It yields what it has to tell.
    """
    (told, tell), (held, hold) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(hold)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            for finding in act():
                os.write(tell, json.dumps(finding).encode() + b"\n")
                os.read(held, 1)
        except BaseException as e:
            os.write(2, f"child: {e!r}\n".encode())
        finally:
            os._exit(0)
    os.close(tell)
    os.close(held)
    try:
        yield Child(pid, told, hold)
    finally:
        os.close(hold)
        os.kill(pid, signal.SIGKILL)  # some have no end
        os.waitpid(pid, 0)
        os.close(told)


def asks(served: Served) -> Iterator[dict[str, Any]]:
    """A bystander's calls, each on a connection of its own."""
    yield {
        "cost": served.ok("Cost")["cost"]["errors"],
        "jobs": served.ok("List")["jobs"],
        "name": served.ok(f"{varlink.SERVICE}.GetInfo")["product"],
    }


def assert_served(served: Served) -> float:
    """Root and a bystander are answered; the seconds that root's slowest call took."""
    slowest = 0.0
    for _ in range(20):
        before = time.monotonic()
        assert served.ok("List") == {"jobs": []}
        slowest = max(slowest, time.monotonic() - before)
    with someone(BYSTANDER, lambda: asks(served)) as bystander:
        assert bystander.answer() == {"cost": 0, "jobs": [], "name": "acctd"}
    return slowest


def resident(served: Served) -> int:
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def warnings(served: Served) -> list[str]:
    """What the agent logged above the ordinary, after it was told to stop."""
    assert served.stop() == 0
    assert served.process.stderr is not None
    return [line for line in served.process.stderr.read().splitlines() if " INFO " not in line]


def show(what: str, slowest: float, before: int, after: int) -> None:
    print(f"{what}: slowest call of root {slowest * 1000:.0f} ms, RSS {before >> 10} -> {after >> 10} KiB")


def test_ten_thousand_idle_connections_of_one_user(served: Served) -> None:
    """A share of them stays open, the others read why not, and nobody else notices."""

    def crowd() -> Iterator[dict[str, int]]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        each = CROWD // PROCESSES
        assert hard > each + 50
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, each + 50), hard))
        connections = []
        for _ in range(each):
            connections.append(socket.socket(socket.AF_UNIX))
            connections[-1].connect(str(served.path))
        yield {}
        told = [connection.recv(1 << 16) for connection in connections if has_news(connection)]
        yield {"refused": sum(b".Exhausted" in text for text in told), "open": each - len(told)}

    before = resident(served)
    slowest = 0.0
    with ExitStack() as opened:
        crowds = [opened.enter_context(someone(ATTACKER, crowd)) for _ in range(PROCESSES)]
        while not all(child.has_answered() for child in crowds):
            slowest = max(slowest, assert_served(served))
        # Connections are taken in the order they come, so all of those had their turn before this one's answer.
        assert_served(served)
        for child in crowds:
            child.answer()
            child.go_on()
        answers = [child.answer() for child in crowds]
        assert sum(a["open"] for a in answers) == PER_USER
        assert sum(a["refused"] for a in answers) == CROWD - PER_USER
        slowest = max(slowest, assert_served(served))
        after = resident(served)
        show(f"{CROWD} connections", slowest, before, after)
        assert after - before < ROOM
    told = warnings(served)
    assert len(told) == 1, told
    assert f"uid {ATTACKER} has {PER_USER} connections open" in told[0]


def has_news(connection: socket.socket) -> bool:
    poll = select.poll()  # select(2) takes no descriptor above 1024
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def test_calls_as_fast_as_they_can_be_sent_and_no_answer_read(served: Served) -> None:
    def flood() -> Iterator[str]:
        call = json.dumps({"method": f"{varlink.SERVICE}.GetInterfaceDescription",
                           "parameters": {"interface": varlink.INTERFACE}}).encode() + b"\0"  # fmt: skip
        connections = []
        for _ in range(PER_USER):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(served.path))
            connection.setblocking(False)
            connections.append(connection)
        yield "connected"
        while True:
            for connection in connections.copy():
                try:
                    connection.send(call * 100)
                except BlockingIOError:
                    continue
                except OSError:
                    connections.remove(connection)

    before = resident(served)
    slowest = 0.0
    with someone(ATTACKER, flood) as child:
        assert child.answer() == "connected"
        child.go_on()
        for _ in range(10):
            slowest = max(slowest, assert_served(served))
        after = resident(served)
    show("calls without reading", slowest, before, after)
    assert after - before < ROOM
    assert_served(served)
    assert len(warnings(served)) <= 1


def test_calls_without_end_by_one_user_leave_time_for_others(served: Served) -> None:
    def storm() -> Iterator[str]:
        call = json.dumps({"method": f"{varlink.INTERFACE}.List"}).encode() + b"\0"
        connections = [served.connect() for _ in range(PER_USER // PROCESSES)]
        yield "connected"
        while True:
            for connection in connections:
                connection.sendall(call * 10)
            for connection in connections:
                heard = 0
                while heard < 10:
                    heard += connection.recv(1 << 16).count(b"\0")

    before = resident(served)
    slowest = 0.0
    with ExitStack() as opened:
        for child in [opened.enter_context(someone(ATTACKER, storm)) for _ in range(3)]:
            assert child.answer() == "connected"
            child.go_on()
        for _ in range(10):
            slowest = max(slowest, assert_served(served))
        assert served.ok("Snapshot")["seconds"] >= 0
        after = resident(served)
    show("calls with reading", slowest, before, after)
    assert after - before < ROOM
    assert warnings(served) == []


def test_half_messages_and_messages_over_the_limit(served: Served) -> None:
    def halves() -> Iterator[list[str]]:
        """Half messages, just below the limit, until the agent has had enough; then some above it."""
        connections = [served.connect() for _ in range(PER_USER)]
        heard = []
        for connection in connections:
            try:
                connection.sendall(b"x" * (varlink.FRAME_LIMIT - 1))
            except OSError:
                pass  # hung up on meanwhile: the reason is to be read still
        deadline = time.monotonic() + DEADLINE
        most = PER_USER - HELD_PER_USER // varlink.FRAME_LIMIT - 2
        while len(heard) < most and time.monotonic() < deadline:
            for connection in connections.copy():
                if has_news(connection):
                    heard.append(connection.recv(1 << 16).decode())
                    connections.remove(connection)
        yield heard

    def too_long() -> Iterator[list[str]]:
        heard = []
        for _ in range(50):
            with served.connect() as connection:
                connection.sendall(b"x" * (varlink.FRAME_LIMIT + 1))
                heard.append(connection.recv(1 << 16).decode())
        yield heard

    before = resident(served)
    with someone(ATTACKER, halves) as child:
        heard = child.answer()
        assert len(heard) >= PER_USER // 2
        assert all(".Exhausted" in text and "half messages" in text for text in heard)
        slowest = assert_served(served)
        after = resident(served)
        show("half messages", slowest, before, after)
        assert after - before < ROOM
    with someone(ATTACKER, too_long) as child:
        assert all(".InvalidParameter" in text for text in child.answer())
    assert_served(served)
    told = warnings(served)
    assert sorted(re.findall("half messages|a message of more", " ".join(told))) == [
        "a message of more",
        "half messages",
    ]
    assert len(told) == 2
