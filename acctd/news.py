"""What the agent has to tell: one line in the log, one row in the ledger, one event to everyone who watches."""

import asyncio
import logging
from collections.abc import AsyncIterator

from acctd.books import Books
from acctd.cost import Cost
from acctd.job import Job
from acctd.model import Record
from acctd.rows import Event

_WAITING = 1000  # events per watcher; one that does not read misses the oldest
_REMEMBERED = 1000  # different troubles

log = logging.getLogger("acctd")


class News:
    """One agent's events."""

    def __init__(self, books: Books, cost: Cost) -> None:
        self._books, self._cost = books, cost
        self._watchers: set[asyncio.Queue[Event]] = set()
        self._told: set[tuple[str | None, str]] = set()

    def tell(self, about: Job | Record | None, event: str, text: str) -> None:
        """Something happened to a job, or to the agent itself."""
        name, uid = _whose(about)
        level = logging.WARNING if event == "trouble" else logging.INFO
        log.log(level, "%s%s: %s", f"job {name} " if name else "", event, text)
        news = self._books.event(name, uid, event, text)
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(news)

    def trouble(self, job: Job | None, error: BaseException | str) -> None:
        """Something failed: counted each time, told when it is new."""
        self._cost.errors += 1
        trouble = job.spec.id if job else None, str(error)
        if trouble not in self._told:
            if len(self._told) >= _REMEMBERED:
                self._told.clear()
            self._told.add(trouble)
            self.tell(job, "trouble", str(error))

    async def watch(self) -> AsyncIterator[Event]:
        """Every event from now on."""
        queue: asyncio.Queue[Event] = asyncio.Queue(_WAITING)
        self._watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)


def _whose(about: Job | Record | None) -> tuple[str | None, int | None]:
    """The id of what is told about, and its owner."""
    if about is None:
        return None, None
    return (about.spec.id, about.spec.owner.uid) if isinstance(about, Job) else (about.id, about.uid)
