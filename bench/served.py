"""A node with a living agent for a benchmark: `acctd serve` on a lab's node, standing jobs, and all gone at the end.

Beside bench/world.py, which holds an agent in its own process, this one is reached as everybody reaches it: over its
socket. State directory, runtime directory and cgroup base are its own. Knows nothing of what is measured.
"""

import contextlib
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import discover
from acctd.kernel import netns
from acctd.ledger import FILE, Ledger
from lab.topology import Topology

REPO = Path(__file__).parents[1]
_INTERFACE = "org.acctd.Node"
_CALLERS = 8  # standing jobs are made by so many at a time; the agent does one after the other anyhow
_serial = itertools.count()


class RefusedError(RuntimeError):
    """The agent answered with an error."""


class Connection:
    """One connection to the agent; a context manager. Calls are answered in order."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(120)
        try:
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer's parameters. Raises RefusedError."""
        request = {"method": f"{_INTERFACE}.{method}", "parameters": parameters}
        self._socket.sendall(json.dumps(request).encode() + b"\0")
        data = bytearray()
        while not data.endswith(b"\0"):
            received = self._socket.recv(1 << 18)
            if not received:
                raise ConnectionError(f"the agent hung up on {method}")
            data += received
        reply: dict[str, Any] = json.loads(data[:-1])
        if "error" in reply:
            raise RefusedError(f"{method}: {reply['error']}: {reply['parameters']}")
        answer: dict[str, Any] = reply["parameters"]
        return answer


@dataclass(frozen=True, slots=True)
class Weight:
    """What a process has cost so far, and what it holds."""

    cpu: float  # s, with the children it has waited for
    resident: int  # KiB
    peak: int  # KiB
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> "Weight":
        """proc_pid_stat(5) utime, stime, cutime, cstime; proc_pid_status(5) VmRSS, VmHWM."""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return cls(
            sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"),
            int(status["VmRSS"].split()[0]),
            int(status["VmHWM"].split()[0]),
            len(os.listdir(f"/proc/{pid}/fd")),
        )


