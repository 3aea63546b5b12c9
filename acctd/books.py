"""The living agent's way to the ledger, also when the disk is full or the file is corrupt.

What cannot be written waits in memory, is told once, and is written as soon as the ledger can be: events, totals, and
the records of jobs whose kernel objects stay until then, so that nothing is lost if the agent dies meanwhile. A corrupt
file is moved aside and a new one begun with what the agent holds. Making a job is not among these: without a written
intent no job is made.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

from acctd.agent import Agent
from acctd.errors import LedgerError, NotPermittedError
from acctd.job import Job, boottime
from acctd.ledger import Event
from acctd.model import Record

_EVENTS_WAITING = 10_000
_PATIENCE = 0.2  # s for cgroups to let go; nobody else is served meanwhile

log = logging.getLogger("acctd")


class Books:
    """One agent's ledger, as the daemon writes it."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._events: deque[tuple[str | None, str, str]] = deque(maxlen=_EVENTS_WAITING)
        self.unsigned: dict[str, tuple[Job, Record]] = {}
        """Finished jobs whose records could not be committed yet, by id."""
        self.trouble: str | None = None
        """Why the ledger cannot be written at the moment."""

    def event(self, job: str | None, event: str, text: str) -> Event:
        """Keep an event. One that has to wait has the number 0."""
        kept: list[Event] = []
        if not self._do(lambda: kept.append(self._agent.ledger.add_event(job, event, text))):
            self._events.append((job, event, text))
        return kept[0] if kept else Event(0, time.time(), job, event, text)

    def seen(self) -> bool:
        """All jobs have been read now."""
        return self._do(lambda: self._agent.ledger.seen(self._agent.keeper, boottime()))

    def store(self, jobs: Iterable[Job]) -> bool:
        """Put the accounts so far into the ledger; False if they stay in memory for now."""
        held = [job for job in jobs if job.unstored]
        return not held or self._do(lambda: self._agent.store(held))

    def write(self, act: Callable[[], None]) -> bool:
        """Do something to the ledger that what is in memory makes up for if it fails; whether it was done."""
        return self._do(act)

    def sign_off(self, job: Job, record: Record) -> bool:
        """Commit a record and dismantle its job; False if that has to wait for catch_up()."""
        if self._do(lambda: self._agent.sign_off(job, record, _PATIENCE)):
            self.unsigned.pop(job.spec.id, None)
            return True
        self.unsigned[job.spec.id] = job, record
        return False

    def catch_up(self) -> list[Record]:
        """Write what has been waiting, as far as the ledger lets us; the records that are signed now."""
        while self._events:
            job, event, text = self._events[0]
            if not self._do(lambda: self._agent.ledger.add_event(job, event, text)):  # noqa: B023  # called at once
                return []
            self._events.popleft()
        return [record for job, record in list(self.unsigned.values()) if self.sign_off(job, record)]

    def _do(self, act: Callable[[], object]) -> bool:
        try:
            try:
                act()
            except LedgerError as e:
                if not e.corrupt:
                    raise
                aside = self._agent.begin_ledger_anew()
                log.error("%s; it is now %s, and a new one is begun with the jobs that are open", e, aside)
                self._events.append((None, "ledger", f"corrupt, moved aside to {aside}; open jobs are in a new one"))
                act()
        except (LedgerError, NotPermittedError) as e:  # the latter where its file system became read-only
            if self.trouble is None:
                log.error("%s; the agent goes on, and writes later what waits", e)
                self._events.append((None, "ledger", f"{e}; what is to be written waits in memory"))
            self.trouble = str(e)
            return False
        if self.trouble is not None:
            log.warning("the ledger can be written again")
            self._events.append((None, "ledger", "it can be written again"))
            self.trouble = None
        return True
