"""The composition root: the one place that knows cgroups, network, collectors, meter and ledger, and their order.

A job is made, polled and finished here, step by step, with the intent in the ledger before the kernel is changed. What
is shown to a user, and how a command is started, is not this room's business.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Self

from acctd.cgroup.driver import JobCgroups, arm_block_counters, sweep_sentinels
from acctd.cgroup.layout import Layout, discover
from acctd.config import Config
from acctd.errors import AcctdError, InUseError, KernelRefusedError, NotPermittedError
from acctd.kernel import conntrack, filelock, private, procs, rtnetlink
from acctd.ledger import FILE, Ledger, OpenJob, Place
from acctd.meter import Meter
from acctd.metrics import (
    CPU_SYSTEM,
    CPU_USER,
    NETWORK_BYTES,
    NETWORK_PACKETS,
    Readings,
)
from acctd.model import JobSpec, Record, chain_name
from acctd.network import host, pipe, pool
from acctd.network.backend import ChainPlan, Chains, Counts, Pools, Sample
from acctd.network.probe import choose
from collectors.blkio import BlkioReader
from collectors.cpu import CpuReader
from collectors.memory import MemoryReader
from collectors.pids import PidsReader
from collectors.pressure import PressureReader

_LOCK_PATIENCE = 30.0  # s

Reader = BlkioReader | CpuReader | MemoryReader | PidsReader | PressureReader


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
    """A job that the agent holds: its row in the ledger, and what is open for it."""

    row: OpenJob
    cgroups: JobCgroups
    lease: pool.Lease | None
    namespace: int | None = None
    meter: Meter = field(default_factory=Meter)
    readers: list[Reader] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stacked: dict[str, bool] = field(default_factory=dict)  # block device -> whether it lies on another one

    def note(self, sentence: str) -> None:
        """Say something about this account, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    @property
    def spec(self) -> JobSpec:
        return self.row.spec

    def close(self) -> None:
        """Give descriptors back. The job itself goes on."""
        for reader in self.readers:
            reader.close()
        self.readers.clear()
        if self.namespace is not None:
            os.close(self.namespace)
            self.namespace = None


