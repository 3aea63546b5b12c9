"""What `acctd serve` and systemd agree on: the socket passed, the watchdog fed, the journal's prefixes; and the units.

That the units work is shown by a real systemd, in tests/vm/inside/inside_systemd.py.
"""

import asyncio
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from acctd import config as configuration
from acctd.cli import service

REPO = Path(__file__).parents[2]
UNITS = REPO / "systemd"
SERVICE = UNITS / "acctd.service"

# systemd.exec(5) and systemd.resource-control(5) of 252: what narrows a service down.
HARDENING = re.findall(
    r"\w+",
    """
ProtectSystem ProtectHome ProtectHostname ProtectClock ProtectKernelTunables ProtectKernelModules ProtectKernelLogs
ProtectControlGroups ProtectProc ReadWritePaths PrivateTmp PrivateDevices PrivateNetwork PrivateIPC PrivateUsers
PrivateMounts RestrictAddressFamilies RestrictNamespaces RestrictRealtime RestrictSUIDSGID LockPersonality
MemoryDenyWriteExecute NoNewPrivileges CapabilityBoundingSet SystemCallFilter SystemCallArchitectures DevicePolicy
IPAddressDeny User DynamicUser UMask
""",
)


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
        made.listen()
        yield made


def start_with(passed: socket.socket, count: str, pid: str = "os.getpid()") -> str:
    """What a process makes of a socket that it finds as descriptor 3, as sd_listen_fds(3) has it."""
    code = (
        f"import os; os.environ.update(LISTEN_FDS={count!r}, LISTEN_PID=str({pid}), LISTEN_FDNAMES='x')\n"
        "from acctd.cli import serve\n"
        "from acctd.errors import AcctdError\n"
        "try:\n"
        "    found = serve.inherited_socket()\n"
        "    print(found.getsockname() if found else None, os.get_inheritable(3))\n"
        "except AcctdError as e:\n"
        "    print(e)\n"
        "print([name for name in os.environ if name.startswith('LISTEN')])\n"
    )
    reading, writing = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, passed.fileno(), 3), (os.POSIX_SPAWN_DUP2, writing, 1)]
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", code], environ, file_actions=actions)
    os.close(writing)
    with open(reading) as output:
        said, _, left = output.read().rstrip("\n").rpartition("\n")
    assert os.waitpid(child, 0)[1] == 0
    assert left == "[]"  # no process of ours takes it for its own
    return said


def test_a_passed_socket_is_taken(listening: socket.socket) -> None:
    assert start_with(listening, "1") == f"{listening.getsockname()} False"


def test_a_socket_for_another_process_is_left(listening: socket.socket) -> None:
    assert start_with(listening, "1", "1").startswith("None")


def test_more_than_one_socket_is_refused(listening: socket.socket) -> None:
    assert start_with(listening, "2").startswith("the service manager passed 2 sockets; acctd.socket needs")


def test_a_socket_that_does_not_listen_is_refused() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        assert "no listening unix stream socket" in start_with(datagrams, "1")
    with socket.create_server(("127.0.0.1", 0)) as inet:
        assert "no listening unix stream socket" in start_with(inet, "1")


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The end of sd_notify(3) that listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "notify"))
        made.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield made


def test_the_watchdog_is_fed_by_the_loop_and_not_by_ticks(manager: socket.socket) -> None:
    async def three() -> list[bytes]:
        loop = asyncio.get_running_loop()
        feeding = loop.create_task(service.feed_watchdog({"WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())}))
        heard = [await asyncio.wait_for(loop.sock_recv(manager, 100), 60) for _ in range(3)]
        feeding.cancel()
        return heard

    assert asyncio.run(three()) == [b"WATCHDOG=1"] * 3


@pytest.mark.parametrize("environ", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}])
def test_without_a_watchdog_nothing_is_said(manager: socket.socket, environ: dict[str, str]) -> None:
    asyncio.run(service.feed_watchdog(environ))
    with pytest.raises(BlockingIOError):
        manager.recv(100)


def test_a_manager_that_is_gone_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    service.notify("READY=1")
    assert "does not take news (No such file or directory)" in caplog.text


def test_every_line_has_its_priority() -> None:
    """A traceback is many entries in the journal."""
    record = logging.LogRecord("acctd", logging.ERROR, "", 0, "tick failed\nfor a reason", None, None)
    assert service._Priority("%(message)s").format(record) == "<3>tick failed\n<3>for a reason"


def test_the_journal_is_known_by_its_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "log", "w") as log:
        found = os.fstat(log.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert service.is_journal(log.fileno())
        # Inherited by a shell in a unit, whose output goes elsewhere.
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + 1}")
        assert not service.is_journal(log.fileno())


def test_paths_are_the_same_everywhere() -> None:
    default, mistakes = configuration.parse("", None)
    shipped, more = configuration.parse((UNITS / "acctd.toml").read_text(), None)
    assert (mistakes, more) == ([], [])
    assert default is not None
    assert shipped is not None
    assert settings(UNITS / "acctd.socket")["ListenStream"] == [str(default.socket)]
    assert settings(SERVICE)["ExecReload"] == [f"acctd reload --socket {default.socket}"]
    place = settings(UNITS / "acctd-jobs.service")["Slice"][0] + "/acctd-jobs.service"
    assert shipped.cgroup.base == f"{place}/jobs"
    made = re.findall(r"^d (\S+)", (UNITS / "acctd.tmpfiles").read_text(), re.MULTILINE)
    state, runtime = default.state_dir, default.runtime_dir
    assert made == [str(runtime), f"{runtime}/unaccounted", str(state), str(default.export.spool_dir)]
    exporter = settings(UNITS / "acctd-export.service")
    assert [f"/var/lib/{exporter['StateDirectory'][0]}"] == [str(default.export.positions_dir)]
    assert exporter["User"] == [shipped.export.group]
    assert f"u {shipped.export.group} " in (UNITS / "acctd.sysusers").read_text()


@pytest.mark.parametrize("name", HARDENING)
def test_hardening_is_either_there_or_explained(name: str) -> None:
    comments = "".join(line for line in SERVICE.read_text().splitlines() if line.startswith("#"))
    page = (REPO / "docs" / "systemd.md").read_text()
    assert (name in settings(SERVICE)) is not (f"{name}=" in comments.partition("Left out, and why:")[2])
    assert f"`{name}=" in page, "docs/systemd.md says what it protects, or what it would break"


def test_every_capability_has_its_reason() -> None:
    for name in settings(SERVICE)["CapabilityBoundingSet"][0].split():
        assert re.search(rf"^#   {name.removeprefix('CAP_')}  ", SERVICE.read_text(), re.MULTILINE), name


def test_the_jobs_place_has_no_limit_of_its_own() -> None:
    place = settings(UNITS / "acctd-jobs.service")
    assert place["TasksMax"] == ["infinity"]
    assert place["OOMPolicy"] == ["continue"]
    assert place["KillMode"] == ["process"]
