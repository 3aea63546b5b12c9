"""What a scrape shows: the newest sample of each living job, the record of one that has just ended, the newest agent's.

Fed with frames, asked by whoever serves them; from any thread. It is the place of all bounds: how many jobs, how many
labels a job, which values and texts. What cannot be shown is left out and counted, and keeps nothing else from being
shown. Reads no file and knows no format.
"""

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from acctd.errors import UsageError
from acctd.frames import AgentSample, EventFrame, Frame, Mark, RecordFrame, Sample, limits_of, tag
from acctd.meter import State
from acctd.metrics import CATALOGUE, LIMITS
from acctd.model import CLASSES_MAX, INT64_MAX, Record, check_job_id

JOBS_MOST = 10_000
LABELS_MOST = {"device": 32, "mount": 32, "class": 2 * (CLASSES_MAX + 1)}
"""How many devices, mounts and rules a job has of its own; what more there is is summed under REST."""
REST = "other"
"""No device, no mount point and no rule is called so."""
TEXT_MOST = 256  # characters of a label: a scraper that has a limit refuses all of a node for one longer one

_KINDS = {metric.name: metric.labels[0] if metric.labels else "" for metric in CATALOGUE}
_NUMBERS_MOST = 128  # of an agent
_INTERVAL = 10.0  # s between two ticks, until the agent has said so
_INTERVAL_MOST = 86400.0
_PATIENCE, _PATIENCE_LEAST = 3, 10.0  # intervals, and s: what is not heard of for longer is not shown
_ODD = re.compile("[\0\ud800-\udfff]")  # the end of a text to some parsers; no UTF-8
_NUMBER = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")


@dataclass(frozen=True, slots=True)
class Shown:
    """One job, as it may be shown: all values, labels and texts are within bounds."""

    job: str
    owner: str
    account: str  # "-" for none
    scheduler: str
    parent: str  # "-" for none
    network: str
    totals: State  # of declared metrics only
    limits: Mapping[str, float | int]
    finished: bool
    time: int  # ns since the epoch, of its frame
    made: float  # the same by this process' monotonic clock, s
    apart: dict[str, dict[str, None]] = field(default_factory=dict)  # by kind, the labels that are shown apart


class Seen(NamedTuple):
    """All of it at one moment."""

    jobs: list[Shown]
    agent: AgentSample | None
    up: bool  # whether the agent was heard of within some of its intervals
    errors: int  # frames, values and texts that were left out, since the start


