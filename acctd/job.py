"""A job that this process holds: its row in the ledger, and what is open for it. No order of things is decided here."""

import os
import time
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network

from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import Layout
from acctd.integrals import RESIDENT, Integrals
from acctd.kernel import procs
from acctd.meter import Meter, State
from acctd.metrics import BLOCK, NETWORK_BYTES, NETWORK_PACKETS, NFS, Readings
from acctd.midnights import billed, following
from acctd.model import JobSpec, Midnight, chain_name
from acctd.network import pool
from acctd.network.backend import ChainPlan, Chains, Counts, Pools, Sample
from acctd.policies import Shortage
from acctd.rows import Account, OpenJob, Place
from collectors.blkio import BlkioReader, OwnBlkioReader
from collectors.cpu import CpuReader
from collectors.memory import MemoryReader
from collectors.nfs import NfsReader
from collectors.pids import PidsReader
from collectors.pressure import PressureReader

NETWORK = (NETWORK_BYTES, NETWORK_PACKETS)
"""The metrics that a job's chain counts."""

SHORTAGES = 20
"""Kept of one job: a limit that grows in small steps, or a server whose workers are killed, could have any number."""

_EXPLAINED = 5  # processes that do not die

NETWORK_NAMES = tuple(metric.name for metric in NETWORK)
BLOCK_NAMES = tuple(metric.name for metric in BLOCK)
NFS_NAMES = tuple(metric.name for metric in NFS)

Reader = BlkioReader | OwnBlkioReader | CpuReader | MemoryReader | NfsReader | PidsReader | PressureReader


@dataclass(frozen=True, slots=True)
class Ending:
    """How and when the job's main process ended; all None where nobody saw it."""

    exit_code: int | None = None
    exit_signal: int | None = None
    at: int | None = None  # CLOCK_BOOTTIME, ns

    @classmethod
    def now(cls, code: int) -> "Ending":
        """An exit status, or -n after signal n, seen this moment."""
        return cls(exit_code=code, at=boottime()) if code >= 0 else cls(exit_signal=-code, at=boottime())


