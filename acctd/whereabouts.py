"""Which job a process is in, and which processes a job may take by what it tracks. Looks only, moves nobody."""

from collections.abc import Mapping

from acctd import family
from acctd.job import Job
from acctd.kernel import mountinfo, procs
from acctd.tracking import Survey


class Whereabouts:
    """Of the processes of this host, among the jobs that are held."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self._jobs = jobs
        self._roots = mountinfo.cgroup_roots()

    def job_of(self, pid: int) -> Job | None:
        """The job that a process is in; of nested ones the innermost."""
        return family.innermost(self._jobs, procs.cgroups(pid), self._roots)

    def to_take(self, job: Job, survey: Survey) -> set[int]:
        """The pids that a job's rules name, less those that are where it may not take them from."""
        owner = job.spec.owner.uid
        found = survey.find(job.row.terms.rules, owner if owner != 0 else None)
        return {pid for pid in found if self._may_come_from(self.job_of(pid), job)}

    def _may_come_from(self, place: Job | None, job: Job) -> bool:
        """Whether a job may take what it tracks from there: a family from the jobs above it, others from outside."""
        if job.row.parent is None:
            return place is None
        return place is not None and place is not job and family.is_inside(job, place)
