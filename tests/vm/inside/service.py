"""What the tests inside a guest with systemd share: the units installed, and systemd and the journal asked."""

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vm.guest import REPO

UPLINK = "203.0.113.1/24"
PLACE = Path("/sys/fs/cgroup/acctd.slice/acctd-jobs.service")
BASE = PLACE / "jobs"
SOCKET = "/run/acctd/acctd.sock"
CONFIG = Path("/etc/acctd/acctd.toml")
DROP_INS = Path("/run/systemd/system/acctd.service.d")


@functools.cache
def install() -> None:
    """As docs/systemd.md says, and a network that packets can be sent to. Once a boot."""
    for name in ("acctd", "acctd-hook"):
        run("ln", "-sf", str(Path(sys.executable).parent / name), "/usr/local/bin/")
    run(str(REPO / "systemd/install"))
    run("systemd-sysusers")
    run("systemd-tmpfiles", "--create", "acctd.conf")
    run("systemctl", "set-environment", f"PYTHONPATH={REPO}")
    run("systemctl", "daemon-reload")
    run("ip", "link", "add", "wan", "type", "dummy")
    run("ip", "address", "add", UPLINK, "dev", "wan")
    run("ip", "link", "set", "wan", "up")


def served() -> Iterator[None]:
    """The agent runs, for a fixture."""
    install()
    run("systemctl", "enable", "--now", "acctd.service")
    yield
    run("systemctl", "stop", "acctd.socket", "acctd.service")


def run(*argv: str, code: int = 0) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != code:
        log = subprocess.run(
            ["journalctl", "-n", "30", "--no-pager", "-u", "acctd*"], capture_output=True, text=True, check=False
        )
        pytest.fail(f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}--- journal\n{log.stdout}")
    return done.stdout + done.stderr


def shown(unit: str, *properties: str) -> list[str]:
    return [run("systemctl", "show", "--value", "-p", name, unit).strip() for name in properties]


def main_pid() -> int:
    return int(shown("acctd.service", "MainPID")[0])


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def journal() -> list[dict[str, str]]:
    run("journalctl", "--sync")
    text = run("journalctl", "-u", "acctd.service", "-o", "json", "--no-pager")
    return [json.loads(line) for line in text.splitlines()]


def said(text: str, since: int = 0) -> list[dict[str, str]]:
    return [entry for entry in journal()[since:] if text in entry["MESSAGE"]]
