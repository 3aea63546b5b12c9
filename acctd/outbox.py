"""The agent's side of export: what exporters are to get is left in the spool, as frames. Sends nothing anywhere.

Samples are written at each tick. Events and records are taken from the ledger, from the last one that the spool has: so
none is lost or doubled by whoever died in between, and those of `acctd run` are among them. What all sinks have read
is removed, what waits is compressed, and above the bound the oldest samples go.
"""

import asyncio
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
)
from acctd.job import Job
from acctd.ledger import Ledger
from acctd.meter import State
from acctd.model import Limits
from acctd.rows import Event
from acctd.sinks import ExportConfig
from acctd.spoolroom import SpoolRoom

_AT_ONCE = 200  # rows of the ledger that are copied before the loop may do something else
_LIMITS = ("memory", "memory_soft", "swap", "cpus", "pids")


class Outbox:
    """One agent's. Of trouble `trouble` hears; no job or tick is ever held up by it."""

    def __init__(self, config: ExportConfig, trouble: Callable[[AcctdError | OSError], None]) -> None:
        self.config = config
        self._trouble = trouble
        self._room = SpoolRoom(config)
        self._time = 0  # of the newest sample
        self._nested: set[int] = set()  # jobs with families inside, as of this tick
        self._owners: dict[int, str] = {}
        self._tidying = self._closed = False
        self.lost = 0
        """Samples that the disk did not take, since the agent's start."""
        self._wants_samples = bool(config.influxdb or config.prometheus) or any(
            SAMPLES in sink.streams for sink in config.json
        )

    def begin(self, ledger: Ledger) -> None:
        """Mark where export begins, if it has not begun long ago. Raises LedgerError."""
        for stream in (RECORDS, EVENTS):
            self._last(stream, ledger)

    def begin_tick(self, jobs: Iterable[Job]) -> None:
        """All jobs are about to be read."""
        self._nested = {job.row.parent for job in jobs if job.row.parent is not None}

    def sample(self, jobs: Mapping[str, Job], read: Iterable[Job]) -> None:
        """Leave the samples of jobs that have been read."""
        if not self._wants_samples:
            return
        frames = [encode(self._sample(jobs, job)) for job in read if job.row.phase == "running"]
        self._leave(SAMPLES, frames)

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
        last = self._last(RECORDS, ledger)
        # Where the ledger was begun anew, all of it is new here.
        known = isinstance(last, RecordFrame | Mark) and ledger.digest(last.number) == (last.digest or None)
        number = last.number if known else 0
        while records := ledger.records_after(number, _AT_ONCE):
            lines = [encode(RecordFrame(at, digest, self._now(), _body(body))) for at, digest, body in records]
            self._owners |= {(who := _who(body)).uid: who.owner for *_, body in records}
            self._room.writers[RECORDS].append(lines)
            number = records[-1][0]
            await asyncio.sleep(0)
            if self._closed:
                return  # the configuration was read again, and another outbox writes here now
        number = self._last_event(ledger)
        while events := ledger.events(since=number, limit=_AT_ONCE):
            self._room.writers[EVENTS].append([encode(self._event(event)) for event in events])
            number = events[-1].number
            await asyncio.sleep(0)
            if self._closed:
                return

    def follow_one(self, ledger: Ledger, job: str) -> None:
        """Copy the records of one job and no other's; for who accounts for one alone. Raises LedgerError."""
        number = self._last(RECORDS, ledger).number
        while records := ledger.records_after(number, _AT_ONCE):
            for at, digest, body in records:
                if _who(body).id == job:
                    self._room.writers[RECORDS].append([encode(RecordFrame(at, digest, self._now(), _body(body)))])
            number = records[-1][0]

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
        self._owners[spec.owner.uid] = spec.owner.name
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
            limits=limits(spec.limits),
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

    def _last(self, stream: str, ledger: Ledger) -> RecordFrame | EventFrame | Mark:
        """The last frame of events or records that the spool has; at first a mark where the ledger is."""
        writer = self._room.writers[stream]
        if writer.last is None:
            record, digest, event = ledger.newest()
            mark = Mark(record, digest) if stream == RECORDS else Mark(event.number, "", event.time)
            writer.append([encode(mark)])
            return mark
        if (frame := _frame(writer.last)) is not None:
            return frame
        # A power cut leaves lines of nothing. Where no line is whole, all that the ledger has is sent again.
        lines = spool.backwards(self.config.spool_dir / stream)
        return next((frame for line in lines if (frame := _frame(line)) is not None), Mark(0))

    def _last_event(self, ledger: Ledger) -> int:
        """After which event of the ledger to go on: from its first, where it is not the one that the last was of."""
        last = self._last(EVENTS, ledger)
        there = ledger.events(since=last.number - 1, limit=1) if last.number else []
        # Old events go: where this one has gone, later ones are there, or it is another ledger.
        same = bool(there) and (there[0].number != last.number or there[0].time == last.time)
        return last.number if same else 0

    def _event(self, event: Event) -> EventFrame:
        owner = self._owners.get(event.uid) if event.uid is not None else None
        return EventFrame(event.number, event.time, event.event, event.text, event.job, event.uid, owner)

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


_NOBODY = _Who("", "-", -1)
"""Of a record that was altered after it was signed; `acctd show` says so."""


def _who(body: bytes) -> _Who:
    try:
        return msgspec.json.decode(body, type=_Who)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _NOBODY


def _body(body: bytes) -> msgspec.Raw:
    """As it was signed; what was altered beyond reading as a JSON string, that the line stays one."""
    if b"\n" in body or _who(body) is _NOBODY:
        return msgspec.Raw(msgspec.json.encode(body.decode(errors="replace")))
    return msgspec.Raw(body)


def limits(of: Limits) -> dict[str, float | int]:
    """Those that a job has, as a Sample holds them."""
    return {name: value for name in _LIMITS if (value := getattr(of, name)) is not None}
