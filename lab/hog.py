"""A process that takes memory when it is told to, and says when it has it: for tests of limits. Linux, stdlib only.

It takes nothing by itself, holds what it took until it ends, and ends with the `with`. What it is made of is charged to
wherever it was started; what it takes, to the cgroup it is in by then.
"""

import ctypes
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

# Reads a line, does it, answers. Files are read without read-ahead, so that no more is taken than was asked for.
_CODE = """
import mmap, os, sys
held, files = [], {}
for line in sys.stdin:
    kind, mib, path = line.rstrip("\\n").split(" ", 2)
    size = int(mib) << 20
    if kind in ("anon", "lock"):
        taken = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
        if kind == "lock":
            import ctypes
            start = ctypes.byref(ctypes.c_char.from_buffer(taken))
            ctypes.CDLL(None).mlock(start, ctypes.c_size_t(size)) and sys.exit("not locked")
        for at in range(0, size, mmap.PAGESIZE):
            taken[at] = 1
        held.append(taken)
    elif kind == "file":
        if path not in files:
            files[path] = os.open(path, os.O_RDONLY)
            os.posix_fadvise(files[path], 0, 0, os.POSIX_FADV_RANDOM)
        while size > 0:
            size -= len(os.read(files[path], 1 << 20)) or sys.exit("file too short")
    print("done", flush=True)
"""


def cold_file(path: Path, mib: int, patience: float = 30.0) -> Path:
    """A file of so many MiB of which nothing is in the page cache: whoever reads it first is charged for all of it."""
    deadline = time.monotonic() + patience
    with open(path, "w+b") as file:
        for _ in range(mib):
            file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        while True:
            # One call may leave pages behind that some CPU holds on a list of its own.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not _any_cached(file.fileno(), mib):
                return path
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} does not leave the page cache")
            time.sleep(0.01)


def _any_cached(fd: int, mib: int) -> bool:
    """mincore(2): asking by a read that may not wait would start a read-ahead."""
    with mmap.mmap(fd, mib << 20, access=mmap.ACCESS_COPY) as mapped:
        told = (ctypes.c_ubyte * ((mib << 20) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(start), ctypes.c_size_t(mib << 20), told)
        del start  # or the mapping could not be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
    return any(page & 1 for page in told)


class Hog:
    """One such process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def take(self, mib: int) -> bool:
        """MiB of anonymous memory, touched; False if it was killed over it."""
        return self._tell(f"anon {mib} -")

    def pin(self, mib: int) -> bool:
        """The same, and not to be swapped out."""
        return self._tell(f"lock {mib} -")

    def read(self, mib: int, file: Path) -> bool:
        """The next MiB of a file, into the page cache."""
        return self._tell(f"file {mib} {file}")

    def lives(self) -> bool:
        """Whether it answers: neither killed nor stopped."""
        return self._tell("nothing 0 -")

    def __enter__(self) -> Self:
        if not self.lives():  # up before it is put anywhere
            raise RuntimeError("the hog did not start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def _tell(self, line: str) -> bool:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a hog has both ends of its pipes")
        try:
            self._process.stdin.write(f"{line}\n")
        except BrokenPipeError:
            return False
        return self._process.stdout.readline() == "done\n"
