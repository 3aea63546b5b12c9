"""Traffic of exactly known size: a server for campus and wan, and a client that a job can run.

    traffic.py serve [PORT]
    traffic.py take HOST PORT BYTES [--tcp | --udp]      the client receives
    traffic.py give HOST PORT BYTES [--tcp | --udp]      the client sends

BYTES are those of the transport's payload. UDP goes in windows that are acknowledged before the next, so nothing is
lost to a full buffer; a datagram that is lost all the same ends the client with exit 1, it is not sent again. Standard
library only, one file: it must run in any namespace, as any user.
"""

import argparse
import contextlib
import os
import socket
import struct
import sys
import threading
import time
from types import TracebackType
from typing import NamedTuple

PORT = 5001
DATAGRAM = 1200  # fits every MTU, so a datagram is a packet
WINDOW = 32  # datagrams on their way at a time
TIMEOUT = 10.0  # s without progress

# One shape for a TCP request, a UDP request (24 bytes each) and an acknowledgement: what, session, bytes, datagrams.
_CONTROL = struct.Struct("!IQQI")
CONTROL_SIZE = _CONTROL.size
_TAKE, _GIVE, _ACK = 1, 2, 3


class Expected(NamedTuple):
    """L3 bytes and packets of a UDP transfer: the data, and the small datagrams that go the other way."""

    data_bytes: int
    data_packets: int
    control_bytes: int
    control_packets: int


def expected_udp(size: int, version: int) -> Expected:
    """What `take` or `give --udp` of `size` bytes puts on the wire; IPv4 header 20, IPv6 40, UDP 8."""
    header = {4: 28, 6: 48}[version]
    sizes = datagrams(size)
    windows = -(-len(sizes) // WINDOW)
    return Expected(size + header * len(sizes), len(sizes), windows * (CONTROL_SIZE + header), windows)


def datagrams(size: int) -> list[int]:
    """The sizes a UDP transfer is cut into; none is too small for its own header."""
    if size < CONTROL_SIZE:
        raise ValueError(f"{size} bytes are too few for UDP; it takes {CONTROL_SIZE} at least")
    whole, rest = divmod(size, DATAGRAM)
    sizes = [DATAGRAM] * whole + ([rest] if rest else [])
    if sizes[-1] < CONTROL_SIZE:
        sizes[-2] -= CONTROL_SIZE - sizes[-1]
        sizes[-1] = CONTROL_SIZE
    return sizes


class Server:
    """Answers on TCP and UDP, IPv4 and IPv6, in the network namespace of the thread that makes it."""

    def __init__(self, port: int = PORT) -> None:
        self._tcp = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
        self._udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self._udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._udp.bind(("::", port))
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._accept, self._answer)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; connections that are open come to their own end."""
        for sock in (self._tcp, self._udp):
            with contextlib.suppress(OSError):  # an unconnected socket says ENOTCONN, yet its reader wakes up
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._tcp.close()
        self._udp.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._tcp.accept()
            except OSError:
                return  # closed
            threading.Thread(target=_converse, args=(connection,), daemon=True).start()

    def _answer(self) -> None:
        sessions: dict[int, tuple[int, int]] = {}  # session -> bytes and datagrams so far
        filler = bytes(DATAGRAM)
        while True:
            data, peer = self._udp.recvfrom(65536)
            if not data:
                return  # shut down; no client sends an empty datagram
            if len(data) < CONTROL_SIZE:
                continue
            what, session, size, _ = _CONTROL.unpack_from(data)
            if what == _TAKE:
                for part in datagrams(size):
                    self._udp.sendto(filler[:part], peer)
            elif what == _GIVE:
                done, count = sessions.pop(session, (0, 0))
                done, count = done + len(data), count + 1
                if done < size:
                    sessions[session] = (done, count)
                if done == size or count % WINDOW == 0:
                    self._udp.sendto(_CONTROL.pack(_ACK, session, done, count), peer)


def take(host: str, port: int, size: int, *, udp: bool = False) -> None:
    """Receive exactly `size` bytes. Raises OSError (TimeoutError for a lost datagram)."""
    if not udp:
        with socket.create_connection((host, port), TIMEOUT) as sock:
            sock.sendall(_CONTROL.pack(_TAKE, 0, size, 0))
            _receive(sock, size)
            _part(sock)
        return
    sizes = datagrams(size)
    with _udp_to(host, port) as sock:
        for first in range(0, len(sizes), WINDOW):
            window = sizes[first : first + WINDOW]
            sock.send(_CONTROL.pack(_TAKE, 0, sum(window), 0))
            for _ in window:
                sock.recv(65536)


def give(host: str, port: int, size: int, *, udp: bool = False) -> None:
    """Send exactly `size` bytes and wait until the server has them. Raises as take does."""
    if not udp:
        with socket.create_connection((host, port), TIMEOUT) as sock:
            sock.sendall(_CONTROL.pack(_GIVE, 0, size, 0))
            _send(sock, size)
            _receive(sock, CONTROL_SIZE)
            _part(sock)
        return
    sizes = datagrams(size)
    session = int.from_bytes(os.urandom(8), "big")
    header = _CONTROL.pack(_GIVE, session, size, 0)
    with _udp_to(host, port) as sock:
        for first in range(0, len(sizes), WINDOW):
            for part in sizes[first : first + WINDOW]:
                sock.send(header + bytes(part - CONTROL_SIZE))
            sock.recv(65536)


def _converse(connection: socket.socket) -> None:
    """One TCP client's request."""
    with connection, contextlib.suppress(OSError):  # the client gave up: it knows
        connection.settimeout(TIMEOUT)
        request = connection.recv(CONTROL_SIZE, socket.MSG_WAITALL)
        if len(request) < CONTROL_SIZE:
            return
        what, _, size, _ = _CONTROL.unpack(request)
        if what == _TAKE:
            _send(connection, size)
            connection.recv(1)  # the client closes first, so its port is the one to wait
        elif what == _GIVE:
            _receive(connection, size)
            connection.sendall(_CONTROL.pack(_ACK, 0, size, 0))
            connection.recv(1)


