"""A job as it is shown to those who may see it: whole, as little as ps(1) would show, or as a record of so far.

Plain values for JSON; reads nothing but who is in a job. Who may see what is decided in methods.py.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from acctd import family, statement
from acctd.job import Job, boottime
from acctd.model import Record


def whole(jobs: Mapping[str, Job], job: Job) -> dict[str, Any]:
    """The job as of its last reading, families included. Totals by metric and label."""
    spec = job.spec
    return {
        **sketch(job),
        "limits": msgspec.to_builtins(spec.limits),
        "tags": dict(spec.tags),
        "notes": list(job.notes),
        "shortages": msgspec.to_builtins(job.shortages),
        "totals": family.totals(job, family.below(jobs, job)),
    }


def sketch(job: Job) -> dict[str, Any]:
    """What ps(1) would show of it anyway."""
    row = job.row
    return {
        "id": row.spec.id,
        "parent": row.spec.parent,
        "owner": row.spec.owner.name,
        "uid": row.spec.owner.uid,
        "phase": row.phase,
        "network": row.spec.network,
        "started": row.created,
        "wall_ns": (row.terms.ended_ns or boottime()) - row.boot_ns,
        "pids": sorted(job.cgroups.members()),
        "limits": {},
        "tags": {},
        "notes": [],
        "shortages": [],
        "totals": {},
    }


def interim(jobs: Mapping[str, Job], job: Job) -> Record:
    """A record of the job so far. It is final in nothing, and signed by nobody."""
    return statement.so_far(jobs, job, job.row.terms.ended_ns or boottime())
