"""Many jobs of a period added up in bounded memory: totals, days, owners, and the largest jobs. Pure arithmetic.

Use is spread over days as in a bill (usage.parts); no money is here. Families are in their parents' accounts already.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

import msgspec

from acctd.integrals import cores_asked
from acctd.meter import State
from acctd.model import Limits
from acctd.report.hints import LEAST_NS, needed
from acctd.slices import midnight
from acctd.usage import Usage, nanoseconds, parts

TOP = 100
"""Jobs that are named; the others are in the sums."""

_MEMORY_WASTED = 0.5
"""Of what was asked for: a job that needed less is counted as one that asked for too much."""


class Ended(Usage, frozen=True, kw_only=True):
    """What a report of many jobs wants of a record beside what is billed."""

    uid: int
    state: str
    exit_code: int | None = None
    exit_signal: int | None = None
    limits: Limits = msgspec.field(default_factory=Limits)
    shortages: tuple[msgspec.Raw, ...] = ()
    cpus: str = ""  # cores of its own

    @property
    def ending(self) -> str:
        """In a word."""
        if self.state == "running":
            return "running"
        if self.exit_signal is not None:
            return "killed"
        if self.exit_code is None:
            return "lost"
        return "done" if self.exit_code == 0 else "failed"

    def one(self, name: str) -> int:
        """A metric without labels; 0 where the host does not count it."""
        return self.totals.get(name, {}).get("", 0)


_decoder = msgspec.json.Decoder(Ended)


def decode(body: bytes | msgspec.Raw) -> Ended:
    """Of a record's JSON. Raises msgspec.DecodeError, and UsageError for limits that are none."""
    return _decoder.decode(body)


@dataclass(slots=True)
class Sum:
    """Of some jobs, or their parts in the period."""

    jobs: int = 0
    cpu: int = 0  # ns
    reserved: int = 0  # ns of cores asked for
    memory: int = 0  # KiB*s
    memory_reserved: int = 0  # KiB*s
    block_read: int = 0  # bytes
    block_write: int = 0
    network: dict[str, int] = field(default_factory=dict)  # bytes by rule

    def add(self, totals: State, stacked: tuple[str, ...]) -> None:
        """A job's part. Devices that are stacked on others are counted there."""
        get = totals.get
        self.cpu += sum(get("cpu_user", _NOTHING).values()) + sum(get("cpu_system", _NOTHING).values())
        self.reserved += sum(get("cpu_reserved", _NOTHING).values())
        self.memory += sum(get("memory_resident_time", _NOTHING).values())
        self.memory_reserved += sum(get("memory_reserved_time", _NOTHING).values())
        for device, number in get("block_read", _NOTHING).items():
            self.block_read += number if device not in stacked else 0
        for device, number in get("block_write", _NOTHING).items():
            self.block_write += number if device not in stacked else 0
        for rule, number in get("network", _NOTHING).items():
            if number:
                self.network[rule] = self.network.get(rule, 0) + number

    def merge(self, other: "Sum") -> None:
        """Add what another one has."""
        self.jobs += other.jobs
        self.cpu += other.cpu
        self.reserved += other.reserved
        self.memory += other.memory
        self.memory_reserved += other.memory_reserved
        self.block_read += other.block_read
        self.block_write += other.block_write
        for rule, number in other.network.items():
            self.network[rule] = self.network.get(rule, 0) + number


@dataclass(frozen=True, slots=True, order=True)
class Top:
    """A job among the largest."""

    cpu: int  # ns in the period
    id: str
    owner: str
    ending: str
    wall_ns: int
    cores: float | None  # asked for
    resident: int  # bytes, at most
    memory: int | None  # bytes asked for
    network: int  # bytes in the period
    started: float


