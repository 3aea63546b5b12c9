"""The living agent's way to the ledger, also when the disk is full, or the file is corrupt or taken away.

What cannot be written waits in memory, is told once, and is written as soon as the ledger can be: events, accounts, and
the records of jobs whose kernel objects stay until then, so that nothing is lost if the agent dies meanwhile. A corrupt
file is moved aside and a new one begun with what the agent holds; one that was taken away is written again. Making a
job is not among these: without a written intent no job is made.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from acctd import ledgers
from acctd.agent import Agent
from acctd.errors import LedgerError, NotPermittedError
from acctd.job import Job, boottime
from acctd.model import Record
from acctd.rows import Event

_EVENTS_WAITING = 10_000
_PATIENCE = 0.2  # s for cgroups to let go; nobody else is served meanwhile

_T = TypeVar("_T")

log = logging.getLogger("acctd")


class Books:
    """One agent's ledger, as the daemon writes it."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._events: deque[Event] = deque(maxlen=_EVENTS_WAITING)
        self.unsigned: dict[str, tuple[Job, Record]] = {}
        """Finished jobs whose records could not be committed yet, by id."""
        self.trouble: str | None = None
        """Why the ledger cannot be written at the moment."""

    def event(self, job: str | None, uid: int | None, event: str, text: str) -> Event:
        """Keep an event. One that has to wait has the number 0."""
        made = Event(0, time.time(), job, uid, event, text)
        kept: list[Event] = []
        if self.write(lambda: kept.append(self._agent.ledger.add_event(made))):
            return kept[-1]
        self._events.append(made)
        return made

    def store(self, jobs: Iterable[Job]) -> bool:
        """Put the accounts so far into the ledger; False if they stay in memory for now."""
        held = [job for job in jobs if job.unstored]
        return not held or self.write(lambda: self._agent.store(held))

    def seen(self) -> bool:
        """All jobs have been read now."""
        return self.write(lambda: self._agent.ledger.seen(self._agent.keeper, boottime()))

    def sign_off(self, job: Job, record: Record) -> bool:
        """Commit a record and dismantle its job; False if that has to wait for catch_up()."""
        if self.write(lambda: self._agent.sign_off(job, record, _PATIENCE)):
            self.unsigned.pop(job.spec.id, None)
            return True
        self.unsigned[job.spec.id] = job, record
        return False

    def read(self, act: Callable[[], _T]) -> _T:
        """Ask the ledger; of a new one if this shows that the old one is corrupt. Raises as `act` does."""
        try:
            return act()
        except LedgerError as e:
            if self._agent.ledger.closed:
                self._agent.ledger = ledgers.reopened(self._agent.ledger)
            elif e.corrupt:
                self._begin_anew(e)
            else:
                raise
            return act()

    def write(self, act: Callable[[], object]) -> bool:
        """Do something to the ledger that what is in memory makes up for if it fails; whether it was done."""
        try:
            self.read(act)
        except (LedgerError, NotPermittedError) as e:  # the latter where its file system became read-only
            if self.trouble is None:
                log.error("%s; the agent goes on, and writes later what waits", e)
                self._wait_to_tell(f"{e}; what is to be written waits in memory")
            self.trouble = str(e)
            return False
        if self.trouble is not None:
            log.warning("the ledger can be written again")
            self._wait_to_tell("it can be written again")
            self.trouble = None
        return True

    def catch_up(self) -> list[Record]:
        """See that the ledger is still there, and write what has been waiting; the records that are signed now."""
        if not self._agent.ledger.is_there():
            self.write(self._write_again)
        while self._events:
            waiting = self._events[0]
            if not self.write(lambda: self._agent.ledger.add_event(waiting)):  # noqa: B023  # called at once
                return []
            self._events.popleft()
        return [record for job, record in list(self.unsigned.values()) if self.sign_off(job, record)]

    def _begin_anew(self, error: LedgerError) -> None:
        agent = self._agent
        agent.ledger, aside = ledgers.begun_anew(agent.ledger, agent.held, agent.leftovers)
        agent.held = {job.row.seq: job for job in agent.held.values()}
        log.error("%s; it is now %s, and a new one is begun with the jobs that are open", error, aside)
        text = f"corrupt, moved aside to {aside}; open jobs are in a new one"
        self._agent.ledger.add_event(Event(0, time.time(), None, None, "ledger", text))

    def _write_again(self) -> None:
        """Somebody deleted, emptied or replaced the file: what SQLite still holds of it goes into a new one."""
        self._agent.ledger, aside = ledgers.restored(self._agent.ledger)
        text = f"it was taken away, and written again{f'; what lay there is now {aside}' if aside else ''}"
        log.error("the ledger: %s", text)
        self._agent.ledger.add_event(Event(0, time.time(), None, None, "ledger", text))

    def _wait_to_tell(self, text: str) -> None:
        self._events.append(Event(0, time.time(), None, None, "ledger", text))
