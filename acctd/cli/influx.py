"""`acctd run --influx URL`: the same series as the agent's, from one job, without an agent.

The job has a spool of its own in state_dir, and threads that deliver from it while the job runs. What a database does
not take in time stays there, and a later `acctd run --influx` delivers it beside its own job. Whatever goes wrong here
is said, and costs neither the job nor its record.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec

from acctd import sinks, spool
from acctd.agent import Agent
from acctd.cli.output import say
from acctd.errors import AcctdError, ExhaustedError, NotFoundError, UsageError
from acctd.exporting import Exporter
from acctd.frames import STREAMS
from acctd.job import Job
from acctd.kernel import filelock, private
from acctd.outbox import Outbox
from acctd.sinks import ExportConfig, InfluxSink
from acctd.tables import InfluxTable

_NAME = "run"
_LEFT, _LOCK = "left.json", "lock"
_PATIENCE = 10.0  # s that the end of the job is waited for a database
_IMPATIENT = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
_EVERY = 1.0  # s between two samples, but for the first
_KEYS = {"db": "database", "rp": "retention_policy"}
_TAKES = "write it like http://HOST:8086?db=NAME, or https://HOST:8086?org=ORG&bucket=NAME&token_file=FILE"


def parse_sink(text: str) -> InfluxSink:
    """A sink from a URL: http://HOST:8086?db=NAME (version 1) or ?org=ORG&bucket=NAME (2) or ?bucket=NAME&version=3.

    Other keys are those of [influxdb.NAME]. Raises UsageError, which never shows the URL: there may be a secret in it.
    """
    try:
        text.encode()
        parts = urlsplit(text)
    except ValueError as e:
        raise UsageError(f"--influx is no URL ({e}); {_TAKES}") from None
    if not parts.scheme or not parts.netloc:
        raise UsageError(f"--influx is no URL; {_TAKES}")
    given: dict[str, Any] = {"url": parts._replace(query="").geturl()}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key == "url":
            raise UsageError(f"--influx has a url in its query; {_TAKES}")
        given[_KEYS.get(key, key)] = value
    if "database" in given:
        given.setdefault("version", 1)
    try:
        table = msgspec.convert(given, InfluxTable, strict=False)
    except msgspec.ValidationError as e:
        raise UsageError(f"--influx is not usable ({e}); {_TAKES}") from None
    try:
        sink = sinks.influx(_NAME, table)
    except UsageError as e:
        raise UsageError(str(e).replace(f"influxdb.{_NAME}.", "--influx: ")) from None
    for key in ("token_file", "password_file", "ca_file"):
        # Said before the job runs. A name without a slash is a credential of systemd's.
        path = getattr(sink, key)
        if path is not None and "/" in path and not os.path.exists(path):
            raise NotFoundError(f"--influx: {key} {path} does not exist; name a file that does")
    return sink


class _Left(msgspec.Struct, frozen=True):
    """What a later run must know of one that could not deliver all."""

    job: str
    sink: InfluxSink


class Series:
    """The series of one job on their way."""

    def __init__(self, agent: Agent, place: Path, sink: InfluxSink, environ: Mapping[str, str]) -> None:
        self._agent, self._place = agent, place
        export = _export(agent.config.export, place, sink)
        self._full = _size(place.parent) > export.spool_max
        self._outbox = Outbox(export, lambda error: say(f"acctd: {error}"))
        self._outbox.begin(agent.ledger)
        self._exporter = Exporter(export, socket.gethostname(), environ)
        self._exporter.start()
        self._sampled = 0.0
        self._before, agent.after_reading = agent.after_reading, self._read

        if self._full:
            say(f"acctd: {place.parent} has {export.spool_max} bytes and more that wait; the record is sent alone")

    def _read(self, job: Job) -> None:
        self._before(job)
        if not self._full and job.meter.totals and time.monotonic() - self._sampled >= _EVERY:
            self._sampled = time.monotonic()
            self._outbox.sample({job.spec.id: job}, [job])

    def finish(self, job: str) -> None:
        """Its record is signed: leave that too, and wait a little until all is delivered."""
        try:
            self._outbox.follow_one(self._agent.ledger, job)
        except AcctdError as e:
            say(f"acctd: the record is not sent: {e}")
        self._exporter.end_when_empty()
        deadline = time.monotonic() + _PATIENCE
        while not self._exporter.join(0.05) and time.monotonic() < deadline:
            if signal.sigtimedwait(_IMPATIENT, 0) is not None:
                return  # they are blocked here, see supervise.Signals; the job has ended, and so may we

    def close(self) -> None:
        """Whatever befell the job: what is not delivered stays."""
        self._agent.after_reading = self._before
        self._exporter.stop(0.0)
        self._outbox.close()
        if self._exporter.backlog():
            why = self._exporter.trouble(_NAME) or "the database was too slow"
            say(f"acctd: {why}; {self._place} has what waits, for the next --influx")
        else:
            _remove(self._place)


@contextmanager
def series(agent: Agent, sink: InfluxSink, name: str, environ: Mapping[str, str]) -> Iterator[Series | None]:
    """Around one job; None where its series cannot be kept, which is said. What others left is delivered beside it."""
    outboxes = agent.config.state_dir / "outbox"
    stopping = threading.Event()
    with ExitStack() as stack:
        made: Series | None = None
        try:
            place = _made(outboxes, name, sink, stack)
            made = Series(agent, place, sink, environ)
            stack.callback(made.close)
        except (AcctdError, OSError) as e:
            say(f"acctd: no series are sent: {e}")
        left = [
            place for place in sorted(outboxes.glob("[!.]*")) if not place.is_symlink() and _completed(agent, place)
        ]
        # It ends with us, in whatever request it is: what that was stays where it was.
        thread = threading.Thread(
            target=_deliver_left, args=(agent.config.export, left, environ, stopping), daemon=True
        )
        thread.start()
        stack.callback(stopping.set)
        yield made


def _made(outboxes: Path, name: str, sink: InfluxSink, stack: ExitStack) -> Path:
    """A place for one job's spool, which nobody else sees before it is ours."""
    private.make(outboxes)
    place = outboxes / f"{name}.{time.time_ns()}"
    new = outboxes / f".{place.name}"
    private.make(new)
    (new / _LEFT).write_bytes(msgspec.json.encode(_Left(name, sink)))
    stack.enter_context(filelock.held(str(new / _LOCK), patience=0.0))
    new.rename(place)
    return place


