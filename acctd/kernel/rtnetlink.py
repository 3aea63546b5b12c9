"""Links, addresses and routes over rtnetlink: several changes in one send, every answer checked.

The handful of messages that a pipe needs is written out here; a library that knows them all takes longer to load than
everything else of acctd together. man 7 rtnetlink; include/uapi/linux/{if_link,if_addr,rtnetlink,veth}.h.
"""

import errno
import os
import socket
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple, Self

from acctd.errors import KernelRefusedError, NotPermittedError
from acctd.kernel.nfnetlink import attribute, attributes, text

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_NEWADDR, _RTM_NEWROUTE, _RTM_DELROUTE = 16, 17, 18, 20, 24, 25
_NLM_REQUEST, _NLM_ACK, _NLM_EXCL, _NLM_CREATE = 0x1, 0x4, 0x200, 0x400
_NLMSG_ERROR = 2
_RTMGRP_LINK = 1
_IFF_UP = 1
_IFA_F_NODAD = 0x02
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_UNICAST, _RTN_BLACKHOLE = 254, 4, 1, 6
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_STATS64, _IFLA_NET_NS_FD = 3, 18, 23, 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_GATEWAY, _RTA_PRIORITY = 1, 5, 6
_LAST_METRIC = 0xFFFFFFFF
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_IFINFOMSG = struct.Struct("=BxHiII")  # family, device type, index, flags, which of them to change
_IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_RTMSG = struct.Struct("=8BI")  # family, two prefix lengths, tos, table, protocol, scope, type, flags
_STATS64 = struct.Struct("=4Q")  # rtnl_link_stats64 begins with packets received and sent, bytes received and sent
_ETHERNET = 14  # bytes of header that a link counts with each packet

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Request(NamedTuple):
    """One change, what it is called in an error, and the errors that mean it was done already."""

    what: str
    body: bytes
    kind: int
    flags: int = 0
    fine: tuple[int, ...] = ()


def veth(outer: str, inner: str, inner_netns: int) -> Request:
    """A veth pair: the outer end here, up; the inner end in the namespace behind a descriptor."""
    peer = _link() + text(_IFLA_IFNAME, inner) + attribute(_IFLA_NET_NS_FD, struct.pack("=I", inner_netns))
    info = attribute(_IFLA_INFO_KIND, b"veth") + attribute(_IFLA_INFO_DATA, attribute(_VETH_INFO_PEER, peer))
    body = _link(up=True) + text(_IFLA_IFNAME, outer) + attribute(_IFLA_LINKINFO, info)
    return Request(f"make the link {outer}", body, _RTM_NEWLINK, _NLM_CREATE | _NLM_EXCL)


def up(index: int) -> Request:
    """Set a link up."""
    return Request(f"set link {index} up", _link(index, up=True), _RTM_NEWLINK)


def address(index: int, addr: Address, prefixlen: int) -> Request:
    """Give a link an address; IPv6 without duplicate address detection, which would keep it unusable for a second."""
    flags = _IFA_F_NODAD if addr.version == 6 else 0
    body = _IFADDRMSG.pack(_family(addr), prefixlen, flags, 0, index)
    body += attribute(_IFA_LOCAL, addr.packed) + attribute(_IFA_ADDRESS, addr.packed)
    return Request(f"give link {index} the address {addr}", body, _RTM_NEWADDR, _NLM_CREATE | _NLM_EXCL)


def default_route(gateway: Address) -> Request:
    """A default route in the main table."""
    body = _route(_family(gateway), 0, _RTN_UNICAST) + attribute(_RTA_GATEWAY, gateway.packed)
    return Request(f"route by {gateway}", body, _RTM_NEWROUTE, _NLM_CREATE | _NLM_EXCL)


def blackhole(network: Network, *, present: bool) -> Request:
    """A route that drops what is for `network` while no better one is there: made, or taken away. Twice is fine."""
    body = _route(_family(network.network_address), network.prefixlen, _RTN_BLACKHOLE)
    body += attribute(_RTA_DST, network.network_address.packed)
    body += attribute(_RTA_PRIORITY, struct.pack("=I", _LAST_METRIC))
    if present:
        flags = _NLM_CREATE | _NLM_EXCL
        return Request(f"route {network} nowhere", body, _RTM_NEWROUTE, flags, fine=(errno.EEXIST,))
    return Request(f"take back the route of {network}", body, _RTM_DELROUTE, fine=(errno.ESRCH, errno.ENOENT))


