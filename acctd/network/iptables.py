"""The legacy iptables back end: one chain a job, found through a tree of chains on the interface's name: see xtplan.py.

A packet from job to job is a new incoming one for its receiver, and rejected before its sender is billed. Writes
through python-iptables, reads the table's raw bytes; both under the lock iptables itself takes. Sees the legacy tables
alone: what Debian's plain `iptables` writes is nf_tables, and another matter.

The kernel numbers neither rules nor tables, and tells nobody of changes. What stands in for a chain's incarnation is
what its last rule has counted, see xtplan.rules: `iptables -Z`, a restore of saved rules without their counters, and
a program that died between its replacing a table and its adding the old counts all show in it. A restore with
counters (`-c`) brings it back with the rest: that shows only if the counts are lower than those read before.
"""

import itertools
import secrets
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import NamedTuple

from acctd.errors import AcctdError
from acctd.kernel import xtables
from acctd.kernel.xtables import V4, V6, Family, Info, Table
from acctd.model import Network
from acctd.network import iptc_loader, xtcounts, xtplan, xtrules
from acctd.network.backend import ChainPlan, Pools, Sample
from acctd.network.xtcheck import Checker, Whole
from acctd.network.xttable import Edit, transact

_FORWARD_HOOK, _POSTROUTING_HOOK = 2, 4  # NF_INET_FORWARD, NF_INET_POST_ROUTING
_MAKINGS = 1 << 40


class _Tables(NamedTuple):
    """One family's tables, and what is remembered of them."""

    filters: Table
    nat: Table
    sampler: xtcounts.Sampler
    checker: Checker


