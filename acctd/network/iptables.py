"""The legacy iptables back end: one chain a job, found through a tree of chains on the interface's name.

    FORWARD -> ACCTD_FORWARD -> ACCTD_I  (-o ac+, into a job: asked first)  -> ACCTD_I3 -> ACCTD_I3f -> goto JOB_x
                             -> ACCTD_O  (-i ac+, out of a job)             -> ACCTD_O3 -> ACCTD_O3f -> goto JOB_x

A packet from job to job is thus a new incoming one for its receiver, and rejected before its sender is billed. Each
level of the tree takes one hex digit of the name; slots are handed out with their digits reversed, so the tree stays
even. Writes through python-iptables, reads the table's raw bytes; both under the lock iptables itself takes. Sees the
legacy tables alone: what Debian's plain `iptables` writes is nf_tables, and another matter.
"""

import re
import threading
from functools import partial
from ipaddress import ip_network
from types import ModuleType

from acctd.errors import AcctdError, UsageError
from acctd.kernel import xtables
from acctd.kernel.xtables import V4, V6, Family
from acctd.model import REMAINDER, Network
from acctd.network import iptc_loader, xtcounts, xtrules
from acctd.network.backend import PREFIX, ChainPlan, Pools, Sample
from acctd.network.classes import by_longest_prefix
from acctd.network.xttable import Edit, transact

OURS = "ACCTD_"
FORWARD = "ACCTD_FORWARD"
POSTROUTING = "ACCTD_POSTROUTING"
INTO, OUT_OF = "ACCTD_I", "ACCTD_O"
DEPTH = 2
"""Levels below a root: 256 leaves. 4096 jobs make 16 rules a leaf, so a packet meets 48 at most."""

_NAME = re.compile(rf"{PREFIX}([0-9a-f]*)\Z")


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
        self._readers = [(xtables.Table(family, "filter"), xtcounts.Sampler(family)) for family in self._pools]

    def add(self, plan: ChainPlan) -> None:
        """Make the chain and its dispatch, and the shared parts if it is the first. An old chain of that name goes.

        Both IP versions or neither: what was made is taken back if the rest fails.
        """
        digits = _digits(plan)
        with xtables.locked():
            try:
                for family in self._families(plan):
                    transact(self._iptc, family, "filter", partial(_add, plan, digits))
                    transact(self._iptc, family, "nat", partial(_masquerade, self._pools[family]))
            except AcctdError:
                self._take_back(plan, digits)
                raise

    def remove(self, plan: ChainPlan) -> None:
        """Remove chain and dispatch, and the shared parts if it was the last. Nothing there is fine.

        One IP version that cannot be cleaned does not keep the other from it; the first error is raised at the end.
        """
        digits = _digits(plan)
        failed: AcctdError | None = None
        with xtables.locked():
            for family in self._families(plan):
                try:
                    self._remove(family, plan, digits)
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
                blobs = [(sampler, table.entries()) for table, sampler in self._readers]
            samples = [sampler.take(blob) for sampler, blob in blobs if blob is not None]
        return {name: Sample(counts, "") for name, counts in xtcounts.total(samples, chain).items()}

    def close(self) -> None:
        """Nothing to give back: no descriptor outlives a call."""

    def _families(self, plan: ChainPlan) -> list[Family]:
        return [family for family in self._pools if plan.ipv6 or family is V4]

    def _remove(self, family: Family, plan: ChainPlan, digits: str) -> None:
        jobs_left = transact(self._iptc, family, "filter", partial(_remove, plan, digits))
        if not jobs_left:
            transact(self._iptc, family, "nat", _unmasquerade)

    def _take_back(self, plan: ChainPlan, digits: str) -> None:
        for family in self._families(plan):
            try:
                self._remove(family, plan, digits)
            except AcctdError:
                # What made add() fail is in the way here too, and is the error worth reporting; the job's own
                # remove() comes later and says what is left.
                continue


def rules(family: Family, plan: ChainPlan) -> list[bytes]:
    """A job's chain, in the order of the source document: out by class, in by class, reject."""
    classes: list[tuple[Network | None, str]] = [*by_longest_prefix(plan.classes, family.version), (None, REMAINDER)]
    accept = xtrules.verdict("ACCEPT")
    # What leaves from another source than the job's own meets none of the outgoing rules, but the rejecting one.
    own = next((ip_network(address) for address in plan.sources if address.version == family.version), None)
    outgoing = [
        xtrules.entry(
            family,
            accept,
            inward=plan.ifname,
            source=own,
            destination=network,
            matches=xtrules.comment_match(f"Outgoing{name}"),
        )
        for network, name in classes
    ]
    incoming = [
        xtrules.entry(
            family,
            accept,
            outward=plan.ifname,
            source=network,
            matches=xtrules.state_match() + xtrules.comment_match(f"Incoming{name}"),
        )
        for network, name in classes
    ]
    return [*outgoing, *incoming, xtrules.entry(family, xtrules.reject(family))]


