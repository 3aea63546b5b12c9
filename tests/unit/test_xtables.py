"""The parts of the iptables back end that need no kernel: the lock, the bytes of rules, and the walk over a table."""

import fcntl
import os
import struct

import pytest

from acctd.errors import ExhaustedError, UsageError
from acctd.kernel.xtables import V4, V6, Family, locked
from acctd.model import chain_name, parse_class
from acctd.network import xtplan, xtrules
from acctd.network.backend import ChainPlan, Count
from acctd.network.xtcounts import MAKING, Sampler, total

CLASSES = (parse_class("Internal", ["129.93.0.0/16", "10.0.0.0/8"]), parse_class("Lab", ["129.93.5.0/24"]))


def plan(job: str, ifname: str, *, ipv6: bool = True) -> ChainPlan:
    return ChainPlan(chain_name(job), ifname, CLASSES, ipv6)


MADE = 7
RETURN = struct.pack("=H29sBi4x", 40, b"", 0, -5)


def rules(family: Family, chosen: ChainPlan) -> list[bytes]:
    """As the kernel gives them: a standard target is its verdict."""
    return [rule.replace(xtrules.verdict("RETURN"), RETURN) for rule in xtplan.rules(family, chosen, MADE)]


def head(family: Family, name: str) -> bytes:
    return xtrules.entry(family, struct.pack("=H29sB32s", 64, b"ERROR", 0, name.encode()))


def table(family: Family, chains: dict[str, list[bytes]], counts: list[tuple[int, int]] = ()) -> memoryview:
    """What GET_ENTRIES gives: three policies, the user chains, each ended by a RETURN, and the closing ERROR."""
    back = xtrules.entry(family, RETURN)
    parts = [back] * 3
    for name, entries in chains.items():
        parts += [head(family, name), *entries, back]
    blob = bytearray(b"".join([*parts, head(family, "ERROR")]))
    left, position = list(counts), 0
    while left:
        to, following = struct.unpack_from("=HH", blob, position + family.offsets_at)
        if to > family.size:  # the rules with a match, the ones that count
            struct.pack_into("=QQ", blob, position + family.counters_at, *left.pop(0))
        position += following
    return memoryview(bytes(blob))


@pytest.fixture
def lockfile(tmp_path, monkeypatch):
    path = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    return path


def test_the_lock_is_the_one_iptables_would_take_and_a_second_writer_is_told_who_to_look_for(lockfile):
    with locked():
        fd = os.open(lockfile, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ExhaustedError, match=f"fuser {lockfile}"), locked(patience=0.01):
            pass
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


def test_readers_share_the_lock_but_not_with_a_writer(lockfile):
    with locked(shared=True), locked(shared=True, patience=0), pytest.raises(ExhaustedError), locked(patience=0):
        pass


@pytest.mark.parametrize("family", [V4, V6])
def test_every_character_of_an_interface_counts(family):
    at = family.ifaces_at
    whole = xtrules.entry(family, xtrules.verdict("X"), inward="ac3f20", outward="ac3+")
    assert whole[at : at + 16] == b"ac3f20".ljust(16, b"\0")
    assert whole[at + 32 : at + 48] == (b"\xff" * 7).ljust(16, b"\0")
    assert whole[at + 48 : at + 64] == (b"\xff" * 3).ljust(16, b"\0")


@pytest.mark.parametrize("family", [V4, V6])
def test_an_entry_states_its_own_size(family):
    for rule in rules(family, plan("7", "ac7")):
        to, size = struct.unpack_from("=HH", rule, family.offsets_at)
        assert size == len(rule) and size % 8 == 0
        assert struct.unpack_from("=H", rule, to)[0] == size - to


