"""An independent byte counter: what an AF_PACKET tap sees on one link, read from the packets' own IP headers.

It shares nothing with what it checks: no netfilter, no interface statistics, no BPF. It loses nothing, or says so: the
kernel's count of packets must equal the frames read, with no drops. Kernel docs: networking/packet_mmap.rst.

Counted is what a node could have forwarded: no ARP, no neighbour discovery, no multicast, nothing link-local.
"""

import ctypes
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

_ETH_P_ALL = 0x0003
_PACKET_OUTGOING = 4
_SOL_PACKET = 263
_PACKET_RX_RING = 5
_PACKET_STATISTICS = 6
_PACKET_VERSION = 10
_PACKET_VNET_HDR = 15
_TPACKET_V2 = 1
_TP_STATUS_USER = 1
_SO_ATTACH_FILTER = 26
_BPF_RET_K = 0x06

_FRAME = 256  # room for the ring's own header (32 and a sockaddr_ll), Ethernet, IP and TCP with all options
_BLOCK = 1 << 18
_BLOCKS = 128
_FRAMES = _BLOCK * _BLOCKS // _FRAME  # 131072 packets may wait for the reader

# struct tpacket2_hdr: tp_status, tp_len, tp_snaplen, tp_mac, tp_net, ...; 32 bytes, then the sockaddr_ll.
_HEADER = struct.Struct("=IIIHH")
_PKTTYPE = 32 + 10
# struct virtio_net_hdr, 10 bytes, ends where the Ethernet header begins: flags, gso_type, hdr_len, gso_size, ...
_VNET = struct.Struct("=BBHH")
_VNET_SIZE = 10
_WORD = struct.Struct("=I")
_SHORT = struct.Struct("!H")


class Count(NamedTuple):
    """L3 bytes (IP headers included) and packets, as the tap sees them and as they cross a real wire.

    A GSO super-packet is one packet here and as many `wire_packets` as it will be cut into, each with IP and transport
    header of its own in `wire_bytes`. Ethernet framing is in neither.
    """

    bytes: int = 0
    packets: int = 0
    wire_bytes: int = 0
    wire_packets: int = 0


@dataclass(frozen=True, slots=True)
class Wire:
    """What one end of a link sent and received, by IP version."""

    sent: dict[int, Count]
    received: dict[int, Count]


class LostError(Exception):
    """The counter missed packets, or saw one it cannot count; its numbers are worth nothing."""


@dataclass(slots=True)
class _Tally:
    counts: dict[tuple[bool, int], list[int]] = field(
        default_factory=lambda: {(sent, version): [0, 0, 0, 0] for sent in (True, False) for version in (4, 6)}
    )

    def add(self, sent: bool, version: int, length: int, segments: int, headers: int) -> None:
        count = self.counts[sent, version]
        count[0] += length
        count[1] += 1
        count[2] += length + (segments - 1) * headers
        count[3] += segments

    def wire(self) -> Wire:
        return Wire(
            sent={version: Count(*self.counts[True, version]) for version in (4, 6)},
            received={version: Count(*self.counts[False, version]) for version in (4, 6)},
        )