@dataclass(slots=True)
class Job:
    """A job that the agent holds."""

    row: OpenJob
    cgroups: JobCgroups
    meter: Meter
    integrals: Integrals
    lease: pool.Lease | None = None
    pools: Pools | None = None  # those of the lease
    plan: ChainPlan | None = None  # what its chain is made from; None without a pipe
    chains: Chains | None = None  # the back end that holds its chain, once it was asked for
    families: State = field(default_factory=dict)  # see ledger.Account
    namespace: int | None = None
    readers: list[Reader] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shortages: list[Shortage] = field(default_factory=list)  # the first and the newest
    shortages_dropped: int = 0
    kills_told: int = 0  # see Account
    midnights: list[Midnight] = field(default_factory=list)  # oldest first
    midnights_stored: int = 0  # of these, how many the ledger has
    midnight: int = 0  # CLOCK_BOOTTIME of the next one, ns
    until: int | None = None  # CLOCK_BOOTTIME, ns: what is read later is of this time; None while it goes on
    stacked: dict[str, bool] = field(default_factory=dict)  # block device -> whether it lies on another one
    incarnation: str | None = None  # of its chain, as of the last reading; None before the first
    damage: str | None = None  # what another program did to its chain, until that is mended
    counts: Counts | None = None  # of its chain, as they were metered last
    unstored: bool = True  # something was metered or noted since the ledger was told

    @property
    def spec(self) -> JobSpec:
        return self.row.spec

    @property
    def account(self) -> Account:
        """What the ledger is to know of it."""
        return Account(
            *(self.meter.stored(), self.incarnation, tuple(self.notes), self.stacked, self.families),
            *(tuple(self.shortages), self.shortages_dropped, self.kills_told, self.integrals.sums()),
        )

    @property
    def apart(self) -> tuple[str, ...]:
        """The metrics whose counts its parent has not in its own: a chain's, NFS and v1's block I/O; see readers.py."""
        blkio = self.cgroups.layout.of("blkio")
        return NETWORK_NAMES + NFS_NAMES + (BLOCK_NAMES if blkio is not None and blkio.version == 1 else ())

    def note(self, sentence: str) -> None:
        """Say something about this account, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            self.unstored = True

    def ran_out(self, shortage: Shortage) -> None:
        """Keep evidence of a shortage of memory; of many the first and the newest."""
        self.shortages.append(shortage)
        if len(self.shortages) > SHORTAGES:
            del self.shortages[1]
            self.shortages_dropped += 1
        self.unstored = True

    def begin(self, at: int) -> None:
        """It runs since then (CLOCK_BOOTTIME, ns); its stamp moves there from when it was made, as in the ledger."""
        created = self.row.created + (at - self.row.boot_ns) / 1e9
        self.row = replace(self.row, phase="running", boot_ns=at, created=created)
        self.integrals.begin(at)
        self.midnight = at + following(self.row.created, 0)

    def feed(self, readings: Readings, at: int) -> None:
        """Meter what was read at a time (CLOCK_BOOTTIME, ns)."""
        self.unstored = True
        if (resident := readings.get(RESIDENT)) is not None:
            self.integrals.hold(resident, at)
        self.meter.feed(readings)

    def clock(self, now: int) -> int:
        """A time (CLOCK_BOOTTIME, ns), or the job's end where it had ended before."""
        end = self.until or self.row.terms.ended_ns
        return now if end is None or now < end else end

    def keep_midnight(self, at: int, totals: State) -> None:
        """It was read on another day than before, for the first time."""
        row = self.row
        self.midnights.append(Midnight(at - row.boot_ns, billed(totals)))
        self.midnight = row.boot_ns + following(row.created, at - row.boot_ns)
        self.unstored = True

    def take_sample(self, sample: Sample | None) -> None:
        """Meter a reading of its chain, unless that is not the one read before: see mending.py."""
        if self.damage is not None:
            return
        if sample is None:
            self.damage = "its chain was removed"
        elif self.incarnation not in (None, sample.incarnation):
            self.damage = "its chain was replaced"
        elif self._stands_lower(sample.counts):
            self.damage = "its counters were set back"
        else:
            self.incarnation = sample.incarnation
            self._feed(sample.counts)

    def take_last(self, sample: Sample) -> None:
        """Meter the last counts of its chain, which another program has just removed."""
        if self.incarnation in (None, sample.incarnation):
            self.take_sample(sample)
            self.damage = self.damage or "its chain was removed"

    def _feed(self, counts: Counts) -> None:
        """Meter what its chain counts."""
        if counts == self.counts:
            return
        self.counts, self.unstored = counts, True
        readings: Readings = {}
        for rule, count in counts.items():
            readings[NETWORK_BYTES, rule] = count.bytes
            readings[NETWORK_PACKETS, rule] = count.packets
        self.meter.feed(readings)

    def _stands_lower(self, counts: Counts) -> bool:
        """Whether the chain stands lower than when it was read last, which no counter does by itself."""
        if counts == self.counts:
            return False
        return any(
            counts[rule].bytes < value for (_, rule), value in self.meter.last(NETWORK[:1]).items() if rule in counts
        )

    def find_stacked(self, readings: Readings) -> None:
        """Whether a device lies on another one, asked when it first shows up: a loop device may be gone at the end."""
        for _, device in readings:
            if device not in self.stacked:
                self.stacked[device] = procs.lies_on_others(device)

    def close(self) -> None:
        """Give descriptors back. The job itself goes on."""
        for reader in self.readers:
            reader.close()
        self.readers.clear()
        self.leave_namespace()

    def leave_namespace(self) -> None:
        """Give the descriptor of its network namespace back; it can be had by its name."""
        if self.namespace is not None:
            os.close(self.namespace)
            self.namespace = None


def hold(row: OpenJob, layout: Layout) -> Job:
    """What a row of the ledger stands for; nothing of it is opened yet."""
    account, meter = row.account, Meter.restore(row.account.meter)
    resident, last = meter.totals.get(RESIDENT), row.midnights[-1].ns if row.midnights else 0
    job = Job(
        *(row, JobCgroups(layout, row.place.base, cgroup_name(row.spec.id)), meter),
        Integrals(row.boot_ns, row.spec.limits, row.place.cpus, account.integrals, resident),
        families=account.families,
        notes=list(account.notes),
        shortages=list(account.shortages),
        shortages_dropped=account.shortages_dropped,
        kills_told=account.kills_told,
        stacked=dict(account.stacked),
        incarnation=account.incarnation,
        midnights=list(row.midnights),
        midnights_stored=len(row.midnights),
        midnight=row.boot_ns + following(row.created, last),
    )
    if row.slot is not None:
        job.pools = pools(row.place)
        job.lease = lease = pool.lease(job.pools, row.slot)
        chain, ipv6 = chain_name(row.spec.id), lease.inner6 is not None
        job.plan = ChainPlan(chain, lease.ifname, row.spec.classes, ipv6, tuple(lease.inner))
    return job


def cgroup_name(job: str) -> str:
    """The directory of a job, below its base."""
    return f"job_{job}"


def pools(place: Place) -> Pools:
    """The address pools that a job was made with."""
    return Pools(IPv4Network(place.pool4), IPv6Network(place.pool6) if place.pool6 else None)


def boottime() -> int:
    """ns since boot, suspension included; no step of the wall clock touches it."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def lingering(pids: set[int]) -> str:
    """Processes that do not die, and what each waits for, for a sentence; of many the first five."""
    found = [str(why) for pid in sorted(pids)[:_EXPLAINED] if (why := procs.stuck(pid)) is not None]
    if len(pids) > _EXPLAINED:
        found.append(f"{len(pids) - _EXPLAINED} more processes")
    return "; ".join(found) or "processes that are just ending"
