"""The job's resolver where the host's listens on loopback: the same address answers inside, relayed by acctd.

A job has a loopback of its own, on which no resolver listens. Sockets bound there take the job's queries and pass them
to the host's, byte by byte, UDP and TCP. Nothing is parsed. Those queries do not cross the pipe and are not billed.
Resolvers with any other address are reached through the pipe like everything else. man 5 resolv.conf.
"""

import asyncio
import socket
import threading
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Self

from acctd.kernel import netns

PORT = 53
_ANSWER_WITHIN = 10.0  # s; resolvers give up after 5
_AT_ONCE = 256  # queries and connections under way; more are dropped, as a busy resolver would

Address = IPv4Address | IPv6Address


# /etc/resolv.conf, as systemd-resolved writes it:
#   nameserver 127.0.0.53
#   options edns0 trust-ad
#   search example.org
def loopback_servers(text: str) -> list[Address]:
    """The nameservers in a resolv.conf that only the host itself can reach. Unreadable lines are skipped."""
    found: list[Address] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                address = ip_address(words[1].partition("%")[0])
            except ValueError:
                continue
            if address.is_loopback and address not in found:
                found.append(address)
    # Without any nameserver line, libc asks 127.0.0.1.
    if not any(line.split()[:1] == ["nameserver"] for line in text.splitlines()):
        return [IPv4Address("127.0.0.1")]
    return found


def host_servers(resolv_conf: Path = Path("/etc/resolv.conf")) -> list[Address]:
    """Loopback nameservers of this host."""
    try:
        return loopback_servers(resolv_conf.read_text(errors="replace"))
    except OSError:
        return loopback_servers("")  # absent or unreadable: libc then asks 127.0.0.1, too


class Relay:
    """Passes a job's queries on: by the caller's event loop, see serve(), or by a thread, as a context manager."""

    def __init__(self, namespace: int, servers: Iterable[Address]) -> None:
        """Binds at once, so that the job's first query waits at least. Raises nothing: see `skipped`."""
        self._servers = list(servers)
        self.skipped: list[tuple[Address, str]] = []
        """Servers that could not be made to answer inside, and why."""
        self._bound = netns.inside(namespace, self._bind) if self._servers else []
        self._services: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def serve(self) -> None:
        """Answer on the running event loop, until close()."""
        loop = asyncio.get_running_loop()
        room = asyncio.Semaphore(_AT_ONCE)
        for server, udp, tcp in self._bound:
            self._services += [
                loop.create_task(_serve_udp(server, udp, room)),
                loop.create_task(_serve_tcp(server, tcp, room)),
            ]

    def close(self) -> None:
        """Stop answering. Queries under way on the caller's loop end by themselves."""
        for service in self._services:
            service.cancel()
            for _, udp, tcp in self._bound:
                # At once: a cancelled task does it a turn later, when the number may be another socket's.
                service.get_loop().remove_reader(udp)
                service.get_loop().remove_reader(tcp)
        for _server, udp, tcp in self._bound:
            udp.close()
            tcp.close()

    def __enter__(self) -> Self:
        if self._bound:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, args=(self._loop,), name="resolver relay", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self.close()

    def _bind(self) -> list[tuple[Address, socket.socket, socket.socket]]:
        bound = []
        for server in self._servers:
            try:
                bound.append((server, *_bound(server)))
            except OSError as e:
                self.skipped.append((server, str(e.strerror)))  # ::1 in a namespace without IPv6
        return bound

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.call_soon(self.serve)
        loop.run_forever()
        # A cancelled task may start another, and a connection may come in meanwhile.
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._services.clear()


def _bound(server: Address) -> tuple[socket.socket, socket.socket]:
    """A UDP and a listening TCP socket on the server's address, in the calling thread's namespace."""
    family = socket.AF_INET if server.version == 4 else socket.AF_INET6
    udp = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    tcp = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        for each in (udp, tcp):
            each.bind((str(server), PORT))
            each.setblocking(False)
        tcp.listen(64)
    except OSError:
        udp.close()
        tcp.close()
        raise
    return udp, tcp


async def _serve_udp(server: Address, inside: socket.socket, room: asyncio.Semaphore) -> None:
    loop = asyncio.get_running_loop()
    under_way: set[asyncio.Task[None]] = set()
    while True:
        query, client = await loop.sock_recvfrom(inside, 65535)
        await asyncio.sleep(0)  # one that waits already is received at once: a flood must not keep the loop to itself
        if len(under_way) < _AT_ONCE:
            task = loop.create_task(_ask(server, inside, query, client, room))
            under_way.add(task)
            task.add_done_callback(under_way.discard)


async def _ask(server: Address, inside: socket.socket, query: bytes, client: object, room: asyncio.Semaphore) -> None:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET if server.version == 4 else socket.AF_INET6
    async with room:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as outside:
            try:
                await loop.sock_connect(outside, (str(server), PORT))
                await loop.sock_sendall(outside, query)
                answer = await asyncio.wait_for(loop.sock_recv(outside, 65535), _ANSWER_WITHIN)
                await loop.sock_sendto(inside, answer, client)  # type: ignore[arg-type]  # the address recvfrom gave
            except (OSError, TimeoutError):
                return  # no answer is what the job would see of a silent resolver; it asks again


async def _serve_tcp(server: Address, listener: socket.socket, room: asyncio.Semaphore) -> None:
    # Not asyncio.start_server: in Python 3.11 it reports a connection that is cancelled, as ours are when the job ends.
    loop = asyncio.get_running_loop()
    under_way: set[asyncio.Task[None]] = set()
    while True:
        inside, _ = await loop.sock_accept(listener)
        await asyncio.sleep(0)
        if len(under_way) >= _AT_ONCE:
            inside.close()
            continue
        task = loop.create_task(_converse(server, inside, room))
        under_way.add(task)
        task.add_done_callback(under_way.discard)


async def _converse(server: Address, inside: socket.socket, room: asyncio.Semaphore) -> None:
    writers: list[asyncio.StreamWriter] = []
    async with room:
        try:
            reader, writer = await asyncio.open_connection(sock=inside)
            writers.append(writer)
            there_reader, there_writer = await asyncio.open_connection(str(server), PORT)
            writers.append(there_writer)
            await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))
        except OSError:
            return  # the host's resolver takes no TCP, or one side hung up: closing tells the other
        finally:
            for open_writer in writers:
                open_writer.close()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await asyncio.wait_for(source.read(65536), 60.0):
        sink.write(data)
        await sink.drain()
    sink.write_eof()
