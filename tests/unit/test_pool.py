from ipaddress import IPv4Network, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.model import DestinationClass
from acctd.network.backend import PREFIX, Pools
from acctd.network.pool import lease, slots

DEFAULT = Pools(IPv4Network("10.181.0.0/18"), IPv6Network("fd61:6363:7464::/112"))


def test_the_first_lease():
    first = lease(DEFAULT, slots(DEFAULT)[0])
    assert (str(first.outer4), str(first.inner4)) == ("10.181.0.2", "10.181.0.3")
    assert (str(first.outer6), str(first.inner6)) == ("fd61:6363:7464::2", "fd61:6363:7464::3")
    assert first.ifname == "ac1000"
    assert first.inner == [first.inner4, first.inner6]


def test_without_ipv6():
    only4 = lease(Pools(DEFAULT.v4, None), 1)
    assert (only4.outer6, only4.inner6) == (None, None)
    assert only4.inner == [only4.inner4]


@pytest.mark.parametrize(
    ("v4", "v6", "count"),
    [("10.0.0.0/30", None, 1), ("10.0.0.0/29", None, 3), ("10.0.0.0/29", "fd00::/126", 1),
     ("10.0.0.0/30", "fd00::/64", 1), ("10.0.0.0/31", None, 0), ("10.181.0.0/18", "fd00::/112", 8191)],
)  # fmt: skip
def test_the_smaller_pool_decides(v4, v6, count):
    pools = Pools(IPv4Network(v4), IPv6Network(v6) if v6 else None)
    assert len(slots(pools)) == count


@given(st.integers(8, 30), st.integers(64, 126), st.data())
def test_every_lease_is_inside_its_pools_and_never_their_ends_below(bits4, bits6, data):
    pools = Pools(IPv4Network((10 << 24, bits4)), IPv6Network((0xFD << 120, bits6)))
    found = lease(pools, data.draw(st.sampled_from(slots(pools))))
    for outer, inner, pool, bits in (
        (found.outer4, found.inner4, pools.v4, 31),
        (found.outer6, found.inner6, pools.v6, 127),
    ):
        assert {outer, inner} <= {outer, outer + 1}
        assert outer in pool
        assert inner in pool
        assert outer > pool.network_address
        assert type(pool)((int(outer), bits))[1] == inner  # one pair, aligned
    assert len(found.ifname) <= 15
    assert found.ifname.startswith(PREFIX)


@given(st.sets(st.sampled_from(slots(DEFAULT)), min_size=2, max_size=50))
def test_no_two_leases_share_anything(chosen):
    leases = [lease(DEFAULT, slot) for slot in chosen]
    assert len({found.ifname for found in leases}) == len(leases)
    addresses = [a for found in leases for a in (found.outer4, found.inner4, found.outer6, found.inner6)]
    assert len(set(addresses)) == len(addresses)


def test_names_stay_apart_where_slots_need_more_digits():
    wide = Pools(IPv4Network("10.0.0.0/8"), None)
    names = [lease(wide, slot).ifname for slot in (*range(1, 70000, 7), 0x10000, 0x01000, 0x100000)]
    assert len(set(names)) == len(set((*range(1, 70000, 7), 0x10000, 0x01000, 0x100000)))


def test_consecutive_leases_differ_in_the_first_digit():
    """The tree of chains on name prefixes fills evenly."""
    assert len({lease(DEFAULT, slot).ifname[len(PREFIX)] for slot in range(1, 17)}) == 16


def test_a_class_holds_networks_of_both_versions():
    """What the pools' users rely on: networks compare and hash across versions."""
    cls = DestinationClass("A", (IPv4Network("10.0.0.0/8"), IPv6Network("fd00::/8")))
    assert len(set(cls.networks)) == 2
