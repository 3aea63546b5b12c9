"""Families in families: which jobs lie inside which, what they used together, and which job a process is in.

Pure functions over the jobs that are held. A parent's cgroups count its families' CPU and memory by themselves, and on
v2 their block I/O; what v1 counts of block I/O, and a chain of a family's own, is added here, once.
"""

import re
from collections.abc import Iterable, Mapping

from acctd.job import Job
from acctd.meter import State, add

_JOB = re.compile(r"/job_([^/]+)")


def below(jobs: Mapping[str, Job] | Mapping[int, Job], job: Job) -> list[Job]:
    """The families inside a job, at any depth, those first that have none inside themselves."""
    children: dict[int, list[Job]] = {}
    for other in jobs.values():
        if other.row.parent is not None:
            children.setdefault(other.row.parent, []).append(other)
    found: list[Job] = []
    waiting = [job]
    while waiting:
        inside = children.get(waiting.pop().row.seq, [])
        found += inside
        waiting += inside
    return found[::-1]


def above(held: Mapping[int, Job], job: Job) -> list[Job]:
    """The jobs that a family lies inside of, the nearest first."""
    found: list[Job] = []
    while job.row.parent is not None and job.row.parent in held:
        job = held[job.row.parent]
        found.append(job)
    return found


def living(jobs: Mapping[str, Job], job: Job) -> set[int]:
    """The job's processes; where it has none, those of the families inside it, with which it goes on."""
    found = job.cgroups.living()
    return found or {pid for inner in below(jobs, job) for pid in inner.cgroups.living()}


def totals(job: Job, families: Iterable[Job]) -> State:
    """A job's totals with those of the families below it, living and ended."""
    inside = [job.families]
    for family in families:
        own = family.meter.now()
        inside += [{name: own[name] for name in family.apart if name in own}, family.families]
    return add(job.meter.now(), *inside)


def innermost(jobs: Mapping[str, Job], cgroups: Iterable[str], roots: Iterable[str]) -> Job | None:
    """The job that a process is in, by the paths in its /proc/PID/cgroup; of nested ones the innermost.

    `roots` as mountinfo.cgroup_roots: a user may have a subtree of its own, with directories that are named like ours.
    """
    places = tuple(roots)
    best: Job | None = None
    for path in cgroups:
        for match in _JOB.finditer(path):
            job = jobs.get(match.group(1))
            if job is None:
                continue
            inside = f"/{job.cgroups.base}/{job.cgroups.name}/"
            if not any(f"{path}/".startswith(root + inside) for root in places):
                continue
            if best is None or len(job.cgroups.base) > len(best.cgroups.base):
                best = job
    return best


def is_inside(job: Job, other: Job) -> bool:
    """Whether a job is the other one, or lies below it."""
    where = f"{other.cgroups.base}/{other.cgroups.name}"
    return job is other or job.cgroups.base == where or job.cgroups.base.startswith(f"{where}/")
