"""The calls a peer can make: what each takes, who may make it, and what it answers. Sockets and frames are server.py's.

Root may do all; a user may act on own jobs. A parameter that is not as declared is refused by its name before anything
happens.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast, get_args

import msgspec

from acctd import accounts
from acctd.agent import Ending, Job, with_default_classes
from acctd.daemon import Daemon
from acctd.errors import NotFoundError, NotPermittedError, UsageError
from acctd.kernel import procs
from acctd.model import JobSpec, Limits, NetworkMode, parse_class
from exporters.classad import format_ad, record_ad


@dataclass(frozen=True, slots=True)
class Caller:
    """The process at the other end, as the kernel knows it."""

    pid: int
    uid: int
    gid: int

    def must_own(self, job: Job) -> None:
        """Raises NotPermittedError unless the job is the caller's, or the caller is root."""
        if self.uid not in (0, job.spec.owner.uid):
            raise NotPermittedError(f"job {job.spec.id!r} is not yours (uid {self.uid}); ask its owner or root")

    def must_be_root(self, what: str) -> None:
        """Raises NotPermittedError unless the caller is root."""
        if self.uid != 0:
            raise NotPermittedError(f"only root may {what} (you are uid {self.uid})")


class _Create(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: str
    user: str | None = None
    limits: dict[str, Any] | None = None
    network: str | None = None
    classes: dict[str, list[str]] | None = None
    tags: dict[str, str] | None = None


class _OfJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: str


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


class _Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


Answer = dict[str, Any]
Method = Callable[[Caller, Any], Awaitable[Answer]]


class Methods:
    """What org.acctd.Node's methods do for one daemon; `table` has them by name, with the type of their parameters."""

    def __init__(self, daemon: Daemon, *, reload: Callable[[], None], leave: Callable[[], None]) -> None:
        self._daemon = daemon
        self._reload, self._leave = reload, leave
        self.table: dict[str, tuple[type[msgspec.Struct], Method]] = {
            "Create": (_Create, self._create),
            "Entry": (_OfJob, self._entry),
            "Attach": (_Attach, self._attach),
            "Usage": (_OfJob, self._usage),
            "List": (_Nothing, self._list),
            "Signal": (_Signal, self._signal),
            "Suspend": (_OfJob, self._suspend),
            "Continue": (_OfJob, self._continue),
            "Kill": (_OfJob, self._kill),
            "Finish": (_Finish, self._finish),
            "Snapshot": (_Nothing, self._snapshot),
            "Cost": (_Nothing, self._cost),
            "Reload": (_Nothing, self._reload_call),
            "Quit": (_Nothing, self._quit),
        }

    async def _create(self, caller: Caller, wanted: _Create) -> Answer:
        caller.must_be_root("create a job")
        config = self._daemon.agent.config
        spec = JobSpec(
            id=wanted.job,
            owner=accounts.named(wanted.user).owner if wanted.user is not None else accounts.of(caller.uid, caller.gid),
            limits=_limits(config.limits, wanted.limits or {}),
            network=_network(wanted.network or config.network.mode),
            classes=tuple(parse_class(name, cidrs) for name, cidrs in (wanted.classes or {}).items()),
            tags=wanted.tags or {},
        )
        job = self._daemon.create(with_default_classes(spec, config))
        return {
            "job": spec.id,
            "netns": str(self._daemon.agent.netns(job)) if job.spec.network != "host" else None,
            "address": str(job.lease.inner4) if job.lease else None,
            "cgroups": [str(directory.path) for _, directory in job.cgroups.all()],
        }

    async def _entry(self, caller: Caller, wanted: _OfJob) -> Answer:
        job = self._own(caller, wanted.job)
        owner = job.spec.owner
        try:
            account = accounts.named(str(owner.uid))
        except NotFoundError:
            account = accounts.Account(owner, [owner.gid], {})
        return {
            "netns": str(self._daemon.agent.netns(job)) if job.spec.network != "host" else None,
            "uid": owner.uid,
            "gid": owner.gid,
            "groups": account.groups,
            "environment": account.environment,
        }

    async def _attach(self, caller: Caller, wanted: _Attach) -> Answer:
        job = self._own(caller, wanted.job)
        pid = caller.pid if wanted.pid is None else wanted.pid
        if caller.uid != 0 and procs.owner(pid) != caller.uid:
            raise NotPermittedError(f"pid {pid} is not yours (uid {caller.uid}); name one of your own")
        self._daemon.attach(job, pid)
        return {}

    async def _usage(self, caller: Caller, wanted: _OfJob) -> Answer:
        return {"job": self._daemon.usage(self._own(caller, wanted.job))}

    async def _list(self, caller: Caller, _: _Nothing) -> Answer:
        jobs = self._daemon.jobs.values()
        return {"jobs": [self._daemon.describe(job) for job in jobs if caller.uid in (0, job.spec.owner.uid)]}

    async def _signal(self, caller: Caller, wanted: _Signal) -> Answer:
        job = self._own(caller, wanted.job)
        if not 1 <= wanted.signal <= 64:
            raise UsageError(f"signal {wanted.signal} is none; it takes 1 to 64")
        return {"pids": sorted(job.cgroups.signal(wanted.signal))}

    async def _suspend(self, caller: Caller, wanted: _OfJob) -> Answer:
        self._own(caller, wanted.job).cgroups.freeze()
        self._daemon.tell(wanted.job, "suspended", f"by uid {caller.uid}")
        return {}

    async def _continue(self, caller: Caller, wanted: _OfJob) -> Answer:
        self._own(caller, wanted.job).cgroups.thaw()
        self._daemon.tell(wanted.job, "continued", f"by uid {caller.uid}")
        return {}

    async def _kill(self, caller: Caller, wanted: _OfJob) -> Answer:
        survivors = await self._daemon.kill(self._own(caller, wanted.job))
        self._daemon.tell(wanted.job, "killed", f"by uid {caller.uid}")
        return {"survivors": sorted(survivors)}

    async def _finish(self, caller: Caller, wanted: _Finish) -> Answer:
        try:
            job = self._own(caller, wanted.job)
        except NotFoundError:
            record = self._daemon.agent.ledger.record(wanted.job)
            if caller.uid not in (0, record.uid):
                raise NotPermittedError(f"job {wanted.job!r} is not yours (uid {caller.uid}); ask its owner") from None
        else:
            record = await self._daemon.finish(job, _ending(wanted))
        return {"record": msgspec.to_builtins(record), "classad": format_ad(record_ad(record))}

    async def _snapshot(self, caller: Caller, _: _Nothing) -> Answer:
        caller.must_be_root("have all jobs read")
        return {"seconds": await self._daemon.tick()}

    async def _cost(self, _caller: Caller, _: _Nothing) -> Answer:
        return {"cost": self._daemon.cost.published(len(self._daemon.jobs))}

    async def _reload_call(self, caller: Caller, _: _Nothing) -> Answer:
        caller.must_be_root("reload the configuration")
        self._reload()
        return {}

    async def _quit(self, caller: Caller, _: _Nothing) -> Answer:
        caller.must_be_root("stop the agent")
        asyncio.get_running_loop().call_soon(self._leave)
        return {}

    def _own(self, caller: Caller, name: str) -> Job:
        job = self._daemon.find(name)
        caller.must_own(job)
        return job

    def may_see(self, caller: Caller, name: str | None) -> bool:
        job = self._daemon.jobs.get(name) if name else None
        return caller.uid == 0 or (job is not None and job.spec.owner.uid == caller.uid)


def _limits(defaults: Limits, wanted: dict[str, Any]) -> Limits:
    """The configured limits with the wanted ones in their place."""
    known = {name: getattr(defaults, name) for name in Limits.__dataclass_fields__}
    for name in wanted:
        if name not in known:
            raise UsageError(f"limit {name!r} is unknown; it is one of {', '.join(known)}")
    try:
        return msgspec.convert(known | wanted, Limits)
    except msgspec.ValidationError as e:
        raise UsageError(f"limits: {e}") from None


def _network(mode: str) -> NetworkMode:
    if mode not in get_args(NetworkMode):
        raise UsageError(f"network {mode!r} is none; it is one of {', '.join(get_args(NetworkMode))}")
    return cast(NetworkMode, mode)


def _ending(wanted: _Finish) -> Ending:
    if wanted.exit_signal is not None:
        return Ending.now(-wanted.exit_signal)
    return Ending.now(wanted.exit_code) if wanted.exit_code is not None else Ending()
