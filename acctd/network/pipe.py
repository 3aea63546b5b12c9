"""The job's pipe: a network namespace with a veth pair into it, addresses and default routes; made and taken away.

Counting is the chain's part and the lease is the ledger's. The outer end's name comes from the lease and is the mark by
which a leftover is known. man 4 veth, man 7 network_namespaces.
"""

import os
import threading
import time
from pathlib import Path

from acctd.errors import InUseError, KernelRefusedError, NotPermittedError
from acctd.kernel import netns, rtnetlink
from acctd.network.pool import Lease

INNER = "eth0"
_LO = 1  # the loopback's index in every network namespace


def make(path: Path, lease: Lease) -> int:
    """Make the pipe; gives a descriptor of the job's namespace, which the caller closes. On failure nothing is left."""
    namespace = netns.create(path)
    try:
        _lay(lease, namespace)
    except BaseException:
        os.close(namespace)
        netns.remove(path)
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


def move(path: Path, lease: Lease | None, *, pid: int, uid: int) -> int:
    """Give the job the network namespace of a process of `uid` for its own, and lay its pipe there.

    For owners who enter without root: nothing may have run in the job so far. Gives a descriptor of the new namespace,
    which the caller closes, as it does the one it has of the old. The outer end has the same name and addresses as
    before, so the chain goes on matching. On failure the pipe is back where it was.

    The namespace must belong to a user namespace that `uid` made, and to no job: not the node's own, not another
    user's. Raises NotPermittedError if it is one of these, NotFoundError if the process is gone, InUseError if the pipe
    has been moved before.
    """
    namespace = netns.of_process(pid, uid)
    try:
        old = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check_move(path, old, namespace, uid)
            _move(path, lease, old, namespace)
        finally:
            os.close(old)
    except BaseException:
        os.close(namespace)
        raise
    return namespace


def remove(path: Path, ifname: str | None) -> None:
    """Take the pipe away. On return not one more packet of the job can reach its chain. Nothing there is fine.

    The kernel tells of a link's removal once it is unlinked and every packet queued from it has been dealt with; the
    call itself returns some 20 ms later, after waiting for the last readers. The news is all that exactness needs, so
    the call runs on a thread of its own.
    """
    if ifname is not None:
        _remove_outer(ifname)
    netns.remove(path)


def _check_move(path: Path, old: int, namespace: int, uid: int) -> None:
    own = netns.own_user_namespace()
    if netns.owner(old).user_namespace != own:
        raise InUseError(f"the pipe of {path.name} has been moved to its owner's namespace already; join that one")
    owner = netns.owner(namespace)
    if owner.user_namespace == own or owner.uid != uid:
        raise NotPermittedError(
            f"the network namespace to move the pipe to belongs to uid {owner.uid}; it must be a new one, in a user "
            f"namespace that uid {uid} made"
        )
    this = os.fstat(namespace)
    for other in path.parent.iterdir():
        try:
            same = os.path.samestat(other.stat(), this)
        except FileNotFoundError:
            continue  # a job that has just ended
        if same:
            raise NotPermittedError(
                f"the network namespace to move the pipe to is that of job {other.name}; make another"
            )


def _move(path: Path, lease: Lease | None, old: int, namespace: int) -> None:
    if lease is None:
        netns.inside(namespace, _loopback_up)
        _rename(path, old, namespace)
        return
    # Made anew and not moved: the owner of a namespace can rename, move or remove a link in there at any moment.
    _remove_outer(lease.ifname)
    try:
        _lay(lease, namespace)
        try:
            _rename(path, old, namespace)
        except BaseException:
            _remove_outer(lease.ifname)
            raise
    except BaseException:
        _lay(lease, old)
        raise


def _rename(path: Path, old: int, namespace: int) -> None:
    try:
        netns.rename(path, namespace)
    except BaseException:
        netns.rename(path, old)
        raise


def _lay(lease: Lease, namespace: int) -> None:
    """A veth pair from here into a namespace, both ends with their addresses. On failure no link of it is left."""
    with rtnetlink.RouteSocket() as outside:
        # Refused where a link of that name exists, which is somebody else's pipe and stays.
        outside.apply(rtnetlink.veth(lease.ifname, INNER, namespace))
        try:
            index = _index(lease.ifname)
            wanted = [rtnetlink.address(index, lease.outer4, 31)]
            if lease.outer6 is not None:
                wanted.append(rtnetlink.address(index, lease.outer6, 127))
            outside.apply(*wanted)
            netns.inside(namespace, lambda: _furnish(lease))
        except BaseException:
            _remove_outer(lease.ifname)
            raise


def _remove_outer(ifname: str) -> None:
    index = rtnetlink.link_index(ifname)
    if index is not None:
        _remove_link(index)


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
