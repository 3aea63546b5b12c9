"""Links, addresses and routes over rtnetlink: several changes in one send, every answer checked.

Messages are encoded by pyroute2's classes; the socket is our own, because pyroute2's opens further sockets on whatever
thread touches it, in whatever namespace that thread is. man 7 rtnetlink; include/uapi/linux/if_link.h.
"""

import errno
import os
import socket
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, NamedTuple, Self

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from acctd.errors import KernelRefusedError, NotPermittedError

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_NEWADDR, _RTM_NEWROUTE, _RTM_DELROUTE = 16, 17, 18, 20, 24, 25
_NLM_REQUEST, _NLM_ACK, _NLM_EXCL, _NLM_CREATE = 0x1, 0x4, 0x200, 0x400
_NLMSG_ERROR = 2
_RTMGRP_LINK = 1
_IFF_UP = 1
_IFA_F_NODAD = 0x02
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_UNICAST, _RTN_BLACKHOLE = 254, 4, 1, 6
_LAST_METRIC = 0xFFFFFFFF
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # rtattr: length, type
_STATS64 = struct.Struct("=4Q")  # rtnl_link_stats64 begins with packets received and sent, bytes received and sent
_IFINFOMSG, _IFLA_STATS64, _ETHERNET = 16, 23, 14

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Request(NamedTuple):
    """One change, what it is called in an error, and the errors that mean it was done already."""

    what: str
    message: Any
    kind: int
    flags: int = 0
    fine: tuple[int, ...] = ()


def veth(outer: str, inner: str, inner_netns: int) -> Request:
    """A veth pair: the outer end here, up; the inner end in the namespace behind a descriptor."""
    peer = {"attrs": [("IFLA_IFNAME", inner), ("IFLA_NET_NS_FD", inner_netns)]}
    info = [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]})]
    message = _link(flags=_IFF_UP, change=_IFF_UP)
    message["attrs"] = [("IFLA_IFNAME", outer), ("IFLA_LINKINFO", {"attrs": info})]
    return Request(f"make the link {outer}", message, _RTM_NEWLINK, _NLM_CREATE | _NLM_EXCL)


def up(index: int) -> Request:
    """Set a link up."""
    return Request(f"set link {index} up", _link(index=index, flags=_IFF_UP, change=_IFF_UP), _RTM_NEWLINK)


def address(index: int, addr: Address, prefixlen: int) -> Request:
    """Give a link an address; IPv6 without duplicate address detection, which would keep it unusable for a second."""
    message = ifaddrmsg()
    message["family"], message["prefixlen"], message["index"] = _family(addr), prefixlen, index
    message["flags"] = _IFA_F_NODAD if addr.version == 6 else 0
    message["attrs"] = [("IFA_LOCAL", str(addr)), ("IFA_ADDRESS", str(addr))]
    return Request(f"give link {index} the address {addr}", message, _RTM_NEWADDR, _NLM_CREATE | _NLM_EXCL)


def default_route(gateway: Address) -> Request:
    """A default route in the main table."""
    message = rtmsg()
    message["family"], message["table"], message["proto"] = _family(gateway), _RT_TABLE_MAIN, _RTPROT_STATIC
    message["type"] = _RTN_UNICAST
    message["attrs"] = [("RTA_GATEWAY", str(gateway))]
    return Request(f"route by {gateway}", message, _RTM_NEWROUTE, _NLM_CREATE | _NLM_EXCL)


def blackhole(network: Network, *, present: bool) -> Request:
    """A route that drops what is for `network` while no better one is there: made, or taken away. Twice is fine."""
    message = rtmsg()
    message["family"], message["dst_len"] = _family(network.network_address), network.prefixlen
    message["table"], message["proto"], message["type"] = _RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_BLACKHOLE
    message["attrs"] = [("RTA_DST", str(network.network_address)), ("RTA_PRIORITY", _LAST_METRIC)]
    if present:
        flags = _NLM_CREATE | _NLM_EXCL
        return Request(f"route {network} nowhere", message, _RTM_NEWROUTE, flags, fine=(errno.EEXIST,))
    return Request(f"take back the route of {network}", message, _RTM_DELROUTE, fine=(errno.ESRCH, errno.ENOENT))


def delete(index: int) -> Request:
    """Remove a link, and with a veth its peer. One that is gone is fine."""
    return Request(f"remove link {index}", _link(index=index), _RTM_DELLINK, fine=(errno.ENODEV,))


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
            header = request.message["header"]
            header["type"], header["sequence_number"], header["pid"] = request.kind, sequence, 0
            header["flags"] = _NLM_REQUEST | _NLM_ACK | request.flags
            request.message.encode()
            frames.append(bytes(request.message.data))
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
        message = _link()
        message["attrs"] = [("IFLA_IFNAME", name)]
        header = message["header"]
        header["type"], header["flags"], header["sequence_number"], header["pid"] = _RTM_GETLINK, _NLM_REQUEST, 1, 0
        message.encode()
        self._socket.send(bytes(message.data))
        for kind, _, body in self._receive():
            if kind == _RTM_NEWLINK and (found := _attribute(body, _IFLA_STATS64)) is not None:
                packets_in, packets_out, bytes_in, bytes_out = _STATS64.unpack_from(found)
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


def _link(index: int = 0, flags: int = 0, change: int = 0) -> Any:
    message = ifinfmsg()
    message["index"], message["flags"], message["change"] = index, flags, change
    return message


def _attribute(body: bytes, wanted: int) -> bytes | None:
    """One attribute of an ifinfomsg."""
    offset = _IFINFOMSG
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if kind == wanted:
            return body[offset + _ATTRIBUTE.size : offset + length]
        offset += max((length + 3) & ~3, _ATTRIBUTE.size)
    return None


def _family(addr: Address) -> int:
    return socket.AF_INET if addr.version == 4 else socket.AF_INET6


def _refusal(what: str, code: int) -> KernelRefusedError | NotPermittedError:
    if code in (errno.EPERM, errno.EACCES):
        return NotPermittedError(f"cannot {what}: {os.strerror(code)}; run as root")
    return KernelRefusedError(f"cannot {what}: {os.strerror(code)}")