def _completed(agent: Agent, place: Path) -> bool:
    """Whether a run that is gone has left something here, and all of it: the record of one that was killed was signed
    by whoever came after it, and while its job goes on there is none.
    """
    try:
        with filelock.held(str(place / _LOCK), patience=0.0):
            left = msgspec.json.decode((place / _LEFT).read_bytes(), type=_Left)
            if left.job in {row.spec.id for row in agent.ledger.open_jobs()}:
                return False
            outbox = Outbox(_export(agent.config.export, place, left.sink), lambda error: say(f"acctd: {error}"))
            outbox.begin(agent.ledger)
            outbox.follow_one(agent.ledger, left.job)
            outbox.close()
    except ExhaustedError:
        return False  # its run is still at it
    except (AcctdError, OSError, msgspec.MsgspecError, UnicodeDecodeError) as e:
        if place.exists():  # else it was delivered meanwhile
            say(f"acctd: what an earlier --influx left in {place} cannot be delivered: {e}")
        return False
    return True


def _deliver_left(
    export: ExportConfig, places: list[Path], environ: Mapping[str, str], stopping: threading.Event
) -> None:
    """Deliver what earlier runs left, one after the other; to each sink as long as it takes something."""
    dead: set[str] = set()
    for place in places:
        if stopping.is_set():
            return
        try:
            with filelock.held(str(place / _LOCK), patience=0.0):
                sink = msgspec.json.decode((place / _LEFT).read_bytes(), type=_Left).sink
                if sink.identity not in dead and not _delivered(export, place, sink, environ, stopping):
                    dead.add(sink.identity)
        except (AcctdError, OSError) as e:
            if place.exists() and not isinstance(e, ExhaustedError):  # somebody else has it, or has delivered it
                say(f"acctd: what an earlier --influx left in {place} cannot be delivered: {e}")


def _delivered(
    export: ExportConfig, place: Path, sink: InfluxSink, environ: Mapping[str, str], stopping: threading.Event
) -> bool:
    exporter = Exporter(_export(export, place, sink), socket.gethostname(), environ)
    exporter.start(until_empty=True)
    while not exporter.join(0.1) and not stopping.is_set() and exporter.trouble(_NAME) is None:
        continue
    exporter.stop(0.0)
    if exporter.backlog():
        return False
    _remove(place)
    return True


def _remove(place: Path) -> None:
    """Out of sight first: whoever looks for what is left must not find half of it."""
    hidden = place.with_name(f".{place.name}")
    try:
        place.rename(hidden)
    except OSError as e:
        say(f"acctd: {place} is delivered and cannot be removed ({e.strerror})")
    rmtree(hidden, ignore_errors=True)


def _size(outboxes: Path) -> int:
    """What all runs have left together."""
    return sum(spool.size(place / "spool" / stream) for place in outboxes.glob("[!.]*") for stream in STREAMS)


def _export(export: ExportConfig, place: Path, sink: InfluxSink) -> ExportConfig:
    return ExportConfig(
        cluster=export.cluster,
        scheduler=export.scheduler,
        spool_dir=place / "spool",
        spool_max=export.spool_max,
        positions_dir=place / "positions",
        influxdb=(sink,),
    )
