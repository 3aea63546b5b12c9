"""`acctd run --influx URL`: the same series as the agent's, from one job, without an agent.

The job has a spool of its own in state_dir, and a thread that delivers from it while the job runs. What a database does
not take in time stays there, and the next `acctd run --influx` or a later one delivers it.
"""

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec

from acctd import sinks
from acctd.agent import Agent
from acctd.cli.output import say
from acctd.errors import AcctdError, ExhaustedError, UsageError
from acctd.exporting import Exporter
from acctd.job import Job
from acctd.kernel import filelock, private
from acctd.outbox import Outbox
from acctd.sinks import ExportConfig, InfluxSink
from acctd.tables import InfluxTable

_NAME = "run"
_SINK = "sink.json"
_PATIENCE = 10.0  # s that the end of the job is waited for a database
_EVERY = 1.0  # s between two samples, but for the first
_KEYS = {"db": "database", "rp": "retention_policy"}


def parse_sink(text: str) -> InfluxSink:
    """A sink from a URL: http://HOST:8086?db=NAME (version 1) or ?org=ORG&bucket=NAME (2) or ?bucket=NAME&version=3.

    Other keys are those of [influxdb.NAME]. Raises UsageError.
    """
    takes = "write it like http://HOST:8086?db=NAME, or https://HOST:8086?org=ORG&bucket=NAME&token_file=FILE"
    try:
        parts = urlsplit(text)
    except ValueError as e:
        raise UsageError(f"--influx is no URL ({e}); {takes}") from None
    given: dict[str, Any] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        given[_KEYS.get(key, key)] = value
    if "database" in given:
        given.setdefault("version", 1)
    try:
        table = msgspec.convert({**given, "url": parts._replace(query="").geturl()}, InfluxTable, strict=False)
    except msgspec.ValidationError as e:
        raise UsageError(f"--influx is not usable ({e}); {takes}") from None  # the URL may have a secret in it
    try:
        return sinks.influx(_NAME, table)
    except UsageError as e:
        raise UsageError(str(e).replace(f"influxdb.{_NAME}.", "--influx: ")) from None


class Series:
    """The series of one job on their way."""

    def __init__(self, agent: Agent, place: Path, export: ExportConfig, environ: Mapping[str, str]) -> None:
        self._agent = agent
        self._outbox = Outbox(export, lambda error: say(f"acctd: {error}"))
        self._outbox.begin(agent.ledger)
        self._place = place
        self._exporter = Exporter(export, socket.gethostname(), environ)
        self._exporter.start()
        self._sampled = 0.0
        self._before, agent.after_reading = agent.after_reading, self._read

    def _read(self, job: Job) -> None:
        self._before(job)
        if job.meter.totals and time.monotonic() - self._sampled >= _EVERY:
            self._sampled = time.monotonic()
            self._outbox.sample({job.spec.id: job}, [job])

    def finish(self, job: str) -> None:
        """Its record is signed: leave that too, and wait a little until all is delivered."""
        self._outbox.follow_one(self._agent.ledger, job)
        self._exporter.end_when_empty()
        self._exporter.join(_PATIENCE)

    def close(self) -> None:
        """Whatever befell the job: what is not delivered stays."""
        self._agent.after_reading = self._before
        self._exporter.stop()
        self._outbox.close()
        said = self._exporter.trouble(_NAME)
        if self._exporter.backlog():
            say(f"acctd: {said or 'the database was too slow'}; {self._place} has what waits, for the next --influx")
        else:
            rmtree(self._place)


@contextmanager
def series(agent: Agent, sink: InfluxSink, name: str, environ: Mapping[str, str]) -> Iterator[Series]:
    """Around one job. What earlier ones left is delivered beside it."""
    config = agent.config
    outboxes = config.state_dir / "outbox"
    private.make(outboxes)
    place = outboxes / f"{name}.{time.time_ns()}"
    private.make(place)
    (place / _SINK).write_bytes(msgspec.json.encode(sink))
    with ExitStack() as stack:
        stack.enter_context(filelock.held(str(place / "lock"), patience=1.0))
        made = Series(agent, place, _export(config.export, place, sink), environ)
        stack.callback(made.close)
        for left in sorted(outboxes.iterdir()):
            if left != place:
                stack.enter_context(_delivering(config.export, left, environ))
        yield made


@contextmanager
def _delivering(export: ExportConfig, place: Path, environ: Mapping[str, str]) -> Iterator[None]:
    """Deliver what another run left, unless that is still at it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(filelock.held(str(place / "lock"), patience=0.0))
            sink = msgspec.json.decode((place / _SINK).read_bytes(), type=InfluxSink)
            exporter = Exporter(_export(export, place, sink), socket.gethostname(), environ)
        except ExhaustedError:
            yield
            return
        except (AcctdError, OSError, msgspec.MsgspecError) as e:
            say(f"acctd: what an earlier --influx left in {place} cannot be delivered: {e}")
            yield
            return
        exporter.start(until_empty=True)
        try:
            yield
        finally:
            exporter.stop()
            if not exporter.backlog():
                rmtree(place)


def _export(export: ExportConfig, place: Path, sink: InfluxSink) -> ExportConfig:
    return ExportConfig(
        cluster=export.cluster,
        scheduler=export.scheduler,
        spool_dir=place / "spool",
        spool_max=export.spool_max,
        positions_dir=place / "positions",
        influxdb=(sink,),
    )
