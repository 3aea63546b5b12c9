"""Network namespaces with a name: made, entered by a function, removed.

A namespace belongs to a thread, so all work inside one happens on a short-lived thread of its own: pyroute2's way of
forking a child costs ten times as much. The name is a file with the namespace bind-mounted on it, as ip-netns(8) does,
and outlives the process that made it. Knows nothing of links or addresses.
"""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from acctd.errors import KernelRefusedError, NotPermittedError
from acctd.kernel import libc

T = TypeVar("T")


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


def remove(path: Path) -> None:
    """Take the name away; the namespace goes once no process and no descriptor uses it. Nothing there is fine."""
    try:
        libc.umount(str(path))
    except OSError as e:
        # EINVAL: the file is there, but nothing is mounted on it (we died between making the file and mounting).
        if e.errno not in (errno.ENOENT, errno.EINVAL):
            raise KernelRefusedError(f"cannot remove network namespace {path}: {e.strerror}") from e
    path.unlink(missing_ok=True)
