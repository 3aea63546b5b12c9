"""The system calls that Python 3.11 does not offer: namespaces, mounts, signalfd. Errors are OSError, as from os."""

import ctypes
import os
from collections.abc import Iterable

CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
FALLOC_FL_KEEP_SIZE = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)


def unshare(flags: int) -> None:
    """Give the calling thread namespaces of its own. man 2 unshare."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int = 0) -> None:
    """Move the calling thread into a namespace. man 2 setns."""
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, flags: int) -> None:
    """man 2 mount, for bind mounts and propagation: no file system type, no data."""
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(flags), None), target)


def signalfd(signals: Iterable[int]) -> int:
    """A descriptor that is readable while one of these signals, which must be blocked, is pending. man 2 signalfd."""
    mask = ctypes.create_string_buffer(128)  # sigset_t of glibc and musl
    for number in signals:
        _check(_libc.sigaddset(mask, int(number)), "sigaddset")
    fd = _libc.signalfd(-1, mask, os.O_CLOEXEC)  # SFD_CLOEXEC
    _check(min(fd, 0), "signalfd")
    return int(fd)


def umount(target: str) -> None:
    """Detach a mount; whoever still uses it keeps it. man 2 umount2."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH | UMOUNT_NOFOLLOW), target)


def reserve(fd: int, offset: int, length: int) -> None:
    """Have the file system keep room in a file, whose size stays as it is. man 2 fallocate, FALLOC_FL_KEEP_SIZE."""
    _check(_libc.fallocate(fd, FALLOC_FL_KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(length)), "fallocate")
