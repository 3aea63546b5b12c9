"""One job that is listened to for want of memory: what is known of it, and how it is stopped and let go.

What happens when is shortages.py's.
"""

import time
from dataclasses import dataclass

from acctd.cgroup.memory import JobMemory, Troubles
from acctd.errors import KernelRefusedError
from acctd.guard import Guard
from acctd.job import Job
from acctd.kernel.cgroupfs import CgroupDir
from acctd.kernel.memevents import Ear
from acctd.oomprogram import Asking
from acctd.policies import Shortage

_WAKING = 10.0  # s in which a task that was woken runs, however busy the CPUs are


@dataclass(slots=True)
class Watched:
    """A job, its memory cgroup, and what it is in the middle of."""

    job: Job
    memory: JobMemory
    seen: Troubles  # as of the last look
    out: Ear | None = None  # its memory ran out
    usage: Ear | None = None  # v1: a threshold was crossed
    warned: int = 0  # the highest threshold that was told, percent
    ending: bool = False  # it has had SIGKILL for a shortage; what it says until that is over is of the same one
    loose: bool = False  # the kernel's killer is on, until the job is well below its limit again
    frozen: bool = False  # by us
    last: float = 0.0  # monotonic, of the last shortage
    idle: float = 0.0  # monotonic, when it last said something for nothing
    changed: float = float("-inf")  # monotonic, when its limit was
    asking: Asking | None = None
    asked: Shortage | None = None  # what that is about

    @property
    def limit(self) -> int | None:
        """Bytes; None without one of its own."""
        return self.job.spec.limits.hard

    @property
    def patience(self) -> float:
        """s that the site's program has: a little less than the job may wait, or the guardian would be quicker."""
        deadline = self.job.spec.oom.deadline
        return deadline - min(0.5, deadline / 10)

    def is_waking(self) -> bool:
        """Whether who waits may have been woken by a higher limit: v1 shows a task as waiting until it runs again."""
        recent = time.monotonic() - self.changed < _WAKING
        return recent and self.limit is not None and self.memory.usage() <= self.limit - self.limit // 16

    def ears(self) -> list[Ear]:
        return [ear for ear in (self.out, self.usage) if ear is not None]

    def recent(self, fresh: float) -> int | None:
        """Which of the job's shortages the kernel may just have killed for: the newest at its own limit, if it is not
        older than `fresh` seconds. Not one after which the limit was raised: nobody is killed for that.
        """
        if not self.last or time.monotonic() - self.last > fresh:
            return None
        shortages = self.job.shortages
        index = next((i for i in reversed(range(len(shortages))) if shortages[i].level == "job"), None)
        return index if index is not None and shortages[index].action != "grown" else None

    def freeze(self, guard: Guard) -> None:
        """Stop every process of it, for its deadline at most. A host without a freezer does without, and a job that
        somebody has suspended is left to them. Raises AcctdError and OSError where it must go on.
        """
        if (thawing := self.job.cgroups.thawing()) is None:
            return
        file, value = thawing
        if file.read_text().strip() == value:
            guard.frozen(self.job.spec.id, file, value, deadline=self.job.spec.oom.deadline)
            self._freezer().note_frozen(True)
            self.job.cgroups.freeze()
            self.frozen = True

    def thaw(self, guard: Guard) -> None:
        """Let it go on, if we have stopped it."""
        if self.frozen:
            try:
                self.job.cgroups.thaw()
            except KernelRefusedError:
                if self.memory.directory.exists():
                    raise
            self.leave(guard)

    def take_over(self) -> None:
        """Let it go on, if an acctd that has died had stopped it: what is to be done is decided anew."""
        if self.job.cgroups.thawing() is not None and self._freezer().noted_frozen():
            self.job.cgroups.thaw()
            self._freezer().note_frozen(False)

    def leave(self, guard: Guard) -> None:
        """It is not we any more who have stopped it, if it stands still."""
        self.frozen = False
        if self.job.cgroups.thawing() is not None:
            self._freezer().note_frozen(False)
        guard.thawed(self.job.spec.id)

    def _freezer(self) -> CgroupDir:
        freezer = self.job.cgroups.directory("freezer")
        assert freezer is not None  # noqa: S101  # thawing() has said so
        return freezer