def _send(sock: socket.socket, size: int) -> None:
    filler = memoryview(bytes(1 << 18))
    while size:
        size -= sock.send(filler[: min(size, len(filler))])


def _receive(sock: socket.socket, size: int) -> None:
    buffer = bytearray(1 << 18)
    while size:
        got = sock.recv_into(buffer, min(size, len(buffer)))
        if not got:
            raise ConnectionError(f"the peer closed with {size} bytes to come")
        size -= got


def _part(sock: socket.socket) -> None:
    """Close only after the server has: when the client is done, nothing but its last acknowledgement is on its way."""
    sock.shutdown(socket.SHUT_WR)
    if sock.recv(1):
        raise ConnectionError("the peer sent more than was asked for")


def _udp_to(host: str, port: int) -> socket.socket:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    sock = socket.socket(family, kind)
    sock.settimeout(TIMEOUT)
    sock.connect(address)
    return sock


def main() -> int:
    """The command line; 0, or 1 and a sentence."""
    parser = argparse.ArgumentParser(description="Traffic of exactly known size.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("serve").add_argument("port", type=int, nargs="?", default=PORT)
    for name in ("take", "give"):
        action = actions.add_parser(name)
        action.add_argument("host")
        action.add_argument("port", type=int)
        action.add_argument("bytes", type=int)
        transport = action.add_mutually_exclusive_group()
        transport.add_argument("--tcp", action="store_true", help="the default")
        transport.add_argument("--udp", action="store_true")
    options = parser.parse_args()
    try:
        if options.action == "serve":
            with Server(options.port):
                print(f"serving on port {options.port}", flush=True)
                threading.Event().wait()
        started = time.monotonic()
        {"take": take, "give": give}[options.action](options.host, options.port, options.bytes, udp=options.udp)
    except (OSError, ValueError) as e:
        print(f"{options.action} failed: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    print(f"{options.action} {options.bytes} bytes in {time.monotonic() - started:.3f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
