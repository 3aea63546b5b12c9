"""What a job's memory was and who had it, taken at the moment that it runs out.

Reads only, and only what cannot wait for the processes it tells of: these may hold their own locks while they wait for
memory, so cmdline, environ, maps and smaps of /proc/PID, which take mmap_lock, are not for here. Decides nothing.
man 5 proc; admin-guide/cgroup-v1/memory.rst (5.2 "stat file"), admin-guide/cgroup-v2.rst ("Memory Interface Files").
"""

import os
import time
from collections.abc import Iterable
from typing import NamedTuple

from acctd.kernel.cgroupfs import CgroupDir
from acctd.metrics import MEMORY_ANON, MEMORY_FILE, MEMORY_KERNEL, MEMORY_SHMEM, MEMORY_SWAP
from acctd.policies import LargeProcess
from collectors.memory import parse_memory_stat_v1, parse_memory_stat_v2
from collectors.parse import parse_number, parse_stat

_KINDS = {MEMORY_ANON: "anon", MEMORY_SHMEM: "shmem", MEMORY_FILE: "file", MEMORY_KERNEL: "kernel", MEMORY_SWAP: "swap"}

# Beside the kinds, under v2's names. v1 (6.18) tells nothing of what its kernel memory is made of:
#   total_dirty 0
#   total_writeback 0
#   total_unevictable 0
_MORE_V1 = {b"total_dirty": "file_dirty", b"total_writeback": "file_writeback", b"total_unevictable": "unevictable"}

# v2 (6.1):
#   kernel_stack 16384
#   pagetables 73728
#   sock 0
#   file_dirty 0
#   file_writeback 0
#   unevictable 0
#   slab 206208
_MORE_V2 = {
    name.encode(): name
    for name in ("sock", "kernel_stack", "pagetables", "slab", "file_dirty", "file_writeback", "unevictable")
}

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class Largest(NamedTuple):
    """The largest processes of some, largest first, and how many there was no time to look at."""

    processes: tuple[LargeProcess, ...]
    unseen: int = 0


def breakdown(directory: CgroupDir) -> dict[str, int] | None:
    """Bytes by kind of a memory cgroup and all below it; None where it is gone. Raises MalformedFile.

    anon, shmem, file (without shmem), kernel and sock are apart and make up the usage; swap comes on top. kernel_stack,
    pagetables and slab are within kernel, file_dirty and file_writeback within file, unevictable within any.
    What the kernel does not tell is absent: on v1 sock and what is within kernel, on RHEL 7 shmem.
    """
    path = str(directory.path)
    if (text := directory.read("memory.stat")) is None:
        return None
    if directory.has("memory.usage_in_bytes"):
        readings, more, apart = (
            parse_memory_stat_v1(text, path),
            _MORE_V1,
            (MEMORY_KERNEL, "memory.kmem.usage_in_bytes"),
        )
    else:
        readings, more, apart = parse_memory_stat_v2(text, path), _MORE_V2, (MEMORY_SWAP, "memory.swap.current")
    metric, file = apart
    if (number := directory.read(file)) is not None:
        readings[metric, ""] = parse_number(number, f"{path}/{file}")
    kinds = {name: readings[metric, ""] for metric, name in _KINDS.items() if (metric, "") in readings}
    found = parse_stat(text, path, tuple(more))
    return kinds | {name: found[line] for line, name in more.items() if line in found}


def largest(pids: Iterable[int], count: int = 10, budget: float = 0.004) -> Largest:
    """The `count` processes with most memory resident, largest first, within about `budget` seconds.

    Where time is too short for all, the lowest pids are looked at: memory takes time to fill, so what is large is old.
    A process that is gone, or has given its memory back already, is not among them; nor are threads. Never raises for
    a process that cannot be read: that one counts as not looked at.
    """
    until = time.monotonic() + budget
    waiting = sorted(set(pids))
    sizes: list[tuple[int, int]] = []  # pages, less, so that the largest sorts first; pid
    unseen = 0
    for index, pid in enumerate(waiting):
        if time.monotonic() > until:
            unseen += len(waiting) - index
            break
        try:
            pages = _pages(pid)
        except OSError:
            unseen += 1
            continue
        if pages:
            sizes.append((-pages, pid))
    sizes.sort()
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    found: list[LargeProcess] = []
    for pages, pid in sizes:
        if len(found) == count:
            break
        try:
            process = _process(pid, -pages * _PAGE, booted)
        except OSError:
            unseen += 1
            continue
        if process is not None:
            found.append(process)
    return Largest(tuple(found), unseen)


# /proc/<pid>/statm, in pages; the second number is what is resident:
#   24107 9120 3310 1 0 7411 0
def _pages(pid: int) -> int:
    """Resident pages; 0 for one that is gone."""
    text = _read(pid, "statm")
    return int(text.split(b" ", 2)[1]) if text else 0


# /proc/<pid>/stat; the name, in parentheses, may hold parentheses, blanks and newlines; start time is the 22nd field:
#   4242 (dd) R 4241 4242 4200 34816 4242 4194304 117 0 0 0 2 11 0 0 20 0 1 0 881231 6021120 ...
# /proc/<pid>/status, between others; for a thread that is not the first of its process the two differ:
#   Tgid:   4242
#   Pid:    4242
def _process(pid: int, resident: int, booted: float) -> LargeProcess | None:
    """Who this is; None for a thread, or one that is gone."""
    stat, status = _read(pid, "stat"), _read(pid, "status")
    if not stat or not status or b"\nTgid:\t%d\n" % pid not in status:
        return None
    head, _, tail = stat.rpartition(b")")
    # Not every name is UTF-8, and a record must be.
    name = head.partition(b"(")[2].decode(errors="replace")
    started = round(booted + int(tail.split()[19]) / _TICKS, 2)  # no finer than the ticks are
    return LargeProcess(pid, name, resident, started)


def _read(pid: int, file: str) -> bytes:
    """One small file of a process, "" if that is gone. Without Python's streams, which take twice as long."""
    try:
        fd = os.open(f"/proc/{pid}/{file}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 4096)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        return b""
