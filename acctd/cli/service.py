"""What a service owes its manager: news of how it stands, and log lines with a priority. sd_notify(3), sd-daemon(3)."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Mapping

_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}

log = logging.getLogger("acctd")


async def feed_watchdog(environ: Mapping[str, str]) -> None:
    """Say twice in the watchdog's time that the loop runs; one that hangs says nothing. sd_watchdog_enabled(3)."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    wanted = int(environ.get("WATCHDOG_USEC", "0")) / 1e6
    while wanted > 0:
        notify("WATCHDOG=1")
        await asyncio.sleep(wanted / 2)


def notify(state: str) -> None:
    """sd_notify(3); nothing where no service manager listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.connect("\0" + address[1:] if address.startswith("@") else address)
            manager.send(state.encode())
    except OSError as e:
        log.warning("the service manager at %s does not take news (%s); going on", address, e.strerror)


class _Priority(logging.Formatter):
    """The prefix <n>, which the journal turns into a priority, on every line: each is an entry. sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 5)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(_Priority("%(message)s") if is_journal(sys.stderr.fileno()) else plain)
    log.addHandler(handler)
    log.propagate = False  # libraries give the root logger handlers of their own
    log.setLevel(logging.INFO)


def is_journal(fd: int) -> bool:
    """Whether a descriptor leads to the journal: $JOURNAL_STREAM is "device:inode". systemd.exec(5)."""
    found = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
