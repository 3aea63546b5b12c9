"""`acctd serve`: the node agent, in the foreground, as a service manager wants it.

Builds agent, daemon and server, runs ticks, and turns signals into acts: SIGHUP reads the configuration again, SIGTERM
and SIGINT end the agent and leave the jobs running. Speaks sd_notify(3): READY, RELOADING, STOPPING, WATCHDOG; takes a
socket as sd_listen_fds(3) passes it.
"""

import asyncio
import faulthandler
import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import click

from acctd import config as configuration
from acctd.agent import Agent
from acctd.cli.service import feed_watchdog, is_journal, log_to_stderr, notify
from acctd.config import Config
from acctd.daemon import Daemon
from acctd.errors import AcctdError, ExhaustedError, InUseError, LedgerError, NotPermittedError, UsageError
from acctd.kernel import filelock, private
from acctd.methods import Methods
from acctd.server import Server

_GC_THRESHOLD = 50_000, 20, 100
_LEDGER_RETRY = 1.0  # s
_LISTEN_FDS_START = 3

log = logging.getLogger("acctd")


@click.command("serve")
@click.option("--config", "config_path", metavar="FILE", help="Configuration file.")
def command(config_path: str | None) -> int:
    """Hold and account for this node's jobs until told to stop."""
    log_to_stderr()
    # A watchdog's SIGABRT, or a crash in a library, leaves in the log where the program stood.
    faulthandler.enable()
    _raise_descriptor_limit()
    try:
        inherited = inherited_socket()
        config = configuration.load(config_path, os.environ)
        with _alone(config), _agent(config) as agent:
            asyncio.run(_Service(agent, config_path, inherited).run())
    except AcctdError as e:
        if not is_journal(sys.stderr.fileno()):
            raise
        log.error("%s", e)  # as the command line would say it, with a priority
        return e.exit_code
    return 0


@contextmanager
def _alone(config: Config) -> Iterator[None]:
    """One agent for a runtime directory; the lock ends with the process, however that ends."""
    if os.geteuid() != 0:
        raise NotPermittedError("acctd serve needs root to hold this node's jobs; run as root or by sudo")
    private.make(config.runtime_dir)
    with ExitStack() as stack:
        try:
            stack.enter_context(filelock.held(f"{config.runtime_dir}/agent.lock", patience=0.0))
        except ExhaustedError as e:
            said = f"another agent holds {config.runtime_dir}; stop it first, or set another runtime_dir"
            raise InUseError(said) from e
        yield


def _agent(config: Config) -> Agent:
    """The agent, as soon as its ledger can be opened: on a full disk that may take a while, and the jobs go on."""
    told = False
    while True:
        try:
            return Agent(config, lasting=True)
        except LedgerError as e:
            if not told:
                log.error("%s; waiting for it, and accounting goes on in the kernel", e)
                told = True
            notify(f"STATUS=waiting: {e}\nEXTEND_TIMEOUT_USEC={int(_LEDGER_RETRY * 5e6)}")
            time.sleep(_LEDGER_RETRY)


class _Service:
    def __init__(self, agent: Agent, config_path: str | None, inherited: socket.socket | None) -> None:
        self._config_path = config_path
        self._inherited = inherited
        self._daemon = Daemon(agent)
        self._server = Server(self._daemon, Methods(self._daemon, reload=self.reload, leave=self.leave))
        self._leaving = False
        self._told = asyncio.Event()  # to leave, or of another interval
        self._ticking: set[asyncio.Task[float]] = set()

    async def run(self) -> None:
        """Serve until told to leave. Jobs are adopted before the first call is answered."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.leave)
        loop.add_signal_handler(signal.SIGHUP, self._reload_or_say)
        self._daemon.start()
        # What is there now stays: a collection that looks at all of it takes 50 ms with a thousand jobs.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLD)
        # Kept: a later configuration may name another, which is not the one that is served.
        path = self._config.socket
        server = await self._server.listen(path, self._inherited)
        shown = self._inherited.getsockname() if self._inherited else str(path)
        if shown != str(path):
            log.warning("the service manager listens on %s, the configuration says socket = %s", shown, path)
        watchdog = loop.create_task(feed_watchdog(os.environ))
        notify("READY=1")
        log.info("serving on %s, %d jobs held", shown, len(self._daemon.jobs))
        try:
            await self._tick_until_told()
        finally:
            notify("STOPPING=1")
            watchdog.cancel()
            server.close()
            if self._inherited is None:
                path.unlink(missing_ok=True)
            self._daemon.stop()

    def leave(self) -> None:
        """End run(); the jobs go on."""
        self._leaving = True
        self._told.set()

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
            self._daemon.reconfigure(new)
            self._told.set()
            log.info("configuration read again")
        except AcctdError as e:
            log.error("configuration not taken: %s", e)
            raise
        finally:
            notify("READY=1")

    @property
    def _config(self) -> Config:
        return self._daemon.agent.config

    def _reload_or_say(self) -> None:
        try:
            self.reload()
        except AcctdError:
            return  # said in the log; a signal has nobody else to tell

    async def _tick_until_told(self) -> None:
        """A tick each interval, by a clock that no slow tick shifts; one that is due while another runs is missed."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while not self._leaving:
            self._told.clear()
            due = max(last + self._config.poll_interval, loop.time())
            try:
                await asyncio.wait_for(self._told.wait(), due - loop.time())
            except TimeoutError:
                # What was due while the loop could not run is missed, too.
                self._daemon.cost.missed_ticks += int((loop.time() - due) / self._config.poll_interval)
                last = max(due, loop.time() - self._config.poll_interval)
                task = loop.create_task(self._daemon.tick())
                self._ticking.add(task)
                task.add_done_callback(self._ticked)
        for task in self._ticking:
            task.cancel()

    def _ticked(self, task: "asyncio.Task[float]") -> None:
        self._ticking.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A defect of ours: say so in full, and go on with the next tick.
            log.error("tick failed", exc_info=error)
            self._daemon.cost.errors += 1


def inherited_socket() -> socket.socket | None:
    """The listening socket that a service manager passed, or None. sd_listen_fds(3): descriptors from 3 on.

    Raises UsageError for more than one, or one that is no listening stream socket with a path.
    """
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count == "0":
        return None
    advice = "acctd.socket needs one ListenStream= with a path, and nothing else"
    if count != "1":
        raise UsageError(f"the service manager passed {count} sockets; {advice}")
    os.set_inheritable(_LISTEN_FDS_START, False)
    passed = socket.socket(fileno=_LISTEN_FDS_START)
    listens = passed.family == socket.AF_UNIX and passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listens or passed.type != socket.SOCK_STREAM:
        raise UsageError(f"the service manager passed a socket that is no listening unix stream socket; {advice}")
    return passed


def _raise_descriptor_limit() -> None:
    """A job keeps some 18 files open, and the soft limit is 1024 by custom, for the sake of select(2), unused here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