@dataclass(slots=True)
class Sums:
    """Everything that a report of a period says. Days are those of `zone`; since and until s since the epoch."""

    since: float
    until: float
    zone: ZoneInfo
    days: dict[date, Sum] = field(default_factory=dict)
    owners: dict[str, Sum] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)
    families: int = 0
    short_of_memory: int = 0  # jobs
    asked_memory: int = 0  # jobs that ended well, had asked for some and were long enough for advice
    wasted_memory: int = 0  # of those the ones that needed less than half
    asked_cpu: int = 0  # ns that was used by jobs that asked for cores
    asked_resident: int = 0  # KiB*s that was used by jobs that asked for memory
    _top: list[Top] = field(default_factory=list)
    _today: tuple[int, int, date] = (0, 0, date.min)  # one that was asked for, from when until when

    @property
    def all(self) -> Sum:
        """Of all owners."""
        whole = Sum()
        for each in self.owners.values():
            whole.merge(each)
        return whole

    def add(self, job: Ended) -> None:
        """One record, or a living job as of now. What lies outside the period is left out."""
        begin = nanoseconds(job.started)
        since, until = nanoseconds(self.since), nanoseconds(self.until)
        if begin >= until or begin + job.wall_ns < since or (job.wall_ns and begin + job.wall_ns == since):
            return
        if job.parent is not None:
            self.families += 1
            return
        whole = Sum()
        for day, totals in self._by_day(job, begin, since, until):
            part = Sum()
            part.add(totals, job.stacked)
            self.days.setdefault(day, Sum()).merge(part)
            whole.merge(part)
        whole.jobs = 1
        self.days.setdefault(self._day(max(begin, since)), Sum()).jobs += 1
        self.owners.setdefault(job.owner, Sum()).merge(whole)
        self._judge(job, whole)
        self._rank(job, whole)

    def top(self) -> list[Top]:
        """The jobs that used most CPU, the largest first."""
        return sorted(self._top, key=lambda top: (-top.cpu, top.started, top.id))

    def _by_day(self, job: Ended, begin: int, since: int, until: int) -> Iterator[tuple[date, State]]:
        end = begin + job.wall_ns
        day = self._day(begin)
        if end <= self._today[1] and since <= begin and end <= until:
            yield day, job.totals  # nearly all jobs
            return
        edges = [edge for edge in (since, until) if begin < edge < end]
        while (edge := midnight(day + timedelta(days=1), self.zone)) < end:
            edges.append(edge)
            day += timedelta(days=1)
        edges = sorted(set(edges))
        pieces = parts(job, [edge - begin for edge in edges])
        for start, totals in zip((begin, *edges), pieces, strict=True):
            if since <= start < until:
                yield self._day(start), totals

    def _day(self, ns: int) -> date:
        begin, end, day = self._today
        if not begin <= ns < end:
            day = datetime.fromtimestamp(ns // 10**9, self.zone).date()
            self._today = midnight(day, self.zone), midnight(day + timedelta(days=1), self.zone), day
        return day

    def _judge(self, job: Ended, whole: Sum) -> None:
        self.endings[job.ending] += 1
        self.short_of_memory += bool(job.shortages)
        if whole.reserved:
            self.asked_cpu += whole.cpu
        if whole.memory_reserved:
            self.asked_resident += whole.memory
        asked = job.limits.memory
        if asked and job.wall_ns >= LEAST_NS and job.ending == "done" and (need := needed(job.totals)):
            self.asked_memory += 1
            self.wasted_memory += need < _MEMORY_WASTED * asked

    def _rank(self, job: Ended, whole: Sum) -> None:
        top = Top(
            cpu=whole.cpu,
            id=job.id,
            owner=job.owner,
            ending=job.ending,
            wall_ns=job.wall_ns,
            cores=cores_asked(job.limits, job.cpus),
            resident=job.one("memory_resident_peak"),
            memory=job.limits.memory,
            network=sum(whole.network.values()),
            started=job.started,
        )
        if len(self._top) < TOP:
            heapq.heappush(self._top, top)
        elif self._top[0].cpu < top.cpu:
            heapq.heapreplace(self._top, top)


_NOTHING: dict[str, int] = {}


def months(days: dict[date, Sum]) -> dict[date, Sum]:
    """The same by month, each under its first day."""
    found: dict[date, Sum] = {}
    for day in sorted(days):
        found.setdefault(day.replace(day=1), Sum()).merge(days[day])
    return found
