"""Shortages of memory, heard on the living agent's event loop; and on v1 families pushed back to their soft limits.

What is done about a shortage is shortages.py's.
"""

import asyncio
import time

from acctd import family
from acctd.cgroup.change import change
from acctd.cgroup.pushback import push_back
from acctd.errands import Errands
from acctd.errors import AcctdError, KernelRefusedError
from acctd.job import Job
from acctd.kernel import memevents
from acctd.model import Limits
from acctd.shortages import Shortages
from acctd.watched import Watched
from collectors.memory import MemoryReader

_GUARDIAN_EVERY = 5.0  # s
_V1_LIMIT = "memory.limit_in_bytes"


class Alarms(Shortages):
    """For one event loop: between start() and close() nobody needs to call hear()."""

    _again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Hear from now on. Call it inside the running event loop."""
        self._errands = Errands(self._trouble)
        asyncio.get_running_loop().add_reader(self.fileno(), self._listen)
        self._errands.begin(self._look_after_guardian())

    def close(self) -> None:
        """Hear no more, as Shortages.close()."""
        if self._again is not None:
            self._again.cancel()
        asyncio.get_running_loop().remove_reader(self.fileno())
        self._errands.close()
        super().close()

    async def _look_after_guardian(self) -> None:
        """One that could not be started, or died too often, is tried again."""
        while True:
            await asyncio.sleep(_GUARDIAN_EVERY)
            self._guardian_speaks()

    def take_over(self, job: Job) -> None:
        """Listen to a job that another agent had. Raises as listen() does.

        One that died while it pushed the job back has left it with a low limit.
        """
        memory, limits = job.cgroups.directory("memory"), job.spec.limits
        if job.row.parent is not None and limits.soft is not None and memory is not None and memory.has(_V1_LIMIT):
            pushed, meant = Limits(memory=limits.soft), Limits(memory=limits.hard)
            change(job.cgroups, pushed, meant, reclaim=True)
        # Read before it is listened to: what befell it while no agent lived is told from its counters.
        self._agent.take(job, MemoryReader)
        self.listen(job)

    def _hear_thresholds(self, watched: Watched) -> None:
        if watched.usage is not None:
            self._ears.drop(watched.usage.fileno())
            watched.usage.close()
            watched.usage = None
        if watched.memory.v1 and watched.limit is not None and watched.job.spec.oom.thresholds:
            self._errands.begin(self._register(watched, watched.limit), watched.job)

    async def _register(self, watched: Watched, limit: int) -> None:
        """v1: have the kernel tell. It waits for all its readers at each threshold, 12 ms as seen: not on the loop."""
        thresholds = [limit * percent // 100 for percent in watched.job.spec.oom.thresholds]
        try:
            usage = await asyncio.to_thread(memevents.usage_thresholds, watched.memory.directory, thresholds)
        except KernelRefusedError:
            if self._watched.get(watched.job.row.seq) is watched:
                raise
            return  # its cgroup was being removed
        if usage is None:
            return
        if self._watched.get(watched.job.row.seq) is not watched or watched.limit != limit or watched.usage is not None:
            usage.close()  # it has gone meanwhile, or has another limit
            return
        watched.usage = usage
        self._ears.add(usage.fileno(), usage.events, lambda: self._crossed(watched))

    def _crossed(self, watched: Watched) -> None:
        try:
            if watched.usage is not None and watched.usage.clear() and watched.memory.directory.exists():
                self._warn(watched, watched.memory.held())
                self._said_too_much(watched, watched.usage)
                self._under_pressure(watched.job)
        except (AcctdError, OSError) as e:
            self._trouble(watched.job, e)

    def _under_pressure(self, job: Job) -> None:
        """Push those families back that are over their soft limits, before the job reaches its own limit (v1)."""
        held = {each.spec.id: each for each in self._agent.held.values()}
        for inner in family.below(held, job):
            if (soft := inner.spec.limits.soft) is not None:
                self._errands.begin(self._push_back(inner, soft), inner)

    async def _push_back(self, job: Job, soft: int) -> None:
        if (directory := job.cgroups.directory("memory")) is None:
            return
        seq, kernel = job.row.seq, job.spec.oom.action == "kernel"
        if seq in self.pushed:
            return
        self.pushed.add(seq)
        try:
            if kernel:  # its tasks may have to wait for a moment: not without somebody who sees to that
                self.guard.watch(job.spec.id, directory.path, job.spec.oom.deadline)
            freed = await asyncio.to_thread(push_back, directory, soft)  # beside the loop: swapping takes its time
        finally:
            self.pushed.discard(seq)
            if kernel:
                self.guard.forget(job.spec.id)
        if freed:
            self._tell(job, "memory", f"pushed back by {freed} bytes towards its soft limit of {soft} bytes")

    def _listen(self) -> None:
        """Something is to be heard; or it is time to listen again to a job that said too much."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        self.hear()
        if (due := self.due()) is not None:
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(max(0.0, due - time.monotonic()), self._listen)