class Served:
    """A node and its agent. Use as a context manager; leaves by exception, SIGINT or SIGTERM clean up too."""

    def __init__(self, backend: str = "auto", interval: float = 10.0, program: Sequence[str] = ("-m", "acctd")) -> None:
        """`program` is what Python is told to run as the agent."""
        self.base = f"acctdbench-{os.getpid()}-{next(_serial)}"
        self._settings = backend, interval
        self._program = program
        self._open = contextlib.ExitStack()
        self._sleepers: dict[str, subprocess.Popen[bytes]] = {}
        self.prefix = f"bench{os.getpid()}n"  # of the standing jobs' ids: two benchmarks at a time can be told apart
        self.jobs: list[str] = []

    def __enter__(self) -> Self:
        _many_descriptors()
        with contextlib.ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="acctdbench-")))
            self.topology = stack.enter_context(Topology())
            stack.callback(self._clear)
            self._configure()
            self._start()
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(e, RefusedError | ConnectionError):
            e.add_note(f"The agent's log ends so:\n{self.log()[-4000:]}")
        self._open.__exit__(kind, e, at)

    @property
    def socket(self) -> Path:
        return self.directory / "run" / "s"

    @property
    def pid(self) -> int:
        """The agent's: nsenter(1) becomes it."""
        return self._agent.pid

    def connect(self) -> Connection:
        return Connection(self.socket)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call on a connection of its own."""
        with self.connect() as connection:
            return connection.call(method, **parameters)

    def popen(self, argv: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """A process on the node, of a session of its own: ^C is for the benchmark, which ends it in order."""
        return self.topology.popen(self.topology.node, argv, start_new_session=True, **options)

    def stand(self, number: int, network: str = "nat") -> None:
        """Have so many jobs with a sleeping process in each, in its job's network; `jobs` are their ids."""
        names = [f"{self.prefix}{n}" for n in range(number)]
        with ThreadPoolExecutor(_CALLERS) as callers:
            list(callers.map(self._stand_some, [names[n::_CALLERS] for n in range(_CALLERS)], [network] * _CALLERS))
        self.jobs = names

    def ledger(self) -> Ledger:
        """The agent's ledger, opened beside it; a context manager."""
        return Ledger(self.directory / "state" / FILE)

    def configure(self, more: str) -> None:
        """Add some TOML to the configuration that it began with, in place of what was added before; it is in force."""
        self._configure(more)
        self.call("Reload")

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.directory / "acctd.toml"

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def _stand_some(self, names: list[str], network: str) -> None:
        with self.connect() as connection:
            for name in names:
                made = connection.call("Create", job=name, network=network, limits={"pids": 256})
                inside = ["nsenter", f"--net={made['netns']}"] if made["netns"] else []
                # It becomes sleep(1) inside the job, so that the job has used something. Not for ever: if this
                # benchmark is killed, nobody else ends them.
                argv = [*inside, "sh", "-c", "read -r _ && exec sleep 7200"]
                sleeper = subprocess.Popen(argv, start_new_session=True, stdin=subprocess.PIPE)
                self._sleepers[name] = sleeper
                connection.call("Attach", job=name, pid=sleeper.pid)
                assert sleeper.stdin is not None
                with sleeper.stdin as told:
                    told.write(b"\n")

    def _configure(self, more: str = "") -> None:
        backend, interval = self._settings
        self.config.write_text(
            f'state_dir = "{self.directory}/state"\nruntime_dir = "{self.directory}/run"\nsocket = "{self.socket}"\n'
            f'poll_interval = {interval}\n[cgroup]\nbase = "{self.base}"\n[network]\nbackend = "{backend}"\n{more}'
        )

    def _start(self) -> None:
        unwanted = ("NOTIFY_SOCKET", "JOURNAL_STREAM", "WATCHDOG_USEC")
        environ = {key: value for key, value in os.environ.items() if key not in unwanted}
        environ |= {"ACCTD_CONFIG": str(self.config), "PYTHONPATH": str(REPO)}
        with open(self.directory / "log", "wb") as log:
            # As installed: PYTHONDEVMODE and the like of whoever benchmarks are not the agent's cost.
            self._agent = self.popen([sys.executable, *self._program, "serve"], env=environ, stderr=log)
        deadline = time.monotonic() + 60
        while not self._answers():
            if self._agent.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the agent does not serve: {self.log().strip()}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            self.connect().__exit__()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def _clear(self) -> None:
        """Take all jobs away at once, not one by one: rules and links go with the node's namespace."""
        if hasattr(self, "_agent") and self._agent.poll() is None:
            self._agent.send_signal(signal.SIGTERM)
            try:
                self._agent.wait(60)
            except subprocess.TimeoutExpired:
                self._agent.kill()
                self._agent.wait()
        for sleeper in self._sleepers.values():
            sleeper.kill()
        for sleeper in self._sleepers.values():
            sleeper.wait()
        left = []
        layout = discover()
        for name in self._rows():
            netns.remove(self.directory / "run" / "netns" / name)
            cgroups = JobCgroups(layout, self.base, f"job_{name}")
            if survivors := cgroups.kill():
                left.append(f"{name}: processes {sorted(survivors)}")
            elif not cgroups.remove():
                left.append(f"{name}: cgroups")
        if left:
            raise RuntimeError(f"left behind below {self.base}: {'; '.join(left)}")

    def _rows(self) -> list[str]:
        if not (self.directory / "state" / FILE).exists():
            return []
        with self.ledger() as ledger:
            return [row.spec.id for row in ledger.open_jobs()]


@contextlib.contextmanager
def standing(number: int, *, network: str = "nat", backend: str = "auto", interval: float = 10.0) -> Iterator[Served]:
    """A node whose agent holds so many jobs."""
    with Served(backend, interval) as served:
        served.stand(number, network)
        yield served


def _many_descriptors() -> None:
    """A thousand jobs keep some twenty counter files open each; the agent inherits our limit, that of acctd.service if
    this machine lets us.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(hard, 524_288)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except ValueError:  # without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
