"""Keeping samples of living jobs: what has been read becomes points, which are written beside the ticks.

No money rests on them: what cannot be written is told once, counted, and keeps no job and no tick waiting.
"""

import logging
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from acctd import family
from acctd.config import SamplesConfig
from acctd.errors import AcctdError
from acctd.history import FILE, History, Point, Whose
from acctd.job import Job, boottime
from acctd.meter import keyed
from acctd.metrics import Key
from acctd.model import Record
from acctd.points import point

_TURN = 60.0  # s for which points of a job may wait, to be written in one piece
_TOGETHER = 6  # points that wait at most
_IDLE = 60 * 10**9  # ns between two points of a job that does nothing
_WAITING = 20_000  # points that are taken while one write is still under way, and ends of jobs

log = logging.getLogger("acctd")


@dataclass(slots=True)
class _Newest:
    """Of one job."""

    mark: tuple[int, int | None] | None  # what it would have another point for; None where that is not known
    point: Point
    read: int  # its time when it was read last, and was still the same


@dataclass(slots=True)
class Waiting:
    """What is to be written."""

    points: list[tuple[Whose, Point]] = field(default_factory=list)
    finished: list[Record] = field(default_factory=list)
    lost: int = 0  # points that there was no room for, or that could not be made


class Samples:
    """One acctd's. All is called on the loop but `write`, which may run beside it, on what `take` gave."""

    def __init__(
        self,
        config: SamplesConfig,
        state_dir: Path,
        open_jobs: Iterable[int] | None = None,
        *,
        interval: float = _TURN,
        patience: float = 1.0,
    ) -> None:
        """`open_jobs`: all that there are, by seq, where that is known. `interval`: s between two points of a job.

        Opens nothing.
        """
        self._config, self._path = config, state_dir / FILE
        self._together = max(1, min(_TOGETHER, int(_TURN / interval)))
        self._patience = patience
        self._open_jobs = frozenset(open_jobs) if open_jobs is not None else None  # until the file has been told
        self._nested: set[int] = set()
        self._newest: dict[int, _Newest] = {}
        self._waiting = Waiting()
        self._lock = threading.Lock()  # of all below
        self._history: History | None = None
        self._unwritten = 0  # points that were lost while there was no file that could be told
        self._closed = False

    def begin_tick(self, jobs: Collection[Job]) -> None:
        """All jobs are about to be read."""
        self._nested = {job.row.parent for job in jobs if job.row.parent is not None}
        if len(self._newest) > 2 * len(jobs):
            self._newest = {job.row.seq: self._newest[job.row.seq] for job in jobs if job.row.seq in self._newest}

    def sample(self, jobs: Mapping[str, Job], read: Iterable[Job]) -> None:
        """Some jobs have been read."""
        now = boottime()
        for job in read:
            row = job.row
            if row.phase == "running" and row.terms.ended_ns is None:
                try:
                    self._sample(jobs, job, now - row.boot_ns)
                except Exception:  # one bad job must not cost the others their samples, nor the node its ticks
                    log.exception("job %s cannot be sampled", row.spec.id)
                    self._waiting.lost += 1
        if (over := len(self._waiting.points) - _WAITING) > 0:
            del self._waiting.points[:over]
            self._waiting.lost += over

    def _sample(self, jobs: Mapping[str, Job], job: Job, at: int) -> None:
        row = job.row
        alone = row.seq not in self._nested and not job.families
        mark = (job.meter.changes, row.spec.limits.memory) if alone else None
        newest, whose = self._newest.get(row.seq), Whose(row.seq, row.spec.id, row.created)
        if newest is not None and mark is not None and newest.mark == mark:
            if at - newest.point.at < _IDLE:
                newest.read = at
                return
        elif newest is not None and newest.read > newest.point.at:
            # Up to there it did nothing: a plot must not begin to rise before.
            self._waiting.points.append((whose, msgspec.structs.replace(newest.point, at=newest.read)))
        stacked = [device for device, lies in job.stacked.items() if lies]
        made = point(at, self._totals(jobs, job), row.spec.limits.memory, stacked)
        self._newest[row.seq] = _Newest(mark, made, at)
        self._waiting.points.append((whose, made))

    def finished(self, record: Record) -> None:
        """A job has ended: its record is its last point."""
        self._waiting.finished.append(record)
        del self._waiting.finished[:-_WAITING]

    def take(self) -> Waiting:
        """What waits: nothing is added to it any more."""
        waiting, self._waiting = self._waiting, Waiting()
        return waiting

    def write(self, waiting: Waiting) -> list[AcctdError | str]:
        """Write it, and thin what has come of age: some ms, beside the loop. What went wrong."""
        with self._lock:
            troubles = self._write(waiting)
            if self._closed:
                self._let_go()
            return troubles

    def close(self) -> list[AcctdError | str]:
        """Write what waits, if it can be written now, and let go. What went wrong."""
        waiting = self.take()
        with self._lock:
            self._closed = True
            troubles = self._write(waiting) if waiting.points or waiting.finished else []
            self._let_go()
        return troubles

    def _let_go(self) -> None:
        if self._history is not None:
            self._history.close()
            self._history = None

    def _write(self, waiting: Waiting) -> list[AcctdError | str]:
        troubles: list[AcctdError | str] = []
        unseen = len(waiting.points)
        self._unwritten += waiting.lost
        try:
            history = self._opened()
            lost, self._unwritten, unseen = self._unwritten, 0, 0
            history.append(waiting.points, time.time(), waiting.finished, lost)
            history.thin(time.time())
        except AcctdError as e:
            self._unwritten += unseen
            troubles.append(e)
        if self._history is not None:
            troubles += self._history.told
            self._history.told.clear()
        return troubles

    def _opened(self) -> History:
        if self._history is None:
            config = self._config
            self._history = History(
                self._path,
                max_bytes=config.max,
                full=config.full,
                minutes=config.minutes,
                together=self._together,
                patience=self._patience,
            )
        if self._open_jobs is not None:
            self._history.settle(self._open_jobs, time.time())
            self._open_jobs = None
        return self._history

    def _totals(self, jobs: Mapping[str, Job], job: Job) -> Mapping[Key, int]:
        """With the families inside it; mostly there are none, and nothing is copied."""
        if job.row.seq in self._nested:
            return keyed(family.totals(job, family.below(jobs, job)))
        return keyed(family.totals(job, ())) if job.families else job.meter.totals
