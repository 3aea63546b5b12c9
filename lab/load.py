"""A load of known size: a job command that takes so much memory of each kind, CPU and disk, and says when it has it.

    load.py [--anon SIZE] [--shm SIZE] [--file SIZE] [--write SIZE] [--directory DIR] [--cpu SECONDS]
            [--children N] [--hold | --seconds S]

SIZE is bytes or like 200M. --anon is what the process comes to in all, interpreter included: it takes what is missing,
by /proc/self/smaps_rollup, which knows nothing of cgroups. --shm is a shared anonymous mapping, --file a file that
stays in the page cache; both are touched whole. --write writes to the disk itself (O_DIRECT), in pieces of 64 KiB.
With --children, N forks share all of it, and each touches what it shares. Then one line of JSON on standard output says
what is held and by which processes. --hold keeps it until standard input gives a line or ends, --seconds so long.
Files made here are unlinked before anything is written, so that none is left. Standard library only, one file: it must
run in any namespace, as any user.
"""

import argparse
import json
import mmap
import os
import sys
import tempfile
import time

PIECE = 1 << 16
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main() -> None:
    parser = argparse.ArgumentParser(description="Take memory of each kind, CPU and disk, and say when it is taken.")
    for name in ("anon", "shm", "file", "write"):
        parser.add_argument(f"--{name}", type=size, default=0, metavar="SIZE")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where --file and --write make their files")
    parser.add_argument("--cpu", type=float, default=0.0, metavar="SECONDS", help="CPU time to use up")
    parser.add_argument("--children", type=int, default=0, metavar="N", help="forks that share the memory")
    parser.add_argument("--seconds", type=float, default=0.0, help="keep it so long")
    parser.add_argument("--hold", action="store_true", help="keep it until standard input gives a line or ends")
    wanted = parser.parse_args()

    cached = cache(wanted.directory, wanted.file)
    if wanted.write:
        write_direct(wanted.directory, wanted.write)
    burn(wanted.cpu)
    shared = mapping(wanted.shm, mmap.MAP_SHARED)
    # Last, so that what the rest took is known.
    private = mapping(wanted.anon - anonymous(), mmap.MAP_PRIVATE)
    family = Family(wanted.children, [kept for kept in (shared, private) if kept])
    held = {"anon": anonymous(), "shm": wanted.shm, "file": wanted.file, "pids": [os.getpid(), *family.pids]}
    try:
        print(json.dumps(held), flush=True)
        time.sleep(wanted.seconds)
        if wanted.hold:
            sys.stdin.readline()
    finally:
        family.close()
        if cached is not None:
            os.close(cached)


def size(text: str) -> int:
    """Bytes from 200M; argparse turns the ValueError into its own sentence."""
    unit = _UNITS.get(text[-1:].upper())
    return int(text) if unit is None else int(text[:-1]) * unit


# /proc/self/smaps_rollup, since 4.14:
#   559f72d6d000-7ffd6d5a3000 ---p 00000000 00:00 0                          [rollup]
#   Rss:                9480 kB
#   Anonymous:          4552 kB
def anonymous() -> int:
    """This process's anonymous memory, bytes; what is mapped shared is not part of it, as in the kernel's accounts."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Anonymous")


def mapping(length: int, kind: int) -> mmap.mmap | None:
    """Memory of this length, every page of it written; None for no length."""
    if length < mmap.PAGESIZE:
        return None
    made = mmap.mmap(-1, length, flags=kind | mmap.MAP_ANONYMOUS)
    for offset in range(0, length, mmap.PAGESIZE):
        made[offset] = 1
    return made


def cache(directory: str, length: int) -> int | None:
    """A file of this length, written and read back once; its pages stay while the descriptor is open."""
    if not length:
        return None
    fd, path = tempfile.mkstemp(dir=directory)
    os.unlink(path)
    _fill(fd, length, b"c" * PIECE)
    while os.read(fd, PIECE):
        pass
    return fd


def write_direct(directory: str, length: int) -> None:
    """Write a file of this length past the page cache. The length must be whole pages: so the disk wants it."""
    fd, path = tempfile.mkstemp(dir=directory)
    os.close(fd)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    os.unlink(path)
    with mmap.mmap(-1, PIECE) as aligned:
        _fill(fd, length, aligned)
    os.close(fd)


def _fill(fd: int, length: int, piece: bytes | mmap.mmap) -> None:
    with memoryview(piece) as view:
        offset = 0
        while offset < length:
            offset += os.pwrite(fd, view[: length - offset], offset)


def burn(seconds: float) -> None:
    """Use up so much CPU time of this process, on top of what it has used."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


class Family:
    """Forks that have read every page they share, and live until close(), or until their parent is gone."""

    def __init__(self, count: int, shared: list[mmap.mmap]) -> None:
        ready, told = os.pipe()
        watched, self._life = os.pipe()
        self.pids: list[int] = []
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                os.close(self._life)
                for kept in shared:
                    sum(kept[offset] for offset in range(0, len(kept), mmap.PAGESIZE))
                os.write(told, b".")
                os.read(watched, 1)  # nobody writes: it returns when the last writing end is gone
                os._exit(0)
            self.pids.append(pid)
        os.close(told)
        os.close(watched)
        for _ in self.pids:
            if not os.read(ready, 1):
                raise ChildProcessError("a child ended before it had touched its memory")
        os.close(ready)

    def close(self) -> None:
        os.close(self._life)
        for pid in self.pids:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
