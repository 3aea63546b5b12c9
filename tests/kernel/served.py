"""A node of the lab's with a living agent, as the tests talk to it."""

import json
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acctd import varlink
from tests.kernel.conftest import Node


@dataclass
class Served:
    """A node with a living agent."""

    node: Node
    process: subprocess.Popen[str]

    @property
    def path(self) -> Path:
        return self.node.directory / "run" / "s"

    def connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(20)
        made.connect(str(self.path))
        return made

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call on a connection of its own; the whole reply."""
        with self.connect() as connection:
            return talk(connection, method, **parameters)

    def ok(self, method: str, **parameters: Any) -> dict[str, Any]:
        reply = self.call(method, **parameters)
        assert "error" not in reply, reply
        found: dict[str, Any] = reply["parameters"]
        return found

    def start(self) -> None:
        environ = {key: value for key, value in self.node.environ.items() if key != "NOTIFY_SOCKET"}
        self.process = self.node.topology.popen(
            self.node.topology.node, self.node.argv("serve"), env=environ, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        while "serving on" not in (line := self.process.stderr.readline()):
            assert line, "the agent ended"

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def talk(connection: socket.socket, method: str, **parameters: Any) -> dict[str, Any]:
    full = method if "." in method else f"{varlink.INTERFACE}.{method}"
    connection.sendall(json.dumps({"method": full, "parameters": parameters}).encode() + b"\0")
    data = b""
    while not data.endswith(b"\0"):
        received = connection.recv(1 << 16)
        assert received, f"closed after {data!r}"
        data += received
    reply: dict[str, Any] = json.loads(data[:-1])
    return reply
