"""The agent's socket: who is calling, may they, and the varlink calls they make. A unix socket, known peers, bounded.

A peer is known by SO_PEERCRED, which the kernel fills in and nobody can forge. Root may do all; a user may act on own
jobs. Every connection costs a bounded buffer; too many, or one that sends what is no message, are told so and closed,
and the others are still served. What a method does is daemon.py's; what it looks like on the wire is varlink.py's.
"""

import asyncio
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import msgspec

from acctd import __version__, accounts, varlink
from acctd.agent import Ending, Job, with_default_classes
from acctd.daemon import Daemon
from acctd.errors import AcctdError, NotFoundError, NotPermittedError, UsageError
from acctd.kernel import procs
from acctd.model import JobSpec, Limits, NetworkMode, parse_class
from exporters.classad import format_ad, record_ad

CONNECTIONS = 512
"""Open at a time; hooks are short-lived, so a node with a thousand jobs sees a handful."""

_PEERCRED = struct.Struct("3i")

log = logging.getLogger("acctd")


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


class Server:
    """Answers on one unix socket for one daemon."""

    def __init__(self, daemon: Daemon, *, reload: Callable[[], None], leave: Callable[[], None]) -> None:
        self._daemon = daemon
        self._reload, self._leave = reload, leave
        self._open = 0
        self._full_told = False
        self.methods: dict[str, tuple[type[msgspec.Struct], Method]] = {
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

    async def listen(self, path: Path) -> asyncio.Server:
        """Bind and serve. A dead agent's socket file is replaced; NotPermittedError for a living one's."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()
                else:
                    raise NotPermittedError(f"socket {path} is served already; stop that agent or set another socket")
        server = await asyncio.start_unix_server(self._serve, path, limit=varlink.FRAME_LIMIT)
        # Anyone may connect: who they are decides what they may do.
        os.chmod(path, 0o666)  # noqa: S103
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= CONNECTIONS:
            if not self._full_told:
                self._full_told = True
                log.warning("%d connections are open; more are turned away until some close", self._open)
            writer.write(varlink.failure(f"{varlink.INTERFACE}.Exhausted", message="too many connections; try again"))
            writer.close()
            return
        self._open += 1
        try:
            await self._converse(_caller(writer), reader, writer)
        except (ConnectionError, varlink.FrameError) as e:
            if isinstance(e, varlink.FrameError):
                writer.write(varlink.failure(f"{varlink.SERVICE}.InvalidParameter", parameter=str(e)))
        finally:
            self._open -= 1
            self._full_told &= self._open >= CONNECTIONS
            writer.close()

    async def _converse(self, caller: Caller, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = varlink.Decoder()
        while data := await reader.read(65536):
            for call in decoder.feed(data):
                async for frame in self._answer(caller, call):
                    if not call.oneway:
                        writer.write(frame)
                        await writer.drain()

    async def _answer(self, caller: Caller, call: varlink.Call) -> AsyncIterator[bytes]:
        interface, _, name = call.method.rpartition(".")
        if interface == varlink.SERVICE:
            yield self._about(name, call)
            return
        if interface != varlink.INTERFACE:
            yield varlink.failure(f"{varlink.SERVICE}.InterfaceNotFound", interface=interface)
            return
        if name == "Watch":
            async for event in self._daemon.watch():
                if self._may_see(caller, event.job):
                    yield varlink.reply(asdict(event), continues=call.more)
                    if not call.more:
                        return
        if name not in self.methods:
            yield varlink.failure(f"{varlink.SERVICE}.MethodNotFound", method=call.method)
            return
        kind, method = self.methods[name]
        try:
            parameters = msgspec.convert(call.parameters, kind)
        except msgspec.ValidationError as e:
            yield varlink.failure(f"{varlink.SERVICE}.InvalidParameter", parameter=str(e))
            return
        try:
            yield varlink.reply(await method(caller, parameters))
        except AcctdError as e:
            yield varlink.refusal(e)

    def _about(self, name: str, call: varlink.Call) -> bytes:
        if name == "GetInfo":
            interfaces = [varlink.SERVICE, varlink.INTERFACE]
            about = {"vendor": "acctd", "product": "acctd", "version": __version__, "url": "", "interfaces": interfaces}
            return varlink.reply(about)
        if name == "GetInterfaceDescription":
            if call.parameters.get("interface") == varlink.INTERFACE:
                return varlink.reply({"description": varlink.DESCRIPTION})
            return varlink.failure(f"{varlink.SERVICE}.InvalidParameter", parameter="interface")
        return varlink.failure(f"{varlink.SERVICE}.MethodNotFound", method=call.method)

    # Methods

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

    def _may_see(self, caller: Caller, name: str | None) -> bool:
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


def _caller(writer: asyncio.StreamWriter) -> Caller:
    peer = writer.get_extra_info("socket")
    return Caller(*_PEERCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)))
