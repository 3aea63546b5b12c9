"""The living agent: holds every job of the node, reads all of them each interval, and acts on one when asked.

One event loop and no thread but the kernel's own waits: a step of work is some milliseconds, a tick is cut into slices,
and whoever asks in between is answered in between. Knows nothing of sockets and frames; server.py does. Who may do what
is decided there too.
"""

import asyncio
import logging
import resource
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from acctd.agent import Agent, Ending, Job, boottime
from acctd.errors import AcctdError, InUseError, NotFoundError
from acctd.kernel import procs
from acctd.ledger import Place
from acctd.model import JobSpec, Record
from acctd.network.backend import Sample

_SLICE = 20
"""Jobs read before the loop may do something else: about 1 ms of work."""

_EVENTS_WAITING = 1000  # per watcher; one that does not read misses the oldest

log = logging.getLogger("acctd")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job, or to the agent itself."""

    time: float  # s since the epoch, a label
    job: str | None
    event: str
    text: str


@dataclass(slots=True)
class Cost:
    """What the agent itself costs, since it started."""

    ticks: int = 0
    missed_ticks: int = 0  # due while one was still under way
    errors: int = 0
    last_tick: float = 0.0  # s
    longest_tick: float = 0.0  # s
    started: float = field(default_factory=time.monotonic)

    def published(self, jobs: int) -> dict[str, float]:
        """All of it as numbers; times in s, memory in bytes."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "ticks": self.ticks,
            "missed_ticks": self.missed_ticks,
            "errors": self.errors,
            "last_tick_seconds": self.last_tick,
            "longest_tick_seconds": self.longest_tick,
            "uptime_seconds": time.monotonic() - self.started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "resident_peak_bytes": usage.ru_maxrss * 1024,
            "open_descriptors": procs.open_descriptors(),
            "jobs": jobs,
        }


