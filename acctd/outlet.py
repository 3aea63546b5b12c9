"""What the living agent gives away at each tick: to its outbox, where anything is exported, and to the kept samples.

Both are opened anew when the configuration says otherwise. One that cannot be had, or written, is told of and keeps no
job from its account.
"""

import asyncio
import logging
from collections.abc import Mapping

from acctd.agent import Agent
from acctd.cost import Cost
from acctd.errands import Errands
from acctd.errors import AcctdError
from acctd.job import Job
from acctd.model import Record
from acctd.news import News
from acctd.outbox import Outbox
from acctd.samples import Samples

log = logging.getLogger("acctd")


class Outlet:
    """One agent's."""

    def __init__(self, agent: Agent, news: News, errands: Errands) -> None:
        self._agent, self._news, self._errands = agent, news, errands
        self._config = agent.config.export
        self._outbox = self._opened()
        self._kept = self._made()
        self._keeping = False

    def reconfigure(self) -> None:
        """The agent has another configuration, or is to try again what it could not do."""
        if self._agent.config.export != self._config or self._outbox is None:
            if self._outbox is not None:
                self._outbox.close()
            self._config = self._agent.config.export
            self._outbox = self._opened()
        self._keep_no_more()
        self._kept = self._made()

    def begin_tick(self, jobs: Mapping[str, Job]) -> None:
        """All jobs are about to be read."""
        if self._outbox is not None:
            self._outbox.begin_tick(jobs.values())
        if self._kept is not None:
            self._kept.begin_tick(jobs.values())

    def sample(self, jobs: Mapping[str, Job], read: list[Job]) -> None:
        """Some jobs have been read."""
        if self._outbox is not None:
            self._outbox.sample(jobs, read)
        if self._kept is not None:
            self._kept.sample(jobs, read)

    def finished(self, record: Record) -> None:
        """A job has ended."""
        if self._kept is not None:
            self._kept.finished(record)

    async def end_tick(self, jobs: Mapping[str, Job], cost: Cost) -> None:
        """All have: leave what happened since the last tick, and what this one cost."""
        self._errands.begin(self._keep())
        if (outbox := self._outbox) is None:
            return
        try:
            await outbox.follow(self._agent.ledger)
        except (AcctdError, OSError) as e:
            self._news.trouble(None, e)
        except Exception as e:  # a defect of ours in here must not keep the spool from being tidied
            log.exception("events and records do not get into the spool")
            self._news.trouble(None, repr(e))
        if outbox is self._outbox:
            outbox.agent(self._agent.config.poll_interval, cost.published(len(jobs)))
            self._errands.begin(outbox.tidy())

    def close(self) -> None:
        if self._outbox is not None:
            self._outbox.close()
        self._keep_no_more()

    async def _keep(self) -> None:
        """Write the samples, once at a time; what comes meanwhile waits for the next tick."""
        kept = self._kept
        if kept is None or self._keeping:
            return
        self._keeping = True
        try:
            for trouble in await asyncio.to_thread(kept.write, kept.take()):
                self._news.trouble(None, trouble)
        finally:
            self._keeping = False

    def _keep_no_more(self) -> None:
        for trouble in self._kept.close() if self._kept is not None else ():
            self._news.trouble(None, trouble)

    def _made(self) -> Samples | None:
        config = self._agent.config
        if not config.samples.max:
            return None
        try:
            open_jobs = self._agent.ledger.open_seqs()
        except AcctdError as e:
            self._news.trouble(None, f"no samples are kept until the next reload: {e}")
            return None
        return Samples(config.samples, config.state_dir, open_jobs, interval=config.poll_interval)

    def _opened(self) -> Outbox | None:
        if not self._config.active:
            return None
        try:
            outbox = Outbox(self._config, lambda error: self._news.trouble(None, error))
            outbox.begin(self._agent.ledger)
            return outbox
        except (AcctdError, OSError) as e:
            self._news.trouble(None, f"nothing is exported until the next reload: {e}")
        except Exception as e:  # a defect of ours in here must not cost the node its agent
            log.exception("the outbox cannot be had")
            self._news.trouble(None, f"nothing is exported until the next reload: {e!r}")
        return None
