"""Which netfilter back end this host can use, and the one to take. Probing changes nothing in netfilter."""

from acctd.errors import UnavailableError, UsageError
from acctd.network.backend import Chains, Pools

NAMES = ("nftables", "iptables")
"""In order of preference: nftables' cost per job and per packet does not grow with the number of jobs."""


def open_backend(name: str, pools: Pools) -> Chains:
    """One back end by name. UnavailableError says what the host lacks for it."""
    # Imported here: whoever uses one back end need not have what the other wants.
    if name == "nftables":
        from acctd.network.nftables import Nftables

        return Nftables(pools)
    if name == "iptables":
        from acctd.network.iptables import Iptables

        return Iptables(pools)
    raise UsageError(f"network.backend {name!r} is unknown; it is one of auto, {', '.join(NAMES)}")


def choose(wanted: str, pools: Pools) -> Chains:
    """The wanted back end, or with "auto" the first that works."""
    if wanted != "auto":
        return open_backend(wanted, pools)
    reasons = []
    for name in NAMES:
        try:
            return open_backend(name, pools)
        except UnavailableError as e:
            reasons.append(f"{name}: {e}")
    raise UnavailableError(
        f"no netfilter back end works here ({'; '.join(reasons)}); or run with --network host or none"
    )
