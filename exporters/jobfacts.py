"""What grids want to know of a job, out of its signed record: once for all their formats, in native units.

Who a user is to a grid, a node cannot know: a job's tags say so, in any case, under HTCondor's names or shorter ones.
No format is known here; each rounds at its own edge.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from acctd.errors import AcctdError
from acctd.frames import tag
from acctd.integrals import cores_asked
from acctd.metrics import CPU_SYSTEM, CPU_USER, MEMORY_PEAK, MEMORY_RESIDENT_PEAK, MEMORY_SWAP_PEAK
from acctd.model import Record

USER_TAGS = ("dn", "x509userproxysubject")
FQAN_TAGS = ("fqan", "x509userproxyfirstfqan")
VO_TAGS = ("vo", "x509userproxyvoname")
QUEUE_TAGS = ("queue",)
SUBMIT_HOST_TAGS = ("submithost", "submit_host")
"""The first that a job has is taken."""

_LAST_SECOND = 253402300799  # of the year 9999, the last that a time stamp can name


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """One job, or one node's part of one."""

    id: str
    node: str
    owner: str
    account: str | None
    user: str | None  # the grid's name of the owner, like /DC=org/CN=Ada
    fqan: str | None  # what the owner acts as, like /atlas/Role=production
    vo: str | None
    queue: str | None
    submit_host: str | None
    scheduler: str | None
    started_us: int  # since the epoch
    ended_us: int  # since the epoch: the start and the wall time, not the clock at the end
    wall_ns: int
    cpu_ns: int  # user and system
    cores: int | None  # asked for, a part of one counts as one; None where the job asked for none
    resident: int | None  # bytes, highest sampled anonymous and shared memory
    charged: int | None  # bytes, the kernel's peak of all charged memory, page cache included
    swapped: int | None  # bytes, highest sampled

    @classmethod
    def of(cls, record: Record) -> Self:
        """Raises AcctdError for a record whose times are beyond the year 9999 or before 1970."""
        last = _LAST_SECOND - record.wall_ns // 10**9
        if not (math.isfinite(record.started) and 0 <= record.started < last):
            raise AcctdError(
                f"the record of job {record.id!r} says that it started {record.started} s after 1970 and took "
                f"{record.wall_ns} ns, which no date can say; see the clock of {record.node}"
            )
        started = round(record.started * 10**6)
        fqan = _tagged(record, FQAN_TAGS)
        return cls(
            id=record.id,
            node=record.node,
            owner=record.owner,
            account=tag(record.tags, "account") or None,
            user=_tagged(record, USER_TAGS),
            fqan=fqan,
            vo=_tagged(record, VO_TAGS) or _vo_of(fqan),
            queue=_tagged(record, QUEUE_TAGS),
            submit_host=_tagged(record, SUBMIT_HOST_TAGS),
            scheduler=tag(record.tags, "scheduler") or None,
            started_us=started,
            ended_us=started + record.wall_ns // 1000,
            wall_ns=record.wall_ns,
            cpu_ns=(_total(record, CPU_USER.name) or 0) + (_total(record, CPU_SYSTEM.name) or 0),
            cores=_cores(record),
            resident=_total(record, MEMORY_RESIDENT_PEAK.name),
            charged=_total(record, MEMORY_PEAK.name),
            swapped=_total(record, MEMORY_SWAP_PEAK.name),
        )

    @property
    def on_a_grid(self) -> bool:
        """Whether somebody outside knows the user; else the job is the site's own."""
        return (self.user or self.fqan or self.vo) is not None


def percent(text: str, unsafe: re.Pattern[str]) -> str:
    """Text with the characters that a format cannot hold written as in a URL."""
    return unsafe.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), text)


def _tagged(record: Record, names: Iterable[str]) -> str | None:
    return next((value for name in names if (value := (tag(record.tags, name) or "").strip())), None)


def _vo_of(fqan: str | None) -> str | None:
    """The first part of /VO/GROUP/Role=ROLE."""
    return fqan.split("/")[1] or None if fqan is not None and fqan.startswith("/") else None


def _total(record: Record, metric: str) -> int | None:
    return record.totals.get(metric, {}).get("")


def _cores(record: Record) -> int | None:
    """Whole ones: neither format has parts."""
    asked = cores_asked(record.limits, record.cpus)
    return math.ceil(asked) if asked is not None else None
