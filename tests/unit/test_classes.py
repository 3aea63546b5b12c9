"""Both forms of the classes against the one definition: the longest prefix that holds an address names its class."""

from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from acctd.model import DestinationClass
from acctd.network.classes import by_longest_prefix, disjoint


def cls(name, *networks):
    return DestinationClass(name, tuple(map(ip_network, networks)))


def test_longest_first_and_one_version_at_a_time():
    classes = [cls("A", "10.0.0.0/8", "2001:db8::/32"), cls("B", "10.1.0.0/16", "192.168.0.0/16")]
    assert by_longest_prefix(classes, 4) == [
        (ip_network("10.1.0.0/16"), "B"),
        (ip_network("192.168.0.0/16"), "B"),
        (ip_network("10.0.0.0/8"), "A"),
    ]
    assert by_longest_prefix(classes, 6) == [(ip_network("2001:db8::/32"), "A")]


def test_a_hole_is_cut_and_refilled():
    classes = [cls("Outer", "10.0.0.0/14", "10.1.2.0/24"), cls("Inner", "10.1.0.0/16")]
    assert disjoint(classes, 4) == {
        "Outer": [ip_network("10.0.0.0/16"), ip_network("10.1.2.0/24"), ip_network("10.2.0.0/15")],
        "Inner": [
            *map(ip_network, ("10.1.0.0/23", "10.1.3.0/24", "10.1.4.0/22", "10.1.8.0/21", "10.1.16.0/20")),
            *map(ip_network, ("10.1.32.0/19", "10.1.64.0/18", "10.1.128.0/17")),
        ],
    }


def test_a_class_without_this_version_or_fully_covered_is_absent():
    covered = [cls("A", "10.0.0.0/30"), cls("B", "10.0.0.0/31", "10.0.0.2/31")]
    assert disjoint(covered, 4).keys() == {"B"}
    assert disjoint(covered, 6) == {}
    assert disjoint([], 4) == {}


# Networks crowded into 10.0.0.0/24, so that they nest; no network twice, as model.check_classes demands.
_NETWORKS = st.builds(
    lambda length, bits: ip_network((0x0A000000 | bits >> (32 - length) << (32 - length) & 0xFF, length)),
    st.integers(24, 32),
    st.integers(0, 255),
)


@given(st.lists(st.tuples(_NETWORKS, st.sampled_from("ABC")), max_size=12, unique_by=lambda pair: pair[0]))
def test_both_forms_give_every_address_to_the_longest_prefix(pairs):
    classes = [cls(name, *(str(network) for network, of in pairs if of == name)) for name in "ABC"]
    pieces = disjoint(classes, 4)
    ordered = by_longest_prefix(classes, 4)
    for host in range(256):
        address = ip_address(0x0A000000 | host)
        holding = sorted(((n.prefixlen, name) for n, name in pairs if address in n), reverse=True)
        expected = holding[0][1] if holding else None
        assert next((name for network, name in ordered if address in network), None) == expected
        assert {name for name, networks in pieces.items() for n in networks if address in n} == {expected} - {None}
