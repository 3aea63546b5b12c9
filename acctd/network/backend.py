"""What a netfilter back end must do for a job's chain; iptables.py and nftables.py are the two that do it.

The contract of both: a job's whole chain appears and disappears in one transaction per table; no packet walks a linear
list of jobs; what foreign programs put into netfilter is neither read as ours nor changed; when the last chain goes, so
does everything else the back end made; and nothing leaves a pipe from an address that is not the job's own, since the
answers would be billed to whoever has it. All calls act on the network namespace of the calling thread. Between
acctd processes of one node, the caller sees to it that only one changes anything at a time.
"""

from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple, Protocol

from acctd.kernel.nfevents import Watch
from acctd.model import DestinationClass

PREFIX = "ac"
"""Every outer end of a pipe is named ac<hex>: what the dispatch matches on, and the mark of a link that is ours."""


class Count(NamedTuple):
    """One counting rule's L3 bytes (IP headers included) and packets (a GSO super-packet is one)."""

    bytes: int
    packets: int


Counts = dict[str, Count]
"""Rule name -> count, IPv4 and IPv6 summed."""


class Sample(NamedTuple):
    """One chain as it was read."""

    counts: Counts
    incarnation: str  # another one once the chain or a rule of it was made anew; "" where the kernel cannot tell


@dataclass(frozen=True, slots=True)
class ChainPlan:
    """What one job's chain is made from."""

    chain: str  # see model.chain_name
    ifname: str  # outer end of the pipe
    classes: tuple[DestinationClass, ...]
    ipv6: bool
    sources: tuple[IPv4Address | IPv6Address, ...] = ()  # the job's own addresses


@dataclass(frozen=True, slots=True)
class Pools:
    """The networks whose traffic is masqueraded on its way out. `v6` is None on a host without IPv6."""

    v4: IPv4Network
    v6: IPv6Network | None


class Chains(Protocol):
    """One back end, bound to the network namespace of the thread that made it.

    What the caller must do about other programs, once a tick: read(), and hold each sample against the one before.
    Another incarnation, or counts that went back, say that the counts are no continuation of what was read before:
    add() again, and count from zero. Then broken() finds what does not reach its chain any more; mend() it.
    """

    name: str

    def add(self, *plans: ChainPlan) -> None:
        """Make the chains and their dispatch, and the shared parts if missing: one transaction per table for all.

        An old chain of that name goes; every chain is at zero afterwards, in an incarnation of its own. No chain and
        no interface may be in two of the plans. If it fails, no chain is there that was not there before.
        """

    def mend(self, *plans: ChainPlan) -> set[str]:
        """As add(), but a chain whose rules are whole keeps its counts and its incarnation: only what leads to it is
        made anew. The names of the chains that were made anew, and so are at zero.
        """

    def remove(self, plan: ChainPlan) -> None:
        """Remove chain and dispatch, and the shared parts if it was the last. Nothing there is fine."""

    def read(self, chain: str | None = None) -> dict[str, Sample]:
        """All chains' counts in one dump, or at least those of one chain, where the kernel can tell it apart for less.

        A chain that vanished is absent.
        """

    def broken(self, plans: Collection[ChainPlan]) -> set[str]:
        """The chains that do not count all of their jobs' packets: absent, their rules not those that add() makes, or
        not led to by all that add() makes. What only foreign rules do is not ours to find.

        Cheap as long as nobody else changed anything.
        """

    def changed(self) -> bool:
        """Whether something may have become broken since broken() was asked last; costs microseconds.

        True before it was ever asked.
        """

    def watch(self) -> Watch[Count] | None:
        """A listener for what others do to the chains, in the calling thread's namespace; the caller closes it.

        None where the kernel tells nobody.
        """

    def close(self) -> None:
        """Give descriptors back; chains stay."""
