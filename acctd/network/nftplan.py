"""What the table `inet acctd` is made of, as commands of libnftables-json(5), and how to know it again.

Pure functions of a ChainPlan and the pools: nftables.py sends the commands and asks the kernel.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from acctd.kernel.libnftables import Command
from acctd.kernel.nftmessages import Base
from acctd.model import REMAINDER, DestinationClass, Network
from acctd.network.backend import PREFIX, ChainPlan, Pools
from acctd.network.classes import disjoint

TABLE = "acctd"
CHAIN_PREFIX = "JOB_"

FORWARD = "forward"
POSTROUTING = "postrouting"
INCOMING = "incoming"
OUTGOING = "outgoing"
MAPS = (INCOMING, OUTGOING)
BASES = {FORWARD: Base(2, 10, 1), POSTROUTING: Base(4, 100, 1)}
"""Where the base chains are attached: NF_INET_FORWARD behind priority filter, NF_INET_POST_ROUTING at srcnat."""

_REFUSED = "new incoming"
_FAMILY = {4: "ip", 6: "ip6"}
_ATTACHED: dict[str, dict[str, Any]] = {
    FORWARD: {"type": "filter", "hook": "forward"},
    POSTROUTING: {"type": "nat", "hook": "postrouting"},
}

Expression = dict[str, Any]
BaseRules = dict[str, list[tuple[str, list[Expression]]]]
"""The rules of the base chains under their comments, which say all that can differ: so a change is noticed."""


def base_rules(pools: Pools) -> BaseRules:
    # What comes out of a pipe must come from the address that lies at its other end.
    unknown_source = {"fib": {"result": "oif", "flags": ["saddr", "iif"]}}
    forward = [
        ("foreign source", [_match(_meta("iifname"), f"{PREFIX}*"), _match(unknown_source, False), {"drop": None}]),
        ("incoming", [{"vmap": {"key": _meta("oifname"), "data": f"@{INCOMING}"}}]),
        ("outgoing", [{"vmap": {"key": _meta("iifname"), "data": f"@{OUTGOING}"}}]),
    ]
    postrouting = []
    for family, pool in (("ip", pools.v4), ("ip6", pools.v6)):
        if pool is not None:
            prefix = {"prefix": {"addr": str(pool.network_address), "len": pool.prefixlen}}
            expressions = [
                _match(_payload(family, "saddr"), prefix),
                _match(_meta("oifname"), f"{PREFIX}*", "!="),
                {"masquerade": None},
            ]
            postrouting.append((f"masquerade {pool}", expressions))
    return {FORWARD: forward, POSTROUTING: postrouting}


def base_commands(base: BaseRules, detached: list[str]) -> list[Command]:
    """All that the jobs share, whatever of it is there already: rules are flushed and made again.

    `detached` are base chains that are attached elsewhere or nowhere, which cannot be changed.
    """
    commands: list[Command] = [{"add": {"table": {"family": "inet", "name": TABLE, "flags": []}}}]
    for name in MAPS:
        verdicts = {"family": "inet", "table": TABLE, "name": name, "type": "ifname", "map": "verdict"}
        commands.append({"add": {"map": verdicts}})
    for chain in detached:
        commands += [{"flush": {"chain": _chain(chain)}}, {"delete": {"chain": _chain(chain)}}]
    for chain, rules in base.items():
        place = {**_ATTACHED[chain], "prio": BASES[chain].priority, "policy": "accept"}
        commands.append({"add": {"chain": {**_chain(chain), **place}}})
        commands.append({"flush": {"chain": _chain(chain)}})
        commands += [{"add": {"rule": _rule(chain, comment, expressions)}} for comment, expressions in rules]
    return commands


def chain_commands(plan: ChainPlan) -> list[Command]:
    """The chain with its rules, in place of whatever is in there. The sets have to be there.

    Either map leads here. What came in from the job's interface is decided by the outgoing rules, the last of which
    matches all of it; so the rules after them see incoming packets alone and need not ask again. That matters: the
    kernel spends 0.6 us a read on every expression of every rule.
    """
    chain = plan.chain
    outgoing = [_match(_meta("iifname"), plan.ifname)]
    answers = {"&": [{"ct": {"key": "state"}}, {"|": ["established", "related"]}]}
    refuse = [_match(answers, 0), {"reject": {"type": "icmpx", "expr": "port-unreachable"}}]
    count = [{"counter": None}, {"accept": None}]
    parts = _parts(plan.classes, plan.ipv6)
    rules = [_rule(chain, f"Outgoing{part.name}", [*outgoing, part.match("daddr"), *count]) for part in parts]
    rules.append(_rule(chain, f"Outgoing{REMAINDER}", [*outgoing, *count]))
    rules.append(_rule(chain, _REFUSED, refuse))
    rules += [_rule(chain, f"Incoming{part.name}", [part.match("saddr"), *count]) for part in parts]
    rules.append(_rule(chain, f"Incoming{REMAINDER}", count))
    return [
        {"add": {"chain": _chain(chain)}},
        {"flush": {"chain": _chain(chain)}},
        *({"add": {"rule": r}} for r in rules),
    ]


def chain_comments(plan: ChainPlan) -> tuple[str, ...]:
    """What the rules of `chain_commands` are called, in their order."""
    names = (*(part.name for part in _parts(plan.classes, plan.ipv6)), REMAINDER)
    return (*(f"Outgoing{name}" for name in names), _REFUSED, *(f"Incoming{name}" for name in names))


def set_commands(plans: Sequence[ChainPlan], spoilt: Collection[str]) -> list[Command]:
    """The sets that the jobs' rules look into; the `spoilt` ones are emptied first."""
    commands: list[Command] = []
    for name, part in class_sets(plans).items():
        place = {"family": "inet", "table": TABLE, "name": name}
        kind = {"type": f"ipv{part.version}_addr", "flags": ["interval"]}
        commands.append({"add": {"set": {**place, **kind}}})
        if name in spoilt:
            commands.append({"flush": {"set": place}})
        commands.append({"add": {"element": {**place, "elem": part.ranges()}}})
    return commands


