"""The calls a peer can make: what each takes, who may make it, and what it answers. Sockets and frames are server.py's.

Root may do all; a user may act on own jobs, and a process inside a job on that one and those inside it. A parameter
that is not as declared is refused by its name before anything happens.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec

from acctd import accounts, enclosure, family, pages, views, wishes
from acctd.caller import Caller
from acctd.config import AccessConfig, with_default_classes
from acctd.daemon import Daemon
from acctd.errors import NotFoundError, NotPermittedError, UsageError
from acctd.job import Ending, Job, lingering
from acctd.kernel import procs
from acctd.model import INT64_MAX, JobSpec, Limits, Record, parse_class
from acctd.rows import Event, Proxy, Rule, Terms
from exporters.classad import format_ad, record_ad

_EVENTS = 1000  # in one answer
_INTERVAL = (0.1, 86400.0)  # s
_LOOKED_UP = 60.0  # s
_USERS_INTERVAL = 5.0  # s; a user may have a hundred jobs


class _Create(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: str
    user: str | None = None
    limits: dict[str, Any] | None = None
    network: str | None = None
    classes: dict[str, list[str]] | None = None
    tags: dict[str, str] | None = None
    parent: str | None = None
    watcher: int | None = None
    interval: float | None = None
    oom: dict[str, Any] | None = None
    isolation: dict[str, Any] | None = None
    requests: dict[str, dict[str, str]] | None = None


class _Register(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: str
    pid: int | None = None
    tags: dict[str, str] | None = None
    parent: str | None = None
    watcher: int | None = None
    interval: float | None = None


class _Track(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: str
    environment: str | None = None
    login: str | None = None
    group: int | None = None


class _OfJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: str


class _Samples(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: str
    started: float


class _SetLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: str
    limits: dict[str, Any]
    reclaim: bool = False


class _Attach(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: str
    pid: int | None = None


class _Signal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: str
    signal: int


class _Finish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: str
    exit_code: int | None = None
    exit_signal: int | None = None


class _Chirp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: str
    host: str
    port: int
    cookie: str


class _Events(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    since: int | None = None
    job: str | None = None
    limit: int | None = None


class _After(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    after: int = 0


class _Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


Answer = dict[str, Any]
Method = Callable[[Caller, Any], Awaitable[Answer]]


class Methods:
    """What org.acctd.Node's methods do for one daemon; `table` has them by name, with the type of their parameters."""

    def __init__(self, daemon: Daemon, *, reload: Callable[[], None], leave: Callable[[], None]) -> None:
        self._daemon = daemon
        self._turns = pages.Turns()
        self._reload, self._leave = reload, leave
        self._readers: dict[tuple[AccessConfig, int, int], tuple[float, bool]] = {}  # until when it is known
        self.table: dict[str, tuple[type[msgspec.Struct], Method]] = {
            "Create": (_Create, self._create),
            "Register": (_Register, self._register),
            "Track": (_Track, self._track),
            "SetLimits": (_SetLimits, self._set_limits),
            "Unregister": (_OfJob, self._unregister),
            "Entry": (_OfJob, self._entry),
            "MovePipe": (_OfJob, self._move_pipe),
            "Attach": (_Attach, self._attach),
            "Usage": (_OfJob, self._usage),
            "List": (_Nothing, self._list),
            "Chirp": (_Chirp, self._chirp),
            "Signal": (_Signal, self._signal),
            "Suspend": (_OfJob, self._suspend),
            "Continue": (_OfJob, self._continue),
            "Kill": (_OfJob, self._kill),
            "Finish": (_Finish, self._finish),
            "Snapshot": (_Nothing, self._snapshot),
            "Events": (_Events, self._events),
            "Records": (_After, self._records),
            "Interim": (_After, self._interim),
            "Samples": (_Samples, self._samples),
            "Cost": (_Nothing, self._cost),
            "Reload": (_Nothing, self._reload_call),
            "Quit": (_Nothing, self._quit),
        }

    # Making and entering

    async def _create(self, caller: Caller, wanted: _Create) -> Answer:
        self._may_make(caller, wanted.parent)
        config = self._daemon.agent.config
        if wanted.user is not None:
            owner = accounts.named(wanted.user).owner
        elif wanted.parent is not None:
            owner = self._daemon.find(wanted.parent).spec.owner
        else:
            owner = accounts.of(caller.uid, caller.gid)
        if caller.uid not in (0, owner.uid):
            raise NotPermittedError(f"only root may create a job for {owner.name} (you are uid {caller.uid})")
        network = wishes.network(wanted.network or ("parent" if wanted.parent is not None else config.network.mode))
        if wanted.parent is not None and network == "host":
            raise UsageError('network "host" is not for a family inside a job; it is one of parent, nat, none')
        spec = JobSpec(
            id=wanted.job,
            owner=owner,
            limits=wishes.limits(
                config.limits if wanted.parent is None else Limits(), wanted.limits or {}, wanted.requests
            ),
            network=network,
            classes=tuple(parse_class(name, cidrs) for name, cidrs in (wanted.classes or {}).items()),
            tags=wanted.tags or {},
            parent=wanted.parent,
            oom=wishes.oom(config, wanted.oom or {}, root=caller.uid == 0),
            isolation=wishes.isolation(config, wanted.isolation or {}),
        )
        terms = _terms(caller, wanted.watcher, wanted.interval)
        job = self._daemon.create(with_default_classes(spec, config), terms)
        netns = self._netns(job)
        return {
            "job": spec.id,
            "netns": netns,
            "address": str(job.lease.inner4) if job.lease else None,
            "cgroups": [str(directory.path) for _, directory in job.cgroups.all()],
        }

    async def _register(self, caller: Caller, wanted: _Register) -> Answer:
        pid = caller.meant(wanted.pid)
        self._may_make(caller, wanted.parent)
        parent = self._daemon.find(wanted.parent) if wanted.parent is not None else None
        self._may_take(caller, pid, parent)
        now = self._daemon.where.job_of(pid)
        if now is not None and parent is None:
            raise UsageError(f"pid {pid} is in job {now.spec.id!r}; name that as the parent, or attach the process")
        spec = JobSpec(
            id=wanted.job,
            owner=parent.spec.owner if parent else accounts.of(caller.uid, caller.gid),
            network="parent" if parent else "host",
            tags=wanted.tags or {},
            parent=wanted.parent,
            oom=self._daemon.agent.config.oom.default,
        )
        job = self._daemon.register(spec, pid, _terms(caller, wanted.watcher, wanted.interval), caller.uid or None)
        return {"job": spec.id, "cgroups": [str(directory.path) for _, directory in job.cgroups.all()]}

    async def _track(self, caller: Caller, wanted: _Track) -> Answer:
        job = self._own(caller, wanted.job)
        if self._daemon.where.job_of(caller.pid) is job:
            raise NotPermittedError(
                f"you are inside job {job.spec.id!r}, which takes nothing from outside; name a family"
            )
        if caller.uid != 0 and wanted.login is not None and accounts.named(wanted.login).owner.uid != caller.uid:
            raise NotPermittedError(f"login {wanted.login!r} is not yours (uid {caller.uid}); name your own")
        rule = Rule(wanted.environment, wanted.login, wanted.group)
        return {"pids": sorted(self._daemon.track(job, rule))}

    async def _set_limits(self, caller: Caller, wanted: _SetLimits) -> Answer:
        job = self._own(caller, wanted.job)
        if caller.uid != 0 and job.row.parent is None:
            raise NotPermittedError(f"the limits of job {job.spec.id!r} are root's to change; yours are its families'")
        new = wishes.limits(job.spec.limits, wanted.limits)
        await self._daemon.set_limits(job, new, reclaim=wanted.reclaim)
        return {"limits": msgspec.to_builtins(new)}

    async def _unregister(self, caller: Caller, wanted: _OfJob) -> Answer:
        try:
            job = self._own(caller, wanted.job)
        except NotFoundError:
            return _signed(self._own_record(caller, wanted.job))
        record = await self._daemon.unregister(job)
        await self._daemon.chirps.settled(job)
        return _signed(record)

    async def _entry(self, caller: Caller, wanted: _OfJob) -> Answer:
        job = self._own(caller, wanted.job)
        owner = job.spec.owner
        try:
            account = accounts.named(str(owner.uid))
        except NotFoundError:
            account = accounts.Account(owner, [owner.gid], {})
        place = self._daemon.network_of(job)
        return {
            "netns": self._netns(place) if place else None,
            "uid": owner.uid,
            "gid": owner.gid,
            "groups": account.groups,
            "environment": account.environment,
            "isolation": enclosure.plan(job.spec.isolation, job.row.place.scratch, self._daemon.agent.config.isolation),
        }

    async def _move_pipe(self, caller: Caller, wanted: _OfJob) -> Answer:
        self._daemon.move_pipe(self._own(caller, wanted.job), caller.pid, caller.uid)
        return {}

    async def _attach(self, caller: Caller, wanted: _Attach) -> Answer:
        job = self._own(caller, wanted.job)
        pid = caller.meant(wanted.pid)
        self._may_take(caller, pid, job)
        if caller.uid != 0 and not self._is_counted(pid, job):
            raise NotPermittedError(
                f"pid {pid} is not in the network of job {job.spec.id!r}, where it would be counted; start it by exec"
            )
        self._daemon.attach(job, pid)
        return {}

    # Reading

    async def _usage(self, caller: Caller, wanted: _OfJob) -> Answer:
        job = self._daemon.find(wanted.job)
        if not caller.owns(job) and not self._reads_all(caller):
            caller.must_own(job)
        self._daemon.read(job)
        record = views.interim(self._daemon.jobs, job)
        return {"job": views.whole(self._daemon.jobs, job), "classad": format_ad(record_ad(record))}

    async def _list(self, caller: Caller, _: _Nothing) -> Answer:
        shown = []
        others, every = self._daemon.agent.config.access.others == "ps", self._reads_all(caller)
        for number, job in enumerate(list(self._daemon.jobs.values())):
            if every or caller.owns(job):
                shown.append(views.whole(self._daemon.jobs, job))
            elif others:
                shown.append(views.sketch(job))
            if number % 20 == 19:
                await asyncio.sleep(0)
        return {"jobs": shown}

    async def _events(self, caller: Caller, wanted: _Events) -> Answer:
        limit = _EVENTS if wanted.limit is None else wanted.limit
        if not 1 <= limit <= _EVENTS:
            raise UsageError(f"limit {limit} is out of range; it takes 1 to {_EVENTS}")
        found: list[Event] = []
        since = wanted.since
        if since is not None and not 0 <= since <= INT64_MAX:
            raise UsageError(f"since {since} is out of range; it takes 0 to {INT64_MAX}")
        while len(found) < limit:
            page = self._daemon.books.read(partial(self._events_page, since, wanted.job))
            found += [event for event in page if self.may_see(caller, event)]
            if since is None or len(page) < _EVENTS:
                break
            since = page[-1].number
            await asyncio.sleep(0)
        found = found[-limit:] if wanted.since is None else found[:limit]
        return {"events": [msgspec.to_builtins(event) for event in found]}

    def _events_page(self, since: int | None, job: str | None) -> list[Event]:
        # Asked anew each time: the ledger may be another one by then.
        return self._daemon.agent.ledger.events(since=since, job=job, limit=_EVENTS)

    def may_see(self, caller: Caller, event: Event) -> bool:
        """Whether an event is about a job of the caller's; root, and who may read all, sees those of the agent, too."""
        return caller.uid == event.uid or self._reads_all(caller)

    async def _records(self, caller: Caller, wanted: _After) -> Answer:
        turn, every = self._turns.of(caller), self._reads_all(caller)
        return await pages.records(self._daemon, caller, wanted.after, turn, every=every)

    async def _interim(self, caller: Caller, wanted: _After) -> Answer:
        turn, every = self._turns.of(caller), self._reads_all(caller)
        return await pages.interim(self._daemon, caller, wanted.after, turn, every=every)

    async def _samples(self, caller: Caller, wanted: _Samples) -> Answer:
        return await pages.samples(self._daemon, caller, wanted.job, wanted.started, every=self._reads_all(caller))

    async def _snapshot(self, caller: Caller, _: _Nothing) -> Answer:
        self._must_rule(caller, "have all jobs read")
        return {"seconds": await self._daemon.snapshot()}

    async def _cost(self, _caller: Caller, _: _Nothing) -> Answer:
        return {"cost": self._daemon.cost.published(len(self._daemon.jobs))}

    # Acting

    async def _signal(self, caller: Caller, wanted: _Signal) -> Answer:
        job = self._own(caller, wanted.job)
        if not 1 <= wanted.signal <= 64:
            raise UsageError(f"signal {wanted.signal} is none; it takes 1 to 64")
        return {"pids": sorted(job.cgroups.signal(wanted.signal))}

    async def _suspend(self, caller: Caller, wanted: _OfJob) -> Answer:
        job = self._own(caller, wanted.job)
        self._daemon.shortages.leave_frozen(job)
        job.cgroups.freeze()
        self._daemon.news.tell(job, "suspended", f"by uid {caller.uid}")
        return {}

    async def _continue(self, caller: Caller, wanted: _OfJob) -> Answer:
        job = self._own(caller, wanted.job)
        job.cgroups.thaw()
        self._daemon.news.tell(job, "continued", f"by uid {caller.uid}")
        return {}

    async def _kill(self, caller: Caller, wanted: _OfJob) -> Answer:
        job = self._own(caller, wanted.job)
        survivors = await self._daemon.kill(job)
        left = f"; SIGKILL did not end all of it: {lingering(survivors)}" if survivors else ""
        self._daemon.news.tell(job, "killed", f"by uid {caller.uid}{left}")
        return {"survivors": sorted(survivors)}

    async def _finish(self, caller: Caller, wanted: _Finish) -> Answer:
        ending = _ending(wanted)
        try:
            job = self._own(caller, wanted.job)
        except NotFoundError:
            return _signed(self._own_record(caller, wanted.job))
        record = await self._daemon.finish(job, ending)
        await self._daemon.chirps.settled(job)
        return _signed(record)

    async def _chirp(self, caller: Caller, wanted: _Chirp) -> Answer:
        self._daemon.chirps.take(self._own(caller, wanted.job), Proxy(wanted.host, wanted.port, wanted.cookie))
        return {}

    async def _reload_call(self, caller: Caller, _: _Nothing) -> Answer:
        self._must_rule(caller, "reload the configuration")
        self._reload()
        return {}

    async def _quit(self, caller: Caller, _: _Nothing) -> Answer:
        self._must_rule(caller, "stop the agent")
        asyncio.get_running_loop().call_soon(self._leave)
        return {}

    # Who may

    def _own(self, caller: Caller, name: str) -> Job:
        """A job that the caller may act on: its own, and if it is inside a job itself, that one or one inside it."""
        job = self._daemon.find(name)
        caller.must_own(job)
        self._must_stay_inside(caller, job)
        return job

    def _must_rule(self, caller: Caller, what: str) -> None:
        """Root, and not from inside a job."""
        caller.must_be_root(what)
        self._must_stay_inside(caller, None)

    def _reads_all(self, caller: Caller) -> bool:
        """Whether the caller is root or one of access.read. Looked up once a minute: that may ask another host."""
        access = self._daemon.agent.config.access
        if caller.uid == 0 or not access.read:
            return caller.uid == 0
        now, key = time.monotonic(), (access, caller.uid, caller.gid)
        if key not in self._readers or self._readers[key][0] < now:
            self._readers = {known: found for known, found in self._readers.items() if found[0] >= now}
            self._readers[key] = now + _LOOKED_UP, access.may_read(*caller.names())
        return self._readers[key][1]

    def _own_record(self, caller: Caller, name: str) -> Record:
        record = self._daemon.record(name)
        if caller.uid not in (0, record.uid):
            raise NotPermittedError(f"job {name!r} is not yours (uid {caller.uid}); ask its owner or root")
        return record

    def _must_stay_inside(self, caller: Caller, job: Job | None) -> None:
        caller.must_live()
        own = self._daemon.where.job_of(caller.pid)
        if own is not None and (job is None or not family.is_inside(job, own)):
            what = f"job {job.spec.id!r} lies outside it" if job else "what you ask for reaches beyond it"
            raise NotPermittedError(f"you are inside job {own.spec.id!r} and {what}; name it or a family inside it")

    def _may_make(self, caller: Caller, parent: str | None) -> None:
        """Whether the caller may make a job: inside one of its own, or anywhere if the configuration lets it."""
        if parent is not None:
            self._own(caller, parent)
        else:
            self._must_stay_inside(caller, None)
        if caller.uid == 0:
            return
        access = self._daemon.agent.config.access
        if parent is None and not access.may_create(*caller.names()):
            raise NotPermittedError(
                f"uid {caller.uid} may not create jobs here; ask root to name it in access.create, or name a parent"
            )
        open_jobs = sum(caller.owns(job) for job in self._daemon.jobs.values())
        if open_jobs >= access.jobs_per_user:
            raise NotPermittedError(
                f"uid {caller.uid} has {open_jobs} open jobs, and access.jobs_per_user is {access.jobs_per_user}; "
                "finish some first"
            )

    def _may_take(self, caller: Caller, pid: int, job: Job | None) -> None:
        """Whether the caller may put a process into a job (None: into one at the top)."""
        if pid <= 1 or pid == os.getpid():
            raise UsageError(f"pid {pid} is no process that a job can have; name another")
        uid = procs.owner(pid)
        if uid is None:
            raise NotFoundError(f"pid {pid} does not exist; name a living process")
        if caller.uid == 0 and self._daemon.where.job_of(caller.pid) is None:
            return
        if caller.uid not in (0, uid):
            raise NotPermittedError(f"pid {pid} is not yours (uid {caller.uid}); name one of your own")
        now = self._daemon.where.job_of(pid)
        if now is not None and (job is None or not family.is_inside(job, now)):
            raise NotPermittedError(f"pid {pid} is in job {now.spec.id!r} already; only root may take it out of there")
        own = self._daemon.where.job_of(caller.pid)
        if own is not None and (now is None or not family.is_inside(now, own)):
            raise NotPermittedError(f"pid {pid} is not inside job {own.spec.id!r} as you are; name one that is")

    def _is_counted(self, pid: int, job: Job) -> bool:
        """Whether a process is in the network that counts for a job, where it has one."""
        place = self._daemon.network_of(job)
        netns = self._netns(place) if place is not None else None
        return netns is None or procs.network(pid) == procs.network_at(netns)

    def _netns(self, job: Job) -> str | None:
        return str(self._daemon.agent.netns(job)) if job.spec.network in ("nat", "none") else None


def _signed(record: Record) -> Answer:
    return {"record": msgspec.to_builtins(record), "classad": format_ad(record_ad(record))}


def _terms(caller: Caller, watcher: int | None, interval: float | None) -> Terms:
    low = _INTERVAL[0] if caller.uid == 0 else _USERS_INTERVAL
    if interval is not None and not low <= interval <= _INTERVAL[1]:
        raise UsageError(f"interval {interval} is out of range; it takes {low:g} to {_INTERVAL[1]:g} seconds")
    if watcher is None:
        return Terms(interval=interval)
    identity = procs.identity(caller.meant(watcher))
    if watcher <= 0 or not procs.is_alive(identity):
        raise NotFoundError(f"watcher {watcher} does not exist; name a living process")
    return Terms(watcher=identity, interval=interval)


def _ending(wanted: _Finish) -> Ending:
    for name, value, high in (("exit_code", wanted.exit_code, 255), ("exit_signal", wanted.exit_signal, 64)):
        if value is not None and not 0 <= value <= high:
            raise UsageError(f"{name} {value} is out of range; it takes 0 to {high}")
    if wanted.exit_signal:
        return Ending.now(-wanted.exit_signal)
    return Ending.now(wanted.exit_code) if wanted.exit_code is not None else Ending()
