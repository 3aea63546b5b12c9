"""The process at the other end of a connection, as the kernel knows it, and what follows from that alone."""

import grp
import os
import pwd
from dataclasses import dataclass

from acctd.errors import NotPermittedError, UsageError
from acctd.job import Job
from acctd.kernel import procs


@dataclass(frozen=True, slots=True)
class Caller:
    """A peer by SO_PEERCRED, which the kernel fills in and nobody can forge. unix(7)."""

    pid: int
    uid: int
    gid: int
    process: str  # procs.identity of the pid when it connected

    def owns(self, job: Job) -> bool:
        """Whether the job is the caller's, or the caller is root."""
        return self.uid in (0, job.spec.owner.uid)

    def must_own(self, job: Job) -> None:
        """Raises NotPermittedError unless the caller owns the job."""
        if not self.owns(job):
            raise NotPermittedError(f"job {job.spec.id!r} is not yours (uid {self.uid}); ask its owner or root")

    def must_live(self) -> None:
        """Raises NotPermittedError once the process has ended that connected: what goes on with its connection may be
        inside another job, or in none.
        """
        if not procs.is_alive(self.process):
            raise NotPermittedError(f"pid {self.pid}, which made this connection, has ended; connect again")

    def meant(self, pid: int | None) -> int:
        """The process that the caller means by a pid; itself by none.

        Raises UsageError from inside another PID namespace, whose numbers are other processes' out here.
        """
        if pid is None:
            return self.pid
        if not procs.shares_pids(self.pid):
            raise UsageError(
                f"pid {pid}: you are in a PID namespace of your own, whose numbers mean others here; leave it out"
            )
        return pid

    def must_be_root(self, what: str) -> None:
        """Raises NotPermittedError unless the caller is root."""
        if self.uid != 0:
            raise NotPermittedError(f"only root may {what} (you are uid {self.uid})")

    def names(self) -> tuple[str, set[str]]:
        """The account's name and its groups' names; numbers where there is none."""
        try:
            name = pwd.getpwuid(self.uid).pw_name
            gids = set(os.getgrouplist(name, self.gid))
        except KeyError:
            name, gids = str(self.uid), {self.gid}
        return name, {_group(gid) for gid in gids}


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
