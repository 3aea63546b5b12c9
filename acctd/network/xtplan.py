"""What the legacy tables hold for a job, as rules that ought to be there: iptables.py makes them, xtcheck.py looks.

    FORWARD -> ACCTD_FORWARD -> ACCTD_I  (-o ac+, into a job: asked first)  -> ACCTD_I3 -> ACCTD_I3f -> goto JOB_x
                             -> ACCTD_O  (-i ac+, out of a job)             -> ACCTD_O3 -> ACCTD_O3f -> goto JOB_x
    POSTROUTING (nat) -> ACCTD_POSTROUTING -> MASQUERADE

Pure functions: names and bytes. Each level of the tree takes one hex digit of the interface's name; slots are handed
out with their digits reversed, so the tree stays even.
"""

import itertools
import re
from functools import lru_cache
from ipaddress import ip_network
from typing import NamedTuple

from acctd.errors import UsageError
from acctd.kernel.xtables import V4, V6, Family
from acctd.model import REMAINDER, Network
from acctd.network import xtrules
from acctd.network.backend import PREFIX, ChainPlan
from acctd.network.classes import by_longest_prefix

OURS = "ACCTD_"
JOBS = "JOB_"
FORWARD = "ACCTD_FORWARD"
POSTROUTING = "ACCTD_POSTROUTING"
INTO, OUT_OF = "ACCTD_I", "ACCTD_O"
ROOTS = (INTO, OUT_OF)
DEPTH = 2
"""Levels below a root: 256 leaves. 4096 jobs make 16 rules a leaf, so a packet meets 48 at most."""

_NAME = re.compile(rf"{PREFIX}([0-9a-f]*)\Z")
_FAMILIES = {4: V4, 6: V6}


class Step(NamedTuple):
    """A rule of the tree: in which chain it stands, its bytes, and the chain that it leads to."""

    chain: str
    rule: bytes
    target: str


def digits(plan: ChainPlan) -> str:
    """What the tree goes by. Raises UsageError on a name that no pipe has."""
    match = _NAME.match(plan.ifname)
    if match is None or len(plan.ifname) > 15:
        raise UsageError(
            f"interface {plan.ifname!r} of {plan.chain} cannot be a pipe's outer end; it is {PREFIX} and hex digits, "
            "15 characters at most"
        )
    return match.group(1)


def rules(family: Family, plan: ChainPlan, making: int) -> list[bytes]:
    """A job's chain, in the order of the source document: out by class, in by class, reject.

    No packet comes to the last rule. It begins with `making` packets to its account: whoever sets the chain's counters
    back, or puts a saved chain in its place without them, cannot but change that.
    """
    classes: list[tuple[Network | None, str]] = [*by_longest_prefix(plan.classes, family.version), (None, REMAINDER)]
    accept = xtrules.verdict("ACCEPT")
    # What leaves from another source than the job's own meets none of the outgoing rules, and is dropped behind them.
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
    # Rejecting it instead would send an answer, uncounted, to whoever has the address.
    foreign = xtrules.entry(family, xtrules.verdict("DROP"), inward=plan.ifname)
    last = xtrules.entry(family, xtrules.verdict("RETURN"), packets=making)
    return [*outgoing, foreign, *incoming, xtrules.entry(family, xtrules.reject(family)), last]


def ways(family: Family, plan: ChainPlan) -> list[list[Step]]:
    """The two ways to a job's chain, from either root."""
    return [_way(family.version, root, digits(plan), plan.chain) for root in ROOTS]


def nodes(root: str, path: str) -> list[str]:
    """The chains on the way, the root first, the leaf last."""
    return [root + path[:level] for level in range(min(DEPTH, len(path)) + 1)]


def is_of_tree(family: Family, chain: str, head: bytes, target: str) -> bool:
    """Whether a rule with this head, in this chain of the tree, is one that some job's way has there."""
    root = chain[: len(INTO)]
    if target.startswith(JOBS):
        names = xtrules.interfaces(family, head)
        ifname = names[0] if root == OUT_OF else names[1]
        return xtrules.same(family, head, _rule(family.version, root, ifname, target, goto=True))
    if target.startswith(chain) and len(target) == len(chain) + 1:
        return xtrules.same(family, head, _rule(family.version, root, f"{PREFIX}{target[len(root) :]}+", target))
    return False


def forward(family: Family) -> list[Step]:
    """All rules of ACCTD_FORWARD."""
    return [Step(FORWARD, _rule(family.version, root, f"{PREFIX}+", root), root) for root in ROOTS]


def masquerade(family: Family, pool: Network) -> list[Step]:
    """All rules of ACCTD_POSTROUTING."""
    target = xtrules.masquerade(family)
    rule = xtrules.entry(family, target, source=pool, outward=f"{PREFIX}+", not_outward=True)
    return [Step(POSTROUTING, rule, "MASQUERADE")]


@lru_cache(maxsize=1 << 12)  # the ways of a thousand jobs
def _way(version: int, root: str, path: str, chain: str) -> list[Step]:
    through = nodes(root, path)
    steps = [
        Step(parent, _rule(version, root, f"{PREFIX}{node[len(root) :]}+", node), node)
        for parent, node in itertools.pairwise(through)
    ]
    return [*steps, Step(through[-1], _rule(version, root, f"{PREFIX}{path}", chain, goto=True), chain)]


@lru_cache(maxsize=1 << 13)
def _rule(version: int, root: str, interface: str, target: str, *, goto: bool = False) -> bytes:
    inward, outward = (interface, "") if root == OUT_OF else ("", interface)
    return xtrules.entry(_FAMILIES[version], xtrules.verdict(target), inward=inward, outward=outward, goto=goto)