class Agent:
    """One acctd process's hold on this node. Use as a context manager."""

    def __init__(self, config: Config) -> None:
        if os.geteuid() != 0:
            raise NotPermittedError("acctd needs root to make cgroups and network namespaces; run as root or by sudo")
        self.config = config
        for directory in (config.state_dir, config.runtime_dir, config.runtime_dir / "netns"):
            private.make(directory)
        self._open = ExitStack()
        self.ledger = self._open.enter_context(Ledger(config.state_dir / FILE))
        self.layout: Layout = discover(config.cgroup.controllers)
        self.pools = Pools(config.network.pool4, config.network.pool6 if host.has_ipv6() else None)
        self._keeper = procs.identity(os.getpid())
        self._boot_id = procs.boot_id()
        self._chains: dict[tuple[str, Pools], Chains] = {}
        self.trouble: list[str] = []
        """What could not be cleaned up so far, one sentence each; recover() tries again."""
        self._armed: dict[str, str] = {}  # disk -> serial number

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for chains in {id(chains): chains for chains in self._chains.values()}.values():
            chains.close()
        self._open.close()

    def reconfigure(self, config: Config) -> None:
        """Another configuration for the jobs to come; those there are keep what they were made with."""
        self.layout = discover(config.cgroup.controllers)
        self.pools = Pools(config.network.pool4, config.network.pool6 if host.has_ipv6() else None)
        for chains in {id(chains): chains for chains in self._chains.values()}.values():
            chains.close()
        self._chains.clear()
        self.config = config

    # Making a job

    def create(self, spec: JobSpec) -> Job:
        """Lease, cgroups, pipe and chain for a job; on failure nothing of it is left."""
        nat = spec.network == "nat"
        chains = self._backend(self.config.network.backend, self.pools) if nat else None
        place = Place(self.config.cgroup.base)
        if chains is not None:
            place = replace(place, backend=chains.name, pool4=str(self.pools.v4), pool6=str(self.pools.v6 or ""))
        row = self.ledger.open_job(
            spec,
            place,
            slots=pool.slots(self.pools) if nat else None,
            boot_id=self._boot_id,
            boot_ns=boottime(),
            keeper=self._keeper,
        )
        job = _hold(row, self.layout)
        try:
            self._refuse_what_is_taken(job)
            job.cgroups.create(spec.limits)
        except InUseError:
            # Somebody else's: abandon() would take it from them.
            self.ledger.forget(row.seq)
            raise
        except BaseException:
            self.abandon(job)
            raise
        try:
            if nat:
                self._lay_pipe(job)
            elif spec.network == "none":
                job.namespace = pipe.make_empty(self.netns(job))
            self._count_block_io()
            self._open_readers(job)
        except BaseException:
            self.abandon(job)
            raise
        return job

    def begin(self, job: Job, at: int | None = None) -> None:
        """The command is about to run, or runs since `at` (CLOCK_BOOTTIME, ns): the job will have a record.

        Called on both sides of the start: whoever dies between them leaves a job that may have run, and is billed.
        """
        job.row = replace(job.row, phase="running", boot_ns=boottime() if at is None else at)
        self.ledger.begin(job.row.seq, job.row.boot_ns)

    def abandon(self, job: Job) -> None:
        """Undo a job that never ran: no record, nothing left."""
        if survivors := job.cgroups.kill():
            raise KernelRefusedError(f"processes {_listed(survivors)} of job {job.spec.id} do not die on SIGKILL")
        self._take_pipe(job)
        self._dismantle(job)

    # Reading

    def poll(self, jobs: list[Job]) -> None:
        """Read every job once and meter it: the counter files of each, and one dump of all chains of a back end."""
        places = {job.row.place for job in jobs if job.row.place.backend is not None}
        dumps = {place: self.read_chains(place) for place in places}
        for job in jobs:
            self.take(job, dumps.get(job.row.place))

    def read_chains(self, place: Place) -> dict[str, Sample]:
        """All jobs' chains of one back end, in one dump."""
        return self._chains_of(place).read()

    def take(self, job: Job, chains: dict[str, Sample] | None) -> None:
        """Meter one job: its counter files now, and its chain as of a dump. What cannot be read is noted."""
        for reader in job.readers:
            try:
                changes = reader.changes()
            except (AcctdError, OSError) as e:
                job.note(f"a reading failed ({e}); what it would have shown may be missing")
                continue
            for readings in changes:
                job.meter.feed(readings)
                if isinstance(reader, BlkioReader):
                    _find_stacked(job, readings)
        if chains is not None:
            self._take_counts(job, chains.get(chain_name(job.spec.id)))

    def read_one(self, job: Job) -> None:
        """Meter one job by itself, chain included."""
        chains: dict[str, Sample] | None = None
        if job.row.place.backend is not None:
            try:
                chains = self._chains_of(job.row.place).read(chain_name(job.spec.id))
            except (AcctdError, OSError) as e:
                job.note(f"the job's chain could not be read ({e}); network bytes since the last reading are missing")
        self.take(job, chains)

    def _take_counts(self, job: Job, sample: Sample | None) -> None:
        if sample is not None:
            _feed_counts(job, sample.counts)
        elif job.row.boot_id == self._boot_id:
            job.note("its chain was removed by another program; network bytes since the last reading are missing")

    def store(self, job: Job) -> None:
        """Put the totals so far into the ledger."""
        self.ledger.store_totals(job.row.seq, *job.meter.state(), boottime())

    # Finishing

    def finish(self, job: Job, ending: Ending, patience: float = 10.0) -> Record:
        """End, read for the last time, sign off, dismantle: in this order, so that no byte is missed.

        Processes that cannot be killed within `patience` seconds are named in the record's notes. What cannot be
        removed is named in `self.trouble`, and stays for recover(): the record is good all the same.
        """
        if survivors := job.cgroups.kill(patience):
            job.notes.append(f"processes {_listed(survivors)} did not die on SIGKILL and are not fully accounted for")
        self._take_pipe(job)
        self.read_one(job)
        record = self._record(job, ending)
        self.ledger.sign_off(job.row.seq, record)
        try:
            self._dismantle(job)
        except AcctdError as e:
            self.trouble.append(f"job {job.spec.id}: {e}")
        return record

    # Putting right what others left

    def recover(self, adopt: Callable[[Job], None] | None = None) -> list[Record]:
        """Finish the jobs whose keeper died and whose processes are gone; undo half-made ones.

        Living jobs are let be, or given to `adopt`, held open and ours from then on.

        Returns the records written. Trouble with one job goes to `self.trouble` and does not keep another from being
        dealt with.
        """
        written: list[Record] = []
        # Every controller of the host: a job may be from before one was taken out of the configuration.
        layout = discover()
        sweep_sentinels(self.layout, self.config.cgroup.base)
        for row in self.ledger.open_jobs():
            if procs.is_alive(row.keeper) and row.boot_id == self._boot_id:
                continue
            try:
                record = self._recover_one(row, layout, adopt)
                if record is not None:
                    written.append(record)
            except (AcctdError, OSError) as e:
                self.trouble.append(f"job {row.spec.id}, whose acctd had died: {e}")
        return written

    def _recover_one(self, seen: OpenJob, layout: Layout, adopt: Callable[[Job], None] | None) -> Record | None:
        if adopt is None and seen.phase == "running" and self._lives(_hold(seen, layout)):
            return None
        row = self.ledger.claim(seen, self._keeper)
        if row is None:
            return None  # somebody else deals with it
        # From here on the row as it is now: its keeper may have done more before it died.
        job = _hold(row, layout)
        alive = self._lives(job)
        if alive and adopt is None and row.phase == "running":
            return None  # we do not stay; the next one finds our claim dead
        if row.phase == "making":
            self.abandon(job)
            return None
        if row.phase == "closed":
            job.cgroups.kill()
            self._take_pipe(job)
            self._dismantle(job)
            return None
        if row.boot_id == self._boot_id:
            self._open_readers(job)
        if alive and adopt is not None:
            adopt(job)
            return None
        if row.boot_id == self._boot_id:
            job.note(
                "whoever watched this job died before it ended; its exit status is unknown, and its wall time ends "
                "when it was found to have ended"
            )
        else:
            job.note("the node rebooted while this job ran; totals and wall time are those stored last")
        return self.finish(job, Ending())

    # Parts

    def _lives(self, job: Job) -> bool:
        """Whether processes of the job are left; after a reboot those of its cgroup's name are not its own."""
        return job.row.boot_id == self._boot_id and bool(job.cgroups.living())

    def _backend(self, wanted: str, pools: Pools) -> Chains:
        """The back end of a name, or the one that "auto" leads to, for these pools; made once."""
        if (wanted, pools) not in self._chains:
            chosen = choose(wanted, pools)
            self._chains[wanted, pools] = self._chains.setdefault((chosen.name, pools), chosen)
        return self._chains[wanted, pools]

    def _chains_of(self, place: Place) -> Chains:
        return self._backend(place.backend or "", _pools(place))

    def netns(self, job: Job) -> Path:
        """Where the job's network namespace has its name."""
        return self.config.runtime_dir / "netns" / job.spec.id

    def _plan(self, job: Job) -> ChainPlan | None:
        if job.lease is None:
            return None
        ipv6 = job.lease.inner6 is not None
        return ChainPlan(chain_name(job.spec.id), job.lease.ifname, job.spec.classes, ipv6, tuple(job.lease.inner))

    def _lay_pipe(self, job: Job) -> None:
        plan = self._plan(job)
        if job.lease is None or plan is None or job.row.place.backend is None:
            raise AcctdError(f"job {job.spec.id} has no lease")
        host.enable_forwarding(ipv6=job.lease.inner6 is not None)
        # The chain first: no packet of the job can pass uncounted.
        with self._network_lock():
            host.keep_in(_pools(job.row.place))
            self._chains_of(job.row.place).add(plan)
        job.namespace = pipe.make(self.netns(job), job.lease)

    def _refuse_what_is_taken(self, job: Job) -> None:
        """Raise InUseError for a name that is somebody else's, before anything of ours is made over it."""
        if job.lease is not None and rtnetlink.link_index(job.lease.ifname) is not None:
            raise InUseError(
                f"link {job.lease.ifname} exists already; see that no other acctd, with another state_dir, "
                f"uses network.pool4 {self.pools.v4} here"
            )
        if self.netns(job).exists():
            raise InUseError(
                f"network namespace {self.netns(job)} exists already; choose another id than {job.spec.id}"
            )
        beside = self.ledger.leases_beside(job.row)
        if job.lease is not None and not beside and (taken := host.overlap(_pools(job.row.place))):
            raise InUseError(f"network.pool4 or pool6 overlaps this host's own {taken}; choose another network")
        others = {place.pool4 for place in beside} - {job.row.place.pool4}
        if job.lease is not None and others:
            raise InUseError(
                f"network.pool4 is {job.row.place.pool4} now, but jobs of the pool {others.pop()} are still open; "
                "finish them first, or set it back"
            )

    def _take_pipe(self, job: Job) -> None:
        if job.namespace is not None:
            os.close(job.namespace)
            job.namespace = None
        pipe.remove(self.netns(job), job.lease.ifname if job.lease else None)

    def _dismantle(self, job: Job) -> None:
        """After the record: chain, connections, cgroups, and last the lease."""
        job.close()
        plan = self._plan(job)
        if plan is not None and job.lease is not None and job.row.place.backend is not None:
            # Connections first: closing a netfilter socket just after a chain's removal takes some 10 ms.
            conntrack.forget(job.lease.inner)
            with self._network_lock():
                self._chains_of(job.row.place).remove(plan)
                if not self.ledger.leases_beside(job.row):
                    host.let_go(_pools(job.row.place))
        if not job.cgroups.remove():
            raise KernelRefusedError(
                f"its cgroups are still busy with {_listed(job.cgroups.living()) or 'exiting tasks'}"
            )
        self.ledger.forget(job.row.seq)

    def _network_lock(self) -> AbstractContextManager[None]:
        """One acctd at a time changes the shared parts of the ruleset. ExhaustedError if that takes too long."""
        return filelock.held(f"{self.config.runtime_dir}/network.lock", patience=_LOCK_PATIENCE)

    def _count_block_io(self) -> None:
        """Arm v1's block counters on disks that this process has not armed yet."""
        disks = procs.disks()
        if new := sorted(disk for disk, serial in disks.items() if self._armed.get(disk) != serial):
            arm_block_counters(self.layout, self.config.cgroup.base, new)
        self._armed = disks

    def _open_readers(self, job: Job) -> None:
        directory = job.cgroups.directory
        if memory := directory("memory"):
            job.readers.append(MemoryReader(memory))
        # Where v2 is mounted too, its cpu.stat has the kernel's own exact split of user and system time; v1 samples it.
        unified = job.cgroups.unified
        cpuacct = unified if unified and unified.has("cpu.stat") else directory("cpuacct")
        if cpu := directory("cpu") or cpuacct:
            last = job.meter.last((CPU_USER, CPU_SYSTEM))
            job.readers.append(CpuReader(cpu=cpu, cpuacct=cpuacct or cpu, last=last))
        if blkio := directory("blkio"):
            job.readers.append(BlkioReader(blkio))
        if pids := directory("pids"):
            job.readers.append(PidsReader(pids))
        if unified:
            job.readers.append(PressureReader(unified))

    def _record(self, job: Job, ending: Ending) -> Record:
        row = job.row
        # After a reboot the clock it began on is gone; what it had been up to then was stored.
        end = (ending.at or boottime()) if row.boot_id == self._boot_id else row.seen_ns
        return Record(
            id=row.spec.id,
            owner=row.spec.owner.name,
            uid=row.spec.owner.uid,
            node=socket.gethostname(),
            state="lost" if ending.at is None else "done",
            started=row.created,
            ended=time.time(),
            wall_ns=max(0, end - row.boot_ns),
            exit_code=ending.exit_code,
            exit_signal=ending.exit_signal,
            network=row.spec.network,
            limits=row.spec.limits,
            tags=dict(row.spec.tags),
            totals=job.meter.published(),
            stacked=tuple(sorted(device for device, stacked in job.stacked.items() if stacked)),
            notes=tuple(job.notes),
        )