def class_sets(plans: Iterable[ChainPlan]) -> dict[str, "Part"]:
    """The sets that the jobs' rules look into. One of that name has the same elements: its name is made from them."""
    return {part.set_name: part for plan in plans for part in _parts(plan.classes, plan.ipv6)}


def element(name: str, ifname: str, chain: str) -> dict[str, Any]:
    """What leads from one of the maps to a chain."""
    pair = [ifname, {"goto": {"target": chain}}]
    return {"element": {"family": "inet", "table": TABLE, "name": name, "elem": [pair]}}


@dataclass(frozen=True, slots=True)
class Part:
    """A class's networks of one IP version, less those of the classes within it: what one rule each way is about."""

    name: str
    version: int
    spans: tuple[tuple[int, int], ...]  # first and last address
    set_name: str

    def match(self, field: str) -> Expression:
        return _match(_payload(_FAMILY[self.version], field), f"@{self.set_name}")

    def ranges(self) -> list[Expression]:
        """As nft writes them."""
        return _ranges(self.version, self.spans)

    def bounds(self) -> set[tuple[bytes, bool]]:
        """As the kernel keeps them: where a range begins (False), and what comes behind it (True)."""
        octets = 4 if self.version == 4 else 16
        found = {(first.to_bytes(octets, "big"), False) for first, _ in self.spans}
        return found | {((last + 1).to_bytes(octets, "big"), True) for _, last in self.spans if last + 1 < 256**octets}


@lru_cache(maxsize=64)  # jobs of one configuration have the same classes
def _parts(classes: tuple[DestinationClass, ...], ipv6: bool) -> tuple[Part, ...]:
    parts = []
    for version in (4, 6) if ipv6 else (4,):
        for name, networks in disjoint(classes, version).items():
            spans = _spans(networks)
            words = json.dumps(_ranges(version, spans)).encode()
            parts.append(Part(name, version, spans, f"{name}{version}_{hashlib.sha256(words).hexdigest()[:12]}"))
    return tuple(parts)


def _spans(networks: Sequence[Network]) -> tuple[tuple[int, int], ...]:
    """Sorted networks as the fewest address ranges."""
    spans: list[tuple[int, int]] = []
    for network in networks:
        first, last = int(network.network_address), int(network.broadcast_address)
        if spans and spans[-1][1] + 1 >= first:
            spans[-1] = (spans[-1][0], max(last, spans[-1][1]))
        else:
            spans.append((first, last))
    return tuple(spans)


def _ranges(version: int, spans: Iterable[tuple[int, int]]) -> list[Expression]:
    address = IPv4Address if version == 4 else IPv6Address
    return [{"range": [str(address(first)), str(address(last))]} for first, last in spans]


def _chain(name: str) -> dict[str, Any]:
    return {"family": "inet", "table": TABLE, "name": name}


def _rule(chain: str, comment: str, expressions: list[Expression]) -> dict[str, Any]:
    return {"family": "inet", "table": TABLE, "chain": chain, "comment": comment, "expr": expressions}


def _match(left: Expression, right: Any, op: str = "==") -> Expression:
    return {"match": {"op": op, "left": left, "right": right}}


def _meta(key: str) -> Expression:
    return {"meta": {"key": key}}


def _payload(protocol: str, field: str) -> Expression:
    return {"payload": {"protocol": protocol, "field": field}}
