"""The agent's side of export: what exporters are to get is left in the spool, as frames. Sends nothing anywhere.

Samples are written at each tick. Events and records are taken from the ledger, from the last one that the spool has: so
none is lost or doubled by whoever died in between, and those of `acctd run` are among them. What all sinks have read
is removed, what waits is compressed, and above the bound the oldest samples go.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec

from acctd import __version__, family, spool
from acctd.errors import AcctdError, LedgerError
from acctd.frames import (
    EVENTS,
    RECORDS,
    SAMPLES,
    AgentSample,
    EventFrame,
    Mark,
    RecordFrame,
    Sample,
    decode,
    encode,
    limits_of,
    tag,
)
from acctd.job import Job
from acctd.ledger import Ledger
from acctd.meter import State
from acctd.rows import Event
from acctd.sinks import ExportConfig
from acctd.spoolroom import SpoolRoom

_REMEMBERED = 10_000  # jobs
_AT_ONCE = 200  # rows of the ledger that are copied before the loop may do something else

log = logging.getLogger("acctd")


class Outbox:
    """One agent's. Of trouble `trouble` hears; no job or tick is ever held up by it."""

    def __init__(self, config: ExportConfig, trouble: Callable[[AcctdError | OSError], None]) -> None:
        self.config = config
        self._trouble = trouble
        self._room = SpoolRoom(config)
        self._time = 0  # of the newest sample
        self._nested: set[int] = set()  # jobs with families inside, as of this tick
        self._owners: dict[int, str] = {}
        self._whose: dict[str, _Who] = {}
        self._known: dict[str, tuple[int, str | float]] = {}  # of records and events, the last that the spool has
        self._tidying = self._closed = False
        self.lost = 0
        """Samples that the disk did not take, since the agent's start."""
        self._wants_samples = bool(config.influxdb or config.prometheus) or any(
            SAMPLES in sink.streams for sink in config.json
        )

    def begin(self, ledger: Ledger) -> None:
        """Mark where export begins, if it has not begun long ago. Raises LedgerError."""
        for stream in (RECORDS, EVENTS):
            self._find(stream, ledger)

    def begin_tick(self, jobs: Iterable[Job]) -> None:
        """All jobs are about to be read."""
        self._nested.clear()
        for job in jobs:
            if job.row.parent is not None:
                self._nested.add(job.row.parent)
            known = self._whose.get(job.spec.id)
            if known is None or (known.uid, known.parent) != (job.spec.owner.uid, job.spec.parent):
                self._remember(_of(job))

    def sample(self, jobs: Mapping[str, Job], read: Iterable[Job]) -> None:
        """Leave the samples of jobs that have been read."""
        if not self._wants_samples:
            return
        lines = []
        for job in read:
            if job.row.phase == "running":
                try:
                    lines.append(encode(self._sample(jobs, job)))
                except Exception as e:  # one bad job must not cost the others their samples, nor the node its ticks
                    log.exception("job %s cannot be sampled", job.spec.id)
                    self._trouble(AcctdError(f"job {job.spec.id!r} cannot be sampled: {e!r}"))
        self._leave(SAMPLES, lines)

    def agent(self, interval: float, numbers: Mapping[str, float]) -> None:
        """Leave what the agent itself costs."""
        if self._wants_samples:
            own = {**numbers, **self.numbers()}
            self._leave(SAMPLES, [encode(AgentSample(self._now(), interval, __version__, own))])

    def numbers(self) -> dict[str, float]:
        """Bytes on disk, and samples that could not be written."""
        return {"spool_bytes": self._room.bytes, "spool_lost_samples": self.lost}

    async def follow(self, ledger: Ledger) -> None:
        """Copy the events and records that the spool has not. Raises LedgerError; the next time goes on from there."""
        number, digest = self._known.get(RECORDS, (0, ""))
        if number and ledger.digest(number) != digest:
            self._find(RECORDS, ledger)  # another ledger, or an older copy of it
        while records := ledger.records_after(self._known[RECORDS][0], _AT_ONCE):
            self._leave_records(records)
            await asyncio.sleep(0)
            if self._closed:
                return  # the configuration was read again, and another outbox writes here now
        number, at = self._known[EVENTS]
        if number and not _is_there(ledger, number, at):
            self._find(EVENTS, ledger)
        while events := ledger.events(since=self._known[EVENTS][0], limit=_AT_ONCE):
            self._room.writers[EVENTS].append([encode(self._event(event)) for event in events])
            self._known[EVENTS] = events[-1].number, events[-1].time
            await asyncio.sleep(0)
            if self._closed:
                return

    def follow_one(self, ledger: Ledger, job: str) -> None:
        """Copy the records of one job and no other's; for who accounts for one alone. Raises LedgerError."""
        while records := ledger.records_after(self._known[RECORDS][0], _AT_ONCE):
            self._leave_records([record for record in records if _who(record[2]).id == job])
            self._known[RECORDS] = records[-1][:2]

    def _leave_records(self, records: list[tuple[int, str, bytes]]) -> None:
        if not records:
            return
        for *_, body in records:
            self._remember(_who(body))
        lines = [encode(RecordFrame(at, digest, self._now(), _body(body))) for at, digest, body in records]
        self._room.writers[RECORDS].append(lines)
        self._known[RECORDS] = records[-1][:2]

    async def tidy(self) -> None:
        """Remove what nobody wants any more, and what there is no room for; beside the loop. Once at a time."""
        if self._tidying:
            return
        self._tidying = True
        try:
            await asyncio.to_thread(self._room.tidy)
        except OSError as e:
            self._trouble(e)
        finally:
            self._tidying = False

    def close(self) -> None:
        """Write nothing more."""
        self._closed = True
        self._room.close()

    def _sample(self, jobs: Mapping[str, Job], job: Job) -> Sample:
        spec = job.spec
        return Sample(
            time=self._now(),
            job=spec.id,
            owner=spec.owner.name,
            uid=spec.owner.uid,
            started=job.row.created,
            network=spec.network,
            totals=self._totals(jobs, job),
            parent=spec.parent,
            tags=dict(spec.tags),
            limits=limits_of(spec.limits),
            stacked=tuple(sorted(device for device, stacked in job.stacked.items() if stacked)),
        )

    def _totals(self, jobs: Mapping[str, Job], job: Job) -> State:
        if job.row.seq in self._nested:
            return family.totals(job, family.below(jobs, job))
        return family.totals(job, ()) if job.families else job.meter.now()

    def _leave(self, stream: str, lines: list[bytes]) -> None:
        try:
            self._room.writers[stream].append(lines)
        except LedgerError as e:
            self.lost += len(lines)
            self._trouble(e)

    def _find(self, stream: str, ledger: Ledger) -> None:
        """The newest row of the ledger that the spool has: from there to go on. Where they share none, from the first.

        At first a mark is left where the ledger is. A power cut leaves lines of nothing, which are passed over.
        """
        writer = self._room.writers[stream]
        if writer.last is None:
            record, digest, event = ledger.newest()
            self._known[stream] = (record, digest) if stream == RECORDS else (event.number, event.time)
            mark = Mark(record, digest) if stream == RECORDS else Mark(event.number, "", event.time)
            writer.append([encode(mark)])
            return
        self._known[stream] = 0, ""
        for line in spool.backwards(self.config.spool_dir / stream):
            frame = _frame(line)
            if isinstance(frame, RecordFrame | Mark) and stream == RECORDS:
                if not frame.number or ledger.digest(frame.number) == frame.digest:
                    self._known[stream] = frame.number, frame.digest
                    return
            elif isinstance(frame, EventFrame | Mark) and (
                not frame.number or _is_there(ledger, frame.number, frame.time)
            ):
                self._known[stream] = frame.number, frame.time
                return

    def _event(self, event: Event) -> EventFrame:
        who = self._whose.get(event.job or "", _Who("", "", event.uid if event.uid is not None else -1))
        return EventFrame(
            *(event.number, event.time, event.event, event.text, event.job, event.uid),
            owner=who.owner or self._owners.get(who.uid),
            parent=who.parent,
            scheduler=tag(who.tags, "scheduler"),
        )

    def _remember(self, who: "_Who") -> None:
        """For events, of which the ledger has an id alone; of the newest jobs."""
        self._owners[who.uid] = who.owner
        self._whose.pop(who.id, None)
        self._whose[who.id] = who
        if len(self._whose) > _REMEMBERED:
            del self._whose[next(iter(self._whose))]

    def _now(self) -> int:
        """ns since the epoch, never the same twice: two points of a series must not share a time."""
        self._time = max(time.time_ns(), self._time + 1)
        return self._time