def _add(plan: ChainPlan, digits: str, edit: Edit) -> None:
    family = edit.family
    _forget(edit, plan, digits)
    edit.fill(plan.chain, rules(family, plan))
    for root, towards in ((INTO, _outward), (OUT_OF, _inward)):
        edit.ensure(root)
        parent = root
        for level in range(1, min(DEPTH, len(digits)) + 1):
            node = root + digits[:level]
            jump = towards(family, f"{PREFIX}{digits[:level]}+", node)
            edit.ensure(node)
            if not edit.holds(parent, jump, node):
                edit.append(parent, jump)
            parent = node
        edit.append(parent, towards(family, plan.ifname, plan.chain, goto=True))
    wanted = [(_outward(family, f"{PREFIX}+", INTO), INTO), (_inward(family, f"{PREFIX}+", OUT_OF), OUT_OF)]
    if not edit.has(FORWARD) or not _is_exactly(edit, FORWARD, wanted):
        edit.fill(FORWARD, [rule for rule, _ in wanted])
    edit.put_first("FORWARD", FORWARD)


def _remove(plan: ChainPlan, digits: str, edit: Edit) -> bool:
    """Whether jobs are left."""
    _forget(edit, plan, digits)
    if edit.has(plan.chain):
        edit.delete(plan.chain)
    for root in (INTO, OUT_OF):
        for level in range(min(DEPTH, len(digits)), 0, -1):
            node, parent = root + digits[:level], root + digits[: level - 1]
            if edit.has(node) and not _populated(edit, node):
                if edit.has(parent):
                    edit.drop(parent, lambda _, name, node=node: name == node)  # type: ignore[misc]
                edit.delete(node)
    if _populated(edit, INTO) or _populated(edit, OUT_OF):
        return True
    edit.drop("FORWARD", lambda _, name: name == FORWARD)
    edit.delete(*(chain for chain in edit.chains() if chain.startswith(OURS)))
    return False


def _forget(edit: Edit, plan: ChainPlan, digits: str) -> None:
    """Drop what leads to the chain, and what leads its interface elsewhere: a leftover of a job that had the name."""
    name = xtrules.interface(plan.ifname)
    at = edit.family.ifaces_at
    for root, place in ((INTO, at + 16), (OUT_OF, at)):
        leaf = root + digits[:DEPTH]
        if edit.has(leaf):
            edit.drop(
                leaf,
                lambda head, target, place=place: (  # type: ignore[misc]
                    target == plan.chain or (head[place : place + 16] == name and not target.startswith(OURS))
                ),
            )
    if edit.has(plan.chain) and edit.references(plan.chain):
        # An older job of this name sat on another interface: look everywhere.
        for chain in edit.chains():
            if chain.startswith((INTO, OUT_OF)):
                edit.drop(chain, lambda _, target: target == plan.chain)


def _masquerade(pool: Network, edit: Edit) -> None:
    family = edit.family
    rule = xtrules.entry(family, xtrules.masquerade(family), source=pool, outward=f"{PREFIX}+", not_outward=True)
    if not edit.has(POSTROUTING) or not _is_exactly(edit, POSTROUTING, [(rule, "MASQUERADE")]):
        edit.fill(POSTROUTING, [rule])
    edit.put_first("POSTROUTING", POSTROUTING)


def _unmasquerade(edit: Edit) -> None:
    if edit.has(POSTROUTING):
        edit.drop("POSTROUTING", lambda _, name: name == POSTROUTING)
        edit.delete(POSTROUTING)


def _is_exactly(edit: Edit, chain: str, wanted: list[tuple[bytes, str]]) -> bool:
    found = list(edit.rules(chain))
    return len(found) == len(wanted) and all(
        name == target and xtrules.same(edit.family, head, rule)
        for (head, name), (rule, target) in zip(found, wanted, strict=True)
    )


def _populated(edit: Edit, chain: str) -> bool:
    return edit.has(chain) and next(edit.rules(chain), None) is not None


def _outward(family: Family, name: str, chain: str, *, goto: bool = False) -> bytes:
    return xtrules.entry(family, xtrules.verdict(chain), outward=name, goto=goto)


def _inward(family: Family, name: str, chain: str, *, goto: bool = False) -> bytes:
    return xtrules.entry(family, xtrules.verdict(chain), inward=name, goto=goto)


def _digits(plan: ChainPlan) -> str:
    match = _NAME.match(plan.ifname)
    if match is None or len(plan.ifname) > 15:
        raise UsageError(
            f"interface {plan.ifname!r} of {plan.chain} cannot be a pipe's outer end; it is {PREFIX} and hex digits, "
            "15 characters at most"
        )
    return match.group(1)
