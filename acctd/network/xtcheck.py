"""Whether a family's legacy tables still lead every packet of a job through its chain, and the chain is as it was made.

Reads bytes and nothing else. As in xtcounts, what was found once is remembered, and proven each time: as long as every
byte of a table except its counters is where it was, only chains that were not asked about before are looked at.
"""

import struct
from collections.abc import Collection
from typing import NamedTuple

from acctd.kernel.xtables import Family
from acctd.model import Network
from acctd.network import xtplan, xtrules
from acctd.network.backend import ChainPlan
from acctd.network.xtcounts import ERROR, ERROR_SIZE, Chain, Layout

_COUNTERS = 16
_OFFSETS = struct.Struct("=HH")
_TARGET = struct.Struct("=H29sBi")  # xt_entry_target; for the standard one, which has no name, its verdict
_TARGET_SIZE = 40
_VERDICTS = {-1: "DROP", -2: "ACCEPT", -5: "RETURN"}


class Whole(NamedTuple):
    """One table as it was fetched: its bytes, and where the chain begins that the kernel calls at the hook we use."""

    blob: memoryview
    hook: int


Rules = list[tuple[bytes, str]]
"""Each rule's head up to its counters, and the name of its target."""


class _Rules(NamedTuple):
    """Of a table, without the jobs' chains: the first rule at the hook, and our own chains' rules."""

    first: tuple[bytes, str]
    ours: dict[str, Rules]


class _Memory:
    """Remembers what a table had outside the jobs' chains, until a byte of it that is no counter changes."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._hook = -1
        self._layout: Layout | None = None
        self._frame = struct.Struct("")
        self._expected: tuple[bytes, ...] = ()
        self._rules: _Rules | None = None

    def look(self, table: Whole, layout: Layout | None) -> _Rules:
        """The same object as before if nothing has changed. `layout` says where jobs' chains are, None for nowhere."""
        blob, hook = table
        if (
            self._rules is None
            or hook != self._hook
            or layout is not self._layout
            or self._frame.size != len(blob)
            or self._frame.unpack_from(blob) != self._expected
        ):
            raw = bytes(blob)
            self._rules, self._frame = _walk(self._family, raw, hook, layout)
            self._hook, self._layout, self._expected = hook, layout, self._frame.unpack_from(raw)
        return self._rules


class Checker:
    """Checks one family."""

    def __init__(self, family: Family, pool: Network) -> None:
        self._family = family
        self._forward = _rules(family, xtplan.forward(family))
        self._masquerade = _rules(family, xtplan.masquerade(family, pool))
        self._filter, self._nat = _Memory(family), _Memory(family)
        self._seen: _Rules | None = None
        self._reached: dict[str, ChainPlan] = {}  # by the rules that were seen
        self._made: dict[str, tuple[Chain, ChainPlan]] = {}  # of these plans, as they lay in the table

    def broken(self, filters: Whole, layout: Layout, nat: Whole, plans: Collection[ChainPlan]) -> set[str]:
        """The plans' chains that are not as made, or that packets do not reach. `layout` is that of `filters`."""
        seen = self._filter.look(filters, layout)
        if not (
            self._calls(self._nat.look(nat, None), xtplan.POSTROUTING, self._masquerade)
            and self._calls(seen, xtplan.FORWARD, self._forward)
        ):
            return {plan.chain for plan in plans}
        if seen is not self._seen or not all(self._reached.get(plan.chain) == plan for plan in plans):
            self._seen, self._reached = seen, self._find_reached(seen, plans)
        missed = {plan.chain for plan in plans if plan.chain not in self._reached}
        return missed | self.misshapen(filters.blob, layout, plans)

    def misshapen(self, blob: memoryview, layout: Layout, plans: Collection[ChainPlan]) -> set[str]:
        """The plans' chains that are not there, or whose rules are not those that are made of the plan."""
        there = {chain.name: (chain, place) for chain, place in zip(layout.chains, layout.places, strict=True)}
        made: dict[str, tuple[Chain, ChainPlan]] = {}
        for plan in plans:
            if plan.chain in there:
                chain, place = there[plan.chain]
                if self._made.get(plan.chain) == (chain, plan) or _is_made_of(
                    self._family, bytes(blob[place : place + chain.length]), plan
                ):
                    made[plan.chain] = chain, plan
        self._made = made
        return {plan.chain for plan in plans if plan.chain not in made}

    def _calls(self, seen: _Rules, chain: str, rules: Rules) -> bool:
        """Whether the hook calls our chain before all else, and the chain has these rules and no others."""
        jump = xtrules.entry(self._family, xtrules.verdict(chain))
        return seen.first == (xtrules.head(self._family, jump), chain) and seen.ours.get(chain) == rules

    def _find_reached(self, seen: _Rules, plans: Collection[ChainPlan]) -> dict[str, ChainPlan]:
        family = self._family
        first = {chain: dict(reversed(rules)) for chain, rules in seen.ours.items()}  # of equal ones the first counts
        strange = {
            chain
            for chain, rules in seen.ours.items()
            if chain.startswith(xtplan.ROOTS) and not all(xtplan.is_of_tree(family, chain, *rule) for rule in rules)
        }
        return {
            plan.chain: plan
            for plan in plans
            if all(
                step.chain not in strange
                and first.get(step.chain, {}).get(xtrules.head(family, step.rule)) == step.target
                for way in xtplan.ways(family, plan)
                for step in way
            )
        }


