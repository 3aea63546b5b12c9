"""The pipe by itself, in a network namespace that stands for the host: made, half-made, removed, removed again."""

import itertools
import os
import threading
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from acctd.errors import KernelRefusedError
from acctd.kernel import libc, netns, rtnetlink
from acctd.network import host, pipe
from acctd.network.backend import Pools
from acctd.network.pool import Lease, lease
from lab.topology import Topology

POOLS = Pools(IPv4Network("10.181.0.0/18"), IPv6Network("fd61:6363:7464::/112"))
_serial = itertools.count(1)


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """A leaked descriptor keeps a namespace alive: none may be left by a test."""
    before = _open_files()
    yield
    assert _open_files() == before


def _open_files() -> int:
    # The kernel finishes a removal on a thread that has a socket open; remove() does not wait for it.
    for thread in threading.enumerate():
        if thread.name == "link removal":
            thread.join()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def at_node(topology: Topology) -> Iterator[Topology]:
    """The test's own thread stands on the node, where the pipes are laid. No link of a test may outlive it."""
    with topology.enter(topology.node):
        before = links()
        yield topology
        assert links() == before


def links() -> set[str]:
    """Of this thread's namespace: /sys/class/net and if_nameindex are that of whoever mounted or asks."""
    with open("/proc/thread-self/net/dev") as devices:
        return {line.split(":")[0].strip() for line in devices if ":" in line}


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "netns" / "job"
    yield place
    mounted = Path("/proc/self/mountinfo").read_text()
    assert str(tmp_path) not in mounted
    assert not place.exists()


def a_lease(pools: Pools = POOLS) -> Lease:
    return lease(pools, next(_serial))


def inside(namespace: int) -> str:
    """Links, addresses and routes in there, as the kernel's own tables have them."""

    def look() -> str:
        names = ("dev", "if_inet6", "route", "fib_trie", "ipv6_route")
        return "\n".join(file.read_text() for name in names if (file := Path("/proc/thread-self/net", name)).exists())

    return netns.inside(namespace, look)


def test_made_and_removed(at_node: Topology, path: Path) -> None:
    spot = a_lease()
    namespace = pipe.make(path, spot)
    try:
        assert spot.ifname in links()
        seen = inside(namespace)
        assert "eth0" in seen
        assert str(spot.inner4) in seen
        assert spot.inner6 is not None
        assert spot.inner6.exploded.replace(":", "") in seen
        assert "lo" in seen
    finally:
        os.close(namespace)
        pipe.remove(path, spot.ifname)
    assert spot.ifname not in links()


def test_removing_twice_and_what_never_was(at_node: Topology, path: Path) -> None:
    spot = a_lease()
    pipe.remove(path, spot.ifname)
    os.close(pipe.make(path, spot))
    pipe.remove(path, spot.ifname)
    pipe.remove(path, spot.ifname)
    pipe.remove(path, None)


def test_without_ipv6(at_node: Topology, path: Path) -> None:
    spot = a_lease(Pools(POOLS.v4, None))
    namespace = pipe.make(path, spot)
    try:
        seen = inside(namespace)
        assert str(spot.inner4) in seen
        assert "fd616363" not in seen
    finally:
        os.close(namespace)
        pipe.remove(path, spot.ifname)


def test_on_a_host_that_has_ipv6_switched_off(at_node: Topology, path: Path) -> None:
    own = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    assert host.has_ipv6()
    own.write_text("1")
    try:
        assert not host.has_ipv6()
    finally:
        own.write_text("0")


def test_an_empty_namespace_has_a_loopback_that_is_up_and_nothing_else(at_node: Topology, path: Path) -> None:
    namespace = pipe.make_empty(path)
    try:
        assert netns.inside(namespace, links) == {"lo"}
        assert "127.0.0.1" in inside(namespace)
    finally:
        os.close(namespace)
        pipe.remove(path, None)


def test_a_name_that_is_taken_is_refused_and_its_owner_keeps_the_pipe(at_node: Topology, path: Path) -> None:
    first, second = a_lease(), a_lease()
    namespace = pipe.make(path, first)
    try:
        with pytest.raises(KernelRefusedError, match=rf"network namespace {path} exists already"):
            pipe.make(path, second)
        with pytest.raises(KernelRefusedError, match="exists already"):
            pipe.make_empty(path)
        assert first.ifname in links()
        assert second.ifname not in links()
        assert str(first.inner4) in inside(namespace)
        again = os.open(path, os.O_RDONLY)
        try:
            assert os.fstat(again).st_ino == os.fstat(namespace).st_ino
        finally:
            os.close(again)
    finally:
        os.close(namespace)
        pipe.remove(path, first.ifname)


def test_failure_in_the_middle_leaves_nothing(at_node: Topology, path: Path) -> None:
    """The link's name is taken, as by a leftover of a lost ledger: the namespace made before it goes again."""
    spot = a_lease()
    elsewhere = path.with_name("elsewhere")
    other = netns.create(elsewhere)
    try:
        with rtnetlink.RouteSocket() as socket:
            socket.apply(rtnetlink.veth(spot.ifname, "eth0", other))
        with pytest.raises(KernelRefusedError, match=rf"cannot make the link {spot.ifname}: File exists"):
            pipe.make(path, spot)
    finally:
        os.close(other)
        pipe.remove(elsewhere, spot.ifname)


def test_what_a_death_between_two_steps_leaves_is_removed(at_node: Topology, path: Path) -> None:
    # Died after making the file for the name, before the mount.
    path.parent.mkdir()
    path.touch()
    pipe.remove(path, a_lease().ifname)
    assert not path.exists()
    # Died after the mount, before the link.
    os.close(netns.create(path))
    pipe.remove(path, a_lease().ifname)
    assert not path.exists()
    # Died after the link was made, before its addresses.
    spot = a_lease()
    namespace = netns.create(path)
    with rtnetlink.RouteSocket() as socket:
        socket.apply(rtnetlink.veth(spot.ifname, "eth0", namespace))
    os.close(namespace)
    pipe.remove(path, spot.ifname)
    # Died between the removal of the link and that of the name.
    os.close(pipe.make(path, spot))
    pipe.remove(path.with_name("no such name"), spot.ifname)
    pipe.remove(path, spot.ifname)


def test_a_process_inside_does_not_keep_the_pipe(at_node: Topology, path: Path) -> None:
    spot = a_lease()
    namespace = pipe.make(path, spot)
    go_read, go_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        libc.setns(namespace, libc.CLONE_NEWNET)
        os.close(go_write)
        os.read(go_read, 1)
        os._exit(0)
    os.close(go_read)
    os.close(namespace)
    try:
        pipe.remove(path, spot.ifname)
        assert spot.ifname not in links()
    finally:
        os.close(go_write)
        os.waitpid(pid, 0)


def test_many_at_once_come_and_go(at_node: Topology, tmp_path: Path) -> None:
    spots = [a_lease() for _ in range(20)]
    paths = [tmp_path / f"n{spot.slot}" for spot in spots]
    try:
        for place, spot in zip(paths, spots, strict=True):
            os.close(pipe.make(place, spot))
        assert {spot.ifname for spot in spots} <= links()
    finally:
        for place, spot in zip(paths, spots, strict=True):
            pipe.remove(place, spot.ifname)
    assert not {spot.ifname for spot in spots} & links()
