"""A mount namespace of other processes, held open: its tables of mounts can be read even after the last of them ended.

An open /proc/PID/mountinfo or mountstats keeps the namespace, and so every mount in it, until it is closed
(fs/proc_namespace.c; seen on 6.1). Reads only, and asks no server anything: the tables are the kernel's own memory.
Kernel docs: filesystems/proc.rst, 3.5 "/proc/<pid>/mountinfo"; man 5 proc_pid_mountstats; man 7 mount_namespaces.
"""

import os
import select
import subprocess
from typing import NamedTuple

Id = tuple[int, int]
"""Device and inode of a namespace's file: its name for as long as it is there."""

_IN_MEMORY = {
    "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs",
    "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "ramfs", "rootfs", "rpc_pipefs", "securityfs",
    "selinuxfs", "sysfs", "tmpfs", "tracefs",
}  # fmt: skip
"""File systems with nothing behind them: to unmount one waits for nobody."""


class Mount(NamedTuple):
    """One line of mountinfo."""

    device: str  # of its superblock, "major:minor"
    point: str  # as the namespace's processes see it, in the kernel's own escapes
    kind: str


# /proc/<pid>/mountinfo; optional fields stand between the options and " - ":
#   41 34 0:33 / /mnt/data rw,relatime shared:7 - nfs4 127.0.0.1:/a rw,vers=4.2
def parse_mounts(text: bytes) -> list[Mount]:
    """Every mount, in the kernel's order. A path's space, tab, newline and backslash stay octal escapes."""
    mounts = []
    for line in text.split(b"\n"):
        before, dash, after = line.partition(b" - ")
        fields = before.split(b" ")
        if dash and len(fields) >= 6:
            kind = after.partition(b" ")[0].decode("ascii", "replace")
            mounts.append(Mount(fields[2].decode("ascii", "replace"), printable(fields[4]), kind))
    return mounts


def printable(point: bytes) -> str:
    """A mount point as text that JSON can carry: what is no UTF-8 becomes \\xNN."""
    return point.decode("utf-8", "backslashreplace")


def namespace(pid: int | str) -> Id | None:
    """Which mount namespace a process is in; None if it is gone, or a zombie."""
    try:
        found = os.stat(f"/proc/{pid}/ns/mnt")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return found.st_dev, found.st_ino


class Tables:
    """The tables of one namespace. Give it back by release() or close()."""

    def __init__(self, pid: int | str) -> None:
        """The one that a process is in. Raises ProcessLookupError or FileNotFoundError if that is gone."""
        self.path = f"/proc/{pid}/mountstats"
        # By a descriptor of its directory: a later process under the same number cannot be meant.
        place = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = os.stat("ns/mnt", dir_fd=place)
            self.id: Id = found.st_dev, found.st_ino
            self._info = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=place)
            try:
                self._stats = os.open("mountstats", os.O_RDONLY | os.O_CLOEXEC, dir_fd=place)
            except BaseException:
                os.close(self._info)
                raise
        finally:
            os.close(place)
        self._poller = select.poll()
        self._poller.register(self._info, select.POLLPRI)
        self._mounts: list[Mount] | None = None

    def mounts(self) -> list[Mount]:
        """What is mounted now; read again only if the kernel says that it changed."""
        if self._poller.poll(0) or self._mounts is None:
            self._mounts = parse_mounts(_whole(self._info))
        return self._mounts

    def statistics(self) -> bytes:
        """mountstats as it is now."""
        return _whole(self._stats)

    def release(self, shared: frozenset[str]) -> None:
        """Let the namespace go. If nobody else is in it, that unmounts what it had; `shared` devices stay mounted.

        To unmount what lies on a server or a disk waits for it, for ever if it does not answer: that is done by a
        process of its own, which ends with the last unmount. We do not wait for it.
        """
        if any(mount.kind not in _IN_MEMORY and mount.device not in shared for mount in self._mounts or ()):
            self._release_elsewhere()
        else:
            self.close()

    def _release_elsewhere(self) -> None:
        read, write = os.pipe2(os.O_CLOEXEC)
        try:
            # The shell ends at once; cat is nobody's child then, and holds what it got until we have closed ours.
            subprocess.run(
                # By another number first: a shell gives what it starts with & an empty input, and dash knows no
                # descriptor above 9.
                ["/bin/sh", "-c", "exec 3<&0; cat <&3 >/dev/null &"],
                pass_fds=(self._info, self._stats),
                stdin=read,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                check=False,
            )
        finally:
            os.close(read)
            self.close()
            os.close(write)

    def close(self) -> None:
        """Let it go as it is: for a namespace that somebody else is in for sure, or that has nothing slow."""
        os.close(self._info)
        os.close(self._stats)


def _whole(fd: int) -> bytes:
    """A seq file from its beginning; each read gives some lines."""
    os.lseek(fd, 0, os.SEEK_SET)
    parts = []
    while part := os.read(fd, 1 << 16):
        parts.append(part)
    return b"".join(parts)