class Board:
    """One node's. A finished job is shown for `grace` s; `scheduler` is that of jobs without a tag of that name."""

    def __init__(self, *, grace: float, scheduler: str = "none") -> None:
        self._grace, self._scheduler = grace, scheduler
        self._lock = threading.Lock()
        self._jobs: dict[str, Shown] = {}
        self._agent: AgentSample | None = None
        self._agent_made = 0.0  # s, monotonic
        self._errors = 0

    def take(self, frame: Frame) -> None:
        """One more frame. Of one stream they come in their order. Never raises for what is in it."""
        with self._lock:
            try:
                match frame:
                    case Sample():
                        self._take_job(frame, frame.job, frame.limits, frame.time, finished=False)
                    case RecordFrame():
                        record = frame.record()
                        self._take_job(record, record.id, limits_of(record.limits), frame.time, finished=True)
                    case AgentSample():
                        self._take_agent(frame)
                    case EventFrame() | Mark():
                        pass
            except (UsageError, ValueError, msgspec.MsgspecError, RecursionError):
                self._errors += 1

    def leave_out(self, count: int = 1) -> None:
        """Something could not even become a frame, or a number could not be had: it is counted with the rest."""
        with self._lock:
            self._errors += count

    def seen(self) -> Seen:
        """What is to be shown now. Forgets what is not any more."""
        now = time.monotonic()
        with self._lock:
            patience = self._patience()
            for job, shown in list(self._jobs.items()):
                if now - shown.made > (self._grace if shown.finished else patience):
                    del self._jobs[job]
            up = self._agent is not None and now - self._agent_made <= patience
            return Seen(list(self._jobs.values()), self._agent, up, self._errors)

    def _take_job(
        self, what: Sample | Record, job: str, limits: Mapping[str, float | int], time_ns: int, *, finished: bool
    ) -> None:
        before = self._jobs.get(job)
        if before is not None and before.time > time_ns:
            return  # a sample from before the job's end, or a record of another job that had the id
        apart = before.apart if before is not None else {}
        shown = Shown(
            job=check_job_id(job),
            owner=_text(what.owner),
            account=_text(tag(what.tags, "account")),
            scheduler=_text(tag(what.tags, "scheduler") or self._scheduler),
            parent=_text(what.parent),
            network=_text(what.network),
            totals=self._totals(what.totals, what.stacked, apart),
            limits=self._limits(limits),
            finished=finished,
            time=time_ns,
            made=_made(time_ns),
            apart=apart,
        )
        self._jobs.pop(job, None)  # to the end: the first of the finished ones is the oldest
        if len(self._jobs) >= JOBS_MOST:
            oldest = next((other.job for other in self._jobs.values() if other.finished), None)
            if oldest is None:
                raise ValueError("too many jobs")
            del self._jobs[oldest]
        self._jobs[job] = shown

    def _take_agent(self, frame: AgentSample) -> None:
        if not 0 < frame.interval <= _INTERVAL_MOST:
            raise ValueError(frame.interval)
        version = _text(frame.version)
        numbers = {name: value for name, value in list(frame.numbers.items())[:_NUMBERS_MOST] if _NUMBER.match(name)}
        self._errors += len(frame.numbers) - len(numbers)
        self._agent = AgentSample(frame.time, frame.interval, version, numbers)
        self._agent_made = _made(frame.time)

    def _patience(self) -> float:
        interval = self._agent.interval if self._agent is not None else _INTERVAL
        return max(_PATIENCE * interval, _PATIENCE_LEAST)

    def _limits(self, limits: Mapping[str, float | int]) -> Mapping[str, float | int]:
        known = {name: value for name, value in limits.items() if name in LIMITS}
        found = {name: value for name, value in known.items() if 0 <= value <= INT64_MAX}
        self._errors += len(known) - len(found)
        return found

    def _totals(self, totals: State, stacked: tuple[str, ...], apart: dict[str, dict[str, None]]) -> State:
        """What of them can be shown; a metric that this version does not declare means nothing to it."""
        found: State = {}
        for name, values in totals.items():
            if (kind := _KINDS.get(name)) is None:
                continue
            fit = {label: value for label, value in values.items() if 0 <= value <= INT64_MAX and (kind or not label)}
            self._errors += len(values) - len(fit)
            found[name] = self._by_label(kind, fit, stacked, apart.setdefault(kind, {})) if kind else fit
        return found

    def _by_label(
        self, kind: str, values: dict[str, int], stacked: tuple[str, ...], apart: dict[str, None]
    ) -> dict[str, int]:
        """Values by device, mount or rule. What was shown apart stays so: else the sum of the rest could fall."""
        found: dict[str, int] = {}
        for label, value in values.items():
            if kind == "device" and label in stacked:
                continue
            if label not in apart:
                if _ODD.search(label):
                    self._errors += 1
                    continue
                if len(apart) >= LABELS_MOST[kind] or len(label) > TEXT_MOST or label == REST:
                    found[REST] = found.get(REST, 0) + value
                    continue
                apart[label] = None
            found[label] = value
        return found


def _text(text: str | None) -> str:
    """A label's value. Raises ValueError for what can be none."""
    if not text:
        return "-"
    if _ODD.search(text):
        raise ValueError(text)
    return text[:TEXT_MOST]


def _made(time_ns: int) -> float:
    """When a frame was made, by this process' monotonic clock. If that is still to come, a clock was set: now."""
    return time.monotonic() - max(0.0, (time.time_ns() - time_ns) / 1e9)