def delete(index: int) -> Request:
    """Remove a link, and with a veth its peer. One that is gone is fine."""
    return Request(f"remove link {index}", _link(index), _RTM_DELLINK, fine=(errno.ENODEV,))


class RouteSocket:
    """A NETLINK_ROUTE socket in the namespace of the thread that makes it."""

    def __init__(self, groups: int = 0) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, groups))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def apply(self, *requests: Request) -> None:
        """Send the changes together; raise the first refusal. What was done before and after it stays done."""
        frames = []
        for sequence, request in enumerate(requests, 1):
            frames.append(_message(request.kind, request.flags | _NLM_ACK, sequence, request.body))
        self._socket.send(b"".join(frames))
        failures: dict[int, int] = {}
        waiting = len(requests)
        while waiting:
            for kind, sequence, body in self._receive():
                if kind == _NLMSG_ERROR:
                    waiting -= 1
                    code = -struct.unpack_from("=i", body)[0]
                    if code and code not in requests[sequence - 1].fine:
                        failures[sequence] = code
        if failures:
            sequence = min(failures)
            raise _refusal(requests[sequence - 1].what, failures[sequence])

    def link_bytes(self, name: str) -> int | None:
        """Bytes above Ethernet that a link has received and sent so far; None where there is no such link."""
        self._socket.send(_message(_RTM_GETLINK, 0, 1, _link() + text(_IFLA_IFNAME, name)))
        for kind, _, body in self._receive():
            if kind == _RTM_NEWLINK:
                for what, start, _ in attributes(body, _IFINFOMSG.size, len(body)):
                    if what == _IFLA_STATS64:
                        packets_in, packets_out, bytes_in, bytes_out = _STATS64.unpack_from(body, start)
                        return int(bytes_in + bytes_out - _ETHERNET * (packets_in + packets_out))
        return None

    def removals(self) -> set[int]:
        """Indexes of links the kernel says it has removed; waits for the next message. For link_events() sockets."""
        return {struct.unpack_from("=i", body, 4)[0] for kind, _, body in self._receive() if kind == _RTM_DELLINK}

    def settimeout(self, seconds: float) -> None:
        """How long removals() waits before TimeoutError."""
        self._socket.settimeout(seconds)

    def _receive(self) -> list[tuple[int, int, bytes]]:
        data = self._socket.recv(1 << 17)
        messages, offset = [], 0
        while offset + _HEADER.size <= len(data):
            length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
            messages.append((kind, sequence, data[offset + _HEADER.size : offset + length]))
            offset += (length + 3) & ~3
        return messages


def link_bytes(name: str) -> int | None:
    """Bytes above Ethernet, both ways, that a link of the calling thread's namespace has passed; None if it is gone."""
    with RouteSocket() as routes:
        return routes.link_bytes(name)


def link_events() -> RouteSocket:
    """A socket that hears of every link removed in this namespace from now on."""
    return RouteSocket(_RTMGRP_LINK)


def link_index(name: str) -> int | None:
    """A link's index in the calling thread's namespace, or None where there is no such link."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, _NLM_REQUEST | flags, sequence, 0) + body


def _link(index: int = 0, *, up: bool = False) -> bytes:
    flags = _IFF_UP if up else 0
    return _IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, flags, flags)


def _route(family: int, prefixlen: int, kind: int) -> bytes:
    return _RTMSG.pack(family, prefixlen, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, 0, kind, 0)


def _family(addr: Address) -> int:
    return socket.AF_INET if addr.version == 4 else socket.AF_INET6


def _refusal(what: str, code: int) -> KernelRefusedError | NotPermittedError:
    if code in (errno.EPERM, errno.EACCES):
        return NotPermittedError(f"cannot {what}: {os.strerror(code)}; run as root")
    return KernelRefusedError(f"cannot {what}: {os.strerror(code)}")
