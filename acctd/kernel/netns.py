"""Network namespaces with a name: made, entered by a function, removed.

A namespace belongs to a thread, so all work inside one happens on a short-lived thread of its own: forking a
child for it costs ten times as much. The name is a file with the namespace bind-mounted on it, as ip-netns(8) does,
and outlives the process that made it. Knows nothing of links or addresses.
"""

import errno
import fcntl
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from acctd.errors import KernelRefusedError, NotFoundError, NotPermittedError, UnavailableError
from acctd.kernel import libc

_NS_GET_USERNS, _NS_GET_OWNER_UID = 0xB701, 0xB704  # man 2 ioctl_ns

T = TypeVar("T")


class Owner(NamedTuple):
    """Who owns a network namespace: a user namespace, by its inode number, and the uid that made that one."""

    user_namespace: int
    uid: int


def on_thread(work: Callable[[], T]) -> T:
    """Run `work` on a thread of its own and give its result or raise its exception here."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(work())
        except BaseException as e:
            failure.append(e)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def create(path: Path) -> int:
    """Make a network namespace under this name; returns a descriptor of it, which the caller closes.

    Raises KernelRefusedError if the name is taken or the kernel has no network namespaces.
    """

    def work() -> int:
        libc.unshare(libc.CLONE_NEWNET)
        # /proc/self is the process; the new namespace is this thread's alone.
        libc.mount("/proc/thread-self/ns/net", str(path), libc.MS_BIND)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    except FileExistsError:
        raise KernelRefusedError(f"network namespace {path} exists already; remove it or choose another id") from None
    try:
        return on_thread(work)
    except OSError as e:
        os.unlink(path)
        if e.errno == errno.EPERM:
            raise NotPermittedError("cannot make a network namespace; run as root") from e
        raise KernelRefusedError(f"cannot make network namespace {path}: {e.strerror}") from e


def inside(fd: int, work: Callable[[], T]) -> T:
    """Run `work` in the namespace behind a descriptor. Sockets it makes stay in that namespace."""

    def entered() -> T:
        libc.setns(fd, libc.CLONE_NEWNET)
        return work()

    return on_thread(entered)


def of_process(pid: int, uid: int) -> int:
    """A descriptor of the network namespace that a process of this user is in; the caller closes it.

    Process and namespace are read through one handle on the process, so a pid that has been given to another process
    meanwhile gives NotFoundError and not that one's namespace. Raises NotPermittedError for a process of another user.
    """
    try:
        process = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = os.open("ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
            try:
                real_uid = _real_uid(process)
            except BaseException:
                os.close(found)
                raise
        finally:
            os.close(process)
    except (FileNotFoundError, ProcessLookupError):
        raise NotFoundError(f"process {pid} is gone; name one that runs") from None
    if real_uid != uid:
        os.close(found)
        raise NotPermittedError(f"process {pid} belongs to uid {real_uid}, not to {uid}; name one of your own")
    return found


# /proc/<pid>/status: real, effective, saved and file system uid, as the reader's user namespace has them.
#   Uid:	65534	65534	65534	65534
def _real_uid(process: int) -> int:
    with open(os.open("status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process), "rb") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(b"Uid:"))


def owner(namespace: int) -> Owner:
    """Who owns the network namespace behind a descriptor.

    Raises NotPermittedError where that is outside of the caller's own user namespace, UnavailableError on kernels
    before 4.11, which cannot say.
    """
    try:
        users = fcntl.ioctl(namespace, _NS_GET_USERNS)
        try:
            answer = fcntl.ioctl(users, _NS_GET_OWNER_UID, bytes(4))
            return Owner(os.fstat(users).st_ino, int.from_bytes(answer, sys.byteorder))
        finally:
            os.close(users)
    except PermissionError:
        raise NotPermittedError("the network namespace belongs to a user namespace outside of this one") from None
    except OSError as e:
        raise UnavailableError(f"this kernel does not say who owns a network namespace: {e.strerror}") from e


def own_user_namespace() -> int:
    """The inode number of this process's user namespace, to hold against Owner.user_namespace."""
    return os.stat("/proc/self/ns/user").st_ino


def rename(path: Path, namespace: int) -> None:
    """Let an existing name stand for another namespace, the one behind a descriptor. Raises KernelRefusedError."""
    try:
        _unmount(path)
        libc.mount(f"/proc/self/fd/{namespace}", str(path), libc.MS_BIND)
    except OSError as e:
        raise KernelRefusedError(f"cannot put another network namespace at {path}: {e.strerror}") from e


def remove(path: Path) -> None:
    """Take the name away; the namespace goes once no process and no descriptor uses it. Nothing there is fine."""
    try:
        _unmount(path)
    except OSError as e:
        raise KernelRefusedError(f"cannot remove network namespace {path}: {e.strerror}") from e
    path.unlink(missing_ok=True)


def _unmount(path: Path) -> None:
    try:
        libc.umount(str(path))
    except OSError as e:
        # EINVAL: the file is there, but nothing is mounted on it (whoever was at it died before mounting).
        if e.errno not in (errno.ENOENT, errno.EINVAL):
            raise
