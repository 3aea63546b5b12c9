"""The one audited door to cgroupfs: nothing else in acctd opens, makes or removes anything below it.

A `CgroupDir` names one directory of one hierarchy by checked parts, so a path cannot escape its mount. Reading a file
the kernel does not have gives None; a write the kernel refuses raises with path, data and reason. The door knows no
controller and no policy. Kernel docs: admin-guide/cgroup-v1/cgroups.rst, admin-guide/cgroup-v2.rst.
"""

import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from acctd.errors import KernelRefusedError, NotPermittedError, UsageError

MARK = "trusted.acctd"
"""Extended attribute on every directory acctd makes: what carries no mark is not ours to remove."""

DESCRIPTION = "trusted.acctd.job"
"""Extended attribute on a job's directories: what its maker wrote down, for a day when nothing else is left."""

FROZEN = "trusted.acctd.frozen"
"""Extended attribute on a job's directory in the freezer: we have stopped it, and not somebody who suspends it."""

_GONE = (errno.ENOENT, errno.ENODEV)


def checked_parts(path: str) -> tuple[str, ...]:
    """The components of a relative cgroup path. Raises UsageError for anything that could leave the hierarchy."""
    parts = tuple(path.split("/"))
    for part in parts:
        if part in ("", ".", "..") or "\0" in part or "\n" in part or not 0 < _encoded_length(part) <= 255:
            raise UsageError(
                f"cgroup path {path!r}: {part!r} cannot be a directory name; use plain names joined by '/'"
            )
    return parts


def _encoded_length(name: str) -> int:
    """A name's length in bytes, which need be no UTF-8; 0 for text that no file can be named by."""
    try:
        return len(os.fsencode(name))
    except UnicodeEncodeError:
        return 0


