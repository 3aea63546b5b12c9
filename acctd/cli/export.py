"""`acctd export`: brings what the agent left in the spool to databases, files and scrapers, until told to stop.

A process of its own, so that nothing on the network can hold up the agent, and so that it can be another user: it only
reads the spool, and writes its positions. SIGHUP reads the configuration again, SIGTERM and SIGINT end it.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import click

from acctd import config as configuration
from acctd.cli.service import is_journal, log_to_stderr, notify
from acctd.config import Config
from acctd.errors import AcctdError, ExhaustedError, InUseError, UsageError
from acctd.exporting import Exporter
from acctd.kernel import filelock
from exporters import positions
from exporters.delivery import check_directory

_PATIENCE = 30.0  # s without one point accepted, until --once gives up
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

log = logging.getLogger("acctd")


@click.command("export")
@click.option("--config", "config_path", metavar="FILE", help="Configuration file.")
@click.option(
    "--once", is_flag=True, help="Deliver what is in the spool, then end; or after 30 s in which no sink took anything."
)
def command(config_path: str | None, once: bool) -> int:
    """Deliver what the agent leaves to InfluxDB, Prometheus and log shippers."""
    log_to_stderr()
    # Taken one by one by a thread of their own; all threads that are made later inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        config = _loaded(config_path, os.environ)
        check_directory(config.export.positions_dir)
        with _alone(config):
            return _once(config) if once else _serve(config, config_path)
    except AcctdError as e:
        if not is_journal(sys.stderr.fileno()):
            raise
        log.error("%s", e)  # as the command line would say it, with a priority
        return e.exit_code


@contextmanager
def _alone(config: Config) -> Iterator[None]:
    """One exporter for a set of positions; the lock ends with the process, however that ends."""
    with ExitStack() as stack:
        try:
            stack.enter_context(filelock.held(f"{config.export.positions_dir}/{positions.LOCK}", patience=1.0))
        except ExhaustedError as e:
            raise InUseError(f"another acctd export keeps {config.export.positions_dir}; stop it first") from e
        yield


def _serve(config: Config, config_path: str | None) -> int:
    with Exporter(config.export, socket.gethostname(), os.environ) as exporter:
        exporter.start()
        notify("READY=1")
        log.info("exporting from %s", config.export.spool_dir)
        while signal.sigwait(_SIGNALS) == signal.SIGHUP:
            try:
                if _loaded(config_path, os.environ).export == config.export:
                    continue  # whoever scrapes goes on seeing what has just ended
            except AcctdError as e:
                log.error("configuration not taken: %s", e)
                continue
            log.info("configuration read again")
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            exporter.stop()
            # As this very process, so that no request that hangs in the old one holds up the sinks of the new one.
            os.execv(sys.executable, sys.orig_argv)  # noqa: S606  # it is our own command line
        notify("STOPPING=1")
    return 0


def _once(config: Config) -> int:
    with Exporter(config.export, socket.gethostname(), os.environ) as exporter:
        exporter.start(until_empty=True)
        sent, since = 0, time.monotonic()
        while not exporter.join(0.1) and time.monotonic() - since < _PATIENCE:
            if signal.sigtimedwait(_SIGNALS, 0) is not None:
                return 130
            if (now := exporter.sent()) != sent:
                sent, since = now, time.monotonic()
        if exporter.backlog():
            raise ExhaustedError(f"not all of {config.export.spool_dir} could be delivered; see acctd sinks")
    return 0


def _loaded(path: str | None, environ: Mapping[str, str]) -> Config:
    config = configuration.load(path, environ)
    if not config.export.active:
        raise UsageError(
            f"{config.file or 'the configuration'} has no sink; add [influxdb.NAME], [json.NAME] or [prometheus]"
        )
    return config
