"""What other programs do to jobs' chains, on a real kernel: found, heard of, mended; and what they do elsewhere is not.

Jobs 1 and 2; the first is the lab's campus behind its pipe, so its packets are real.
"""

import asyncio
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from acctd.errors import KernelRefusedError, UsageError
from acctd.model import DestinationClass, chain_name
from acctd.network import iptables, xtrules
from acctd.network.backend import ChainPlan, Chains, Count, Counts
from acctd.network.nftables import Nftables
from acctd.network.probe import open_backend
from lab.topology import Topology
from tests.kernel.test_nftables import CLASSES, IN_CAMPUS, OUTSIDE, OUTSIDE6, PIPE, POOLS, l3, talk

NAMES = [way + name for way in ("Outgoing", "Incoming") for name in ("Campus", "Storage", "External")]
ZERO: Counts = dict.fromkeys(NAMES, Count(0, 0))


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with Topology() as made:
        made.forward()
        made.run(made.node, ["sh", "-c", f"ip link set campus down; ip link set campus name {PIPE} up"])
        made.run(made.node, ["ip", "-6", "address", "replace", "2001:db8:1::1/64", "dev", PIPE, "nodad"])
        made.run(made.node, ["ip", "-6", "address", "replace", "fe80::1/64", "dev", PIPE, "nodad"])
        made.run(made.wan, ["ip", "address", "add", IN_CAMPUS, "dev", "lo"])
        made.run(made.campus, ["sh", "-c", "ip -6 route replace default via 2001:db8:1::1"])
        yield made


def plan(job: int, ifname: str = "", *, ipv6: bool = True) -> ChainPlan:
    return ChainPlan(chain_name(str(job)), ifname or f"ac{job:x}", CLASSES, ipv6)


ONE, TWO = plan(1), plan(2)
BOTH = {ONE.chain, TWO.chain}