class Iptables:
    """Chains in the legacy tables. The namespace is the calling thread's, at each call."""

    name = "iptables"

    def __init__(self, pools: Pools) -> None:
        """Raises UnavailableError where python-iptables, a table or an extension of the kernel is missing."""
        self._pools: dict[Family, Network] = {V4: pools.v4} | ({V6: pools.v6} if pools.v6 else {})
        self._iptc: ModuleType = iptc_loader.load()
        for family in self._pools:
            xtables.require(family, "filter", xtrules.EXTENSIONS)
            xtables.require(family, "nat", xtrules.NAT_EXTENSIONS)
        self._reading = threading.Lock()
        self._tables = {
            family: _Tables(
                Table(family, "filter"), Table(family, "nat"), xtcounts.Sampler(family), Checker(family, pool)
            )
            for family, pool in self._pools.items()
        }
        self._checked: list[Info | None] = []

    def add(self, *plans: ChainPlan) -> None:
        """Make the chains and their dispatch, and the shared parts if missing. Old chains of these names go.

        Both IP versions or neither: what was made is taken back if the rest fails.
        """
        with xtables.locked():
            self._make(plans, ())

    def mend(self, *plans: ChainPlan) -> set[str]:
        """As add(), but a chain whose rules are whole in both IP versions keeps its counts; the others."""
        with self._reading, xtables.locked():
            anew = set[str]()
            for family, tables in self._tables.items():
                blob, wanted = tables.filters.entries(), self._of(family, plans)
                if blob is None:
                    anew |= {plan.chain for plan in wanted}
                else:
                    anew |= tables.checker.misshapen(blob, tables.sampler.layout(blob), wanted)
            self._make(plans, {plan.chain for plan in plans} - anew)
        return anew

    def remove(self, plan: ChainPlan) -> None:
        """Remove chain and dispatch, and the shared parts if it was the last. Nothing there is fine.

        One IP version that cannot be cleaned does not keep the other from it; the first error is raised at the end.
        """
        xtplan.digits(plan)
        failed: AcctdError | None = None
        with xtables.locked(), self._following():
            for family in self._families(plan):
                try:
                    self._remove(family, plan)
                except AcctdError as e:
                    failed = failed or e
        if failed is not None:
            raise failed

    def read(self, chain: str | None = None) -> dict[str, Sample]:
        """All chains' counts in one dump, or one chain's: L3 bytes and packets. A chain that vanished is absent.

        The kernel gives whole tables only, so that one chain costs nearly as much as all.
        """
        with self._reading:  # the buffers are kept; the file lock, being shared here, does not keep threads apart
            with xtables.locked(shared=True):
                blobs = [(tables.sampler, tables.filters.entries()) for tables in self._tables.values()]
            samples = [sampler.take(blob) for sampler, blob in blobs if blob is not None]
        found: dict[str, Sample] = {}
        for name, counts in xtcounts.total(samples, chain).items():
            making = counts.pop(xtcounts.MAKING, None)  # of both IP versions together: neither can change unseen
            found[name] = Sample(counts, f"{making.packets:x}" if making else "")
        return found

    def broken(self, plans: Collection[ChainPlan]) -> set[str]:
        """The chains that are not, or no longer, what add() made of them, or that it would lead to otherwise.

        That includes the order in the built-in chains: a foreign rule before our jump may keep packets from it.
        """
        found: set[str] = set()
        with self._reading:
            with xtables.locked(shared=True):
                self._checked = self._look()
                fetched = [(family, t, t.filters.entries(), t.nat.entries()) for family, t in self._tables.items()]
            for family, tables, filters, nat in fetched:
                wanted = self._of(family, plans)
                if filters is None or nat is None:
                    found |= {plan.chain for plan in wanted}
                    continue
                found |= tables.checker.broken(
                    Whole(filters, _hook(tables.filters, _FORWARD_HOOK)),
                    tables.sampler.layout(filters),
                    Whole(nat, _hook(tables.nat, _POSTROUTING_HOOK)),
                    wanted,
                )
        return found

    def changed(self) -> bool:
        """Whether a table has another size, or number of rules, than when broken() looked, or than our own changes
        since have left it with. So `iptables -Z`, or a rule put in another's place, is not noticed here.
        """
        return self._look() != self._checked

    def watch(self) -> None:
        """The kernel tells nobody what happens to legacy tables."""

    def close(self) -> None:
        """Nothing to give back: no descriptor outlives a call."""

    def _families(self, plan: ChainPlan) -> list[Family]:
        return [family for family in self._pools if plan.ipv6 or family is V4]

    def _of(self, family: Family, plans: Collection[ChainPlan]) -> list[ChainPlan]:
        return [plan for plan in plans if family in self._families(plan)]

    def _look(self) -> list[Info | None]:
        return [table.info() for tables in self._tables.values() for table in (tables.filters, tables.nat)]

    @contextmanager
    def _following(self) -> Iterator[None]:
        """Under the lock: what nobody had changed before is not changed by us either."""
        same = self._look() == self._checked
        try:
            yield
        finally:
            if same:
                self._checked = self._look()

    def _make(self, plans: Sequence[ChainPlan], kept: Collection[str]) -> None:
        """Everything for these chains; rules for those that are not `kept`."""
        for plan in plans:
            xtplan.digits(plan)
        makings = {plan.chain: 1 + secrets.randbelow(_MAKINGS) for plan in plans if plan.chain not in kept}
        new: set[str] = set()
        with self._following():
            try:
                for family, pool in self._pools.items():
                    if wanted := self._of(family, plans):
                        new |= transact(self._iptc, family, "filter", partial(_add, wanted, makings))
                        transact(self._iptc, family, "nat", partial(_masquerade, family, pool))
            except AcctdError:
                self._take_back([plan for plan in plans if plan.chain in new])
                raise

    def _remove(self, family: Family, plan: ChainPlan) -> None:
        jobs_left = transact(self._iptc, family, "filter", partial(_remove, plan))
        if not jobs_left:
            transact(self._iptc, family, "nat", _unmasquerade)

    def _take_back(self, plans: Sequence[ChainPlan]) -> None:
        for plan in plans:
            for family in self._families(plan):
                try:
                    self._remove(family, plan)
                except AcctdError:
                    # What made add() fail is in the way here too, and is the error worth reporting; the job's own
                    # remove() comes later and says what is left.
                    continue


def _hook(table: Table, number: int) -> int:
    """Where the built-in chain begins in what was fetched."""
    return table.fetched.hooks[number] if table.fetched else -1