def _frame(line: bytes) -> RecordFrame | EventFrame | Mark | None:
    """What a line of events or records is; None for one that no agent has written whole."""
    try:
        frame = decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return frame if isinstance(frame, RecordFrame | EventFrame | Mark) else None


class _Who(msgspec.Struct):
    """Of a record's body as much as is needed here."""

    id: str
    owner: str
    uid: int
    parent: str | None = None
    tags: dict[str, str] = {}


_NOBODY = _Who("", "-", -1)
"""Of a record that was altered after it was signed; `acctd show` says so."""


def _of(job: Job) -> _Who:
    return _Who(job.spec.id, job.spec.owner.name, job.spec.owner.uid, job.spec.parent, dict(job.spec.tags))


def _who(body: bytes) -> _Who:
    try:
        return msgspec.json.decode(body, type=_Who)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _NOBODY


def _is_there(ledger: Ledger, number: int, at: object) -> bool:
    """Whether an event is one of this ledger's. Old ones go: then later ones are there, or it is another ledger."""
    found = ledger.events(since=number - 1, limit=1)
    return bool(found) and (found[0].number != number or found[0].time == at)


def _body(body: bytes) -> msgspec.Raw:
    """As it was signed; what was altered beyond reading as a JSON string, that the line stays one."""
    if b"\n" in body or _who(body) is _NOBODY:
        return msgspec.Raw(msgspec.json.encode(body.decode(errors="replace")))
    return msgspec.Raw(body)