@dataclass
class Node:
    """One back end on the lab's node; the calling thread is there."""

    topology: Topology
    chains: Chains

    def do(self, command: str) -> str:
        """A shell command of somebody else's, which must succeed."""
        done = subprocess.run(["sh", "-ec", command], text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def counts(self) -> dict[str, Counts]:
        return {chain: sample.counts for chain, sample in self.chains.read().items()}

    def incarnations(self) -> dict[str, str]:
        return {chain: sample.incarnation for chain, sample in self.chains.read().items()}

    def talk(self, out: int = 3, back: int = 2, peer: str = OUTSIDE) -> None:
        talk(self.topology, peer, out=out, back=back)

    def rules(self) -> str:
        """All that is there, less counters, handles and the order of what has none."""
        if self.chains.name == "nftables":
            return re.sub(r"packets \d+ bytes \d+", "", self.do("nft list ruleset"))
        text = self.do("iptables-legacy-save; ip6tables-legacy-save")
        return "\n".join(re.sub(r"\[.*\]", "", line) for line in text.splitlines() if not line.startswith("#"))

    def clear(self) -> None:
        self.do("nft flush ruleset")
        for command in ("iptables-legacy", "ip6tables-legacy"):
            self.do(f"{command} -P FORWARD ACCEPT")
            for table in ("filter", "nat", "mangle"):
                self.do(f"{command} -t {table} -F; {command} -t {table} -X")


def made(topology: Topology, backend: str) -> Iterator[Node]:
    with topology.enter(topology.node):
        node = Node(topology, open_backend(backend, POOLS))
        node.clear()
        try:
            yield node
        finally:
            node.chains.close()
            node.clear()


@pytest.fixture(params=["nftables", "iptables"])
def node(request: pytest.FixtureRequest, topology: Topology) -> Iterator[Node]:
    yield from made(topology, request.param)


@pytest.fixture
def nft(topology: Topology) -> Iterator[Node]:
    yield from made(topology, "nftables")


@pytest.fixture
def legacy(topology: Topology) -> Iterator[Node]:
    yield from made(topology, "iptables")


def nft_rule(chain: str, number: int) -> str:
    """The handle of a rule, for the shell."""
    listed = f"nft -a list chain inet acctd {chain} | grep -o 'comment .* handle [0-9]*'"
    return f"$({listed} | grep -o '[0-9]*$' | sed -n {number}p)"


NFT_SET = "$(nft list table inet acctd | grep -o 'set Campus4_[^ ]*' | head -1 | cut -c5-)"
NFT_DAMAGE = {
    "flush ruleset": BOTH,
    "flush table inet acctd": BOTH,
    "delete table inet acctd": BOTH,
    "flush chain inet acctd forward": BOTH,
    "flush chain inet acctd postrouting": BOTH,
    "flush map inet acctd incoming": BOTH,
    "flush map inet acctd outgoing": BOTH,
    f"delete rule inet acctd forward handle {nft_rule('forward', 2)}": BOTH,
    f"delete rule inet acctd postrouting handle {nft_rule('postrouting', 1)}": BOTH,
    "insert rule inet acctd forward counter accept": BOTH,
    "add rule inet acctd postrouting counter": BOTH,
    "flush chain inet acctd forward; nft delete chain inet acctd forward": BOTH,
    "flush chain inet acctd forward; nft delete chain inet acctd forward; nft add chain inet acctd forward": BOTH,
    "add chain inet acctd forward '{ policy drop; }'": BOTH,
    "add table inet acctd '{ flags dormant; }'": BOTH,
    f"flush set inet acctd {NFT_SET}": BOTH,
    f"add element inet acctd {NFT_SET} '{{ 203.0.113.0/24 }}'": BOTH,
    "flush chain inet acctd JOB_1": {"JOB_1"},
    f"delete rule inet acctd JOB_1 handle {nft_rule('JOB_1', 1)}": {"JOB_1"},
    "insert rule inet acctd JOB_1 accept": {"JOB_1"},
    "add rule inet acctd JOB_1 accept": {"JOB_1"},
    f"delete element inet acctd incoming '{{ {PIPE} }}'": {"JOB_1"},
    f"delete element inet acctd outgoing '{{ {PIPE} }}'": {"JOB_1"},
    f"delete element inet acctd outgoing '{{ {PIPE} }}'; "
    f"nft add element inet acctd outgoing '{{ {PIPE} : goto JOB_2 }}'": {"JOB_1"},
    f"delete element inet acctd outgoing '{{ {PIPE} }}'; nft delete element inet acctd incoming '{{ {PIPE} }}'; "
    "nft delete chain inet acctd JOB_1": {"JOB_1"},
}
LEGACY_DAMAGE = {
    "-F": BOTH,
    "-F; ip6tables-legacy -F; iptables-legacy -X; ip6tables-legacy -X; iptables-legacy -t nat -F": BOTH,
    "-F FORWARD": BOTH,
    "-D FORWARD -j ACCTD_FORWARD": BOTH,
    "-I FORWARD -j ACCEPT": BOTH,
    "-F ACCTD_FORWARD": BOTH,
    "-D ACCTD_FORWARD 1": BOTH,
    "-A ACCTD_FORWARD -j RETURN": BOTH,
    "-F ACCTD_I": BOTH,
    "-I ACCTD_O -j RETURN": BOTH,
    "-t nat -F": BOTH,
    "-t nat -F ACCTD_POSTROUTING": BOTH,
    "-t nat -D POSTROUTING -j ACCTD_POSTROUTING": BOTH,
    "-t nat -I POSTROUTING -j ACCEPT": BOTH,
    "-t nat -R ACCTD_POSTROUTING 1 -s 192.0.2.0/24 -j MASQUERADE": BOTH,
    "-F JOB_1": {"JOB_1"},
    "-D JOB_1 1": {"JOB_1"},
    "-D JOB_1 8": {"JOB_1"},
    "-I JOB_1 -j ACCEPT": {"JOB_1"},
    "-I JOB_1 -j RETURN": {"JOB_1"},
    "-A JOB_1 -j RETURN": {"JOB_1"},
    f"-R JOB_1 3 -i {PIPE} -s 10.0.0.0/8 -m comment --comment OutgoingExternal -j ACCEPT": {"JOB_1"},
    f"-R JOB_1 3 -i {PIPE} -m comment --comment OutgoingExternal -j DROP": {"JOB_1"},
    f"-R JOB_1 3 -i {PIPE} -m comment --comment Other -j ACCEPT": {"JOB_1"},
    "-F ACCTD_I1": {"JOB_1"},
    "-F ACCTD_O1": {"JOB_1"},
    "-I ACCTD_O1 -j RETURN": {"JOB_1"},
    f"-I ACCTD_O1 -i {PIPE} -g JOB_2": {"JOB_1"},
    f"-R ACCTD_O1 1 -i {PIPE} -j JOB_1": {"JOB_1"},
    f"-R ACCTD_O1 1 -s 10.0.0.0/8 -i {PIPE} -g JOB_1": {"JOB_1"},
    "-D ACCTD_I -o ac1+ -j ACCTD_I1; iptables-legacy -F ACCTD_I1; iptables-legacy -X ACCTD_I1": {"JOB_1"},
}
DAMAGE = [
    *(pytest.param("nftables", f"nft {words}", broken, id=f"nft {words}") for words, broken in NFT_DAMAGE.items()),
    *(
        pytest.param("iptables", f"iptables-legacy {words}", broken, id=f"iptables {words}")
        for words, broken in LEGACY_DAMAGE.items()
    ),
    pytest.param("iptables", "ip6tables-legacy -F JOB_1", {"JOB_1"}, id="ip6tables -F JOB_1"),
    pytest.param("iptables", "ip6tables-legacy -F", BOTH, id="ip6tables -F"),
    pytest.param("iptables", "ip6tables-legacy -t nat -F", BOTH, id="ip6tables -t nat -F"),
]


@pytest.mark.parametrize("heal", ["add", "mend"])
@pytest.mark.parametrize(("backend", "damage", "broken"), DAMAGE)
def test_damage_is_found_and_healed_and_packets_count_again(
    topology: Topology, backend: str, damage: str, broken: set[str], heal: str
) -> None:
    with contextmanager(made)(topology, backend) as node:
        node.chains.add(ONE, TWO)
        node.talk()
        whole = node.rules()
        assert node.chains.broken([ONE, TWO]) == set()
        before = node.chains.read()
        node.do(damage)
        assert node.chains.broken([ONE, TWO]) == broken
        with closing(open_backend(backend, POOLS)) as newcomer:  # who never saw it whole
            assert newcomer.broken([ONE, TWO]) == broken
        if heal == "add":
            node.chains.add(ONE, TWO)
            after = node.chains.read()
            assert {chain: sample.counts for chain, sample in after.items()} == {ONE.chain: ZERO, TWO.chain: ZERO}
            assert not {s.incarnation for s in after.values()} & {s.incarnation for s in before.values()}
        else:
            anew = node.chains.mend(ONE, TWO)
            assert anew <= broken
            after = node.chains.read()
            for chain, sample in before.items():
                if chain in anew:
                    assert after[chain].counts == ZERO
                    assert after[chain].incarnation != sample.incarnation
                else:
                    assert after[chain] == sample
        assert node.chains.broken([ONE, TWO]) == set()
        theirs = re.findall(r"-I ((?:FORWARD|POSTROUTING) -j ACCEPT)", damage)  # stays, behind ours
        assert sorted(node.rules().splitlines()) == sorted([*whole.splitlines(), *(f"-A {rule}" for rule in theirs)])
        node.talk(5, 4)
        was = after[ONE.chain].counts
        now = node.counts()
        assert now[TWO.chain] == after[TWO.chain].counts
        assert now[ONE.chain] == {
            **was,
            "OutgoingExternal": Count(*map(sum, zip(was["OutgoingExternal"], l3(5, 100, 4), strict=True))),
            "IncomingExternal": Count(*map(sum, zip(was["IncomingExternal"], l3(4, 100, 4), strict=True))),
        }


FOREIGN = {
    "nftables": [
        "nft add table inet filter; nft add chain inet filter forward '{ type filter hook forward priority 0; }'",
        "nft add rule inet filter forward counter accept; nft add table ip acctd; nft add chain ip acctd JOB_1",
        "nft add map inet filter incoming '{ type ifname : verdict; }'; nft delete table inet filter",
        "iptables-nft -A FORWARD -j ACCEPT",
    ],
    "iptables": [
        "iptables-legacy -N DOCKER; iptables-legacy -A FORWARD -j DOCKER; iptables-legacy -A DOCKER -j RETURN",
        "iptables-legacy -N AAA; iptables-legacy -A AAA -p tcp --dport 1 -j LOG; ip6tables-legacy -A INPUT -j ACCEPT",
        "iptables-legacy -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE; iptables-legacy -N zzz",
        "iptables-legacy -P FORWARD DROP; iptables-legacy -F DOCKER; iptables-legacy -t mangle -A FORWARD -j ACCEPT",
        "nft add table inet acctd; nft flush ruleset",
    ],
}


def test_what_others_do_elsewhere_breaks_nothing(node: Node) -> None:
    node.chains.add(ONE, TWO)
    assert node.chains.changed()  # nobody has looked yet
    assert node.chains.broken([ONE, TWO]) == set()
    assert not node.chains.changed()
    incarnations = node.incarnations()
    for command in FOREIGN[node.chains.name]:
        node.do(command)
        assert node.chains.broken([ONE, TWO]) == set()
        assert not node.chains.changed()
        assert node.incarnations() == incarnations
    node.talk()
    assert node.counts()[ONE.chain]["OutgoingExternal"] == l3(3, 100, 4)


def test_own_jobs_come_and_go_without_a_stir(node: Node) -> None:
    node.chains.add(ONE)
    assert node.chains.broken([ONE]) == set()
    first = node.incarnations()[ONE.chain]
    other = DestinationClass("Other", (ip_network("10.0.0.0/8"),))
    for number in range(5):
        comer = replace(plan(16 + number), classes=(other,) if number % 2 else CLASSES)
        node.chains.add(comer, replace(TWO, ipv6=False))
        assert not node.chains.changed()
        assert node.chains.broken([ONE, TWO, comer]) == {TWO.chain}  # made of another plan
        node.chains.remove(comer)
        assert not node.chains.changed()
        assert node.chains.broken([ONE]) == set()
    assert node.incarnations()[ONE.chain] == first


def test_a_change_is_noticed_for_less_than_a_look_at_the_rules(node: Node) -> None:
    node.chains.add(ONE)
    node.chains.broken([ONE])
    node.do("nft flush ruleset; iptables-legacy -F")
    assert node.chains.changed()
    assert node.chains.broken([ONE]) == {ONE.chain}
    assert not node.chains.changed()  # known by now, though nothing is mended
    node.chains.add(TWO)
    assert node.chains.broken([ONE, TWO]) == {ONE.chain}
    node.chains.mend(ONE, TWO)
    assert node.chains.broken([ONE, TWO]) == set()


def test_an_own_change_right_after_a_foreign_one_does_not_hide_it(node: Node) -> None:
    node.chains.add(ONE)
    assert node.chains.broken([ONE]) == set()
    node.do("nft flush chain inet acctd JOB_1" if node.chains.name == "nftables" else "iptables-legacy -F JOB_1")
    node.chains.add(TWO)
    assert node.chains.changed()
    assert node.chains.broken([ONE, TWO]) == {ONE.chain}


def test_fifty_jobs_heal_in_one_transaction(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [ONE, *(plan(job) for job in range(2, 51))]
    node.chains.add(*plans)
    node.do("nft flush ruleset; iptables-legacy -F; ip6tables-legacy -t nat -F")
    before = generation(node)
    commits = count_commits(node, monkeypatch)
    assert node.chains.broken(plans) == {plan.chain for plan in plans}
    node.chains.add(*plans)
    assert node.chains.broken(plans) == set()
    if node.chains.name == "nftables":
        assert generation(node) == before + 1
    else:
        assert commits == [(4, "filter"), (4, "nat"), (6, "filter"), (6, "nat")]
    assert node.counts() == {plan.chain: ZERO for plan in plans}
    node.talk()
    assert node.counts()[ONE.chain]["OutgoingExternal"] == l3(3, 100, 4)
    for each in plans:
        node.chains.remove(each)
    assert node.counts() == {}


def generation(node: Node) -> int:
    """Grows by one with every transaction."""
    return node.chains._reader.generation().number if isinstance(node.chains, Nftables) else 0


def count_commits(node: Node, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Grows by (IP version, table) with every transaction on a legacy table."""
    made: list[tuple[int, str]] = []
    if node.chains.name == "iptables":
        real = iptables.transact

        def transact(iptc: Any, family: Any, name: str, edit: Callable[[Any], Any]) -> Any:
            made.append((family.version, name))
            return real(iptc, family, name, edit)

        monkeypatch.setattr(iptables, "transact", transact)
    return made


def test_a_chain_added_again_starts_at_zero_in_another_incarnation(node: Node) -> None:
    node.chains.add(ONE, TWO)
    node.talk(peer=OUTSIDE)
    node.talk(peer=OUTSIDE6)
    seen = {node.incarnations()[ONE.chain]}
    for _ in range(3):
        node.chains.add(ONE)
        assert node.counts()[ONE.chain] == ZERO
        assert node.incarnations()[ONE.chain] not in seen
        seen.add(node.incarnations()[ONE.chain])
        node.talk()
        assert node.counts()[ONE.chain]["OutgoingExternal"] == l3(3, 100, 4)


def test_an_incarnation_is_the_same_to_every_reader_however_read(node: Node) -> None:
    node.chains.add(ONE, TWO)
    first = node.incarnations()
    assert len(set(first.values())) == 2 and all(first.values())
    node.talk()
    node.chains.add(plan(0xA))  # before and between the others in the table
    node.chains.remove(plan(0xA))
    assert node.incarnations() == first
    with closing(open_backend(node.chains.name, POOLS)) as other:
        assert {chain: sample.incarnation for chain, sample in other.read().items()} == first
        assert other.read(ONE.chain) == {ONE.chain: node.chains.read()[ONE.chain]} == node.chains.read(ONE.chain)
    assert node.chains.read("JOB_gone") == {}


@pytest.mark.parametrize("job", ["", " JOB_1"])
def test_nftables_made_anew_by_others(nft: Node, job: str) -> None:
    nft.chains.add(ONE, TWO)
    nft.talk()
    before = nft.chains.read()
    dump = nft.do("nft list ruleset")
    whole = f"flush ruleset\n{dump}"
    chain = re.findall(r"\tchain JOB_1 {.*?\n\t}\n", dump, re.DOTALL)[0]
    one = f"flush chain inet acctd JOB_1\ntable inet acctd {{\n{chain}}}\n"
    load(one if job else whole)
    after = nft.chains.read()
    # With the counts of the dump, which have been counted already.
    assert after[ONE.chain].counts == before[ONE.chain].counts
    assert after[ONE.chain].incarnation != before[ONE.chain].incarnation
    assert (after[TWO.chain].incarnation == before[TWO.chain].incarnation) == bool(job)
    assert nft.chains.broken([ONE, TWO]) == set()  # it is all there


def load(ruleset: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=ruleset, text=True, check=True)


def test_one_rule_of_a_chain_made_anew(nft: Node) -> None:
    nft.chains.add(ONE)
    before = nft.incarnations()[ONE.chain]
    rule = nft_rule("JOB_1", 1)
    nft.do(
        f"nft replace rule inet acctd JOB_1 handle {rule} counter accept comment OutgoingStorage"
    )  # keeps its handle
    assert nft.chains.broken([ONE]) == set()
    assert nft.incarnations()[ONE.chain] != before


def test_a_new_table_with_the_same_handles_is_another(nft: Node) -> None:
    nft.chains.add(ONE)
    handles, before = nft.do("nft -a list table inet acctd | tail -n+2"), nft.incarnations()[ONE.chain]
    nft.do("nft flush ruleset")
    nft.chains.add(ONE)
    assert nft.do("nft -a list table inet acctd | tail -n+2") == handles
    assert nft.incarnations()[ONE.chain] != before


RESTORE = "iptables-legacy-save{0} > {1}; iptables-legacy -F; iptables-legacy-restore{0} < {1}"


@pytest.mark.parametrize(
    "damage",
    ["iptables-legacy -Z", "iptables-legacy -Z JOB_1", "ip6tables-legacy -Z", RESTORE.replace("{0}", "")],
    ids=["-Z", "-Z JOB_1", "ip6tables -Z", "restore"],
)
def test_legacy_counters_set_back(legacy: Node, tmp_path: Path, damage: str) -> None:
    legacy.chains.add(ONE)
    legacy.talk()
    before = legacy.chains.read()[ONE.chain]
    legacy.do(damage.replace("{1}", str(tmp_path / "saved")))
    legacy.talk(50)  # the counts are past where they were
    after = legacy.chains.read()[ONE.chain]
    assert after.counts["OutgoingExternal"] > before.counts["OutgoingExternal"]
    assert after.incarnation != before.incarnation
    assert legacy.chains.broken([ONE]) == set()


def test_legacy_rules_restored_with_their_counters_are_the_same_to_us(legacy: Node, tmp_path: Path) -> None:
    legacy.chains.add(ONE)
    legacy.talk()
    before = legacy.chains.read()
    legacy.do(RESTORE.format(" -c", tmp_path / "saved"))
    assert legacy.chains.read() == before


def test_other_programs_changes_leave_a_legacy_incarnation_alone(legacy: Node) -> None:
    legacy.chains.add(ONE)
    before = legacy.incarnations()
    for _ in range(3):
        legacy.do("iptables-legacy -A INPUT -j ACCEPT; ip6tables-legacy -N THEIRS; ip6tables-legacy -X THEIRS")
        assert legacy.incarnations() == before


def test_a_refused_add_leaves_what_was_there(legacy: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    legacy.chains.add(ONE)
    legacy.talk()
    with monkeypatch.context() as patch:
        patch.setitem(xtrules._REJECT, 6, 6)  # a TCP reset, which the kernel refuses in a rule for all protocols
        with pytest.raises(KernelRefusedError, match="Invalid argument"):
            legacy.chains.add(ONE, TWO)
    assert set(legacy.counts()) == {ONE.chain}
    with pytest.raises(UsageError, match="eth0"):
        legacy.chains.add(TWO, plan(3, "eth0"))
    assert set(legacy.counts()) == {ONE.chain}
    legacy.chains.add(ONE)
    assert legacy.chains.broken([ONE]) == set()


DELETIONS = {
    "nft flush ruleset": BOTH,
    "nft delete table inet acctd": BOTH,
    "nft flush table inet acctd": BOTH,
    "nft flush chain inet acctd JOB_1": {"JOB_1"},
    f"nft 'delete element inet acctd incoming {{ {PIPE} }}; delete element inet acctd outgoing {{ {PIPE} }}; "
    "delete chain inet acctd JOB_1'": {"JOB_1"},
    "(echo flush ruleset; nft list ruleset) | nft -f -": BOTH,
}


@pytest.mark.parametrize(("command", "deleted"), DELETIONS.items())
def test_the_last_counts_of_what_others_delete_are_known(nft: Node, command: str, deleted: set[str]) -> None:
    """To the byte: nobody read the chain after its last packet."""
    nft.chains.add(ONE, TWO)
    incarnations = nft.incarnations()
    with nft.chains.watch() as watch:  # type: ignore[union-attr]
        nft.talk(3, 2)
        nft.talk(7, 1, OUTSIDE6)
        nft.talk(4, 0, IN_CAMPUS)
        nft.do(command)
        news = watch.drain()
        assert (news.changed, news.lost) == (True, False)
        last = {
            **ZERO,
            "OutgoingExternal": Count(3 * 128 + 7 * 148, 10),
            "IncomingExternal": Count(2 * 128 + 148, 3),
            "OutgoingCampus": l3(4, 100, 4),
        }
        expected = {ONE.chain: last, TWO.chain: ZERO}
        assert news.deleted == {(chain, incarnations[chain]): expected[chain] for chain in deleted}
        assert watch.drain() == (False, {}, False)
        nft.chains.add(ONE, TWO)
        assert watch.drain() == (False, {}, False)
        # What took its place is another: by its handles, or by its table's.
        nft.talk(1, 0)
        nft.do("nft flush ruleset")
        again = watch.drain().deleted
        assert not again.keys() & news.deleted.keys()
        assert next(c for (chain, _), c in again.items() if chain == ONE.chain)["OutgoingExternal"] == l3(1, 100, 4)


def test_a_part_of_a_chain_is_no_incarnation_of_it(nft: Node) -> None:
    nft.chains.add(ONE)
    whole = nft.incarnations()[ONE.chain]
    with nft.chains.watch() as watch:  # type: ignore[union-attr]
        nft.talk()
        nft.do(f"nft delete rule inet acctd JOB_1 handle {nft_rule('JOB_1', 1)}")
        ((chain, incarnation),) = watch.drain().deleted
        assert chain == ONE.chain
        assert incarnation not in (whole, nft.incarnations()[ONE.chain])


def test_own_and_foreign_doings_elsewhere_are_no_news(nft: Node) -> None:
    nft.chains.add(ONE)
    with nft.chains.watch() as watch:  # type: ignore[union-attr]
        for number in range(20):
            nft.chains.add(plan(16 + number))
            nft.chains.add(ONE)
            nft.chains.remove(plan(16 + number))
        other = DestinationClass("Other", (ip_network("10.0.0.0/8"),))
        nft.chains.add(replace(TWO, classes=(other,)))
        nft.chains.remove(replace(TWO, classes=(other,)))  # and its set, by another way
        nft.do(
            "nft add table inet other; nft add table ip acctd; nft add chain ip acctd JOB_1; nft flush table ip acctd"
        )
        assert watch.drain() == (False, {}, False)
        nft.do("nft add chain inet acctd theirs")
        assert watch.drain() == (True, {}, False)


def test_a_queue_that_ran_over_is_told(nft: Node) -> None:
    nft.chains.add(ONE)
    with nft.chains.watch() as watch:  # type: ignore[union-attr]
        with socket.socket(fileno=watch.fileno()) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            nft.do("nft flush ruleset")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
            own.detach()
        news = watch.drain()
        assert (news.lost, news.deleted) == (True, {})
        nft.chains.add(ONE)
        watch.drain()
        incarnation = nft.incarnations()[ONE.chain]
        nft.do("nft flush ruleset")
        assert watch.drain() == (True, {(ONE.chain, incarnation): ZERO}, False)


def test_a_loop_wakes_up_for_a_flush(nft: Node) -> None:
    nft.chains.add(ONE)

    async def wait() -> Any:
        loop = asyncio.get_running_loop()
        heard: asyncio.Future[Any] = loop.create_future()

        def drain() -> None:
            if (news := watch.drain()).changed and not heard.done():
                heard.set_result(news)

        loop.add_reader(watch.fileno(), drain)
        await asyncio.to_thread(nft.chains.add, TWO)  # our own, from another thread: no news
        nft_flush = await asyncio.create_subprocess_exec("nft", "flush", "ruleset")
        await nft_flush.wait()
        try:
            return await asyncio.wait_for(heard, 20)
        finally:
            loop.remove_reader(watch.fileno())

    with nft.chains.watch() as watch:  # type: ignore[union-attr]
        assert {chain for chain, _ in asyncio.run(wait()).deleted} == BOTH


def test_legacy_tables_have_nobody_to_tell(legacy: Node) -> None:
    assert legacy.chains.watch() is None