def with_default_classes(spec: JobSpec, config: Config) -> JobSpec:
    """The configured classes, with those that the job names itself put in their place by name."""
    own = {cls.name for cls in spec.classes}
    return replace(spec, classes=(*spec.classes, *(cls for cls in config.network.classes if cls.name not in own)))


def _hold(row: OpenJob, layout: Layout) -> Job:
    """What a row of the ledger stands for; nothing of it is opened yet."""
    cgroups = JobCgroups(layout, row.place.base, f"job_{row.spec.id}")
    lease = pool.lease(_pools(row.place), row.slot) if row.slot is not None else None
    return Job(row, cgroups, lease, meter=Meter.restore(row.totals, row.kept))


def _find_stacked(job: Job, readings: Readings) -> None:
    """Whether a device lies on another one, asked when it first shows up: a loop device may be gone at the end."""
    for _, device in readings:
        if device not in job.stacked:
            job.stacked[device] = procs.lies_on_others(device)


def _pools(place: Place) -> Pools:
    return Pools(IPv4Network(place.pool4), IPv6Network(place.pool6) if place.pool6 else None)


def _feed_counts(job: Job, counts: Counts) -> None:
    readings: Readings = {}
    for rule, count in counts.items():
        readings[NETWORK_BYTES, rule] = count.bytes
        readings[NETWORK_PACKETS, rule] = count.packets
    job.meter.feed(readings)


def boottime() -> int:
    """ns since boot, suspension included; no step of the wall clock touches it."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _listed(pids: set[int]) -> str:
    return ", ".join(map(str, sorted(pids)))
