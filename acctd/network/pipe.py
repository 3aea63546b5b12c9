"""The job's pipe: a network namespace with a veth pair into it, addresses and default routes; made and taken away.

Counting is the chain's part and the lease is the ledger's. The outer end's name comes from the lease and is the mark by
which a leftover is known. man 4 veth, man 7 network_namespaces.
"""

import os
import threading
import time
from pathlib import Path

from acctd.errors import KernelRefusedError
from acctd.kernel import netns, rtnetlink
from acctd.network.pool import Lease

INNER = "eth0"
_LO = 1  # the loopback's index in every network namespace


def make(path: Path, lease: Lease) -> int:
    """Make the pipe; gives a descriptor of the job's namespace, which the caller closes. On failure nothing is left."""
    namespace = netns.create(path)
    made = False
    try:
        with rtnetlink.RouteSocket() as outside:
            outside.apply(rtnetlink.veth(lease.ifname, INNER, namespace))
            made = True
            index = _index(lease.ifname)
            wanted = [rtnetlink.address(index, lease.outer4, 31)]
            if lease.outer6 is not None:
                wanted.append(rtnetlink.address(index, lease.outer6, 127))
            outside.apply(*wanted)
        netns.inside(namespace, lambda: _furnish(lease))
    except BaseException:
        os.close(namespace)
        # A link of that name which we did not make is somebody else's pipe.
        remove(path, lease.ifname if made else None)
        raise
    return namespace


def make_empty(path: Path) -> int:
    """A namespace with nothing but a loopback, for jobs without a network; gives a descriptor of it."""
    namespace = netns.create(path)
    try:
        netns.inside(namespace, _loopback_up)
    except BaseException:
        os.close(namespace)
        netns.remove(path)
        raise
    return namespace


def remove(path: Path, ifname: str | None) -> None:
    """Take the pipe away. On return not one more packet of the job can reach its chain. Nothing there is fine.

    The kernel tells of a link's removal once it is unlinked and every packet queued from it has been dealt with; the
    call itself returns some 20 ms later, after waiting for the last readers. The news is all that exactness needs, so
    the call runs on a thread of its own.
    """
    index = rtnetlink.link_index(ifname) if ifname else None
    if index is not None:
        _remove_link(index)
    netns.remove(path)


def _remove_link(index: int) -> None:
    failure: list[Exception] = []

    def delete() -> None:
        try:
            with rtnetlink.RouteSocket() as outside:
                outside.apply(rtnetlink.delete(index))
        except Exception as e:
            failure.append(e)

    with rtnetlink.link_events() as events:
        thread = threading.Thread(target=delete, name="link removal")
        thread.start()
        events.settimeout(1.0)
        deadline = time.monotonic() + 30.0
        while thread.is_alive():
            try:
                if index in events.removals():
                    return
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise KernelRefusedError(f"link {index} is not gone 30 s after its removal; try again") from None
            except OSError:
                # ENOBUFS: more news than the socket could hold. The end of the call says the same, only later.
                thread.join()
        if failure:
            raise failure[0]


def _furnish(lease: Lease) -> None:
    with rtnetlink.RouteSocket() as inside:
        index = _index(INNER)
        wanted = [rtnetlink.up(_LO), rtnetlink.up(index), rtnetlink.address(index, lease.inner4, 31)]
        if lease.inner6 is not None:
            wanted.append(rtnetlink.address(index, lease.inner6, 127))
        wanted.append(rtnetlink.default_route(lease.outer4))
        if lease.outer6 is not None:
            wanted.append(rtnetlink.default_route(lease.outer6))
        inside.apply(*wanted)


def _loopback_up() -> None:
    with rtnetlink.RouteSocket() as inside:
        inside.apply(rtnetlink.up(_LO))


def _index(name: str) -> int:
    index = rtnetlink.link_index(name)
    if index is None:
        raise KernelRefusedError(f"link {name} vanished while the pipe was being made; try again")
    return index
