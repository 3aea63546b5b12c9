"""Work beside the ticks, on the agent's event loop: what is under way, for which job, and what came of it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from acctd.job import Job


class Errands:
    """One agent's. What fails is told to `trouble`, as in news.py."""

    def __init__(self, trouble: Callable[[Job | None, BaseException], None]) -> None:
        self._trouble = trouble
        self._tasks: dict[asyncio.Task[Any], Job | None] = {}

    def begin(self, work: Coroutine[Any, Any, None], job: Job | None = None) -> None:
        """Do this beside all else; with a job: for as long as that is there."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = job
        task.add_done_callback(self._done)

    def drop(self, job: Job) -> None:
        """The job is gone."""
        for task in [task for task, of in self._tasks.items() if of is job]:
            task.cancel()

    def close(self) -> None:
        """The agent goes."""
        for task in self._tasks:
            task.cancel()

    def _done(self, task: asyncio.Task[Any]) -> None:
        job = self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._trouble(job, error)
