"""The agent's socket: who is calling, and frames in and out. A unix socket, known peers, bounded.

A peer is known by SO_PEERCRED, which the kernel fills in and nobody can forge. Whoever takes more than a share, sends
what is no message, stops in mid-message or does not read its answers is told so and hung up on, and the others are
still served. How much a share is says shares.py; what a method does, and for whom, is methods.py's; what it looks like
on the wire is varlink.py's.

Plain sockets instead of asyncio's streams: a stream reads ahead of what is asked of it, half a megabyte a connection,
and asyncio's servers build all of a connection before its peer is looked at.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
from dataclasses import asdict
from pathlib import Path

import msgspec

from acctd import __version__, varlink
from acctd.caller import Caller
from acctd.daemon import Daemon
from acctd.errors import AcctdError, KernelRefusedError, NotPermittedError
from acctd.kernel import private, procs
from acctd.methods import Methods
from acctd.shares import PER_USER, WATCHES_PER_USER, Once, Share, Shares

BACKLOG = 4096
"""Connections that wait to be accepted; the kernel takes no more than net.core.somaxconn, 4096 as a rule. With so many
connect(2) waits, or gives EAGAIN to a socket that does not block: a client sets SO_SNDTIMEO, not O_NONBLOCK."""

IDLE = 300.0
"""s without a call, after which an ordinary user's connection is closed. Root's may be silent."""

HALF = 30.0
"""s in which a message must be complete, and in which an answer must be read."""

_ACCEPTS = 16  # connections taken at a time, before the loop may do something else
_ACCEPT_AGAIN = 1.0  # s to wait when the system had no descriptor or memory for another connection
_LINGER = 1.0  # s in which what a peer was still sending is thrown away, so that it gets to read why it is hung up on
_LEAVING = 64  # refused connections that are given this time; the rest of a flood is closed at once
_PEERCRED = struct.Struct("3i")

log = logging.getLogger("acctd")


class _HangUp(Exception):  # noqa: N818 - it says what to do
    """The peer is to be told why, and its connection closed. `kind` is what the log tells once."""

    def __init__(self, kind: str, frame: bytes, sentence: str) -> None:
        super().__init__(sentence)
        self.kind, self.frame = kind, frame


class _Peer:
    """One connection."""

    def __init__(self, connection: socket.socket, caller: Caller, share: Share, now: float) -> None:
        self.socket, self.caller, self.share = connection, caller, share
        self.decoder = varlink.Decoder()
        self.since = now  # when it came, had its last answer, or began the message that is not complete
        self.waiting = False  # for what the peer sends: it could be closed and no call would be cut off
        self.out = False  # closed in favour of another

    def tell(self, frame: bytes) -> None:
        """A last word, if the peer takes it at once."""
        with contextlib.suppress(OSError):
            self.socket.send(frame, socket.MSG_DONTWAIT)


class Server:
    """Answers on one unix socket for one daemon."""

    def __init__(self, daemon: Daemon, methods: Methods) -> None:
        self._daemon, self._methods = daemon, methods
        self._shares = Shares()
        self._once = Once(log)
        self._peers: dict[_Peer, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()  # refused, and given time to read why
        self._listener: socket.socket | None = None

    async def listen(self, path: Path, inherited: socket.socket | None = None) -> "Server":
        """Bind and serve, or serve a socket that somebody else bound. close() closes it and leaves the file.

        A dead agent's socket file is replaced; NotPermittedError for a living one's.
        """
        if inherited is not None:
            self._open(inherited)
            return self
        private.make(path.parent)
        if path.exists():
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    if not path.is_socket():
                        raise NotPermittedError(f"socket {path} is taken by something else; set another one") from None
                    path.unlink()
                else:
                    raise NotPermittedError(f"socket {path} is served already; stop that agent or set another socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        # Anyone may connect: who they are decides what they may do.
        os.chmod(path, 0o666)  # noqa: S103
        self._open(listener)
        return self

    def _open(self, listener: socket.socket) -> None:
        self._listener = listener
        listener.listen(BACKLOG)
        listener.setblocking(False)
        asyncio.get_running_loop().add_reader(listener, self._accept)

    def close(self) -> None:
        """Take no new connections, and end those there are."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for task in (*self._peers.values(), *self._leaving):
            task.cancel()

    # Coming in

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            if self._listener is None:
                return
            try:
                connection, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as e:
                self._once.tell("accept", f"no new connection can be taken: {e.strerror}; see LimitNOFILE")
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._listener)
                loop.call_later(_ACCEPT_AGAIN, self._accept_again)
                return
            connection.setblocking(False)
            self._admit(connection)

    def _accept_again(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _admit(self, connection: socket.socket) -> None:
        caller = _caller(connection)
        share = self._shares.of(caller.uid)
        loop = asyncio.get_running_loop()
        peer = _Peer(connection, caller, share, loop.time())
        why = self._no_room(share)
        if why is not None:
            peer.tell(_exhausted(why))
            if len(self._leaving) < _LEAVING:
                task = loop.create_task(_see_off(connection))
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
            else:
                connection.close()
            return
        self._shares.enter(share)
        self._peers[peer] = loop.create_task(self._serve(peer))

    def _no_room(self, share: Share) -> str | None:
        """Why this user gets no connection more, or None. Where all are full, the one idle for longest makes room."""
        if share.is_root:
            return None
        if share.connections >= PER_USER:
            why = f"{PER_USER} connections of uid {share.uid} are open already; close some"
            self._once.tell("share", f"uid {share.uid} has {PER_USER} connections open; its further ones are refused")
            return why
        if self._shares.is_full:
            idle = [peer for peer in self._peers if peer.waiting and not peer.share.is_root]
            if not idle:
                self._once.tell("full", "too many connections of users are busy; more are refused until some end")
                return "too many connections of users are busy; try again"
            self._once.tell("full", "too many connections of users are open; the idle ones are closed for new ones")
            self._put_out(min(idle, key=lambda peer: (-peer.share.connections, peer.since)))
        return None

    def _put_out(self, peer: _Peer) -> None:
        peer.out, peer.waiting = True, False
        peer.tell(_exhausted("this idle connection made room for another; connect again"))
        self._shares.leave(peer.share)
        peer.socket.shutdown(socket.SHUT_RDWR)  # wakes its task, which ends

    # A conversation

    async def _serve(self, peer: _Peer) -> None:
        try:
            await self._converse(peer)
        except _HangUp as e:
            if e.kind != "idle":  # nothing wrong with that
                self._once.tell(e.kind, f"uid {peer.caller.uid}, pid {peer.caller.pid}: {e}; hung up")
            peer.tell(e.frame)
            peer.decoder = varlink.Decoder()  # what it sent is of no use, and large as a rule
            await _see_off(peer.socket)
        except OSError:
            pass  # it went away: that is its right, and whatever it asked for is done
        except Exception as e:
            self._daemon.cost.errors += 1
            self._once.tell("connection", "a connection failed inside acctd: this is a defect", e)
        finally:
            peer.socket.close()
            del self._peers[peer]
            if not peer.out:
                self._shares.leave(peer.share)

    async def _converse(self, peer: _Peer) -> None:
        loop = asyncio.get_running_loop()
        while data := await self._receive(peer):
            if not peer.decoder.pending:
                peer.since = loop.time()
            try:
                peer.decoder.push(data)
                for call in peer.decoder.calls():
                    await self._handle(peer, call)
                    peer.since = loop.time()
            except varlink.FrameError as e:
                raise _HangUp("frame", _invalid(str(e)), str(e)) from None

    async def _receive(self, peer: _Peer) -> bytes:
        """What the peer sends next; nothing where it hung up, or was put out."""
        half = peer.decoder.pending
        if peer.share.is_too_much(own=0) and half:
            raise self._too_much(peer)
        wait = HALF if half else None if peer.share.is_root else IDLE
        peer.share.held += half
        peer.waiting = True
        try:
            async with asyncio.timeout_at(peer.since + wait if wait is not None else None):
                data = await asyncio.get_running_loop().sock_recv(peer.socket, varlink.READ)
        except TimeoutError:
            if half:
                text = f"a message of which {half} bytes came was not complete after {HALF:.0f} s"
                raise _HangUp("half", _invalid(text), text) from None
            text = f"no call for {IDLE:.0f} s; connect again"
            raise _HangUp("idle", _exhausted(text), text) from None
        finally:
            peer.waiting = False
            peer.share.held -= half
        return b"" if peer.out else data

    async def _handle(self, peer: _Peer, call: varlink.Call) -> None:
        async with peer.share.turn:
            await asyncio.sleep(0)
        if call.method == f"{varlink.INTERFACE}.Watch":
            await self._watch(peer, call)
        else:
            frame = await self._answer(peer.caller, call)
            if not call.oneway:
                await self._send(peer, frame)

    async def _send(self, peer: _Peer, frame: bytes) -> None:
        if peer.share.is_too_much(own=0):
            raise self._too_much(peer)
        peer.share.held += len(frame)
        try:
            async with asyncio.timeout(HALF):
                await asyncio.get_running_loop().sock_sendall(peer.socket, frame)
        except TimeoutError:
            text = f"an answer was not read within {HALF:.0f} s"
            # No last word: it would stand in the middle of the answer.
            raise _HangUp("unread", b"", text) from None
        finally:
            peer.share.held -= len(frame)

    def _too_much(self, peer: _Peer) -> _HangUp:
        text = f"{peer.share.held} bytes of half messages and unread answers of uid {peer.share.uid} are kept"
        return _HangUp("held", _exhausted(f"{text}; finish your messages and read your answers"), text)

    # What is asked

    async def _answer(self, caller: Caller, call: varlink.Call) -> bytes:
        """The one reply to a call, whatever comes of it."""
        interface, _, name = call.method.rpartition(".")
        try:
            if interface == varlink.SERVICE:
                return self._about(name, call)
            if interface != varlink.INTERFACE:
                return varlink.failure(f"{varlink.SERVICE}.InterfaceNotFound", interface=interface)
            if name not in self._methods.table:
                return varlink.failure(f"{varlink.SERVICE}.MethodNotFound", method=call.method)
            kind, method = self._methods.table[name]
            try:
                parameters = msgspec.convert(call.parameters or {}, kind)
            except msgspec.ValidationError as e:
                return _invalid(str(e))
            return varlink.reply(await method(caller, parameters))
        except AcctdError as e:
            return varlink.refusal(e)
        except OSError as e:
            self._daemon.cost.errors += 1
            what = f" {e.filename}" if e.filename else ""
            return varlink.refusal(
                KernelRefusedError(f"the kernel refused{what}: {e.strerror or e}; see the agent's limits")
            )
        except Exception as e:
            self._daemon.cost.errors += 1
            shown = name if name in self._methods.table else "a call"  # else anything that a peer thinks of
            said = f"{shown} failed inside acctd ({type(e).__name__}): this is a defect"
            self._once.tell(f"{shown} {type(e).__name__}", said, e)
            return varlink.failure(f"{varlink.INTERFACE}.Failed", message=f"{said}; see the agent's log")

    async def _watch(self, peer: _Peer, call: varlink.Call) -> None:
        """Events until the peer hangs up; the next one alone without `more`."""
        if call.oneway:
            return  # nobody to tell
        if call.parameters:
            await self._send(peer, _invalid(next(iter(call.parameters))))
            return
        if not self._shares.watch(peer.share):
            text = f"too many watch already; one user may do so {WATCHES_PER_USER} times"
            self._once.tell("watches", f"uid {peer.share.uid}: {text}")
            await self._send(peer, _exhausted(text))
            return
        telling, reading = asyncio.create_task(self._tell(peer, call.more)), asyncio.create_task(_read_on(peer))
        try:
            await asyncio.wait({telling, reading}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._shares.unwatch(peer.share)
            for task in (telling, reading):
                task.cancel()
            outcomes = await asyncio.gather(telling, reading, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        if outcomes[1] is None:
            raise ConnectionResetError  # the peer hung up

    async def _tell(self, peer: _Peer, more: bool) -> None:
        async for event in self._daemon.news.watch():
            if self._methods.may_see(peer.caller, event):
                await self._send(peer, varlink.reply({"event": asdict(event)}, continues=more))
                if not more:
                    return

    def _about(self, name: str, call: varlink.Call) -> bytes:
        if name == "GetInfo":
            interfaces = [varlink.SERVICE, varlink.INTERFACE]
            about = {"vendor": "acctd", "product": "acctd", "version": __version__, "url": "", "interfaces": interfaces}
            return varlink.reply(about)
        if name == "GetInterfaceDescription":
            if (call.parameters or {}).get("interface") == varlink.INTERFACE:
                return varlink.reply({"description": varlink.DESCRIPTION})
            return _invalid("interface")
        return varlink.failure(f"{varlink.SERVICE}.MethodNotFound", method=call.method)


async def _read_on(peer: _Peer) -> None:
    """Keep what a watching peer sends for later, within bounds; ends when the peer hangs up."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(peer.socket, readable.set)
    try:
        while True:
            await readable.wait()
            readable.clear()
            try:
                # Not sock_recv: cancelled at the wrong moment, it loses what it had read already.
                data = peer.socket.recv(varlink.READ)
            except BlockingIOError:
                continue  # woken twice for the same bytes
            if not data:
                return
            peer.decoder.push(data)
    finally:
        loop.remove_reader(peer.socket)


async def _see_off(connection: socket.socket) -> None:
    """Close, but let the peer finish its call first: one that cannot send any more does not read why, as a rule."""
    with connection, contextlib.suppress(OSError):  # TimeoutError too
        connection.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(_LINGER):
            while await asyncio.get_running_loop().sock_recv(connection, varlink.READ):
                await asyncio.sleep(0)


def _caller(connection: socket.socket) -> Caller:
    pid, uid, gid = _PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    return Caller(pid, uid, gid, procs.identity(pid))


def _exhausted(message: str) -> bytes:
    return varlink.failure(f"{varlink.INTERFACE}.Exhausted", message=message)


def _invalid(parameter: str) -> bytes:
    return varlink.failure(f"{varlink.SERVICE}.InvalidParameter", parameter=parameter)
