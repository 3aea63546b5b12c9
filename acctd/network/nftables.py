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

The ruleset has generations, one more with every transaction: what was found whole stays so until somebody else makes
one, which is how `broken` costs next to nothing.

The context and the socket belong to the network namespace of the thread that makes the object, and to one thread at a
time. Between looking and changing another acctd must keep out: the caller holds the node-wide lock.
"""

from collections.abc import Callable, Collection, Sequence

from acctd.errors import KernelRefusedError
from acctd.kernel.libnftables import Command, Libnftables
from acctd.kernel.nfevents import Watch
from acctd.kernel.nftrules import Shape, TableReader
from acctd.network import nftplan
from acctd.network.backend import ChainPlan, Count, Pools, Sample
from acctd.network.nftplan import BASES, CHAIN_PREFIX, MAPS, OUTGOING, TABLE

_committers: set[int] = set()
"""The threads of this process that change the ruleset, as its events name them."""


class Nftables:
    """Chains in nf_tables. See backend.Chains for the contract."""

    name = "nftables"

    def __init__(self, pools: Pools) -> None:
        self._base = nftplan.base_rules(pools)
        # At this generation these were whole, and all that leads to them.
        self._sound_at = -1
        self._sound: dict[str, ChainPlan] = {}
        self._spoilt: set[str] = set()  # sets that were found not to hold what they should
        self._nft = Libnftables()
        try:
            self._reader = TableReader(TABLE, Count)
        except BaseException:
            self._nft.close()
            raise

    def add(self, *plans: ChainPlan) -> None:
        """Make chains and dispatch in one transaction, and whatever shared part is missing or not as it should be."""
        self._change(plans, lambda: self._addition(plans, {plan.chain for plan in plans}))

    def mend(self, *plans: ChainPlan) -> set[str]:
        """As add(), but a chain whose rules are whole keeps them and goes on counting; the chains made anew."""
        anew: set[str] = set()

        def look() -> list[Command]:
            anew.clear()
            anew.update(_misshapen(plans, self._reader.shapes()))
            return self._addition(plans, anew)

        self._change(plans, look)
        return anew

    def remove(self, plan: ChainPlan) -> None:
        """Remove chain and dispatch in one transaction; with the last chain goes the table."""
        if self._reader.table() is None:
            return
        before = self._begin()
        neighbour = self._neighbour(plan)
        changes = self._run(lambda: self._removal(plan, neighbour))
        if neighbour is not None:
            changes += self._remove_unused_sets(plan, neighbour)
        self._sound.pop(plan.chain, None)
        self._end(before, changes)

    def read(self, chain: str | None = None) -> dict[str, Sample]:
        """All jobs' counts from one netlink dump, or one job's at a cost that does not grow with the others'."""
        if chain is not None:
            found = self._reader.read_chain(chain)
            return {chain: Sample(found[0], found[1].incarnation)} if found else {}
        counts, shapes = self._reader.read()
        return {
            chain: Sample(count, shapes[chain].incarnation)
            for chain, count in counts.items()
            if chain.startswith(CHAIN_PREFIX)
        }

    def changed(self) -> bool:
        """Whether anyone made a transaction, about anything, since broken() looked last. Our own ones do not count."""
        return self._reader.generation().number != self._sound_at

    def broken(self, plans: Collection[ChainPlan]) -> set[str]:
        """Which of these chains are not, or no longer, what add() made of them, or are not led to.

        Rules are known by their comments: one that was replaced under its own shows in the incarnation only.
        """
        generation = self._begin()
        if generation == self._sound_at and all(self._sound.get(plan.chain) == plan for plan in plans):
            return set()
        found = _misshapen(plans, self._reader.shapes())
        if not self._base_is_whole():
            found = {plan.chain for plan in plans}
        for ways in map(self._reader.verdicts, MAPS):
            found |= {plan.chain for plan in plans if ways.get(plan.ifname) != plan.chain}
        self._spoilt = {
            name for name, part in nftplan.class_sets(plans).items() if self._reader.bounds(name) != part.bounds()
        }
        if self._spoilt:
            found |= {plan.chain for plan in plans if self._spoilt & nftplan.class_sets([plan]).keys()}
        if self._reader.generation().number == generation:
            self._sound_at = generation
            self._sound = {plan.chain: plan for plan in plans if plan.chain not in found}
        return found

    def watch(self) -> Watch[Count]:
        """Hear of what others delete in our table, with its last counts; for the caller to close."""
        return Watch(TABLE, Count, _committers)

    def close(self) -> None:
        """Give the library's context and the sockets back; chains stay."""
        self._reader.close()
        self._nft.close()

    def _change(self, plans: Sequence[ChainPlan], look: Callable[[], list[Command]]) -> None:
        before = self._begin()
        self._end(before, self._run(look))
        self._sound |= {plan.chain: plan for plan in plans}
        self._spoilt.clear()

    def _begin(self) -> int:
        """The generation before a change of ours."""
        generation = self._reader.generation()
        _committers.add(generation.thread)
        return generation.number

    def _end(self, before: int, changes: int) -> None:
        """What was whole before is so after our own changes, if nobody made one in between."""
        if before == self._sound_at and self._reader.generation().number == before + changes:
            self._sound_at = before + changes

    def _run(self, look: Callable[[], list[Command]]) -> int:
        """Look what there is and change it; how many transactions it was. A refusal may mean that a foreign program,
        which takes no lock of ours, changed or flushed the ruleset in between: then look again, once.
        """
        if commands := look():
            try:
                self._nft.run(commands)
            except KernelRefusedError:
                if not (commands := look()):
                    return 0
                self._nft.run(commands)
        return 1 if commands else 0

    def _addition(self, plans: Sequence[ChainPlan], anew: Collection[str]) -> list[Command]:
        """Everything for these chains; rules only for those made `anew`."""
        commands: list[Command] = [] if self._base_is_whole() else nftplan.base_commands(self._base, self._detached())
        commands += [{"delete": nftplan.element(name, ifname, chain)} for name, ifname, chain in self._leftovers(plans)]
        commands += nftplan.set_commands(plans, self._spoilt)
        for plan in plans:
            if plan.chain in anew:
                commands += nftplan.chain_commands(plan)
            commands += [{"add": nftplan.element(name, plan.ifname, plan.chain)} for name in MAPS]
        return commands

    def _leftovers(self, plans: Sequence[ChainPlan]) -> list[tuple[str, str, str]]:
        """What leads from these interfaces or to these chains, of someone who died or of an earlier add()."""
        if len(plans) == 1 and not self._reader.chain_exists(plans[0].chain):
            ifname = plans[0].ifname
            ways = [(name, ifname, self._reader.goto_of(name, ifname)) for name in MAPS]
            return [(name, ifname, chain) for name, ifname, chain in ways if chain]
        ifnames, chains = {plan.ifname for plan in plans}, {plan.chain for plan in plans}
        return [
            (name, ifname, chain)
            for name in MAPS
            for ifname, chain in self._reader.verdicts(name).items()
            if ifname in ifnames or chain in chains
        ]

    def _removal(self, plan: ChainPlan, neighbour: str | None) -> list[Command]:
        if neighbour is None:
            return [{"delete": {"table": {"family": "inet", "name": TABLE}}}] if self._reader.table() else []
        if not self._reader.chain_exists(plan.chain):
            return []  # nor can a map lead to it
        commands: list[Command] = []
        for name in MAPS:
            if self._reader.goto_of(name, plan.ifname) == plan.chain:
                commands.append({"delete": nftplan.element(name, plan.ifname, plan.chain)})
            else:
                # The lease is not the one it was made with: look for it under any name.
                found = [ifname for ifname, chain in self._reader.gotos(name) if chain == plan.chain]
                commands += [{"delete": nftplan.element(name, ifname, plan.chain)} for ifname in found]
        return [*commands, {"delete": {"chain": {"family": "inet", "table": TABLE, "name": plan.chain}}}]

    def _neighbour(self, plan: ChainPlan) -> str | None:
        """Another job's chain, if there is one: also one whose map elements somebody took away."""
        found = next((chain for _, chain in self._reader.gotos(OUTGOING) if chain != plan.chain), None)
        return found or next((c for c in self._reader.chains() if c.startswith(CHAIN_PREFIX) and c != plan.chain), None)

    def _remove_unused_sets(self, plan: ChainPlan, neighbour: str) -> int:
        """Take away the sets that only this job's rules looked into; how many. Mostly any other job has the same."""
        names = (n for n in nftplan.class_sets([plan]) if not self._reader.mentions(n, neighbour))
        return sum(not self._reader.mentions(name) and self._reader.delete_set(name) for name in names)

    def _base_is_whole(self) -> bool:
        table = self._reader.table()
        return (
            table is not None
            and not table.dormant
            and all(
                self._reader.base(chain) == BASES[chain]
                and self._reader.shape(chain).comments == tuple(comment for comment, _ in rules)
                for chain, rules in self._base.items()
            )
        )

    def _detached(self) -> list[str]:
        """Base chains that are there, but not where they belong."""
        there = {chain: self._reader.base(chain) for chain in BASES if self._reader.chain_exists(chain)}
        return [chain for chain, base in there.items() if base is None or base[:2] != BASES[chain][:2]]


def _misshapen(plans: Collection[ChainPlan], shapes: dict[str, Shape]) -> set[str]:
    """The chains whose rules are not there, or not those of their plans."""
    there = {chain: shape.comments for chain, shape in shapes.items()}
    return {plan.chain for plan in plans if there.get(plan.chain) != nftplan.chain_comments(plan)}
