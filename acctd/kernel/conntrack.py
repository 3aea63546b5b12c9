"""Forget a finished job's connections: the conntrack entries that begin or end at its inner addresses.

An address goes back to the pool and on to another job; an entry left behind would let the old peer's packets in as
"established" and bill them to the new owner. Most begin there; one whose peer is the originator comes about when the
ruleset is flushed in mid-connection, and nobody masquerades the peer's next packet. Removes entries and nothing else. A
call opens its own socket, in the calling thread's network namespace. Reference:
uapi/linux/netfilter/nfnetlink_conntrack.h.
"""

import socket
import sys
from collections.abc import Collection, Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from acctd.kernel.nfnetlink import HEADERS, Buffer, NfnetlinkSocket, attribute, attributes, messages, nested

Address = IPv4Address | IPv6Address

_CONNTRACK = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_GET = _CONNTRACK | 1
_DELETE = _CONNTRACK | 2
_GET_STATS = _CONNTRACK | 5

_TUPLE_ORIG, _ID, _ZONE, _FILTER = 1, 12, 18, 25  # CTA_*
_TUPLE_IP = 1
_V4_SOURCE, _V4_DESTINATION, _V6_SOURCE, _V6_DESTINATION = 1, 2, 3, 4  # CTA_IP_*
_FILTER_ORIG_FLAGS, _FILTER_REPLY_FLAGS = 1, 2
_FLAG_IP_SRC, _FLAG_IP_DST = 1 << 0, 1 << 1  # CTA_FILTER_FLAG(CTA_IP_SRC), (CTA_IP_DST)
_GLOBAL_ENTRIES = 1  # CTA_STATS_GLOBAL_ENTRIES

_FEW = 2000
"""Up to so many entries one whole dump is cheaper than a filtered one an address: each walks the whole hash table
(9 ms with 262144 buckets), while an entry that is sent and thrown away costs 2 us."""


class Entry(NamedTuple):
    """What names one conntrack entry to the kernel."""

    family: int  # AF_INET or AF_INET6
    request: bytes  # its attributes, ready to be sent back: original tuple, zone and id


def forget(addresses: Iterable[Address]) -> int:
    """Delete every entry whose original source or destination is one of `addresses`; the number deleted.

    Raises KernelRefusedError if the kernel refuses; an entry that ends by itself meanwhile is no error.
    """
    wanted = list(addresses)
    if not wanted:
        return 0
    deleted = 0
    with NfnetlinkSocket() as netlink:
        packed = {address.packed for address in wanted}
        for family, request in _dumps(wanted, _entries_in_all(netlink)):
            dump = netlink.dump(_GET, family, request)
            # All parsed before the first deletion: the dump lies in the buffer that the deletions' answers will use.
            for entry in parse_entries(dump.buffer, dump.size, packed) if dump else []:
                deleted += netlink.change(_DELETE, entry.family, entry.request)
    return deleted


def parse_entries(buffer: Buffer, size: int, addresses: Collection[bytes]) -> list[Entry]:
    """The entries of a dump that originally go from or to `addresses` (packed). KernelRefusedError on garbage."""
    entries = []
    for _, _, start, end in messages(buffer, size):
        request = b""
        ours = False
        for kind, first, last in attributes(buffer, start + HEADERS, end):
            if kind == _TUPLE_ORIG:
                ours = any(address in addresses for address in _ends(buffer, first, last))
                request += nested(_TUPLE_ORIG, bytes(buffer[first:last]))
            elif kind in (_ZONE, _ID):
                # The id makes sure that a new connection with the same ports is not deleted in the old one's place.
                request += attribute(kind, bytes(buffer[first:last]))
        if ours:
            entries.append(Entry(buffer[start + 16], request))
    return entries


def _ends(buffer: Buffer, first: int, last: int) -> Iterator[bytes]:
    """Source and destination of a tuple, packed."""
    for part, start, end in attributes(buffer, first, last):
        if part == _TUPLE_IP:
            for field, at, to in attributes(buffer, start, end):
                if field in (_V4_SOURCE, _V4_DESTINATION, _V6_SOURCE, _V6_DESTINATION):
                    yield bytes(buffer[at:to])


def _dumps(addresses: list[Address], entries: int) -> list[tuple[int, bytes]]:
    """The (family, request) of the dumps that together show all entries of these addresses, and others beside them.

    CTA_FILTER is asked for IPv4 alone. Kernels before 5.8 ignore it; those since then, at least up to 6.18, compare
    IPv6 addresses the wrong way round and send every entry but the wanted.
    """
    if entries == 0:
        return []
    if entries <= _FEW:
        return [(socket.AF_UNSPEC, b"")]
    dumps: list[tuple[int, bytes]] = [
        (socket.AF_INET, _filter(field, flag, address.packed))
        for address in addresses
        if address.version == 4
        for field, flag in ((_V4_SOURCE, _FLAG_IP_SRC), (_V4_DESTINATION, _FLAG_IP_DST))
    ]
    if any(address.version == 6 for address in addresses):
        dumps.append((socket.AF_INET6, b""))
    return dumps


def _filter(field: int, flag: int, address: bytes) -> bytes:
    """Ask for the entries alone that have this address in this field of their original tuple."""
    wanted = nested(_TUPLE_ORIG, nested(_TUPLE_IP, attribute(field, address)))
    flags = attribute(_FILTER_ORIG_FLAGS, flag.to_bytes(4, sys.byteorder)) + attribute(_FILTER_REPLY_FLAGS, bytes(4))
    return wanted + nested(_FILTER, flags)


def _entries_in_all(netlink: NfnetlinkSocket) -> int:
    """How many entries this namespace has; counted as many if the kernel does not say."""
    answer = netlink.ask(_GET_STATS, socket.AF_UNSPEC)
    if answer is not None:
        for kind, first, last in attributes(answer, HEADERS, len(answer)):
            if kind == _GLOBAL_ENTRIES:
                return int.from_bytes(answer[first:last], "big")
    return _FEW + 1
