"""What the host itself must do for the pipes: forward packets. Read and switched on, never off again.

Others on the host may have come to rely on forwarding, so acctd leaves it on when the last job goes. Kernel docs:
networking/ip-sysctl.rst.
"""

from pathlib import Path

from acctd.errors import NotPermittedError

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


def _is_on(path: Path) -> bool:
    return path.read_text().strip() != "0"
