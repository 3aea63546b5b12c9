"""A job's account as a record: of one that ended, of one as of now, and of those that a ledger alone tells of.

Builds and reads; signs nothing, and asks no kernel. A family's reservations and memory are in its parent's own counts,
see integrals.py; what a parent's cgroups and chain do not count of a family is added as family.py says.
"""

import socket
import time
from collections.abc import Mapping
from dataclasses import replace

from acctd import family
from acctd.cgroup.layout import discover
from acctd.job import Ending, Job, hold
from acctd.ledger import Ledger
from acctd.meter import State, add
from acctd.model import Record


def record(job: Job, ending: Ending, end: int) -> Record:
    """Its account as of the last reading, and with all that is summed over time up to `end` (CLOCK_BOOTTIME, ns)."""
    row = job.row
    wall = max(0, end - row.boot_ns)
    job.integrals.show(job.meter.totals, end)
    return Record(
        id=row.spec.id,
        owner=row.spec.owner.name,
        uid=row.spec.owner.uid,
        node=socket.gethostname(),
        state="lost" if ending.exit_code is None and ending.exit_signal is None else "done",
        started=row.created,
        ended=time.time(),
        wall_ns=wall,
        exit_code=ending.exit_code,
        exit_signal=ending.exit_signal,
        network=row.spec.network,
        limits=row.spec.limits,
        tags=dict(row.spec.tags),
        totals=totals(job),
        stacked=tuple(sorted(device for device, stacked in job.stacked.items() if stacked)),
        notes=tuple(job.notes),
        parent=row.spec.parent,
        shortages=tuple(job.shortages),
        shortages_dropped=job.shortages_dropped,
        cpus=row.place.cpus,
        midnights=tuple(midnight for midnight in job.midnights if midnight.ns < wall),
    )


def totals(job: Job) -> State:
    """Counters and peaks of a job whose families have ended."""
    return add(job.meter.published(), job.families)


def so_far(jobs: Mapping[str, Job], job: Job, end: int) -> Record:
    """A record of a living job, with the families inside it. It is final in nothing, and signed by nobody."""
    made = record(job, Ending(), end)
    return replace(made, state="running", totals=family.totals(job, family.below(jobs, job)))


def living(ledger: Ledger) -> list[Record]:
    """The open jobs that have begun, as of their last readings; for when no agent answers. Raises LedgerError.

    They may have ended since. A job that has its record, and waits only to be removed, is not among them.
    """
    jobs = {
        row.spec.id: hold(row, discover(row.place.controllers)) for row in ledger.open_jobs() if row.phase == "running"
    }
    return [so_far(jobs, job, job.row.terms.ended_ns or job.row.seen_ns) for job in jobs.values()]
