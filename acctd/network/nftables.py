"""The nftables back end: the table `inet acctd` with one chain a job, found through verdict maps on the interface name.

    map incoming, outgoing  ifname : goto JOB_...
    set Internal4_<hash>... a class's networks, shared by all jobs that have the same ones
    chain forward           hook forward priority filter + 10: drop what leaves a pipe from a foreign source, then
                            oifname vmap @incoming, iifname vmap @outgoing
    chain postrouting       hook postrouting priority srcnat: masquerade what leaves the pools for the world
    chain JOB_<id>          one counting rule per direction, class and IP family, named by its comment; new incoming
                            connections are rejected

`forward` stands behind the foreign filters, so a packet they drop is not billed, and what is accepted here is still
theirs to drop. `incoming` is asked first: a packet from job to job is a new connection for its receiver and is rejected
before it is billed to its sender. Counters are anonymous, inside the rules, because libnftables fetches every *named*
object before each change (10 ms a job at 1000 jobs instead of 1.6, measured by itself); and sets are shared, because it
fetches every set too, anonymous ones included (14 ms a job at 300 jobs instead of 1.0). Reference: nft(8),
libnftables-json(5).

The context and the socket belong to the network namespace of the thread that makes the object, and to one thread at a
time. Between looking and changing another acctd must keep out: the caller holds the node-wide lock.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from acctd.errors import KernelRefusedError
from acctd.kernel.libnftables import Command, Libnftables
from acctd.kernel.nftrules import TableReader
from acctd.model import REMAINDER, DestinationClass, Network
from acctd.network.backend import PREFIX, ChainPlan, Count, Pools, Sample
from acctd.network.classes import disjoint

TABLE = "acctd"
CHAIN_PREFIX = "JOB_"

_FORWARD = "forward"
_POSTROUTING = "postrouting"
_INCOMING = "incoming"
_OUTGOING = "outgoing"
_MAPS = (_INCOMING, _OUTGOING)
_FAMILY = {4: "ip", 6: "ip6"}
_HOOKS: dict[str, dict[str, Any]] = {
    _FORWARD: {"type": "filter", "hook": "forward", "prio": 10},  # priority filter is 0
    _POSTROUTING: {"type": "nat", "hook": "postrouting", "prio": 100},  # priority srcnat
}

Expression = dict[str, Any]


class Nftables:
    """Chains in nf_tables. See backend.Chains for the contract."""

    name = "nftables"

    def __init__(self, pools: Pools) -> None:
        self._base = _base_rules(pools)
        self._nft = Libnftables()
        try:
            self._reader = TableReader(TABLE, Count)
        except BaseException:
            self._nft.close()
            raise

    def add(self, plan: ChainPlan) -> None:
        """Make chain and dispatch in one transaction, and whatever shared part is missing or not as it should be."""
        self._run(lambda: self._addition(plan))

    def remove(self, plan: ChainPlan) -> None:
        """Remove chain and dispatch in one transaction; with the last chain goes the table."""
        if not self._reader.table_exists():
            return
        neighbour = self._neighbour(plan)
        self._run(lambda: self._removal(plan, neighbour))
        if neighbour is not None:
            self._remove_unused_sets(plan, neighbour)

    def read(self, chain: str | None = None) -> dict[str, Sample]:
        """All jobs' counts from one netlink dump, or one job's at a cost that does not grow with the others'."""
        if chain is not None:
            counts = self._reader.read_chain(chain)
            return {} if counts is None else {chain: Sample(counts, "")}
        found = self._reader.read().items()
        return {chain: Sample(counts, "") for chain, counts in found if chain.startswith(CHAIN_PREFIX)}

    def close(self) -> None:
        """Give the library's context and the sockets back; chains stay."""
        self._reader.close()
        self._nft.close()

    def _run(self, look: Callable[[], list[Command]]) -> None:
        """Look what there is and change it. A refusal may mean that a foreign program, which takes no lock of ours,
        changed or flushed the ruleset in between: then look again, once.
        """
        if commands := look():
            try:
                self._nft.run(commands)
            except KernelRefusedError:
                if commands := look():
                    self._nft.run(commands)

    def _addition(self, plan: ChainPlan) -> list[Command]:
        commands: list[Command] = [] if self._base_is_whole() else self._make_base()
        # Leftovers of someone who died: this interface under any chain, this chain under any interface.
        stale = {(name, plan.ifname): self._reader.goto_of(name, plan.ifname) for name in _MAPS}
        if self._reader.chain_exists(plan.chain):
            for name in _MAPS:
                stale |= {(name, ifname): chain for ifname, chain in self._reader.gotos(name) if chain == plan.chain}
        commands += [{"delete": _element(name, ifname, chain)} for (name, ifname), chain in stale.items() if chain]
        address = {"family": "inet", "table": TABLE, "name": plan.chain}
        commands += [{"add": {"chain": address}}, {"flush": {"chain": address}}]
        commands += [{"add": {"set": each}} for each in _class_sets(plan)]
        commands += [{"add": {"rule": rule}} for rule in _job_rules(plan)]
        commands += [{"add": _element(name, plan.ifname, plan.chain)} for name in _MAPS]
        return commands

    def _removal(self, plan: ChainPlan, neighbour: str | None) -> list[Command]:
        if neighbour is None:
            return [{"delete": {"table": {"family": "inet", "name": TABLE}}}] if self._reader.table_exists() else []
        if not self._reader.chain_exists(plan.chain):
            return []  # nor can a map lead to it
        commands: list[Command] = []
        for name in _MAPS:
            if self._reader.goto_of(name, plan.ifname) == plan.chain:
                commands.append({"delete": _element(name, plan.ifname, plan.chain)})
            else:
                # The lease is not the one it was made with: look for it under any name.
                found = [ifname for ifname, chain in self._reader.gotos(name) if chain == plan.chain]
                commands += [{"delete": _element(name, ifname, plan.chain)} for ifname in found]
        return [*commands, {"delete": {"chain": {"family": "inet", "table": TABLE, "name": plan.chain}}}]

    def _neighbour(self, plan: ChainPlan) -> str | None:
        """Another job's chain, if there is one: also one whose map elements somebody took away."""
        found = next((chain for _, chain in self._reader.gotos(_OUTGOING) if chain != plan.chain), None)
        return found or next((c for c in self._reader.chains() if c.startswith(CHAIN_PREFIX) and c != plan.chain), None)

    def _remove_unused_sets(self, plan: ChainPlan, neighbour: str) -> None:
        """Take away the sets that only this job's rules looked into. Mostly any other job has the same ones."""
        for name in (each["name"] for each in _class_sets(plan)):
            if not self._reader.mentions(name, neighbour) and not self._reader.mentions(name):
                self._reader.delete_set(name)

    def _base_is_whole(self) -> bool:
        return all(
            self._reader.comments(chain) == [comment for comment, _ in rules] for chain, rules in self._base.items()
        )

    def _make_base(self) -> list[Command]:
        """All that the jobs share, whatever of it is there already: rules are flushed and made again."""
        commands: list[Command] = [{"add": {"table": {"family": "inet", "name": TABLE}}}]
        for name in _MAPS:
            verdicts = {"family": "inet", "table": TABLE, "name": name, "type": "ifname", "map": "verdict"}
            commands.append({"add": {"map": verdicts}})
        for chain, rules in self._base.items():
            place = {"family": "inet", "table": TABLE, "name": chain}
            commands.append({"add": {"chain": {**place, **_HOOKS[chain], "policy": "accept"}}})
            commands.append({"flush": {"chain": place}})
            commands += [{"add": {"rule": _rule(chain, comment, expressions)}} for comment, expressions in rules]
        return commands