class CounterFile:
    """One kernel counter file, opened once and read many times.

    pread on a kept descriptor costs a tenth of open-read-close and is always fresh for counter files (not for v1's
    cgroup.procs). A file the kernel does not have, or whose cgroup is gone, reads as None.
    """

    __slots__ = ("_fd", "_place", "_size", "name")

    def __init__(self, place: str, name: str) -> None:
        # Apart: a thousand jobs have eighteen thousand files, and those of one directory share its path.
        self._place = sys.intern(place)
        self.name = name
        self._size = 4096
        self._fd = _open_or_none(self.path)

    @property
    def path(self) -> str:
        return f"{self._place}/{self.name}"

    def read(self) -> bytes | None:
        """The file's bytes now, or None. Raises KernelRefusedError on any other failure."""
        if self._fd is None:
            return None
        try:
            text = os.pread(self._fd, self._size, 0)
            while len(text) == self._size:
                self._size *= 2
                text = os.pread(self._fd, self._size, 0)
        except OSError as e:
            if e.errno in _GONE:
                return None
            raise _refusal("read", self.path, e) from e
        return text

    @property
    def present(self) -> bool:
        """Whether the kernel had the file when it was opened."""
        return self._fd is not None

    def detach(self) -> int | None:
        """The descriptor, the caller's to close from now on; None where there is no such file."""
        fd, self._fd = self._fd, None
        return fd

    def close(self) -> None:
        """Give the descriptor back; further reads give None."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@dataclass(frozen=True, slots=True)
class CgroupDir:
    """One directory of a mounted hierarchy: `mount` is the mount point, `parts` the checked names below it."""

    mount: Path
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.parts:
            checked_parts("/".join(self.parts))

    @property
    def path(self) -> Path:
        return self.mount.joinpath(*self.parts)

    @property
    def parent(self) -> "CgroupDir":
        if not self.parts:
            raise UsageError(f"cgroup {self.mount} is the top of its hierarchy and has no parent")
        return CgroupDir(self.mount, self.parts[:-1])

    def child(self, name: str) -> "CgroupDir":
        if "/" in name:
            raise UsageError(f"cgroup name {name!r} must not contain '/'")
        return CgroupDir(self.mount, (*self.parts, name))

    def exists(self) -> bool:
        return self.path.is_dir()

    def has(self, file: str) -> bool:
        """Whether the kernel offers this interface file here."""
        return os.path.lexists(self._file(file))

    def counter(self, file: str) -> CounterFile:
        """A kept descriptor on one counter file; the caller closes it."""
        self._check(file)
        return CounterFile(self._place, file)

    def read(self, file: str) -> bytes | None:
        """A file's bytes, opened afresh; None where there is no such file or the cgroup is gone."""
        path = self._file(file)
        try:
            fd = _open_or_none(path)
            if fd is None:
                return None
            with open(fd, "rb") as stream:
                return stream.read()
        except OSError as e:
            if e.errno in _GONE:
                return None
            raise _refusal("read", path, e) from e

    def write(self, file: str, data: str) -> None:
        """Write one value. Raises KernelRefusedError naming path, data and the kernel's reason."""
        path = self._file(file)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.write(fd, data.encode())
            finally:
                os.close(fd)
        except OSError as e:
            raise _refusal(f"write {data!r} to", path, e) from e

    def make(self) -> bool:
        """Make and mark the directory; False if it was there already. Its parent must exist."""
        path = self.path
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:
            return False
        except OSError as e:
            raise _refusal("make", str(path), e) from e
        try:
            os.setxattr(path, MARK, b"1")
        except OSError as e:
            if e.errno == errno.ENOENT:
                # A neighbour tidying up took the empty directory between our two calls; the caller makes it again.
                raise FileNotFoundError(e.errno, "cgroup removed while being made", str(path)) from e
            if e.errno != errno.ENOTSUP:
                os.rmdir(path)
                raise _refusal("mark", str(path), e) from e
        return True

    def marked(self) -> bool:
        """Whether acctd made this directory."""
        try:
            return os.getxattr(self.path, MARK) is not None
        except OSError as e:
            if e.errno in (errno.ENODATA, errno.ENOTSUP, errno.ENOENT):
                return False
            raise _refusal("read the mark of", str(self.path), e) from e

    def describe(self, text: bytes) -> None:
        """Write down what this directory is for. A kernel without such attributes does without."""
        try:
            os.setxattr(self.path, DESCRIPTION, text)
        except OSError as e:
            if e.errno != errno.ENOTSUP:
                raise _refusal("describe", str(self.path), e) from e

    def description(self) -> bytes | None:
        """What describe() wrote, or None."""
        try:
            return os.getxattr(self.path, DESCRIPTION)
        except OSError as e:
            if e.errno in (errno.ENODATA, errno.ENOTSUP, errno.ENOENT):
                return None
            raise _refusal("read the description of", str(self.path), e) from e

    def note_frozen(self, frozen: bool) -> None:
        """Write down that acctd has frozen it, for the next acctd. A kernel without such attributes does without."""
        try:
            if frozen:
                os.setxattr(self.path, FROZEN, b"1")
            else:
                os.removexattr(self.path, FROZEN)
        except OSError as e:
            if e.errno not in (errno.ENOTSUP, errno.ENODATA, errno.ENOENT):
                raise _refusal("mark", str(self.path), e) from e

    def noted_frozen(self) -> bool:
        """Whether acctd has frozen it, and has not let it go."""
        try:
            return bool(os.getxattr(self.path, FROZEN))
        except OSError as e:
            if e.errno in (errno.ENODATA, errno.ENOTSUP, errno.ENOENT):
                return False
            raise _refusal("read the mark of", str(self.path), e) from e

    def remove(self) -> bool:
        """Remove the directory: True once it is gone, False while processes or children keep it busy."""
        try:
            os.rmdir(self.path)
        except OSError as e:
            if e.errno in (errno.ENOENT, errno.EBUSY, errno.ENOTEMPTY):
                return e.errno == errno.ENOENT
            raise _refusal("remove", str(self.path), e) from e
        return True

    def links(self) -> int:
        """Changes when a sub-cgroup comes or goes: the directory is linked from each. 0 if the cgroup is gone."""
        try:
            return os.stat(self.path).st_nlink
        except FileNotFoundError:
            return 0

    def children(self) -> list["CgroupDir"]:
        """Direct sub-cgroups, in name order; empty if the cgroup is gone."""
        try:
            if self.links() == 2:
                return []  # spares the listing
            with os.scandir(self.path) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError as e:
            if e.errno in _GONE:
                return []
            raise _refusal("list", str(self.path), e) from e
        return [self.child(name) for name in names]

    def subtree(self) -> Iterator["CgroupDir"]:
        """This cgroup and all below it, deepest first: the order in which they can be removed."""
        for child in self.children():
            yield from child.subtree()
        yield self

    def procs(self) -> list[int]:
        """Pids in this cgroup alone, read afresh: a kept descriptor on v1's cgroup.procs can be stale for seconds.

        v2 shows a process outside our PID namespace as 0, which to kill(2) means the caller's own group: left out.
        """
        try:
            text = self.read("cgroup.procs")
        except KernelRefusedError as e:
            if not isinstance(e.__cause__, OSError) or e.__cause__.errno != errno.EOPNOTSUPP:
                raise
            text = self.read("cgroup.threads")  # a threaded cgroup of v2 tells its threads alone
        return [pid for line in text.split() if (pid := int(line))] if text else []

    def open_procs(self) -> int:
        """A descriptor that moves whoever writes "0" to it into this cgroup; the caller closes it."""
        path = self._file("cgroup.procs")
        try:
            return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as e:
            raise _refusal("open", path, e) from e

    def _file(self, name: str) -> str:
        self._check(name)
        return f"{self._place}/{name}"

    @property
    def _place(self) -> str:
        return "/".join((str(self.mount), *self.parts))  # no Path: it would keep each part for ever

    @staticmethod
    def _check(name: str) -> None:
        if "/" in name or name in ("", ".", ".."):
            raise UsageError(f"cgroup file {name!r} is not an interface file name")


def _open_or_none(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as e:
        if e.errno in _GONE:
            return None
        raise _refusal("open", path, e) from e


def _refusal(what: str, path: str, error: OSError) -> KernelRefusedError | NotPermittedError:
    """The kernel's no as one sentence; lack of rights apart from the rest, because the remedy differs."""
    reason = f"cannot {what} {path}: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermittedError(f"{reason}; run as root")
    if error.errno == errno.EROFS:
        return NotPermittedError(f"{reason}; cgroupfs is mounted read-only, as in an unprivileged container")
    return KernelRefusedError(reason)
