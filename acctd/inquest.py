"""What is put on record when the memory of a job has run out: evidence, and one sentence for its owner.

Looks at a job's cgroup and its processes. Hears of nothing and does nothing about it; that is shortages.py's.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from acctd.cgroup import evidence
from acctd.cgroup.memory import JobMemory
from acctd.guard import Deed
from acctd.job import Job
from acctd.kernel import procs
from acctd.policies import OomLevel, Shortage
from acctd.wording import sentence


def examine(
    job: Job,
    *,
    action: str,
    host: bool = False,
    kills: int = 0,
    budget: float = 0.004,
    said: Mapping[str, float] | None = None,
) -> Shortage:
    """A shortage of this job's own memory, or of the node's: what is in use now, and by whom.

    The processes are looked at for `budget` seconds; those of families count. `said` is what else the sentence is to
    say: see wording.sentence().
    """
    directory = job.cgroups.directory("memory")
    memory = evidence.breakdown(directory) if directory else None
    found = evidence.largest(job.cgroups.members(), budget=budget)
    limits = job.spec.limits
    # Not the sum of the kinds, which the kernel lets be some MB behind.
    usage = JobMemory(directory, directory).usage() if directory and memory is not None else None
    shortage = Shortage(
        time=time.time(),
        level="host" if host else "job",
        whose=None if host else job.spec.id,
        action=action,
        limit=limits.hard,
        usage=usage,
        kills=kills,
        memory=memory,
        processes=found.processes,
        waited=(said or {}).get("waited"),
    )
    said = dict(said or {}) | {"unseen": found.unseen}
    return replace(shortage, text=_sentence(job, shortage, said))


def released(job: Job, deed: Deed) -> Shortage:
    """What a guardian let go. By now the kernel has killed; who was large before that is not known any more."""
    waited = re.search(r"for ([0-9.]+) s", deed.text)
    shortage = Shortage(
        *(deed.time, "job", job.spec.id, "released", job.spec.limits.hard, None),
        waited=float(waited[1]) if waited else None,
    )
    return replace(shortage, text=_sentence(job, shortage, {}))


def with_kills(job: Job, shortage: Shortage, kills: int) -> Shortage:
    """The same, with so many processes killed for it by the kernel, of this job."""
    counted = replace(shortage, kills=kills)
    return replace(counted, text=_sentence(job, counted, {}))


def facts(job: Job, shortage: Shortage) -> dict[str, object]:
    """What the site's program is told of it."""
    spec = job.spec
    return {
        "node": os.uname().nodename,
        "job": spec.id,
        "owner": spec.owner.name,
        "uid": spec.owner.uid,
        "parent": spec.parent,
        "tags": dict(spec.tags),
        "ceiling": spec.oom.ceiling,
        "deadline": spec.oom.deadline,
        "available": procs.meminfo().get("MemAvailable"),
        "time": shortage.time,
        "limit": shortage.limit,
        "usage": shortage.usage,
        "memory": shortage.memory,
        "processes": shortage.processes,
    }


def told_to(job: Job, shortage: Shortage, level: OomLevel, kills: int = 0) -> Shortage:
    """What another job's record says of it: one that this happened inside of, or one that was inside."""
    seen = replace(shortage, level=level, processes=(), memory=None, kills=kills)
    return replace(seen, text=_sentence(job, seen, {}))


def above(held: Mapping[int, Job], job: Job) -> Iterator[Job]:
    """The jobs that a family is inside of, the nearest first."""
    parent = job.row.parent
    while parent is not None and parent in held:
        yield held[parent]
        parent = held[parent].row.parent


def tell_around(held: Mapping[int, Job], job: Job, shortage: Shortage) -> list[Job]:
    """Put it on record with the jobs above, and those inside that ended with it, as what it is to them; gives those."""
    told = []
    for outer in above(held, job):
        outer.ran_out(told_to(outer, shortage, "family"))
        told.append(outer)
    if shortage.action in ("killed", "held"):
        for inner in held.values():
            if any(place is job for place in above(held, inner)):
                inner.ran_out(told_to(inner, shortage, "parent"))
                told.append(inner)
    return told


def _sentence(job: Job, shortage: Shortage, said: Mapping[str, float]) -> str:
    limits = job.spec.limits
    own = shortage.level == "job"
    return sentence(
        job.spec.id,
        shortage,
        own_limit=None if own else limits.hard,
        swap=limits.swap if own else None,
        raised_to=int(said["raised_to"]) if "raised_to" in said else None,
        unseen=int(said.get("unseen", 0)),
    )
