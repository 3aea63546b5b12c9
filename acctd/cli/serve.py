"""`acctd serve`: the node agent, in the foreground, as a service manager wants it.

Builds agent, daemon and server, runs ticks, and turns signals into acts: SIGHUP reads the configuration again, SIGTERM
and SIGINT end the agent and leave the jobs running. Speaks sd_notify(3): READY, RELOADING, STOPPING, WATCHDOG.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time

import click

from acctd import config as configuration
from acctd.agent import Agent
from acctd.config import Config
from acctd.daemon import Daemon
from acctd.errors import AcctdError
from acctd.methods import Methods
from acctd.server import Server

log = logging.getLogger("acctd")


@click.command("serve")
@click.option("--config", "config_path", metavar="FILE", help="Configuration file.")
def command(config_path: str | None) -> int:
    """Hold and account for this node's jobs until told to stop."""
    _log_to_stderr()
    config = configuration.load(config_path, os.environ)
    with Agent(config) as agent:
        asyncio.run(_Service(agent, config_path).run())
    return 0


class _Service:
    def __init__(self, agent: Agent, config_path: str | None) -> None:
        self._config_path = config_path
        self._daemon = Daemon(agent)
        self._server = Server(self._daemon, Methods(self._daemon, reload=self.reload, leave=self.leave))
        self._leaving = asyncio.Event()
        self._ticking: set[asyncio.Task[float]] = set()

    async def run(self) -> None:
        """Serve until told to leave. Jobs are adopted before the first call is answered."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.leave)
        loop.add_signal_handler(signal.SIGHUP, self._reload_or_say)
        self._daemon.start()
        server = await self._server.listen(self._config.socket)
        notify("READY=1")
        log.info("serving on %s, %d jobs held", self._config.socket, len(self._daemon.jobs))
        try:
            await self._tick_until_told()
        finally:
            notify("STOPPING=1")
            server.close()
            self._config.socket.unlink(missing_ok=True)
            self._daemon.stop()

    def leave(self) -> None:
        """End run(); the jobs go on."""
        self._leaving.set()

    def reload(self) -> None:
        """Take the configuration file as it is now. Raises ConfigError and changes nothing if it is wrong.

        What jobs were made with stays theirs; the socket and the state directory stay until a restart.
        """
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            new = configuration.load(self._config_path, os.environ)
            fixed = [
                name
                for name in ("state_dir", "runtime_dir", "socket")
                if getattr(new, name) != getattr(self._config, name)
            ]
            if fixed:
                log.warning("%s changed in the configuration: taken up at the next restart", ", ".join(fixed))
            self._daemon.agent.reconfigure(new)
            log.info("configuration read again")
        finally:
            notify("READY=1")

    @property
    def _config(self) -> Config:
        return self._daemon.agent.config

    def _reload_or_say(self) -> None:
        try:
            self.reload()
        except AcctdError as e:
            log.error("configuration not taken: %s", e)

    async def _tick_until_told(self) -> None:
        """A tick each interval, by a clock that no slow tick shifts; one that is due while another runs is missed."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._leaving.is_set():
            due = max(due + self._config.poll_interval, loop.time())
            try:
                await asyncio.wait_for(self._leaving.wait(), due - loop.time())
            except TimeoutError:
                task = loop.create_task(self._daemon.tick())
                self._ticking.add(task)
                task.add_done_callback(self._ticked)
                notify("WATCHDOG=1")
        for task in self._ticking:
            task.cancel()

    def _ticked(self, task: "asyncio.Task[float]") -> None:
        self._ticking.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A defect of ours: say so in full, and go on with the next tick.
            log.error("tick failed", exc_info=error)
            self._daemon.cost.errors += 1


def notify(state: str) -> None:
    """sd_notify(3); nothing where no service manager listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.connect("\0" + address[1:] if address.startswith("@") else address)
            manager.send(state.encode())


class _Priority(logging.Formatter):
    """The kernel's <n> prefix, which the journal turns into a priority. sd-daemon(3)."""

    _LEVELS = {logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}  # noqa: RUF012

    def format(self, record: logging.LogRecord) -> str:
        return f"<{self._LEVELS.get(record.levelno, 5)}>{super().format(record)}"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(_Priority("%(message)s") if "JOURNAL_STREAM" in os.environ else plain)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