class Daemon:
    """The jobs of this node, from the agent's start to its end."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.cost = Cost()
        self.jobs: dict[str, Job] = {}
        self._busy: set[str] = set()  # being made or finished
        self._watchers: set[asyncio.Queue[Event]] = set()
        self._recent: deque[Event] = deque(maxlen=_EVENTS_WAITING)
        self._ticking = False

    # Beginning and end

    def start(self) -> None:
        """Take over what an earlier agent left: living jobs are held again, ended ones get their records."""
        written = self.agent.recover(adopt=self._adopt)
        for record in written:
            self.tell(record.id, "finished", f"recovered; {record.state}")
        self._report_trouble()

    def stop(self) -> None:
        """Store all totals and let go; the jobs go on without us."""
        for job in self.jobs.values():
            try:
                self.agent.poll([job])
                self.agent.store(job)
            except AcctdError as e:
                log.warning("job %s: %s", job.spec.id, e)
            job.close()
        self.jobs.clear()

    def _adopt(self, job: Job) -> None:
        self.jobs[job.spec.id] = job
        self.tell(job.spec.id, "adopted", "held again after a restart; the kernel went on counting")

    # Jobs

    def create(self, spec: JobSpec) -> Job:
        """Make a job. Raises as Agent.create does."""
        if spec.id in self.jobs:
            raise InUseError(f"job id {spec.id!r} is in use by a living job; choose another")
        job = self.agent.create(spec)
        self.jobs[spec.id] = job
        self.tell(spec.id, "created", f"for {spec.owner.name}, network {spec.network}")
        return job

    def find(self, name: str) -> Job:
        """A job that is open. Raises NotFoundError."""
        job = self.jobs.get(name)
        if job is None:
            raise NotFoundError(f"no open job {name!r}; acctd-hook list names those there are")
        return job

    def attach(self, job: Job, pid: int) -> None:
        """Put a process into the job; the job runs from the first one on. Raises NotFoundError, KernelRefusedError."""
        first = job.row.phase == "making"
        if first:
            self.agent.begin(job)
        job.cgroups.attach(pid)
        if first:
            self.tell(job.spec.id, "began", f"pid {pid}")

    def usage(self, job: Job) -> dict[str, Any]:
        """The job now, read this moment."""
        self.agent.read_one(job)
        return self.describe(job)

    def describe(self, job: Job) -> dict[str, Any]:
        """The job as of its last reading. Totals by metric and label."""
        row = job.row
        return {
            "id": row.spec.id,
            "owner": row.spec.owner.name,
            "uid": row.spec.owner.uid,
            "phase": row.phase,
            "network": row.spec.network,
            "started": row.created,
            "wall_ns": boottime() - row.boot_ns,
            "pids": sorted(job.cgroups.procs()),
            "totals": job.meter.state()[0],
        }

    async def kill(self, job: Job, timeout: float = 10.0) -> set[int]:
        """End every process of a job without holding up another; the pids that would not die within `timeout` s."""
        deadline = time.monotonic() + timeout
        pause = 0.001
        while True:
            living = job.cgroups.kill(timeout=0.0)
            if not living or time.monotonic() > deadline:
                return living
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.1)

    async def finish(self, job: Job, ending: Ending) -> Record:
        """End, read for the last time, sign off, dismantle. Asked twice at a time, the second waits for the first."""
        name = job.spec.id
        while name in self._busy:
            await asyncio.sleep(0.01)
        if self.jobs.get(name) is not job:
            return self.agent.ledger.record(name)
        self._busy.add(name)
        try:
            await self.kill(job)
            record = self.agent.finish(job, ending, patience=0.0)  # kill() has had it, without blocking others
            del self.jobs[name]
        finally:
            self._busy.discard(name)
        self.tell(name, "finished", f"{record.state}, wall {record.wall_ns / 1e9:.3f} s")
        self._report_trouble()
        return record

    # Ticks

    async def tick(self) -> float:
        """Read all jobs once; the s it took. A second one meanwhile is counted as missed and does nothing."""
        if self._ticking:
            self.cost.missed_ticks += 1
            return 0.0
        self._ticking = True
        began = time.monotonic()
        try:
            await self._read_all()
        finally:
            self._ticking = False
            self.cost.ticks += 1
            self.cost.last_tick = time.monotonic() - began
            self.cost.longest_tick = max(self.cost.longest_tick, self.cost.last_tick)
        return self.cost.last_tick

    async def _read_all(self) -> None:
        jobs = [job for name, job in self.jobs.items() if name not in self._busy]
        dumps = await self._read_chains(jobs)
        for start in range(0, len(jobs), _SLICE):
            for job in jobs[start : start + _SLICE]:
                if self.jobs.get(job.spec.id) is job and job.spec.id not in self._busy:
                    self._read_job(job, dumps)
            await asyncio.sleep(0)

    async def _read_chains(self, jobs: list[Job]) -> dict[Place, dict[str, Sample]]:
        dumps: dict[Place, dict[str, Sample]] = {}
        for place in {job.row.place for job in jobs if job.row.place.backend is not None}:
            try:
                dumps[place] = self.agent.read_chains(place)
            except AcctdError as e:
                self._trouble(None, e)
            await asyncio.sleep(0)
        return dumps

    def _read_job(self, job: Job, dumps: dict[Place, dict[str, Sample]]) -> None:
        try:
            self.agent.take(job, dumps.get(job.row.place))
            self.agent.store(job)
        except AcctdError as e:
            self._trouble(job.spec.id, e)

    # Events

    def tell(self, job: str | None, event: str, text: str) -> None:
        """One line in the log, and one event to everyone who watches."""
        log.info("%s%s: %s", f"job {job} " if job else "", event, text)
        news = Event(time.time(), job, event, text)
        self._recent.append(news)
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(news)

    async def watch(self) -> AsyncIterator[Event]:
        """Every event from now on."""
        queue: asyncio.Queue[Event] = asyncio.Queue(_EVENTS_WAITING)
        self._watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)

    def _trouble(self, job: str | None, error: AcctdError) -> None:
        self.cost.errors += 1
        self.tell(job, "trouble", str(error))

    def _report_trouble(self) -> None:
        for sentence in self.agent.trouble:
            self.cost.errors += 1
            self.tell(None, "trouble", sentence)
        self.agent.trouble.clear()
