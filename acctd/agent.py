"""The composition root: the one place that knows cgroups, network, collectors, meter and ledger, and their order.

A job is made, polled and finished here, step by step, with the intent in the ledger before the kernel is changed. What
is shown to a user, and how a command is started, is not this room's business.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

from acctd import family, ledgers, mending, readers, scratch, statement
from acctd.cgroup import cpus
from acctd.cgroup.change import change
from acctd.cgroup.driver import arm_block_counters
from acctd.cgroup.layout import Layout, discover
from acctd.config import Config
from acctd.errors import AcctdError, InUseError, KernelRefusedError, NotPermittedError, UsageError
from acctd.job import Ending, Job, boottime, hold, lingering
from acctd.kernel import conntrack, filelock, private, procs, rtnetlink
from acctd.ledger import FILE
from acctd.meter import State, add
from acctd.model import JobSpec, Limits, Record
from acctd.network import host, pipe, pool
from acctd.network.backend import Chains, Pools
from acctd.network.probe import choose
from acctd.rows import Place, Terms, encode_row
from collectors.blkio import BlkioReader, OwnBlkioReader
from collectors.nfs import NfsHost, NfsReader

_LOCK_PATIENCE = 30.0  # s


class Agent:
    """One acctd process's hold on this node. Use as a context manager."""

    def __init__(self, config: Config, *, lasting: bool = False) -> None:
        """`lasting`: for an agent that holds the node's jobs, which rather begins a new ledger than go without one."""
        if os.geteuid() != 0:
            raise NotPermittedError("acctd needs root to make cgroups and network namespaces; run as root or by sudo")
        self.config = config
        for directory in (config.state_dir, config.runtime_dir, config.runtime_dir / "netns"):
            private.make(directory)
        self.trouble: list[str] = []
        """What could not be cleaned up so far, one sentence each."""
        self.trash = scratch.Trash(self.trouble.append, wait=not lasting)
        if lasting:
            self.trash.empty(config.isolation.scratch_dir)
        self.ledger = ledgers.opened(config.state_dir / FILE, self.trouble, lasting=lasting)
        self.layout: Layout = discover(config.cgroup.controllers)
        self.pools = Pools(config.network.pool4, config.network.pool6 if host.has_ipv6() else None)
        self.keeper = procs.identity(os.getpid())
        self.boot_id = procs.boot_id()
        self.held: dict[int, Job] = {}
        """The jobs that this process holds, by seq."""
        self._chains: dict[tuple[str, Pools], Chains] = {}
        self.unrecovered = False
        """Whether something that a dead acctd left could not be dealt with yet; recover() tries again."""
        self.leftovers: list[Job] = []
        """Signed-off jobs that could not be removed from the kernel yet; clear_up() tries again."""
        self.cleared: list[Job] = []
        """Those that could be removed since; whoever tells of it takes them out."""
        self._armed: dict[str, str] = {}  # disk -> serial number
        self.nfs = NfsHost()
        """What the jobs' NFS readers share."""
        self.after_reading: Callable[[Job], None] = lambda _: None
        """Called with each job that has been read: shortages.py looks at what only a reading tells."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for chains in {id(chains): chains for chains in self._chains.values()}.values():
            chains.close()
        self.nfs.close()
        self.ledger.close()

    def reconfigure(self, config: Config) -> None:
        """Another configuration for the jobs to come; those there are keep what they were made with."""
        self.layout = discover(config.cgroup.controllers)
        self.pools = Pools(config.network.pool4, config.network.pool6 if host.has_ipv6() else None)
        for chains in {id(chains): chains for chains in self._chains.values()}.values():
            chains.close()
        self._chains.clear()
        for job in self.held.values():
            job.chains = None
        self.config = config

    # Making a job

    def create(self, spec: JobSpec, parent: Job | None = None, terms: Terms | None = None) -> Job:
        """Lease, cgroups, pipe and chain for a job; on failure nothing of it is left. A family lies in its parent."""
        nat = spec.network == "nat"
        chains = self._backend(self.config.network.backend, self.pools) if nat else None
        if parent is not None:
            base, controllers = f"{parent.cgroups.base}/{parent.cgroups.name}", parent.row.place.controllers
        else:
            base, controllers = self.config.cgroup.base, self.config.cgroup.controllers
        place = Place(base, controllers=controllers)
        if chains is not None:
            place = replace(place, backend=chains.name, pool4=str(self.pools.v4), pool6=str(self.pools.v6 or ""))
        layout = parent.cgroups.layout if parent else self.layout
        cores = cpus.chooser(spec.limits.linear, layout, base) if spec.limits.linear else None
        if spec.isolation.scratch:
            place = replace(place, scratch=scratch.choose(self.config.isolation.scratch_dir, spec.id))
        row = self.ledger.open_job(
            spec,
            place,
            slots=pool.slots(self.pools) if nat else None,
            boot_id=self.boot_id,
            boot_ns=boottime(),
            keeper=self.keeper,
            parent=parent.row.seq if parent else None,
            terms=terms,
            cores=cores,
        )
        job = hold(row, layout)
        try:
            self._refuse_what_is_taken(job)
            job.cgroups.create(spec.limits, row.place.cpus, row.place.mems)
            # All that the ledger knows, for the day when there is no ledger.
            job.cgroups.describe(encode_row(row))
            if place.scratch:
                scratch.make(place.scratch, spec.owner, len(spec.isolation.scratch))
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
            readers.open_for(job, self.nfs)
            if parent is not None and not parent.row.terms.families:
                self.expect_families(parent)
        except BaseException:
            self.abandon(job)
            raise
        self.held[row.seq] = job
        return job

    def begin(self, job: Job, at: int | None = None) -> None:
        """The command is about to run, or runs since `at` (CLOCK_BOOTTIME, ns): the job will have a record.

        Called on both sides of the start: whoever dies between them leaves a job that may have run, and is billed.
        """
        job.begin(boottime() if at is None else at)
        self.ledger.begin(job.row.seq, job.row.boot_ns, job.row.terms)
        if at is not None:
            self.take(job, NfsReader)  # where the mounts stand that were there before it

    def set_limits(self, job: Job, limits: Limits, *, reclaim: bool) -> None:
        """Change what a living job may use, in the kernel and in the ledger; or nothing. The job is read first.

        Raises as change() does, and LedgerError.
        """
        old = job.spec.limits
        if limits.cpuset != old.cpuset and (limits.linear is not None or old.linear is not None):
            raise UsageError(
                f"cpuset {limits.cpuset!r}: linear:N cannot be changed while the job is there; finish it first"
            )
        self._meter(job)  # and nothing more: whoever reacts to a shortage, which a reading may tell, raises the limit
        change(job.cgroups, old, limits, reclaim=reclaim)
        row = replace(job.row, spec=replace(job.spec, limits=limits))
        job.integrals.reserve(limits, row.place.cpus, job.clock(boottime()))
        try:
            self.ledger.set_spec(row.seq, row.spec, job.account)
        except BaseException:
            job.integrals.reserve(old, row.place.cpus, job.clock(boottime()))
            change(job.cgroups, limits, old, reclaim=True)
            raise
        job.row = row
        # What it had reserved before is known by nothing else.
        account = replace(row.account, integrals=job.integrals.sums())
        job.cgroups.describe(encode_row(replace(row, account=account)))

    def fold(self, job: Job, parent: Job) -> None:
        """Move a family's processes into its parent. Raises KernelRefusedError where they fork faster than that.

        One that waits in OOM is woken first, by taking the limit away: out of its cgroup nobody would wake it.
        """
        limits = job.spec.limits
        none = replace(limits, memory=None, memory_soft=None, swap=None, memory_policy="custom")
        change(job.cgroups, limits, none, reclaim=False)
        job.cgroups.fold_into(parent.cgroups)

    def abandon(self, job: Job, patience: float = 10.0) -> None:
        """Undo a job that never ran: no record, nothing left. What cannot be removed is left to recover()."""
        self.held.pop(job.row.seq, None)
        try:
            if survivors := job.cgroups.kill(patience):
                raise KernelRefusedError(f"SIGKILL does not end job {job.spec.id}: {lingering(survivors)}")
            self.take_pipe(job)
            self.dismantle(job)
        except BaseException:
            self.unrecovered = True
            job.close()
            raise

    # Reading

    def poll(self, jobs: list[Job]) -> None:
        """Read every job once and meter it: the counter files of each, and one dump of all chains of a back end.

        Chains that another program has damaged are mended.
        """
        samples = {chains: chains.read() for chains in self.backends(jobs)}
        for job in jobs:
            if (chains := self.chains_of(job)) is not None and job.plan is not None:
                job.take_sample(samples[chains].get(job.plan.chain))
            self.take(job)
        self.mend(jobs)

    def backends(self, jobs: Iterable[Job]) -> set[Chains]:
        """Those that some jobs have their chains in."""
        return {chains for job in jobs if (chains := self.chains_of(job)) is not None}

    def chains_of(self, job: Job) -> Chains | None:
        """The back end that holds a job's chain; None where it has none, had it before the last boot, or lost it."""
        if job.chains is None and job.pools is not None and job.row.boot_id == self.boot_id:
            try:
                job.chains = self._backend(job.row.place.backend or "", job.pools)
            except AcctdError as e:
                job.note(f"its chain cannot be reached ({e}); network bytes since its last reading are missing")
        return job.chains

    def take(self, job: Job, kind: type[object] = object) -> None:
        """Meter one job's counter files, or what one kind of reader reads. What cannot be read is noted."""
        self._meter(job, kind)
        self.after_reading(job)

    def _meter(self, job: Job, kind: type[object] = object) -> None:
        at = job.clock(boottime())
        for reader in job.readers:
            if not isinstance(reader, kind):
                continue
            try:
                changes = reader.changes()
            except (AcctdError, OSError) as e:
                job.note(f"a reading failed ({e}); what it would have shown may be missing")
                continue
            for readings in changes:
                job.feed(readings, at)
                if isinstance(reader, BlkioReader | OwnBlkioReader):
                    job.find_stacked(readings)
        if kind is object and job.row.phase == "running" and job.row.boot_id == self.boot_id:
            job.integrals.show(job.meter.totals, at)
            if at >= job.midnight:
                job.keep_midnight(at, self._with_families(job))

    def _with_families(self, job: Job) -> State:
        """A job's totals with those of the families inside it, as in its record: each as it was read last."""
        inside = [other for other in family.below(self.held, job) if other not in self.leftovers]
        return family.totals(job, inside)

    def read_one(self, job: Job) -> None:
        """Meter one job by itself, chain included."""
        if (chains := self.chains_of(job)) is not None and job.plan is not None:
            try:
                job.take_sample(chains.read(job.plan.chain).get(job.plan.chain))
            except (AcctdError, OSError) as e:
                job.note(f"the job's chain could not be read ({e}); network bytes since the last reading are missing")
        self.take(job)

    def store(self, jobs: Iterable[Job]) -> None:
        """Put the accounts so far into the ledger, as far as they have changed."""
        changed = [job for job in jobs if job.unstored]
        if changed:
            midnights = [(job.row.seq, each) for job in changed for each in job.midnights[job.midnights_stored :]]
            accounts = [(job.row.seq, job.account) for job in changed]
            self.ledger.store(accounts, self.keeper, boottime(), midnights)
        for job in changed:
            job.unstored, job.midnights_stored = False, len(job.midnights)

    def mend(self, jobs: Iterable[Job]) -> list[tuple[Job, str]]:
        """Mend the chains that other programs have damaged; the jobs, and what befell each. See mending.py."""
        by_backend: dict[Chains, list[Job]] = {}
        for job in jobs:
            if (chains := self.chains_of(job)) is not None:
                by_backend.setdefault(chains, []).append(job)
        return [
            each
            for chains, mine in by_backend.items()
            for each in mending.mend(chains, mine, self._network_lock, self.store)
        ]

    # Finishing

    def finish(self, job: Job, ending: Ending, patience: float = 10.0) -> Record:
        """End, read for the last time, sign off, dismantle: in this order, so that no byte is missed.

        Processes that cannot be killed within `patience` seconds are named in the record's notes. What cannot be
        removed is named in `self.trouble`, and stays for recover(): the record is good all the same. Raises LedgerError
        where the record cannot be committed: then nothing is dismantled, and finish() may be called again.
        """
        record = self.last_reading(job, ending, patience)
        self.sign_off(job, record)
        return record

    def last_reading(self, job: Job, ending: Ending, patience: float = 10.0) -> Record:
        """End the job and read it for the last time; the record is not yet committed."""
        job.until = ending.at
        self.take(job, NfsReader)  # holds the mount namespaces that its processes are in, to be read when they are gone
        if survivors := job.cgroups.kill(patience):
            job.note(f"SIGKILL did not end all of it, and what goes on is not counted: {lingering(survivors)}")
        passed = rtnetlink.link_bytes(job.lease.ifname) if job.lease else None
        self.take_pipe(job)
        self.read_one(job)
        if job.damage is not None:
            job.note(f"{job.damage} by another program; {mending.bound(job, passed)} of the job are not counted")
        return self.record(job, ending)

    def sign_off(self, job: Job, record: Record, patience: float = 2.0) -> None:
        """Commit the record, tell the parent, and remove what is left in the kernel. Raises LedgerError.

        Cgroups that stay busy for `patience` seconds are left to clear_up().
        """
        # A family that ended meanwhile may have told only now what it used.
        record = replace(record, totals=statement.totals(job))
        names = job.apart if job.row.parent is not None else ()
        inside = {name: record.totals[name] for name in names if name in record.totals}
        new = self.ledger.sign_off(job.row.seq, record, inside)
        if new and job.row.parent is not None and (parent := self.held.get(job.row.parent)) is not None:
            parent.families, parent.unstored = add(parent.families, inside), True
        try:
            self.dismantle(job, patience)
        except (AcctdError, OSError) as e:
            self.trouble.append(f"job {job.spec.id}: {e}")
            self.leftovers.append(job)

    def clear_up(self) -> None:
        """Try again to remove what could not be removed."""
        for job in list(self.leftovers):
            try:
                job.cgroups.kill(0.0)
                self.take_pipe(job)
                self.dismantle(job, 0.0)
            except (AcctdError, OSError):
                continue  # said when it failed first
            self.leftovers.remove(job)
            self.cleared.append(job)

    # Parts

    def _backend(self, wanted: str, pools: Pools) -> Chains:
        """The back end of a name, or the one that "auto" leads to, for these pools; made once."""
        if (wanted, pools) not in self._chains:
            chosen = choose(wanted, pools)
            self._chains[wanted, pools] = self._chains.setdefault((chosen.name, pools), chosen)
        return self._chains[wanted, pools]

    def netns(self, job: Job) -> Path:
        """Where the job's network namespace has its name."""
        return self.config.runtime_dir / "netns" / job.spec.id

    def _lay_pipe(self, job: Job) -> None:
        if job.lease is None or job.plan is None or job.pools is None:
            raise AcctdError(f"job {job.spec.id} has no lease")
        job.chains = chains = self._backend(job.row.place.backend or "", job.pools)
        host.enable_forwarding(ipv6=job.lease.inner6 is not None)
        # The chain first: no packet of the job can pass uncounted.
        with self._network_lock():
            host.keep_in(job.pools)
            chains.add(job.plan)
        job.namespace = pipe.make(self.netns(job), job.lease)

    @contextmanager
    def inside(self, job: Job) -> Iterator[int]:
        """A descriptor of the job's network namespace; an adopted job has it by its name only."""
        if job.namespace is not None:
            yield job.namespace
            return
        namespace = os.open(self.netns(job), os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield namespace
        finally:
            os.close(namespace)

    def move_pipe(self, job: Job, pid: int, uid: int) -> None:
        """Lead the job's pipe into the network namespace of a process of `uid`; raises as pipe.move does."""
        namespace = pipe.move(self.netns(job), job.lease, pid=pid, uid=uid)
        job.leave_namespace()
        os.close(namespace)

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
        if job.lease is not None and not beside and job.pools and (taken := host.overlap(job.pools)):
            raise InUseError(f"network.pool4 or pool6 overlaps this host's own {taken}; choose another network")
        others = {place.pool4 for place in beside} - {job.row.place.pool4}
        if job.lease is not None and others:
            raise InUseError(
                f"network.pool4 is {job.row.place.pool4} now, but jobs of the pool {others.pop()} are still open; "
                "finish them first, or set it back"
            )

    def take_pipe(self, job: Job) -> None:
        """Remove the job's namespace and pipe; nothing of it can reach its chain any more. Nothing there is fine."""
        job.leave_namespace()
        pipe.remove(self.netns(job), job.lease.ifname if job.lease else None)

    def dismantle(self, job: Job, patience: float = 2.0) -> None:
        """After the record: chain, connections, cgroups, and last the lease."""
        job.close()
        if job.plan is not None and job.lease is not None and job.pools is not None and job.row.place.backend:
            # Connections first: closing a netfilter socket just after a chain's removal takes some 10 ms.
            conntrack.forget(job.lease.inner)
            with self._network_lock():
                self._backend(job.row.place.backend, job.pools).remove(job.plan)
                if not self.ledger.leases_beside(job.row):
                    host.let_go(job.pools)
        # Nobody is kept waiting for what SIGKILL has not ended.
        if not job.cgroups.remove(patience if not job.cgroups.living() else 0.0):
            raise KernelRefusedError(f"its cgroups are still busy: {lingering(job.cgroups.living())}")
        if job.row.place.scratch:
            self.trash.take(job.row.place.scratch)
        self.ledger.forget(job.row.seq)
        self.held.pop(job.row.seq, None)

    def _network_lock(self) -> AbstractContextManager[None]:
        """One acctd at a time changes the shared parts of the ruleset. ExhaustedError if that takes too long."""
        return filelock.held(f"{self.config.runtime_dir}/network.lock", patience=_LOCK_PATIENCE)

    def _count_block_io(self) -> None:
        """Arm v1's block counters on disks that this process has not armed yet."""
        disks = procs.disks()
        if new := sorted(disk for disk, serial in disks.items() if self._armed.get(disk) != serial):
            arm_block_counters(self.layout, self.config.cgroup.base, new)
        self._armed = disks

    def expect_families(self, job: Job) -> None:
        """Read a job from now on so that its own counts have no family's, which are added to them.

        v1 sums block I/O over the cgroups that are there; when an ended one leaves the sum, nobody is told.
        """
        self.take(job)
        terms = replace(job.row.terms, families=True)
        self.ledger.set_terms(job.row.seq, terms)
        job.row = replace(job.row, terms=terms)
        for reader in job.readers:
            reader.close()
        job.readers.clear()
        readers.open_for(job, self.nfs)
        self.take(job, NfsReader)

    def record(self, job: Job, ending: Ending) -> Record:
        """Its account as of the last reading."""
        # After a reboot the clock it began on is gone; what it had been up to then was stored.
        end = (ending.at or boottime()) if job.row.boot_id == self.boot_id else job.row.seen_ns
        return statement.record(job, ending, end)
