"""The agent's socket: who is calling, and frames in and out. A unix socket, known peers, bounded.

A peer is known by SO_PEERCRED, which the kernel fills in and nobody can forge. Every connection costs a bounded buffer;
too many, or one that sends what is no message, are told so and closed, and the others are still served. What a method
does, and for whom, is methods.py's; what it looks like on the wire is varlink.py's.
"""

import asyncio
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import msgspec

from acctd import __version__, varlink
from acctd.daemon import Daemon
from acctd.errors import AcctdError, NotPermittedError
from acctd.methods import Caller, Methods

CONNECTIONS = 512
"""Open at a time; hooks are short-lived, so a node with a thousand jobs sees a handful."""

_PEERCRED = struct.Struct("3i")

log = logging.getLogger("acctd")


class Server:
    """Answers on one unix socket for one daemon."""

    def __init__(self, daemon: Daemon, methods: Methods) -> None:
        self._daemon, self._methods = daemon, methods
        self._open = 0
        self._full_told = False

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
                if self._methods.may_see(caller, event.job):
                    yield varlink.reply(asdict(event), continues=call.more)
                    if not call.more:
                        return
        if name not in self._methods.table:
            yield varlink.failure(f"{varlink.SERVICE}.MethodNotFound", method=call.method)
            return
        kind, method = self._methods.table[name]
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


def _caller(writer: asyncio.StreamWriter) -> Caller:
    peer = writer.get_extra_info("socket")
    return Caller(*_PEERCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)))
