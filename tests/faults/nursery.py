"""A process on the lab's node that forks agents and jobs' processes: each is there in milliseconds.

An agent begins as one does that was just executed: nothing has run in the nursery but imports. All children die with
it, and it ends with the test run.
"""

import ctypes
import gc
import importlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from acctd.cli.main import main as acctd
from acctd.kernel import libc
from acctd.network import iptc_loader
from lab import traffic
from lab.topology import Topology
from tests.faults.dying import Death, arm
from tests.kernel.conftest import REPO

_PR_SET_PDEATHSIG = 1
_FRAME = 1 << 16
PATIENCE = 60.0  # s; nothing here takes a tenth of it


class Nursery:
    """The tests' end of it."""

    def __init__(self, topology: Topology) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(PATIENCE)
        with theirs:
            argv = [sys.executable, "-m", __name__, str(theirs.fileno())]
            environ = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
            self._process = topology.popen(
                topology.node, argv, pass_fds=[theirs.fileno()], env={**environ, "PYTHONPATH": str(REPO)}
            )

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def agent(self, config: Path, log: int, death: Death | None, trigger: Path) -> int:
        """Start `acctd serve` with its messages going to `log`; its pid."""
        return self._ask([log], do="agent", config=str(config), death=death, trigger=str(trigger))

    def worker(self, namespace: Path | None) -> "Worker":
        """Start a process that does what it is told, in a network namespace."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mine.settimeout(PATIENCE)
        with theirs:
            place = str(namespace) if namespace is not None else None
            return Worker(self, self._ask([theirs.fileno()], do="worker", namespace=place), mine)

    def wait(self, pid: int) -> int:
        """The end of a child: its exit status, or -n after signal n."""
        return self._ask([], do="wait", pid=pid)

    def _ask(self, descriptors: list[int], **request: Any) -> int:
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        return int(self._socket.recv(_FRAME))


class Worker:
    """A process of a job's."""

    def __init__(self, nursery: Nursery, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self._nursery, self._socket = nursery, connection

    def do(self, act: str, *arguments: Any) -> Any:
        """One of the acts below; gives its answer once it is done."""
        self._socket.send(json.dumps([act, *arguments]).encode())
        received = self._socket.recv(_FRAME)
        assert received, "the worker has ended"
        answer = json.loads(received)
        assert not isinstance(answer, str), answer
        return answer

    def end(self) -> None:
        """Kill it, if it lives; twice is fine."""
        if self._socket.fileno() >= 0:
            os.kill(self.pid, signal.SIGKILL)  # at most a zombie by now: nobody but us waits for it
            self._nursery.wait(self.pid)
            self._socket.close()


def _give(host: str, size: int) -> None:
    traffic.give(host, traffic.PORT, size, udp=True)


def _take(host: str, size: int) -> None:
    traffic.take(host, traffic.PORT, size, udp=True)


def _spin(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def _read(path: str, size: int) -> None:
    """Read from the disk itself."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, size) as buffer:
            if (got := os.readv(fd, [buffer])) != size:
                raise OSError(f"{path} gave {got} of {size} bytes")
    finally:
        os.close(fd)


def _used() -> int:
    """CPU time so far, in ns."""
    return time.process_time_ns()


_ACTS: dict[str, Any] = {"give": _give, "take": _take, "spin": _spin, "read": _read, "used": _used}


def _work(namespace: str | None, connection: socket.socket) -> None:
    if namespace is not None:
        with open(namespace, "rb") as there:
            libc.setns(there.fileno(), libc.CLONE_NEWNET)
    while received := connection.recv(_FRAME):
        act, *arguments = json.loads(received)
        try:
            answer = _ACTS[act](*arguments)
        except OSError as e:
            answer = f"{act}: {e}"
        connection.send(json.dumps(answer).encode())


def _serve(config: str, death: list[Any] | None, trigger: str, log: int) -> None:
    os.dup2(log, 2)
    os.close(log)
    if death is not None:
        arm(Death(*death), Path(trigger))
    acctd(["serve", "--config", config])


def _nurse(connection: socket.socket) -> None:
    children: set[int] = set()
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, _FRAME, 1)
        if not data:
            break
        request = json.loads(data)
        if request["do"] == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])
            children.discard(request["pid"])
        else:
            answer = os.fork()
            if answer == 0:
                _be_born(request, connection, descriptors[0])
            children.add(answer)
            os.close(descriptors[0])
        connection.send(str(answer).encode())
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _be_born(request: dict[str, Any], connection: socket.socket, descriptor: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    connection.close()
    code = 1
    try:
        if request["do"] == "worker":
            _work(request["namespace"], socket.socket(fileno=descriptor))
        else:
            _serve(request["config"], request["death"], request["trigger"], descriptor)
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


if __name__ == "__main__":
    for module in ("acctd.cli.serve", "acctd.network.nftables", "acctd.network.iptables", "encodings.idna"):
        importlib.import_module(module)
    iptc_loader.load()
    gc.freeze()  # a child's collections need not look at all this
    _nurse(socket.socket(fileno=int(sys.argv[1])))
