"""Which addresses and which link name a lease stands for. Pure arithmetic; the ledger keeps the leases.

A lease is a slot number. Slot n has the n-th pair of each pool: a /31 (RFC 3021) and a /127 (RFC 6164), the lower
address outside, the upper one inside.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from acctd.network.backend import PREFIX, Pools


@dataclass(frozen=True, slots=True)
class Lease:
    """One job's place on the network."""

    slot: int
    ifname: str
    outer4: IPv4Address
    inner4: IPv4Address
    outer6: IPv6Address | None
    inner6: IPv6Address | None

    @property
    def inner(self) -> list[IPv4Address | IPv6Address]:
        """The job's own addresses."""
        return [self.inner4] if self.inner6 is None else [self.inner4, self.inner6]


def slots(pools: Pools) -> range:
    """The slots there are. Pair 0 is left out: many programs take a network's first address for the network itself."""
    pairs = pools.v4.num_addresses // 2
    if pools.v6 is not None:
        pairs = min(pairs, pools.v6.num_addresses // 2)
    return range(1, pairs)


def lease(pools: Pools, slot: int) -> Lease:
    """The addresses and the link name of a slot.

    The name's hex digits are reversed, so that its first digit differs from slot to slot and a tree of chains on name
    prefixes fills evenly.
    """
    outer6 = pools.v6[2 * slot] if pools.v6 is not None else None
    inner6 = pools.v6[2 * slot + 1] if pools.v6 is not None else None
    return Lease(
        slot, PREFIX + f"{slot:04x}"[::-1], pools.v4[2 * slot], pools.v4[2 * slot + 1], outer6, inner6
    )  # fmt: skip