class WireCounter:
    """Counts on `dev` in the namespace that `inside()` takes this thread into, from the end of start() to stop()."""

    def __init__(self, inside: Callable[[], AbstractContextManager[None]], dev: str) -> None:
        self._inside = inside
        self._dev = dev
        self._tally = _Tally()
        self._read = 0
        self._next = 0
        self._failure: Exception | None = None

    def __enter__(self) -> "WireCounter":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def start(self) -> None:
        """From here on every packet is counted."""
        with self._inside():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # deaf until bound
        self._socket.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V2)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_RX_RING, struct.pack("=IIII", _BLOCK, _BLOCKS, _FRAME, _FRAMES))
        self._ring = mmap.mmap(self._socket.fileno(), _BLOCK * _BLOCKS)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._socket.bind((self._dev, _ETH_P_ALL))
        self._thread = threading.Thread(target=self._follow, name=f"wire-{self._dev}", daemon=True)
        self._thread.start()

    def now(self) -> Wire:
        """What has been counted so far: for waiting until something has arrived."""
        return self._tally.wire()

    def stop(self) -> Wire:
        """End counting, read what waits, and give the sums. Raises LostError unless every packet was seen."""
        drop = ctypes.create_string_buffer(struct.pack("=HBBI", _BPF_RET_K, 0, 0, 0))
        program = struct.pack("@HP", 1, ctypes.addressof(drop))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._drain()
        seen, dropped = struct.unpack("=II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        self._end()
        if self._failure is not None:
            raise self._failure
        if dropped or seen != self._read:
            raise LostError(f"{self._dev}: the kernel saw {seen} packets and dropped {dropped}; {self._read} were read")
        return self._tally.wire()

    def _end(self) -> None:
        if self._socket.fileno() < 0:
            return
        if self._thread.is_alive():
            os.eventfd_write(self._stop, 1)
            self._thread.join()
        self._ring.close()
        self._socket.close()
        os.close(self._stop)

    def _follow(self) -> None:
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            self._drain()
            if any(fd == self._stop for fd, _ in poll.poll()):
                return

    def _drain(self) -> None:
        ring, at = self._ring, self._next
        while True:
            offset = at * _FRAME
            status, _, snapped, mac, net = _HEADER.unpack_from(ring, offset)
            if not status & _TP_STATUS_USER:
                break
            try:
                self._count(offset, snapped, mac, net)
            except LostError as e:
                self._failure = self._failure or e
            _WORD.pack_into(ring, offset, 0)
            self._read += 1
            at = (at + 1) % _FRAMES
        self._next = at

    def _count(self, offset: int, snapped: int, mac: int, net: int) -> None:
        ring = self._ring
        ip = offset + net
        end = offset + mac + snapped
        kind = _SHORT.unpack_from(ring, ip - 2)[0]
        if kind == 0x0800:
            length = _SHORT.unpack_from(ring, ip + 2)[0]
            header, version, protocol = (ring[ip] & 15) * 4, 4, ring[ip + 9]
            if ring[ip + 16] >= 224:
                return
        elif kind == 0x86DD:
            length = _SHORT.unpack_from(ring, ip + 4)[0]
            header, version, protocol = 40, 6, ring[ip + 6]
            if not _forwardable6(ring, ip, protocol):
                return
            length = length + 40 if length else 0
        else:
            return
        if length == 0:
            raise LostError(
                f"{self._dev}: an IPv{version} packet without a length (BIG TCP); this counter cannot count it"
            )
        _, gso, _, size = _VNET.unpack_from(ring, offset + mac - _VNET_SIZE)
        segments, headers = 1, 0
        if gso & 0x7F:
            if protocol == socket.IPPROTO_TCP and ip + header + 20 <= end:
                headers = header + (ring[ip + header + 12] >> 4) * 4
            elif protocol == socket.IPPROTO_UDP:
                headers = header + 8
            else:
                raise LostError(f"{self._dev}: a super-packet of protocol {protocol}; this counter cannot cut it")
            segments = -(-(length - headers) // size)
        self._tally.add(ring[offset + _PKTTYPE] == _PACKET_OUTGOING, version, length, segments, headers)


def _forwardable6(ring: mmap.mmap, ip: int, protocol: int) -> bool:
    """Not from ::, not link-local (fe80::/10), not to a group (ff00::/8), no neighbour discovery (RFC 4861)."""
    source, target = ring[ip + 8 : ip + 24], ring[ip + 24 : ip + 40]
    if target[0] == 0xFF or source == bytes(16):
        return False
    if any(address[0] == 0xFE and address[1] & 0xC0 == 0x80 for address in (source, target)):
        return False
    return not (protocol == socket.IPPROTO_ICMPV6 and 133 <= ring[ip + 40] <= 137)
