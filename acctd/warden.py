"""The living agent's care for the jobs' chains: read in one dump, watched for what others do, mended."""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from acctd.agent import Agent
from acctd.books import Books
from acctd.errors import AcctdError
from acctd.job import Job
from acctd.kernel import nfevents
from acctd.network import host
from acctd.network.backend import Chains, Count, Sample
from acctd.news import News
from acctd.sentry import Sentry

_MENDS = 10  # at once, in as many seconds


class Warden:
    """For one event loop, and the jobs that its daemon holds."""

    def __init__(self, agent: Agent, books: Books, news: News, jobs: Mapping[str, Job]) -> None:
        self._agent, self._books, self._news, self._jobs = agent, books, news, jobs
        self._sentry = Sentry(self._heard, lambda e: news.trouble(None, e))
        self._mended_at = deque[float](maxlen=_MENDS)

    async def read(self, jobs: Sequence[Job]) -> None:
        """Meter all chains, a back end at a time: in one step, or a dump would be older than what others read since."""
        for chains in self._agent.backends(jobs):
            try:
                samples = chains.read()
            except (AcctdError, OSError) as e:
                self._news.trouble(None, e)
                continue
            for job in jobs:
                if self._holds(job) and job.plan is not None and self._agent.chains_of(job) is chains:
                    job.take_sample(samples.get(job.plan.chain))
            await asyncio.sleep(0)

    def mend(self, jobs: Iterable[Job]) -> bool:
        """Mend what others have damaged, and tell; whether there was anything."""
        try:
            mended = self._agent.mend(jobs)
        except (AcctdError, OSError) as e:
            self._news.trouble(None, e)
            return False
        self._books.store(job for job, _ in mended)
        for job, sentence in mended:
            self._news.tell(job, "mended", sentence)
        return bool(mended)

    def keep_forwarding(self, jobs: Iterable[Job]) -> None:
        """Switch the host's forwarding on again where another program has switched it off under jobs with pipes."""
        piped = [job.pools for job in jobs if job.pools is not None]
        if not piped:
            return
        v4, v6 = host.forwards()
        ipv6 = any(pools.v6 is not None for pools in piped)
        if v4 and (v6 or not ipv6):
            return
        try:
            host.enable_forwarding(ipv6=ipv6)
        except AcctdError as e:
            self._news.trouble(None, e)
            return
        self._news.tell(
            None, "mended", "another program had switched forwarding off, without which no job has a network"
        )

    def guard(self, jobs: Iterable[Job]) -> None:
        """Hear soon of what other programs do to the chains of these jobs."""
        for chains in self._agent.backends(jobs):
            try:
                self._sentry.guard(chains)
            except (AcctdError, OSError) as e:
                self._news.trouble(None, e)  # the next tick finds what nobody tells us of

    def close(self) -> None:
        """Hear no more; guard() may begin anew."""
        self._sentry.close()

    def _heard(self, chains: Chains, news: nfevents.News[Count] | None) -> None:
        """Another program changed the ruleset: take the last counts of what it deleted, and mend."""
        mine = [job for job in self._jobs.values() if self._agent.chains_of(job) is chains]
        if news is not None:
            named = {job.plan.chain: job for job in mine if job.plan is not None}
            for (chain, incarnation), counts in news.deleted.items():
                if chain in named:
                    named[chain].take_last(Sample(counts, incarnation))
        self._books.store(mine)
        now = asyncio.get_running_loop().time()
        if len(self._mended_at) == _MENDS and now - self._mended_at[0] < _MENDS:
            # Somebody undoes what we mend as soon as we do: the ticks go on mending, and we do not burn a core.
            self._news.trouble(
                None, "another program changes the chains without end; they are mended at each tick only"
            )
        elif self.mend(mine):
            self._mended_at.append(now)

    def _holds(self, job: Job) -> bool:
        return self._jobs.get(job.spec.id) is job
