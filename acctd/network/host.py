"""What the host itself must do for the pipes: forward packets, and keep those of the pools from going astray.

Others on the host may have come to rely on forwarding, so acctd leaves it on when the last job goes; the pools' routes
go with it. Kernel docs: networking/ip-sysctl.rst.
"""

import os
import sys
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

from acctd.errors import NotPermittedError
from acctd.kernel import rtnetlink
from acctd.network.backend import PREFIX, Pools

_NET = Path("/proc/sys/net")


def has_ipv6(net: Path = _NET) -> bool:
    """Whether new links of this host get IPv6."""
    try:
        return (net / "ipv6/conf/default/disable_ipv6").read_text().strip() == "0"
    except FileNotFoundError:
        return False


def forwards(net: Path = _NET) -> tuple[bool, bool]:
    """Whether the host forwards IPv4, and IPv6."""
    v6 = net / "ipv6/conf/all/forwarding"
    return _is_on(net / "ipv4/ip_forward"), v6.exists() and _is_on(v6)


def enable_forwarding(*, ipv6: bool, net: Path = _NET) -> None:
    """Switch forwarding on where it is off. Raises NotPermittedError where /proc/sys cannot be written."""
    v4_on, v6_on = forwards(net)
    try:
        if not v4_on:
            (net / "ipv4/ip_forward").write_text("1")
        if ipv6 and not v6_on:
            # A forwarding host ignores router advertisements unless told otherwise (accept_ra 2), and would lose a
            # default route that it has from one.
            for accept_ra in (net / "ipv6/conf").glob("*/accept_ra"):
                if accept_ra.read_text().strip() == "1":
                    accept_ra.write_text("2")
            (net / "ipv6/conf/all/forwarding").write_text("1")
    except OSError as e:
        raise NotPermittedError(
            f"cannot switch forwarding on: {e.filename}: {e.strerror}; run as root, or set it before with sysctl"
        ) from e


# /proc/net/route; addresses in hexadecimal, in the machine's byte order; flag 0x200 is a route that refuses:
#   Iface  Destination  Gateway   Flags  RefCnt  Use  Metric  Mask      MTU  Window  IRTT
#   wan    007100CB     00000000  0001   0       0    0       00FFFFFF  0    0       0
# /proc/net/ipv6_route; destination and prefix length first, the device last:
#   20010db8000200000000000000000000 40 00000000000000000000000000000000 00 ... 00000100 00000001 00000000 00000001  wan
def overlap(pools: Pools, net: Path = Path("/proc/thread-self/net")) -> str | None:
    """A network that the host itself has a route to and that a pool overlaps, with its device; None if there is none.

    Default routes and the pipes' own do not count.
    """
    for line in (net / "route").read_bytes().split(b"\n")[1:-1]:
        name, destination, _, flags, _, _, _, mask, *_ = line.split()
        device = os.fsdecode(name)
        if int(mask, 16) and not int(flags, 16) & 0x200 and not device.startswith(PREFIX):
            address = IPv4Address(int(destination, 16).to_bytes(4, sys.byteorder))
            network = IPv4Network((address, int(mask, 16).bit_count()))
            if network.overlaps(pools.v4):
                return f"{network} on {device}"
    if pools.v6 is None:
        return None
    for line in (net / "ipv6_route").read_bytes().split(b"\n")[:-1]:
        destination, length, *_, name = line.split()
        device = os.fsdecode(name)
        if int(length, 16) and device != "lo" and not device.startswith(PREFIX):
            network6 = IPv6Network((IPv6Address(int(destination, 16)), int(length, 16)))
            if network6.overlaps(pools.v6):
                return f"{network6} on {device}"
    return None


def keep_in(pools: Pools) -> None:
    """Drop what is for an address of the pools and finds no pipe there: else it would leave by the default route."""
    _blackholes(pools, present=True)


def let_go(pools: Pools) -> None:
    """Take back what keep_in() did. Nothing there is fine."""
    _blackholes(pools, present=False)


def _blackholes(pools: Pools, *, present: bool) -> None:
    networks: list[rtnetlink.Network] = [pools.v4] if pools.v6 is None else [pools.v4, pools.v6]
    with rtnetlink.RouteSocket() as routes:
        routes.apply(*(rtnetlink.blackhole(network, present=present) for network in networks))


def _is_on(path: Path) -> bool:
    return path.read_text().strip() != "0"