def _walk(family: Family, raw: bytes, hook: int, layout: Layout | None) -> tuple[_Rules, struct.Struct]:
    """All that is of interest outside the jobs' chains; and the format of all of it that is no counter."""
    jobs = dict(zip(layout.places, layout.chains, strict=True)) if layout else {}
    bodies: dict[int, str] = {}  # where a chain's rules begin, which is where jumps to it lead
    found: list[tuple[str, bytes, str, int]] = []
    around, done, position, chain = ["="], 0, 0, ""
    while position < len(raw):
        if (job := jobs.get(position)) is not None:
            bodies[position + family.size + ERROR_SIZE] = job.name
            around.append(f"{position - done}s{job.length}x")
            position = done = position + job.length
            chain = ""
            continue
        to, following = _OFFSETS.unpack_from(raw, position + family.offsets_at)
        here = position + family.counters_at
        around.append(f"{here - done}s{_COUNTERS}x")
        done = here + _COUNTERS
        if raw.startswith(ERROR, position + to):
            chain = raw[position + to + len(ERROR) : position + following].split(b"\0", 1)[0].decode("ascii", "replace")
            bodies[position + following] = chain
        elif position == hook or chain.startswith(xtplan.OURS):
            _, name, _, verdict = _TARGET.unpack_from(raw, position + to)
            head = raw[position : position + family.offsets_at + 4]
            found.append((chain, head, name.split(b"\0", 1)[0].decode("ascii", "replace"), verdict))
        position += following or len(raw)  # never 0, says the kernel; a short answer would be better than a long loop
    around.append(f"{len(raw) - done}s")
    named = [
        (chain, (head, name or bodies.get(verdict) or _VERDICTS.get(verdict, "")))
        for chain, head, name, verdict in found
    ]
    ours: dict[str, Rules] = {}
    for chain, rule in named:
        if chain:
            ours.setdefault(chain, []).append(rule)
    for rules in ours.values():
        rules.pop()  # the one that closes a chain
    first = next((rule for chain, rule in named if not chain), (b"", ""))
    return _Rules(first, ours), struct.Struct("".join(around))


def _is_made_of(family: Family, raw: bytes, plan: ChainPlan) -> bool:
    """Whether a chain, from its head on, has these rules: bytes and order, less counters and the kernel's own marks."""
    position = family.size + ERROR_SIZE
    closing = xtrules.entry(family, xtrules.verdict("RETURN"))
    for rule in (*xtplan.rules(family, plan, 0), closing):
        there = raw[position : position + len(rule)]
        to = _OFFSETS.unpack_from(rule, family.offsets_at)[0]
        if (
            len(there) < len(rule)
            or not xtrules.same(family, there, rule)
            or there[family.size : to] != rule[family.size : to]
            or _target(there[to:]) != _target(rule[to:])
        ):
            return False
        position += len(rule)
    return position == len(raw)


def _target(raw: bytes) -> tuple[str, bytes]:
    """A target's name, and what it is told. In the kernel standard ones have no name, but a verdict."""
    _, name, _, verdict = _TARGET.unpack_from(raw)
    word = name.split(b"\0", 1)[0].decode("ascii", "replace") or _VERDICTS.get(verdict, "")
    return word, b"" if word in _VERDICTS.values() else raw[_TARGET.size - 4 :]


def _rules(family: Family, steps: list[xtplan.Step]) -> Rules:
    return [(xtrules.head(family, step.rule), step.target) for step in steps]
