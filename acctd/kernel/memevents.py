"""Hearing from the kernel that a cgroup's memory runs out: an eventfd on v1, a changing memory.events on v2.

Each ear is one descriptor for an epoll, with the events to register it for. What is to be done is shortages.py's.
Kernel docs: admin-guide/cgroup-v1/memory.rst (9 "Memory thresholds", 10 "OOM Control"), admin-guide/cgroup-v2.rst
("memory.events").
"""

import errno
import os
import select
from collections.abc import Iterable

from acctd.errors import KernelRefusedError
from acctd.kernel.cgroupfs import CgroupDir


class Ear:
    """One descriptor that becomes ready when the kernel has something to say. Close it."""

    events: int

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def clear(self) -> bool:
        """Take what was said, so that the descriptor is not ready any more; whether there was anything."""
        raise NotImplementedError

    def close(self) -> None:
        """Hear no more."""
        os.close(self._fd)


class EventEar(Ear):
    """v1: an eventfd. It also becomes ready when the cgroup is removed, and old events stay in it: look again."""

    events = select.EPOLLIN

    def clear(self) -> bool:
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return False
        return True


class FileEar(Ear):
    """v2: the kept descriptor of a file that the kernel says has changed, until it is read again."""

    # EPOLLIN would be ready without end: a file can always be read.
    events = select.EPOLLPRI

    def clear(self) -> bool:
        try:
            os.pread(self._fd, 4096, 0)
        except OSError as e:
            if e.errno != errno.ENODEV:  # the cgroup is gone
                raise
        return True


def out_of_memory(directory: CgroupDir) -> Ear | None:
    """An ear for the memory of a cgroup, of either version; None where the cgroup is gone.

    v1: says that the limit of this cgroup, or of one above it, was reached and nothing could be reclaimed. v2: says
    that any count of memory.events has changed: high, max, oom, oom_kill; at most a hundred times a second.
    """
    if directory.has("memory.oom_control"):
        return _on_v1(directory, "memory.oom_control", [""])
    file = directory.counter("memory.events")
    return FileEar(fd) if (fd := file.detach()) is not None else None


def usage_thresholds(directory: CgroupDir, thresholds: Iterable[int]) -> Ear | None:
    """v1: an ear that says the usage has crossed one of these bytes, in either direction; None on v2 or if it is gone.

    Usage has page cache in it: what was crossed must be looked at.
    """
    if not directory.has("memory.usage_in_bytes"):
        return None
    return _on_v1(directory, "memory.usage_in_bytes", [str(each) for each in thresholds])


def _on_v1(directory: CgroupDir, file: str, arguments: Iterable[str]) -> Ear | None:
    opened = directory.counter(file)
    fd = opened.detach()
    if fd is None:
        return None
    try:
        ear = EventEar(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    except OSError:
        os.close(fd)
        raise
    try:
        for argument in arguments:
            directory.write("cgroup.event_control", f"{ear.fileno()} {fd} {argument}".strip())
    except KernelRefusedError:
        ear.close()
        if directory.exists():
            raise
        return None
    except BaseException:
        ear.close()
        raise
    finally:
        # The kernel keeps what it needs of it.
        os.close(fd)
    return ear
