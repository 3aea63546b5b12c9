"""Destination classes in the two forms a back end can use, both meaning "the longest prefix wins".

Pure functions on the classes of acctd.model; knows nothing of netfilter.
"""

from collections.abc import Sequence

from acctd.model import DestinationClass, Network


def by_longest_prefix(classes: Sequence[DestinationClass], version: int) -> list[tuple[Network, str]]:
    """Every network of one IP version with its class, longest prefix first: for rules tried one after the other."""
    pairs = [(network, cls.name) for cls in classes for network in cls.networks if network.version == version]
    return sorted(pairs, key=lambda pair: (-pair[0].prefixlen, int(pair[0].network_address)))


def disjoint(classes: Sequence[DestinationClass], version: int) -> dict[str, list[Network]]:
    """Each class's networks less what a longer prefix of another class takes away: for sets tried in any order.

    A class that has no network of this IP version, or loses all of them, is absent.
    """
    pairs = by_longest_prefix(classes, version)
    result: dict[str, list[Network]] = {}
    for index, (network, name) in enumerate(pairs):
        left = [network]
        for longer, other in pairs[:index]:
            if other != name:
                left = [piece for whole in left for piece in _without(whole, longer)]
        if left:
            result.setdefault(name, []).extend(left)
    return {name: sorted(networks, key=_place) for name, networks in result.items()}


def _without(whole: Network, hole: Network) -> list[Network]:
    if not whole.overlaps(hole):
        return [whole]
    if hole.supernet_of(whole):  # type: ignore[arg-type]  # both are of one version: the caller chose it
        return []
    return list(whole.address_exclude(hole))  # type: ignore[arg-type]


def _place(network: Network) -> tuple[int, int]:
    return int(network.network_address), network.prefixlen