def _base_rules(pools: Pools) -> dict[str, list[tuple[str, list[Expression]]]]:
    """The rules of the base chains under their comments, which say all that can differ: so a change is noticed."""
    # What comes out of a pipe must come from the address that lies at its other end.
    unknown_source = {"fib": {"result": "oif", "flags": ["saddr", "iif"]}}
    forward = [
        ("foreign source", [_match(_meta("iifname"), f"{PREFIX}*"), _match(unknown_source, False), {"drop": None}]),
        ("incoming", [{"vmap": {"key": _meta("oifname"), "data": f"@{_INCOMING}"}}]),
        ("outgoing", [{"vmap": {"key": _meta("iifname"), "data": f"@{_OUTGOING}"}}]),
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
    return {_FORWARD: forward, _POSTROUTING: postrouting}


def _job_rules(plan: ChainPlan) -> list[dict[str, Any]]:
    """The rules of a job's chain.

    Either map leads here. What came in from the job's interface is decided by the outgoing rules, the last of which
    matches all of it; so the rules after them see incoming packets alone and need not ask again. That matters: the
    kernel spends 0.6 us a read on every expression of every rule.
    """
    outgoing = [_match(_meta("iifname"), plan.ifname)]
    answers = {"&": [{"ct": {"key": "state"}}, {"|": ["established", "related"]}]}
    refuse = [_match(answers, 0), {"reject": {"type": "icmpx", "expr": "port-unreachable"}}]
    count = [{"counter": None}, {"accept": None}]
    rules = [
        _rule(plan.chain, f"Outgoing{name}", [*outgoing, match, *count])
        for name, match in _class_matches(plan.classes, "daddr", ipv6=plan.ipv6)
    ]
    rules.append(_rule(plan.chain, f"Outgoing{REMAINDER}", [*outgoing, *count]))
    rules.append(_rule(plan.chain, "new incoming", refuse))
    rules += [
        _rule(plan.chain, f"Incoming{name}", [match, *count])
        for name, match in _class_matches(plan.classes, "saddr", ipv6=plan.ipv6)
    ]
    rules.append(_rule(plan.chain, f"Incoming{REMAINDER}", count))
    return rules


def _class_matches(classes: Sequence[DestinationClass], field: str, *, ipv6: bool) -> list[tuple[str, Expression]]:
    """One match for each class and IP version it has networks of. The sets are disjoint: their order means nothing."""
    return [
        (name, _match(_payload(_FAMILY[version], field), f"@{_set_name(name, version, ranges)}"))
        for name, version, ranges in _class_ranges(classes, ipv6=ipv6)
    ]


def _class_sets(plan: ChainPlan) -> list[dict[str, Any]]:
    """The sets that the job's rules look into. One of that name has the same elements: its name is made from them."""
    return [
        {
            "family": "inet",
            "table": TABLE,
            "name": _set_name(name, version, ranges),
            "type": f"ipv{version}_addr",
            "flags": ["interval"],
            "elem": ranges,
        }
        for name, version, ranges in _class_ranges(plan.classes, ipv6=plan.ipv6)
    ]


def _set_name(name: str, version: int, ranges: list[Expression]) -> str:
    return f"{name}{version}_{hashlib.sha256(json.dumps(ranges).encode()).hexdigest()[:12]}"


def _class_ranges(classes: Sequence[DestinationClass], *, ipv6: bool) -> list[tuple[str, int, list[Expression]]]:
    return [
        (name, version, _ranges(networks))
        for version in ((4, 6) if ipv6 else (4,))
        for name, networks in disjoint(classes, version).items()
    ]


def _ranges(networks: Sequence[Network]) -> list[Expression]:
    """Sorted networks as the fewest address ranges, written as nft writes them."""
    spans: list[list[int]] = []
    for network in networks:
        first, last = int(network.network_address), int(network.broadcast_address)
        if spans and spans[-1][1] + 1 >= first:
            spans[-1][1] = max(last, spans[-1][1])
        else:
            spans.append([first, last])
    address = type(networks[0].network_address)
    return [{"range": [str(address(first)), str(address(last))]} for first, last in spans]


def _rule(chain: str, comment: str, expressions: list[Expression]) -> dict[str, Any]:
    return {"family": "inet", "table": TABLE, "chain": chain, "comment": comment, "expr": expressions}


def _element(name: str, ifname: str, chain: str) -> dict[str, Any]:
    pair = [ifname, {"goto": {"target": chain}}]
    return {"element": {"family": "inet", "table": TABLE, "name": name, "elem": [pair]}}


def _match(left: Expression, right: Any, op: str = "==") -> Expression:
    return {"match": {"op": op, "left": left, "right": right}}


def _meta(key: str) -> Expression:
    return {"meta": {"key": key}}


def _payload(protocol: str, field: str) -> Expression:
    return {"payload": {"protocol": protocol, "field": field}}