def _add(plans: Sequence[ChainPlan], makings: dict[str, int], edit: Edit) -> set[str]:
    """Rules for the chains that have a making. The chains that were not there before."""
    family = edit.family
    new = {plan.chain for plan in plans if not edit.has(plan.chain)}
    for plan in plans:
        _forget(edit, plan)
    there: dict[str, set[tuple[bytes, str]]] = {}
    for plan in plans:
        if plan.chain in makings:
            edit.fill(plan.chain, xtplan.rules(family, plan, makings[plan.chain]))
        for step in itertools.chain(*xtplan.ways(family, plan)):
            if step.chain not in there:
                there[step.chain] = _tidied(edit, step.chain)
            rule = xtrules.head(family, step.rule), step.target
            if rule not in there[step.chain]:
                if step.target.startswith(xtplan.OURS):
                    edit.ensure(step.target)
                edit.append(step.chain, step.rule)
                there[step.chain].add(rule)
    _call(edit, "FORWARD", xtplan.FORWARD, xtplan.forward(family))
    return new


def _tidied(edit: Edit, chain: str) -> set[tuple[bytes, str]]:
    """The rules of a chain of the tree, by head and target, after all that do not belong there were dropped."""
    if edit.ensure(chain):
        return set()
    family = edit.family
    rules = {(xtrules.head(family, head), target) for head, target in edit.rules(chain)}
    strange = {rule for rule in rules if not xtplan.is_of_tree(family, chain, *rule)}
    if strange:
        edit.drop(chain, lambda head, target: (xtrules.head(family, head), target) in strange)
    return rules - strange


def _remove(plan: ChainPlan, edit: Edit) -> bool:
    """Whether jobs are left."""
    _forget(edit, plan)
    if edit.has(plan.chain):
        edit.delete(plan.chain)
    for root in xtplan.ROOTS:
        through = xtplan.nodes(root, xtplan.digits(plan))
        for parent, node in reversed(list(itertools.pairwise(through))):
            if edit.has(node) and not _populated(edit, node):
                if edit.has(parent):
                    edit.drop(parent, lambda _, name, node=node: name == node)  # type: ignore[misc]
                edit.delete(node)
    if any(_populated(edit, root) for root in xtplan.ROOTS):
        return True
    edit.drop("FORWARD", lambda _, name: name == xtplan.FORWARD)
    edit.delete(*(chain for chain in edit.chains() if chain.startswith(xtplan.OURS)))
    return False


def _forget(edit: Edit, plan: ChainPlan) -> None:
    """Drop what leads to the chain, and what leads its interface elsewhere: a leftover of a job that had the name."""
    name = xtrules.interface(plan.ifname)
    at = edit.family.ifaces_at
    for root, place in ((xtplan.INTO, at + 16), (xtplan.OUT_OF, at)):
        leaf = xtplan.nodes(root, xtplan.digits(plan))[-1]
        if edit.has(leaf):
            edit.drop(
                leaf,
                lambda head, target, place=place: (  # type: ignore[misc]
                    target == plan.chain or (head[place : place + 16] == name and not target.startswith(xtplan.OURS))
                ),
            )
    if edit.has(plan.chain) and edit.references(plan.chain):
        # An older job of this name sat on another interface: look everywhere.
        for chain in edit.chains():
            if chain.startswith(xtplan.ROOTS):
                edit.drop(chain, lambda _, target: target == plan.chain)


def _masquerade(family: Family, pool: Network, edit: Edit) -> None:
    _call(edit, "POSTROUTING", xtplan.POSTROUTING, xtplan.masquerade(family, pool))


def _unmasquerade(edit: Edit) -> None:
    if edit.has(xtplan.POSTROUTING):
        edit.drop("POSTROUTING", lambda _, name: name == xtplan.POSTROUTING)
        edit.delete(xtplan.POSTROUTING)


def _call(edit: Edit, built_in: str, chain: str, steps: list[xtplan.Step]) -> None:
    """Have the chain hold these rules and no others, and the built-in one call it first."""
    found = list(edit.rules(chain)) if edit.has(chain) else []
    if len(found) != len(steps) or not all(
        name == step.target and xtrules.same(edit.family, head, step.rule)
        for (head, name), step in zip(found, steps, strict=True)
    ):
        edit.fill(chain, [step.rule for step in steps])
    edit.put_first(built_in, chain)


def _populated(edit: Edit, chain: str) -> bool:
    return edit.has(chain) and next(edit.rules(chain), None) is not None
