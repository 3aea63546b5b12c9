"""Telling starters what their jobs have used, by Chirp: at once, every few minutes, and when a job is finished.

On the agent's event loop, beside the ticks: a starter that is gone, or does not answer, holds up no job. How it is said
is exporters/chirp.py's. Where a starter listens stands in the job's row, for the next agent.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from acctd import views
from acctd.agent import Agent
from acctd.errands import Errands
from acctd.errors import UsageError
from acctd.job import Job
from acctd.model import Record
from acctd.news import News
from acctd.rows import Proxy, Terms
from exporters import chirp

INTERVAL = 300.0
"""s between two updates. A starter passes them on about as often: STARTER_UPDATE_INTERVAL."""

_LONGEST = 3600.0  # s from one try to the next, where there is no answer
_PATIENCE = 5.0  # s for one update
_LAST_PATIENCE = 2.0  # s for the last one, which whoever finishes the job waits for
_AT_A_TIME = 16


class Chirps:
    """One agent's."""

    def __init__(
        self,
        agent: Agent,
        jobs: Mapping[str, Job],
        news: News,
        errands: Errands,
        set_terms: Callable[[Job, Terms], None],
    ) -> None:
        self._agent, self._jobs, self._news, self._errands = agent, jobs, news, errands
        self._set_terms = set_terms
        self._few = asyncio.Semaphore(_AT_A_TIME)
        self._changed: dict[int, asyncio.Event] = {}  # of jobs that are told of: there is another proxy
        self._last: dict[str, asyncio.Event] = {}  # set once the last update of a job has been tried

    def take(self, job: Job, proxy: Proxy) -> None:
        """Tell this starter from now on, and no other. Raises UsageError for one that must not be connected to.

        And as Agent.read_one does.
        """
        chirp.checked(proxy)
        self._agent.read_one(job)  # it may have been made since the last tick, and have nothing to tell yet
        self._set_terms(job, replace(job.row.terms, chirp=proxy))
        if (changed := self._changed.get(job.row.seq)) is not None:
            changed.set()
        else:
            self._begin(job, 0.0)

    def open(self, job: Job) -> None:
        """Go on with a job that an earlier agent held; not with all of them at one time."""
        if job.row.terms.chirp is not None:
            self._begin(job, job.row.seq % INTERVAL)

    def finish(self, job: Job, record: Record) -> None:
        """Tell what a job's record says, while its starter still listens; settled() waits for that."""
        if (proxy := job.row.terms.chirp) is not None:
            self._last[job.spec.id] = asyncio.Event()
            self._errands.begin(self._tell_last(job, proxy, record))

    async def settled(self, job: Job) -> None:
        """Wait until the last update has been answered, or given up; for a bounded time, whatever becomes of it."""
        if (done := self._last.get(job.spec.id)) is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), _LAST_PATIENCE + 1)

    def _begin(self, job: Job, pause: float) -> None:
        """One errand for a job, however often it is said where its starter listens."""
        changed = self._changed[job.row.seq] = asyncio.Event()
        self._errands.begin(self._go_on(job, pause, changed), job)

    async def _go_on(self, job: Job, pause: float, changed: asyncio.Event) -> None:
        try:
            while True:
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), pause)
                changed.clear()
                if (proxy := job.row.terms.chirp) is None:
                    return
                record = views.interim(self._jobs, job)
                async with self._few:
                    told = await self._tell(job, proxy, record, _PATIENCE)
                pause = INTERVAL if told else min(max(2 * pause, INTERVAL), _LONGEST)
        finally:
            self._changed.pop(job.row.seq, None)

    async def _tell_last(self, job: Job, proxy: Proxy, record: Record) -> None:
        done = self._last[job.spec.id]
        try:
            await self._tell(job, proxy, record, _LAST_PATIENCE)
        finally:
            done.set()
            if self._last.get(job.spec.id) is done:
                del self._last[job.spec.id]

    async def _tell(self, job: Job, proxy: Proxy, record: Record, patience: float) -> bool:
        """Whether there was an answer."""
        try:
            refused = await chirp.send(proxy, chirp.attributes(record), patience)
        except (chirp.ChirpError, UsageError) as e:
            self._news.trouble(job, f"no Chirp update: {e}")
            final = isinstance(e, UsageError) or e.final
            if final and self._jobs.get(job.spec.id) is job and job.row.terms.chirp is proxy:
                self._set_terms(job, replace(job.row.terms, chirp=None))
            return False
        if refused:
            self._news.trouble(job, f"its starter does not let through what is sent by Chirp: {', '.join(refused)}")
        return True