def test_counts_are_by_chain_and_comment_and_several_networks_make_one_class():
    blob = table(V4, {"JOB_7": rules(V4, plan("7", "ac7"))}, [(n, 100 * n) for n in range(1, 9)])
    assert total([Sampler(V4).take(blob)]) == {
        "JOB_7": {
            "OutgoingLab": Count(100, 1),
            "OutgoingInternal": Count(500, 5),
            "OutgoingExternal": Count(400, 4),
            "IncomingLab": Count(500, 5),
            "IncomingInternal": Count(1300, 13),
            "IncomingExternal": Count(800, 8),
            MAKING: Count(0, MADE),
        }
    }


def test_both_ip_versions_are_added_whether_built_alike_or_not():
    one = (parse_class("Both", ["10.0.0.0/8", "fd00::/8"]),)
    alike = ChainPlan("JOB_1", "ac1", one, True)
    other = (parse_class("Both", ["10.0.0.0/8"]),)
    unlike = ChainPlan("JOB_1", "ac1", other, True)
    for chosen, expected in ((alike, Count(30, 3)), (unlike, Count(10, 1))):
        samples = [
            Sampler(family).take(table(family, {"JOB_1": rules(family, chosen)}, [(n, 10 * n) for n in counts]))
            for family, counts in ((V4, (1, 0, 0, 0)), (V6, (2, 5)))
        ]
        assert total(samples)["JOB_1"].get("OutgoingBoth") == expected


def test_a_chain_that_took_anothers_place_gets_its_own_counts():
    sampler = Sampler(V4)
    a, b = rules(V4, plan("a", "aca")), rules(V4, plan("b", "acb"))
    first = [(1, 10)] * 8 + [(2, 20)] * 8
    before = total([sampler.take(table(V4, {"JOB_a": a, "JOB_b": b}, first))])
    swapped = total([sampler.take(table(V4, {"JOB_b": b, "JOB_a": a}, first))])
    assert before["JOB_a"]["OutgoingLab"] == Count(10, 1) == swapped["JOB_b"]["OutgoingLab"]
    assert swapped["JOB_a"]["OutgoingLab"] == Count(20, 2)


def test_comments_that_changed_places_within_a_chain_of_the_same_size_are_seen():
    sampler = Sampler(V4)
    chain = rules(V4, plan("a", "aca"))
    counts = [(n, n) for n in range(1, 9)]
    sampler.take(table(V4, {"JOB_a": chain}, counts))
    chain[0], chain[1] = chain[1], chain[0]
    assert total([sampler.take(table(V4, {"JOB_a": chain}, counts))])["JOB_a"]["OutgoingLab"] == Count(2, 2)


@pytest.mark.parametrize("family", [V4, V6])
def test_a_remembered_layout_gives_what_a_new_walk_gives_as_jobs_come_and_go(family):
    sampler = Sampler(family)
    living: dict[str, list[bytes]] = {}
    for step in range(30):
        job = f"JOB_{step * 7 % 11}"
        if living.pop(job, None) is None:
            living[job] = rules(family, plan(job[4:], f"ac{step:x}"))
        foreign = {"DOCKER": [xtrules.entry(family, xtrules.verdict("ACCEPT"))] * (step % 3)}
        count = sum(len(chain) - 3 for chain in living.values())  # less those without a match
        blob = table(family, {**living, **foreign}, [(step + n, step * n) for n in range(count)])
        assert sampler.take(blob) == Sampler(family).take(blob)
        assert total([sampler.take(blob)]).keys() == living.keys()


def test_a_rule_about_no_pipe_is_nobodys_even_in_a_chain_of_that_name():
    foreign = xtrules.entry(V4, xtrules.verdict("ACCEPT"), inward="eth0", matches=xtrules.comment_match("Outgoing"))
    assert total([Sampler(V4).take(table(V4, {"JOB_x": [foreign]}))]) == {"JOB_x": {}}


def test_only_a_pipes_name_is_taken():
    assert xtplan.digits(plan("1", "ac3f20")) == "3f20"
    assert xtplan.digits(plan("1", "ac")) == ""
    for name in ("eth0", "acXY", "ac3f+", "ac" + "0" * 14):
        with pytest.raises(UsageError, match=r"interface.*outer end"):
            xtplan.digits(plan("1", name))
